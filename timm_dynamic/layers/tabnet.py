"""Layers of TabNet that the confidence net is made of.

Paper: `TabNet: Attentive Interpretable Tabular Learning` - Arik and Pfister, AAAI 2021, https://arxiv.org/abs/1908.07442
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_SQRT_HALF = math.sqrt(0.5)


class GhostBatchNorm(nn.BatchNorm1d):
    """Batch norm whose statistics in training are those of equal parts of the batch.

    Args:
        num_features: Width.
        virtual_batch_size: Largest size of a part.
        momentum: Momentum of the running statistics.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            num_features: int,
            virtual_batch_size: int = 128,
            momentum: float = 0.02,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, momentum=momentum, device=device, dtype=dtype)
        self.virtual_batch_size = virtual_batch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.shape[0] <= self.virtual_batch_size:
            return super().forward(x)
        parts = math.ceil(x.shape[0] / self.virtual_batch_size)
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in x.chunk(parts)])


def tabnet_linear(in_features: int, out_features: int, gain: float, **dd: Any) -> nn.Linear:
    """Linear layer without bias, with TabNet's initial values: normal, standard deviation gain · in_features^-1/4."""
    layer = nn.Linear(in_features, out_features, bias=False, **dd)
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight, std=gain * in_features ** -0.25)
    return layer


class FeatureTransformer(nn.Module):
    """Gated linear layers with residuals: shared ones, which the caller passes in, then its own.

    Args:
        width: Width of the output. Layers are twice as wide: half of their output gates the other half.
        num_shared: Number of shared layers, at least one. The first has no residual.
        num_own: Number of own layers.
        **norm_args: For `GhostBatchNorm`. Every layer has its own norm.
    """

    def __init__(self, width: int, num_shared: int, num_own: int, **norm_args: Any) -> None:
        super().__init__()
        dd = {k: norm_args[k] for k in ('device', 'dtype') if k in norm_args}
        self.layers = nn.ModuleList([tabnet_linear(width, 2 * width, math.sqrt(2), **dd) for _ in range(num_own)])
        self.norms = nn.ModuleList([GhostBatchNorm(2 * width, **norm_args) for _ in range(num_shared + num_own)])

    def forward(self, projected: torch.Tensor, shared: Sequence[nn.Module]) -> torch.Tensor:
        """Transform.

        Args:
            projected: Output of the first shared layer [B, 2 · width]; it is the same for all transformers.
            shared: The other shared layers.

        Returns:
            Features [B, width].
        """
        x = F.glu(self.norms[0](projected))
        for layer, norm in zip([*shared, *self.layers], list(self.norms)[1:], strict=True):
            x = (x + F.glu(norm(layer(x)))) * _SQRT_HALF
        return x
