"""Images to predict, and their loader."""
import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import ImageDataset
from torch.utils.data import IterableDataset

from ..data import (
    CollateKeys,
    ImageList,
    MultiViewLoader,
    PredictionImages,
    PredictionStream,
    create_multi_view_transform,
)
from .build import create_eval_loader, image_mode, model_dtype, open_dataset


def open_images(args: argparse.Namespace, data_config: dict[str, Any]) -> PredictionImages | PredictionStream:
    """Open the images to predict.

    Args:
        args: Options of predict.py.
        data_config: Preprocessing, see `timm.data.resolve_data_config`.

    Raises:
        FileNotFoundError: They do not exist.
        ValueError: They cannot be opened, see `create_dataset` and `ImageList`.
    """
    if args.file_list:
        listed = ImageList(args.file_list, args.data_dir or args.data or '')
        return PredictionImages(ImageDataset('', reader=listed, input_img_mode=image_mode(args, data_config)))
    dataset = open_dataset(args, args.split, data_config, False, args.num_samples, labelled=False)
    reader: Any = getattr(dataset, 'reader', None)
    if type(reader).__name__ == 'ReaderHfds':  # it reads the label of an image with it, and there may be none
        reader.label_key, reader.remap_class = reader.image_key, False
    return PredictionStream(dataset) if isinstance(dataset, IterableDataset) else PredictionImages(dataset)


def build_image_loader(
        args: argparse.Namespace,
        images: PredictionImages | PredictionStream,
        data_config: Mapping[str, Any],
        device: torch.device,
        world_size: int = 1,
        views: Sequence[Mapping[str, Any]] | None = None,
) -> Any:
    """Create a loader of images to predict, in their order. Targets are `BatchKeys`.

    Args:
        args: Options of predict.py.
        images: See `open_images`.
        data_config: Preprocessing, see `timm.data.resolve_data_config`.
        device: Device of the images.
        world_size: Number of processes. `images` is the share of this one.
        views: Preprocessing for each member of a cascade, see `eval_views`.
    """
    # Several workers would read a stream in an order that depends on their number.
    workers = min(args.workers, 1) if isinstance(images, PredictionStream) else args.workers
    loader = create_eval_loader(
        args, images, data_config, args.batch_size, workers, device, world_size, views,
        crop_border_pixels=args.crop_border_pixels, tf_preprocessing=args.tf_preprocessing)
    inner = getattr(loader, 'loader', loader)
    inner.collate_fn = CollateKeys(inner.collate_fn)
    if views is None:
        return loader
    images.transform = create_multi_view_transform(views, normalise=args.no_prefetcher)
    return MultiViewLoader(loader, views, device, model_dtype(args) or torch.float32)
