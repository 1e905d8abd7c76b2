"""Timing that can be compared."""
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def time_interleaved(
        functions: Mapping[str, Callable[[], Any]],
        repeats: int = 20,
        device: torch.device | str = 'cpu',
) -> dict[str, float]:
    """Time functions in turn, so that whatever else the machine does meets all of them alike.

    Args:
        functions: What to time, by name. Each is run twice beforehand.
        repeats: How often each is timed.
        device: Device that they run on; it is waited for.

    Returns:
        Median seconds of one call, by name.
    """
    return {name: median(values) for name, values in time_each(functions, repeats, device).items()}


def time_each(
        functions: Mapping[str, Callable[[], Any]],
        repeats: int = 20,
        device: torch.device | str = 'cpu',
) -> dict[str, list[float]]:
    """As `time_interleaved`, but gives the seconds of every repeat, by name: for ratios within a repeat."""
    device = torch.device(device)
    for function in functions.values():
        function(), function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            wait_for(device)
            start = time.perf_counter()
            function()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def get_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: There is none.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:  # the latter where torch was built without it
        raise ValueError(f"There is no device '{name}': {str(e).splitlines()[0]}") from e
    return torch.device(name)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()
