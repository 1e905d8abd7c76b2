"""Publish exported folders on the Hugging Face Hub and verify the result."""
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import timm
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..utils import CheckpointError, UserError, fetch_weights, sha256_of
from ..utils.download import download_file, retry, status_of
from ..utils.export import CONFIG, WEIGHTS
from ..version import __version__
from .card import CARD, PICTURE
from .catalog import Entry
from .check import check_in_fresh_process, fixed_logits
from .config import read_config

T = TypeVar('T')

_PICKLES = ('.pth', '.pt', '.bin', '.tar', '.th', '.pkl', '.pickle', '.ckpt', '.joblib', '.npy', '.npz', '.zip')
_WAITS = (1, 2, 4, 8, 8, 8)  # seconds between tries


class PublishError(UserError, RuntimeError):
    """A folder cannot be published, or the published files are wrong."""


def files_to_publish(folder: str | Path) -> dict[str, Path]:
    """List the files of a folder that are published, and check that they are complete and safe.

    Args:
        folder: Folder that `convert` or `describe` wrote.

    Returns:
        Paths by name: model.safetensors, config.json, README.md and, if it exists, the plot.

    Raises:
        PublishError: A file is missing, a link, a pickle or damaged, or config.json belongs to other weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(f"There is no folder '{folder}'.")
    for path in sorted(folder.rglob('*')):
        if path.is_symlink():
            raise PublishError(f"'{path}' is a symbolic link. Links are not followed: put the file itself there.")
        if path.is_file() and path.name.endswith(_PICKLES):
            raise PublishError(
                f"'{path}' may be a pickle, which can run code when it is read. Such folders are not published. "
                'Expected model.safetensors, config.json and README.md.')
    files = {name: folder / name for name in (WEIGHTS, CONFIG, CARD, PICTURE)}
    missing = [name for name, path in files.items() if name != PICTURE and not path.is_file()]
    if missing:
        raise PublishError(f"'{folder}' lacks {', '.join(missing)}. hfhub/convert.py and train.py --push-to-hub write "
                           'complete folders.')
    try:
        with safe_open(files[WEIGHTS], 'pt') as f:
            f.keys()
    except (SafetensorError, OSError) as e:
        raise PublishError(f"'{files[WEIGHTS]}' is not a safetensors file ({e}).") from e
    try:
        config = read_config(files[CONFIG])
        json.dumps(config, allow_nan=False)
    except ValueError as e:
        raise PublishError(f"'{files[CONFIG]}' is damaged: {e}") from e
    if config.get('weights_sha256') != sha256_of(files[WEIGHTS]):
        raise PublishError(
            f"'{files[WEIGHTS]}' does not have the SHA-256 in config.json ({config.get('weights_sha256')}).")
    return {name: path for name, path in files.items() if path.is_file()}


def check_permission(entry: Entry, permitted: bool = False) -> None:
    """Check that a model may be published.

    Raises:
        PublishError: The authors state no licence, and `permitted` is False.
    """
    if entry.licence is None and not permitted:
        raise PublishError(
            f'{entry.name} may not be published: {entry.licence_note or "no licence is stated."} If the authors permit '
            'it, add --i-have-permission.')


def check_login(repo_id: str) -> str:
    """Check that publishing can begin: the id is valid, and the Hub accepts the token.

    Returns:
        Name of the user.

    Raises:
        PublishError: There is no token, the Hub refuses it, or the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise PublishError(str(e)) from e
    if '/' not in repo_id:
        raise PublishError(f"Expected a repository as ORG/NAME, got '{repo_id}'.")
    if get_token() is None:
        raise PublishError('There is no token for the Hugging Face Hub: log in with `hf auth login` or set HF_TOKEN.')
    return str(_call('log in', lambda: HfApi().whoami())['name'])


def publish(
        folder: str | Path,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        verify: bool = True,
) -> dict[str, Any]:
    """Bring a repository on the Hub to the state of a folder in one commit, and verify the result.

    Only files that differ are sent. Large files that an interrupted run has sent are not sent again. If nothing
    differs, there is no commit. The token comes from huggingface_hub's login.

    Args:
        folder: See `files_to_publish`.
        repo_id: 'ORG/NAME'; created if needed.
        private: Create a private repository.
        revision: Branch; created if needed. Default: main.
        verify: Download the published files and compare them, see `verify_published`.

    Returns:
        A report. 'repo', 'url', 'commit': hash of the commit, 'uploaded': names of the files that changed, and, if
        verified, 'difference': largest difference between logits.

    Raises:
        PublishError: The folder cannot be published, the Hub refuses or cannot be reached, or verification failed.
    """
    files = files_to_publish(folder)
    try:
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as e:  # a wrong config.json makes timm raise errors of many types
        raise PublishError(f"'{folder}' is not published because it does not load: {_explain(e)}") from e
    check_login(repo_id)
    api = HfApi()
    _call(f'create {repo_id}', lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if revision:
        branch = revision
        _call(f'create the branch {branch}', lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))

    def read(at: str | None) -> ModelInfo:
        return api.model_info(repo_id, revision=at, files_metadata=True)

    def commit() -> CommitInfo:
        # create_commit skips files that have not changed. It compares each operation with the Hub only once, so each
        # try needs new ones: the try before may have changed the Hub although its answer was lost.
        return api.create_commit(
            repo_id, [CommitOperationAdd(name, path) for name, path in files.items()], revision=revision,
            commit_message=f'Publish with timm_dynamic {__version__}', parent_commit=read(revision).sha)

    before = _call(f'read {repo_id}', lambda: read(revision))
    if private and before.private is False:
        raise PublishError(f'{repo_id} already exists and is public. Make it private on the Hub first.')
    sha = str(_call(f'publish {repo_id}', commit).oid)
    old, new = (
        {file.rfilename: file.blob_id for file in info.siblings or ()}
        for info in (before, _call(f'read {repo_id}', lambda: read(sha))))
    report: dict[str, Any] = {
        'repo': repo_id, 'commit': sha, 'uploaded': [name for name in files if new.get(name) != old.get(name)],
        'url': f'{api.endpoint}/{repo_id}'}
    if verify:
        report['difference'], = verify_published([(folder, repo_id, sha)]).values()
    return report


def verify_published(published: Iterable[tuple[str | Path, str, str]]) -> dict[str, float]:
    """Download repositories into an empty cache and compare them with the folders they were published from.

    Compares the SHA-256 of all files, and logits in a fresh process.

    Args:
        published: Folder, 'ORG/NAME' and hash of the commit, for each repository.

    Returns:
        Largest absolute difference between logits, by repository.

    Raises:
        PublishError: Files or logits differ.
    """
    published = list(published)
    expected = {}
    with tempfile.TemporaryDirectory() as cache:
        for folder, repo_id, revision in published:
            model: Any = timm.create_model(f'local-dir:{folder}', pretrained=True)
            expected[f'hf-hub:{repo_id}@{revision}'] = fixed_logits(model)
            try:
                fetch_weights(f'{repo_id}@{revision}', cache_dir=cache)
                for name, path in files_to_publish(folder).items():
                    if sha256_of(download_file(repo_id, name, revision, cache)) != sha256_of(path):
                        raise PublishError(f"'{name}' in {repo_id} differs from '{path}'. Publish it again.")
            except (CheckpointError, OSError) as e:
                raise PublishError(f'{repo_id} was published, but verification failed: {e}') from e
        try:
            found = check_in_fresh_process(expected, cache)
        except CheckpointError as e:
            raise PublishError(f'Published, but verification failed: {e}') from e
    return dict(zip((repo_id for _, repo_id, _ in published), found.values()))


def _call(what: str, request: Callable[[], T]) -> T:
    """Make a request with `retry`; its errors become PublishErrors."""
    try:
        return retry(request, f'Could not {what}', _WAITS)
    except Exception as e:  # transport errors have no common type, see `is_transient`
        raise PublishError(f'Could not {what}: {_explain(e)}') from e


def _explain(error: BaseException) -> str:
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    status = status_of(error)
    if status in (401, 403):
        return f'the Hub refuses the token ({status}). Log in with a token that has write access (`hf auth login`).'
    return ' '.join((str(error).strip() or type(error).__name__).split())[:300]
