"""Fusing batch norms into the convolutions before them, for inference."""
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.inference_mode(False)  # or the new weights could be used in inference mode only
def fuse_conv_bn(model: nn.Module, run: Callable[[], Any]) -> int:
    """Fuse batch norms into the convolutions before them, in place. Outputs change by rounding errors only.

    The model then has an attribute `norms_fused`, by which `save_pretrained` and `DynamicNet.train` refuse it. A run
    shows which convolution a norm follows. A norm is fused if its input is always the output of one convolution,
    and nothing else uses that output. The parameters of the model change: it can no longer be trained or load weights.

    Args:
        model: A network in eval mode.
        run: Function that runs every part of the network that is ever used.

    Returns:
        Number of fused norms.

    Raises:
        ValueError: The model is in train mode.
    """
    if any(module.training for module in model.modules()):
        raise ValueError('Batch norms can only be fused in eval mode: call model.eval() first.')
    outputs: dict[int, tuple[Any, nn.Module]] = {}  # holds the tensors, so that no two have the same id
    uses = _Uses()
    before: dict[nn.Module, set[nn.Module | None]] = {}
    calls: dict[nn.Module, int] = {}

    def note_conv(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        outputs[id(output)] = (output, module)
        uses.count[id(output)] = 0  # an earlier tensor may have had the same id
        calls[module] = calls.get(module, 0) + 1

    def note_norm(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        before.setdefault(module, set()).add(outputs.get(id(args[0]), (None, None))[1])
        calls[module] = calls.get(module, 0) + 1

    hooks = []
    for module in model.modules():
        if type(module) in (nn.Conv2d, Conv2dSame):  # others may compute their weights in each call
            hooks.append(module.register_forward_hook(note_conv))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(note_norm))
    try:
        with torch.no_grad(), uses:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    followers = Counter(conv for convs in before.values() for conv in convs)
    shared = {conv for key, (_, conv) in outputs.items() if uses.count[key] != 1}
    replaced: dict[Any, nn.Module] = {}
    fused = 0
    norm: Any
    for norm, convs in before.items():
        conv: Any = next(iter(convs))
        if len(convs) > 1 or conv is None or conv in shared or followers[conv] > 1 or calls[conv] != calls[norm]:
            continue
        replaced[conv] = fuse_conv_bn_eval(conv, norm)
        replaced[norm] = getattr(norm, 'act', nn.Identity())  # timm's norms may end with an activation
        fused += 1
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children skips the second name of a module
            if child is not None and child in replaced:
                setattr(parent, name, replaced[child])
    if fused:
        model.norms_fused = True  # type: ignore[assignment]
    return fused


class _Uses(TorchDispatchMode):
    """Counts the operations on each tensor, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count.update(id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
        return func(*args, **(kwargs or {}))
