"""Random numbers as a function of where we are, not of what happened before.

A run that was killed and resumed can only repeat an uninterrupted one if no random number depends on hidden
generator state. So every consumer (sample, batch, step) seeds itself from (seed, epoch, index, ...), and no
generator state has to be saved.
"""
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Fold integers and words into one well-mixed 63 bit seed, the same on every platform.

    Args:
        parts: E.g. seed, a word that names the consumer, epoch, index.
    """
    digest = hashlib.blake2b('/'.join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def _seed_all(seed: int, device: torch.device | None) -> None:
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace where CUDA is not in use
    if device is not None and device.type != 'cpu':
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def seeded(*parts: int | str, device: torch.device | None = None, keep: bool = False) -> Iterator[None]:
    """Run a block with Python's, numpy's and torch's global generators seeded from `parts`.

    Args:
        parts: See `derive_seed`.
        device: Accelerator whose generator the block may use. The CPU's is always seeded.
        keep: Leave the generators as the block leaves them. Saves the copying of states where nobody relies on them
            (workers; training steps, each of which begins with its own seed).
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
