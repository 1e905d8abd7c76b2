"""Logits of a cascade's members, kept in parts while they are collected, so that a killed run goes on."""
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..utils import atomic_write


class FeatureParts:
    """Files with the features of some images each. They allow a killed run to continue.

    Args:
        folder: Folder of the files.
        key: Everything that the features depend on. Files with another key are ignored and removed.
    """

    def __init__(self, folder: Path, key: Any) -> None:
        self.folder = folder
        self.fingerprint = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob('part-*.safetensors'))

    def begin(self, accelerator: Accelerator) -> set[int]:
        """Remove files with another key. Returns the indices of the finished images, the same in every process."""
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._paths():
                if self._read(path) is None:
                    path.unlink()
        accelerator.wait_for_everyone()
        done = {i for path in self._paths() for i in self._indices(path)}
        accelerator.wait_for_everyone()  # no process writes before all have read
        return done

    def write(self, indices: Sequence[int], logits: torch.Tensor, target: torch.Tensor) -> None:
        path = self.folder / f'part-{indices[0]:08d}-{len(indices)}.safetensors'
        tensors = {'index': torch.tensor(indices), 'logits': logits.contiguous(), 'target': target.contiguous()}
        with atomic_write(path) as tmp:
            save_file(tensors, tmp, metadata={'of': self.fingerprint})

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read logits [N, T, C] and targets [N] of all images, in the order of the dataset."""
        parts = [part for path in self._paths() if (part := self._read(path)) is not None]
        order = torch.cat([part['index'] for part in parts]).argsort()
        return torch.cat([part['logits'] for part in parts])[order], torch.cat([p['target'] for p in parts])[order]

    def _read(self, path: Path) -> dict[str, torch.Tensor] | None:
        """Read one file. None if it has another key, or is damaged."""
        try:
            with safe_open(path, framework='pt') as f:
                if (f.metadata() or {}).get('of') == self.fingerprint:
                    return {name: f.get_tensor(name) for name in ('index', 'logits', 'target')}
        except (SafetensorError, OSError):
            pass
        return None

    def _indices(self, path: Path) -> list[int]:
        with safe_open(path, framework='pt') as f:
            return f.get_tensor('index').tolist()

    def remove(self) -> None:
        for path in self._paths():
            path.unlink()
