"""Policy gradient: a patch policy learns from what its patches change in the prediction.

Papers:
* `Proximal Policy Optimization Algorithms` - Schulman et al., https://arxiv.org/abs/1707.06347
* `Glance and Focus: a Dynamic Approach to Reducing Spatial Redundancy in Image Classification` - Wang et al.,
  NeurIPS 2020, https://arxiv.org/abs/2010.05300

Pure functions. There are S = T - 1 actions for each of B images. Everything is computed in float32.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch


def compute_rewards(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Reward of an action: the change of the probability of the true class.

    Args:
        logits: Logits of all steps [S + 1, B, C].
        target: Class indices [B], int64.

    Returns:
        Rewards [S, B], without gradient.
    """
    confidence = logits.detach().float().softmax(dim=-1)[:, torch.arange(len(target), device=target.device), target]
    return confidence.diff(dim=0)


def compute_returns(rewards: torch.Tensor, gamma: float = 0.7) -> torch.Tensor:
    """Discounted sum of the rewards of an action and of the later ones.

    Args:
        rewards: Rewards [S, B].
        gamma: Discount.

    Returns:
        Returns [S, B].
    """
    returns, following = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for s in reversed(range(len(rewards))):
        following = returns[s] = rewards[s] + gamma * following
    return returns


def normalise_returns(
        returns: torch.Tensor,
        eps: float = 1e-5,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Shift and scale returns to mean 0 and (unbiased) standard deviation 1 over all actions and images.

    Args:
        returns: Returns [S, B].
        eps: Added to the standard deviation.
        reduce: Sums a tensor over all processes that share the batch.

    Returns:
        Normalised returns [S, B].
    """
    sums = torch.stack([torch.ones_like(returns).sum(), returns.sum()])
    count, total = reduce(sums) if reduce else sums
    centred = returns - total / count
    squares = centred.square().sum()
    squares = reduce(squares) if reduce else squares
    return centred / ((squares / (count - 1).clamp(min=1)).sqrt() + eps)


def compute_log_prob(actions: torch.Tensor, means: torch.Tensor, std: float = 0.1) -> torch.Tensor:
    """Log-density of actions under independent normal distributions.

    Args:
        actions: Actions as taken, i.e. clamped to [0, 1] [S, B, 2]. They get no gradient.
        means: Means that the policy proposed [S, B, 2].
        std: Standard deviation of each coordinate.

    Returns:
        Log-densities [S, B], at the clamped actions.
    """
    z = (actions.detach().float() - means.float()) / std
    return -0.5 * z.square().sum(dim=-1) - means.shape[-1] * math.log(std * math.sqrt(2 * math.pi))


class PolicyGradientTerms(NamedTuple):
    """Loss, its parts, and measures of progress, all scalars."""
    loss: torch.Tensor
    policy: torch.Tensor  # clipped surrogate
    value: torch.Tensor  # mean squared error of the critic
    entropy: torch.Tensor
    approx_kl: torch.Tensor  # divergence of the new policy from the old one
    clip_fraction: torch.Tensor  # share of actions whose ratio is out of range


def compute_ppo_terms(
        log_prob: torch.Tensor,
        old_log_prob: torch.Tensor,
        values: torch.Tensor,
        returns: torch.Tensor,
        std: float = 0.1,
        epsilon: float = 0.2,
        value_coeff: float = 0.5,
        entropy_coeff: float = 0.01,
) -> PolicyGradientTerms:
    """Clipped surrogate loss, with a critic.

    Args:
        log_prob: Log-densities of the actions under the policy [S, B].
        old_log_prob: Log-densities at the time when the actions were taken [S, B]. They get no gradient.
        values: Returns that the critic predicts [S, B]. The advantage is the difference between the two.
        returns: Normalised returns [S, B].
        std: Standard deviation of the policy. It determines the entropy, which is constant.
        epsilon: The ratio of new to old density is clipped to 1 ± epsilon.
        value_coeff: Weight of the critic's mean squared error.
        entropy_coeff: Weight of the entropy.
    """
    log_ratio = log_prob.float() - old_log_prob.detach().float()
    ratio = log_ratio.exp()
    values = values.float()
    advantage = returns - values.detach()
    policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage).mean()
    value = (values - returns).square().mean()
    entropy = torch.full_like(value, 1 + math.log(2 * math.pi) + 2 * math.log(std))  # of two coordinates
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > epsilon).float().mean()
    loss = policy + value_coeff * value - entropy_coeff * entropy
    return PolicyGradientTerms(loss, policy, value, entropy, approx_kl, clip_fraction)
