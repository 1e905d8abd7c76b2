"""Folders that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads."""
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from .files import atomic_write

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'


class _Exported:
    """A model to timm's writer, with weights it can write: contiguous, on the CPU, sharing no memory."""

    def __init__(self, model: nn.Module, state_dict: dict[str, torch.Tensor] | None) -> None:
        self._model = model
        self._state_dict = state_dict or model.state_dict()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in self._state_dict.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def save_pretrained(
        model: nn.Module,
        folder: str | Path,
        data_config: dict[str, Any] | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **config: Any,
) -> None:
    """Write a model as model.safetensors and config.json.

    Each file is replaced in one step, so that the folder can be loaded at any moment.

    Args:
        model: A model made by `timm.create_model`, unwrapped.
        folder: Made if needed.
        data_config: Preprocessing that the model was trained with, as `timm.data.resolve_data_config` gives it.
        state_dict: Weights to write in place of the model's own (e.g. their moving average).
        **config: Further entries of config.json that timm knows, e.g. `label_names`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.partial-') as tmp:
        save_for_hf(
            _Exported(model, state_dict), tmp, model_config=config, safe_serialization=True,  # type: ignore[arg-type]
            data_config=data_config)
        for name in (WEIGHTS, CONFIG):
            with atomic_write(folder / name) as target:
                os.replace(Path(tmp) / name, target)


def copy_pretrained(source: str | Path, folder: str | Path) -> None:
    """Copy an exported folder, without taking disk space where the file system has hard links."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        with atomic_write(folder / name) as target:
            try:
                os.link(Path(source) / name, target)
            except OSError:
                shutil.copyfile(Path(source) / name, target)
