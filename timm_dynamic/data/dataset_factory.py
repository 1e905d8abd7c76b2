"""Datasets by name: the embedded demo set, and all of timm's."""
import os
from typing import Any

from timm.data import create_dataset as create_timm_dataset

from ..utils import did_you_mean
from .cluttered_digits import ClutteredDigits
from .splits import TRAIN_SPLITS, VALIDATION_SPLITS

DEMO_DATASET = 'cluttered_digits'
_DEMO_ARGS = ('img_size', 'digit_scale', 'clutter', 'num_samples')  # num_samples is an argument of timm's, too


def create_dataset(name: str, root: str | None = None, split: str = 'validation', **kwargs: Any) -> Any:
    """Create a dataset.

    Args:
        name: 'cluttered_digits' for the embedded demo set. Other names are timm's: empty for a folder or tar file, or
            a name with the prefix torch/, hfds/, hfids/, wds/, tfds/.
        root: Folder, for most of timm's datasets.
        split: Name of the split.
        **kwargs: Passed on. The demo set takes `img_size`, `digit_scale`, `clutter` and `num_samples` and ignores the
            rest.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The name is unknown; the folder is empty, does not have the split, or holds one class only; or timm
            refuses an argument.
    """
    if name == DEMO_DATASET:
        return ClutteredDigits(split=split, **{k: kwargs[k] for k in _DEMO_ARGS if kwargs.get(k) is not None})
    for key in _DEMO_ARGS[:3]:
        kwargs.pop(key, None)
    if name and '/' not in name:
        raise ValueError(
            f"Unknown dataset '{name}': expected '{DEMO_DATASET}', a name with prefix (torch/, hfds/, hfids/, wds/, "
            f'tfds/), or none for a folder or tar file.{did_you_mean(name, [DEMO_DATASET])}')
    if not name:
        if not root:
            raise ValueError('A folder of images needs a path (--data-dir).')
        if not os.path.exists(root):
            raise FileNotFoundError(
                f"There is no data at '{root}': expected a folder with one sub-folder per class, or a tar file.")
        _check_split(root, split)
    try:
        dataset = create_timm_dataset(name, root=root, split=split, **kwargs)
    except RuntimeError as e:
        if 'Found 0 images' in str(e):
            raise ValueError(f"'{root}' holds no images for the split '{split}': {e}") from e
        raise
    except AssertionError as e:  # how timm checks its arguments
        raise ValueError(f"The dataset '{name or root}' cannot be opened: {e}") from e
    classes = class_to_idx(dataset)
    if classes is not None and len(classes) < 2:
        raise ValueError(
            f"'{root}' holds {len(classes)} class ({', '.join(map(repr, classes))}) for the split '{split}': expected "
            'one sub-folder per class and at least two of them.')
    return dataset


def _check_split(root: str, split: str) -> None:
    """Raise a ValueError for a split without a folder, if others have one: timm would use the images of all splits."""
    split = split.split('[')[0]
    names = next((s for s in (TRAIN_SPLITS, VALIDATION_SPLITS) if split in s), (split,))
    found = {n for n in (*TRAIN_SPLITS, *VALIDATION_SPLITS, 'test') if os.path.isdir(os.path.join(root, n))}
    several = found.intersection(TRAIN_SPLITS) and found.difference(TRAIN_SPLITS)
    if several and not any(os.path.exists(os.path.join(root, n)) for n in names):
        raise ValueError(f"There is no split '{split}' at '{root}', which has {', '.join(sorted(found))}.")


def class_to_idx(dataset: Any) -> dict[str, int] | None:
    """Index of each class name; None if the dataset does not have them."""
    for source in (dataset, getattr(dataset, 'reader', None)):
        mapping = getattr(source, 'class_to_idx', None)
        if isinstance(mapping, dict) and mapping:
            return mapping
    return None
