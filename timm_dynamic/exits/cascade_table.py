"""Exit tables of cascades, from tables of their members."""
import torch

from .table import ExitTable


def cascade_table(
        confidence: torch.Tensor,
        correct: torch.Tensor,
        step_macs: tuple[int, ...],
        final_rule: str = 'most_confident',
) -> ExitTable:
    """Make the exit table of a cascade from its members' predictions.

    Args:
        confidence: Confidence in each member's prediction [T, N].
        correct: Whether each prediction is correct [T, N], bool.
        step_macs: Cumulative multiply-adds of the members.
        final_rule: 'most_confident' (a member's prediction replaces the one so far only if it is more confident) or
            'last', see `CLCNet`.
    """
    if final_rule == 'most_confident':
        best = [torch.zeros_like(correct[0], dtype=torch.int64)]
        for t in range(1, len(correct)):
            so_far = confidence.gather(0, best[-1][None])[0]
            best.append(torch.where(confidence[t] > so_far, t, best[-1]))
        index = torch.stack(best)
        confidence, correct = confidence.gather(0, index), correct.gather(0, index)
    return ExitTable(confidence.T, correct.T, step_macs)
