"""Cluttered digits, the embedded demo set.

A canvas holds one small handwritten digit, among pieces of other digits, arcs, bright spots and noise. Shrunk to a
third, the canvas shows where the digit probably is, but rarely which digit it is. A small patch in full resolution
shows which. Models that glance first and then look at patches need such images; this set is small enough to train on a
CPU in minutes.

The original digits have only 8 x 8 pixels, so shrinking alone hides little. Therefore the ink is a fine checkerboard:
every other cell is as far below the ground as its neighbours are above it, and shrinking averages them away. The depth
of the checkerboard varies: some samples have plain ink that any glance can read, others leave only a bright spot in
the shrunken canvas. Size, contrast and clutter vary, too.

The digits are the 1,797 that scikit-learn bundles, the test part of UCI's "Optical Recognition of Handwritten Digits"
(E. Alpaydin, C. Kaynak; CC BY 4.0), written by 13 people. The bundle does not tell who wrote which digit, so the splits
go by index: one digit in six is in val, one in test. The order of the labels nearly repeats about every 130 digits,
which suggests that the digits are ordered by writer. If so, every split has digits of all writers, and accuracy is that
on new digits of known writers.
"""
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch.utils.data as data
from PIL import Image, ImageFilter

from ..utils import derive_seed
from .splits import TRAIN_SPLITS, VALIDATION_SPLITS

_NUM_CLASSES = 10
_SPLITS = {'train': ((0, 3, 4, 5), 6000), 'val': ((1,), 1000), 'test': ((2,), 2000)}  # index % 6, number of samples
_SPLIT_NAMES = {**dict.fromkeys(TRAIN_SPLITS, 'train'), **dict.fromkeys(VALIDATION_SPLITS, 'val'), 'test': 'test'}
_MIN_DIGIT = 8  # pixels, as many as the originals have
_MAX_CLUTTER = 4.

# Ink. Strengths are shares of the sample's contrast, which is in grey levels.
_GLYPH = 32  # side that the digits are kept at
_CONTRAST = (70, 130)
_TINT = .3  # how far a colour channel's contrast may be off
_CELL = (1.8, 2.2)  # side of a checkerboard cell, in pixels: gone in a canvas shrunk to a third
_SHALLOW, _DEEP, _SHALLOW_SHARE = (0., .35), (.7, 1.), .45  # depth 0 is plain ink, depth 1 averages out to nothing

# Clutter. Numbers are those at clutter=1.
_PIECE = 7  # side of a piece where a whole digit has _GLYPH // 2: less than half
_SLOT = 11  # side of the square that a piece moves in; two pixels of it stay free, so that no pieces touch
_PIECE_SHARE, _PIECE_INK = .45, (.15, .5)  # of the slots
_ARCS, _ARC_INK, _ARC_WIDTH = 2., (.2, .5), 2.6  # at most so many
_DECOYS, _DECOY_SPOT = 2., (.1, .3)  # spots without a digit, at most so many

# Ground, drawn at a third of the resolution.
_GROUND_STEP, _COARSE_STEP = 3, 14  # pixels between the points of its fine and its coarse noise
_GROUND, _COARSE, _FINE = (80, 120), 16, (0, 6)
_SPOT, _SPOT_RADIUS = (.25, .4), 1.1  # under the digit; in digit sizes


class _Digits(NamedTuple):
    glyphs: np.ndarray  # [N, 32, 32] uint8, sorted by class
    source: np.ndarray  # [N] index in scikit-learn's set
    first: np.ndarray  # [11] where each class begins
    pieces: np.ndarray  # [P, 7, 7] uint8, at half the resolution of the glyphs


def _draw_glyph(digit: np.ndarray) -> np.ndarray:
    """Turn an 8 x 8 image with values 0..16 into [32, 32] uint8, smooth and with strokes of even strength."""
    unit = _GLYPH // 8
    small = np.zeros((10, 10), np.uint8)
    small[1:9, 1:9] = np.minimum(digit * 16, 255)
    image = Image.fromarray(small).resize((10 * unit, 10 * unit), Image.Resampling.BICUBIC)
    ink = np.asarray(image, np.int16) - np.asarray(image.filter(ImageFilter.BoxBlur(unit)), np.int16)
    return np.clip(6 * ink[unit:-unit, unit:-unit], 0, 255).astype(np.uint8)


@cache
def _load_digits(split: str) -> _Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError(
            "The cluttered_digits set is made from scikit-learn's digits: pip install timm-dynamic[demo]") from e
    images, targets = load_digits(return_X_y=True)
    source = np.flatnonzero(np.isin(np.arange(len(targets)) % 6, _SPLITS[split][0]))
    source = source[np.argsort(targets[source], kind='stable')]
    glyphs = np.stack([_draw_glyph(image.reshape(8, 8)) for image in images[source]])

    half = glyphs.reshape(-1, _GLYPH // 2, 2, _GLYPH // 2, 2).mean((2, 4)).astype(np.uint8)
    end = _GLYPH // 2 - _PIECE
    pieces = np.concatenate([
        half[:, row:row + _PIECE, col:col + _PIECE] for row in (0, end // 2, end) for col in (2, end // 2, end - 2)])
    fill = pieces.mean((1, 2))
    pieces = pieces[(fill > 50) & (fill < 150)]  # neither blank nor a blot
    return _Digits(glyphs, source, np.searchsorted(targets[source], np.arange(_NUM_CLASSES + 1)), pieces)


def _between(span: tuple[float, float], u: Any) -> Any:
    return span[0] + u * (span[1] - span[0])


def _resize(array: np.ndarray, size: int, mode: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize((size, size), mode))


def _draw_ground(
        rng: np.random.Generator,
        img_size: int,
        box: tuple[int, int, int, int],
        digit_scale: tuple[int, int],
        clutter: float,
        tint: np.ndarray,
) -> np.ndarray:
    """Draw smooth noise with a bright spot under the digit and a few elsewhere, [img_size, img_size, 3] uint8."""
    u = rng.random(6)
    small = -(-img_size // _GROUND_STEP)
    grid = img_size // _COARSE_STEP + 2
    coarse = _between(_GROUND, u[:3]) + _COARSE * (2 * rng.random((grid, grid, 3)) - 1)
    fine = _between(_FINE, u[3]) * (2 * rng.random((small, small)) - 1)

    row, col, size, _ = box
    spots = rng.random((4, 1 + int(u[4] * (_DECOYS * clutter + 1))))
    center = spots[:2] * img_size
    center[:, 0] = row + size / 2, col + size / 2
    diameter = _between(digit_scale, spots[2])
    diameter[0] = size
    strength = _between(_DECOY_SPOT, spots[3])
    strength[0] = _between(_SPOT, u[5])
    at = (np.arange(small) + .5) * (img_size / small)
    distance = (at - center[..., None]) ** 2 / (_SPOT_RADIUS * diameter[:, None]) ** 2
    light = np.maximum(1 - distance[0, :, :, None] - distance[1, :, None], 0) ** 2 * strength[:, None, None]

    ground = _resize(coarse.astype(np.uint8), small) + (fine + tint.mean() * light.max(0))[..., None]
    return _resize(np.clip(ground, 0, 255).astype(np.uint8), img_size, Image.Resampling.BILINEAR)


def _draw_pieces(
        rng: np.random.Generator,
        img_size: int,
        box: tuple[int, int, int, int],
        digit_scale: tuple[int, int],
        clutter: float,
        pieces: np.ndarray,
) -> np.ndarray:
    """Draw pieces of digits outside the digit's box, [img_size, img_size] int16, ink 0..127.

    A piece is less than half as high and wide as the digit it was cut from, and touches neither another piece nor the
    box. So it neither looks like a digit nor changes one.
    """
    u = rng.random(3)
    pitch = _between(digit_scale, u[0]) / (_GLYPH // 2)  # pixels of the canvas to a pixel of a piece
    slots = math.ceil(img_size / (pitch * _SLOT)) + 1
    origin = u[1:] * _SLOT
    which, ink, keep, *shift = rng.random((5, slots, slots))
    top, left = (np.arange(slots) * _SLOT)[:, None], np.arange(slots) * _SLOT
    top = top + (shift[0] * (_SLOT - _PIECE - 1)).astype(np.int64)
    left = left + (shift[1] * (_SLOT - _PIECE - 1)).astype(np.int64)

    # Bilinear interpolation spreads ink by no more than one pixel, of the piece or of the canvas.
    row, col, size, _ = box
    y, x = (top - origin[0]) * pitch, (left - origin[1]) * pitch
    spread = max(pitch, 1)
    reach = _PIECE * pitch + spread
    apart = (y + reach < row) | (y - spread > row + size) | (x + reach < col) | (x - spread > col + size)
    chosen = np.nonzero((keep < _PIECE_SHARE * clutter) & apart)

    sheet = np.zeros((slots * _SLOT, slots * _SLOT), np.uint8)
    drawn = pieces[(which[chosen] * len(pieces)).astype(np.int64)]
    strength = (128 * _between(_PIECE_INK, ink[chosen])).astype(np.uint16)
    side = np.arange(_PIECE)
    sheet[top[chosen][:, None, None] + side[:, None], left[chosen][:, None, None] + side] = (
        drawn * strength[:, None, None] >> 8)
    view = (origin[1], origin[0], origin[1] + img_size / pitch, origin[0] + img_size / pitch)
    image = Image.fromarray(sheet).resize((img_size, img_size), Image.Resampling.BILINEAR, box=view)
    return np.array(image, np.int16)


def _draw_arcs(rng: np.random.Generator, img_size: int, clutter: float) -> np.ndarray | int:
    """Draw thin arcs, each from border to border or nearly so, [img_size, img_size] int16, ink 0..127."""
    u = rng.random(2)
    number = int(u[0] * (_ARCS * clutter + 1))
    if not number:
        return 0
    # Circles through a point of the canvas, with centres so far away that no circle closes on it.
    arcs = rng.random((5, number))
    along = 2 * arcs[0] - 1
    toward = np.stack([along, np.where(arcs[1] < .5, -1, 1) * (1 - np.abs(along))]) * (img_size * (1 + arcs[2]))
    radius = np.sqrt((toward ** 2).sum(0))[:, None]
    center = (arcs[3:] * img_size + toward)[..., None]
    # Near a circle the distance from it is about (r'^2 - r^2) / 2r: two terms, one for rows and one for columns.
    at = ((np.arange(img_size) - center) ** 2 / (2 * radius)).astype(np.float32)
    distance = np.abs((at[0] - radius.astype(np.float32) / 2)[:, :, None] + at[1][:, None])
    return (np.clip(_ARC_WIDTH / 2 - distance.min(0), 0, 1) * (127 * _between(_ARC_INK, u[1]))).astype(np.int16)


def _draw_digit(rng: np.random.Generator, size: int, glyph: np.ndarray) -> np.ndarray:
    """Draw the digit in checkerboard ink, [size, size] int16, -127..127."""
    u = rng.random(5)
    depth = _between(_SHALLOW, u[1]) if u[0] < _SHALLOW_SHARE else _between(_DEEP, u[1])
    step = int(128 / _between(_CELL, u[2]))  # fixed point: 128 to a cell
    cell = (np.arange(size) * step + (u[3:, None] * 256).astype(np.int64)) >> 7 & 1
    ink = np.array([128, 128 - int(256 * depth)], np.int16)[cell[0][:, None] ^ cell[1]]
    return (_resize(glyph, size) >> 1) * ink >> 7


class ClutteredDigits(data.Dataset):
    """One real digit on a large cluttered canvas; see the top of this file.

    Sample `index` is a function of (split, seed, index) and of the settings below. It does not depend on the number of
    samples or workers, or on what was drawn before. All classes are equally frequent, and so are the digits of a class.

    Digits are not symmetric: train without flips.
    """
    num_classes = _NUM_CLASSES

    def __init__(
            self,
            split: str = 'train',
            img_size: int = 96,
            digit_scale: Sequence[int] = (24, 36),
            clutter: float = 0.5,
            num_samples: int | None = None,
            seed: int = 0,
            transform: Callable | None = None,
            target_transform: Callable | None = None,
    ) -> None:
        """
        Args:
            split: 'train', 'val' or 'test', or one of timm's synonyms. No digit is in two splits.
            img_size: Side of the canvas in pixels. It does not change the size of the digits.
            digit_scale: Smallest and largest side of the digit in pixels.
            clutter: Amount of clutter, 0 (the digit alone) to 4.
            num_samples: Default 6000 (train), 1000 (val) and 2000 (test). From 1280, 360 and 340 on, every digit of
                the split is used.
            seed: Seed of everything random.
            transform: Applied to the PIL image.
            target_transform: Applied to the target.
        """
        if split not in _SPLIT_NAMES:
            raise ValueError(f'There is no split {split!r}: expected one of {", ".join(_SPLIT_NAMES)}.')
        self.split = _SPLIT_NAMES[split]
        self.img_size = _check_int('img_size', img_size, 1)
        self.digit_scale = _check_digit_scale(digit_scale, self.img_size)
        self.clutter = _check_clutter(clutter)
        default = _SPLITS[self.split][1]
        self.num_samples = default if num_samples is None else _check_int('num_samples', num_samples, 1)
        self.seed = _check_int('seed', seed, 0)
        self.transform = transform
        self.target_transform = target_transform
        self.class_to_idx = {str(i): i for i in range(_NUM_CLASSES)}

        first, rng = _load_digits(self.split).first, self._generator()
        counts = np.diff(first)
        order = np.lexsort((rng.random(first[-1]), np.repeat(np.arange(_NUM_CLASSES), counts)))
        turns = rng.random((-(-self.num_samples // _NUM_CLASSES), _NUM_CLASSES)).argsort(1, kind='stable')
        self.targets = turns.reshape(-1)[:self.num_samples]
        turn = np.arange(self.num_samples) // _NUM_CLASSES
        self._glyph = order[first[self.targets] + turn % counts[self.targets]]

    def _generator(self, *index: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(derive_seed('cluttered_digits', self.split, self.seed, *index)))

    def _index(self, index: int) -> int:
        position = operator.index(index)
        if not -self.num_samples <= position < self.num_samples:
            raise IndexError(f'Sample {index} of {self.num_samples}.')
        return position % self.num_samples

    def _place(self, index: int) -> tuple[np.random.Generator, tuple[int, int, int, int]]:
        rng = self._generator(index)
        u = rng.random(3)
        size = int(_between((self.digit_scale[0], self.digit_scale[1] + 1), u[0]))
        row, col = (int(v * (self.img_size - size + 1)) for v in u[1:])
        return rng, (row, col, size, size)

    def _draw(self, index: int) -> Image.Image:
        digits = _load_digits(self.split)
        rng, box = self._place(index)
        u = rng.random(4)
        tint = _between(_CONTRAST, u[0]) * (1 + _TINT * (2 * u[1:] - 1))
        ground = _draw_ground(rng, self.img_size, box, self.digit_scale, self.clutter, tint)
        ink = _draw_pieces(rng, self.img_size, box, self.digit_scale, self.clutter, digits.pieces)
        ink = np.maximum(ink, _draw_arcs(rng, self.img_size, self.clutter))
        row, col, size, _ = box
        ink[row:row + size, col:col + size] = _draw_digit(rng, size, digits.glyphs[self._glyph[index]])

        # Channels side by side: numpy is slow on a last axis of three.
        ink = np.repeat(ink, 3, axis=1) * np.tile(tint.astype(np.int16), self.img_size) >> 7
        canvas = np.clip(ground.reshape(self.img_size, -1) + ink, 0, 255).astype(np.uint8)
        return Image.fromarray(canvas.reshape(self.img_size, self.img_size, 3))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = self._index(index)
        image: Any = self._draw(index)
        target: Any = int(self.targets[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def __len__(self) -> int:
        return self.num_samples

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Return row, column, height and width of the digit's box on the canvas. The box has no clutter."""
        return self._place(self._index(index))[1]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return a name for a sample, e.g. 'train/000123_digit7', like the file names of timm's datasets."""
        index = self._index(index)
        name = f'{index:06d}_digit{self.targets[index]}'
        return name if basename else f'{self.split}/{name}'

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        return [self.filename(i, basename, absolute) for i in range(len(self))]


def _check_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f'{name}={value!r}: expected a whole number of at least {least}.')
    return int(value)


def _check_clutter(value: Any) -> float:
    if not isinstance(value, numbers.Real) or not 0 <= float(value) <= _MAX_CLUTTER:
        raise ValueError(f'clutter={value!r}: expected a number from 0 to {_MAX_CLUTTER:g}.')
    return float(value)


def _check_digit_scale(digit_scale: Any, img_size: int) -> tuple[int, int]:
    try:
        low, high = (_check_int('digit_scale', v, _MIN_DIGIT) for v in digit_scale)
    except (TypeError, ValueError):
        low, high = 1, 0
    if low > high:
        raise ValueError(
            f'digit_scale={digit_scale!r}: expected the smallest and the largest side of the digit, '
            f'two whole numbers of at least {_MIN_DIGIT} pixels.')
    if img_size < high:
        raise ValueError(
            f'img_size={img_size} is too small for digit_scale={low, high}: expected at least {high} pixels.')
    return low, high
