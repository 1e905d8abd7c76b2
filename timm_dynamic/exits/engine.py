"""Running an exit policy on one batch."""
from typing import Any

import torch

from ..models.dynamic_net import ExitResult
from .collect import check_ready


def early_exit(model: Any, x: Any, policy: Any) -> ExitResult:
    """Predict with early exit. After each step the batch shrinks to the images that continue.

    Args:
        model: A `DynamicNet` in eval mode.
        x: Images [B, C, S, S], of any B; for cascades a tuple with one tensor per member.
        policy: T thresholds, as a float tensor or a sequence, or an `ExitPolicy`. With thresholds, an image stops at
            the first step whose confidence reaches its threshold, or at the last step.

    Returns:
        `.logits` [B, num_classes], `.steps_used` [B] int64 in 1..T, and `.confidence` [B], in the order of x.

    Raises:
        ValueError: The policy does not fit the model, the images have a wrong shape, or the model is in train mode.
    """
    model = check_ready(model)
    with torch.no_grad():
        return model.forward_exit(x, model.make_stop_rule(policy))
