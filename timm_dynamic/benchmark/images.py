"""Images of a dataset for the exit benchmark, in place of noise."""
import argparse
import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..data import PredictionImages
from ..launch.build import default_split, eval_views, resolve_data, uses_demo_data
from ..launch.images import build_image_loader, open_images
from ..launch.options import create_predict_parser
from ..models.dynamic_net import DynamicNet

_logger = logging.getLogger(__name__)


def check_effect(
        own: bool,
        budget: float | None,
        thresholds: Sequence[float] | None,
        exit_shares: Sequence[float] | None,
        data: dict[str, str | None],
) -> None:
    """Raise a ValueError if an argument would have no effect."""
    if budget is not None and thresholds is not None:
        raise ValueError('--budget and --thresholds both say when to exit: choose one.')
    if own and exit_shares is not None:
        raise ValueError(
            '--exit-shares places thresholds on noise. It cannot be combined with --budget or --thresholds.')
    given = [f'--{name}' for name, value in data.items() if value is not None]
    if given and not own:
        raise ValueError(f"{', '.join(given)}: without --budget or --thresholds, images are noise.")


def predict_options(
        model: str,
        batch_size: int,
        model_kwargs: dict[str, Any] | None,
        data_dir: str | None,
        dataset: str | None,
        split: str | None,
) -> argparse.Namespace:
    """Options of predict.py for the images of the dataset."""
    argv = ['--model', model, '--batch-size', str(batch_size), '--workers', '0', '--device', 'cpu']
    for name, value in (('--data-dir', data_dir), ('--dataset', dataset), ('--split', split)):
        argv += [] if value is None else [name, value]
    options = create_predict_parser().parse_args(argv)
    options.model_kwargs = dict(model_kwargs or {})
    options.split = options.split or default_split(options)
    return options


def read_images(options: argparse.Namespace, net: DynamicNet, wanted: int, required: int | None) -> list[Any]:
    """Read random images, prepared as the model needs them, as batches on the CPU.

    Args:
        options: See `predict_options`.
        net: The model.
        wanted: Number of images, if there are as many. Iterable datasets give their first ones.
        required: Number of images that there must be.

    Raises:
        ValueError: There are fewer, or none.
    """
    if uses_demo_data(options):
        _logger.info(f"No data given: split '{options.split}' of the embedded demo set cluttered_digits is used.")
    data_config = resolve_data(options, net)
    images = open_images(options, data_config)
    if isinstance(images, PredictionImages):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images.indices = order[:wanted].tolist()
    loader = build_image_loader(options, images, data_config, torch.device('cpu'), views=eval_views(options, net))
    batches: list[Any] = []
    for x, keys in loader:
        unreadable = [key.error for key in keys if key.error]
        if unreadable:
            raise ValueError(f'An image cannot be read: {unreadable[0]}')
        left = wanted - sum(map(num_images_of, batches))
        batches.append(rows_of(x, slice(left)))
        if left <= num_images_of(x):
            break
    found = sum(map(num_images_of, batches))
    if found < max(required or 1, 1):
        raise ValueError(f"--num-images: expected at most the {found} images of '{options.split}', got {required}."
                         if found else f"There are no images in split '{options.split}'.")
    return batches


def rows_of(x: Any, rows: slice) -> Any:
    """Some images of a batch; of a cascade, of each member's."""
    return tuple(v[rows] for v in x) if isinstance(x, tuple) else x[rows]


def num_images_of(x: Any) -> int:
    """Number of images in a batch."""
    return len(x[0] if isinstance(x, tuple) else x)
