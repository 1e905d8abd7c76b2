"""How many images timm's loader gives in a second, by number of workers."""
import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import create_loader

from timm_dynamic.data import DEMO_DATASET, create_dataset, worker_context

NAME, HELP = 'loader', 'images per second that a loader gives, by number of workers'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data-dir', metavar='DIR', help='root of the dataset')
    parser.add_argument(
        '--dataset', metavar='NAME', help='as in train.py (default: a folder; without --data-dir the demo set)')
    parser.add_argument('--split', default='train', metavar='NAME', help='(%(default)s)')
    parser.add_argument('--img-size', type=int, metavar='N', help='side of the images (default: 224; demo set 96)')
    parser.add_argument('--batch-size', '-b', type=int, default=64, metavar='N', help='(%(default)s)')
    parser.add_argument('--workers', '-j', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='(%(default)s)')
    parser.add_argument(
        '--num-batches', type=int, default=20, metavar='N', help='that are timed, after two others (%(default)s)')
    parser.add_argument('--no-aug', action='store_true', help='as for validation: no augmentation')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    return benchmark_loader(
        args.data_dir, args.dataset, args.split, args.img_size, args.batch_size, args.workers, args.num_batches,
        args.no_aug)


def benchmark_loader(
        data_dir: str | None = None,
        dataset: str | None = None,
        split: str = 'train',
        img_size: int | None = None,
        batch_size: int = 64,
        workers: Sequence[int] = (0, 1, 2),
        num_batches: int = 20,
        no_aug: bool = False,
) -> list[dict[str, Any]]:
    """Time a loader by itself, with timm's training augmentation or without any.

    Returns:
        A row for each number of workers: 'images_per_s' after two batches, and 'first_batch_s', the time to the first.

    Raises:
        ValueError: A number is not positive, or the dataset is too small.
    """
    if min(batch_size, num_batches, 1 if img_size is None else img_size) < 1 or not workers or min(workers) < 0:
        raise ValueError(f'Expected positive numbers, got batch size {batch_size}, {num_batches} batches, '
                         f'{list(workers)} workers, images of {img_size}.')
    name = dataset if dataset is not None else '' if data_dir else DEMO_DATASET
    size = img_size or (96 if name == DEMO_DATASET else 224)
    extra: dict[str, Any] = {'img_size': size} if name == DEMO_DATASET else {}
    rows = []
    for n in workers:
        data = create_dataset(name, root=data_dir, split=split, **extra)
        if len(data) < batch_size * (num_batches + 2):
            raise ValueError(
                f'{num_batches + 2} batches of {batch_size} were asked for, the dataset holds {len(data)} images.')
        loader = create_loader(
            data, (3, size, size), batch_size, is_training=not no_aug, no_aug=no_aug, num_workers=n,
            use_prefetcher=False, persistent_workers=False, device=torch.device('cpu'))
        if n:
            loader.multiprocessing_context = worker_context()
        start = time.perf_counter()
        batches = iter(loader)
        next(batches)
        first = time.perf_counter() - start
        next(batches)
        start = time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        seconds = time.perf_counter() - start
        del batches
        rows.append({
            'loader': f'{n} workers', 'dataset': name or str(data_dir), 'img_size': size, 'batch_size': batch_size,
            'augmentation': not no_aug, 'images_per_s': num_batches * batch_size / seconds, 'first_batch_s': first})
    return rows
