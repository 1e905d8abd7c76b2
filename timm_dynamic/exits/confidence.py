"""Comparing measures of confidence: what each of them makes of the same answers."""
import torch

from .table import ExitTable
from .thresholds import solve_curve


def auroc(scores: torch.Tensor, correct: torch.Tensor) -> float:
    """Probability that a right answer has a higher score than a wrong one; ties count half.

    Args:
        scores: [N], floating point.
        correct: Whether the answer is right [N], bool.

    Returns:
        0 to 1; NaN where all answers are right, or none.
    """
    right, wrong = scores[correct].double(), scores[~correct].double().sort().values.contiguous()
    if not len(right) or not len(wrong):
        return float('nan')
    below = torch.searchsorted(wrong, right) + torch.searchsorted(wrong, right, right=True)
    return float(below.sum()) / (2 * len(right) * len(wrong))


def cascade_table(
        confidence: torch.Tensor,
        correct: torch.Tensor,
        step_macs: tuple[int, ...],
        final_rule: str = 'most_confident',
) -> ExitTable:
    """Make the exit table of a cascade from what is known of its members' answers.

    Args:
        confidence: In each member's answer [T, N].
        correct: Whether it is right [T, N], bool.
        step_macs: Cumulative cost of the members.
        final_rule: 'most_confident' or 'last', see `CLCNet`.
    """
    if final_rule == 'most_confident':
        best = [torch.zeros_like(correct[0], dtype=torch.int64)]
        for t in range(1, len(correct)):
            so_far = confidence.gather(0, best[-1][None])[0]
            best.append(torch.where(confidence[t] > so_far, t, best[-1]))
        index = torch.stack(best)
        confidence, correct = confidence.gather(0, index), correct.gather(0, index)
    return ExitTable(confidence.T, correct.T, step_macs)


def curve_area(fit: ExitTable, judge: ExitTable, num: int = 48) -> float:
    """Area under accuracy over cost: the mean top-1 in % over all budgets between the first step and all.

    Args:
        fit: Table that exits are solved on.
        judge: Table of other images, that they are judged on.
        num: Number of budgets.
    """
    points = [judge.evaluate(point.policy) for point in solve_curve(fit, num=num)]
    curve = sorted({(point.gmacs, point.top1) for point in points})
    costs, accuracies = (torch.tensor(values, dtype=torch.float64) for values in zip(*curve))
    grid = torch.linspace(judge.step_macs[0] / 1e9, judge.step_macs[-1] / 1e9, 4 * num, dtype=torch.float64)
    above = torch.searchsorted(costs, grid).clamp(0, len(costs) - 1)
    below = (above - 1).clamp(min=0)
    span = (costs[above] - costs[below]).clamp(min=1e-12)
    share = ((grid - costs[below]) / span).clamp(0, 1)
    return float(torch.lerp(accuracies[below], accuracies[above], share).mean())


def cross_area(table: ExitTable, seed: int = 0) -> float:
    """Mean `curve_area` of two random halves, each judged with what was solved on the other."""
    a, b = table.split(0.5, seed)
    return (curve_area(a, b) + curve_area(b, a)) / 2
