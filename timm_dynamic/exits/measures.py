"""How good confidences are: one number for a column of scores, or for an exit table."""
import torch

from .table import ExitTable
from .thresholds import solve_curve


def auroc(scores: torch.Tensor, correct: torch.Tensor) -> float:
    """Probability that a correct prediction has a higher score than a wrong one; ties count half.

    Args:
        scores: [N], floating point.
        correct: Whether the prediction is correct [N], bool.

    Returns:
        0 to 1; NaN if all predictions are correct, or none.
    """
    right, wrong = scores[correct].double(), scores[~correct].double().sort().values.contiguous()
    if not len(right) or not len(wrong):
        return float('nan')
    below = torch.searchsorted(wrong, right) + torch.searchsorted(wrong, right, right=True)
    return float(below.sum()) / (2 * len(right) * len(wrong))


def curve_area(calibration: ExitTable, evaluation: ExitTable, num: int = 48) -> float:
    """Area under accuracy over cost: the mean top-1 in % over all budgets from the first step's cost to that of all.

    Args:
        calibration: Table to solve exits on.
        evaluation: Table of other images, to evaluate them on.
        num: Number of budgets.
    """
    points = [evaluation.evaluate(point.policy) for point in solve_curve(calibration, num=num)]
    curve = sorted({(point.gmacs, point.top1) for point in points})
    costs, accuracies = (torch.tensor(values, dtype=torch.float64) for values in zip(*curve))
    grid = torch.linspace(evaluation.step_macs[0] / 1e9, evaluation.step_macs[-1] / 1e9, 4 * num, dtype=torch.float64)
    above = torch.searchsorted(costs, grid).clamp(0, len(costs) - 1)
    below = (above - 1).clamp(min=0)
    span = (costs[above] - costs[below]).clamp(min=1e-12)
    share = ((grid - costs[below]) / span).clamp(0, 1)
    return float(torch.lerp(accuracies[below], accuracies[above], share).mean())


def cross_area(table: ExitTable, seed: int = 0) -> float:
    """Mean `curve_area` of two random halves, each evaluated with exits solved on the other."""
    a, b = table.split(0.5, seed)
    return (curve_area(a, b) + curve_area(b, a)) / 2
