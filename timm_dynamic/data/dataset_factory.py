"""Datasets by name: the embedded demo set, and all of timm's."""
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from timm.data import ImageDataset
from timm.data import create_dataset as create_timm_dataset

from ..utils import did_you_mean
from .class_match import ClassMatch
from .cluttered_digits import ClutteredDigits
from .splits import check_torch_split, find_split

_logger = logging.getLogger('timm.data.dataset')  # where timm's own warnings of skipped images come from

_MAX_SKIPPED = 10  # in a row, as in timm
DEMO_DATASET = 'cluttered_digits'
DEMO_ARGS = ('img_size', 'digit_scale', 'clutter')


class TolerantImageDataset(ImageDataset):
    """timm's dataset, which skips an image whatever its decoder raises, and names its file; timm catches OSError."""
    _max_retries = 1  # timm's: the loop is here

    def __getitem__(self, index: int) -> Any:
        for _ in range(_MAX_SKIPPED):
            name = self.filename(index)
            try:
                return super().__getitem__(index)
            except Exception as e:
                error = e
            if isinstance(error, RuntimeError) and str(error).startswith('Failed to load'):
                _logger.warning(f"'{name}' cannot be read.")  # timm has said why
            else:
                _logger.warning(f"Skipped sample (index {index}). '{name}' cannot be read: {_describe(error)}")
            index = (index + 1) % len(self)
        raise RuntimeError(
            f"{_MAX_SKIPPED} images in a row cannot be read, the last one is '{name}': {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'


def create_dataset(
        name: str,
        root: str | None = None,
        split: str = 'validation',
        labelled: bool = True,
        **kwargs: Any,
) -> Any:
    """Create a dataset.

    Args:
        name: 'cluttered_digits' for the embedded demo set. Other names are timm's: empty for a folder or tar file, or
            a name with the prefix torch/, hfds/, hfids/, wds/, tfds/.
        root: Folder, for most of timm's datasets.
        split: Name of the split.
        labelled: There must be classes, at least two. False for images to predict.
        **kwargs: Passed on. The demo set takes `img_size`, `digit_scale`, `clutter` and `num_samples` and ignores the
            rest.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The name is unknown; the folder is empty, does not have the split, or holds one class only; or timm
            refuses an argument.
    """
    if name == DEMO_DATASET:
        names = (*DEMO_ARGS, 'num_samples')
        return ClutteredDigits(split=split, **{k: kwargs[k] for k in names if kwargs.get(k) is not None})
    for key in DEMO_ARGS:
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
    prefix, _, inner = name.partition('/')
    if prefix.lower() == 'torch':
        check_torch_split(inner, split)
    folder = root
    if root and os.path.isdir(root) and (not name or name.lower() in ('torch/folder', 'torch/image_folder')):
        folder, kwargs['search_split'] = find_split(root, split), False
    elif root and not name:
        find_split(root, split)
    try:
        dataset = create_timm_dataset(name, root=folder, split=split, **kwargs)
    except RuntimeError as e:
        if 'Found 0 images' in str(e):
            raise ValueError(f"'{root}' holds no images for the split '{split}': {e}") from e
        if 'not found in info' in str(e):  # of a webdataset
            raise ValueError(f"There is no split '{split}' of '{name}': {e}") from e
        raise
    except AssertionError as e:  # how timm checks its arguments
        raise ValueError(f"The dataset '{name or root}' cannot be opened: {e}") from e
    if type(dataset) is ImageDataset:
        dataset.__class__ = TolerantImageDataset
        del dataset._max_retries  # the class has its own
    classes = class_to_idx(dataset)
    if labelled and classes is not None and len(classes) < 2:
        raise ValueError(
            f"'{root}' holds {len(classes)} class ({', '.join(map(repr, classes))}) for the split '{split}': expected "
            'one sub-folder per class and at least two of them.')
    return dataset


def format_demo_note(settings: dict[str, Any]) -> str:
    """Write settings of the demo set as a note for a model's pretrained_cfg."""
    return f'{DEMO_DATASET} {json.dumps(settings, sort_keys=True)}'


def read_demo_note(notes: Sequence[str] | None) -> dict[str, Any]:
    """Settings of the demo set among the notes of a pretrained_cfg; empty if there are none.

    Raises:
        ValueError: The note is damaged.
    """
    for note in notes or ():
        name, _, text = str(note).partition(' ')
        if name == DEMO_DATASET:
            try:
                return {k: v for k, v in json.loads(text).items() if k in DEMO_ARGS}
            except (ValueError, AttributeError) as e:
                raise ValueError(f"The model's pretrained_cfg has a damaged note of the demo set: '{note}'.") from e
    return {}


def class_to_idx(dataset: Any) -> dict[str, int] | None:
    """Index of each class name; None if the dataset does not have them."""
    if isinstance(getattr(dataset, 'target_transform', None), ClassMatch):
        return dataset.target_transform.class_to_idx
    reader = getattr(dataset, 'reader', None)
    for source, name in ((dataset, 'class_to_idx'), (reader, 'class_to_idx'), (reader, 'class_name_to_idx')):
        mapping = getattr(source, name, None)  # the last is that of tar files
        if isinstance(mapping, dict) and mapping:
            return mapping
    return None
