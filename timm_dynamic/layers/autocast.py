"""Layers that stay in float32 under autocast."""
from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Context in which operations on the device of a tensor run in the dtype of their arguments."""
    # The meta device, on which costs are counted, has no autocast.
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else nullcontext()
