import itertools
import math

import pytest
import torch

from timm_dynamic.exits.bounds import drop_p_value, mean_p_value, rate_p_value


@pytest.mark.parametrize('max_drop', [0.02, 0.1, 0.3])
def test_drop_p_values_are_valid(max_drop):
    """Over all outcomes of 14 samples: at the limit, a p-value of at most a level has at most that probability."""
    num = 14
    outcomes = [(a, b) for a, b in itertools.product(range(num + 1), repeat=2) if a + b <= num]
    p_values = torch.tensor([drop_p_value(a, b, num, max_drop) for a, b in outcomes])
    for better in (0., 0.01, 0.05, 0.2, 0.34):
        worse = better + max_drop
        same = 1 - worse - better
        probability = torch.tensor([
            math.comb(num, a) * math.comb(num - a, b) * worse ** a * better ** b * same ** (num - a - b)
            for a, b in outcomes])
        assert probability.sum().item() == pytest.approx(1, abs=1e-5)
        for level in (0.01, 0.05, 0.1, 0.3):
            assert probability[p_values <= level].sum() <= level + 1e-6, (better, level)


def test_drop_p_values_are_tight():
    """About those of the normal approximation where that is good."""
    for worse, better, num, max_drop in ((125, 125, 5000, 0.005), (100, 130, 4000, 0.002), (300, 290, 9000, 0.005)):
        z = (num * max_drop - (worse - better)) / math.sqrt(worse + better - (worse - better) ** 2 / num)
        normal = 0.5 * math.erfc(z / math.sqrt(2))
        p = drop_p_value(worse, better, num, max_drop)
        assert p == pytest.approx(normal, rel=0.15, abs=2e-3)


def test_drop_p_values_follow_the_evidence():
    by_worse = [drop_p_value(a, 3, 400, 0.02) for a in range(14)]
    assert by_worse == sorted(by_worse)
    assert by_worse[11:] == [1.0] * 3  # a drop of 2 points and more was observed
    by_better = [drop_p_value(5, b, 400, 0.02) for b in range(14)]
    assert by_better == sorted(by_better, reverse=True)
    assert drop_p_value(0, 0, 100_000, 0.01) < 1e-6


def test_rate_p_value():
    assert rate_p_value(1, 20, 0.1) == pytest.approx(0.9 ** 20 + 20 * 0.1 * 0.9 ** 19)
    assert rate_p_value(0, 598, 0.005) < 0.05 < rate_p_value(0, 597, 0.005)
    assert rate_p_value(20, 20, 0.5) == pytest.approx(1)


def test_mean_p_values_are_valid():
    """Over all outcomes of 25 samples with two values."""
    num, limit = 25, 0.4
    p_values = [mean_p_value(torch.tensor([3.] * k + [1.] * (num - k)), 1 + 2 * limit, 1, 3) for k in range(num + 1)]
    assert p_values == sorted(p_values)
    probability = [math.comb(num, k) * limit ** k * (1 - limit) ** (num - k) for k in range(num + 1)]
    for level in (0.01, 0.05, 0.1, 0.3):
        assert sum(p for p, value in zip(probability, p_values) if value <= level) <= level
    assert p_values[0] < 0.01  # and they do reject
    values = torch.tensor([1., 2.])
    assert (mean_p_value(values, 3, 1, 3), mean_p_value(values, 1, 1, 3)) == (0, 1)
