"""Several views of an image, one for each member of a cascade. The image is decoded once."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.data import create_transform


class MultiViewTransform:
    """Applies several transforms to one image.

    Args:
        transforms: One for each view.
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> tuple[Any, ...]:
        return tuple(transform(image) for transform in self.transforms)


def create_multi_view_transform(views: Sequence[Mapping[str, Any]], normalise: bool = False) -> MultiViewTransform:
    """Create timm's evaluation transform for each view.

    Args:
        views: For each 'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std'.
        normalise: Make normalised float tensors. Otherwise uint8, which `MultiViewLoader` normalises on the device.
    """
    return MultiViewTransform([create_transform(**view, use_prefetcher=not normalise) for view in views])


def collate_views(samples: Sequence[tuple[Sequence[Any], Any]]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Collate samples: for each view a tensor [B, C, S_i, S_i], and the targets [B] int64."""
    views = zip(*(views for views, _ in samples))
    stacked = tuple(
        torch.stack(view) if isinstance(view[0], torch.Tensor) else torch.from_numpy(np.stack(view)) for view in views)
    return stacked, torch.tensor([target for _, target in samples], dtype=torch.int64)


class MultiViewLoader:
    """Moves the views of a loader to a device, one batch ahead, and normalises them there.

    Args:
        loader: Gives (views, target) as `collate_views` makes them. Only uint8 views are normalised.
        views: See `create_multi_view_transform`.
        device: Device to move to.
        dtype: Dtype of the images.
    """

    def __init__(
            self,
            loader: Any,
            views: Sequence[Mapping[str, Any]],
            device: torch.device | str = 'cpu',
            dtype: torch.dtype = torch.float32,
    ) -> None:
        self.loader, self.device, self.dtype = loader, torch.device(device), dtype
        self._norms = [
            [(255 * torch.tensor(view[k], dtype=torch.float32)).view(-1, 1, 1).to(self.device) for k in ('mean', 'std')]
            for view in views]

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        ready = None
        for views, target in self.loader:
            upcoming = self._prepare(views, target)
            if ready is not None:
                yield ready
            ready = upcoming
        if ready is not None:
            yield ready

    def _prepare(self, views: Any, target: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        out = []
        for view, (mean, std) in zip(views, self._norms, strict=True):
            raw = view.dtype == torch.uint8
            view = view.to(self.device, non_blocking=True)
            out.append(((view.float() - mean) / std if raw else view).to(self.dtype))
        return tuple(out), target.to(self.device, non_blocking=True)
