"""The folder of a run: which one it is, the states to resume from, and the results of its stages."""
import argparse
import errno
import json
import logging
import os
import re
import socket
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.models import safe_model_name

from ..utils import (
    CheckpointError,
    UserError,
    clean_partial_files,
    copy_pretrained,
    read_checkpoint,
    save_pretrained,
    sha256_of,
)
from ..utils.files import fsync_dir, partial_name, remove_tree
from ..utils.report import plot_curve, read_rows, write_rows

try:
    import fcntl
except ImportError:  # Windows: runs are not locked
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

OUTPUT = 'output/train'
_LOCK = '.lock'


# States

class StateError(UserError, RuntimeError):
    """A state could not be written."""


class _StateFile(NamedTuple):
    number: int
    sha256: str
    path: Path


class CheckpointManager:
    """States of one run: files of torch.save in a folder of their own.

    A state is written under a temporary name, synced to the disk and renamed. Its name has a rising number and the
    SHA-256 of its content, so that a reader knows which one is the newest and whether it is whole. The one before it is
    kept: it is read if the newest was damaged afterwards.

    Args:
        folder: Made when the first state is written.
    """
    _NAME = re.compile(r'(\d{6,})-(.+)\.([0-9a-f]{64})\.pt')

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def is_state(cls, path: Path) -> bool:
        """Whether a file is named as a state is."""
        return cls._NAME.fullmatch(path.name) is not None

    def save(self, state: dict[str, Any], name: str) -> None:
        """Write a state, and drop all but the one before it.

        Args:
            state: Nested dicts, lists and tuples of tensors and plain values.
            name: Part of the file's name, e.g. stage and epoch.

        Raises:
            StateError: It cannot be written (e.g. the disk is full). The last state is as it was.
            TypeError: Something in it is neither a tensor nor a plain value; its path is named.
        """
        _check_plain(state)
        states = self._states()
        number = states[-1].number + 1 if states else 1
        tmp = self.folder / partial_name(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(tmp, 'wb') as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            tmp.rename(self.folder / f'{number:06d}-{name}.{sha256_of(tmp)}.pt')
            fsync_dir(self.folder)
        except (OSError, RuntimeError) as e:  # torch's writer raises the latter
            size = tmp.stat().st_size / 2 ** 20 if tmp.exists() else 0
            tmp.unlink(missing_ok=True)
            last = 'There is no earlier one.'
            if states:
                last = (f"The last good one, '{states[-1].path.name}', is intact: free some space and continue with "
                        '--resume auto.')
            raise StateError(
                f"The state of the run could not be written to '{self.folder}' ({size:.0f} MiB were): "
                f'{str(e).splitlines()[0]}. {last}') from e
        self.clean()

    def _states(self) -> list[_StateFile]:
        """Files of states, the newest last."""
        names = ((self._NAME.fullmatch(path.name), path) for path in self.folder.glob('*.pt') if path.is_file())
        return sorted(_StateFile(int(name[1]), name[3], path) for name, path in names if name)

    def exists(self) -> bool:
        return bool(self._states())

    def load(self) -> dict[str, Any]:
        """Read the newest state that is whole.

        Raises:
            CheckpointError: There is none.
        """
        states = self._states()
        for state in reversed(states):
            if sha256_of(state.path) == state.sha256:
                return read_checkpoint(state.path)
            _logger.warning(f"The state '{state.path}' is damaged: its content does not have the SHA-256 in its name.")
        if states:
            raise CheckpointError(f"All states of the run at '{self.folder}' are damaged.")
        raise CheckpointError(f"There is no state of a run at '{self.folder}'.")

    def clean(self) -> None:
        """Remove what killed writers left, and all states but the last two."""
        clean_partial_files(self.folder)
        for state in self._states()[:-2]:
            state.path.unlink(missing_ok=True)


def _check_plain(value: Any, path: str = 'state') -> None:
    """Raise a TypeError if a value is not what `read_checkpoint` reads."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"Cannot store '{path}': its keys must be strings or integers, got {key!r}.")
            _check_plain(item, f'{path}.{key}')
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_plain(item, f'{path}.{i}')
    elif not (value is None or isinstance(value, (torch.Tensor, bool, int, float, str, np.generic))):
        raise TypeError(f"Cannot store '{path}': a {type(value).__name__} is neither a tensor nor a plain value.")


def check_identity(state: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
    """Raise a ValueError if a state is not that of a run, or is that of another run; what differs is named."""
    parts = (state.get(name) if isinstance(state, Mapping) else None for name in ('identity', 'run', 'progress'))
    if not all(isinstance(part, Mapping) for part in parts) or not {'results', 'options'} <= state['run'].keys():
        raise ValueError(f"The state at '{folder}' is not one of a run.")
    saved, differ = state['identity'], []
    for key, own in identity.items():
        other = saved.get(key)
        if key == 'classes' and own and other and own != other and len(own) == len(other):
            index = next(i for i, (a, b) in enumerate(zip(own, other)) if a != b)
            differ.append(f'class {index} {other[index]!r} (here: {own[index]!r})')
        elif own != other and not (key == 'classes' and None in (own, other)):
            differ.append(f'{key} {other!r:.80} (here: {own!r:.80})')
    if differ:
        raise ValueError(f"The state at '{folder}' cannot be continued here: it has {', '.join(differ)}.")


# Options that may change when a run is resumed: where things are, how often they are shown, how fast they run.
_MAY_CHANGE = {
    'config', 'resume', 'no_resume_opt', 'start_epoch', 'output', 'experiment', 'stage', 'stage_args', 'epochs',
    'data', 'data_dir', 'dataset_download', 'batch_size', 'validation_batch_size', 'workers', 'pin_mem', 'test_split',
    'log_interval', 'checkpoint_interval', 'checkpoint_hist', 'save_images', 'save_patches', 'log_with', 'log_wandb',
    'wandb_project', 'wandb_tags', 'wandb_resume_id', 'push_to_hub', 'hub_private', 'device', 'device_modules', 'amp',
    'amp_dtype', 'torchcompile', 'torchcompile_mode', 'synchronize_step', 'no_ddp_bb', 'model_ema',
    'model_ema_decay', 'model_ema_warmup', 'model_ema_force_cpu', 'grad_checkpointing',
}


# Options of the optimizer and its schedule may also change if --no-resume-opt restarts both.
_OPTIMIZER = re.compile(
    r'(opt|lr|sched|warmup|decay|layer_decay|clip|cooldown|patience)(_|$)|(momentum|weight_decay|min_lr)$')


def check_options(stage: str, recorded: Mapping[str, Any], args: argparse.Namespace, epochs: int) -> None:
    """Raise a ValueError if a stage is resumed with other options than it began with.

    Args:
        stage: Name of the stage.
        recorded: Options that it began with.
        args: Options that are given now.
        epochs: Epochs that are trained already.
    """
    def same(a: Any, b: Any) -> bool:
        return json.dumps(a, default=str, sort_keys=True) == json.dumps(b, default=str, sort_keys=True)

    differ = {k: v for k, v in vars(args).items()
              if k in recorded and k not in _MAY_CHANGE and not same(v, recorded[k])}
    restarts = {k for k in differ if _OPTIMIZER.match(k)}
    if args.no_resume_opt:
        differ = {k: v for k, v in differ.items() if k not in restarts}
    if differ:
        named = ', '.join(f"--{k.replace('_', '-')} {v!r} (the run has {recorded[k]!r})" for k, v in differ.items())
        advice = ''
        if restarts & differ.keys():
            advice = ' (those of the optimizer and its schedule can, with --no-resume-opt)'
        raise ValueError(
            f'Stage {stage} of this run began with other options, which cannot change: {named}. Leave them out to '
            f'continue it{advice}, or start a new run with another --experiment.')
    if args.epochs < epochs:
        raise ValueError(f'--epochs {args.epochs}: {epochs} epochs of stage {stage} are trained already.')


# Which folder

def read_resumable(path: str) -> Mapping[str, Any]:
    """Read a training file that is no state of ours.

    Raises:
        CheckpointError: Training cannot be continued from it.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"'{path}' holds no training checkpoint.")
    if 'model_prime_state_dict' in checkpoint or 'net' in checkpoint:
        instead = '--init-from' if 'model_prime_state_dict' in checkpoint else '--initial-checkpoint'
        raise CheckpointError(
            f"--resume: '{path}' is a file of the GFNet or AnchorNet authors' code, whose optimizer has other "
            f'parameters. Start a stage with its weights: {instead} FILE --stage NAME.')
    return checkpoint


def find_run_folder(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Path, str | None, 'RunLock']:
    """Choose the folder of the run, make it and lock it.

    Returns:
        The folder; the timm checkpoint to resume from if that is what --resume names; and the lock, of the main
        process.

    Raises:
        ValueError: Another process uses the folder, it holds a finished or interrupted run, or it cannot be written.
        CheckpointError: There is nothing to resume from.
    """
    choice: list[Any] = [None, None]
    lock = RunLock()
    if accelerator.is_main_process:
        try:
            folder, checkpoint = _choose_folder(args, Path(args.output or OUTPUT))
            lock.acquire(folder)
            _clean(folder)
            choice = [str(folder), checkpoint]
        except OSError as e:
            choice = [ValueError(
                f"The output folder '{args.output or OUTPUT}' cannot be written: {e.strerror or e}. Choose another "
                'with --output.'), None]
        except (UserError, ValueError) as e:
            choice = [e, None]
    broadcast_object_list(choice)
    if isinstance(choice[0], Exception):
        raise choice[0]
    return Path(choice[0]), choice[1], lock


def _choose_folder(args: argparse.Namespace, output: Path) -> tuple[Path, str | None]:
    named = output / args.experiment if args.experiment else None
    if args.resume == 'auto':
        found = _newest_run(output, args.model) if named is None else named
        _check_no_results(found)
        return found or _new_folder(output, args.model), None
    path = Path(args.resume)
    if args.resume and (not path.is_file() or CheckpointManager.is_state(path)):
        for run in (path, path.parent, path.parent.parent):  # the run, its state/, or a file in there
            if CheckpointManager(run / 'state').exists():
                return run, None
        raise CheckpointError(f"--resume: there is no state of a run at '{path}'.")
    if named is not None and CheckpointManager(named / 'state').exists():
        raise ValueError(
            f"'{named}' holds a run already: continue it with --resume auto, or choose another --experiment.")
    _check_no_results(named)
    return named or _new_folder(output, args.model), args.resume or None


def _check_no_results(run: Path | None) -> None:
    """Raise a ValueError if a folder has results of a run but no state: a new run would replace them."""
    if run is None or CheckpointManager(run / 'state').exists():
        return
    found = next((path for path in (run / 'summary.csv', *sorted(run.glob('*/summary.csv'))) if path.exists()), None)
    if found is not None:
        raise ValueError(
            f"There is no state to continue from at '{run / 'state'}', but '{found}' is the result of a run. Choose "
            'another --experiment, or remove the folder.')


def _new_folder(output: Path, model: str) -> Path:
    """Make a new folder. Its name has a number if another run started in the same second."""
    stamp = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(model)}'
    number = 1
    while True:
        folder = output / (stamp if number == 1 else f'{stamp}-{number}')
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _newest_run(output: Path, model: str) -> Path | None:
    """The newest run of a model that has a state; folders that cannot be read are passed over."""
    runs = sorted((p.parent for p in output.glob('*/state') if CheckpointManager(p).exists()), key=lambda p: p.name)
    return next((run for run in reversed(runs) if _model_of(run) == model), None)


def _model_of(run: Path) -> str | None:
    try:
        return yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8')).get('model') or None
    except (OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError):
        pass
    try:
        return CheckpointManager(run / 'state').load()['identity']['model']
    except (CheckpointError, LookupError, TypeError):
        return None


def _clean(folder: Path) -> None:
    """Remove what killed writers left in the folders that a run writes to."""
    for path in (folder, *folder.glob('*'), *folder.glob('*/*')):
        if path.is_dir() and not path.is_symlink():
            clean_partial_files(path)


class RunLock:
    """Keeps a second run out of a folder, for as long as the process lives: the system releases the lock."""
    _file: Any = None

    def acquire(self, folder: Path) -> None:
        """Make the folder and lock it.

        Raises:
            ValueError: Another process holds the lock; its host and number are named.
            OSError: The folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, 'a+', encoding='utf-8')  # noqa: SIM115 (it stays open)
        file.seek(0)
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = file.read() or 'another process'
            file.close()
            if e.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return
            raise ValueError(f"'{folder}' is in use: {holder} is running there.") from e
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        self._file = file

    def release(self) -> None:
        """Release the folder for other runs."""
        if self._file is not None:
            self._file.close()
            self._file = None


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

        Raises:
            ValueError: The summary that is there is damaged.
        """
        summary = self.folder / 'summary.csv'
        rows = read_rows(summary) if row['epoch'] else []
        if not all(isinstance(r.get('epoch'), int) for r in rows):
            raise ValueError(f"'{summary}' cannot be read as a table of epochs: its column 'epoch' is damaged.")
        rows = [r for r in rows if r['epoch'] < row['epoch']]
        write_rows(summary, [*rows, row])
        plot_curve(self.folder / 'curve.png', [*rows, row], self.metric)
        save_pretrained(model, self.folder / 'last', **export)
        if value is None:
            return
        best = self.best['value']
        lost = not (self.folder / 'best' / 'config.json').is_file()  # removed while the run goes on
        if best is None or lost or (value < best if self.decreasing else value > best):
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
        for _, old in kept[self.num_kept:]:  # nothing else is removed: the folder may be shared
            remove_tree(folder / f'epoch-{old:04d}')
