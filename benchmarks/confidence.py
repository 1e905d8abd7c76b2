"""The confidence net: only what its score depends on, against all that the released code computes."""
import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_dynamic.benchmark import get_device, time_interleaved
from timm_dynamic.models import ConfidenceNet
from timm_dynamic.task.confidence_net import SparseMasks

NAME, HELP = 'confidence', 'score probabilities: the confidence net against one that computes all of the original'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--batch-size', '-b', type=int, default=1024, metavar='N', help='(%(default)s)')
    parser.add_argument('--classes', type=int, nargs='+', default=[1000], metavar='N', help='(%(default)s)')
    parser.add_argument('--part', type=int, default=32, metavar='N', help=(
        'rows that the straightforward version is timed on; each takes classes² numbers of memory (%(default)s)'))
    parser.add_argument('--device', default='cpu', metavar='DEVICE', help='(%(default)s)')
    parser.add_argument('--repeats', type=int, default=3, metavar='N', help='runs of each, by turns (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [row for n in args.classes
            for row in benchmark_confidence(args.batch_size, n, args.part, args.device, args.repeats)]


@torch.inference_mode()
def benchmark_confidence(
        batch_size: int = 1024,
        classes: int = 1000,
        part: int = 32,
        device: str = 'cpu',
        repeats: int = 3,
) -> list[dict[str, Any]]:
    """Time `ConfidenceNet` against a straightforward version, after checking that both give the same scores.

    Returns:
        A row for each: 'rows' scored in one call, median 'ms', 'rows_per_s', 'largest_mib' (the largest tensor that is
        made), and 'speedup' in rows per second over the straightforward version.

    Raises:
        ValueError: A number is not positive, or there is no such device.
        AssertionError: The scores differ.
    """
    if min(batch_size, classes, part, repeats) < 1:
        raise ValueError(
            f'Expected positive numbers, got batch size {batch_size}, {classes} classes, parts of {part}, {repeats} '
            'repeats.')
    get_device(device)
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.2, 9, batch_size)[:, None]
    logits = torch.randn(batch_size, classes, generator=generator) * scale
    x = logits.softmax(dim=1).sort(dim=1, descending=True).values.to(device)
    torch.manual_seed(0)
    net = ConfidenceNet().eval().to(device)
    masks = SparseMasks(net).eval().to(device)
    second = [torch.nn.Linear(1, width).to(device) for width in (10, 10, 100)]
    few = x[::max(1, batch_size // part)][:part]
    ways: dict[str, tuple[int, Callable[[], torch.Tensor]]] = {
        'straightforward': (len(few), lambda: straightforward(net, masks, second, few)),
        'timm_dynamic': (batch_size, lambda: net(x)),
    }
    torch.testing.assert_close(net(few), straightforward(net, masks, second, few), rtol=1e-4, atol=1e-4)
    seconds = time_interleaved({name: function for name, (_, function) in ways.items()}, repeats, device)
    slow = len(few) / seconds['straightforward']
    rows = []
    for name, (count, function) in ways.items():
        with _Largest() as largest:
            function()
        rows.append({
            'confidence_net': name, 'classes': classes, 'rows': count, 'device': device, 'ms': 1e3 * seconds[name],
            'rows_per_s': count / seconds[name], 'largest_mib': largest.size / 2 ** 20,
            'speedup': count / seconds[name] / slow})
    return rows


def straightforward(
        net: ConfidenceNet,
        masks: SparseMasks,
        second: list[torch.nn.Linear],
        x: torch.Tensor,
) -> torch.Tensor:
    """Scores [B] as the released code computes them: full attention twice, and masks.

    Args:
        net: The weights that the score depends on.
        masks: Weights of the masks.
        second: Query, key and value of the second attention, whose result is not used.
        x: Sorted probabilities [B, n].
    """
    size, n = net.mapping_dim, x.shape[1]
    u = torch.linspace(0, 1, size, dtype=torch.float64, device=x.device)
    centre = torch.arange(n, dtype=torch.float64, device=x.device)[:, None] / n
    bumps = (-(u - centre).square() / (2 * 0.01 ** 2)).exp().to(x.dtype)
    tokens = x[..., None]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (query @ key.transpose(1, 2) / math.sqrt(size)).softmax(dim=2) @ value

    mapped = attend(net.query(tokens), net.key(tokens), bumps * tokens)[:, 0].sort(dim=1, descending=True).values
    query, key, value = (layer(tokens) for layer in second)
    attend(query, key, value)
    first, *shared = net.shared
    features = torch.stack([step(first(mapped), shared) for step in net.steps])
    masks(net, mapped, features)
    return F.linear(features[..., :net.decision_dim].relu().sum(dim=0), net.head.weight)[:, 0]


class _Largest(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that is made."""
    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel() * value.element_size())
        return out
