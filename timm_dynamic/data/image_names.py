"""File names of a dataset's images."""
from typing import Any

import numpy as np
from torch.utils.data import Subset


def image_names(dataset: Any, split: str) -> list[str]:
    """File names of all images of a dataset, or SPLIT/NUMBER where it has none."""
    if isinstance(dataset, Subset):
        names = image_names(dataset.dataset, split)
        return [names[i] for i in dataset.indices]
    if hasattr(dataset, 'filenames') and None not in (names := dataset.filenames()):
        return _add_inner_tars(dataset, names)
    return [f'{split}/{i:06d}' for i in range(len(dataset))]


def _add_inner_tars(dataset: Any, names: list[str]) -> list[str]:
    """Put the names of tar files inside a tar file before the names of their images, where timm omits them."""
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    if not isinstance(samples, np.ndarray):  # only timm's reader of tar files has one
        return list(names)
    return [name if inner is None else f'{inner.name}/{name}' for name, (_, _, inner) in zip(names, samples)]
