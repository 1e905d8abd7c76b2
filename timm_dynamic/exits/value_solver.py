"""From an exit table to a policy for a budget.

How a budget is solved here (`solve_policy`, `solve_thresholds`). At a price for multiply-adds, a sample should go on
after step t if what it gains in the probability of being right exceeds the price of what it spends:

    E[hit at the step where it will stop - hit now | confidences so far] > price · E[cost until there | ...]

Both sides are estimated from the table by backward induction: from the last step but one down to the first, the later
decisions being made already. That is a regression of hits that are mostly equal, or 1 too few or too many; and its
noise, not its form, is what costs accuracy on other data than it was fitted on. So it is kept stiff where tables tell
little: the expectation is written as P(hits differ) · benefit, where the first is a logistic regression, and the
second, the balance of gains and losses among those that differ, is nearly the same falling function of confidence at
every step. It is a piecewise-linear function with a Gaussian prior, shrunk towards one fitted on all steps
together, and weighted by 1 / variance. The earlier confidences enter linearly. All prices share the same normal
equations, so that a whole curve costs about as much as one point. For a budget, the price is chosen whose policy
spends it on the table. Thresholds are the best cuts of the same estimates among the samples that come so far.
"""
import itertools
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .policy import (
    NUM_KNOTS,
    ValuePolicy,
    change_basis,
    change_probability,
    scale_confidence,
    value_basis,
)
from .table import ExitTable

_NUM_PRICES = 96
# Precisions of the Gaussian priors. The noise of a hit that differs has variance 1.
_PEN_BEND = 10.0  # change of a slope at a knot, from that of all steps together
_PEN_BEND_ALL = 3.0  # the same of all steps together, from 0
_PEN_LINE = 3.0  # height and slope, from those of all steps together
_PEN_HISTORY = 10.0  # influence of earlier confidences
_PEN_CHANGE = 1.0  # all weights of the probability of a change
# Samples that would have stopped before count less, down to this. The odds of a change at which half of them stop.
_LEAST_WEIGHT = 0.5
_REACH_ODDS = 0.07
_CHUNK = 4_000_000  # samples x prices held at once


@dataclass
class PolicyFamily:
    """Policies and thresholds for falling prices. Index m runs over the M prices; costs are in units of the span."""
    x: torch.Tensor  # scaled confidences [N, T]
    confidence: torch.Tensor  # [N, T] float32
    step_macs: torch.Tensor  # [T]
    scale: tuple[float, float]
    change: list[torch.Tensor]  # [T-1] weights on change_basis
    benefit: list[torch.Tensor]  # [T-1] weights on value_basis [K, M]
    cost: list[torch.Tensor]  # [T-1] weights on value_basis, times the price [K, M]
    cost_range: list[torch.Tensor]  # [T-1] least and largest cost, times the price [2, M]
    thresholds: torch.Tensor  # [M, T] float32
    macs_of: dict[str, list[float]]  # [M] mean multiply-adds on the table by method, made not to fall

    def policy_for(self, macs: float) -> ValuePolicy:
        ends = self._bracket('value', macs)
        terms = []  # worth, cost, and the range of cost, for both ends
        for t in range(self.x.shape[1] - 1):
            basis = value_basis(self.x[:, :t + 1])
            change = change_probability(self.x[:, :t + 1], self.change[t])[:, None]
            terms.append((
                change * (basis @ self.benefit[t][:, ends]), basis @ self.cost[t][:, ends],
                self.cost_range[t][:, ends]))

        def stop_after(share: float) -> torch.Tensor:
            mix = torch.tensor([1 - share, share], dtype=torch.float64)[-len(ends):]
            stops = []
            for worth, cost, limits in terms:
                low, high = (limits @ mix).tolist()
                stops.append(worth @ mix <= (cost @ mix).clamp(low, high))
            return self._first(stops)

        share = self._largest_share(stop_after, macs, len(ends))
        mix = torch.tensor([1 - share, share], dtype=torch.float64)[-len(ends):]
        return ValuePolicy(
            self.scale, self.change, [w[:, ends] @ mix for w in self.benefit], [w[:, ends] @ mix for w in self.cost],
            [(w[:, ends] @ mix).tolist() for w in self.cost_range])

    def thresholds_for(self, macs: float) -> torch.Tensor:
        ends = self._bracket('thresholds', macs)
        pair = self.thresholds[ends]

        def mixed(share: float) -> torch.Tensor:
            return pair[-1] if len(ends) == 1 else torch.lerp(pair[0], pair[1], share)

        share = self._largest_share(
            lambda s: self._first(list((self.confidence >= mixed(s)).T[:-1])), macs, len(ends))
        return mixed(share).clone()

    def _bracket(self, method: str, macs: float) -> list[int]:
        """The last policy that the budget allows, and the next one; only the former if it spends all or is the last."""
        allowed = [m for m, cost in enumerate(self.macs_of[method]) if cost <= macs * (1 + 1e-12)]
        m = allowed[-1] if allowed else 0
        exact = m + 1 == len(self.macs_of[method]) or macs <= self.macs_of[method][m]
        return [m] if exact else [m, m + 1]

    def _first(self, stops: list[torch.Tensor]) -> torch.Tensor:
        """Mean cost, given who would stop after each step but the last."""
        everyone = torch.ones(len(self.x), dtype=torch.bool)
        first = torch.stack([*stops, everyone], dim=1).byte().argmax(dim=1)
        return self.step_macs[first].mean()

    def _largest_share(self, cost: Callable[[float], torch.Tensor], macs: float, num_ends: int) -> float:
        """How far to go from the policy that is allowed to the one that is not."""
        low, high = 0.0, 1.0
        for _ in range(16 if num_ends > 1 else 0):
            middle = (low + high) / 2
            if cost(middle) <= macs * (1 + 1e-12):
                low = middle
            else:
                high = middle
        return low if num_ends > 1 else 1.0


_families: 'weakref.WeakKeyDictionary[ExitTable, PolicyFamily]' = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def policy_family(table: ExitTable) -> PolicyFamily:
    """Fit once for each table: tables do not change."""
    with _lock:
        family = _families.get(table)
    if family is None:
        family = _fit(table)
        with _lock:
            _families[table] = family
    return family


@torch.no_grad()
def _fit(table: ExitTable) -> PolicyFamily:
    steps = table.num_steps
    scale = _scale_of(table.confidence)
    x = scale_confidence(table.confidence, scale)
    hit = table.correct.double()
    macs = torch.tensor(table.step_macs, dtype=torch.float64)
    spent = (macs - macs[0]) / max(table.step_macs[-1] - table.step_macs[0], 1)

    # What all prices share: who comes how far, the odds of a change, and normal equations.
    change, pieces = [], []
    weight = torch.ones(len(x), dtype=torch.float64)
    for t in range(steps - 1):
        differs = (table.correct[:, t + 1:] != table.correct[:, t:t + 1]).any(dim=1).double()
        change.append(_logistic(change_basis(x[:, :t + 1]), differs))
        odds = change_probability(x[:, :t + 1], change[t])
        rows = _LEAST_WEIGHT + (1 - _LEAST_WEIGHT) * weight
        pieces.append((value_basis(x[:, :t + 1]), odds, rows))
        weight = weight * odds.square() / (odds.square() + _REACH_ODDS ** 2)
    prior = _benefit_of_all_steps(pieces, hit) if steps > 1 else None

    order = [table.confidence[:, t].nan_to_num(nan=-math.inf).sort() for t in range(steps - 1)]

    def solve(prices: torch.Tensor) -> dict[str, Any]:
        return _backward(table.confidence, hit, spent, pieces, prior, prices, order, scale)

    # A coarse pass finds where prices matter, the second one has them at evenly spaced costs.
    least_step = min([float(b - a) for a, b in itertools.pairwise(spent) if b > a], default=1.0)
    coarse = torch.cat([torch.logspace(math.log10(2 / least_step), -4, 28, dtype=torch.float64), torch.zeros(1)])
    if steps == 1:
        coarse = coarse[-1:]
    result = solve(coarse)
    if steps > 1:
        result = solve(_evenly_spaced(coarse, result['macs']['value']))
    to_macs = {
        name: (macs[0] + cost.cummax(dim=0).values * (macs[-1] - macs[0])).tolist()
        for name, cost in result['macs'].items()}
    return PolicyFamily(
        x, table.confidence, macs, scale, change, result['benefit'], result['cost'], result['cost_range'],
        result['thresholds'], to_macs)


def _backward(
        confidence: torch.Tensor,
        hit: torch.Tensor,
        spent: torch.Tensor,
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        prior: torch.Tensor | None,
        prices: torch.Tensor,
        order: list[Any],
        scale: tuple[float, float],
) -> dict[str, Any]:
    """Backward induction for many prices, in chunks of them that fit into memory."""
    chunks = [
        _backward_chunk(confidence, hit, spent, pieces, prior, chunk, order, scale)
        for chunk in prices.split(max(_CHUNK // len(hit), 1))]
    steps = range(len(pieces))
    return {
        **{name: [torch.cat([c[name][t] for c in chunks], dim=1) for t in steps]
           for name in ('benefit', 'cost', 'cost_range')},
        'thresholds': torch.cat([c['thresholds'] for c in chunks]),
        'macs': {name: torch.cat([c['macs'][name] for c in chunks]) for name in ('value', 'thresholds')},
    }


def _backward_chunk(
        confidence: torch.Tensor,
        hit: torch.Tensor,
        spent: torch.Tensor,
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        prior: torch.Tensor | None,
        prices: torch.Tensor,
        order: list[Any],
        scale: tuple[float, float],
) -> dict[str, Any]:
    num, steps = hit.shape
    final_hit = hit[:, -1:].repeat(1, len(prices))  # at the step where a sample stops, going on from here
    final_cost = spent[-1:].expand(num, len(prices)).clone()
    benefit, cost, cost_range, margins = [], [], [], []
    for t in reversed(range(steps - 1)):
        basis, odds, rows = pieces[t]
        line = torch.tensor([_PEN_LINE] * 2 + [_PEN_BEND] * NUM_KNOTS + [_PEN_HISTORY] * t, dtype=torch.float64)
        centre = torch.zeros_like(line)
        assert prior is not None
        centre[:len(prior)] = prior
        gram = (basis * (rows * odds)[:, None]).T @ basis + line.diag()
        target = (basis * rows[:, None]).T @ (final_hit - hit[:, t:t + 1]) + (line * centre)[:, None]
        benefit.append(torch.linalg.solve(gram, target))
        flat = torch.tensor([1e-3, 0.1] + [1.0] * (NUM_KNOTS + t), dtype=torch.float64)
        gram = (basis * rows[:, None]).T @ basis + flat.diag()
        cost.append(torch.linalg.solve(gram, (basis * rows[:, None]).T @ (final_cost - spent[t])) * prices)
        cost_range.append(torch.stack([spent[t + 1] - spent[t], spent[-1] - spent[t]])[:, None] * prices)
        price = (basis @ cost[-1]).clamp_(cost_range[-1][0], cost_range[-1][1])
        margin = (basis @ benefit[-1]).mul_(odds[:, None]).sub_(price)
        margins.append(margin)
        stop = margin <= 0
        final_hit = torch.where(stop, hit[:, t:t + 1], final_hit)
        final_cost = torch.where(stop, spent[t], final_cost)
    thresholds, threshold_cost = _cut(confidence, margins[::-1], spent, order, scale, len(prices))
    return {
        'benefit': benefit[::-1], 'cost': cost[::-1], 'cost_range': cost_range[::-1], 'thresholds': thresholds,
        'macs': {'value': final_cost.mean(dim=0), 'thresholds': threshold_cost},
    }


def _cut(
        confidence: torch.Tensor,
        margins: list[torch.Tensor],
        spent: torch.Tensor,
        order: list[Any],
        scale: tuple[float, float],
        num_prices: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The thresholds below which going on is worth most, step by step among those who come so far.

    Returns:
        Thresholds [M, T] float32, and their mean costs [M].
    """
    num, steps = confidence.shape
    low, high = 2 * scale[0] - scale[1], 2 * scale[1] - scale[0]  # everyone stops, nobody stops
    thresholds = torch.full((num_prices, steps), low)
    going = torch.ones(num, num_prices, dtype=torch.bool)
    cost = torch.zeros(num_prices, dtype=torch.float64)
    for t, margin in enumerate(margins):
        values, index = order[t]
        # Those who do not come so far count a little, so that there is a threshold even if nobody does.
        total = torch.where(going, margin, 0.02 * margin)[index].cumsum_(dim=0)
        total[:-1][values[1:] == values[:-1]] = -math.inf  # equals stop together
        best, last = total.max(dim=0)
        following = values[(last + 1).clamp(max=num - 1)]
        middle = values[last] + (following - values[last]) / 2
        cut = torch.where(middle > values[last], middle, following)
        cut = torch.where(last == num - 1, torch.tensor(high), cut)
        thresholds[:, t] = torch.where(best <= 0, torch.tensor(low), cut)
        stays = going & ~(confidence[:, t:t + 1] >= thresholds[:, t])
        cost += (going & ~stays).double().mean(dim=0) * spent[t]
        going = stays
    return thresholds, cost + going.double().mean(dim=0) * spent[-1]


def _evenly_spaced(prices: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Prices at which costs are about evenly spaced, falling, from the highest given down to 0."""
    costs = costs.cummax(dim=0).values + torch.arange(len(costs)) * 1e-9
    aims = torch.linspace(float(costs[0]), float(costs[-1]), _NUM_PRICES, dtype=torch.float64)[1:-1]
    right = torch.searchsorted(costs, aims).clamp(1, len(costs) - 1)
    share = (aims - costs[right - 1]) / (costs[right] - costs[right - 1])
    log = prices.clamp(min=float(prices[-2]) / 10).log()
    between = torch.lerp(log[right - 1], log[right], share).exp()
    return torch.cat([prices[:1], between, prices[-1:]])


def _benefit_of_all_steps(
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        hit: torch.Tensor,
) -> torch.Tensor:
    """Benefit of one step more, as one function of confidence for all steps [2 + NUM_KNOTS]."""
    size = 2 + NUM_KNOTS
    gram = torch.tensor([1.0] * 2 + [_PEN_BEND_ALL] * NUM_KNOTS, dtype=torch.float64).diag()
    target = torch.zeros(size, dtype=torch.float64)
    for t, (basis, odds, rows) in enumerate(pieces):
        basis = basis[:, :size]
        gram = gram + (basis * (rows * odds)[:, None]).T @ basis
        target = target + (basis * rows[:, None]).T @ (hit[:, t + 1] - hit[:, t])
    return torch.linalg.solve(gram, target)


def _logistic(basis: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Logistic regression with a Gaussian prior, by Newton's method with halved steps where needed [K]."""
    weight = torch.zeros(basis.shape[1], dtype=basis.dtype)

    def loss(w: torch.Tensor) -> float:
        z = basis @ w
        return float(torch.nn.functional.softplus(z).sum() - (label * z).sum() + _PEN_CHANGE / 2 * w.square().sum())

    value = loss(weight)
    for _ in range(30):
        p = (basis @ weight).sigmoid()
        slope = basis.T @ (p - label) + _PEN_CHANGE * weight
        curve = (basis * (p * (1 - p))[:, None]).T @ basis + _PEN_CHANGE * torch.eye(len(weight), dtype=basis.dtype)
        step = torch.linalg.solve(curve, slope)
        size = 1.0
        while (new := loss(weight - size * step)) > value and size > 1e-4:
            size /= 2
        if value - new < 1e-7 * (1 + abs(value)):
            break
        weight, value = weight - size * step, new
    return weight


def _scale_of(confidence: torch.Tensor) -> tuple[float, float]:
    """Range of the confidences, but for the outermost ones."""
    values = confidence[confidence.isfinite()].double()
    if not len(values):
        return 0.0, 1.0
    values = values.sort().values
    low, high = float(values[int(0.001 * (len(values) - 1))]), float(values[-1 - int(0.001 * (len(values) - 1))])
    return (low, high) if high - low > 1e-6 else (low - 0.5, low + 0.5)
