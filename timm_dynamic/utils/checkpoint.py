"""One door for weights from outside: files, folders and mappings; ours, timm's and the authors'.

timm's own door is not enough: it refuses the numpy scalars in the authors' files, takes no folder or mapping, and
gives up strictness when the number of classes differs, so that a foreign file ends as random weights in silence.
Here nothing in a file is ever executed, and every key is accounted for or named in an error.
"""
import argparse
import hashlib
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from timm.models import clean_state_dict, get_model_traits, load_pretrained
from torch import nn

from .errors import UserError

_logger = logging.getLogger(__name__)

# Weights within a checkpoint, in the order of preference: timm's averaged and plain ones, then others' habits.
_EMA_KEYS = ('state_dict_ema', 'model_ema')
_WEIGHT_KEYS = ('state_dict', 'model', 'net')
_SUFFIXES = ('.safetensors', '.pth.tar', '.pth', '.pt', '.bin', '.tar', '.th')

# What files hold beside tensors: numpy numbers (the authors'), parsed arguments (timm's). Nothing else is let in.
_NUMPY_CORE: Any = np.core if np.__version__.startswith('1.') else np._core  # type: ignore[attr-defined]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace, np.ndarray, np.dtype,
    *(getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith('DType') and name != 'ObjectDType'),
    *((getattr(_NUMPY_CORE.multiarray, fn), f'{module}.multiarray.{fn}')
      for fn in ('scalar', '_reconstruct') for module in ('numpy.core', 'numpy._core')),
]


class CheckpointError(UserError, RuntimeError):
    """A file of weights is missing, broken, unsafe, or made for something else."""


def _find_weights(folder: Path) -> Path:
    preferred = folder / 'model.safetensors'
    if preferred.is_file():
        return preferred
    for suffix in _SUFFIXES:
        found = sorted(p for p in folder.glob(f'*{suffix}') if p.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"'{folder}' holds several {suffix} files ({', '.join(p.name for p in found[:5])}): name one.")
    raise CheckpointError(f"'{folder}' holds no weights: expected model.safetensors or one of {', '.join(_SUFFIXES)}.")


def read_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint file without executing anything in it.

    Args:
        path: A .safetensors file, a file of torch.save, or a folder that holds one of them.

    Returns:
        What the file holds: a dict of tensors, or whatever was saved around them.

    Raises:
        CheckpointError: The file is missing, truncated, no checkpoint, or asks for code to be run.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_weights(path)
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at '{path}'.")
    broken = f"Cannot read '{path}' ({path.stat().st_size:,} bytes): truncated, or no checkpoint. ({{}})"
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path, device='cpu')
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # says that it may fail; we say if it does
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        asked = re.search(r'Unsupported (?:global|class)[^\n]*?([\w.]+\.\w+)', str(e))
        if asked:
            raise CheckpointError(
                f"'{path}' is a pickle that asks for code to be run ({asked[1]}); it was refused and nothing of it was "
                'executed. Expected tensors and plain values only.') from None
        raise CheckpointError(broken.format(_first(e))) from e
    except Exception as e:  # readers of damaged files raise whatever comes first, IndexError and struct.error too
        raise CheckpointError(broken.format(_first(e))) from e


def _first(error: BaseException) -> str:
    text = re.sub(r'.*WeightsUnpickler error: ', '', str(error), flags=re.DOTALL)  # under a page of torch's advice
    return text.strip().split('\n')[0][:200] or type(error).__name__


def read_state_dict(path: str | Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Read the weights from a checkpoint file or folder.

    Args:
        path: See `read_checkpoint`.
        use_ema: Prefer averaged weights where the file holds them, as timm does.

    Returns:
        Tensors by name, without `module.` and `_orig_mod.` prefixes.

    Raises:
        CheckpointError: See `read_checkpoint`; or no tensors are found.
    """
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, Mapping):
        for key in (*(_EMA_KEYS if use_ema else ()), *_WEIGHT_KEYS):
            if isinstance(checkpoint.get(key), Mapping):
                checkpoint = checkpoint[key]
                break
    if not isinstance(checkpoint, Mapping) or not any(isinstance(v, torch.Tensor) for v in checkpoint.values()) or \
            not all(isinstance(k, str) for k in checkpoint):
        names = list(checkpoint)[:5] if isinstance(checkpoint, Mapping) else [type(checkpoint).__name__]
        held = ', '.join(map(str, names))
        raise CheckpointError(f"'{path}' holds no weights: expected tensors by name, found {held or 'nothing'}.")
    return clean_state_dict(dict(checkpoint))


def hash_weights(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names and values of weights, in hexadecimal. It does not depend on their order."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_mismatch(missing: list[str], unexpected: list[str], shapes: list[str] = ()) -> str:  # type: ignore[assignment]
    """Say which keys differ, naming the first of each kind."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys are missing (first: '{missing[0]}')")
    if unexpected:
        parts.append(f"{len(unexpected)} are unexpected (first: '{unexpected[0]}')")
    if shapes:
        parts.append(f'{len(shapes)} have another shape (first: {shapes[0]})')
    return '; '.join(parts)


def _names(value: Any) -> tuple[str, ...]:
    return () if not value else (value,) if isinstance(value, str) else tuple(value)


def _is_usable(value: Any, target: torch.Tensor) -> bool:
    """Whether copying keeps what a value says: quantised and complex numbers would be cast to something else."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.is_meta <= target.is_meta and (
        value.is_floating_point() or not target.is_floating_point())


def load_weights(
        model: nn.Module,
        source: str | Path | Mapping[str, Any],
        filter_fn: Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]] | None = None,
        adapt: bool = False,
        reset_head: bool = False,
        use_ema: bool = True,
        label: str | None = None,
) -> None:
    """Load weights into a timm model, all of them or none.

    Args:
        model: A model made by timm's builder.
        source: File, folder, or a state dict.
        filter_fn: The family's `checkpoint_filter_fn`: maps foreign keys onto the model's.
        adapt: Do as timm does with pretrained weights: a first convolution for another number of input channels is
            converted, a classifier for another number of classes is left at its initial values, and without classes it
            is left out. Otherwise all must fit.
        reset_head: Leave the classifier at its initial values even where it would fit (with `adapt`).
        use_ema: Prefer averaged weights.
        label: What to call the source in messages.

    Raises:
        CheckpointError: The weights are not for this model; the first missing and unexpected keys are named, and the
            model is as it was.
    """
    name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
    label = label or ('The state dict' if isinstance(source, Mapping) else f"'{source}'")
    state_dict = dict(source) if isinstance(source, Mapping) else read_state_dict(source, use_ema=use_ema)
    if filter_fn is not None:
        try:
            state_dict = dict(filter_fn(state_dict, model))
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as e:
            raise CheckpointError(f'{label} does not fit {name}: its keys cannot be mapped ({_first(e)}).') from e

    cfg = {k: v for k, v in getattr(model, 'pretrained_cfg', {}).items() if k not in ('source', 'state_dict')}
    target = model.state_dict()
    traits = get_model_traits(model)
    convs = {f'{c}.weight' for c in _names(traits.get('first_conv', cfg.get('first_conv')))} if adapt else set()
    heads = {f'{c}.{p}' for c in _names(cfg.get('classifier')) for p in ('weight', 'bias')} if adapt else set()
    num_classes = getattr(model, 'num_classes', cfg.get('num_classes', 1000))
    # Without classes, as for features, there is no classifier in the model at all.
    heads_differ = not num_classes or any(
        k in state_dict and k in target and getattr(state_dict[k], 'shape', None) != target[k].shape for k in heads)
    drop_heads = heads if reset_head or heads_differ else set()

    missing = [k for k in target if k not in state_dict and k not in drop_heads]
    unexpected = [k for k in state_dict if k not in target and (k not in drop_heads or num_classes)]
    shapes = [
        f"'{k}' {tuple(v.shape)} instead of {tuple(target[k].shape)}"
        for k, v in state_dict.items()
        if k in target and getattr(v, 'shape', None) != target[k].shape and k not in drop_heads | convs
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(f'{label} does not fit {name}: {describe_mismatch(missing, unexpected, shapes)}.')
    unusable = next((k for k, v in target.items() if k in state_dict and not _is_usable(state_dict[k], v)), None)
    if unusable:
        value = state_dict[unusable]
        found = f'{value.device} {value.layout} {value.dtype}'.replace('torch.', '') \
            if isinstance(value, torch.Tensor) else type(value).__name__
        raise CheckpointError(
            f"{label} does not fit {name}: '{unusable}' is {found}, expected a dense tensor of floating point numbers.")

    # The channels that the weights were made for, read off the weights themselves: a user's own file may differ
    # from what the pretrained_cfg says about the published ones.
    input_size = cfg.get('input_size') or (3, 224, 224)
    channels = source_channels = traits.get('in_chans', input_size[0])
    for k in convs & state_dict.keys():
        if state_dict[k].shape[1] != target[k].shape[1]:
            source_channels = state_dict[k].shape[1] * channels // target[k].shape[1]
    cfg.update(
        state_dict=state_dict,
        input_size=(source_channels, *input_size[1:]),
        label_offset=0,
        num_classes=-1 if drop_heads else num_classes,
    )
    if drop_heads:
        where = f'of {name} is left at its initial values ({num_classes} classes)' if num_classes else 'is left out'
        _logger.info(f'{label}: the classifier {where}.')
    load_pretrained(model, pretrained_cfg=cfg, num_classes=num_classes, in_chans=channels, strict=not drop_heads)
