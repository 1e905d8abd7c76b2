"""Measured time of a model's exit policies, on the machine at hand."""
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from ..models.dynamic_net import DynamicNet
from ..models.exit_cfg import Policy
from ..utils.timing import time_call
from .collect import check_ready
from .engine import early_exit
from .stream import ExitStream


def clock_policies(
        model: DynamicNet,
        batches: Sequence[Any],
        policies: Mapping[str, Policy],
        static: Mapping[str, tuple[Any, Sequence[torch.Tensor]]] | None = None,
        repeats: int = 5,
        single_images: int = 20,
) -> list[dict[str, Any]]:
    """Measure how fast exit policies, all steps and static networks are: as a stream, and one image at a time.

    They take turns, so that other work on the machine slows all of them alike. Each runs once before. Policies run the
    batches as an `ExitStream` of the size of the first batch, and single images with `early_exit`.

    Args:
        model: The model, in eval mode. `DynamicNet.for_inference` makes it fast.
        batches: Batches of images, as the model's input, on its device.
        policies: Exit policies, by what the rows call them.
        static: Static networks in eval mode and their own batches, of as many images, by name.
        repeats: Number of measurements.
        single_images: Number of images that are run one at a time.

    Returns:
        A row for each static network, for 'all steps', and for each policy: 'clock' (its name), and medians of
        'images_per_s' and of 'ms_single', the mean milliseconds of an image alone.

    Raises:
        ValueError: There are no batches, or the model cannot exit early.
    """
    model = check_ready(model)
    if not batches:
        raise ValueError('There are no batches of images to clock with.')
    device = next(model.parameters()).device
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name, (net, own_batches) in (static or {}).items():
        ways[name] = _on_each(net, own_batches), _on_each(net, list(_singles(own_batches, single_images)))
    singles = list(_singles(batches, single_images))

    def all_steps(x: Any) -> None:
        for _ in model.forward_steps(x):
            pass

    ways['all steps'] = _on_each(all_steps, batches), _on_each(all_steps, singles)
    for name, policy in policies.items():
        stream = ExitStream(model, policy, _num_images(batches[0]))
        ways[name] = (
            partial(_drain, stream, batches), _on_each(partial(_exit_early, model, policy), singles))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with torch.no_grad():
        for both in ways.values():
            for run in both:
                run()
        for _ in range(repeats):
            for name, both in ways.items():
                seconds[name].append((time_call(both[0], device), time_call(both[1], device)))
    num = sum(map(_num_images, batches))
    return [{
        'clock': name, 'images_per_s': round(num / median(a for a, _ in values), 2),
        'ms_single': round(1e3 * median(b for _, b in values) / len(singles), 3),
    } for name, values in seconds.items()]


def describe_machine(device: torch.device) -> str:
    """Name of the processor, and on a CPU the number of threads that torch uses."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    name = platform.processor() or platform.machine()
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            name = next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        pass  # another system than Linux
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _on_each(function: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], None]:
    def run() -> None:
        for x in inputs:
            function(x)

    return run


def _drain(stream: ExitStream, batches: Sequence[Any]) -> None:
    for _ in stream.run(batches):
        pass


def _exit_early(model: DynamicNet, policy: Policy, x: Any) -> None:
    early_exit(model, x, policy)


def _num_images(x: Any) -> int:
    return len(x[0] if isinstance(x, tuple) else x)


def _singles(batches: Sequence[Any], num: int) -> Iterator[Any]:
    """The first images, each as a batch of its own."""
    for x in batches:
        for i in range(min(_num_images(x), num)):
            yield tuple(v[i:i + 1] for v in x) if isinstance(x, tuple) else x[i:i + 1]
        num -= _num_images(x)
        if num <= 0:
            return
