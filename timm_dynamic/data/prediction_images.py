"""Images without labels: each keeps its index and name, also where others cannot be read."""
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, IterableDataset


class ImageKey(NamedTuple):
    """Which image a sample is."""
    number: int  # index in the dataset
    name: str | None = None  # only of streams, whose names are not known before
    error: str | None = None  # why it cannot be read; the image is blank then


class BatchKeys(list):
    """The `ImageKey`s of a batch, in place of targets."""

    def to(self, *args: Any, **kwargs: Any) -> 'BatchKeys':
        """Return itself. Loaders move targets to the device."""
        return self

    def pin_memory(self, *args: Any) -> 'BatchKeys':
        """Return itself. Loaders pin targets."""
        return self


class CollateKeys:
    """Collates samples (image, `ImageKey`).

    Args:
        collate_fn: Collates (image, target), e.g. that of a timm loader.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Sequence[tuple[Any, ImageKey]]) -> tuple[Any, BatchKeys]:
        images, _ = self.collate_fn([(image, 0) for image, _ in samples])
        return images, BatchKeys(key for _, key in samples)


class PredictionImages(Dataset):
    """Images of a map-style dataset with their keys, in place of the labels.

    Where timm's datasets give the next image for one that cannot be read, this one gives a blank image and the reason.

    Args:
        dataset: A timm or torchvision dataset. Its `transform` is set through this one's.

    Attributes:
        indices: Images of the dataset to give (default: all).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.indices: Sequence[int] = range(len(dataset))

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, ImageKey]:
        index = self.indices[position]
        try:
            return self._read(index), ImageKey(index)
        except Exception as e:  # decoders raise errors of any class
            blank = Image.new(getattr(self.dataset, 'input_img_mode', None) or 'RGB', (32, 32))
            reason = re.sub(' <[^>]*>', '', f'{type(e).__name__}: {e}')  # Pillow names file objects by their address
            return self.transform(blank), ImageKey(index, error=reason)

    def _read(self, index: int) -> Any:
        if not isinstance(self.dataset, ImageDataset):
            return self.dataset[index][0]
        with self.dataset.reader[index][0] as file:
            return self.transform(Image.open(file).convert(self.dataset.input_img_mode))


class PredictionStream(IterableDataset):
    """Images of an iterable dataset with their keys, in the order in which one worker reads them.

    Args:
        dataset: A timm dataset. Its `transform` is set through this one's.

    Attributes:
        start: Number of images to skip.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.transform: Any = None
        self.start = 0

    def __iter__(self) -> Iterator[tuple[Any, ImageKey]]:
        for index, (image, name) in enumerate(self._named_images()):
            if index >= self.start:
                yield self.transform(image), ImageKey(index, name)

    def _named_images(self) -> Iterator[tuple[Any, str | None]]:
        reader = self.dataset.reader
        if type(reader).__name__ != 'ReaderWds':
            yield from ((image, None) for image, _ in reader)
        elif next(iter(reader), None) is not None:  # timm makes the pipeline when it is first read
            yield from ((sample['image'], sample['__key__']) for sample in reader.ds)


class ImageList:
    """timm reader of the images that a text file names.

    Args:
        path: File with one path per line. Empty lines are ignored.
        root: Folder that the paths are relative to.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It names no images, or is not text.
    """

    def __init__(self, path: str | Path, root: str | Path = '') -> None:
        try:
            lines = Path(path).read_text(encoding='utf-8').splitlines()
        except UnicodeDecodeError as e:
            raise ValueError(f"'{path}' is not a text file with one image path per line: {e}") from e
        self.names, self.root = [line.strip() for line in lines if line.strip()], root
        if not self.names:
            raise ValueError(f"'{path}' names no images: expected a text file with one image path per line.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        return open(os.path.join(self.root, self.names[index]), 'rb'), None

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The line of an image; its base name, or its path."""
        name = self.names[index]
        return os.path.basename(name) if basename else os.path.join(self.root, name) if absolute else name

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Names of all images, see `filename`."""
        return [self.filename(i, basename, absolute) for i in range(len(self))]
