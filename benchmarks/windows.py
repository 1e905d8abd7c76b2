"""Window choice of AnchorNet-patch: all images at once against a loop over images and windows."""
import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from timm_dynamic.benchmark import get_device, time_interleaved
from timm_dynamic.layers import choose_windows

NAME, HELP = 'windows', 'choice of windows on activation maps: vectorised against a loop over the images'

# AnchorNet's maps and windows on images of 224 pixels.
_CELLS, _STRIDE, _SIZE = 17, 8, 95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--batch-size', '-b', type=int, default=256, metavar='N', help='number of maps (%(default)s)')
    parser.add_argument('--num-windows', type=int, default=5, metavar='N', help='(%(default)s)')
    parser.add_argument('--iou-threshold', type=float, default=0.3, metavar='X', help='(%(default)s)')
    parser.add_argument('--device', default='cpu', metavar='DEVICE', help='(%(default)s)')
    parser.add_argument('--repeats', type=int, default=5, metavar='N', help='runs of each, by turns (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    return benchmark_windows(args.batch_size, args.num_windows, args.iou_threshold, args.device, args.repeats)


def benchmark_windows(
        batch_size: int = 256,
        num_windows: int = 5,
        iou_threshold: float = 0.3,
        device: str = 'cpu',
        repeats: int = 5,
) -> list[dict[str, Any]]:
    """Time the choice on maps of 17x17 smooth random values, after checking that all choose the same.

    The loops go through the positions of each image by falling value, and compare each with the windows chosen so far,
    one overlap at a time. One holds boxes as tensors, as a straightforward script would, one as Python's numbers.

    Returns:
        A row for each: median 'ms', 'images_per_s', and 'speedup' over the loop.

    Raises:
        ValueError: A number is not positive, or there is no such device.
        AssertionError: The choices differ.
    """
    if min(batch_size, num_windows, repeats) < 1:
        raise ValueError(
            f'Expected positive numbers, got batch size {batch_size}, {num_windows} windows, {repeats} repeats.')
    get_device(device)
    noise = torch.randn(batch_size, 1, _CELLS + 4, _CELLS + 4, generator=torch.Generator().manual_seed(0))
    cam = torch.nn.functional.avg_pool2d(noise, 5, stride=1)[:, 0].to(device)
    grid = torch.arange(_CELLS, device=device) * _STRIDE
    thresholds = [iou_threshold] * (num_windows - 1)

    def vectorised() -> tuple[torch.Tensor, torch.Tensor]:
        return choose_windows(cam, (grid, grid), _SIZE, num_windows, thresholds)

    index, found = vectorised()
    choices: dict[str, Callable[[], Any]] = {
        name: partial(_loop, cam, num_windows, thresholds, box, overlap)
        for name, box, overlap in (('loop', partial(_box, grid), _overlap),
                                   ('loop, plain numbers', partial(_plain_box, grid.tolist()), _plain_overlap))}
    for name, loop in choices.items():
        if any(row[:n] != other for row, n, other in zip(index.tolist(), found.tolist(), loop())):
            raise AssertionError(f'The vectorised choice differs from that of the {name}.')
    seconds = time_interleaved({**choices, 'vectorised': vectorised}, repeats, device)
    return [{
        'windows': name, 'batch_size': batch_size, 'num_windows': num_windows, 'device': device, 'ms': 1e3 * s,
        'images_per_s': batch_size / s, 'speedup': seconds['loop'] / s,
    } for name, s in seconds.items()]


def _loop(
        cam: torch.Tensor,
        num: int,
        thresholds: list[float],
        box_at: Callable[[int, int], Any],
        overlap: Callable[[Any, Any], float],
) -> list[list[int]]:
    """The rule one window at a time. As in the released code, the top-left position is always allowed."""
    width, out = cam.shape[2], []
    for image in cam:
        chosen: list[int] = []
        boxes: list[Any] = []
        for position in image.flatten().argsort(descending=True, stable=True).tolist():
            box = box_at(position // width, position % width)
            if position == 0 or all(overlap(box, other) <= thresholds[len(chosen) - 1] for other in boxes):
                chosen.append(position)
                boxes.append(box)
            if len(chosen) == num:
                break
        out.append(chosen)
    return out


def _box(grid: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Top, left, bottom, right."""
    corner = torch.stack([grid[row], grid[column]])
    return torch.cat([corner, corner + _SIZE - 1]).double()


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    height, width = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    shared = height * width
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(shared / (areas[0] + areas[1] - shared))


def _plain_box(grid: list[int], row: int, column: int) -> tuple[int, int]:
    return grid[row], grid[column]


def _plain_overlap(a: tuple[int, int], b: tuple[int, int]) -> float:
    side = _SIZE - 1
    shared = max(side - abs(a[0] - b[0]), 0) * max(side - abs(a[1] - b[1]), 0)
    return shared / (2 * side * side - shared)
