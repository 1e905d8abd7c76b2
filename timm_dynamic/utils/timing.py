"""Timing candidates by turns."""
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch

K = TypeVar('K', bound=Hashable)


def time_interleaved(
        functions: Mapping[K, Callable[[], Any]],
        repeats: int = 20,
        device: torch.device | str = 'cpu',
) -> dict[K, float]:
    """Time functions by turns, so that other work on the machine slows all of them alike.

    Args:
        functions: What to time. Each is run twice before.
        repeats: How often each is timed.
        device: Device that they run on.

    Returns:
        Median seconds of one call.
    """
    return {name: median(values) for name, values in time_each(functions, repeats, device).items()}


def time_each(
        functions: Mapping[K, Callable[[], Any]],
        repeats: int = 20,
        device: torch.device | str = 'cpu',
) -> dict[K, list[float]]:
    """As `time_interleaved`, but give the seconds of every repeat: for ratios within a repeat."""
    device = torch.device(device)
    for function in functions.values():
        function(), function()
    seconds: dict[K, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(time_call(function, device))
    return seconds


def time_call(function: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Mean seconds of a call, all that it started on the device included."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait_for(device)
    return (time.perf_counter() - start) / times


def get_device(name: str) -> torch.device:
    """Make a device of its name.

    Raises:
        ValueError: There is no such device.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:  # the latter where torch was built without it
        raise ValueError(f"There is no device '{name}': {str(e).splitlines()[0]}") from e
    return torch.device(name)


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()
