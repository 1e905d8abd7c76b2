"""The folder of a run: which one it is, the state to resume from, and the results of its stages.

A state is a folder with tensors (safetensors) and everything else (JSON). It is written under a temporary name, synced
to the disk and renamed; then a file `latest` that names it is replaced in one step. A reader sees the last state that
was written completely, whenever the writer was killed.
"""
import argparse
import json
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from timm.models import safe_model_name

from ..utils import (
    CheckpointError,
    UserError,
    atomic_write,
    clean_partial_files,
    copy_pretrained,
    save_pretrained,
)
from ..utils.files import fsync_dir, partial_name
from ..utils.report import plot_curve, read_rows, write_rows

OUTPUT = 'output/train'
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


class CheckpointManager:
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


def check_identity(state: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
    """Raise a ValueError if a state belongs to something else; what differs is named."""
    saved = state['identity']
    differ = [f'{k} {saved.get(k)!r} (here: {v!r})' for k, v in identity.items() if saved.get(k) != v]
    if differ:
        raise ValueError(f"The state at '{folder}' cannot be continued here: it has {', '.join(differ)}.")


# Which folder

def find_run_folder(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Path, str | None]:
    """Folder of the run, and the timm checkpoint to resume from if that is what --resume names."""
    output = Path(args.output or OUTPUT)
    choice: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            folder, checkpoint = _choose_folder(args, output)
            choice = [str(folder), checkpoint]
        except (UserError, ValueError) as e:
            choice = [e, None]
    broadcast_object_list(choice)
    if isinstance(choice[0], Exception):
        raise choice[0]
    return Path(choice[0]), choice[1]


def _choose_folder(args: argparse.Namespace, output: Path) -> tuple[Path, str | None]:
    stamp = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
    named = output / (args.experiment or stamp)
    if not args.resume:
        if args.experiment and CheckpointManager(named / 'state').exists():
            raise ValueError(
                f"'{named}' holds a run already: continue it with --resume auto, or choose another --experiment.")
        return named, None
    if args.resume == 'auto':
        if args.experiment:
            return named, None
        runs = sorted((p.parent for p in output.glob('*/state') if CheckpointManager(p).exists()), key=lambda p: p.name)
        for run in reversed(runs):
            if _model_of(run) == args.model:
                return run, None
        return named, None
    path = Path(args.resume)
    if path.is_dir():
        for run in (path, path.parent, path.parent.parent):  # the run, its state/, or one state in there
            if CheckpointManager(run / 'state').exists():
                return run, None
        raise CheckpointError(f"--resume: there is no state of a run at '{path}'.")
    if not path.is_file():
        raise CheckpointError(f"--resume: there is nothing at '{path}'.")
    return named, str(path)


def _model_of(run: Path) -> str | None:
    try:
        return yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8')).get('model') or None
    except (OSError, yaml.YAMLError, AttributeError):
        pass
    try:
        return CheckpointManager(run / 'state').load()['identity']['model']
    except (CheckpointError, KeyError):
        return None


def prepare_run_folder(folder: Path) -> None:
    """Make the folder, and see early that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.partial-{os.getpid()}-probe'
        probe.write_text('')
        probe.unlink()
    except OSError as e:
        raise ValueError(
            f"The output folder '{folder}' cannot be written: {e.strerror or e}. Choose another with --output.") from e
    for path in (folder, *(p for p in folder.iterdir() if p.is_dir())):
        clean_partial_files(path)


# Results

class StageResults:
    """Results of a stage: summary.csv, curve.png, and the weights in last/, best/ and checkpoints/.

    Args:
        folder: Where they go.
        metric: Column of the summary that tells which epoch is the best, without 'eval_'.
        decreasing: Whether smaller is better.
        num_kept: Weights of so many of the best epochs are kept in checkpoints/.

    Attributes:
        best: 'value' and 'epoch' of the best weights so far.
        kept: [value, epoch] of the weights in checkpoints/.
    """

    def __init__(self, folder: Path, metric: str, decreasing: bool, num_kept: int) -> None:
        self.folder, self.metric, self.decreasing, self.num_kept = folder, metric, decreasing, num_kept
        self.best: dict[str, Any] = {'value': None, 'epoch': None}
        self.kept: list[list[Any]] = []

    def last_row(self) -> dict[str, Any]:
        """Last row of the summary; empty if there is none."""
        rows = read_rows(self.folder / 'summary.csv')
        return rows[-1] if rows else {}

    def write(self, row: dict[str, Any], value: float | None, model: Any, **export: Any) -> None:
        """Write an epoch's results.

        Args:
            row: Row of the summary. Rows of this epoch and later ones, from a run that was killed, are replaced.
            value: What `metric` is; None if the epoch was not validated.
            model: The model.
            **export: For `save_pretrained`.
        """
        summary = self.folder / 'summary.csv'
        rows = [r for r in read_rows(summary) if r['epoch'] < row['epoch']] if row['epoch'] else []
        write_rows(summary, [*rows, row])
        plot_curve(self.folder / 'curve.png', [*rows, row], self.metric)
        save_pretrained(model, self.folder / 'last', **export)
        if value is None:
            return
        best = self.best['value']
        if best is None or (value < best if self.decreasing else value > best):
            self.best = {'value': value, 'epoch': row['epoch']}
            copy_pretrained(self.folder / 'last', self.folder / 'best')
        if self.num_kept > 0:
            self._keep(value, row['epoch'])

    def _keep(self, value: float, epoch: int) -> None:
        folder = self.folder / 'checkpoints'
        copy_pretrained(self.folder / 'last', folder / f'epoch-{epoch:04d}')
        kept = [c for c in self.kept if c[1] != epoch] + [[value, epoch]]
        kept.sort(key=lambda c: (c[0] if self.decreasing else -c[0], -c[1]))
        self.kept = kept[:self.num_kept]
        names = {f'epoch-{e:04d}' for _, e in self.kept}
        for path in folder.iterdir():
            if path.is_dir() and path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
