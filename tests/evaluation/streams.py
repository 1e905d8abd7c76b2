"""validate.py on a dataset that can only be iterated, with uneven shares: the last of two processes has two images."""
import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from timm_dynamic.data import dataset_factory
from timm_dynamic.evaluation import validate_main

create_dataset = dataset_factory.create_timm_dataset


class Stream(IterableDataset):
    """The images of a folder, in order; the first process has all but two."""

    def __init__(self, root: str, split: str) -> None:
        self.images = create_dataset('', root=root, split=split)
        self.transform: Any = None

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self.images.transform = self.transform
        middle = len(self.images) - 2
        share = range(middle) if os.environ['RANK'] == '0' else range(middle, len(self.images))
        yield from (self.images[i] for i in share)


def validate_stream(args: list[str]) -> int:
    """Run validate.py. Every --dataset is such a stream of the images in --data-dir."""
    dataset_factory.create_timm_dataset = lambda name, root, split, **kwargs: Stream(root, split)
    return validate_main(args)
