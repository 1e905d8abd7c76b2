"""Running an exit policy on one batch."""
from collections.abc import Sequence

import torch
from torch import nn

from ..models.dynamic_net import ExitResult
from ..models.exit_cfg import Policy
from .collect import check_ready


def early_exit(
        model: nn.Module,
        x: torch.Tensor | Sequence[torch.Tensor],
        policy: Policy | None = None,
) -> ExitResult:
    """Predict with early exit. After each step the batch shrinks to the images that continue.

    Args:
        model: A `DynamicNet` in eval mode.
        x: Images [B, C, S, S], of any B; for cascades a tuple with one tensor per member.
        policy: T thresholds, as a float tensor or a sequence, or an `ExitPolicy`. With thresholds, an image stops at
            the first step whose confidence reaches its threshold, or at the last step. Default: the exit policy that
            the model has, see `DynamicNet.set_budget`.

    Returns:
        `.logits` [B, num_classes], `.steps_used` [B] int64 in 1..T, and `.confidence` [B], in the order of x.

    Raises:
        ValueError: The policy does not fit the model, or there is none; the images have a wrong shape; or the model is
            in train mode.
    """
    model = check_ready(model)
    with torch.no_grad():
        return model.forward_exit(x, model.make_stop_rule(policy))
