"""Patch policy: where to look next."""
from typing import Any

import torch
from torch import nn

from .autocast import no_autocast


class PatchPolicy(nn.Module):
    """Proposes the next patch from the last feature map and the hidden state, which depends on the earlier ones.

    State encoder -> GRU -> sigmoid(Linear): the mean of the action. Training samples actions around it. The critic is
    part of the training task. Under autocast, all of it runs in float32: half precision moves positions by pixels.

    Args:
        in_chans: Channels of the feature map C.
        map_size: Height and width of the feature map.
        encoder: 'linear' flattens the map (two layers); 'conv' narrows it with a 1x1 convolution first (two layers,
            with far fewer parameters).
        hidden_size: Width of the GRU H. Default: 1024 for 'linear', 256 for 'conv'.
        width: Width of the encoder's first layer. Default: 2048 for 'linear', 32 for 'conv'.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chans: int,
            map_size: tuple[int, int],
            encoder: str = 'linear',
            hidden_size: int | None = None,
            width: int | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        area = map_size[0] * map_size[1]
        if encoder == 'linear':
            hidden_size, width = hidden_size or 1024, width or 2048
            self.state_encoder = nn.Sequential(
                nn.Linear(in_chans * area, width, **dd), nn.ReLU(), nn.Linear(width, hidden_size, **dd), nn.ReLU())
        elif encoder == 'conv':
            hidden_size, width = hidden_size or 256, width or 32
            self.state_encoder = nn.Sequential(
                nn.Conv2d(in_chans, width, 1, bias=False, **dd), nn.ReLU(), nn.Flatten(),
                nn.Linear(width * area, hidden_size, **dd), nn.ReLU())
        else:
            raise ValueError(f"policy must be 'linear' or 'conv', got {encoder!r}.")
        self.flatten = encoder == 'linear'
        self.hidden_size = hidden_size
        self.gru = nn.GRUCell(hidden_size, hidden_size, **dd)
        self.actor = nn.Linear(hidden_size, 2, **dd)

    def forward(
            self,
            feature_map: torch.Tensor,
            hidden: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Propose the next patch.

        Args:
            feature_map: Feature map of the step before [B, C, h, w].
            hidden: Hidden state [B, H]; None at the first focus step.

        Returns:
            Mean of the action, row and column in [0, 1] [B, 2], float32; and the new hidden state [B, H].
        """
        dtype = self.actor.weight.dtype
        with no_autocast(feature_map):
            x = feature_map.flatten(1) if self.flatten else feature_map
            hidden = self.gru(self.state_encoder(x.to(dtype)), hidden)
            return self.actor(hidden).float().sigmoid(), hidden
