"""Random numbers that depend only on the position in a run, e.g. on (seed, epoch, index).

A resumed run must draw the same random numbers as an uninterrupted run. So every sample, batch and step derives its own
seed from its position, and no generator state has to be saved.
"""
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from integers and words by hashing. It is the same on every platform.

    Args:
        parts: E.g. the seed of the run, a word for the purpose, epoch, index.
    """
    digest = hashlib.blake2b('/'.join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def _seed_all(seed: int, device: torch.device | None) -> None:
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.default_generator.manual_seed(seed)  # faster than torch.manual_seed, which formats a stack trace without CUDA
    if device is not None and device.type != 'cpu':
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def seeded(*parts: int | str, device: torch.device | None = None, keep: bool = False) -> Iterator[None]:
    """Run a block with the global generators of Python, numpy and torch seeded from `parts`. Restore them afterwards.

    Args:
        parts: See `derive_seed`.
        device: Accelerator whose generator is seeded, too. That of the CPU is always seeded.
        keep: Do not restore the generators. This is faster, for code that seeds them again before the next use
            (workers, training steps).
    """
    seed = derive_seed(*parts)
    if keep:
        _seed_all(seed, device)
        yield
        return
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device is None or device.type == 'cpu' else [device]
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else 'cuda'):
        try:
            _seed_all(seed, device)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
