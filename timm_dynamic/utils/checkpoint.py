"""Reading weights from files and loading them into models: ours, timm's and the authors'.

timm's own functions are not enough: they refuse the numpy scalars in the authors' files, and are not strict when the
number of classes differs, so that a foreign file silently leaves random weights. Here nothing in a file is executed,
and every key is used or named in an error.
"""
import argparse
import hashlib
import logging
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from timm.models import clean_state_dict, get_model_traits, load_pretrained
from torch import nn

from .errors import UserError

_logger = logging.getLogger(__name__)

# Keys of the weights in a checkpoint, by preference: timm's averaged and plain ones, then those of other code.
_EMA_KEYS = ('state_dict_ema', 'model_ema')
_WEIGHT_KEYS = ('state_dict', 'model', 'net', 'model_state')
_TIMM_MESSAGE = 'Loading pretrained weights from state dict'  # does not say which
_SUFFIXES = ('.safetensors', '.pth.tar', '.pth', '.pt', '.bin', '.tar', '.th')

# Allowed in files beside tensors: numpy numbers (the authors'), parsed arguments (timm's).
_NUMPY_CORE: Any = np.core if np.__version__.startswith('1.') else np._core  # type: ignore[attr-defined]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace, np.ndarray, np.dtype,
    *(getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith('DType') and name != 'ObjectDType'),
    *((getattr(_NUMPY_CORE.multiarray, fn), f'{module}.multiarray.{fn}')
      for fn in ('scalar', '_reconstruct') for module in ('numpy.core', 'numpy._core')),
]


class CheckpointError(UserError, RuntimeError):
    """Weights are missing, broken, unsafe, or made for another model."""


def find_weights(folder: Path) -> Path:
    """The file with the weights in a folder: model.safetensors, or the only file of its kind.

    Raises:
        CheckpointError: There is none, or more than one.
    """
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
        Content of the file: a dict of tensors, or what was saved around it.

    Raises:
        CheckpointError: The file is missing, truncated, not a checkpoint, or asks for code to be run.
    """
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at '{path}'.")
    broken = f"Cannot read '{path}' ({path.stat().st_size:,} bytes): truncated, or no checkpoint. ({{}})"
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path, device='cpu')
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # only says that reading may fail
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        asked = re.search(r'Unsupported (?:global|class)[^\n]*?([\w.]+\.\w+)', str(e))
        if asked:
            raise CheckpointError(
                f"'{path}' is a pickle that asks for code to be run ({asked[1]}). It was refused, and none of it was "
                'executed. Expected tensors and plain values only.') from None
        raise CheckpointError(broken.format(_first_line(e))) from e
    except Exception as e:  # a damaged file may raise anything, IndexError and struct.error too
        raise CheckpointError(broken.format(_first_line(e))) from e


def _first_line(error: BaseException) -> str:
    text = re.sub(r'.*WeightsUnpickler error: ', '', str(error), flags=re.DOTALL)  # torch puts a page of advice before
    return text.strip().split('\n')[0][:200] or type(error).__name__


def read_state_dict(path: str | Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Read the weights from a checkpoint file or folder.

    Args:
        path: See `read_checkpoint`.
        use_ema: Prefer averaged weights if the file has them, as timm does.

    Returns:
        Tensors by name, without `module.` and `_orig_mod.` prefixes.

    Raises:
        CheckpointError: See `read_checkpoint`; or there are no weights.
    """
    return find_state_dict(read_checkpoint(path), path, use_ema)


def find_state_dict(checkpoint: Any, path: str | Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Find the weights in what `read_checkpoint` returned for a path: see `read_state_dict`."""
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
    """SHA-256 of the names and values of weights, in hexadecimal. Their order does not matter."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_mismatch(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str] = ()) -> str:
    """Describe how keys differ, with the first of each kind."""
    parts = []
    if missing:
        modules = {key.partition('.')[0] for key in missing}
        where = f", all in '{modules.pop()}'" if len(modules) == 1 and len(missing) > 1 else ''
        parts.append(f"{len(missing)} keys are missing{where} (first: '{missing[0]}')")
    if unexpected:
        parts.append(f"{len(unexpected)} are unexpected (first: '{unexpected[0]}')")
    if shapes:
        parts.append(f'{len(shapes)} have another shape (first: {shapes[0]})')
    return '; '.join(parts)


def layer_names(value: Any) -> tuple[str, ...]:
    """Names of layers in a pretrained_cfg, e.g. 'classifier', as a tuple: timm has None, one name, or several."""
    return () if not value else (value,) if isinstance(value, str) else tuple(value)


def _absent_parts(target: Mapping[str, Any], missing: Sequence[str]) -> list[str]:
    """Top-level submodules whose keys are all missing; none if keys of others are missing, too."""
    def count(keys: Iterable[str]) -> Counter[str]:
        return Counter(key.partition('.')[0] for key in keys)

    total, lacking = count(target), count(missing)
    return list(lacking) if len(lacking) < len(total) and all(total[k] == n for k, n in lacking.items()) else []


def _is_usable(value: Any, target: torch.Tensor) -> bool:
    """Whether a value can be copied without change: quantised and complex numbers would be cast."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.is_meta <= target.is_meta and (
        value.is_floating_point() or not target.is_floating_point())


def load_weights(
        model: nn.Module,
        source: str | Path | Mapping[str, Any],
        filter_fn: Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]] | None = None,
        adapt: bool = False,
        reset_head: bool = False,
        use_ema: bool = True,
        optional: Sequence[str] = (),
        label: str | None = None,
) -> None:
    """Load weights into a timm model, all of them or none.

    Args:
        model: A model made by timm's builder.
        source: File, folder, or a state dict.
        filter_fn: The family's `checkpoint_filter_fn`: maps foreign keys onto the model's.
        adapt: Do as timm does with pretrained weights: convert the first convolution to another number of input
            channels, keep the initial values of a classifier for another number of classes, and leave the classifier
            out for a model without one. Otherwise everything must fit.
        reset_head: With `adapt`, keep the initial values of the classifier even if its weights would fit.
        use_ema: Prefer averaged weights.
        optional: Names of submodules, e.g. 'policy', that the source may lack as a whole. They keep their values.
        label: Name of the source in messages.

    Raises:
        CheckpointError: The weights are not for this model. The message names the first missing and unexpected keys;
            the model is unchanged.
    """
    name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
    label = label or ('The state dict' if isinstance(source, Mapping) else f"'{source}'")
    state_dict = dict(source) if isinstance(source, Mapping) else read_state_dict(source, use_ema=use_ema)
    if filter_fn is not None:
        try:
            state_dict = dict(filter_fn(state_dict, model))
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as e:
            raise CheckpointError(f'{label} does not fit {name}: its keys cannot be mapped ({_first_line(e)}).') from e
    target = model.state_dict()
    for part in optional:
        own = {k: v for k, v in target.items() if k.startswith(f'{part}.')}
        if not own.keys() & state_dict.keys():
            state_dict.update(own)

    cfg = {k: v for k, v in getattr(model, 'pretrained_cfg', {}).items() if k not in ('source', 'state_dict')}
    traits = get_model_traits(model)
    convs = {f'{c}.weight' for c in layer_names(traits.get('first_conv', cfg.get('first_conv')))} if adapt else set()
    heads = {f'{c}.{p}' for c in layer_names(cfg.get('classifier')) for p in ('weight', 'bias')} if adapt else set()
    num_classes = getattr(model, 'num_classes', cfg.get('num_classes', 1000))
    # A model without classes has no classifier.
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
        why = describe_mismatch(missing, unexpected, shapes)
        absent = _absent_parts(target, missing)
        if absent and not unexpected and not shapes:
            why = f"it holds no {' and no '.join(absent)}"
        raise CheckpointError(f'{label} does not fit {name}: {why}.')
    unusable = next((k for k, v in target.items() if k in state_dict and not _is_usable(state_dict[k], v)), None)
    if unusable:
        value = state_dict[unusable]
        found = f'{value.device} {value.layout} {value.dtype}'.replace('torch.', '') \
            if isinstance(value, torch.Tensor) else type(value).__name__
        raise CheckpointError(
            f"{label} does not fit {name}: '{unusable}' is {found}, expected a dense tensor of floating point numbers.")

    # Input channels of the weights, from their shapes: a user's file may differ from the published weights, which the
    # pretrained_cfg describes.
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
        where = f'of {name} keeps its initial values ({num_classes} classes)' if num_classes else 'is left out'
        _logger.info(f'{label}: the classifier {where}.')
    _logger.info(f'Loading pretrained weights of {name} from {label}.')
    with _without_message(_TIMM_MESSAGE):
        load_pretrained(model, pretrained_cfg=cfg, num_classes=num_classes, in_chans=channels, strict=not drop_heads)


@contextmanager
def _without_message(text: str) -> Iterator[None]:
    """Drop a message of timm's builder."""
    def is_other(record: logging.LogRecord) -> bool:
        return record.getMessage() != text

    logger = logging.getLogger('timm.models._builder')
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
