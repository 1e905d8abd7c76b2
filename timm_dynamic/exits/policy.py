"""When to stop, as a rule on the confidences seen so far."""
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..models.exit_cfg import register_exit_policy

_VALUE_KNOTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # none above, where a change is too rare to tell a bend from noise
NUM_KNOTS = len(_VALUE_KNOTS)
_LOGIT_KNOTS = (-0.5, 0.5, 1.5, 3.0, 5.0)
_LOGIT_CLIP = 1e-4
_MIN_CHANGE = 0.002


class ExitPolicy(ABC):
    """A rule that is richer than T thresholds. It is accepted wherever thresholds are.

    A policy is a pure function of the confidences so far: it keeps nothing between calls, so threads and batches can
    share it. What `state_dict` gives is plain JSON.
    """
    num_steps: int

    @abstractmethod
    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        """Decide who stops.

        Args:
            history: Confidences of steps 1..t of the samples that have not stopped yet [n, t].

        Returns:
            Bool [n]: who stops after step t. With t = T, all.

        Raises:
            ValueError: t is not in 1..T.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All there is to know of the policy, as numbers and lists."""

    @classmethod
    @abstractmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> 'ExitPolicy':
        """Make the policy that `state_dict` was taken of.

        Raises:
            ValueError: It is no state of such a policy.
        """


def change_basis(history: torch.Tensor) -> torch.Tensor:
    """What the odds of a change depend on: pieces of a line in the logit of the last value, and the logit before it.

    Args:
        history: Scaled confidences of steps 1..t [n, t].

    Returns:
        [n, 7] for t = 1, else [n, 8].
    """
    logits = history[:, -2:].clamp(_LOGIT_CLIP, 1 - _LOGIT_CLIP).logit()
    last = logits[:, -1:]
    knots = torch.tensor(_LOGIT_KNOTS, dtype=history.dtype).to(history.device, non_blocking=True)
    return torch.cat([torch.ones_like(last), last, (last - knots).clamp(min=0), logits[:, :-1]], dim=1)


def value_basis(history: torch.Tensor) -> torch.Tensor:
    """What worth and cost of going on depend on: pieces of a line in the last value, and all values before it.

    Args:
        history: Scaled confidences of steps 1..t [n, t].

    Returns:
        [n, 2 + NUM_KNOTS + t - 1].
    """
    last = history[:, -1:]
    knots = torch.tensor(_VALUE_KNOTS, dtype=history.dtype).to(history.device, non_blocking=True)
    return torch.cat([torch.ones_like(last), last - 0.6, (last - knots).clamp(min=0), history[:, :-1] - 0.6], dim=1)


def change_probability(history: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Estimated probability [n] that a later step judges otherwise (right for wrong, or wrong for right)."""
    return _MIN_CHANGE + (1 - _MIN_CHANGE) * (change_basis(history) @ weight).sigmoid()


@register_exit_policy
class ValuePolicy(ExitPolicy):
    """Stop where going on is not worth its cost.

    With x the confidences of steps 1..t, scaled to about 0..1, a sample stops after step t if

        change(x) · benefit(x) <= price · cost(x)

    change: the probability that a later step is right where this one is wrong, or the other way round. benefit: how
    much more often it is the first than the second, -1..1. cost: multiply-adds still to be spent, in units of the
    span from the first step to the last. The price is what sets the budget. See `solve_policy` for how they are fitted.

    Args:
        scale: Confidences that become 0 and 1.
        change: Weights on `change_basis` for each step but the last [T-1][7 or 8].
        benefit: Weights on `value_basis` for each step but the last [T-1][2 + NUM_KNOTS + t - 1].
        cost: Likewise, for price · cost.
        cost_range: Least and largest price · cost for each step but the last [T-1][2].
    """

    def __init__(
            self,
            scale: Sequence[float],
            change: Sequence[Any],
            benefit: Sequence[Any],
            cost: Sequence[Any],
            cost_range: Sequence[Any],
    ) -> None:
        def tensors(values: Sequence[Any]) -> tuple[torch.Tensor, ...]:
            return tuple(torch.as_tensor(value, dtype=torch.float64) for value in values)

        self.num_steps = len(change) + 1
        self.scale = (float(scale[0]), float(scale[1]))
        self.change, self.benefit, self.cost = tensors(change), tensors(benefit), tensors(cost)
        self.cost_range = tuple((float(low), float(high)) for low, high in cost_range)
        for t, weights in enumerate(zip(self.change, self.benefit, self.cost, strict=True)):
            sizes = 7 + (t > 0), 2 + NUM_KNOTS + t, 2 + NUM_KNOTS + t
            if tuple(weight.shape for weight in weights) != tuple((size,) for size in sizes):
                raise ValueError(
                    f'Expected {sizes} weights for step {t + 1}, got {tuple(tuple(w.shape) for w in weights)}.')
            if not all(weight.isfinite().all() for weight in weights):
                raise ValueError(f'The weights for step {t + 1} are not all finite.')
        if len(self.cost_range) != self.num_steps - 1 or not self.scale[0] < self.scale[1]:
            raise ValueError(f'Expected {self.num_steps - 1} cost ranges and a scale with rising values, got '
                             f'{len(self.cost_range)} and {self.scale}.')

    def __repr__(self) -> str:
        return f'{type(self).__name__}(num_steps={self.num_steps})'

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        t = _check_history(history, self.num_steps) - 1
        if t == self.num_steps - 1:
            return torch.ones(len(history), dtype=torch.bool, device=history.device)
        return self.margin(scale_confidence(history, self.scale)) <= 0

    def margin(self, x: torch.Tensor) -> torch.Tensor:
        """Worth of going on less its price [n], in shares of samples classified rightly; x scaled [n, t], t < T."""
        t = x.shape[1] - 1
        change, benefit, cost = (
            weights[t].to(x.device, x.dtype, non_blocking=True) for weights in (self.change, self.benefit, self.cost))
        basis = value_basis(x)
        return change_probability(x, change) * (basis @ benefit) - (basis @ cost).clamp(*self.cost_range[t])

    def interpolate(self, other: 'ValuePolicy', share: float) -> 'ValuePolicy | None':
        """Go some of the way to another policy, as the solver does between the policies of neighbouring prices.

        Args:
            other: The policy for share 1.
            share: 0..1.

        Returns:
            The policy between; None if the two do not have the same steps and scale of confidence.
        """
        if (other.num_steps, other.scale) != (self.num_steps, self.scale):
            return None
        change, benefit, cost = ([torch.lerp(v, w, share) for v, w in zip(getattr(self, name), getattr(other, name))]
                 for name in ('change', 'benefit', 'cost'))
        ranges = torch.tensor([self.cost_range, other.cost_range], dtype=torch.float64)
        cost_range = torch.lerp(ranges[0], ranges[1], share).tolist()
        return ValuePolicy(self.scale, change, benefit, cost, cost_range)

    def state_dict(self) -> dict[str, Any]:
        return {
            'scale': list(self.scale),
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
            raise ValueError(f'This is no state of a {cls.__name__}: {e}') from e


def scale_confidence(confidence: torch.Tensor, scale: tuple[float, float]) -> torch.Tensor:
    """Confidences of any dtype and shape on the scale that policies are fitted on; what is no number counts as 0."""
    dtype = torch.float32 if confidence.device.type == 'mps' else torch.float64
    low, high = scale
    return ((confidence.to(dtype) - low) / (high - low)).nan_to_num(nan=0.0).clamp(0, 1)


def _check_history(history: torch.Tensor, num_steps: int) -> int:
    if history.ndim != 2 or not 1 <= history.shape[1] <= num_steps:
        raise ValueError(
            f'Expected the confidences of 1 to {num_steps} steps [n, t], got a tensor of shape {list(history.shape)}.')
    return history.shape[1]
