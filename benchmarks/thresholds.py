"""How long it takes to solve exits, and to evaluate them."""
import argparse
from collections.abc import Callable
from typing import Any

import torch

from timm_dynamic.benchmark import time_interleaved
from timm_dynamic.exits import (
    ExitTable,
    geometric_thresholds,
    load_exit_table,
    solve_curve,
    solve_policy,
    solve_thresholds,
)

NAME, HELP = 'thresholds', 'time to solve thresholds and curves, and to evaluate them'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('table', nargs='?', metavar='TABLE', help='an exit table (default: random confidences)')
    parser.add_argument('--num-images', type=int, default=50000, metavar='N', help='of the random table (%(default)s)')
    parser.add_argument('--num-steps', type=int, default=5, metavar='T', help='of the random table (%(default)s)')
    parser.add_argument('--repeats', type=int, default=3, metavar='N', help='runs of each, by turns (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    table = load_exit_table(args.table) if args.table else make_table(args.num_images, args.num_steps)
    return benchmark_thresholds(table, args.repeats)


def make_table(num_images: int = 50000, num_steps: int = 5) -> ExitTable:
    """Make a random table: the confidence is the probability of being correct, and rises from step to step."""
    if num_images < 1 or num_steps < 2:
        raise ValueError(f'Expected at least one image and two steps, got {num_images} and {num_steps}.')
    generator = torch.Generator().manual_seed(0)
    hard, luck = torch.rand(2, num_images, 1, generator=generator)
    noise = torch.randn(num_images, num_steps, generator=generator)
    confidence = (3 - 4 * hard + 0.5 * torch.arange(num_steps) + 0.3 * noise).sigmoid()
    return ExitTable(confidence, luck < confidence, [(t + 1) * 10**9 for t in range(num_steps)])


def benchmark_thresholds(table: ExitTable, repeats: int = 3) -> list[dict[str, Any]]:
    """Time the solvers and `ExitTable.evaluate`.

    The first solve of a table fits what all budgets share, and keeps it. It has a row of its own; the others are timed
    after it.

    Returns:
        A row for each: median 'ms'.

    Raises:
        ValueError: `repeats` is not positive.
    """
    if repeats < 1:
        raise ValueError(f'Expected a positive number of repeats, got {repeats}.')
    budget = (table.step_macs[0] + table.step_macs[-1]) / 2e9
    thresholds = solve_thresholds(table, budget)
    policy = solve_policy(table, budget)
    everyone = torch.arange(len(table))
    ways: dict[str, Callable[[], Any]] = {
        'first solve of a table': lambda: solve_thresholds(table.subset(everyone), budget),
        'solve_thresholds, one budget': lambda: solve_thresholds(table, budget),
        'solve_policy, one budget': lambda: solve_policy(table, budget),
        'solve_curve, thresholds': lambda: solve_curve(table, method='thresholds'),
        'solve_curve, policies': lambda: solve_curve(table),
        "geometric_thresholds, the paper's 39": lambda: [geometric_thresholds(table, p) for p in range(1, 40)],
        'evaluate, thresholds': lambda: table.evaluate(thresholds),
        'evaluate, policy': lambda: table.evaluate(policy),
    }
    seconds = time_interleaved(ways, repeats)
    return [{'thresholds': name, 'images': len(table), 'steps': table.num_steps, 'ms': 1e3 * s}
            for name, s in seconds.items()]
