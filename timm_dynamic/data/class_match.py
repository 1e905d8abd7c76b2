"""Class indices of a dataset: the model's, found by the names of the classes."""
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

_logger = logging.getLogger(__name__)


class ClassMatch:
    """Target transform from the indices of a dataset to those of a model.

    Args:
        indices: The model's index of each of the dataset's.
        class_to_idx: The model's index of each class name.
    """

    def __init__(self, indices: Mapping[int, int], class_to_idx: dict[str, int]) -> None:
        self.indices, self.class_to_idx = dict(indices), class_to_idx

    def __call__(self, target: Any) -> Any:
        if isinstance(target, Sequence):
            return [self.indices[int(value)] for value in target]
        return self.indices[int(target)]


def model_class_to_idx(label_names: Any, num_classes: int) -> dict[str, int] | None:
    """Index of each class name of a model; None if they are not known.

    Args:
        label_names: Names of the first classes, in their order, e.g. of its pretrained_cfg. Without them, models with
            the number of classes of one of timm's ImageNet subsets have WordNet synsets, as in timm.
        num_classes: Number of classes of the model.
    """
    if isinstance(label_names, (list, tuple)) and 0 < len(label_names) <= num_classes:
        return {str(name): i for i, name in enumerate(label_names)}
    subset = infer_imagenet_subset({'num_classes': num_classes})
    if label_names or subset is None:
        return None
    return {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}


def match_classes(
        own: Mapping[str, int],
        names: Mapping[str, int] | None,
        num_classes: int,
        what: str,
        training: bool = False,
) -> ClassMatch | None:
    """Give the classes of a dataset the model's indices, by their names, and say so if that changes them.

    If no name is one of the model's, the classes keep their order, as in timm.

    Args:
        own: Index of each class name of the dataset.
        names: Index of each class name of the model, see `model_class_to_idx`.
        num_classes: Number of classes of the model.
        what: The dataset, in messages.
        training: A model to be trained has no classes yet: names that are not its own are right.

    Returns:
        The target transform; None if the indices stay as they are.

    Raises:
        ValueError: Only some of the names are the model's: no order of the classes would be right.
    """
    known = [name for name in own if names and name in names]
    if names and len(known) == len(own):
        if own == names:
            return None
        _logger.info(f"The {what} data has {len(own)} of the model's {len(names)} classes, matched by their names.")
        return ClassMatch({index: names[name] for name, index in own.items()}, dict(names))
    if training:
        return None
    strange = next(name for name in own if name not in known)
    if known:
        raise ValueError(
            f"The {what} data has {len(own)} classes, and {len(known)} of them are among the model's {num_classes}, "
            f"but not '{strange}'. Remove its images, or give the model's index of each class with --class-map.")
    count = max(own.values()) + 1
    example = f" (e.g. '{next(iter(names))}')" if names else ', whose names are not known'
    if count != num_classes or (names and infer_imagenet_subset({'num_classes': num_classes}) is None):
        _logger.warning(
            f"The {what} data has {count} classes (e.g. '{strange}'), the model has {num_classes}{example}. They "
            'cannot be matched by name, so their order is used: the results may be wrong. Give the index of each class '
            'with --class-map.')
    return None
