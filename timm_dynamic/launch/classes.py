"""The classes of a dataset and those of a model."""
import argparse
from collections.abc import Mapping
from typing import Any

from ..data import class_to_idx, match_classes


def check_classes(dataset: Any, num_classes: int, what: str) -> None:
    """Raise a ValueError if a dataset has more classes than the model."""
    classes = class_to_idx(dataset)
    if classes is not None and max(classes.values()) >= num_classes:
        raise ValueError(
            f'The {what} data has {max(classes.values()) + 1} classes ({_first_names(classes)}), the model has '
            f'{num_classes}: use --num-classes {max(classes.values()) + 1}.')


def match_dataset(
        args: argparse.Namespace,
        dataset: Any,
        data_config: Mapping[str, Any],
        num_classes: int,
        what: str,
        training: bool = False,
) -> None:
    """Give the classes of a dataset the model's indices, unless the options set them: see `match_classes`."""
    own = class_to_idx(dataset)
    if own is None or args.class_map or getattr(args, 'valid_labels', ''):
        return
    match = match_classes(own, data_config.get('class_to_idx'), num_classes, what, training)
    if match is not None:
        dataset.target_transform = match


def sorted_classes(loader: Any) -> list[str] | None:
    """Names of the classes of a loader, by index; None if they are not known, or one index has none or several."""
    names = loader.class_to_idx or {}
    ordered = sorted(names, key=lambda name: names[name])
    return ordered if ordered and [names[name] for name in ordered] == list(range(len(ordered))) else None


def _first_names(classes: dict[str, int]) -> str:
    names = sorted(classes, key=lambda k: classes[k])
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
