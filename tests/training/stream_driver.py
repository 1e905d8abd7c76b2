"""Runs validate.py on a dataset that can only be iterated, with uneven shares: the last process has two images.

    torchrun --nproc-per-node 2 stream_driver.py VALIDATE_ARGS...

What --dataset names is taken from the folder --data-dir.
"""
import os
import sys
from collections.abc import Iterator
from typing import Any

import timm.data
from torch.utils.data import IterableDataset

create_dataset = timm.data.create_dataset
RANK, WORLD_SIZE = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
assert WORLD_SIZE == 2


class Stream(IterableDataset):
    """The images of a folder, in order; the first process has all but two."""

    def __init__(self, root: str, split: str) -> None:
        self.images = create_dataset('', root=root, split=split)
        self.transform: Any = None

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self.images.transform = self.transform
        first, last = (0, len(self.images) - 2) if RANK == 0 else (len(self.images) - 2, len(self.images))
        yield from (self.images[i] for i in range(first, last))


timm.data.create_dataset = lambda name, root, split, **kwargs: Stream(root, split)

from timm_dynamic.evaluation import validate_main  # noqa: E402 (it takes create_dataset from timm)

if __name__ == '__main__':
    sys.exit(validate_main(sys.argv[1:]))
