"""What a model knows about stopping, as plain JSON: its exit policy, and policies solved for budgets.

timm records the constructor arguments of a model and exports them. So `exit_cfg` is one of them, and everything in it
is plain JSON: numbers, strings, lists and dicts. JSON has no infinity and no NaN; they are written as 'inf', '-inf' and
'nan'.
"""
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Confidences of the steps so far [n, t] -> which images stop after step t, bool [n].
StopRule = Callable[[torch.Tensor], torch.Tensor]
# What can be set as exits: thresholds or a stop rule.
Policy = torch.Tensor | Sequence[float] | StopRule

_exit_policies: dict[str, Any] = {}


def register_exit_policy(cls: Any) -> Any:
    """Class decorator: models can store policies of this class, under its name.

    An instance is a stop rule with a `state_dict()` of numbers, strings, tensors and lists of them; the class method
    `from_state_dict` makes an instance from it. A class with `interpolate(other, share)`, which returns a policy or
    None, also serves budgets between two stored ones.
    """
    _exit_policies[cls.__name__] = cls
    return cls


@dataclass(frozen=True)
class Thresholds:
    """Stop at the first step whose confidence reaches its threshold.

    Attributes:
        values: One threshold per step.
    """
    values: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        return len(self.values)

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        return history[:, -1] >= self.values[history.shape[1] - 1]


def make_stop_rule(policy: Any, num_steps: int) -> StopRule:
    """Turn thresholds or an exit policy into a stop rule.

    Args:
        policy: T thresholds, as a float tensor or a sequence, or a stop rule.
        num_steps: Number of steps T.

    Raises:
        ValueError: The policy is for another number of steps, or a threshold is not a number.
    """
    if callable(policy):
        check_policy_steps(policy, num_steps)
        return policy
    return Thresholds(tuple(check_thresholds(policy, num_steps).tolist()))


def ask_stop_rule(stop_rule: StopRule, history: torch.Tensor) -> torch.Tensor:
    """Call a stop rule, and check what it returns.

    Args:
        stop_rule: The rule.
        history: Confidences of the steps so far [n, t].

    Returns:
        Which images stop, bool [n].

    Raises:
        ValueError: The rule returns something else.
    """
    stop = stop_rule(history)
    if not isinstance(stop, torch.Tensor) or stop.dtype != torch.bool or stop.shape != history.shape[:1]:
        found = f'{str(stop.dtype)[6:]} {list(stop.shape)}' if isinstance(stop, torch.Tensor) else type(stop).__name__
        raise ValueError(f'A stop rule must return bool [{len(history)}], one per image; this one returned {found}.')
    return stop


def check_thresholds(thresholds: Any, num_steps: int) -> torch.Tensor:
    """Thresholds as a float32 tensor [T] on the CPU.

    Raises:
        ValueError: There are not `num_steps` of them, or one that is used is not a number.
    """
    try:
        values = as_cpu_tensor(_restore_nonfinite(thresholds), torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise ValueError(
            f'Expected {num_steps} thresholds or an ExitPolicy, got {type(thresholds).__name__}: {e}') from e
    if values.shape != (num_steps,):
        raise ValueError(f'Expected {num_steps} thresholds, one a step, got a tensor of shape {list(values.shape)}.')
    if values[:-1].isnan().any():
        raise ValueError(f'Thresholds must be numbers, got {values.tolist()}.')
    return values


def check_policy_steps(policy: Any, num_steps: int) -> None:
    """Check the number of steps of a stop rule that has a `num_steps`.

    Raises:
        ValueError: It is for another number of steps.
    """
    steps = getattr(policy, 'num_steps', num_steps)
    if steps != num_steps:
        raise ValueError(f'Expected a policy for {num_steps} steps, got one for {steps}.')


def as_cpu_tensor(value: Any, dtype: torch.dtype) -> torch.Tensor:
    """Value as a tensor on the CPU, whatever the default device is: models may be created on the meta device."""
    return torch.as_tensor(value.detach() if isinstance(value, torch.Tensor) else value, dtype=dtype, device='cpu')


# JSON

def plain_json(value: Any) -> Any:
    """Turn numbers, tensors and arrays, and sequences and mappings of them, into plain JSON."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: plain_json(v) for k, v in value.items()}
    return [plain_json(v) for v in value] if isinstance(value, (list, tuple)) else value


def _restore_nonfinite(value: Any) -> Any:
    """Turn 'inf', '-inf' and 'nan' back into numbers."""
    if isinstance(value, Mapping):
        return {k: _restore_nonfinite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_restore_nonfinite(v) for v in value]
    return float(value) if isinstance(value, str) and value in ('inf', '-inf', 'nan') else value


def policy_to_json(policy: Any) -> Any:
    """Turn thresholds or an exit policy into plain JSON; None if the class of the policy is not registered."""
    if not callable(policy):
        return plain_json(as_cpu_tensor(_restore_nonfinite(policy), torch.float32))
    if isinstance(policy, Thresholds):
        return plain_json(policy.values)
    name = type(policy).__name__
    if name not in _exit_policies:
        return None
    return {'type': name, **plain_json(policy.state_dict())}


def policy_from_json(policy: Any) -> Any:
    """Turn what `policy_to_json` returned back into a list of thresholds or an exit policy.

    Raises:
        ValueError: No exit policy of this type is registered, or this is not a state of one.
    """
    policy = _restore_nonfinite(policy)
    if not isinstance(policy, Mapping):
        return policy
    if policy.get('type') not in _exit_policies:
        raise ValueError(f"there is no exit policy of type {policy.get('type')!r}")
    return _exit_policies[policy['type']].from_state_dict({k: v for k, v in policy.items() if k != 'type'})


def check_mapping(exit_cfg: Any) -> Any:
    """Raise a ValueError unless an `exit_cfg` is a dict of plain JSON."""
    if not isinstance(exit_cfg, Mapping):
        raise ValueError(f'exit_cfg must be a dict, see DynamicNet; got {exit_cfg!r:.100}.')
    try:
        json.dumps(exit_cfg)
    except (TypeError, ValueError, RecursionError) as e:  # the last one of a file with thousands of levels
        raise ValueError(f'exit_cfg must be plain JSON: {type(e).__name__}: {e}') from e
    return exit_cfg


def read_exit_cfg(exit_cfg: Mapping[str, Any], num_steps: int, num_classes: int) -> StopRule | None:
    """Check an `exit_cfg` and make the stop rule that it sets.

    Args:
        exit_cfg: See `DynamicNet`.
        num_steps: Number of steps of the model.
        num_classes: Number of classes of the model.

    Returns:
        The stop rule; None if no exit is set.

    Raises:
        ValueError: The policies are for other classes or steps, or are damaged.
    """
    try:
        classes = exit_cfg.get('num_classes', num_classes)
        if classes != num_classes:
            raise ValueError(f'they are for {classes} classes, the model has {num_classes}')
        costs = []
        for budget in exit_cfg.get('budgets', ()):
            costs.append(check_gmacs(budget['gmacs']))
            make_stop_rule(policy_from_json(budget['policy']), num_steps)
        if costs != sorted(costs):
            raise ValueError('their costs do not rise')
        return make_stop_rule(policy_from_json(exit_cfg['exit']), num_steps) if 'exit' in exit_cfg else None
    except (TypeError, LookupError, AttributeError, OverflowError, RecursionError) as e:  # a file may hold anything
        raise ValueError(f'they are damaged ({type(e).__name__}: {e})') from e


# Budgets

def check_gmacs(gmacs: Any) -> float:
    """A cost in GMACs as a float.

    Raises:
        ValueError: It is not a positive number.
    """
    if not 0 < float(gmacs) < math.inf:
        raise ValueError(f'The cost of a budget must be a positive number of GMACs, got {gmacs!r}.')
    return float(gmacs)


def budgets_to_json(budgets: Iterable[Mapping[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    """Turn budgets into plain JSON, by rising cost.

    Args:
        budgets: See `DynamicNet.store_budgets`.
        num_steps: Number of steps of the model.

    Raises:
        ValueError: A policy does not fit the model or cannot be stored, a cost is not a positive number, or another
            entry is not plain JSON.
    """
    out = []
    for budget in budgets:
        make_stop_rule(budget['policy'], num_steps)
        policy = policy_to_json(budget['policy'])
        if policy is None:
            raise ValueError(
                f"{type(budget['policy']).__name__} is not a registered exit policy and cannot be stored.")
        out.append({**budget, 'gmacs': check_gmacs(budget['gmacs']), 'policy': policy})
        try:
            json.dumps(out[-1], allow_nan=False)
        except (TypeError, ValueError) as e:
            raise ValueError(f'The entries of a budget must be plain JSON: {e}.') from e
    return sorted(out, key=lambda budget: budget['gmacs'])


def choose_budget(
        budgets: Sequence[Mapping[str, Any]] | None,
        gmacs: Any,
        step_macs: Sequence[int],
) -> dict[str, Any]:
    """Choose the stored budget for a cost, or interpolate between two: see `DynamicNet.set_budget`.

    Args:
        budgets: Stored budgets, by rising cost.
        gmacs: Cost in 10⁹ multiply-adds per image.
        step_macs: Cumulative multiply-adds of the steps.

    Raises:
        ValueError: There are no budgets, all cost more, or the cost is out of the model's range.
    """
    try:
        gmacs = float(gmacs)
    except (TypeError, ValueError) as e:
        raise ValueError(f'A budget is a number of GMACs, got {gmacs!r}.') from e
    if not budgets:
        raise ValueError(
            'This model has no stored budgets. Fit them on labelled images with "python validate.py --model MODEL '
            '--data-dir DATA --calibrate-split cross --save-budgets FOLDER" and create the model local-dir:FOLDER; or '
            'store your own with model.store_budgets, or set thresholds with model.set_exit.')
    lowest, highest = step_macs[0] / 1e9, step_macs[-1] / 1e9
    if not lowest <= gmacs <= highest:
        raise ValueError(
            f'A budget of {gmacs:g} GMACs is out of range: the first step costs {lowest:.6g}, all steps {highest:.6g}.')
    num_affordable = sum(budget['gmacs'] <= gmacs * (1 + 1e-6) for budget in budgets)
    if not num_affordable:
        raise ValueError(
            f"A budget of {gmacs:g} GMACs is below the smallest stored one, {budgets[0]['gmacs']:.6g}.")
    budget = budgets[num_affordable - 1]
    if num_affordable < len(budgets) and budget['gmacs'] < gmacs * (1 - 1e-6):
        budget = _interpolate(budget, budgets[num_affordable], gmacs) or budget
    return dict(budget)


def _interpolate(low: Mapping[str, Any], high: Mapping[str, Any], gmacs: float) -> dict[str, Any] | None:
    """A budget between two stored ones; None if their policies cannot be interpolated."""
    share = (gmacs - low['gmacs']) / (high['gmacs'] - low['gmacs'])
    first, last = policy_from_json(low['policy']), policy_from_json(high['policy'])
    if not callable(first) and not callable(last):
        # A threshold beyond all confidences means all or none, so its value must not enter the mean.
        (a, b), (c, d) = (budget.get('confidence_range', (0, 1)) for budget in (low, high))
        bounds = min(a, c), max(b, d)
        start, end = (as_cpu_tensor(v, torch.float32).clamp(*bounds) for v in (first, last))
        policy = torch.lerp(start, end, share)
    elif type(first) is type(last) and hasattr(first, 'interpolate'):
        policy = first.interpolate(last, share)
    else:
        policy = None
    if policy is None:
        return None
    return {'gmacs': gmacs, 'policy': policy_to_json(policy), 'between': [low['gmacs'], high['gmacs']]}
