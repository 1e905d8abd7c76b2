"""Class activation maps, and choosing windows of an image by them.

Source: Yang, An, Xu, "Localizing Semantic Patches for Accelerating Image Classification", ICME 2022, and the released
code (https://github.com/winycg/AnchorNet).
"""
import math
from collections.abc import Sequence

import torch


def class_activation_map(features: torch.Tensor, weight: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Evidence for a class at each position: the mean over channels of features times the weights of the classifier.

    Args:
        features: Feature maps [B, C, h, w].
        weight: Weights of the linear classifier [num_classes, C].
        classes: One class per image [B], int64.

    Returns:
        Maps [B, h, w].
    """
    return torch.einsum('bchw,bc->bhw', features, weight[classes].to(features.dtype)) / features.shape[1]


def check_iou_thresholds(iou_thresholds: Sequence[float]) -> tuple[float, ...]:
    """Overlap thresholds as floats.

    Raises:
        ValueError: One is not in 0..1.
    """
    values = tuple(float(threshold) for threshold in iou_thresholds)
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f'Overlap thresholds are shares in 0..1, got {list(values)}.')
    return values


def choose_windows(
        cam: torch.Tensor,
        corners: tuple[torch.Tensor, torch.Tensor],
        size: int,
        num: int,
        iou_thresholds: Sequence[float],
        exact_original: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose windows greedily, in descending order of their values, if they overlap little with those chosen before.

    There is one pass over the order, as in the original: a window that was skipped is not considered again, even if a
    later threshold allows more overlap. All images are processed at once, by `num` masked minima.

    Args:
        cam: Maps [B, h, w]. Equal values are ordered by position, row by row.
        corners: Top row of every window row [h] and left column of every window column [w], int64, in pixels.
        size: Side of the windows in pixels.
        num: Number of windows.
        iou_thresholds: Largest overlap (intersection over union) with each earlier window, for windows 2..num. Further
            ones are ignored.
        exact_original: Compute overlaps as the released code does: with sides of `size - 1`, and without a limit for
            the top-left window. Otherwise follow the rule.

    Returns:
        Indices of the windows in the flattened map [B, num], int64; and how many of them follow the rule [B]. If there
        are too few, the windows with the highest values among the others fill the rest.

    Raises:
        ValueError: There are fewer windows than `num`, or too few thresholds, or a threshold is not in 0..1.
    """
    batch, height, width = cam.shape
    if not 0 < num <= height * width:
        raise ValueError(f'Expected to choose 1 to {height * width} windows of a {height}x{width} map, got {num}.')
    if len(iou_thresholds) < num - 1:
        raise ValueError(f'{num} windows need {num - 1} overlap thresholds, got {len(iou_thresholds)}.')
    check_iou_thresholds(iou_thresholds)
    side = size - 1 if exact_original else size
    rows, columns = (c.to(cam.device, torch.int32) for c in corners)  # half the bytes of int64
    order = cam.flatten(1).argsort(dim=1, descending=True, stable=True)
    total = height * width
    ranks = torch.arange(total, dtype=torch.int32, device=cam.device).expand(batch, -1)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, ranks)

    index = order[:, 0]
    chosen, found = [index], torch.ones_like(index)
    taken = torch.arange(total, device=cam.device) == index[:, None]
    overlap = torch.zeros_like(rank)  # the largest intersection so far; sides are equal, so it tells the union, too
    last = torch.zeros_like(index, dtype=torch.int32)
    for k in range(1, num):
        down = (rows[None, :] - rows[index // width][:, None]).abs()
        across = (columns[None, :] - columns[index % width][:, None]).abs()
        shared = (side - down).clamp(min=0)[:, :, None] * (side - across).clamp(min=0)[:, None, :]
        overlap = torch.maximum(overlap, shared.flatten(1))
        # shared / (2 side² - shared) <= threshold, in whole numbers
        threshold = float(iou_thresholds[k - 1])
        allowed = overlap <= math.floor(2 * side * side * threshold / (1 + threshold) + 1e-9)
        if exact_original:
            allowed[:, 0] = True
        allowed &= rank > last[:, None]
        best, by_rule = rank.masked_fill(~allowed, total).min(dim=1)
        follows = best < total
        rest = rank.masked_fill(taken, total).argmin(dim=1)
        index = torch.where(follows, by_rule, rest)
        found += follows
        last = torch.where(follows, best, total)
        taken = taken | (torch.arange(total, device=cam.device) == index[:, None])
        chosen.append(index)
    return torch.stack(chosen, dim=1), found
