"""Cluttered digits, the embedded demo set.

One real handwritten digit lies small on a large canvas, among pieces of other digits, arcs, bright spots and noise.
A canvas shrunk to a third tells where the digit probably is, but for most samples hardly which digit it is; a patch
in full resolution around it does. This is the setting that glance-and-focus networks were made for, in a size that
trains on a CPU in minutes and needs no download.

Why a glance does not do: the originals are only 8 x 8 pixels, so size alone hides nothing. The ink is hatched instead,
with stripes above and below the ground that cancel when averaged. How deep the hatch goes differs per sample, from
plain ink (easy, already readable at a glance) to full cancellation (hard), and so do size, contrast and clutter.

The digits are those that scikit-learn bundles: 1,797 images from the test half of the UCI set 'Optical Recognition of
Handwritten Digits' (E. Alpaydin, C. Kaynak, 1998), which 13 people wrote. The bundle does not say who wrote what, so
the split goes by index alone, every sixth image to val and every sixth to test. The same people wrote all three splits:
the test accuracy is that for new digits of known writers.
"""
from functools import cache
from typing import NamedTuple

import numpy as np
import torch.utils.data as data
from PIL import Image, ImageFilter

__all__ = ['ClutteredDigits', 'save_preview']

_SYNONYMS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'eval'),
    'test': ('test',),
}
_NUM_SAMPLES = {'train': 6000, 'val': 1000, 'test': 2000}
_STRIDE = 6  # of six digits in a row one goes to val, one to test, four to train
_RESIDUES = {'train': (0, 3, 4, 5), 'val': (1,), 'test': (2,)}
_NUM_CLASSES = 10

_GLYPH = 32  # resolution that the digits are kept in
_PIECE = 7  # side of a clutter piece, where a whole digit has _GLYPH // 2
_SLOT = 10  # each piece moves in its own slot, so that no two ever touch
_GROUND_STEP = 3  # pixels per sample of the smooth ground
_MIN_DIGIT = 8  # nothing can be read in fewer pixels than the originals have

BASE=(50,110); AMP=22; COARSE_STEP=14; FINE=(0,8); CONTRAST=(90,140); ALPHA=(.7,1.); PALPHA=(.2,.6); SPOT=(.2,.4); DECOYS=2.; DSPOT=(.1,.3)
EASY=.45; SHALLOW=(0.,.35); DEEP=(.6,1.); CHECK=True; LO=15; GAIN=5; PERIOD=(3.6,4.4); DENS=.4; LINES=3.; LALPHA=(.2,.5); PHATCH=False; TINTJ=.3; SPOTR=.75


class _Digits(NamedTuple):
    glyphs: np.ndarray  # [N, 32, 32] uint8
    targets: np.ndarray  # [N]
    by_class: list[np.ndarray]  # positions of each class in glyphs
    pieces: np.ndarray  # [P, 7, 7] uint8


def _glyph(digit: np.ndarray) -> np.ndarray:
    small = np.zeros((10, 10), np.uint8)
    small[1:9, 1:9] = np.minimum(digit.astype(np.int64) * 16, 255)
    pad = _GLYPH // 8
    image = Image.fromarray(small).resize((_GLYPH + 2 * pad,) * 2, Image.Resampling.BICUBIC)
    glow = image.filter(ImageFilter.BoxBlur(4))
    ink = np.asarray(image).astype(np.int64) - np.asarray(glow) - LO
    return np.clip(GAIN * ink[pad:-pad, pad:-pad], 0, 255).astype(np.uint8)


@cache
def _load_digits(split):
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError('pip install timm-dynamic[demo]') from e
    images, targets = load_digits(return_X_y=True)
    keep = np.isin(np.arange(len(targets)) % _STRIDE, _RESIDUES[split])
    targets = targets[keep]
    glyphs = np.stack([_glyph(i) for i in images[keep].reshape(-1, 8, 8)])
    half = glyphs.reshape(-1, _GLYPH // 2, 2, _GLYPH // 2, 2).mean((2, 4))
    far = _GLYPH // 2 - _PIECE
    pieces = np.concatenate([
        half[:, r:r + _PIECE, c:c + _PIECE] for r in (0, far // 2, far) for c in (2, far // 2, far - 2)])
    fill = pieces.mean((1, 2))
    pieces = pieces[(fill > 50) & (fill < 150)]
    return _Digits(glyphs, targets, [np.flatnonzero(targets == c) for c in range(_NUM_CLASSES)], pieces)


class ClutteredDigits(data.Dataset):
    def __init__(self, split='train', img_size=96, digit_scale=(16, 28), clutter=1.0, num_samples=None, seed=0, transform=None, target_transform=None):
        self.split=split; self.img_size=img_size; self.digit_scale=digit_scale; self.clutter=clutter; self.seed=seed; self.transform=transform
        self.num_samples=num_samples or _NUM_SAMPLES[split]
        self._id=list(_SYNONYMS).index(split)
        self.target_transform=target_transform

    def __len__(self): return self.num_samples

    def _source(self, index):
        digits = _load_digits(self.split)
        group, k = divmod(index, _NUM_CLASSES)
        target = int(np.random.Generator(np.random.PCG64((self.seed, self._id, group, 1))).permutation(_NUM_CLASSES)[k])
        own = digits.by_class[target]
        return own[(group + self.seed) % len(own)], target

    def _start(self, index):
        rng = np.random.Generator(np.random.PCG64((self.seed, self._id, index)))
        lo, hi = self.digit_scale
        u = rng.random(3)
        size = int(lo + u[0] * (hi - lo + 1))
        row, col = (int(v * (self.img_size - size + 1)) for v in u[1:])
        return rng, (row, col, size, size)

    def _render(self, index):
        digits = _load_digits(self.split)
        source, target = self._source(index)
        rng, (row, col, size, _) = self._start(index)
        S = self.img_size
        def between(ab): return ab[0] + rng.random() * (ab[1] - ab[0])
        contrast = between(CONTRAST)
        tint = np.rint(contrast * (1 + TINTJ * (rng.random(3) - .5) * 2)).astype(np.int16)

        # ground
        n = S // _GROUND_STEP + 1
        g = max(2, S // COARSE_STEP + 1)
        base = BASE[0] + rng.random(3) * (BASE[1] - BASE[0])
        coarse = (base + (rng.random((g, g, 3)) - .5) * 2 * AMP).astype(np.uint8)
        coarse = np.asarray(Image.fromarray(coarse).resize((n, n), Image.Resampling.BICUBIC))
        fine = (rng.random((n, n)) - .5) * 2 * between(FINE)
        yx = (np.arange(n) + .5) * (S / n)
        k = 1 + int(rng.random() * (DECOYS * self.clutter + 1))
        cy, cx = rng.random((2, k)) * S
        rad = (self.digit_scale[0] + rng.random(k) * (self.digit_scale[1]-self.digit_scale[0])) * SPOTR
        st = DSPOT[0] + rng.random(k) * (DSPOT[1] - DSPOT[0])
        cy[0], cx[0], rad[0] = row + size / 2, col + size / 2, size * SPOTR; st[0] = between(SPOT)
        d2 = ((yx - cy[:, None]) ** 2)[:, :, None] + ((yx - cx[:, None]) ** 2)[:, None]
        spots = (np.maximum(1 - d2 / (2*rad * rad)[:, None, None], 0) ** 2 * st[:, None, None]).max(0)
        ground = coarse + fine[..., None] + spots[..., None] * tint
        ground = np.clip(ground, 0, 255).astype(np.uint8)
        ground = np.asarray(Image.fromarray(ground).resize((S, S), Image.Resampling.BICUBIC))

        # pieces
        pitch = self.digit_scale[0] + rng.random() * (self.digit_scale[1] - self.digit_scale[0])
        pitch = pitch / (_GLYPH // 2)
        k = int(S / (pitch * _SLOT)) + 2
        oy, ox = rng.random(2) * _SLOT
        which = (rng.random((k, k)) * len(digits.pieces)).astype(np.int64)
        jit = (rng.random((2, k, k)) * (_SLOT - _PIECE)).astype(np.int64)
        strength = (rng.random((k, k)) < DENS * self.clutter) * (PALPHA[0] + rng.random((k, k)) * (PALPHA[1] - PALPHA[0]))
        grid = np.arange(k) * _SLOT
        top = (grid[:, None] + jit[0] - oy) * pitch
        left = (grid + jit[1] - ox) * pitch
        near = (1 + _PIECE) * pitch
        strength[(top > row - near) & (top < row + size + pitch) & (left > col - near) & (left < col + size + pitch)] = 0
        sheet = np.zeros((k, _SLOT, k, _SLOT), np.uint8)
        ar = np.arange(k)
        ap = np.arange(_PIECE)
        sheet[ar[:, None, None, None], jit[0][:, :, None, None] + ap[:, None], ar[None, :, None, None], jit[1][:, :, None, None] + ap] = \
            digits.pieces[which] * strength[:, :, None, None]
        sheet = Image.fromarray(sheet.reshape(k * _SLOT, k * _SLOT))
        side = S / pitch
        ink = np.array(sheet.resize((S, S), Image.Resampling.BILINEAR, box=(ox, oy, ox + side, oy + side))).astype(np.int16)
        # digit
        glyph = Image.fromarray(digits.glyphs[source]).resize((size, size), Image.Resampling.BICUBIC)
        alpha = int(256 * between(ALPHA))
        glyph = (np.asarray(glyph).astype(np.int32) * alpha >> 8).astype(np.int16)
        if PHATCH:
            ink[row:row + size, col:col + size] = glyph
        # hatch
        depth = between(SHALLOW if rng.random() < EASY else DEEP)
        step = int(256 / (between(PERIOD) * 1.41421356))
        slant = step if rng.random() < .5 else -step
        phase = (np.arange(S) * step + (np.arange(S) * slant)[:, None] + int(rng.random() * 256)) & 255
        wave = np.clip((np.abs(np.arange(256) - 128) - 64) * 8, -128, 128)  # +-128
        if CHECK:
            step = int(256 / between(PERIOD))
            sq = np.where(np.arange(256) < 128, 1, -1)
            sx = sq[(np.arange(S) * step + int(rng.random() * 256)) & 255]
            sy = sq[(np.arange(S) * step + int(rng.random() * 256)) & 255]
            phase = (sx * sy[:, None] + 1) // 2
            wave = np.array([-128, 128])
        gain = 128 - depth * (128 - wave)  # 128..128 for depth 0; wave for depth 1
        gain = gain.astype(np.int16)
        if PHATCH:
            ink = (ink * gain[phase]) >> 7
        else:
            ink[row:row+size,col:col+size] = glyph * gain[phase][row:row+size,col:col+size] >> 7
        # arcs
        k = int(rng.random() * (LINES * self.clutter + 1))
        if k:
            a, u, sgn, p0, p1, r = rng.random((6, k))
            a = 2 * a - 1
            v = np.stack([a, np.where(sgn < .5, 1, -1) * (1 - np.abs(a))])
            v = v * S * (1 + r)
            c = np.stack([p0, p1]) * S + v
            rr = (v * v).sum(0)
            yx = np.arange(S)
            d = np.abs(((yx - c[0][:, None]) ** 2)[:, :, None] + ((yx - c[1][:, None]) ** 2)[:, None] - rr[:, None, None]) / (2 * np.sqrt(rr))[:, None, None]
            lines = np.clip(1.3 - d, 0, 1).max(0) * (255 * between(LALPHA))
            lines[row:row + size, col:col + size] = 0
            lines=lines.astype(np.int16)
            ink = np.where(lines > np.abs(ink), lines, ink)
        out = ground + (ink[..., None] * tint.astype(np.int32) >> 8)
        return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8)), target

    def __getitem__(self, index):
        im, t = self._render(index)
        if self.transform: im = self.transform(im)
        return im, t

    def box(self, index):
        return self._start(index)[1]
