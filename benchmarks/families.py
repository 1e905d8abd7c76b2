"""Solved exits and the geometric rule against the best thresholds of all, for families of confidence."""
import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from timm_dynamic.exits import ExitPoint, ExitTable, geometric_thresholds, load_exit_table, solve_curve

from .exits import gains
from .thresholds import make_table

NAME, HELP = 'families', 'loss of solved exits against brute force, also on overconfident models and ties'


def _sharpen(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda confidence: (factor * confidence.clamp(1e-12, 1 - 1e-12).logit()).sigmoid()


# Maps of confidences [N, T], float64, which do not change their order, but make some of them equal.
FAMILIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'logits x1': lambda confidence: confidence,
    'logits x5': _sharpen(5),  # of a classifier of two classes
    'logits x10': _sharpen(10),
    'logits x20': _sharpen(20),
    'exponential, towards 0': lambda confidence: (20 * confidence).expm1() / math.expm1(20),
    'exponential, towards 1': lambda confidence: -(-20 * confidence).expm1(),
    'spread of 1e-6': lambda confidence: 1e-6 * confidence,
    'spread of 1e-6 at 0.5': lambda confidence: 0.5 + 1e-6 * confidence,
    'another scale each step': lambda confidence: confidence ** torch.logspace(-2, 2, confidence.shape[1]),
    'ties': lambda confidence: (8 * confidence).round() / 8,
    'constant': lambda confidence: torch.full_like(confidence, 0.7),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('table', nargs='?', metavar='TABLE', help='an exit table (default: random confidences)')
    parser.add_argument('--num-images', type=int, default=20000, metavar='N', help='of the random table (%(default)s)')
    parser.add_argument('--num-steps', type=int, default=4, metavar='T', help='of the random table (%(default)s)')
    parser.add_argument('--num-budgets', type=int, default=12, metavar='N', help='(%(default)s)')
    parser.add_argument('--families', nargs='+', default=[*FAMILIES], choices=[*FAMILIES], metavar='NAME', help=(
        f"of {', '.join(FAMILIES)} (default: all)"))


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    table = load_exit_table(args.table) if args.table else make_table(args.num_images, args.num_steps)
    return benchmark_families(*table.split(), args.families, args.num_budgets)


def benchmark_families(
        calibration: ExitTable,
        evaluation: ExitTable,
        families: Iterable[str] = FAMILIES,
        num_budgets: int = 12,
        num_cuts: int = 20,
) -> list[dict[str, Any]]:
    """Compare solved exits and the geometric rule with the best thresholds on a grid, see `best_thresholds`.

    Args:
        calibration: Table to solve on.
        evaluation: Table of other images.
        families: Names in `FAMILIES`.
        num_budgets: Budgets, evenly spaced up to the cost of the most accurate thresholds.
        num_cuts: Thresholds of the grid at each step.

    Returns:
        A row for each family. For 'thresholds', 'policy' and 'geometric', in points of top-1: the mean '_loss' and the
        worst, '_worst', of the budgets on the calibration table; and '_others', the mean loss on the evaluation table,
        at the costs that the best thresholds have there.

    Raises:
        ValueError: There are no budgets or cuts.
    """
    if num_budgets < 1 or num_cuts < 1:
        raise ValueError(f'Expected at least one budget and one cut, got {num_budgets} and {num_cuts}.')
    rows = []
    for name in families:
        table, other = (in_family(t, name) for t in (calibration, evaluation))
        best, budgets = best_thresholds(table, num_budgets, num_cuts)
        rule = [table.anytime()[0], *(table.evaluate(geometric_thresholds(table, p)) for p in range(1, 40))]
        curves = {
            'thresholds': solve_curve(table, budgets, method='thresholds'),
            'policy': solve_curve(table, budgets, method='value'),
            'geometric': [max((point for point in rule if point.gmacs <= budget * (1 + 1e-9)), key=lambda p: p.top1)
                          for budget in budgets],
        }
        best_on_other = [other.evaluate(point.policy) for point in best]
        row: dict[str, Any] = {'family': name}
        for method, points in curves.items():
            losses = [a.top1 - b.top1 for a, b in zip(best, points)]
            on_other = [other.evaluate(point.policy) for point in (table.anytime()[0], *points)]
            row |= {
                f'{method}_loss': sum(losses) / len(losses),
                f'{method}_worst': max(losses),
                f'{method}_others': -gains(on_other, best_on_other).mean().item(),
            }
        rows.append(row)
    return rows


def in_family(table: ExitTable, name: str) -> ExitTable:
    """The table with its confidences mapped (in float64, and rounded to float32 as models give them)."""
    return ExitTable(FAMILIES[name](table.confidence.double()), table.correct, table.step_macs, table.correct_top5)


def best_thresholds(
        table: ExitTable,
        num_budgets: int = 12,
        num_cuts: int = 20,
) -> tuple[list[ExitPoint], list[float]]:
    """The most accurate thresholds on a grid, by trying all of them.

    Args:
        table: The table.
        num_budgets: Budgets, evenly spaced up to the cost of the most accurate thresholds.
        num_cuts: Thresholds at each step: confidences at evenly spaced ranks to the power of 1.5 (more of the low ones,
            which decide at late steps), besides none and all. There are (num_cuts + 2) ^ (T - 1) combinations.

    Returns:
        The best point for each budget, and the budgets in GMACs.
    """
    num, steps = table.confidence.shape
    ranks = (num * (torch.arange(1, num_cuts + 1) / (num_cuts + 1)) ** 1.5).long()
    cuts, bins = [], []
    for column in table.confidence.T[:-1]:
        values = column.sort().values[ranks].unique()
        cuts.append(torch.cat([torch.tensor([-math.inf]), values, torch.tensor([math.inf])]))
        bins.append(torch.bucketize(column.contiguous(), values, right=True))  # stops at the cuts 0 to this
    sizes = [len(c) for c in cuts]
    macs = torch.tensor(table.step_macs, dtype=torch.float64) / 1e9
    cost, top1 = torch.zeros(sizes, dtype=torch.float64), torch.zeros(sizes, dtype=torch.float64)
    for t in range(steps):
        known = range(min(t + 1, steps - 1))
        index = torch.zeros(num, dtype=torch.int64)
        for s in known:
            index = index * (sizes[s] - 1) + bins[s]
        for weight, total, each in (
                (torch.ones(num), cost, macs[t] / num), (table.correct[:, t], top1, 100 / num)):
            count = torch.bincount(index, weight.double(), math.prod(sizes[s] - 1 for s in known))
            count = count.view([sizes[s] - 1 for s in known])
            for s in known:  # number of samples below each cut; of this step, number of samples above it
                below = torch.cat([torch.zeros_like(count.narrow(s, 0, 1)), count.cumsum(dim=s)], dim=s)
                count = below if s < t else below.narrow(s, sizes[s] - 1, 1) - below
            total += each * count.view(*count.shape, *[1] * (steps - 1 - len(known)))
    cost, order = cost.flatten().sort()
    top1 = top1.flatten()[order]
    high = cost[(top1 > top1.max() - 0.05).nonzero()[0]].item()
    budgets = [macs[0].item() + (high - macs[0].item()) * (i + 1) / num_budgets for i in range(num_budgets)]
    points = []
    for budget in budgets:
        best = order[int(top1[:int((cost <= budget * (1 + 1e-9)).sum())].argmax())]
        at = torch.unravel_index(best, sizes)
        points.append(table.evaluate([*(c[i].item() for c, i in zip(cuts, at)), 0.0]))
    return points, budgets
