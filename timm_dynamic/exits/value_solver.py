"""How exits are solved for a budget: see `solve_policy` and `solve_thresholds`.

A price for multiply-adds decides: a sample should go on after step t if its gain in the probability of being correct
exceeds the price of the multiply-adds it will spend:

    E[correct at the step where it will stop - correct now | confidences so far] > price · E[cost until there | ...]

Both sides are estimated from the table by backward induction: from the last step but one to the first, with the later
decisions already made. This is a regression of differences that are mostly 0, and sometimes 1 or -1. Its noise, not its
form, is what costs accuracy on other data than it was fitted on. Therefore it is regularised:

* The expectation is written as P(correctness changes) · benefit. The probability is a logistic regression. The benefit,
  the balance of gains and losses among the changes, is nearly the same falling function of confidence at every step: a
  piecewise-linear function with a Gaussian prior around one function fitted on all steps together, weighted by
  1 / variance. The earlier confidences enter linearly.
* Confidences are mapped to a scale whose knots are at given ranks, see `ConfidenceScale`: overconfident models are
  solved as well as calibrated ones.

All prices share the same normal equations, so that a whole curve costs about as much as one point. For a budget, the
solver takes the price whose policy spends it on the table. Thresholds are the best cuts of the same estimates among the
samples that come so far. The result is compared with the geometric rule and with stopping all samples after one
step: the most accurate within the budget, on the table, is returned.
"""
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from .confidence_scale import ConfidenceScale
from .geometric import all_geometric_thresholds
from .policy import NUM_KNOTS, ValuePolicy, change_basis, change_probability, value_basis
from .regression import logistic_regression
from .table import ExitPoint, ExitTable

_NUM_PRICES = 96
# Precisions of the Gaussian priors. The noise of a change of correctness has variance 1.
_PEN_BEND = 10.0  # change of a slope at a knot, from that of all steps together
_PEN_BEND_ALL = 3.0  # the same of all steps together, from 0
_PEN_LINE = 3.0  # height and slope, from those of all steps together
_PEN_HISTORY = 10.0  # influence of earlier confidences
# Samples that would have stopped before count less, down to this. The odds of a change at which half of them stop.
_LEAST_WEIGHT = 0.5
_REACH_ODDS = 0.07
_CHUNK = 4_000_000  # samples x prices held at once
_PLACE_STEP = 2.0 ** -16  # precision of a place between two prices
_ALLOWANCE = 1 + 1e-12  # rounding of mean costs
_WORTH_SPENDING = 1e-3  # of the span of costs, if the solver leaves that much

Stop = Callable[[int, float], torch.Tensor]  # step and place -> which samples stop [N], bool


class ColumnOrder:
    """The samples of one step, sorted by confidence. A cut is a position in this order: samples before it go on.

    Args:
        confidence: [N], float32.
    """

    def __init__(self, confidence: torch.Tensor) -> None:
        num = len(confidence)
        self.values, self.index = torch.where(confidence.isnan(), -math.inf, confidence).sort()
        changes = torch.cat([torch.ones(1, dtype=torch.bool), self.values[1:] > self.values[:-1]])
        starts = torch.where(changes, torch.arange(num), 0).cummax(dim=0).values
        self.starts = torch.cat([starts, torch.tensor([num])])  # where samples of equal confidence begin [N + 1]
        # -inf and NaN reach no threshold, +inf reaches all of them.
        self.least, self.most = int((self.values == -math.inf).sum()), int((self.values < math.inf).sum())
        self.position = torch.empty(num, dtype=torch.int64)  # a sample stops if its position is not before the cut
        self.position[self.index] = torch.where(self.values == -math.inf, -1, starts)

    def snap(self, cut: float) -> int:
        """The last cut not after a position that does not divide samples of equal confidence."""
        return min(max(int(self.starts[round(cut)]), self.least), self.most)

    def threshold(self, cut: int) -> float:
        """A threshold for a cut, midway between two confidences; beyond all of them if all samples stop, or none."""
        known = self.values[self.least:self.most]
        if not len(known):
            return 0.5
        low, high = known[0].item(), known[-1].item()
        limit = torch.finfo(torch.float32).max
        if cut <= self.least:
            return max(2 * low - high, -limit)
        if cut >= self.most:
            return min(max(2 * high - low, known[-1].nextafter(torch.tensor(math.inf)).item()), limit)
        below, above = self.values[cut - 1], self.values[cut]
        middle = below + (above - below) / 2
        return (middle if middle > below else above).item()


@dataclass
class PolicyFamily:
    """Policies and thresholds for M falling prices. A place in the family is a number in 0..M-1: between two prices,
    weights and cuts are interpolated.
    """
    scale: ConfidenceScale
    x: torch.Tensor  # confidences on the scale [N, T]
    orders: list[ColumnOrder]  # [T-1]
    change: list[torch.Tensor]  # [T-1] weights on change_basis
    benefit: list[torch.Tensor]  # [T-1] weights on value_basis [K, M]
    cost: list[torch.Tensor]  # [T-1] weights on value_basis, times the price [K, M]
    cost_range: list[torch.Tensor]  # [T-1] least and largest cost, times the price [2, M]
    cuts: list[torch.Tensor]  # [T-1] cuts [M] int64, see ColumnOrder
    macs_of: dict[str, list[float]]  # [M] mean multiply-adds on the table by method, made not to fall
    given: list[tuple[float, float, torch.Tensor]]  # GMACs, top-1 in % and thresholds of those to compare with

    def solve(self, table: ExitTable, method: str, macs: float) -> ExitPoint:
        """The policy ('value') or thresholds ('thresholds') for a budget, and what they give on the table.

        Args:
            table: The table that the family was fitted on.
            method: 'value' or 'thresholds'.
            macs: Budget in multiply-adds.

        Raises:
            ValueError: No thresholds keep within the budget, because some confidences are NaN.
        """
        def fits(gmacs: float) -> bool:
            return gmacs * 1e9 <= macs * _ALLOWANCE

        solve = self._solve_policy if method == 'value' else self._solve_thresholds
        points = [table.evaluate(solve(table, macs))]
        if given := [known for known in self.given if fits(known[0])]:
            _, top1, thresholds = max(given, key=lambda known: known[1])
            if top1 > points[0].top1 or not fits(points[0].gmacs):
                points.append(table.evaluate(thresholds if method == 'thresholds' else self._as_policy(thresholds)))
        points = [point for point in points if fits(point.gmacs)]
        if not points:
            raise ValueError(
                f'No thresholds cost at most {macs / 1e9:g} GMACs: the cheapest ones cost {self.given[0][0]:.6g}, as '
                f'confidences that are NaN or -inf reach no threshold. solve_policy can meet this budget.')
        return max(points, key=lambda point: point.top1)

    def _solve_policy(self, table: ExitTable, macs: float) -> ValuePolicy:
        @cache
        def bases(t: int) -> tuple[torch.Tensor, torch.Tensor]:
            return value_basis(self.x[:, :t + 1]), change_probability(self.x[:, :t + 1], self.change[t])

        @cache
        def worth_and_cost(t: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
            basis, change = bases(t)
            return change * (basis @ self.benefit[t][:, m]), basis @ self.cost[t][:, m]

        def stop(t: int, place: float) -> torch.Tensor:
            low, high = (worth_and_cost(t, m) for m in _neighbours(place))
            worth, cost = (torch.lerp(a, b, place % 1) for a, b in zip(low, high))
            return worth <= cost.clamp(*_between(self.cost_range[t], place).tolist())

        places = self._find_places('value', table, macs, stop)

        def mixed(weights: list[torch.Tensor]) -> list[torch.Tensor]:
            return [_between(w, place) for w, place in zip(weights, places)]

        return ValuePolicy(
            self.scale.to_list(), self.change, mixed(self.benefit), mixed(self.cost), mixed(self.cost_range))

    def _solve_thresholds(self, table: ExitTable, macs: float) -> list[float]:
        def cut(t: int, place: float) -> int:
            return self.orders[t].snap(_between(self.cuts[t].double(), place).item())

        def stop(t: int, place: float) -> torch.Tensor:
            return self.orders[t].position >= cut(t, place)

        places = self._find_places('thresholds', table, macs, stop)
        return [*(order.threshold(cut(t, place)) for t, (order, place) in enumerate(zip(self.orders, places))), 0.0]

    def _as_policy(self, thresholds: torch.Tensor) -> ValuePolicy:
        """Thresholds as a policy that stops the same samples."""
        values = self.scale(thresholds)
        values = torch.where(thresholds > self.scale.confidence[-1], 2.0, values)  # no sample reaches it
        benefit = []
        for t, weights in enumerate(self.benefit):
            line = torch.zeros_like(weights[:, 0])
            line[0], line[1] = values[t] - 0.6, -1.0  # stop if values[t] - x <= 0
            benefit.append(line)
        nothing = [torch.zeros_like(line) for line in benefit]
        return ValuePolicy(self.scale.to_list(), self.change, benefit, nothing, [(0.0, 0.0)] * len(benefit))

    def _find_places(self, method: str, table: ExitTable, macs: float, stop: Stop) -> list[float]:
        """Find the place in the family, for each step, whose policy spends a budget [T-1].

        All steps have the same place. That may leave much of the budget if many samples have equal confidences. Then
        other places are tried: from these, and from those where one step goes further and the others stay behind, each
        step goes on alone as far as the budget allows. The most accurate places on the table are taken.

        Args:
            method: 'value' or 'thresholds'.
            table: The table that the family was fitted on.
            macs: Budget in multiply-adds.
            stop: Which samples stop after a step, at a place.
        """
        num, last = table.num_steps - 1, len(self.macs_of[method]) - 1
        added = torch.tensor(table.step_macs, dtype=torch.float64).diff().tolist()
        recent: dict[int, tuple[float, torch.Tensor]] = {}

        def going(places: Sequence[float]) -> Iterator[torch.Tensor]:
            """Which samples go on after each step but the last."""
            still = torch.ones(len(table), dtype=torch.bool)
            for t, place in enumerate(places):
                if t not in recent or recent[t][0] != place:
                    recent[t] = place, ~stop(t, place)
                still = still & recent[t][1]
                yield still

        def left(places: Sequence[float]) -> float:
            shares = (int(still.sum()) / len(table) for still in going(places))
            return macs * _ALLOWANCE - table.step_macs[0] - sum(a * share for a, share in zip(added, shares))

        def num_correct(places: Sequence[float]) -> int:
            first_stop = torch.stack(list(going(places))).sum(dim=0)
            return int(table.correct.gather(1, first_stop[:, None]).sum())

        def furthest(places_at: Callable[[float], list[float]], low: float, high: float) -> list[float]:
            while high - low > _PLACE_STEP:
                middle = (low + high) / 2
                low, high = (middle, high) if left(places_at(middle)) >= 0 else (low, middle)
            return places_at(low)

        def replaced(places: list[float], t: int, place: float) -> list[float]:
            return [*places[:t], place, *places[t + 1:]]

        def others_behind(t: int, place: float) -> list[float]:
            return replaced([place] * num, t, m + 1)

        m = max((m for m, cost in enumerate(self.macs_of[method]) if cost <= macs * _ALLOWANCE), default=0)
        if m == last or macs <= self.macs_of[method][m]:
            return [float(m)] * num
        together = furthest(lambda place: [place] * num, m, m + 1)
        if left(together) < _WORTH_SPENDING * (table.step_macs[-1] - table.step_macs[0]):
            return together
        starts = [together]
        for t in range(num):
            behind = partial(others_behind, t)
            if left(behind(0)) >= 0:
                starts.append(furthest(behind, 0, m + 1))
        found = []
        for places in starts:
            for t in range(num):
                places = furthest(partial(replaced, places, t), places[t], last)
            found.append(places)
        return max(found, key=num_correct)


def _neighbours(place: float) -> tuple[int, int]:
    return math.floor(place), math.ceil(place)


def _between(values: torch.Tensor, place: float) -> torch.Tensor:
    """Interpolate values [..., M] at a place between two prices [...]."""
    low, high = _neighbours(place)
    return torch.lerp(values[..., low], values[..., high], place - low)


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
    scale = ConfidenceScale.fit(table.confidence, table.correct)
    x = scale(table.confidence)
    correct = table.correct.double()
    macs = torch.tensor(table.step_macs, dtype=torch.float64)
    spent = (macs - macs[0]) / max(table.step_macs[-1] - table.step_macs[0], 1)

    # What all prices share: which samples come so far, the odds of a change, and normal equations.
    change, pieces = [], []
    weight = torch.ones(len(x), dtype=torch.float64)
    for t in range(steps - 1):
        differs = (table.correct[:, t + 1:] != table.correct[:, t:t + 1]).any(dim=1).double()
        change.append(logistic_regression(change_basis(x[:, :t + 1]), differs))
        odds = change_probability(x[:, :t + 1], change[t])
        rows = _LEAST_WEIGHT + (1 - _LEAST_WEIGHT) * weight
        pieces.append((value_basis(x[:, :t + 1]), odds, rows))
        weight = weight * odds.square() / (odds.square() + _REACH_ODDS ** 2)
    prior = _benefit_of_all_steps(pieces, correct) if steps > 1 else None
    orders = [ColumnOrder(table.confidence[:, t]) for t in range(steps - 1)]

    def solve(prices: torch.Tensor) -> dict[str, Any]:
        return _backward(correct, spent, pieces, prior, prices, orders)

    # A coarse pass finds the prices that matter; the second pass has prices at evenly spaced costs.
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
    limits = torch.finfo(torch.float32)
    one_step = [torch.where(torch.arange(steps) < t, limits.max, limits.min) for t in range(steps)]  # cheapest first
    given = []
    for thresholds in [*one_step, *all_geometric_thresholds(table)]:
        point = table.evaluate(thresholds.clamp(limits.min, limits.max))
        given.append((point.gmacs, point.top1, point.policy))
    return PolicyFamily(
        scale, x, orders, change, result['benefit'], result['cost'], result['cost_range'], result['cuts'],
        to_macs, given)


def _backward(
        correct: torch.Tensor,
        spent: torch.Tensor,
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        prior: torch.Tensor | None,
        prices: torch.Tensor,
        orders: list[ColumnOrder],
) -> dict[str, Any]:
    """Backward induction for many prices, in chunks of them that fit into memory."""
    chunks = [
        _backward_chunk(correct, spent, pieces, prior, chunk, orders)
        for chunk in prices.split(max(_CHUNK // len(correct), 1))]
    steps = range(len(pieces))
    return {
        **{name: [torch.cat([c[name][t] for c in chunks], dim=1) for t in steps]
           for name in ('benefit', 'cost', 'cost_range')},
        'cuts': [torch.cat([c['cuts'][t] for c in chunks]) for t in steps],
        'macs': {name: torch.cat([c['macs'][name] for c in chunks]) for name in ('value', 'thresholds')},
    }


def _backward_chunk(
        correct: torch.Tensor,
        spent: torch.Tensor,
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        prior: torch.Tensor | None,
        prices: torch.Tensor,
        orders: list[ColumnOrder],
) -> dict[str, Any]:
    num, steps = correct.shape
    final_correct = correct[:, -1:].repeat(1, len(prices))  # at the step where a sample stops, going on from here
    final_cost = spent[-1:].expand(num, len(prices)).clone()
    benefit, cost, cost_range, margins = [], [], [], []
    for t in reversed(range(steps - 1)):
        basis, odds, rows = pieces[t]
        line = torch.tensor([_PEN_LINE] * 2 + [_PEN_BEND] * NUM_KNOTS + [_PEN_HISTORY] * t, dtype=torch.float64)
        centre = torch.zeros_like(line)
        assert prior is not None
        centre[:len(prior)] = prior
        gram = (basis * (rows * odds)[:, None]).T @ basis + line.diag()
        target = (basis * rows[:, None]).T @ (final_correct - correct[:, t:t + 1]) + (line * centre)[:, None]
        benefit.append(torch.linalg.solve(gram, target))
        flat = torch.tensor([1e-3, 0.1] + [1.0] * (NUM_KNOTS + t), dtype=torch.float64)
        gram = (basis * rows[:, None]).T @ basis + flat.diag()
        cost.append(torch.linalg.solve(gram, (basis * rows[:, None]).T @ (final_cost - spent[t])) * prices)
        cost_range.append(torch.stack([spent[t + 1] - spent[t], spent[-1] - spent[t]])[:, None] * prices)
        price = (basis @ cost[-1]).clamp_(cost_range[-1][0], cost_range[-1][1])
        margin = (basis @ benefit[-1]).mul_(odds[:, None]).sub_(price)
        margins.append(margin)
        stop = margin <= 0
        final_correct = torch.where(stop, correct[:, t:t + 1], final_correct)
        final_cost = torch.where(stop, spent[t], final_cost)
    cuts, cut_cost = _cut(margins[::-1], spent, orders, num, len(prices))
    return {
        'benefit': benefit[::-1], 'cost': cost[::-1], 'cost_range': cost_range[::-1], 'cuts': cuts,
        'macs': {'value': final_cost.mean(dim=0), 'thresholds': cut_cost},
    }


def _cut(
        margins: list[torch.Tensor],
        spent: torch.Tensor,
        orders: list[ColumnOrder],
        num: int,
        num_prices: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The cuts before which going on is worth most, step by step among the samples that come so far.

    Returns:
        Cuts [T-1][M] int64, and their mean costs [M].
    """
    cuts = []
    going = torch.ones(num, num_prices, dtype=torch.bool)
    cost = torch.zeros(num_prices, dtype=torch.float64)
    for t, (order, margin) in enumerate(zip(orders, margins)):
        # Samples that do not come so far count a little, so that there is a cut even if none does.
        total = torch.where(going, margin, 0.02 * margin)[order.index].cumsum_(dim=0)
        total[:-1][order.starts[1:-1] != torch.arange(1, num)] = -math.inf  # equal samples stop together
        best, last = total.max(dim=0)
        cut = torch.where(best <= 0, 0, last + 1).clamp(order.least, order.most)
        cuts.append(cut)
        stays = going & (order.position[:, None] < cut)
        cost += (going & ~stays).double().mean(dim=0) * spent[t]
        going = stays
    return cuts, cost + going.double().mean(dim=0) * spent[-1]


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
        correct: torch.Tensor,
) -> torch.Tensor:
    """Benefit of one step more, as one function of confidence for all steps [2 + NUM_KNOTS]."""
    size = 2 + NUM_KNOTS
    gram = torch.tensor([1.0] * 2 + [_PEN_BEND_ALL] * NUM_KNOTS, dtype=torch.float64).diag()
    target = torch.zeros(size, dtype=torch.float64)
    for t, (basis, odds, rows) in enumerate(pieces):
        basis = basis[:, :size]
        gram = gram + (basis * (rows * odds)[:, None]).T @ basis
        target = target + (basis * rows[:, None]).T @ (correct[:, t + 1] - correct[:, t])
    return torch.linalg.solve(gram, target)
