"""Images that were normalised for one network, as another network expects them."""
from collections.abc import Sequence

import torch
from torch import nn


def per_channel(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Mean or standard deviation for each channel: as in timm, their average if there are not as many."""
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


class Renormalize(nn.Module):
    """Turns images normalised with one mean and standard deviation into images normalised with another.

    Args:
        mean: Mean of each channel that the images are normalised with.
        std: Standard deviation of each channel that the images are normalised with.
        new_mean: Mean of each channel that the other network expects.
        new_std: Standard deviation of each channel that the other network expects.
        in_chans: Number of channels.
        device: Device of the buffers.
        dtype: Dtype of the buffers.
    """
    scale: torch.Tensor | None
    shift: torch.Tensor | None

    def __init__(
            self,
            mean: Sequence[float],
            std: Sequence[float],
            new_mean: Sequence[float],
            new_std: Sequence[float],
            in_chans: int = 3,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        old, new = (list(zip(per_channel(m, in_chans), per_channel(s, in_chans))) for m, s in (
            (mean, std), (new_mean, new_std)))
        # The image is x * std + mean; normalised again, it is (x * std + mean - new_mean) / new_std.
        scale = [std / new_std for (_, std), (_, new_std) in zip(old, new)]
        shift = [(mean - new_mean) / new_std for (mean, _), (new_mean, new_std) in zip(old, new)]
        self.is_identity = old == new
        for name, values in (('scale', scale), ('shift', shift)):
            value = None if self.is_identity else torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convert images [B, C, H, W]. They are returned as they are if both normalisations are equal."""
        if self.scale is None or self.shift is None:
            return x
        return x * self.scale.to(x.dtype) + self.shift.to(x.dtype)
