"""Weights from the Hugging Face Hub, compared with the hash that stands in their config.json.

The client checks a file's size, not its content: wrong bytes of the right length would be taken, and kept.
"""
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .checkpoint import CheckpointError
from .files import read_json, sha256_of

_logger = logging.getLogger(__name__)

_CONFIG = 'config.json'
_WAITS = (1, 4)  # seconds before a server's error is taken for its last word
_TRANSIENT = (408, 429, 500, 502, 503, 504)


def is_transient(error: BaseException | None) -> bool:
    """Whether a request to the Hub may succeed if it is made again."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response is not None and error.response.status_code in _TRANSIENT
        # Transport errors are those of the client's HTTP library, of which it has had three.
        if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__name__ in (
                'ConnectError', 'ReadError', 'WriteError', 'RemoteProtocolError', 'ConnectTimeout', 'ReadTimeout'):
            return True
        error = error.__cause__
    return False


def fetch_weights(
        repo: str,
        filename: str = 'model.safetensors',
        cache_dir: str | Path | None = None,
) -> Path:
    """Download weights and the config.json of the same revision; compare the weights with the hash given there.

    A file whose content is wrong is removed from the cache and fetched once more. Repositories whose config.json gives
    no `weights_sha256` are not checked.

    Args:
        repo: 'ORG/NAME' or 'ORG/NAME@REVISION'.
        filename: Of the weights.
        cache_dir: Of downloads. Default: the client's.

    Returns:
        Path of the weights, in the folder where config.json is, too.

    Raises:
        CheckpointError: There is no such repository, revision or file; it cannot be reached; or its content is wrong.
    """
    repo, _, revision = repo.partition('@')
    fetch = partial(download_file, repo, cache_dir=cache_dir)
    try:
        for _ in range(2):
            path = fetch(filename, revision or None)
            # of the very snapshot that the weights are from
            revision = path.parents[filename.count('/')].name
            config = _read_config(fetch, repo, revision, cache_dir)
            expected = config.get('weights_sha256')
            if expected is None or sha256_of(path) == expected:
                return path
            _evict(path)
            _logger.warning(f"'{filename}' of '{repo}' is not what its config.json says; fetching it once more.")
    except LocalEntryNotFoundError as e:  # first: it is an EntryNotFoundError, too
        refused = isinstance(e.__cause__, HfHubHTTPError) and not is_transient(e.__cause__)
        why = f'answers: {_first_line(e.__cause__)}' if refused and e.__cause__ else \
            'cannot be reached. Try again when online'
        raise CheckpointError(f"'{repo}' is not in the local cache, and the Hugging Face Hub {why}.") from e
    except EntryNotFoundError as e:
        raise CheckpointError(f"'{repo}' on the Hugging Face Hub holds no {filename}.") from e
    except RevisionNotFoundError as e:
        raise CheckpointError(f"'{repo}' on the Hugging Face Hub has no revision '{revision}'.") from e
    except GatedRepoError as e:  # it is a RepositoryNotFoundError, too
        raise CheckpointError(
            f"'{repo}' on the Hugging Face Hub is open only to those whom its owners let in: ask there, and log in "
            '(`hf auth login`).') from e
    except (HfHubHTTPError, OSError, ValueError) as e:
        if isinstance(e, HfHubHTTPError) and (e.response.status_code == 401 or isinstance(e, RepositoryNotFoundError)):
            raise CheckpointError(
                f"The Hugging Face Hub has no repository '{repo}' (yet), or it is private and you are not logged in "
                '(`hf auth login`).') from e
        raise CheckpointError(f"'{repo}' could not be fetched from the Hugging Face Hub: {_first_line(e)}.") from e
    raise CheckpointError(
        f"'{filename}' of '{repo}' arrived twice with a content whose SHA-256 is not the one in its config.json "
        f'({expected}). It was removed from the cache and not loaded.')


def download_file(repo: str, filename: str, revision: str | None, cache_dir: str | Path | None = None) -> Path:
    """Download a file, again where the server fails: the client does so for some requests only.

    Raises:
        OSError: Among them the client's own errors: there is no such file, or it cannot be had.
    """
    for wait in (*_WAITS, None):
        try:
            return Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir))
        except EntryNotFoundError:
            raise
        except Exception as e:
            if not is_transient(e):
                raise
            if wait is None:
                raise ConnectionError(_first_line(e)) from e
            _logger.warning(f"'{filename}' of '{repo}': {_first_line(e)}; trying again in {wait} s.")
            time.sleep(wait)
    raise AssertionError('unreachable')


def _read_config(fetch: Any, repo: str, revision: str, cache_dir: str | Path | None) -> dict[str, Any]:
    """Content of config.json; empty if the repository has none."""
    for again in (True, False):
        try:
            path = fetch(_CONFIG, revision)
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(repo, _CONFIG, cache_dir, revision) is _CACHED_NO_EXIST:
                return {}
            raise
        except EntryNotFoundError:
            return {}
        try:
            return read_json(path)
        except ValueError as e:
            _evict(path)
            if not again:
                raise CheckpointError(f"config.json of '{repo}' is no JSON object: {_first_line(e)}.") from e
    raise AssertionError('unreachable')


def _evict(path: Path) -> None:
    """Remove a file from the cache: the content, and the link to it."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
