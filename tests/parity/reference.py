"""Weights and inputs of the reference runs, rebuilt bit for bit.

The reference numbers in data/ were recorded by running the original code, unmodified, on weights and inputs that are
functions of a name, a shape and a seed. This is that rule:

A weight's generator is numpy's default_rng(crc32(salt + key)). By the last part of its key and its dimensions it is
num_batches_tracked: 1; running_mean: 0.1 normal; running_var: uniform in 0.6..1.4; a 1-d weight: uniform in 0.7..1.3;
another 1-d tensor: 0.05 normal; anything else: sqrt(1.6 / fan_in) normal. All is multiplied by a gain per tensor, in
float64, and rounded to float32 last.
"""
import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch


def fill(state_dict: Mapping[str, torch.Tensor], salt: str, gains: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The reference weights for the keys and shapes of a state dict."""
    return {key: _fill(key, tuple(v.shape), salt, gains.get(key, 1.0)) for key, v in state_dict.items()}


def _fill(key: str, shape: tuple[int, ...], salt: str, gain: float) -> torch.Tensor:
    name = key.rpartition('.')[2]
    if name == 'num_batches_tracked':
        return torch.ones(shape, dtype=torch.int64)
    rng = np.random.default_rng(zlib.crc32((salt + key).encode()))
    if len(shape) > 1:
        value = rng.standard_normal(shape) * np.sqrt(1.6 / math.prod(shape[1:]))
    elif name == 'running_mean':
        value = rng.standard_normal(shape) * 0.1
    elif name in ('running_var', 'weight'):
        value = rng.uniform(*((0.6, 1.4) if name == 'running_var' else (0.7, 1.3)), shape)
    else:
        value = rng.standard_normal(shape) * 0.05
    return torch.from_numpy((value * gain).astype(np.float32))


def _upsampling(size: int, grid: int) -> np.ndarray:
    """[size, grid] matrix of cubic convolution (a = -0.5), half-pixel centres, edges repeated."""
    position = (np.arange(size) + 0.5) * grid / size - 0.5
    left = np.floor(position).astype(int)
    matrix = np.zeros((size, grid))
    for offset in range(-1, 3):
        t = np.abs(position - (left + offset))
        inner = 1.5 * t ** 3 - 2.5 * t ** 2 + 1
        outer = -0.5 * t ** 3 + 2.5 * t ** 2 - 4 * t + 2
        weight = np.where(t <= 1, inner, np.where(t < 2, outer, 0.))
        np.add.at(matrix, (np.arange(size), np.clip(left + offset, 0, grid - 1)), weight)
    return matrix


def _quantise(value: np.ndarray) -> torch.Tensor:
    """Round to 2**-10: the same bits on every platform."""
    return torch.from_numpy((np.round(value * 1024) / 1024).astype(np.float32))


def make_images(shape: tuple[int, int, int, int], seed: int) -> torch.Tensor:
    """Smooth random 'normalised images' [B, C, H, W]: two upsampled fields and noise under an envelope, per sample."""
    batch, channels, height, width = shape
    rng = np.random.default_rng(seed)

    def upsample(field: np.ndarray) -> np.ndarray:
        rows, columns = field.shape[-2:]
        return np.einsum('hg,...gk,wk->...hw', _upsampling(height, rows), field, _upsampling(width, columns))

    out = np.empty(shape)
    for i in range(batch):
        contrast = rng.uniform(0.8, 1.25)
        offset = rng.standard_normal((channels, 1, 1)) * 0.5
        envelope = np.clip(1 + 0.35 * upsample(rng.standard_normal((4, 4))), 0.2, 2)
        image = sum(
            amplitude * upsample(rng.standard_normal((channels, grid, grid)))
            for grid, amplitude in ((5, 1.0), (13, 0.7)))
        noise = rng.standard_normal((channels, height, width)) * 0.25
        out[i] = contrast * envelope * (image + noise) + offset
    return _quantise(out)


def make_normal(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    """Quantised normal numbers."""
    return _quantise(np.random.default_rng(seed).standard_normal(shape) * scale)
