"""The state of a run on disk: whole or not there, and read back without executing anything.

A state is a folder with tensors (safetensors) and everything else (JSON). It is written under a temporary name, synced
to the disk and renamed; then a file `latest` that names it is replaced in one step. Whoever reads sees the last state
that was written completely, whenever the writer was killed.
"""
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..utils import CheckpointError, UserError, atomic_write, clean_partial_files
from ..utils.files import fsync_dir, partial_name

_POINTER = 'latest'
_TENSORS = 'tensors.safetensors'
_VALUES = 'state.json'
FORMAT = 1


def flatten_state(value: Any, tensors: dict[str, torch.Tensor], name: str = '') -> Any:
    """Turn nested dicts, lists, tuples, tensors and plain values into JSON, tensors put aside.

    Args:
        value: What to store. Keys may be strings or integers, as in an optimizer's state.
        tensors: Filled with contiguous CPU copies of the tensors, by path.
        name: Path of `value`.

    Raises:
        TypeError: Something else is in it; its path is named.
    """
    if isinstance(value, torch.Tensor):
        # A copy even on the CPU: tensors may share memory, which safetensors refuses, and training may go on.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {'tensor': name}
    if isinstance(value, dict):
        items = [[k, flatten_state(v, tensors, f'{name}.{k}' if name else str(k))] for k, v in value.items()]
        if not all(isinstance(k, (str, int)) for k in value):
            raise TypeError(f"Cannot store '{name}': its keys must be strings or integers.")
        return {'dict': items}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else 'list':
                [flatten_state(v, tensors, f'{name}.{i}') for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, 'item') and getattr(value, 'ndim', 1) == 0:  # numpy scalars
        return value.item()
    raise TypeError(f"Cannot store '{name}': a {type(value).__name__} is neither a tensor nor a plain value.")


def unflatten_state(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Invert `flatten_state`."""
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == 'tensor':
        return tensors[content]
    if kind == 'dict':
        return {k: unflatten_state(v, tensors) for k, v in content}
    items = [unflatten_state(v, tensors) for v in content]
    return tuple(items) if kind == 'tuple' else items


class StateError(UserError, RuntimeError):
    """A state could not be written."""


class StateStore:
    """States of one run, in a folder of their own.

    Args:
        folder: Made when the first state is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def save(self, state: dict[str, Any], name: str) -> None:
        """Write a state, then drop the one before it.

        Args:
            state: Nested dicts of tensors and plain values.
            name: Name for the state's folder, e.g. the number of updates.

        Raises:
            StateError: It cannot be written (e.g. the disk is full). The last state is as it was.
        """
        tensors: dict[str, torch.Tensor] = {}
        values = {'format': FORMAT, 'state': flatten_state(state, tensors)}
        if name == self._latest():  # the same point again, e.g. resumed and stopped at once
            name += '-again'
        tmp, final = self.folder / partial_name(name), self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(final, ignore_errors=True)  # of a writer killed before it set the pointer
            tmp.mkdir()
            safetensors.torch.save_file(tensors, tmp / _TENSORS)
            (tmp / _VALUES).write_text(json.dumps(values), encoding='utf-8')
            for file in tmp.iterdir():
                with open(file, 'rb+') as f:
                    os.fsync(f.fileno())
            fsync_dir(tmp)
            tmp.rename(final)
            fsync_dir(self.folder)
            with atomic_write(self.folder / _POINTER) as pointer:
                pointer.write_text(name, encoding='utf-8')
        except (OSError, SafetensorError) as e:
            shutil.rmtree(tmp, ignore_errors=True)
            size = sum(t.nbytes for t in tensors.values()) / 2 ** 20
            last = self._latest()
            raise StateError(
                f"The state of the run ({size:.0f} MiB) could not be written to '{self.folder}': {e}. "
                + (f"The last good one, '{last}', is intact: free some space and continue with --resume auto."
                   if last else 'There is no earlier one.')) from e
        self.clean(keep=name)

    def _latest(self) -> str | None:
        try:
            return (self.folder / _POINTER).read_text(encoding='utf-8').strip() or None
        except OSError:
            return None

    def exists(self) -> bool:
        return self._latest() is not None

    def load(self) -> dict[str, Any]:
        """Read the last complete state.

        Raises:
            CheckpointError: There is none, or its files were damaged afterwards.
        """
        name = self._latest()
        if name is None:
            raise CheckpointError(f"There is no state of a run at '{self.folder}'.")
        return read_state(self.folder / name)

    def clean(self, keep: str | None = None) -> None:
        """Remove older states and what killed writers left."""
        keep = keep or self._latest()
        clean_partial_files(self.folder)
        for path in self.folder.glob('*') if keep else ():
            if path.is_dir() and path.name != keep:
                shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read one state folder.

    Raises:
        CheckpointError: It is incomplete or damaged.
    """
    try:
        values = json.loads((folder / _VALUES).read_text(encoding='utf-8'))
        tensors = safetensors.torch.load_file(folder / _TENSORS)
        if values['format'] != FORMAT:
            raise CheckpointError(f"'{folder}' has format {values['format']}; this version reads format {FORMAT}.")
        return unflatten_state(values['state'], tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"The state at '{folder}' is incomplete or damaged: {e}") from e
