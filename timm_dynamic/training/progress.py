"""What training shows and counts: log lines, means over an epoch, the first bad loss.

Means and losses stay on the device until they are shown, so that nothing waits for them.
"""
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ..utils import UserError
from ..utils.report import fit_line, format_duration

_logger = logging.getLogger(__name__)


class NonFiniteLoss(UserError, RuntimeError):
    """The loss is NaN or infinite."""


class LossGuard:
    """Remembers the first batch whose loss is not finite.

    Args:
        device: Where the loss is.
    """

    def __init__(self, device: torch.device) -> None:
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def watch(self, loss: torch.Tensor, batch: int) -> None:
        """Take in the loss of a batch."""
        bad = ~torch.isfinite(loss.detach())
        self.first_bad = torch.where(bad & (self.first_bad < 0), batch, self.first_bad)

    def is_bad(self) -> bool:
        """Whether this process has seen a bad loss; waits for the device."""
        return int(self.first_bad) >= 0

    def describe(self, loader: Any, epoch: int, rank: int) -> str:
        """Epoch, batch, process and samples of the bad loss; empty if this process has seen none."""
        batch = int(self.first_bad)
        if batch < 0:
            return ''
        text = f'epoch {epoch}, batch {batch}, process {rank}'
        indices = loader.indices(epoch, batch)
        if indices is not None:
            text += f', samples {indices[:8]}{"..." if len(indices) > 8 else ""}'
            base = getattr(loader.dataset, 'dataset', None)
            if base is not None and hasattr(base, 'filename'):
                text += f' (first: {base.filename(indices[0])})'
        return text


class RunningMeans:
    """Means of named values over the samples so far.

    Args:
        sums: Sums to continue with, as a state has them.

    Attributes:
        sums: Of each value over the samples: a scalar, or [T] for a value per step; 'count' is among them.
    """

    def __init__(self, sums: dict[str, torch.Tensor] | None = None) -> None:
        self.sums = dict(sums or {})

    def add(self, key: str, value: torch.Tensor, count: int) -> None:
        """Add a mean over `count` samples; a tensor [T] has one value per step."""
        value = value.detach().double() * count
        value = value if value.ndim == 1 and len(value) > 1 else value.reshape(())
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def values(self) -> dict[str, torch.Tensor]:
        """Means of this process."""
        return {k: v / self.sums['count'] for k, v in self.sums.items() if k != 'count'}

    def __str__(self) -> str:
        return ' '.join(
            f"{k} {'/'.join(f'{v:.4g}' for v in value.reshape(-1).tolist())}" for k, value in self.values().items())

    def gather(self) -> list[dict[str, torch.Tensor]]:
        """Sums of each process, on the CPU: a state has them. All processes call it."""
        return gather_object([{k: v.cpu() for k, v in self.sums.items()}])

    @classmethod
    def from_gathered(cls, gathered: Sequence[Mapping[str, torch.Tensor]], accelerator: Any) -> 'RunningMeans':
        """Continue with this process's share of what `gather` returned, perhaps to another number of processes."""
        rank, number = accelerator.process_index, accelerator.num_processes
        own = gathered[rank::number] if len(gathered) >= number else gathered[rank:rank + 1]
        if not own:
            return cls()
        return cls({k: torch.stack([sums[k] for sums in own]).sum(dim=0).to(accelerator.device) for k in own[0]})

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes; a value per step becomes one entry a step, e.g. 'top1_step1'."""
        sums = torch.cat([v.reshape(-1) for v in self.sums.values()])
        names = [
            name for k, v in self.sums.items()
            for name in ([k] if v.ndim == 0 else [_numbered(k, i) for i in range(1, len(v) + 1)])
        ]
        means = dict(zip(names, accelerator.reduce(sums, 'sum').tolist()))
        count = means.pop('count')
        return {k: v / count for k, v in means.items()}


def _numbered(key: str, number: int) -> str:
    """'step_top1' -> 'top1_step1'."""
    unit, _, name = key.partition('_')
    return f'{name}_{unit}{number}'


class Pace:
    """Images per second, and the time that is left.

    Args:
        num_batches: Batches of an epoch, over which images are spread evenly.
        images_per_batch: Over all processes.
        epochs: Epochs of the stage.
        later_epochs: Epochs of the stages after it. They are assumed to take as long as those of this stage.
        clock: Returns seconds.

    Attributes:
        images_per_second: Of training, over the epoch so far; 0 before the first batch.
        seconds_per_batch: Without the first batch of an epoch, which waits for the loader's workers to start; 0 until
            it is known.
    """

    def __init__(
            self,
            num_batches: int,
            images_per_batch: int,
            epochs: int,
            later_epochs: int = 0,
            clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_batches, self.images_per_batch = num_batches, images_per_batch
        self.epochs, self.later_epochs, self.clock = epochs, later_epochs, clock
        self.images_per_second = self.seconds_per_batch = 0.
        self._start = self._validation = 0.  # seconds of the last epoch that its batches did not take

    def start_epoch(self, epoch: int, batch: int) -> None:
        """Note that training goes on from a batch of an epoch."""
        self.epoch, self._first, self._done, self._began = epoch, batch, batch, self.clock()

    def advance(self, batch: int) -> None:
        """Note how many batches of the epoch are done."""
        now = self.clock()
        if self._done == self._first:
            self._measured_from = batch, now
        else:
            first, began = self._measured_from
            self.seconds_per_batch = (now - began) / (batch - first)
        self._done, self._trained = batch, now
        seconds = now - self._began
        self.images_per_second = self.images_per_batch * (batch - self._first) / seconds if seconds else 0.

    def end_epoch(self) -> None:
        """Note that the epoch is over, validation included."""
        self._validation = self.clock() - self._trained
        trained, batches = self._trained - self._began, self._done - self._first
        if not self.seconds_per_batch and batches:
            self.seconds_per_batch = trained / batches
        self._start = max(trained - batches * self.seconds_per_batch, 0.)

    def left(self) -> tuple[float, float]:
        """Seconds left for training in this epoch, and for the run with validation."""
        epoch = (self.num_batches - self._done) * self.seconds_per_batch
        return epoch, epoch + self._validation + self.left_for_run()

    def left_after_epoch(self) -> int:
        """Number of epochs left in the run after this one."""
        return self.epochs - self.epoch - 1 + self.later_epochs

    def left_for_run(self) -> float:
        """Seconds left for the run after this epoch."""
        whole = self._start + self.num_batches * self.seconds_per_batch + self._validation
        return self.left_after_epoch() * whole


class TrainingLog:
    """Progress bar, log lines and trackers of a stage; in the main process only.

    A tag of the trackers is `STAGE/NAME`. The names of single updates and those of epochs differ: 'loss' is the mean of
    this process over the epoch so far, 'train_loss' the mean of all processes over the whole epoch, 'lr' the mean over
    parameter groups of the rate that this update used.

    Args:
        stage: Name of the stage.
        accelerator: Has the trackers.
        pace: Measures the speed.
        first_update: Updates of earlier stages: steps of trackers must not fall.
    """
    _bar: Any

    def __init__(self, stage: str, accelerator: Accelerator, pace: Pace, first_update: int = 0) -> None:
        self.stage, self.accelerator, self.pace, self.first_update = stage, accelerator, pace, first_update
        self.epoch, self.main = 0, accelerator.is_main_process

    def start_epoch(self, epoch: int, batch: int, num_batches: int) -> None:
        """Show the progress from a batch on."""
        self.epoch = epoch
        self.pace.start_epoch(epoch, batch)
        self._bar = tqdm(
            total=num_batches, initial=batch, desc=f'{self.stage} epoch {epoch}', unit='batch', leave=False,
            disable=None if self.main else True)  # None: in a terminal only

    def advance(self, batch: int) -> None:
        """Note how many batches of the epoch are done."""
        self.pace.advance(batch)
        self._bar.update(batch - self._bar.n)

    def update(self, number: str, means: RunningMeans, lr: float, updates: int) -> None:
        """Log the means so far.

        Args:
            number: Updates of the epoch that are done, and all of them.
            means: Over the epoch so far.
            lr: Learning rate.
            updates: Number of updates since the stage began.
        """
        if not self.main:
            return
        values = means.values()
        loss = f"loss {values['loss'].item():.4g}" if 'loss' in values else ''
        speed, left = f'{self.pace.images_per_second:.0f} images/s', ('', '')
        if self.pace.seconds_per_batch:
            for_epoch, for_run = map(format_duration, self.pace.left())
            left = f'{for_epoch} left for the epoch', f'{for_run} for the run'
        self._bar.set_postfix_str(f'{loss} {speed} {left[1]}'.rstrip())
        if self._bar.disable:
            others = str(RunningMeans({k: v for k, v in means.sums.items() if k != 'loss'}))
            _logger.info(fit_line([
                f'{self.stage}: epoch {self.epoch} update {number} {loss}'.rstrip(), speed,
                *filter(None, left), f'lr {lr:.3g}', *_NAMED.findall(others)]))
        scalars = {k: v.item() for k, v in values.items() if v.ndim == 0}
        self._track({**scalars, 'lr': lr, 'images_per_second': self.pace.images_per_second}, updates)

    def end_batches(self) -> None:
        """Remove the progress bar."""
        self._bar.close()

    def end_epoch(self, row: Mapping[str, Any], updates: int, skipped: int) -> None:
        """Log an epoch's results and the number of images that could not be read so far."""
        self.pace.end_epoch()
        if not self.main:
            return
        numbers = {k: v for k, v in row.items() if k != 'epoch' and v is not None}
        left = self.pace.left_for_run()
        _logger.info(format_epoch(
            f"{self.stage}: epoch {row['epoch']} done:", numbers,
            [f'{self.pace.images_per_second:.0f} images/s', f'{format_duration(left)} left' if left else 'last epoch']))
        if skipped:
            _logger.warning(f'{skipped} images could not be read so far and were replaced by others.')
        self._track({k: v for k, v in numbers.items() if k != 'lr'}, updates)  # each update has tracked it

    def _track(self, values: Mapping[str, Any], updates: int) -> None:
        self.accelerator.log(
            {f'{self.stage}/{k}': v for k, v in values.items()}, step=self.first_update + updates)


_NAMED = re.compile(r'\S+ \S+')  # name and value
_PART = re.compile(r'(.+)_(step|patch)(\d+)')  # name, unit and number


def format_epoch(head: str, row: Mapping[str, float], speed: Sequence[str]) -> str:
    """One line of at most 120 columns about an epoch, the most important numbers first; summary.csv has all of them.

    Args:
        head: Begin of the line.
        row: Numbers by name. Values of steps, e.g. 'eval_top1_step1', are shown as 'eval_top1 by step 66.2/94.1'.
        speed: Texts that come after the results.
    """
    shown: dict[str, str] = {}
    for key, value in row.items():
        part = _PART.fullmatch(key)
        name = f'{part[1]} by {part[2]}' if part else key
        shown[name] = f'{shown[name]}/{value:.4g}' if name in shown else f'{name} {value:.4g}'
    if 'eval_top1 by step' in shown:
        shown.pop('eval_top1', None)  # that of the last step
    first = [k for k in ('train_loss', 'eval_top1', 'eval_top1 by step') if k in shown]
    rest = sorted((k for k in shown if k not in first), key=lambda k: not k.startswith('eval_'))
    return fit_line([head, *(shown[k] for k in first), *speed, *(shown[k] for k in rest)])


@contextmanager
def log_once(*names: str) -> Iterator[None]:
    """Drop repeated messages of loggers, e.g. about pretrained weights that several encoders load."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in seen
        seen.add(message)
        return new

    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(is_new)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_new)
