"""Solved exits against given ones at equal cost, on other images than they were solved on."""
import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..exits import ExitPoint, ExitTable, geometric_thresholds, load_exit_table, solve_curve

NAME, HELP = 'exits', 'judge exits that are solved on one half of an exit table on the other half, against given ones'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('table', metavar='TABLE', help='of validate.py --save-exit-table, or one of AnchorNet (.pth)')
    parser.add_argument('--rivals', metavar='FILE', help=(
        "JSON: a list of thresholds, or of objects with 'thresholds' (as validate.py writes to its --results-file) "
        "(default: the 39 points of GFNet's paper, fitted on the whole table)"))
    parser.add_argument('--budget-rule', default='value', choices=['thresholds', 'value'], help='(%(default)s)')
    parser.add_argument(
        '--splits', type=int, default=5, metavar='N', help='random halves, each in both directions (%(default)s)')
    parser.add_argument('--no-oracle', action='store_true', help='do not solve on the half that is judged, too')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    table = load_exit_table(args.table)
    rivals: list[Any]
    if args.rivals:
        rivals = read_rivals(args.rivals)
    else:
        rivals = [geometric_thresholds(table, p) for p in range(1, 40)]
    return benchmark_exits(table, rivals, args.budget_rule, args.splits, not args.no_oracle)


def benchmark_exits(
        table: ExitTable,
        rivals: Sequence[Any],
        method: str = 'value',
        splits: int = 5,
        oracle: bool = True,
) -> list[dict[str, Any]]:
    """Judge `solve_curve` on random halves of a table: see `judge_solver`.

    Args:
        table: The table.
        rivals: Thresholds that were chosen otherwise.
        method: 'value' or 'thresholds'.
        splits: Number of random splits, each judged in both directions.
        oracle: Also solve on the half that is judged.

    Returns:
        A row for each rival, with its 'gmacs' and 'top1' on the table, the mean 'gain' in points of top-1 at its cost,
        the 'least_gain' of all halves, and the 'oracle_gain'; then a row for all of them, with the oracle's
        'share' that was reached and 'solve_seconds' of CPU time, of one solve of the whole curve.

    Raises:
        ValueError: There are no rivals or splits, or thresholds do not fit the table.
    """
    if not len(rivals) or splits < 1:
        raise ValueError(f'Expected at least one rival and one split, got {len(rivals)} and {splits}.')
    points = [table.evaluate(rival) for rival in rivals]
    result = judge_solver(table, rivals, range(splits), lambda t: solve_curve(t, method=method), oracle)

    def row(name: str, gains: torch.Tensor, oracle_gains: torch.Tensor | None, **more: Any) -> dict[str, Any]:
        found = {} if oracle_gains is None else {'oracle_gain': oracle_gains.mean().item()}
        return {'rival': name, **more, 'gain': gains.mean().item(), 'least_gain': gains.min().item(), **found}

    gains, oracle_gains = result['gains'], result.get('oracle_gains')
    rows = [
        row(str(i + 1), gains[:, i], None if oracle_gains is None else oracle_gains[:, i],
            gmacs=point.gmacs, top1=point.top1)
        for i, point in enumerate(points)]
    share = {'share': result['share']} if oracle else {}
    return [*rows, {**row('all', gains, oracle_gains), **share, 'solve_seconds': result['seconds']}]


def judge_solver(
        table: ExitTable,
        rivals: Sequence[Any],
        seeds: Iterable[int] = range(5),
        solve: Callable[[ExitTable], list[ExitPoint]] = solve_curve,
        oracle: bool = True,
) -> dict[str, Any]:
    """Compare solved policies with given ones at equal cost, on other samples than they were solved on.

    The table is split into random halves, in both directions. The policies solved on the one half make a curve on the
    other; it is read off, linearly, at what each rival costs there.

    Args:
        table: The table.
        rivals: Thresholds or policies that were chosen otherwise.
        seeds: One split each.
        solve: Gives policies for a grid of budgets.
        oracle: Also solve on the half that is judged on, as a bound of what can be gained.

    Returns:
        'gains' [2 · seeds, rivals] in points of top-1 accuracy, their 'mean' and 'worst', and 'seconds' of CPU time per
        solve; with the oracle, its gains 'oracle_gains' likewise, their mean 'oracle_mean', and the 'share' of that
        which was reached.
    """
    gains, oracle_gains, seconds = [], [], 0.0
    for seed in seeds:
        halves = table.split(0.5, seed)
        for fit, judge in (halves, halves[::-1]):
            start = time.process_time()
            points = solve(fit)
            seconds += time.process_time() - start
            given = [judge.evaluate(rival) for rival in rivals]
            gains.append(_gains([judge.evaluate(point.policy) for point in points], given))
            if oracle:
                oracle_gains.append(_gains(solve(judge), given))
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


def _gains(points: list[ExitPoint], rivals: list[ExitPoint]) -> torch.Tensor:
    """Top-1 of a curve, read off at the rivals' costs, less theirs [rivals]; level beyond the curve's ends."""
    points = sorted(points, key=lambda point: point.gmacs)
    x = torch.tensor([point.gmacs for point in points], dtype=torch.float64)
    y = torch.tensor([point.top1 for point in points], dtype=torch.float64)
    at = torch.tensor([rival.gmacs for rival in rivals], dtype=torch.float64)
    right = torch.searchsorted(x, at).clamp(1, max(len(x) - 1, 1)).clamp(max=len(x) - 1)
    left = (right - 1).clamp(min=0)
    share = ((at - x[left]) / (x[right] - x[left]).clamp(min=1e-12)).clamp(0, 1)
    return y[left] + share * (y[right] - y[left]) - torch.tensor([rival.top1 for rival in rivals], dtype=torch.float64)


def read_rivals(path: str | Path) -> list[list[float]]:
    """Read lists of thresholds, or objects that have them.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
        rivals = [value['thresholds'] if isinstance(value, dict) else value for value in values]
        return [[float(threshold) for threshold in rival] for rival in rivals]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path}: expected a JSON list of thresholds, or of objects with 'thresholds' ({e!r}).") from e
