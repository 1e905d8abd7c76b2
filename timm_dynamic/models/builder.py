"""Building and loading, for the models of this package: timm's builder behind a stricter door for weights."""
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models import (
    PretrainedCfg,
    get_model_traits,
    is_model,
    list_models,
    model_entrypoint,
    parse_model_name,
    resolve_pretrained_cfg,
)
from torch import nn

from ..utils import CheckpointError, did_you_mean, fetch_weights, load_weights, read_json, read_state_dict
from .dynamic_net import DynamicNet

_logger = logging.getLogger(__name__)

FilterFn = Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]]

# Weights that come with the package, as exported folders MODEL.TAG: those of the tiny models for the demo set.
BUNDLED = Path(__file__).parent / 'weights'

# Arguments that timm takes with features_only=True alone.
_FEATURE_ARGS = ('out_indices', 'feature_cls', 'feature_cfg')

# Organisation on the Hugging Face Hub. Mirrors set the environment variable, before this package is imported.
DEFAULT_HUB_ORG = 'timm-dynamic'
HUB_ORG = os.environ.get('TIMM_DYNAMIC_HUB_ORG') or DEFAULT_HUB_ORG


def hub_id(name: str) -> str:
    """Full Hub id of a model and tag. timm completes ids for its own organisation only, so ours are spelled out."""
    return f'{HUB_ORG}/{name}'


def check_model_name(name: str) -> None:
    """Raise a ValueError that suggests the closest names if timm knows no model of this name."""
    source, model_id = parse_model_name(name)
    if source is None and not is_model(model_id.split('.')[0]):
        raise ValueError(f"There is no model '{name}'.{did_you_mean(model_id, list_models())}")


def checkpoint_filter_of(model_name: str) -> FilterFn | None:
    """The `checkpoint_filter_fn` of the family that a registered model belongs to; None if it has none."""
    module = sys.modules[model_entrypoint(model_name.split('.')[0]).__module__]
    return getattr(module, 'checkpoint_filter_fn', None)


def build_dynamic_model(
        create_fn: Callable[..., Any],
        variant: str,
        pretrained: bool,
        filter_fn: FilterFn | None = None,
        read_fn: Callable[[str | Path], Any] = read_state_dict,
        exit_cfg_fn: Callable[[Any], dict[str, Any]] | None = None,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
) -> Any:
    """Build a model with timm and load its weights, all of them or none.

    Args:
        create_fn: Called as `create_fn(pretrained=False, pretrained_cfg=..., **kwargs)`, e.g. timm's own entry point.
        variant: Registered name.
        pretrained: Load weights. Their source is, as in timm, `state_dict`, `file` or `hf_hub_id` of the cfg;
            `file` may be a file (the authors' too), a folder, or a mapping from part to file.
        filter_fn: Maps foreign keys onto the model's, see `load_weights`.
        read_fn: Reads a file. A family whose authors' files are more than one state dict has its own.
        exit_cfg_fn: Takes from what was read what it says about stopping, see `DynamicNet.load_exit_cfg`.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm.
        cache_dir: As in timm.
        **kwargs: Passed on to `create_fn`.

    Raises:
        CheckpointError: There are no weights, they cannot be reached, or they do not fit. Never random weights
            in silence.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)  # type: ignore[arg-type]
    state_dict, file = cfg.state_dict, cfg.file
    # Where the weights came from is no part of what the model is: neither tensors nor local paths stay behind.
    cfg = replace(cfg, architecture=cfg.architecture or variant, state_dict=None, file=None)
    features: dict[str, Any] = {}
    if pretrained and kwargs.get('features_only'):
        features = {k: kwargs.pop(k) for k in ('features_only', *_FEATURE_ARGS) if k in kwargs}
    given = bool(kwargs.get('exit_cfg'))  # it comes before that of a file
    model = create_fn(pretrained=False, pretrained_cfg=cfg.to_dict(), **kwargs)
    if isinstance(model, DynamicNet) and model.exit_cfg:
        exported: Any = getattr(model, 'pretrained_model_args', {})
        if kwargs.get('exit_cfg') == exported.get('exit_cfg'):  # and none that the caller gave
            _check_exits_hold(model, exported)
    if pretrained:
        folder = None
        if state_dict is None:
            state_dict, folder = _fetch(cfg, variant, file, cache_dir, read_fn)
        load_weights(model, state_dict, filter_fn, adapt=True, label=f"'{file}'" if file else None)
        if isinstance(model, DynamicNet) and not given:
            model.load_exit_cfg(exit_cfg_fn(state_dict) if exit_cfg_fn else {})
            if folder is not None and not model.exit_cfg:
                exported = _exported_args(folder, variant)
                model.load_exit_cfg(exported.get('exit_cfg') or {})
                _check_exits_hold(model, exported)
    if features:  # timm takes the classifier off while it loads, so it gets the whole model's weights
        input_size = (get_model_traits(model)['in_chans'], *cfg.input_size[1:])
        cfg = replace(cfg, state_dict=model.state_dict(), input_size=input_size, source=None)
        model = create_fn(pretrained=True, pretrained_cfg=cfg.to_dict(), **features, **kwargs)
        model.pretrained_cfg.pop('state_dict', None)
    return model


def _fetch(
        cfg: PretrainedCfg,
        variant: str,
        file: str | Path | Mapping[str, str | Path] | None,
        cache_dir: str | Path | None,
        read_fn: Callable[[str | Path], Any],
) -> tuple[Any, Path | None]:
    """What was read, and the exported folder that it lay in."""
    if isinstance(file, Mapping):
        return {part: read_fn(path) for part, path in file.items()}, None
    if file:
        return read_fn(file), Path(file) if Path(file).is_dir() else None
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    if cfg.hf_hub_id == hub_id(name) and (BUNDLED / name).is_dir():
        return read_fn(BUNDLED / name), BUNDLED / name
    if not cfg.hf_hub_id:
        raise CheckpointError(
            f'There are no weights of {name}. Use pretrained=False for initial values, or give a file: '
            f"create_model('{variant}', pretrained=True, pretrained_cfg_overlay=dict(file='...')).")
    path = _fetch_from_hub(cfg, variant, name, cache_dir)
    return read_fn(path), path.parent


def _exported_args(folder: Path, variant: str) -> dict[str, Any]:
    """timm gives a model the arguments in config.json only where it is named by a folder or repository."""
    try:
        config = read_json(folder / 'config.json')
    except OSError:
        return {}
    except ValueError as e:
        raise CheckpointError(str(e)) from e
    args = config.get('model_args') if config.get('architecture') == variant else None
    return args if isinstance(args, dict) else {}


def _check_exits_hold(model: DynamicNet, exported: Mapping[str, Any]) -> None:
    """Drop exits that were fitted with other values of what the family itself records: the confidence, the members."""
    own = model._model_args
    other = [k for k, v in exported.items() if k != 'exit_cfg' and k in own and _as_json(v) != _as_json(own[k])]
    if other:
        model.drop_exits(f"they are for another {' and '.join(other)}.")


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def _fetch_from_hub(
        cfg: PretrainedCfg,
        variant: str,
        name: str,
        cache_dir: str | Path | None,
) -> Path:
    """Download weights and config.json. The path of the weights."""
    assert cfg.hf_hub_id
    overlay = f"create_model('{variant}', pretrained=True, pretrained_cfg_overlay=dict(file='FILE'))"
    try:
        return fetch_weights(cfg.hf_hub_id, cfg.hf_hub_filename or 'model.safetensors', cache_dir)
    except CheckpointError as e:
        origin = f'The authors link their file at {cfg.origin_url}; load it with {overlay}.' if cfg.origin_url else \
            f'A file of your own loads with {overlay}.'
        raise CheckpointError(f'The weights of {name} cannot be had. {e} {origin}') from e


def load_checkpoint(model, source, *, adapt=False, reset_head=False, use_ema=True, optional=(), label=None):
    from functools import partial

    from ..utils import read_task_state
    name = model.pretrained_cfg['architecture']
    try:
        filter_fn = checkpoint_filter_of(name)
        module = sys.modules[model_entrypoint(name).__module__]
    except Exception:
        filter_fn, module = None, None
    source = str(source).removeprefix('local-dir:')
    read = {n: getattr(module, n) for n in ('read_gfnet_checkpoint', 'read_anchornet_checkpoint', 'read_confidence_net') if hasattr(module, n)}
    fn = next(iter(read.values()), None)
    absent = []
    if name.startswith(('clcnet', 'test_clcnet')):
        filter_fn = partial(filter_fn, absent=absent)
    if name.startswith(('gfnet', 'test_gfnet')) and 'policy' in optional:
        filter_fn = partial(filter_fn, needs_policy=False)
    state = fn(source) if fn else read_state_dict(source, use_ema=use_ema)
    load_weights(model, state, filter_fn, adapt=adapt, reset_head=reset_head, use_ema=use_ema, label=label or f"'{source}'")
    if name.startswith(('clcnet', 'test_clcnet')):
        module.fetch_members(model, absent, None)
    if 'model_prime_state_dict' in state:
        cfg = module.exit_cfg_from_checkpoint(state)
        if cfg:
            model.load_exit_cfg(cfg)
        return module.training_state_from_checkpoint(state)
    path = Path(source)
    return read_task_state(path if path.is_dir() else path.parent)


def is_checkpoint_of_several_files(name, folder):
    return name.split('.')[0].startswith(('anchornet_patch', 'test_anchornet_patch')) and not any(Path(folder).rglob('config.json')) and len([p for p in Path(folder).iterdir() if 'anchornet' in p.name]) == 1
