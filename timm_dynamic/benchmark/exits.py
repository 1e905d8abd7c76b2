"""Solved exits against given ones at equal cost, on other images than they were solved on."""
import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..exits import ExitTable, geometric_thresholds, judge_solver, load_exit_table, solve_curve

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
