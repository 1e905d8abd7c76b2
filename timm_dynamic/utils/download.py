"""Download weights from the Hugging Face Hub and compare them with the hash in their config.json.

huggingface_hub compares sizes, not contents: without this comparison, damaged files of the right size would be loaded.
"""
import logging
import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .checkpoint import CheckpointError
from .export import CONFIG, WEIGHTS
from .files import read_json, sha256_of

_logger = logging.getLogger(__name__)

T = TypeVar('T')

# 412: the branch has moved since the request was prepared. 429: too many requests. The others are faults of the server.
_TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
# Transport errors belong to the client's HTTP library, which has changed with its versions: requests, httpx, httpx2.
_TRANSPORT_ERRORS = (
    'ConnectError', 'ReadError', 'WriteError', 'RemoteProtocolError', 'ConnectTimeout', 'ReadTimeout')


def status_of(error: BaseException | None) -> int:
    """HTTP status that an error of huggingface_hub reports; 0 if it reports none."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return response.status_code if response is not None else 0


def first_line(error: BaseException) -> str:
    """First line of an error's message without its full stop, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')


def is_transient(error: BaseException | None) -> bool:
    """Whether a request to the Hub may succeed if it is repeated."""
    if isinstance(error, EntryNotFoundError):  # also if the Hub cannot be reached: the client has repeated its request
        return False
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return status_of(error) in _TRANSIENT
        if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__name__ in _TRANSPORT_ERRORS:
            return True
        error = error.__cause__
    return False


def retry(request: Callable[[], T], what: str, waits: Sequence[float] = (1, 4)) -> T:
    """Make a request to the Hub, and repeat it after transient errors. The client itself repeats only some requests.

    Args:
        request: Makes the request.
        what: Names the request in the log.
        waits: Seconds to wait before each repetition.

    Raises:
        ConnectionError: The last error was transient, too. Its cause is that error.
        Exception: The request's own error, if it is not transient.
    """
    for wait in (*waits, None):
        try:
            return request()
        except Exception as e:
            if not is_transient(e):
                raise
            if wait is None:
                raise ConnectionError(first_line(e)) from e
            _logger.warning(f'{what}: {first_line(e)}; trying again in {wait} s.')
            time.sleep(wait)
    raise AssertionError('unreachable')


def can_connect(attempts: int = 2, timeout: float = 10) -> bool:
    """Whether a connection to the Hub, or to the proxy in front of it, can be opened.

    Without a connection, the Hub's client repeats its request for 23 s, for every file.

    Args:
        attempts: Number of attempts, one second apart.
        timeout: Of each attempt, in seconds.
    """
    if hub_constants.HF_HUB_OFFLINE:
        return False
    url = urlsplit(hub_constants.ENDPOINT)
    proxy = None if urllib.request.proxy_bypass(url.netloc) else urllib.request.getproxies().get(url.scheme)
    if proxy:
        url = urlsplit(proxy if '://' in proxy else f'http://{proxy}')
    try:
        address = url.hostname or '', url.port or (443 if url.scheme == 'https' else 80)
    except ValueError:  # not a port: let the client say so
        return True
    if url.scheme not in ('http', 'https'):  # e.g. a SOCKS proxy
        return True
    for left in reversed(range(attempts)):
        try:
            socket.create_connection(address, timeout).close()
            return True
        except OSError:
            if left:
                time.sleep(1)
    return False


def check_available(repo: str, cache_dir: str | Path | None = None) -> None:
    """Raise an error at once if timm would have to download weights, and the Hub cannot be reached.

    Args:
        repo: 'ORG/NAME' or 'ORG/NAME@REVISION', of a timm model.
        cache_dir: Folder for downloads. Default: huggingface_hub's.

    Raises:
        FileNotFoundError: The weights are not in the cache, and there is no connection to the Hub.
    """
    name, _, revision = repo.partition('@')
    cached = (
        try_to_load_from_cache(name, file, cache_dir, revision or None) for file in (WEIGHTS, 'pytorch_model.bin'))
    if not any(isinstance(path, str) for path in cached) and not can_connect():
        raise FileNotFoundError(
            f"'{repo}' is not in the local cache, and the Hugging Face Hub cannot be reached. Try again when online.")


def fetch_weights(
        repo: str,
        filename: str = WEIGHTS,
        cache_dir: str | Path | None = None,
) -> Path:
    """Download weights and the config.json of the same revision, and compare the weights with the hash in config.json.

    If the hash differs, the file is removed from the cache and downloaded once more. Weights of repositories whose
    config.json has no `weights_sha256` are not compared.

    Args:
        repo: 'ORG/NAME' or 'ORG/NAME@REVISION'.
        filename: Name of the weights in the repository.
        cache_dir: Folder for downloads. Default: huggingface_hub's.

    Returns:
        Path of the weights. config.json lies in the same folder.

    Raises:
        CheckpointError: The repository, revision or file does not exist or cannot be reached, or its content is wrong.
    """
    repo, _, revision = repo.partition('@')
    fetch = partial(download_file, repo, cache_dir=cache_dir)
    try:
        for _ in range(2):
            path = fetch(filename, revision or None)
            revision = path.parents[filename.count('/')].name  # config.json must come from the same snapshot
            expected = _read_config(fetch, repo, revision, cache_dir).get('weights_sha256')
            if expected is None or sha256_of(path) == expected:
                return path
            _evict(path)
            _logger.warning(f"'{filename}' of '{repo}' differs from the hash in config.json; downloading it again.")
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as e:
        raise CheckpointError(_explain(e, repo, revision, filename)) from e
    raise CheckpointError(
        f"The SHA-256 of '{filename}' from '{repo}' differed twice from the one in config.json ({expected}). The file "
        'was removed from the cache and not loaded.')


def _explain(error: BaseException, repo: str, revision: str, filename: str) -> str:
    # Subclasses come first: LocalEntryNotFoundError is an EntryNotFoundError, GatedRepoError a RepositoryNotFoundError.
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        refused = isinstance(cause, HfHubHTTPError) and not is_transient(cause)
        why = f'answers: {first_line(cause)}' if refused and cause else 'cannot be reached. Try again when online'
        return f"'{repo}' is not in the local cache, and the Hugging Face Hub {why}."
    if isinstance(error, EntryNotFoundError):
        return f"'{repo}' on the Hugging Face Hub has no file {filename}."
    if isinstance(error, RevisionNotFoundError):
        return f"'{repo}' on the Hugging Face Hub has no revision '{revision}'."
    if isinstance(error, GatedRepoError):
        return (f"Access to '{repo}' on the Hugging Face Hub is restricted. Request access on its page, then log in "
                '(`hf auth login`).')
    if isinstance(error, RepositoryNotFoundError) or status_of(error) == 401:
        return (f"The Hugging Face Hub has no repository '{repo}' (yet), or it is private and you are not logged in "
                '(`hf auth login`).')
    return f"'{repo}' could not be downloaded from the Hugging Face Hub: {first_line(error)}."


def download_file(repo: str, filename: str, revision: str | None, cache_dir: str | Path | None = None) -> Path:
    """Download a file into the cache, see `retry`.

    Raises:
        OSError: The file cannot be downloaded. huggingface_hub's own errors are OSErrors.
    """
    request = partial(
        hf_hub_download, repo, filename, revision=revision, cache_dir=cache_dir, local_files_only=not can_connect())
    return Path(retry(request, f"'{filename}' of '{repo}'"))


def _read_config(fetch: Callable[..., Path], repo: str, revision: str, cache_dir: str | Path | None) -> dict[str, Any]:
    """Content of config.json; empty if the repository has none."""
    for again in (True, False):
        try:
            path = fetch(CONFIG, revision)
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(repo, CONFIG, cache_dir, revision) is _CACHED_NO_EXIST:
                return {}
            raise
        except EntryNotFoundError:
            return {}
        try:
            return read_json(path)
        except ValueError as e:
            _evict(path)
            if not again:
                raise CheckpointError(f"config.json of '{repo}' is not a JSON object: {first_line(e)}.") from e
    raise AssertionError('unreachable')


def _evict(path: Path) -> None:
    """Remove a file from the cache: the content and the link to it."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
