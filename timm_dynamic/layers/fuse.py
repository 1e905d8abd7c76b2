"""Batch normalisation as part of the convolution before it: for inference."""
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
    """Fold batch normalisations into the convolutions before them, in place. Outputs change by rounding only.

    Which convolution a normalisation follows is seen in a run: it is folded if it is given just what one convolution
    gave, each time, and nothing else is done with that. The model has other parameters afterwards: it can neither be
    trained nor take the weights it took.

    Args:
        model: A network in eval mode.
        run: Runs it, all of it that is ever used.

    Returns:
        How many were folded.

    Raises:
        ValueError: The model is in train mode.
    """
    if any(module.training for module in model.modules()):
        raise ValueError('Batch normalisation can be folded in eval mode only: call model.eval() first.')
    outputs: dict[int, tuple[Any, nn.Module]] = {}  # tensors are kept, so that no two have the same id
    uses = _Uses()
    before: dict[nn.Module, set[nn.Module | None]] = {}
    calls: dict[nn.Module, int] = {}

    def note_conv(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        outputs[id(output)] = (output, module)
        uses.count[id(output)] = 0  # another tensor may have had the id
        calls[module] = calls.get(module, 0) + 1

    def note_norm(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        before.setdefault(module, set()).add(outputs.get(id(args[0]), (None, None))[1])
        calls[module] = calls.get(module, 0) + 1

    hooks = []
    for module in model.modules():
        if type(module) in (nn.Conv2d, Conv2dSame):  # others may make their weights anew in each call
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
    folded = 0
    norm: Any
    for norm, convs in before.items():
        conv: Any = next(iter(convs))
        if len(convs) > 1 or conv is None or conv in shared or followers[conv] > 1 or calls[conv] != calls[norm]:
            continue
        replaced[conv] = fuse_conv_bn_eval(conv, norm)
        replaced[norm] = getattr(norm, 'act', nn.Identity())  # timm's normalisations may end with an activation
        folded += 1
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children passes over a module's second name
            if child is not None and child in replaced:
                setattr(parent, name, replaced[child])
    return folded


class _Uses(TorchDispatchMode):
    """Counts the operations that take a tensor, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count.update(id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
        return func(*args, **(kwargs or {}))
