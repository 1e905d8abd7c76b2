import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from timm_dynamic.loss.policy_gradient import (
    compute_log_prob,
    compute_ppo_terms,
    compute_returns,
    compute_rewards,
    normalise_returns,
)


def test_rewards_by_hand():
    # true class 0 of 2: logits (log 3, 0) are 3/4, (0, 0) are 1/2, (0, log 4) are 1/5
    logits = torch.tensor([[[0., 0.]], [[math.log(3), 0.]], [[0., math.log(4)]]], requires_grad=True)
    rewards = compute_rewards(logits, torch.tensor([0]))
    torch.testing.assert_close(rewards, torch.tensor([[0.25], [-0.55]]))
    assert not rewards.requires_grad
    torch.testing.assert_close(compute_rewards(logits, torch.tensor([1])), -rewards)
    assert compute_rewards(logits.bfloat16(), torch.tensor([0])).dtype == torch.float32
    assert compute_rewards(torch.zeros(3, 0, 2), torch.zeros(0, dtype=torch.int64)).shape == (2, 0)


def test_returns_by_hand():
    # from the end: 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3
    rewards = torch.tensor([[1., 0.], [2., 0.], [4., 1.]])
    torch.testing.assert_close(compute_returns(rewards, gamma=0.5), torch.tensor([[3., 0.25], [4., 0.5], [4., 1.]]))


def test_normalisation_by_hand():
    # 1, 2, 3, 6: mean 3, sum of squares 4 + 1 + 0 + 9 = 14, variance 14 / 3
    normal = normalise_returns(torch.tensor([[1., 2.], [3., 6.]]), eps=0.)
    torch.testing.assert_close(normal, torch.tensor([[-2., -1.], [0., 3.]]) / math.sqrt(14 / 3))
    assert normalise_returns(torch.full((2, 3), 0.1)).tolist() == [[0.] * 3] * 2  # eps
    assert normalise_returns(torch.tensor([[5.]])).tolist() == [[0.]]


def test_log_prob_is_that_of_a_diagonal_normal():
    actions, means = torch.rand(3, 4, 2), torch.rand(3, 4, 2, requires_grad=True)
    expected = MultivariateNormal(means, scale_tril=torch.diag(torch.full((2,), 0.1)))
    torch.testing.assert_close(compute_log_prob(actions, means), expected.log_prob(actions))
    # at the mean, std 1: -log(2 pi)
    torch.testing.assert_close(compute_log_prob(means, means, std=1.), torch.full((3, 4), -math.log(2 * math.pi)))
    terms = compute_ppo_terms(*torch.zeros(4, 1, 1))
    torch.testing.assert_close(terms.entropy, expected.entropy()[0, 0])


def test_loss_by_hand():
    # returns 1, 1, -1, -1; critic says 0.5, 0, 0, 0.5 -> advantages 0.5, 1, -1, -1.5
    # ratios 1.1, 1.5, 1.5, 0.5 -> clipped 1.1, 1.2, 1.2, 0.8
    # min(ratio * A, clipped * A) = 0.55, min(1.5, 1.2), min(-1.5, -1.2), min(-0.75, -1.2) = 0.55, 1.2, -1.5, -1.2
    # policy = -(-0.95) / 4 = 0.2375; critic: (0.25 + 1 + 1 + 2.25) / 4 = 1.125
    log_prob = torch.tensor([[1.1, 1.5], [1.5, 0.5]]).log().requires_grad_()
    values = torch.tensor([[0.5, 0.], [0., 0.5]], requires_grad=True)
    returns = torch.tensor([[1., 1.], [-1., -1.]])
    terms = compute_ppo_terms(log_prob, torch.zeros(2, 2), values, returns)
    entropy = 1 + math.log(2 * math.pi * 0.01)
    assert terms.policy.item() == pytest.approx(0.2375)
    assert terms.value.item() == pytest.approx(1.125)
    assert terms.loss.item() == pytest.approx(0.2375 + 0.5 * 1.125 - 0.01 * entropy)
    assert terms.clip_fraction.item() == 0.75
    kl = sum(r - 1 - math.log(r) for r in (1.1, 1.5, 1.5, 0.5)) / 4
    assert terms.approx_kl.item() == pytest.approx(kl, rel=1e-5)

    terms.loss.backward()
    # clipped ones that would gain by going further get none: the second (up) and the last (down);
    # d(-ratio * A / 4) / d log_prob = -ratio * A / 4
    torch.testing.assert_close(log_prob.grad, torch.tensor([[-0.55 / 4, 0.], [1.5 / 4, 0.]]))
    # only through the squared error: 0.5 * 2 * (value - return) / 4
    torch.testing.assert_close(values.grad, torch.tensor([[-0.5, -1.], [1., 1.5]]) / 4)


def test_half_precision_is_widened():
    low = [torch.rand(2, 3).bfloat16() for _ in range(3)]
    assert compute_ppo_terms(*low, torch.rand(2, 3)).loss.dtype == torch.float32
    assert compute_log_prob(torch.rand(2, 3, 2).bfloat16(), torch.rand(2, 3, 2).bfloat16()).dtype == torch.float32
