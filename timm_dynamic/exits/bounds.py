"""Tests that hold for every number of samples: p-values from counts, without a normal approximation.

A p-value here is at most p with probability p, whatever the unknown rates are, if the hypothesis is true. Samples are
drawn independently.
"""
import math

import torch

_QUICK_SHARE = 2e-3  # of the level, for the quick test
_NUISANCE_LEVEL = 1e-3  # probability with which the interval of the rate that is not tested may be wrong
_NUM_NUISANCES = 5  # places in that interval at which the p-value is taken
_WIDTH = 6.0  # standard deviations of a count that are summed; the rest counts as if it all spoke for the hypothesis


def drop_p_value(worse: int, better: int, num: int, max_drop: float) -> float:
    """Test the hypothesis that accuracy drops by more than a limit.

    The exact unconditional test of a difference of paired proportions: the p-value is the largest probability, over the
    rate that is not tested, of a score statistic (Tango, 1998) as low as the one observed. That rate is searched in a
    confidence interval whose level is added (Berger and Boos, 1994). Where betting decides at a small share of the
    level, as of drops far from the limit, that is all.

    Args:
        worse: Number of samples that only the reference has right.
        better: Number of samples that only the policy has right.
        num: Number of all samples.
        max_drop: The limit, 0 to below 1.

    Returns:
        The p-value.
    """
    if worse - better >= num * max_drop:
        return 1.0
    losses = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    quick = _betting_p_value(losses, torch.tensor([worse, better, num - worse - better]), max_drop, -1.0, 1.0)
    if quick < 1e-3 * _QUICK_SHARE:
        return quick / _QUICK_SHARE
    low, high = _rate_interval(better, num, _NUISANCE_LEVEL)
    high = min(high, (1 - max_drop) / 2)  # both rates together are at most 1
    counts = torch.tensor([worse, better], dtype=torch.float64)
    observed = _score(counts[0], counts[1], num, max_drop)
    largest = 0.0
    for rate in torch.linspace(min(low, high), high, _NUM_NUISANCES, dtype=torch.float64).tolist():
        a, b = _window(num, rate + max_drop)[:, None], _window(num, rate)[None, :]
        rest = num - a - b
        log = math.lgamma(num + 1) - (a + 1).lgamma() - (b + 1).lgamma() - (rest.clamp(min=0) + 1).lgamma()
        log = log + _times_log(a, rate + max_drop) + _times_log(b, rate)
        log = log + _times_log(rest, 1 - 2 * rate - max_drop)
        probability = log.exp_().masked_fill_(rest < 0, 0)
        outside = max(1 - float(probability.sum()), 0.0)
        as_low = _score(a, b, num, max_drop) <= observed + 1e-9
        largest = max(largest, float(probability[as_low].sum()) + outside)
    return min((largest + _NUISANCE_LEVEL) / (1 - _QUICK_SHARE), 1.0)


def rate_p_value(count: int, num: int, max_rate: float) -> float:
    """Test the hypothesis that something happens more often than a limit: the exact binomial test.

    Args:
        count: Number of samples in which it happened.
        num: Number of all samples.
        max_rate: The limit, 0 to 1.

    Returns:
        The p-value: the probability of at most `count`, at the limit.
    """
    k = torch.arange(count + 1, dtype=torch.float64)
    log = math.lgamma(num + 1) - (k + 1).lgamma() - (num - k + 1).lgamma()
    log = log + _times_log(k, max_rate) + _times_log(num - k, 1 - max_rate)
    return min(float(log.exp().sum()), 1.0)


def mean_p_value(values: torch.Tensor, max_mean: float, low: float, high: float) -> float:
    """Test the hypothesis that the mean of bounded numbers is above a limit, by betting.

    A gambler who stakes the share λ of their wealth on each number being below the limit cannot expect to win if the
    hypothesis is true. The reciprocal of the wealth is a p-value. The wealth is the mean over gamblers with different λ
    (Waudby-Smith and Ramdas, 2024, https://arxiv.org/abs/2010.09686).

    Args:
        values: [N].
        max_mean: The limit.
        low: Least possible value.
        high: Largest possible value.

    Returns:
        The p-value.
    """
    distinct, counts = values.double().unique(return_counts=True)
    return _betting_p_value(distinct, counts, max_mean, low, high)


def _betting_p_value(values: torch.Tensor, counts: torch.Tensor, max_mean: float, low: float, high: float) -> float:
    if max_mean >= high:
        return 0.0
    if max_mean <= low:
        return 1.0
    values, limit = (values - low) / (high - low), (max_mean - low) / (high - low)
    stakes = torch.linspace(0, 1, 202, dtype=torch.float64)[1:-1].square() / (1 - limit)
    wealth = (counts[:, None] * (1 + stakes * (limit - values[:, None])).log()).sum(dim=0)
    return min(math.exp(-max(float(wealth.logsumexp(dim=0)) - math.log(len(stakes)), 0.0)), 1.0)


def _score(worse: torch.Tensor, better: torch.Tensor, num: int, max_drop: float) -> torch.Tensor:
    """Tango's statistic: the drop less the limit, in standard deviations that are estimated under the limit."""
    a = 2.0 * num
    b = -worse - better + (2 * num - worse + better) * max_drop
    c = -better * max_drop * (1 - max_drop)
    rate = ((b.square() - 4 * a * c).clamp(min=0).sqrt() - b) / (2 * a)
    variance = num * (2 * rate + max_drop * (1 - max_drop))
    return torch.where(variance > 0, (worse - better - num * max_drop) / variance.clamp(min=1e-300).sqrt(), 0)


def _rate_interval(count: int, num: int, level: float) -> tuple[float, float]:
    """Confidence interval of a rate, by Chernoff's bound on both sides."""
    observed, allowed = count / num, math.log(2 / level) / num

    def divergence(p: float) -> float:
        out = 0.0
        for q, r in ((observed, p), (1 - observed, 1 - p)):
            if q > 0:
                out += math.inf if r <= 0 else q * math.log(q / r)
        return out

    def furthest(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if divergence(middle) <= allowed else (inside, middle)
        return outside

    return furthest(observed, 0.0), furthest(observed, 1.0)


def _window(num: int, rate: float) -> torch.Tensor:
    """The counts that matter of a binomial, float64."""
    spread = _WIDTH * math.sqrt(num * rate) + _WIDTH
    return torch.arange(max(math.floor(num * rate - spread), 0), min(math.ceil(num * rate + spread), num) + 1).double()


def _times_log(count: torch.Tensor, rate: float) -> torch.Tensor:
    """count · log(rate); 0 for a count of 0."""
    return torch.where(count > 0, count * math.log(max(rate, 1e-300)), 0)
