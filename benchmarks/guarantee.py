"""How often guaranteed policies break their promise, and what they cost, on random draws from an exit table."""
import argparse
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import trange

from timm_dynamic.exits import ExitTable, load_exit_table, solve_curve, solve_guaranteed

NAME, HELP = 'guarantee', 'broken promises and cost of guaranteed policies, on random draws'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('table', metavar='TABLE', help='an exit table')
    parser.add_argument('--num-images', type=int, nargs='+', default=[2000, 10000, 25000], metavar='N', help=(
        'images to fit and test policies on (%(default)s)'))
    parser.add_argument(
        '--max-drop', type=float, nargs='+', default=[0.2, 0.5, 1.0, 2.0], metavar='D', help='(%(default)s)')
    parser.add_argument('--fit-share', type=float, default=0.3, metavar='P', help=(
        'share of the images that the curve is fitted on; the others are for the test (%(default)s)'))
    parser.add_argument('--num-draws', type=int, default=1000, metavar='N', help='(%(default)s)')
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='(%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    table = load_exit_table(args.table)
    logging.getLogger('timm_dynamic').setLevel(logging.ERROR)  # draws with too few images say so
    return [row for num in args.num_images
            for row in benchmark_guarantee(table, num, args.max_drop, args.fit_share, args.num_draws, args.seed)]


def benchmark_guarantee(
        table: ExitTable,
        num_images: int,
        max_drops: Sequence[float],
        fit_share: float = 0.3,
        num_draws: int = 1000,
        seed: int = 0,
        confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """Draw images, solve on them, and look whether the promise holds on the rest of the table.

    Args:
        table: The table to draw from.
        num_images: Images to fit and test policies on.
        max_drops: Limits in points of top-1 against all steps.
        fit_share: Share of them that the curve is fitted on.
        num_draws: Number of draws.
        seed: Of the draws.
        confidence: Of the promises.

    Returns:
        A row for each limit: the share of 'violations' in %, mean 'gmacs' on the rest, 'oracle_gmacs' of the cheapest
        policy of the same curve that keeps the limit on the rest, and the mean 'drop' on the rest in points.
    """
    sums: dict[float, dict[str, float]] = {drop: defaultdict(float) for drop in max_drops}
    generator = torch.Generator().manual_seed(seed)
    for _ in trange(num_draws, desc=f'{num_images} images', leave=False):
        order = torch.randperm(len(table), generator=generator)
        num_fit = round(fit_share * num_images)
        fit, test, rest = (table.subset(order[a:b]) for a, b in (
            (0, num_fit), (num_fit, num_images), (num_images, len(table))))
        curve = solve_curve(fit, num=96)
        all_steps = rest.anytime()[-1]
        known = [all_steps, *(rest.evaluate(point.policy) for point in curve)]
        for drop, total in sums.items():
            point = rest.evaluate(solve_guaranteed(curve, test, max_drop=drop, confidence=confidence))
            total['violations'] += 100 * (all_steps.top1 - point.top1 > drop + 1e-9)
            total['gmacs'] += point.gmacs
            total['oracle_gmacs'] += min(p.gmacs for p in known if all_steps.top1 - p.top1 <= drop + 1e-9)
            total['drop'] += all_steps.top1 - point.top1
    return [{
        'images': num_images, 'max_drop': drop, 'draws': num_draws,
        **{name: round(value / num_draws, 4) for name, value in total.items()},
    } for drop, total in sums.items()]
