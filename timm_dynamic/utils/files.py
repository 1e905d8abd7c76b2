"""Atomic writing of files: a file is complete, or does not exist."""
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARTIAL = '.partial-'


def fsync_dir(folder: Path) -> None:
    """Write renames inside `folder` to the disk. Does nothing on Windows, which cannot open folders."""
    if os.name == 'nt':
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. On success, sync it and rename it to `path`; on error, remove it.

    A reader sees the old file or the new one, never a part of it. A killed process leaves a `.partial-*` file, which
    `clean_partial_files` removes.
    """
    path = Path(path)
    # Keep the extension: pandas, matplotlib and others choose the format by it.
    tmp = path.with_name(f'{_PARTIAL}{os.getpid()}-{path.name}')
    try:
        yield tmp
        with open(tmp, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file is not JSON, or not a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"'{path}' is not valid JSON: {e}.") from e
    if not isinstance(value, dict):
        raise ValueError(f"'{path}': expected a JSON object, got {type(value).__name__}.")
    return value


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def partial_name(name: str) -> str:
    """Temporary name for an unfinished file or folder, which `clean_partial_files` removes."""
    return f'{_PARTIAL}{os.getpid()}-{name}'


def clean_partial_files(folder: str | Path) -> None:
    """Remove unfinished files and folders of killed processes in `folder`, not in its sub-folders."""
    for path in Path(folder).glob(f'{_PARTIAL}*'):
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder, but nothing that is reached through a symbolic link."""
    if not (folder.is_symlink() or folder.parent.is_symlink()):
        shutil.rmtree(folder, ignore_errors=True)
