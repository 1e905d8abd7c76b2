"""Logistic regression."""
import torch
from torch.nn.functional import softplus


def logistic_regression(basis: torch.Tensor, positive: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    """Fit weights with a Gaussian prior of precision 1, by Newton's method with halved steps where needed.

    Args:
        basis: [N, K] float64.
        positive: How many of the samples of each row are positive [N] float64.
        count: Samples of each row [N] float64; None for one each.

    Returns:
        [K] float64: the log-odds of a positive sample are `basis @ weight`.
    """
    count = torch.ones_like(positive) if count is None else count
    weight = torch.zeros(basis.shape[1], dtype=basis.dtype)

    def loss(w: torch.Tensor) -> float:
        z = basis @ w
        return float((count * softplus(z) - positive * z).sum() + w.square().sum() / 2)

    value = loss(weight)
    for _ in range(30):
        p = (basis @ weight).sigmoid()
        slope = basis.T @ (count * p - positive) + weight
        curve = (basis * (count * p * (1 - p))[:, None]).T @ basis + torch.eye(len(weight), dtype=basis.dtype)
        step = torch.linalg.solve(curve, slope)
        size = 1.0
        while (new := loss(weight - size * step)) > value and size > 1e-4:
            size /= 2
        if value - new < 1e-7 * (1 + abs(value)):
            break
        weight, value = weight - size * step, new
    return weight
