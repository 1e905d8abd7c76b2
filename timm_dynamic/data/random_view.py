"""Random crops and flips of training, for images that are not trained on."""
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from timm.data import create_transform

from ..utils import seeded


class RandomView:
    """A random crop and flip of an image, as in training on ImageNet: timm's defaults without colour jitter.

    The random numbers depend only on the seed and the pixels. So they do not depend on the number of processes and
    workers.

    Args:
        data_config: Preprocessing, as timm resolves it.
        normalise: Whether to normalise. With timm's prefetcher, the loader does.
        seed: Seed of the run.
    """

    def __init__(self, data_config: Mapping[str, Any], normalise: bool, seed: int) -> None:
        self.seed = seed
        self.transform: Callable[[Image.Image], Any] = create_transform(
            data_config['input_size'], is_training=True, color_jitter=0., interpolation=data_config['interpolation'],
            mean=data_config['mean'], std=data_config['std'], use_prefetcher=not normalise)

    def __call__(self, image: Image.Image) -> Any:
        with seeded(self.seed, 'random view', zlib.crc32(image.tobytes())):
            return self.transform(image)
