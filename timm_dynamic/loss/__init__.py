from .focus_picking import FocusPickingLoss, FocusPickingTerms
from .policy_gradient import (
    PolicyGradientTerms,
    compute_log_prob,
    compute_ppo_terms,
    compute_returns,
    compute_rewards,
    normalise_returns,
)

__all__ = [
    'FocusPickingLoss',
    'FocusPickingTerms',
    'PolicyGradientTerms',
    'compute_log_prob',
    'compute_ppo_terms',
    'compute_returns',
    'compute_rewards',
    'normalise_returns',
]
