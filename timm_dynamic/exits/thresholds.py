"""From an exit table to a policy for a budget: see value_solver.py for how."""
from collections.abc import Iterable

import torch

from .policy import ValuePolicy
from .table import ExitPoint, ExitTable
from .value_solver import policy_family


def solve_thresholds(table: ExitTable, gmacs: float) -> torch.Tensor:
    """Find the most accurate thresholds for a budget.

    They are regularised, so that they are accurate on other samples than the table's, too; a table needs a few hundred
    samples. They follow the order of the confidences, not their scale, so models may be overconfident.

    Args:
        table: The table to calibrate on.
        gmacs: Budget for the mean cost of a sample, in 10⁹ multiply-adds.

    Returns:
        [T] float32. On the table they cost at most the budget, and less if spending more does not make it more
        accurate. They are at least as accurate there as `geometric_thresholds` within the budget.

    Raises:
        ValueError: The budget is below the cost of the first step or above that of all steps; or confidences that are
            NaN, which reach no threshold, make it impossible to meet.
    """
    return policy_family(table).solve(table, 'thresholds', _check_budget(table, gmacs)).policy


def solve_policy(table: ExitTable, gmacs: float) -> ValuePolicy:
    """Find the most accurate policy for a budget. It uses the confidences of all steps so far.

    Otherwise it has the properties of `solve_thresholds`. On the official table of AnchorNet it is more accurate, see
    docs/benchmarks.md.

    Args:
        table: The table to calibrate on.
        gmacs: Budget for the mean cost of a sample, in 10⁹ multiply-adds.

    Returns:
        A policy. On the table it costs at most the budget, and less if spending more does not make it more accurate.

    Raises:
        ValueError: The budget is below the cost of the first step or above that of all steps.
    """
    return policy_family(table).solve(table, 'value', _check_budget(table, gmacs)).policy


def solve_curve(
        table: ExitTable,
        gmacs: Iterable[float] | None = None,
        num: int = 48,
        method: str = 'value',
) -> list[ExitPoint]:
    """Solve many budgets.

    Args:
        table: The table to calibrate on.
        gmacs: The budgets. By default `num` evenly spaced ones, from the cost of the first step up to that of the
            most accurate policy at any cost.
        num: Number of budgets without `gmacs`.
        method: 'value' as `solve_policy`, 'thresholds' as `solve_thresholds`.

    Returns:
        For each budget, the policy and its accuracy and cost on the table.

    Raises:
        ValueError: A budget cannot be met, see `solve_thresholds`; or there is no such method.
    """
    if method not in ('value', 'thresholds'):
        raise ValueError(f"method must be 'value' or 'thresholds', got {method!r}.")
    family = policy_family(table)
    if gmacs is None:
        low, high = family.macs_of[method][0], family.macs_of[method][-1]
        macs = [low + (high - low) * i / max(num - 1, 1) for i in range(num)]
    else:
        macs = [_check_budget(table, g) for g in gmacs]
    return [family.solve(table, method, m) for m in macs]


def _check_budget(table: ExitTable, gmacs: float) -> float:
    """The budget in multiply-adds, within the range of the table."""
    low, high = table.step_macs[0], table.step_macs[-1]
    macs = float(gmacs) * 1e9
    if not low * (1 - 1e-9) <= macs <= high * (1 + 1e-9):
        raise ValueError(
            f'A budget of {float(gmacs):g} GMACs is out of range: the first step costs {low / 1e9:.6g}, all steps '
            f'{high / 1e9:.6g}.')
    return min(max(macs, low), high)
