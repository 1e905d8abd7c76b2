"""File names of a dataset's images."""
from typing import Any

from torch.utils.data import Subset


def image_names(dataset: Any, split: str) -> list[str]:
    """File names of all images of a dataset, or SPLIT/NUMBER where it has none."""
    if isinstance(dataset, Subset):
        names = image_names(dataset.dataset, split)
        return [names[i] for i in dataset.indices]
    if hasattr(dataset, 'filenames') and None not in (names := dataset.filenames()):
        return list(names)
    return [f'{split}/{i:06d}' for i in range(len(dataset))]
