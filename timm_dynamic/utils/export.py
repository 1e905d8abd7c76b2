"""Folders that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads."""
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from .checkpoint import read_checkpoint
from .files import atomic_write, read_json, write_json

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
TASK_STATE = 'task.safetensors'  # state that only training needs: auxiliary heads, critics


class _Exported:
    """Wraps a model for timm's writer, which needs contiguous weights on the CPU that share no memory."""

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
        task_state: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        **config: Any,
) -> None:
    """Write a model as model.safetensors and config.json.

    Each file is replaced in one step, so the folder can be loaded at any time.

    Args:
        model: A model made by `timm.create_model`, unwrapped.
        folder: Folder to write; created if needed.
        data_config: Preprocessing that the model was trained with, from `timm.data.resolve_data_config`. It may have
            'notes' for the pretrained_cfg.
        state_dict: Weights to write instead of the model's own, e.g. their moving average.
        task_state: State dicts that only training needs, by name. They are written to task.safetensors.
        **config: Further entries of config.json that timm knows, e.g. `label_names`.

    Raises:
        ValueError: The norms of the model are fused; or it has a `check_export` that says that it could not be loaded
            again.
    """
    if state_dict is None and any(getattr(module, 'norms_fused', False) for module in model.modules()):
        raise ValueError(
            'The model cannot be saved: its batch norms are fused into its convolutions (for_inference, fuse_conv_bn), '
            'so its weights lack them. Save it before they are fused.')
    check_export: Any = getattr(model, 'check_export', None)
    if check_export is not None:
        check_export()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if data_config and 'notes' in data_config:  # timm keeps only those that it knows
        config['pretrained_cfg'] = {'notes': data_config['notes'], **config.get('pretrained_cfg', {})}
    with tempfile.TemporaryDirectory(dir=folder, prefix='.partial-') as tmp:
        save_for_hf(
            _Exported(model, state_dict), tmp, model_config=config, safe_serialization=True,  # type: ignore[arg-type]
            data_config=data_config)
        _clean_config(Path(tmp) / CONFIG)
        names = [WEIGHTS, CONFIG]
        if task_state:
            names.append(TASK_STATE)
            tensors = {f'{part}.{k}': v for part, state in task_state.items() for k, v in state.items()}
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, Path(tmp) / TASK_STATE)
        mode = (Path(tmp) / CONFIG).stat().st_mode  # follows the umask; safetensors files are the owner's only
        for name in names:
            (Path(tmp) / name).chmod(mode)
            with atomic_write(folder / name) as target:
                os.replace(Path(tmp) / name, target)


def _clean_config(path: Path) -> None:
    """Drop from model_args what timm finds elsewhere in config.json: transformers' TimmWrapper would give it twice."""
    config = read_json(path)
    if not config['pretrained_cfg'].get('notes'):
        config['pretrained_cfg'].pop('notes', None)
    args, in_chans = config.get('model_args', {}), config['pretrained_cfg']['input_size'][0]
    for name, value in (('num_classes', config['num_classes']), ('in_chans', in_chans)):
        if args.get(name) == value:
            del args[name]
    write_json(path, config)


def save_exit_cfg(folder: str | Path, exit_cfg: Mapping[str, Any]) -> None:
    """Store `DynamicNet.exit_cfg` in the config.json of an exported folder."""
    path = Path(folder) / CONFIG
    config = read_json(path)
    config.setdefault('model_args', {})['exit_cfg'] = dict(exit_cfg)
    write_json(path, config)


def read_task_state(folder: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read the `task_state` that `save_pretrained` wrote; empty if there is none."""
    path = Path(folder) / TASK_STATE
    out: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in (read_checkpoint(path) if path.is_file() else {}).items():
        part, _, name = key.partition('.')
        out.setdefault(part, {})[name] = value
    return out


def copy_pretrained(source: str | Path, folder: str | Path) -> None:
    """Copy an exported folder. On file systems with hard links the copy needs no disk space."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG, TASK_STATE):
        file = Path(source) / name
        if name == TASK_STATE and not file.exists():
            continue
        with atomic_write(folder / name) as target:
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)
