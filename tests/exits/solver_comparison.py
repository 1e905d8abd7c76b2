"""Solved exits against given ones, on other images than they were solved on."""
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from timm_dynamic.exits import ExitPoint, ExitTable, solve_curve


def compare_with_given(
        table: ExitTable,
        given: Sequence[Any],
        seeds: Iterable[int] = range(5),
        solve: Callable[[ExitTable], list[ExitPoint]] = solve_curve,
        oracle: bool = True,
) -> dict[str, Any]:
    """Compare solved policies with given ones at equal cost, on other images than they were solved on.

    The table is split into random halves, in both directions. The policies solved on one half give a curve of accuracy
    over cost on the other. The curve is read at the cost of each given policy, linearly between its points.

    Args:
        table: The table.
        given: Thresholds or policies to compare with.
        seeds: One split each.
        solve: Gives policies for a grid of budgets.
        oracle: Also solve on the half that is evaluated on: the most that can be gained.

    Returns:
        'gains' [2 · seeds, given] in points of top-1 accuracy, their 'mean' and 'worst', and 'seconds' of CPU time per
        solve. With the oracle also its gains 'oracle_gains' [2 · seeds, given], their mean 'oracle_mean', and the
        'share' of that mean which was reached.
    """
    gains, oracle_gains, seconds = [], [], 0.0
    for seed in seeds:
        halves = table.split(0.5, seed)
        for calibration, evaluation in (halves, halves[::-1]):
            start = time.process_time()
            points = solve(calibration)
            seconds += time.process_time() - start
            others = [evaluation.evaluate(policy) for policy in given]
            gains.append(_gains([evaluation.evaluate(point.policy) for point in points], others))
            if oracle:
                oracle_gains.append(_gains(solve(evaluation), others))
    all_gains = torch.stack(gains)
    result = {
        'gains': all_gains,
        'mean': all_gains.mean().item(),
        'worst': all_gains.min().item(),
        'seconds': seconds / len(gains),
    }
    if oracle:
        result['oracle_gains'] = best = torch.stack(oracle_gains)
        result['oracle_mean'] = best.mean().item()
        result['share'] = result['mean'] / result['oracle_mean'] if result['oracle_mean'] else math.nan
    return result


def _gains(points: list[ExitPoint], given: list[ExitPoint]) -> torch.Tensor:
    """Top-1 of a curve at the costs of given points, less theirs [given]; constant beyond the curve's ends."""
    points = sorted(points, key=lambda point: point.gmacs)
    x = torch.tensor([point.gmacs for point in points], dtype=torch.float64)
    y = torch.tensor([point.top1 for point in points], dtype=torch.float64)
    at = torch.tensor([point.gmacs for point in given], dtype=torch.float64)
    right = torch.searchsorted(x, at).clamp(1, max(len(x) - 1, 1)).clamp(max=len(x) - 1)
    left = (right - 1).clamp(min=0)
    share = ((at - x[left]) / (x[right] - x[left]).clamp(min=1e-12)).clamp(0, 1)
    return y[left] + share * (y[right] - y[left]) - torch.tensor([point.top1 for point in given], dtype=torch.float64)
