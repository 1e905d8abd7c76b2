"""From an exit table to a policy for a budget: see value_solver.py for how."""
from collections.abc import Iterable

import torch

from .policy import ValuePolicy
from .table import ExitPoint, ExitTable
from .value_solver import policy_family


def solve_thresholds(table: ExitTable, gmacs: float) -> torch.Tensor:
    """Find the thresholds that make the most of a budget.

    They are fitted to do well on other samples than the table's, from a few hundred on. `solve_policy` does better
    still: on the official AnchorNet table see tests/exits/test_thresholds.py.

    Args:
        table: The table to calibrate on.
        gmacs: What a sample may cost on average, in 10⁹ multiply-adds.

    Returns:
        [T] float32. On the table they cost at most the budget; less, where more steps would not make it more accurate.

    Raises:
        ValueError: The budget is below the cost of the first step or above that of all.
    """
    return policy_family(table).thresholds_for(_check_budget(table, gmacs))


def solve_policy(table: ExitTable, gmacs: float) -> ValuePolicy:
    """Find the policy that makes the most of a budget: it looks at the confidences of all steps so far.

    Args:
        table: The table to calibrate on.
        gmacs: What a sample may cost on average, in 10⁹ multiply-adds.

    Returns:
        A policy. On the table it costs at most the budget; less, where more steps would not make it more accurate.

    Raises:
        ValueError: The budget is below the cost of the first step or above that of all.
    """
    return policy_family(table).policy_for(_check_budget(table, gmacs))


def solve_curve(
        table: ExitTable,
        gmacs: Iterable[float] | None = None,
        num: int = 48,
        method: str = 'value',
) -> list[ExitPoint]:
    """Solve a grid of budgets at once.

    Args:
        table: The table to calibrate on.
        gmacs: The budgets. By default `num` evenly spaced ones, from the cost of the first step up to that of the
            policy that is most accurate without regard to cost.
        num: How many, by default.
        method: 'value' as `solve_policy`, 'thresholds' as `solve_thresholds`.

    Returns:
        For each budget, the policy found and what it gives on the table it was fitted on.

    Raises:
        ValueError: A budget is below the cost of the first step or above that of all; or there is no such method.
    """
    if method not in ('value', 'thresholds'):
        raise ValueError(f"method must be 'value' or 'thresholds', got {method!r}.")
    family = policy_family(table)
    if gmacs is None:
        top = family.macs_of[method][-1] / 1e9
        low = table.step_macs[0] / 1e9
        budgets = [low + (top - low) * i / max(num - 1, 1) for i in range(num)]
        macs = [min(max(b * 1e9, table.step_macs[0]), table.step_macs[-1]) for b in budgets]
    else:
        macs = [_check_budget(table, g) for g in gmacs]
    solve = family.policy_for if method == 'value' else family.thresholds_for
    return [table.evaluate(solve(m)) for m in macs]


def _check_budget(table: ExitTable, gmacs: float) -> float:
    """The budget in multiply-adds."""
    low, high = table.step_macs[0], table.step_macs[-1]
    macs = float(gmacs) * 1e9
    if not low * (1 - 1e-9) <= macs <= high * (1 + 1e-9):
        raise ValueError(
            f'A budget of {float(gmacs):g} GMACs is out of range: the first step costs {low / 1e9:.6g}, all steps '
            f'{high / 1e9:.6g}.')
    return min(max(macs, low), high)
