"""The scale that exit policies are fitted on."""
from collections.abc import Sequence
from typing import Any

import torch

from ..models.exit_cfg import as_cpu_tensor
from .regression import logistic_regression

_NUM_KNOTS = 33
_OUTERMOST = 6.0  # logit of the rank of the second knot, and of the last but one
_SLOPES = (0.5, 4.0)  # least and largest slope of the regression
_LOGIT_RANGE = 15.0  # beyond it, values on the scale could not be told apart


class ConfidenceScale:
    """A rising map from confidences to 0..1, linear between knots.

    Args:
        confidence: Confidences at the knots [K], strictly rising.
        scaled: Values at the knots [K], 0..1, strictly rising. Beyond the outermost knots the map is constant.

    Raises:
        ValueError: There are no knots, or not as many of the one as of the other, or they do not rise.
    """

    def __init__(self, confidence: Sequence[float], scaled: Sequence[float]) -> None:
        knots = as_cpu_tensor(confidence, torch.float64), as_cpu_tensor(scaled, torch.float64)
        self.confidence, self.scaled = knots
        if self.confidence.ndim != 1 or self.confidence.shape != self.scaled.shape or not len(self.confidence):
            raise ValueError(
                f'Expected a scale of as many confidences as values, got shapes {[list(k.shape) for k in knots]}.')
        rising = all(k.isfinite().all() and (k.diff() > 0).all() for k in knots)
        if not rising or not 0 <= self.scaled[0] <= self.scaled[-1] <= 1:
            raise ValueError('The knots of a scale must rise, and their values lie in 0..1.')
        self._ends = self.confidence[0].item(), self.confidence[-1].item()

    @classmethod
    def fit(cls, confidence: torch.Tensor, correct: torch.Tensor) -> 'ConfidenceScale':
        """Fit the scale to an exit table: to the probability that the prediction is correct.

        The probability is sigmoid(a + b · logit(rank)), by logistic regression, and knots lie at given ranks. So a
        rising map of the confidences moves the knots, but does not change their values: models may be overconfident,
        or have all confidences within 1e-6.

        Args:
            confidence: [N, T]; NaN and infinite ones are left out.
            correct: [N, T], bool.
        """
        known = confidence.isfinite()
        values, order = confidence[known].double().sort()
        if not len(values):
            return cls([0., 1.], [0., 1.])
        levels, counts = values.unique_consecutive(return_counts=True)
        last = counts.cumsum(dim=0)
        right = correct[known][order].double().cumsum(dim=0)[last - 1].diff(prepend=torch.zeros(1).double())
        place = ((last - counts.double() / 2) / len(values)).logit()  # of the rank of a level's middle sample
        basis = torch.stack([torch.ones_like(place), place], dim=1)
        intercept, slope = logistic_regression(basis, right, counts.double()).tolist()
        slope = min(max(slope, _SLOPES[0]), _SLOPES[1])

        low, high = place[[0, -1]].clamp(-_OUTERMOST, _OUTERMOST).tolist()
        inner = torch.linspace(low, high, _NUM_KNOTS - 2, dtype=torch.float64)
        at = torch.cat([torch.zeros(1).long(), torch.searchsorted(place, inner), torch.tensor([len(levels) - 1])])
        at = at.clamp(max=len(levels) - 1).unique()
        scaled = (intercept + slope * place[at]).clamp(-_LOGIT_RANGE, _LOGIT_RANGE).sigmoid()
        first = torch.cat([torch.ones(1, dtype=torch.bool), scaled.diff() > 0])  # beyond the range all are the same
        return cls(levels[at][first].tolist(), scaled[first].tolist())

    def __call__(self, confidence: torch.Tensor) -> torch.Tensor:
        """Map confidences of any dtype and shape; NaN becomes 0. Float64, on a device without it float32."""
        dtype = torch.float32 if confidence.device.type == 'mps' else torch.float64
        knots, scaled = (k.to(confidence.device, dtype, non_blocking=True) for k in (self.confidence, self.scaled))
        values = confidence.to(dtype).clamp(*self._ends)
        if len(knots) == 1:
            return torch.where(values.isnan(), torch.zeros_like(values), scaled)
        slope = scaled.diff() / knots.diff()
        below = torch.bucketize(values, knots[1:-1], right=True).flatten()
        low, start, rise = (v.index_select(0, below).view(values.shape) for v in (knots, scaled, slope))
        return values.sub_(low).mul_(rise).add_(start).nan_to_num_(nan=0.0)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, ConfidenceScale) and self.to_list() == other.to_list()

    def to_list(self) -> list[list[float]]:
        """Confidences and values at the knots, as plain JSON."""
        return [self.confidence.tolist(), self.scaled.tolist()]
