"""Solved exits against given ones at equal cost, on other images than they were solved on."""
import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from timm_dynamic.exits import ExitPoint, ExitTable, geometric_thresholds, load_exit_table, solve_curve

NAME, HELP = 'exits', 'solve exits on one half of an exit table, and compare them with given ones on the other half'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('table', metavar='TABLE', help='of validate.py --save-exit-table, or one of AnchorNet (.pth)')
    parser.add_argument('--given', metavar='FILE', help=(
        "JSON: a list of thresholds, or of objects with 'thresholds' (as validate.py writes to its --results-file) "
        "(default: the 39 points of GFNet's paper, fitted on the whole table)"))
    parser.add_argument('--budget-rule', default='value', choices=['thresholds', 'value'], help='(%(default)s)')
    parser.add_argument(
        '--splits', type=int, default=5, metavar='N', help='random halves, each in both directions (%(default)s)')
    parser.add_argument('--no-oracle', action='store_true', help='do not also solve on the half that is evaluated on')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    table = load_exit_table(args.table)
    given: list[Any]
    if args.given:
        given = read_thresholds(args.given)
    else:
        given = [geometric_thresholds(table, p) for p in range(1, 40)]
    return benchmark_exits(table, given, args.budget_rule, args.splits, not args.no_oracle)


def benchmark_exits(
        table: ExitTable,
        given: Sequence[Any],
        method: str = 'value',
        splits: int = 5,
        oracle: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate `solve_curve` on random halves of a table, see `compare_with_given`.

    Args:
        table: The table.
        given: Thresholds or policies to compare with.
        method: 'value' or 'thresholds'.
        splits: Number of random splits.
        oracle: Also solve on the half that is evaluated on.

    Returns:
        A row for each given policy: its 'gmacs' and 'top1' on the table, the mean 'gain' over it in points of top-1 at
        its cost, the 'least_gain' of all halves, and the 'oracle_gain'. Then a row for all of them, with the oracle's
        'share' that was reached and 'solve_seconds', the CPU time to solve a whole curve.

    Raises:
        ValueError: There are no given policies or splits, or thresholds do not fit the table.
    """
    if not len(given) or splits < 1:
        raise ValueError(f'Expected at least one list of thresholds and one split, got {len(given)} and {splits}.')
    points = [table.evaluate(policy) for policy in given]
    result = compare_with_given(table, given, range(splits), lambda t: solve_curve(t, method=method), oracle)

    def row(name: str, part: slice, **more: Any) -> dict[str, Any]:
        found = {'gain': result['gains'][:, part].mean().item(), 'least_gain': result['gains'][:, part].min().item()}
        if oracle:
            found['oracle_gain'] = result['oracle_gains'][:, part].mean().item()
        return {'given': name, **more, **found}

    rows = [row(str(i + 1), slice(i, i + 1), gmacs=p.gmacs, top1=p.top1) for i, p in enumerate(points)]
    share = {'share': result['share']} if oracle else {}
    return [*rows, {**row('all', slice(None)), **share, 'solve_seconds': result['seconds']}]


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
    all_gains, oracle_gains, seconds = [], [], 0.0
    for seed in seeds:
        halves = table.split(0.5, seed)
        for calibration, evaluation in (halves, halves[::-1]):
            start = time.process_time()
            points = solve(calibration)
            seconds += time.process_time() - start
            others = [evaluation.evaluate(policy) for policy in given]
            all_gains.append(gains([evaluation.evaluate(point.policy) for point in points], others))
            if oracle:
                oracle_gains.append(gains(solve(evaluation), others))
    found = torch.stack(all_gains)
    result = {
        'gains': found,
        'mean': found.mean().item(),
        'worst': found.min().item(),
        'seconds': seconds / len(all_gains),
    }
    if oracle:
        result['oracle_gains'] = best = torch.stack(oracle_gains)
        result['oracle_mean'] = best.mean().item()
        result['share'] = result['mean'] / result['oracle_mean'] if result['oracle_mean'] else math.nan
    return result


def gains(points: Sequence[ExitPoint], given: Sequence[ExitPoint]) -> torch.Tensor:
    """Top-1 of a curve at the costs of given points, less theirs [given]; constant beyond the curve's ends."""
    points = sorted(points, key=lambda point: point.gmacs)
    x = torch.tensor([point.gmacs for point in points], dtype=torch.float64)
    y = torch.tensor([point.top1 for point in points], dtype=torch.float64)
    at = torch.tensor([point.gmacs for point in given], dtype=torch.float64)
    right = torch.searchsorted(x, at).clamp(1, max(len(x) - 1, 1)).clamp(max=len(x) - 1)
    left = (right - 1).clamp(min=0)
    share = ((at - x[left]) / (x[right] - x[left]).clamp(min=1e-12)).clamp(0, 1)
    return y[left] + share * (y[right] - y[left]) - torch.tensor([point.top1 for point in given], dtype=torch.float64)


def read_thresholds(path: str | Path) -> list[list[float]]:
    """Read lists of thresholds, or objects that have them.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
        given = [value['thresholds'] if isinstance(value, dict) else value for value in values]
        return [[float(threshold) for threshold in thresholds] for thresholds in given]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path}: expected a JSON list of thresholds, or of objects with 'thresholds' ({e!r}).") from e
