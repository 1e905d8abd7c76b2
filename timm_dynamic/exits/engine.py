"""Running exit policies on models."""
from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from timm.task import evaluation_sample_limit
from timm.utils import unwrap_model

from ..models.dynamic_net import DynamicNet, ExitResult
from .table import ExitTable

if TYPE_CHECKING:
    from accelerate import Accelerator


def early_exit(model: Any, x: Any, policy: Any) -> ExitResult:
    """Predict with early exit. After each step the batch shrinks to the images that go on.

    Args:
        model: A `DynamicNet` in eval mode.
        x: Images [B, C, S, S], of any B; for cascades a tuple with one tensor per member.
        policy: T thresholds, as a float tensor or a sequence, or an `ExitPolicy`. With thresholds, an image stops at
            the first step whose confidence reaches its threshold, and at the last step in any case.

    Returns:
        `.logits` [B, num_classes], `.steps_used` [B] int64 in 1..T, and `.confidence` [B], in the order of x.

    Raises:
        ValueError: The policy does not fit the model, the images have a wrong shape, or the model is in train mode.
    """
    model = _ready(model)
    with torch.no_grad():
        return model.forward_exit(x, model.make_stop_rule(policy))


@torch.no_grad()
def collect_exit_table(model: Any, loader: Iterable[Any], accelerator: Accelerator | None = None) -> ExitTable:
    """Run all steps on all images once, and note how sure and how right the model is after each.

    Args:
        model: A `DynamicNet` in eval mode.
        loader: Gives (x, target) with x as for `early_exit` and class indices [B]. With several processes, a loader of
            this process's share as timm makes it (`distributed=True`): what its sampler adds to make the shares even
            is left out, and the table is in the order of the dataset.
        accelerator: For device, autocast and processes; without it, one process on the model's device.

    Returns:
        The same table in every process.

    Raises:
        ValueError: The model is in train mode, or the loader gives nothing.
    """
    model = _ready(model)
    device = next(model.parameters()).device
    confidences, ranks = [], []
    for x, target in loader:
        target = target.to(device)
        with accelerator.autocast() if accelerator else nullcontext():
            state = model.init_state(_to(x, device))
            batch_confidence, batch_ranks = [], []
            for t in range(model.num_steps):
                logits, state = model.step(t, state)
                batch_confidence.append(model.confidence(logits, state))
                batch_ranks.append(rank_of(logits, target))
        confidences.append(torch.stack(batch_confidence, dim=1).cpu())
        ranks.append(torch.stack(batch_ranks, dim=1).cpu())
    if not confidences:
        raise ValueError('The loader gives no images to collect an exit table from.')
    limit = evaluation_sample_limit(loader)
    confidence, rank = torch.cat(confidences)[:limit], torch.cat(ranks)[:limit]
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object  # late: importing accelerate takes a second
        join = torch.cat if limit is None else interleave
        confidence, rank = (join(shares) for shares in zip(*gather_object([(confidence, rank)])))
    return ExitTable(confidence, rank < 1, model.step_macs, correct_top5=rank < 5)


def _ready(model: Any) -> DynamicNet:
    model = unwrap_model(model)
    if not hasattr(model, 'num_steps'):  # what stands for a model will do
        raise ValueError(f'A {type(model).__name__} has no steps to exit after: expected a DynamicNet.')
    if model.training:
        raise ValueError('Early exit needs a model in eval mode: call model.eval() first.')
    return model


def _to(x: Any, device: torch.device, pin: bool = False) -> Any:
    """Images on a device; with `pin`, they are copied to a GPU without waiting for it."""
    if isinstance(x, (tuple, list)):
        return tuple(_to(v, device, pin) for v in x)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f'Expected images as a tensor, or a tuple of tensors, got {type(x).__name__}.')
    return x.pin_memory().to(device, non_blocking=True) if pin and not x.is_cuda else x.to(device)


def rank_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How many classes come before the true one [B]; of equal logits the first class comes first, as with argmax."""
    own = logits.gather(1, target[:, None])
    later = torch.arange(logits.shape[1], device=logits.device) >= target[:, None]
    ahead = ~(logits < own) & ~((logits == own) & later)  # all of them where logits are not numbers
    return ahead.sum(dim=1)


def interleave(shares: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Put the shares of processes that took every n-th sample each back into the order of the dataset."""
    out = torch.cat(shares)
    for rank, share in enumerate(shares):
        out[rank::len(shares)] = share
    return out
