"""Publish exported folders on the Hugging Face Hub, and see that what is there is what was meant."""
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

from ..utils import CheckpointError, fetch_weights, read_json, sha256_of
from ..utils.download import download_file, retry, status_of
from ..utils.export import CONFIG, WEIGHTS
from ..version import __version__
from .card import CARD, PICTURE
from .catalog import Entry
from .check import check_in_fresh_process, fixed_logits

T = TypeVar('T')

_PICKLES = ('.pth', '.pt', '.bin', '.tar', '.th', '.pkl', '.pickle', '.ckpt', '.joblib', '.npy', '.npz', '.zip')
_WAITS = (1, 2, 4, 8, 8, 8)  # seconds between tries


class PublishError(RuntimeError):
    """A folder cannot be published, or what was published is not what was meant."""


def files_to_publish(folder: str | Path) -> dict[str, Path]:
    """Find what of a folder goes to the Hub, and see that it is whole and safe.

    Args:
        folder: As `convert` and `finish` leave one.

    Returns:
        Paths by name: model.safetensors, config.json, README.md and, if there is one, the picture of the curve.

    Raises:
        PublishError: A file is missing, is a pickle or no JSON, or the weights are not those that config.json is of.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(f"There is no folder '{folder}'.")
    for path in sorted(folder.rglob('*')):
        if path.is_file() and path.name.endswith(_PICKLES):
            raise PublishError(
                f"'{path}' may be a pickle, which runs code where it is read: nothing is published from a folder that "
                'holds one. Expected model.safetensors, config.json and README.md.')
    files = {name: folder / name for name in (WEIGHTS, CONFIG, CARD, PICTURE)}
    missing = [name for name, path in files.items() if name != PICTURE and not path.is_file()]
    if missing:
        raise PublishError(f"'{folder}' lacks {', '.join(missing)}: hfhub/convert.py and train.py --push-to-hub write "
                           'whole folders.')
    try:
        with safe_open(files[WEIGHTS], 'pt') as f:
            f.keys()
    except (SafetensorError, OSError) as e:
        raise PublishError(f"'{files[WEIGHTS]}' is no safetensors file ({e}).") from e
    try:
        config = read_json(files[CONFIG])
        json.dumps(config, allow_nan=False)
    except ValueError as e:
        raise PublishError(f"'{files[CONFIG]}' is not JSON that everybody reads: {e}") from e
    if config.get('weights_sha256') != sha256_of(files[WEIGHTS]):
        raise PublishError(
            f"'{files[WEIGHTS]}' is not the file that config.json is of (SHA-256 {config.get('weights_sha256')}).")
    return {name: path for name, path in files.items() if path.is_file()}


def check_permission(entry: Entry, permitted: bool = False) -> None:
    """See that a model may be published.

    Raises:
        PublishError: The authors state no licence, and no permission of theirs is claimed.
    """
    if entry.licence is None and not permitted:
        raise PublishError(
            f'{entry.name} may not be published: {entry.licence_note or "no licence is stated."} With their '
            'permission, give --i-have-permission.')


def check_login(repo_id: str) -> str:
    """See that publishing can begin: a valid id, and a token that the Hub knows.

    Returns:
        Name of the user.

    Raises:
        PublishError: There is no token, it is refused, or the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise PublishError(str(e)) from e
    if '/' not in repo_id:
        raise PublishError(f"Expected a repository as ORG/NAME, got '{repo_id}'.")
    if get_token() is None:
        raise PublishError('There is no token for the Hugging Face Hub: log in with `hf auth login`, or set HF_TOKEN.')
    return str(_call('log in', lambda: HfApi().whoami())['name'])


def publish(
        folder: str | Path,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        verify: bool = True,
) -> dict[str, Any]:
    """Bring a repository on the Hub to the state of a folder, in one commit, and see that it arrived.

    Only files that differ are sent; large ones that an interrupted run has sent are not sent again. If nothing
    differs, nothing is committed. The token is that of huggingface_hub's own login.

    Args:
        folder: See `files_to_publish`.
        repo_id: 'ORG/NAME'; created if needed.
        private: Create it as a private one.
        revision: Branch; created if needed. Default: main.
        verify: Download what was published, compare hashes, and logits in a fresh process.

    Returns:
        'repo' and 'commit' (its hash), 'uploaded' (names of files that were sent), 'url', and 'difference' between
        logits, if verified.

    Raises:
        PublishError: The folder is not fit, the Hub refuses or cannot be reached, or something else arrived.
    """
    files = files_to_publish(folder)
    try:
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as e:  # timm's, for what a config.json may hold
        raise PublishError(f"'{folder}' is not published, for it does not load: {_explain(e)}") from e
    check_login(repo_id)
    api = HfApi()
    _call(f'create {repo_id}', lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if revision:
        branch = revision
        _call(f'create the branch {branch}', lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))

    def look(at: str | None) -> ModelInfo:
        return api.model_info(repo_id, revision=at, files_metadata=True)

    def commit() -> CommitInfo:
        # create_commit leaves out files that the Hub has already. It compares each operation only once, and the last
        # try may have arrived although its answer did not: every try has operations of its own.
        return api.create_commit(
            repo_id, [CommitOperationAdd(name, path) for name, path in files.items()], revision=revision,
            commit_message=f'Publish with timm_dynamic {__version__}', parent_commit=look(revision).sha)

    before = _call(f'look at {repo_id}', lambda: look(revision))
    if private and before.private is False:
        raise PublishError(f'{repo_id} is there already, and public. Make it private on the Hub first.')
    sha = str(_call(f'publish {repo_id}', commit).oid)
    old, new = (
        {file.rfilename: file.blob_id for file in info.siblings or ()}
        for info in (before, _call(f'look at {repo_id}', lambda: look(sha))))
    report: dict[str, Any] = {
        'repo': repo_id, 'commit': sha, 'uploaded': [name for name in files if new.get(name) != old.get(name)],
        'url': f'{api.endpoint}/{repo_id}'}
    if verify:
        report['difference'], = verify_published([(folder, repo_id, sha)]).values()
    return report


def verify_published(published: Iterable[tuple[str | Path, str, str]]) -> dict[str, float]:
    """Download repositories anew, and compare them with the folders that they were published from.

    Args:
        published: Folder, 'ORG/NAME', and hash of the commit.

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
                        raise PublishError(
                            f"'{name}' arrived at {repo_id} with another content than that of '{path}'. Publish it "
                            'again.')
            except (CheckpointError, OSError) as e:
                raise PublishError(f'{repo_id} was published, but does not verify: {e}') from e
        try:
            found = check_in_fresh_process(expected, cache)
        except CheckpointError as e:
            raise PublishError(f'Published, but does not verify: {e}') from e
    return dict(zip((repo_id for _, repo_id, _ in published), found.values()))


def _call(what: str, request: Callable[[], T]) -> T:
    """Make a request with `retry`; its errors become PublishErrors."""
    try:
        return retry(request, f'Could not {what}', _WAITS)
    except Exception as e:  # the client's HTTP library has errors of its own, and has changed
        raise PublishError(f'Could not {what}: {_explain(e)}') from e


def _explain(error: BaseException) -> str:
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    status = status_of(error)
    if status in (401, 403):
        return f'the Hub refuses the token ({status}): log in with one that may write there (`hf auth login`).'
    return ' '.join((str(error).strip() or type(error).__name__).split())[:300]
