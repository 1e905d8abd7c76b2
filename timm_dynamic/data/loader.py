"""timm's loaders, made repeatable: the content of a batch is a function of (seed, epoch, batch).

It does not depend on the number of workers, on prefetching, or on whether the run was resumed.
"""
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from timm.data import create_loader
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    get_worker_info,
)

from ..utils import seeded


class BatchKey(NamedTuple):
    """Identifies a training batch. Workers get it instead of a list of indices."""
    indices: list[Any]  # sample indices, or what a timm sampler yields instead
    epoch: int
    batch: int


class _KeyedBatch(list):
    """Samples of a batch, with its key for `_SeededCollate`."""

    def __init__(self, samples: list[Any], key: BatchKey) -> None:
        super().__init__(samples)
        self.key = key


class EpochBatchSampler(Sampler[BatchKey]):
    """Yields the keys of an epoch's batches, from a given batch on.

    Args:
        batches: A batch sampler whose order depends on the epoch only.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        if start is None:  # timm's repeating loader sets the epoch a second time: keep the start
            start = self.start if epoch == self.epoch else 0
        self.epoch, self.start = epoch, start
        samplers: list[Any] = [self.batches, getattr(self.batches, 'sampler', None)]
        for sampler in samplers:
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, start = self.epoch, self.start
        for i, indices in enumerate(islice(self.batches, start, None), start):
            yield BatchKey(indices, epoch, i)

    def __len__(self) -> int:
        return len(self.batches) - self.start


class _SkipCounter(logging.Handler):
    """Counts, over all worker processes, the images that timm's datasets skip because they cannot be read."""

    def __init__(self, context: Any = None) -> None:
        super().__init__()
        self.count = (context or multiprocessing).Value('q', 0)

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith('Skipped sample'):
            with self.count.get_lock():
                self.count.value += 1

    def __getstate__(self) -> dict[str, Any]:
        return {'count': self.count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.count = state['count']


class SeededDataset(Dataset):
    """Seeds the random numbers of every sample, and counts the samples that cannot be read.

    Args:
        dataset: Map-style dataset.
        seed: Seed of the run.
        rank: Process number. Used only with `repeated`.
        repeated: Samples occur several times in an epoch, as with repeated augmentation.
        context: How the worker processes are started, see `worker_context`.
    """

    def __init__(
            self,
            dataset: Dataset,
            seed: int = 0,
            rank: int = 0,
            repeated: bool = False,
            context: Any = None,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self.repeated = repeated
        self.skipped = _SkipCounter(context)

    def __getitems__(self, key: Sequence[Any]) -> list[Any]:
        logger = logging.getLogger('timm.data.dataset')
        if self.skipped not in logger.handlers:  # every worker has its own logger
            logger.addHandler(self.skipped)
        if not isinstance(key, BatchKey):
            return [self.dataset[i] for i in key]
        in_worker = get_worker_info() is not None
        samples = []
        for position, index in enumerate(key.indices):
            copy = (self.rank, key.batch, position) if self.repeated else ()
            with seeded(self.seed, 'sample', key.epoch, str(index), *copy, keep=in_worker):
                samples.append(self.dataset[index])
        return _KeyedBatch(samples, key)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class _SeededCollate:
    """Collates (and mixes) batches, with random numbers seeded for every batch."""

    def __init__(self, collate_fn: Callable, seed: int, rank: int, mixup_off_epoch: int = 0) -> None:
        self.collate_fn = collate_fn
        self.seed = seed
        self.rank = rank
        self.mixup_off_epoch = mixup_off_epoch

    def __call__(self, batch: list[Any]) -> Any:
        key = getattr(batch, 'key', None)
        if key is None:
            return self.collate_fn(batch)
        if hasattr(self.collate_fn, 'mixup_enabled'):  # set here because workers have copies of their own
            self.collate_fn.mixup_enabled = not self.mixup_off_epoch or key.epoch < self.mixup_off_epoch
        with seeded(self.seed, 'batch', self.rank, key.epoch, key.batch, keep=get_worker_info() is not None):
            return self.collate_fn(list(batch))


class _SeededErasing:
    """Random erasing, with random numbers seeded for every batch."""

    def __init__(self, random_erasing: Callable, seed: int, rank: int, device: torch.device) -> None:
        self.random_erasing = random_erasing
        self.seed = seed
        self.rank = rank
        self.device = device
        self.epoch = self.batch = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with seeded(self.seed, 'erase', self.rank, self.epoch, self.batch, device=self.device):
            self.batch += 1
            return self.random_erasing(images)


def worker_context(world_size: int = 1) -> Any:
    """Multiprocessing context for loaders' workers; None for torch's default, which on Linux may be to fork.

    With several processes it is 'spawn'. Their communication runs in threads, and a fork may wait for ever for a lock
    that such a thread held (see the note on DataLoader in the documentation of DistributedDataParallel). With
    'forkserver', workers would stay alive after their process was killed.
    """
    return torch.multiprocessing.get_context('spawn') if world_size > 1 else None


class WorkerInit:
    """Initialises a loader's worker as timm does, and lets it end with its process and at its command only.

    A scheduler's SIGTERM and Ctrl-C are sent to the workers, too. If they ended then, the main process could not finish
    its batch and save its state. A SIGTERM of the main process ends them; if it was killed, they end by themselves.

    Args:
        worker_init_fn: The loader's own function.
    """

    def __init__(self, worker_init_fn: Callable[[int], Any] | None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parent = multiprocessing.parent_process()
        if hasattr(signal, 'sigwaitinfo'):  # tells who sent a signal
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_at_command, args=(parent,), daemon=True).start()
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


def _end_at_command(parent: Any) -> None:
    """End this process at a SIGTERM of the one that started it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)  # as told: torch takes another status for a failure


def _end_with_parent(parent: Any) -> None:
    """End this process when the one that started it has ended, even if that was before this call."""
    parent.join()
    os._exit(1)


class TrainLoader:
    """Training batches of a timm loader, repeatable and resumable.

    Iterating gives (input, target) on the device (on the CPU without prefetcher), from the batch given to `set_epoch`
    on. Datasets that can only be iterated always start an epoch at its first batch: see `resumable`.

    Args:
        loader: A loader of timm's `create_loader` with is_training=True.
        seed: Seed of the run.
        rank: This process.
        mixup_off_epoch: First epoch without mixup, 0 for never.
        context: How workers are started, see `worker_context`.
    """

    def __init__(
            self,
            loader: Any,
            seed: int = 0,
            rank: int = 0,
            mixup_off_epoch: int = 0,
            context: Any = None,
    ) -> None:
        prefetched = not isinstance(loader, DataLoader)
        inner: DataLoader = loader.loader if prefetched else loader
        self.resumable = not isinstance(inner.dataset, IterableDataset)
        self.start = 0
        self.class_to_idx: dict[str, int] | None = None
        self.batch_sampler: EpochBatchSampler | None = None
        if self.resumable:
            # The sampler of a torch loader cannot be replaced, so a new loader is made with timm's transforms,
            # collation and sampling. It has the same class: that of timm's loader which repeats for ever is kept.
            batches: Any = inner.batch_sampler
            if type(batches).__name__ == '_RepeatSampler':
                batches = batches.sampler
            sampler = batches.sampler
            if isinstance(sampler, RandomSampler):  # its order depends on the global generator
                sampler = batches.sampler = DistributedSampler(inner.dataset, num_replicas=1, rank=0)
            if isinstance(sampler, DistributedSampler):
                sampler.seed = seed
            self.batch_sampler = EpochBatchSampler(batches)
            self.dataset: Any = SeededDataset(
                inner.dataset, seed, rank, repeated=not isinstance(sampler, DistributedSampler), context=context)
            inner = type(inner)(
                self.dataset,
                batch_sampler=self.batch_sampler,  # type: ignore[arg-type]
                num_workers=inner.num_workers,
                collate_fn=_SeededCollate(inner.collate_fn, seed, rank, mixup_off_epoch),
                pin_memory=inner.pin_memory,
                worker_init_fn=WorkerInit(inner.worker_init_fn),
                persistent_workers=inner.persistent_workers,
                multiprocessing_context=context if inner.num_workers else None,
            )
            if prefetched:
                loader.loader = inner
            else:
                loader = inner
        else:
            self.dataset = inner.dataset
            inner.multiprocessing_context = context if inner.num_workers else None
        self.erasing = None
        if prefetched and loader.random_erasing is not None:
            self.erasing = loader.random_erasing = _SeededErasing(loader.random_erasing, seed, rank, loader.device)
        self.loader = loader
        self.batch_size = inner.batch_size or getattr(inner.batch_sampler, 'batch_size', None)

    @property
    def skipped(self) -> int:
        """Number of images skipped so far because they could not be read."""
        return self.dataset.skipped.count.value if isinstance(self.dataset, SeededDataset) else 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch and its first batch to iterate from. Datasets that can only be iterated start at batch 0."""
        self.start = start if self.resumable else 0
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(epoch, start)
        elif hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)
        if self.erasing is not None:
            self.erasing.epoch, self.erasing.batch = epoch, self.start

    def indices(self, epoch: int, batch: int) -> list[Any] | None:
        """Sample indices of a batch of this process, for messages. None if they are not known."""
        if self.batch_sampler is None:
            return None
        before = self.batch_sampler.epoch, self.batch_sampler.start
        self.batch_sampler.set_epoch(epoch, batch)
        key = next(iter(self.batch_sampler), None)
        self.batch_sampler.set_epoch(*before)
        return [i[0] if isinstance(i, tuple) else i for i in key.indices] if key else None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.loader)

    def __len__(self) -> int:
        """Number of batches of a whole epoch, also if it was resumed in the middle."""
        return len(self.loader if self.batch_sampler is None else self.batch_sampler.batches)


def create_train_loader(
        dataset: Any,
        input_size: tuple[int, int, int],
        batch_size: int,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        mixup_off_epoch: int = 0,
        **kwargs: Any,
) -> TrainLoader:
    """Create timm's training loader and make it repeatable.

    Args:
        dataset: A timm or torchvision dataset. Its `transform` is set.
        input_size: Channels, height, width.
        batch_size: Per process.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        mixup_off_epoch: First epoch without mixup, 0 for never.
        **kwargs: Passed on to timm's `create_loader`.
    """
    loader = create_loader(
        dataset, input_size, batch_size, is_training=True, distributed=world_size > 1, batch_choice_seed=seed, **kwargs)
    return TrainLoader(loader, seed, rank, mixup_off_epoch, worker_context(world_size))
