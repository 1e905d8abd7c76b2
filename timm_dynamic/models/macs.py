"""Multiply-adds of any model."""
import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch.utils.flop_counter import FlopCounterMode

from .dynamic_net import DynamicNet, on_meta

_logger = logging.getLogger(__name__)


@torch.no_grad()
def count_macs(model: Any, input_size: Sequence[int]) -> int | None:
    """Count the multiply-adds of one image, with torch's FlopCounterMode.

    Args:
        model: Any model. Of dynamic ones, all steps are counted.
        input_size: Channels, height, width.

    Returns:
        The number; None, with a warning, if the model does not run on an empty image.
    """
    model = unwrap_model(model)
    if isinstance(model, DynamicNet):
        return model.step_macs[-1]
    parameter = next(model.parameters())
    for meta in (True, False):  # a few models have tensors that do not move to meta
        try:
            counted = (on_meta(model) if meta else copy.deepcopy(model)).eval()
            image = torch.zeros(1, *input_size, device='meta' if meta else parameter.device, dtype=parameter.dtype)
            with FlopCounterMode(display=False) as counter:
                counted(image)
            return counter.get_total_flops() // 2
        except (RuntimeError, TypeError, NotImplementedError) as e:
            error = e
    _logger.warning(f'The multiply-adds of {type(model).__name__} cannot be counted: {error}')
    return None
