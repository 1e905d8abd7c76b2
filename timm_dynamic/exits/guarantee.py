"""Exit policies with a promise that holds with a given probability.

A curve of policies is fitted on some images. On others, the policies are tested one after the other, from the one that
keeps the limit most easily, until the first that fails: fixed sequence testing, as in Learn then Test
(https://arxiv.org/abs/2110.01052); for early exits see Fast yet Safe (https://arxiv.org/abs/2405.20915). The sequence
is fixed before the test, so the number of tests needs no correction.
"""
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch

from ..models.exit_cfg import make_stop_rule, plain_json, policy_from_json, policy_to_json, register_exit_policy
from .bounds import drop_p_value, mean_p_value, rate_p_value
from .policy import ExitPolicy
from .table import ExitPoint, ExitTable
from .thresholds import solve_curve

_logger = logging.getLogger(__name__)

_NUM_POLICIES = 96  # of a curve: the more, the closer to a limit
_KINDS = {
    'max_drop': 'the top-1 drop against {reference} is at most {limit:g} points',
    'max_disagreement': 'the prediction differs from that of {reference} for at most {limit:g} % of the images',
    'max_gmacs': 'the mean cost is at most {limit:g} GMACs',
}


@dataclass(frozen=True)
class Promise:
    """What a policy keeps with a probability of `confidence`, over the draw of the images it was tested on.

    It holds for images drawn like them.

    Attributes:
        kind: 'max_drop', 'max_disagreement' or 'max_gmacs'.
        limit: In points of top-1, in %, or in GMACs.
        confidence: The probability.
        num_samples: Number of images of the test.
        observed: What the limit is for, on these images.
        gmacs: Mean cost of these images.
        top1: Accuracy on these images in %.
        reference: What the policy is compared with.
        split: Where the images are from; empty if not known.
    """
    kind: str
    limit: float
    confidence: float
    num_samples: int
    observed: float
    gmacs: float
    top1: float
    reference: str = 'all steps'
    split: str = ''

    def __str__(self) -> str:
        what = _KINDS[self.kind].format(reference=self.reference, limit=self.limit)
        where = f' of {self.split}' if self.split else ''
        return (f'With {100 * self.confidence:g} % confidence, {what}; {self.observed:.4g} on {self.num_samples} images'
                f'{where}.')


@register_exit_policy
class GuaranteedPolicy(ExitPolicy):
    """An exit policy with a promise, see `solve_guaranteed`.

    Args:
        policy: Thresholds or an `ExitPolicy`.
        num_steps: Number of steps.
        promise: What is promised; None if nothing can be.
    """

    def __init__(self, policy: Any, num_steps: int, promise: Promise | None) -> None:
        self.policy, self.num_steps, self.promise = policy, num_steps, promise
        self._rule = make_stop_rule(policy, num_steps)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.promise or "no promise"})'

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        return self._rule(history)

    def state_dict(self) -> dict[str, Any]:
        return {
            'policy': policy_to_json(self.policy), 'num_steps': self.num_steps,
            'promise': None if self.promise is None else plain_json(asdict(self.promise))}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> 'GuaranteedPolicy':
        try:
            promise = None if state['promise'] is None else Promise(**state['promise'])
            return cls(policy_from_json(state['policy']), state['num_steps'], promise)
        except (TypeError, KeyError) as e:
            raise ValueError(f'The state is not one of a {cls.__name__}: {e}') from e


def solve_guaranteed(
        calibration: ExitTable | Sequence[ExitPoint],
        holdout: ExitTable,
        max_drop: float | None = None,
        confidence: float = 0.95,
        *,
        max_disagreement: float | None = None,
        max_gmacs: float | None = None,
        reference: Any = None,
        reference_name: str = '',
        split: str = '',
) -> GuaranteedPolicy:
    """Find the cheapest policy that keeps a limit with a given probability.

    Args:
        calibration: Table to fit the curve of policies on; or a curve, see `solve_curve`.
        holdout: Table of other images, to test the policies on.
        max_drop: The limit is a drop of top-1 against all steps, or against `reference`, in points. Default: 0.5, if
            there is no other limit.
        confidence: Probability with which the limit is kept, over the draw of the holdout images.
        max_disagreement: The limit is the share of images, in %, whose prediction differs from that of the last step.
            It needs no labels, see `ExitTable.agreement`.
        max_gmacs: The limit is the mean cost of an image. The policy that spends most of it is returned.
        reference: For `max_drop`, instead of all steps: a policy; or which holdout images another model has right [N],
            bool.
        reference_name: What the promise calls the reference.
        split: What the promise calls the holdout images.

    Returns:
        The policy, with the promise as `.promise`. If nothing cheaper can be promised, the policy that runs all steps;
        a warning says how many images would do. Its promise is None if not even that one keeps the limit.

    Raises:
        ValueError: There is not exactly one limit, it is out of range, the tables do not match, the holdout table has
            no predictions to compare; or no policy keeps a limit of cost.
    """
    given = {'max_drop': max_drop, 'max_disagreement': max_disagreement, 'max_gmacs': max_gmacs}
    limits = [(kind, float(limit)) for kind, limit in given.items() if limit is not None] or [('max_drop', 0.5)]
    if len(limits) > 1:
        raise ValueError(f"Expected one limit, got {' and '.join(kind for kind, _ in limits)}.")
    if not 0 < confidence < 1:
        raise ValueError(f'confidence must be between 0 and 1, got {confidence}.')
    kind, limit = limits[0]
    if kind != 'max_gmacs' and not 0 < limit < 100:
        raise ValueError(f'{kind} must be above 0 and below 100 (points of accuracy), got {limit:g}.')
    if reference is not None and kind != 'max_drop':
        raise ValueError(f'A reference is for max_drop, not for {kind}.')
    curve = solve_curve(calibration, num=_NUM_POLICIES) if isinstance(calibration, ExitTable) else list(calibration)
    curve.sort(key=lambda point: point.gmacs)
    fitted_macs = calibration.step_macs if isinstance(calibration, ExitTable) else holdout.step_macs
    if fitted_macs != holdout.step_macs:
        raise ValueError(
            f'The tables are not of one model: the costs of their steps are {fitted_macs} and {holdout.step_macs}.')
    test = _tests(kind, limit, holdout, reference)
    all_steps = [math.inf] * (holdout.num_steps - 1) + [-math.inf]
    policies = [point.policy for point in curve]
    kept: list[tuple[ExitPoint, float]] = []
    if kind != 'max_gmacs':
        policies.reverse()
        if reference is None:  # compared with themselves: nothing to test
            kept.append((holdout.evaluate(all_steps), 0.0))
        else:
            policies.insert(0, all_steps)
    for policy in policies:
        point = holdout.evaluate(policy)
        observed, p_value = test(point)
        if p_value > 1 - confidence:
            break
        kept.append((point, observed))
    else:
        point = None  # every policy keeps the limit
    name = reference_name or ('all steps' if reference is None else 'the reference')
    if kind == 'max_gmacs' and not kept:
        raise ValueError(
            f'No policy can be promised to cost at most {limit:g} GMACs with {len(holdout)} images: the cheapest costs '
            f'{holdout.evaluate(policies[0]).gmacs:.6g} on them.')
    if kind != 'max_gmacs' and len(kept) < 2 and point is not None:
        _warn(kind, limit, confidence, holdout, point, observed, bool(kept))
    if not kept:
        return GuaranteedPolicy(all_steps, holdout.num_steps, None)
    # All that are kept, are kept at once: the cheapest; of a limit of cost, the last one, which spends most.
    best, observed = kept[-1] if kind == 'max_gmacs' else min(kept, key=lambda item: item[0].gmacs)
    return GuaranteedPolicy(best.policy, holdout.num_steps, Promise(
        kind, limit, confidence, len(holdout), observed, best.gmacs, best.top1, name, split))


def _tests(kind: str, limit: float, holdout: ExitTable, reference: Any) -> Callable[[ExitPoint], tuple[float, float]]:
    """Function that gives what a policy has of the limited quantity, and the p-value of its being above the limit."""
    num = len(holdout)

    def correct(point: ExitPoint, table: ExitTable) -> torch.Tensor:
        return table.correct.gather(1, point.steps_used[:, None] - 1)[:, 0]

    def test_cost(point: ExitPoint) -> tuple[float, float]:
        macs = torch.tensor(holdout.step_macs, dtype=torch.float64) / 1e9
        spent = macs[point.steps_used - 1]
        return point.gmacs, mean_p_value(spent, limit, float(macs[0]), float(macs[-1]))

    def test_disagreement(point: ExitPoint) -> tuple[float, float]:
        count = int((~correct(point, agreement)).sum())
        return 100 * count / num, rate_p_value(count, num, limit / 100)

    def test_drop(point: ExitPoint) -> tuple[float, float]:
        right = correct(point, holdout)
        worse, better = int((expected & ~right).sum()), int((right & ~expected).sum())
        return 100 * (worse - better) / num, drop_p_value(worse, better, num, limit / 100)

    if kind == 'max_gmacs':
        return test_cost
    if kind == 'max_disagreement':
        agreement = holdout.agreement()
        return test_disagreement
    if reference is None:
        expected = holdout.correct[:, -1]
    elif isinstance(reference, torch.Tensor) and reference.dtype == torch.bool:
        expected = reference.cpu()
        if expected.shape != (num,):
            raise ValueError(
                f'A reference of correct answers must have the {num} images of the holdout table, got '
                f'{list(expected.shape)}.')
    else:
        expected = correct(holdout.evaluate(reference), holdout)
    return test_drop


def _warn(
        kind: str,
        limit: float,
        confidence: float,
        holdout: ExitTable,
        point: ExitPoint,
        observed: float,
        all_steps_do: bool,
) -> None:
    """Say that nothing cheaper than all steps can be promised, and how many images would do for a policy."""
    room = (limit - observed) / 100
    text = f'{observed:.4g} was observed on {len(holdout)} images, which is not below the limit.'
    if room > 0:
        at = point.steps_used[:, None] - 1
        differs = float((holdout.correct.gather(1, at)[:, 0] != holdout.correct[:, -1]).double().mean())
        normal = NormalDist().inv_cdf(confidence) ** 2 * differs / room ** 2
        needed = max(normal, math.log(1 - confidence) / math.log(1 - limit / 100))
        text = f'{observed:.4g} was observed on {len(holdout)} images; about {math.ceil(needed)} would do.'
    what = 'Nothing cheaper than all steps' if all_steps_do else 'Nothing, not even all steps,'
    _logger.warning(
        f'{what} can be promised for {kind} {limit:g} with {100 * confidence:g} % confidence: of a policy of '
        f'{point.gmacs:.4g} GMACs, {text}')
