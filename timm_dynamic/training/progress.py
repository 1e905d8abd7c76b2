"""What training shows and counts: log lines, means over an epoch, the first bad loss.

Means and losses stay on the device until they are shown, so that nothing waits for them.
"""
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ..utils import UserError

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


class TrainingLog:
    """Progress bar, log lines and trackers of a stage; in the main process only.

    Args:
        stage: Name of the stage.
        accelerator: Has the trackers.
    """
    _bar: Any

    def __init__(self, stage: str, accelerator: Accelerator) -> None:
        self.stage, self.accelerator, self.epoch = stage, accelerator, 0
        self.main = accelerator.is_main_process

    def start_epoch(self, epoch: int, batch: int, num_batches: int) -> None:
        """Show the progress from a batch on."""
        self.epoch = epoch
        self._bar = tqdm(
            total=num_batches, initial=batch, desc=f'{self.stage} epoch {epoch}', unit='batch', leave=False,
            disable=None if self.main else True)  # None: in a terminal only

    def advance(self, batch: int) -> None:
        """Note how many batches of the epoch are done."""
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
        self._bar.set_postfix_str(f'{means} lr {lr:.3g}')
        if self._bar.disable:
            _logger.info(f'{self.stage}: epoch {self.epoch} update {number} {means} lr {lr:.3g}')
        scalars = {k: v.item() for k, v in means.values().items() if v.ndim == 0}
        self._track({**scalars, 'lr': lr}, updates)

    def end_batches(self) -> None:
        """Remove the progress bar."""
        self._bar.close()

    def end_epoch(self, row: Mapping[str, Any], updates: int, skipped: int) -> None:
        """Log an epoch's results and the number of images that could not be read so far."""
        if not self.main:
            return
        numbers = {k: v for k, v in row.items() if k != 'epoch' and v is not None}
        _logger.info(
            f"{self.stage}: epoch {row['epoch']} done: " + ', '.join(f'{k} {v:.4g}' for k, v in numbers.items()))
        if skipped:
            _logger.warning(f'{skipped} images could not be read so far and were replaced by others.')
        self._track(numbers, updates)

    def _track(self, values: Mapping[str, Any], updates: int) -> None:
        self.accelerator.log({f'{self.stage}/{k}': v for k, v in values.items()}, step=updates)
