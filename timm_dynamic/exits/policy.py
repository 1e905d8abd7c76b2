"""Exit policies: rules that decide from the confidences so far whether a sample stops."""
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..models.exit_cfg import as_cpu_tensor, register_exit_policy
from .confidence_scale import ConfidenceScale

_VALUE_KNOTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # none above: changes are too rare there to fit a bend
NUM_KNOTS = len(_VALUE_KNOTS)
_LOGIT_KNOTS = (-0.5, 0.5, 1.5, 3.0, 5.0)
_LOGIT_CLIP = 1e-4
_MIN_CHANGE = 0.002


class ExitPolicy(ABC):
    """A rule that is richer than T thresholds. It is accepted wherever thresholds are.

    A policy is a pure function of the confidences so far. It keeps nothing between calls, so that threads and batches
    can share it. Its `state_dict` is plain JSON.
    """
    num_steps: int

    @abstractmethod
    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        """Decide which samples stop.

        Args:
            history: Confidences of steps 1..t of the samples that have not stopped yet [n, t].

        Returns:
            Bool [n]: whether each sample stops after step t. With t = T, all stop.

        Raises:
            ValueError: t is not in 1..T.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The policy as numbers and lists."""

    @classmethod
    @abstractmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> 'ExitPolicy':
        """Make a policy from its `state_dict`.

        Raises:
            ValueError: The state is not one of such a policy.
        """


def change_basis(history: torch.Tensor) -> torch.Tensor:
    """Basis of the odds of a change: pieces of a line in the logit of the last value, and the logit before it.

    Args:
        history: Scaled confidences of steps 1..t [n, t].

    Returns:
        [n, 7] for t = 1, else [n, 8].
    """
    logits = history[:, -2:].clamp(_LOGIT_CLIP, 1 - _LOGIT_CLIP).logit()
    last = logits[:, -1:]
    knots = torch.tensor(_LOGIT_KNOTS, dtype=history.dtype, device='cpu').to(history.device, non_blocking=True)
    return torch.cat([torch.ones_like(last), last, (last - knots).clamp(min=0), logits[:, :-1]], dim=1)


def value_basis(history: torch.Tensor) -> torch.Tensor:
    """Basis of worth and cost of going on: pieces of a line in the last value, and all values before it.

    Args:
        history: Scaled confidences of steps 1..t [n, t].

    Returns:
        [n, 2 + NUM_KNOTS + t - 1].
    """
    last = history[:, -1:]
    knots = torch.tensor(_VALUE_KNOTS, dtype=history.dtype, device='cpu').to(history.device, non_blocking=True)
    return torch.cat([torch.ones_like(last), last - 0.6, (last - knots).clamp(min=0), history[:, :-1] - 0.6], dim=1)


def change_probability(history: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Estimated probability [n] that a later prediction is correct where this one is wrong, or the reverse."""
    return _MIN_CHANGE + (1 - _MIN_CHANGE) * (change_basis(history) @ weight).sigmoid()


@register_exit_policy
class ValuePolicy(ExitPolicy):
    """Stop if going on is not worth its cost.

    With x the confidences of steps 1..t on a `ConfidenceScale`, a sample stops after step t if

        change(x) · benefit(x) <= price · cost(x)

    change: the probability that a later prediction is correct where this one is wrong, or the reverse. benefit: how
    much more often it is the first than the second, -1..1. cost: multiply-adds still to be spent, in units of the
    span from the first step's to that of all. The price sets the budget. `solve_policy` fits all of them.

    Args:
        scale: Confidences at the knots of a `ConfidenceScale`, and their values on it [2][K].
        change: Weights on `change_basis` for each step but the last [T-1][7 or 8].
        benefit: Weights on `value_basis` for each step but the last [T-1][2 + NUM_KNOTS + t - 1].
        cost: Weights on `value_basis` of price · cost, of the same shape as `benefit`.
        cost_range: Least and largest price · cost for each step but the last [T-1][2].
    """

    def __init__(
            self,
            scale: Sequence[Any],
            change: Sequence[Any],
            benefit: Sequence[Any],
            cost: Sequence[Any],
            cost_range: Sequence[Any],
    ) -> None:
        def tensors(values: Sequence[Any]) -> tuple[torch.Tensor, ...]:
            return tuple(as_cpu_tensor(value, torch.float64) for value in values)

        self.num_steps = len(change) + 1
        self.scale = ConfidenceScale(*scale)
        self.change, self.benefit, self.cost = tensors(change), tensors(benefit), tensors(cost)
        self.cost_range = tuple((float(low), float(high)) for low, high in cost_range)
        for t, weights in enumerate(zip(self.change, self.benefit, self.cost, strict=True)):
            sizes = 7 + (t > 0), 2 + NUM_KNOTS + t, 2 + NUM_KNOTS + t
            if tuple(weight.shape for weight in weights) != tuple((size,) for size in sizes):
                raise ValueError(
                    f'Expected {sizes} weights for step {t + 1}, got {tuple(tuple(w.shape) for w in weights)}.')
            if not all(weight.isfinite().all() for weight in weights):
                raise ValueError(f'The weights for step {t + 1} are not all finite.')
        if len(self.cost_range) != self.num_steps - 1:
            raise ValueError(f'Expected {self.num_steps - 1} cost ranges, got {len(self.cost_range)}.')

    def __repr__(self) -> str:
        return f'{type(self).__name__}(num_steps={self.num_steps})'

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        t = _check_history(history, self.num_steps) - 1
        if t == self.num_steps - 1:
            return torch.ones(len(history), dtype=torch.bool, device=history.device)
        return self.margin(self.scale(history)) <= 0

    def margin(self, x: torch.Tensor) -> torch.Tensor:
        """Worth of going on less its price [n], in probability of being correct.

        Args:
            x: Confidences of steps 1..t on the scale [n, t], t < T.
        """
        t = x.shape[1] - 1
        change, *weights = (
            weights[t].to(x.device, x.dtype, non_blocking=True) for weights in (self.change, self.benefit, self.cost))
        benefit, cost = (value_basis(x) @ torch.stack(weights, dim=1)).unbind(dim=1)
        return change_probability(x, change) * benefit - cost.clamp(*self.cost_range[t])

    def interpolate(self, other: 'ValuePolicy', share: float) -> 'ValuePolicy | None':
        """Interpolate between this policy and another, as the solver does between policies of neighbouring prices.

        Args:
            other: The policy for share 1.
            share: 0..1.

        Returns:
            The policy between; None if the two do not have the same number of steps and the same scale.
        """
        if (other.num_steps, other.scale) != (self.num_steps, self.scale):
            return None
        change, benefit, cost = (
            [torch.lerp(v, w, share) for v, w in zip(getattr(self, name), getattr(other, name))]
            for name in ('change', 'benefit', 'cost'))
        ranges = as_cpu_tensor([self.cost_range, other.cost_range], torch.float64)
        cost_range = torch.lerp(ranges[0], ranges[1], share).tolist()
        return ValuePolicy(self.scale.to_list(), change, benefit, cost, cost_range)

    def state_dict(self) -> dict[str, Any]:
        return {
            'scale': self.scale.to_list(),
            **{name: [weight.tolist() for weight in getattr(self, name)] for name in ('change', 'benefit', 'cost')},
            'cost_range': [list(r) for r in self.cost_range],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> 'ValuePolicy':
        names = {'scale', 'change', 'benefit', 'cost', 'cost_range'}
        if set(state) != names:
            raise ValueError(f'A {cls.__name__} has {sorted(names)}, got {sorted(state)}.')
        try:
            return cls(**state)
        except (TypeError, IndexError, KeyError, RuntimeError) as e:
            raise ValueError(f'The state is not one of a {cls.__name__}: {e}') from e


def _check_history(history: torch.Tensor, num_steps: int) -> int:
    if history.ndim != 2 or not 1 <= history.shape[1] <= num_steps:
        raise ValueError(
            f'Expected the confidences of 1 to {num_steps} steps [n, t], got a tensor of shape {list(history.shape)}.')
    return history.shape[1]
