"""Attention that maps any number of sorted probabilities to a fixed number of values.

Paper: `CLCNet: Rethinking of Ensemble Modeling with Classification Confidence Network` - Yao et al., 2022,
https://arxiv.org/abs/2205.09612
"""
import torch

_BUMP_WIDTH = 0.01  # standard deviation of the bumps, on a scale where the tokens span 0..1
# With ten classes, the authors' nets give scores of up to 49, and a rounding error of the attention shows in the fourth
# decimal. Up to this number of classes, sums are taken in the authors' order, so that scores equal theirs.
FEW_CLASSES = 128


def restricted_attention(probabilities: torch.Tensor, logits: torch.Tensor, size: int = 100) -> torch.Tensor:
    """Map sorted probabilities to a fixed number of values with the attention of one query.

    The value of token j is x_j · g_j, where g_j is a Gaussian bump at j / n, sampled at `size` points from 0 to 1.

    Args:
        probabilities: Sorted in descending order [B, n].
        logits: Attention logits of the query for each token [B, n].
        size: Number of values.

    Returns:
        Values in descending order [B, size].
    """
    n, device = probabilities.shape[1], probabilities.device
    weights = logits.softmax(dim=1)
    points = torch.arange(size, device=device) * n
    distance = points - torch.arange(n, device=device)[:, None] * (size - 1)  # in units of 1 / (n · (size - 1))
    exact = n <= FEW_CLASSES and device.type != 'mps'
    distance = distance.to(torch.float64 if exact else torch.float32) / ((size - 1) * n * _BUMP_WIDTH)
    bumps = (-distance.square() / 2).exp().to(probabilities.dtype)
    if n <= FEW_CLASSES:
        mapped = (weights[:, None] @ (bumps * probabilities[..., None])).squeeze(1)
    else:
        mapped = (weights * probabilities) @ bumps
    return mapped.sort(dim=1, descending=True).values
