"""Building models with timm, and the one place where weights from outside are loaded.

timm's own loading silently leaves random weights where a file does not fit; here that is an error. Sources may be a
file, a folder, or a mapping from part to file: ours, timm's, or the authors'.
"""
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import (
    PretrainedCfg,
    get_model_traits,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    parse_model_name,
    resolve_pretrained_cfg,
)
from torch import nn

from ..utils import (
    CheckpointError,
    check_available,
    did_you_mean,
    fetch_weights,
    load_weights,
    read_json,
    read_state_dict,
    read_task_state,
)
from ..utils.checkpoint import find_weights
from ..utils.export import CONFIG
from .dynamic_net import DynamicNet

_logger = logging.getLogger(__name__)

FilterFn = Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]]
Source = str | Path | Mapping[str, Any]

# Weights of the tiny models for the demo set, in exported folders MODEL.TAG.
BUNDLED = Path(__file__).parent / 'weights'

# Arguments that timm only takes with features_only=True.
_FEATURE_ARGS = ('out_indices', 'feature_cls', 'feature_cfg')

# Organisation on the Hugging Face Hub. A mirror sets the environment variable before this package is imported.
DEFAULT_HUB_ORG = 'timm-dynamic'
HUB_ORG = os.environ.get('TIMM_DYNAMIC_HUB_ORG') or DEFAULT_HUB_ORG


def hub_id(name: str) -> str:
    """Full Hub id of a model and tag: timm completes ids for its own organisation only."""
    return f'{HUB_ORG}/{name}'


def check_model_name(name: str) -> None:
    """Raise a ValueError with the closest names if timm knows no model of this name."""
    source, model_id = parse_model_name(name)
    if source is None and not is_model(model_id.split('.')[0]):
        raise ValueError(f"There is no model '{name}'.{did_you_mean(model_id, list_models())}")


def model_arguments(name: str) -> set[str]:
    """Names of the constructor arguments of a registered model's class; empty for other names."""
    source, model_id = parse_model_name(name)
    architecture = model_id.split('.')[0]
    if source is not None or not is_model(architecture):
        return set()
    create_fn = model_entrypoint(architecture)
    created = create_fn.__annotations__.get('return')
    model_class = getattr(sys.modules[create_fn.__module__], created, None) if isinstance(created, str) else created
    return set(inspect.signature(model_class).parameters) if isinstance(model_class, type) else set()


@dataclass(frozen=True)
class Family:
    """What a family of models knows about weights from outside: functions of these names in the family's module.

    timm's families have a `checkpoint_filter_fn` or nothing.

    Attributes:
        read_checkpoint_fn: Reads a file or folder, with or without averaged weights.
        checkpoint_filter_fn: Maps what was read, of a model, onto the keys of the model.
        exit_cfg_from_checkpoint: Takes from what was read what it says about exits; empty if nothing.
        training_state_from_checkpoint: Takes from what was read what only training needs; empty if nothing.
        is_checkpoint_folder: Whether a folder is one checkpoint in several files.
        find_absent_members: Finds the members of a cascade that what was read has no weights for.
        fetch_members: Gives these members of a cascade the weights that timm has for them, with a cache folder.
    """
    read_checkpoint_fn: Callable[[str | Path, bool], Any] = read_state_dict
    checkpoint_filter_fn: FilterFn | None = None
    exit_cfg_from_checkpoint: Callable[[Any], dict[str, Any]] | None = None
    training_state_from_checkpoint: Callable[[Any], dict[str, Any]] | None = None
    is_checkpoint_folder: Callable[[Path], bool] | None = None
    find_absent_members: Callable[[Any, Any], list[int]] | None = None
    fetch_members: Callable[[Any, Sequence[int], str | Path | None], None] | None = None

    @classmethod
    def of(cls, model_name: str) -> 'Family':
        """Family of a registered model. Other names have one without any functions."""
        name = model_name.split('.')[0]
        module = sys.modules[model_entrypoint(name).__module__] if is_model(name) else None
        return cls(**{f.name: getattr(module, f.name) for f in fields(cls) if hasattr(module, f.name)})


def check_timm_weights(model_name: str, cache_dir: str | Path | None = None) -> None:
    """Raise a FileNotFoundError if timm would have to download a model's weights and cannot: see `check_available`.

    Args:
        model_name: As for `timm.create_model`. Names that are not of timm's own models are not checked.
        cache_dir: Folder for downloads. Default: that of the Hub's client.
    """
    source, name = parse_model_name(model_name)
    name = str(name)
    if source is not None or not is_model(name) or not model_entrypoint(name).__module__.startswith('timm.'):
        return
    cfg = get_pretrained_cfg(name)
    if cfg is not None and cfg.hf_hub_id and not cfg.file and not cfg.hf_hub_filename:
        check_available(cfg.hf_hub_id, cache_dir)


def checkpoint_filter_of(model_name: str) -> FilterFn | None:
    """The `checkpoint_filter_fn` of the family of a registered model; None if it has none."""
    return Family.of(model_name).checkpoint_filter_fn


def load_checkpoint(
        model: nn.Module,
        source: Source,
        *,
        adapt: bool = False,
        reset_head: bool = False,
        use_ema: bool = True,
        optional: Sequence[str] = (),
        take_exits: bool = True,
        cache_dir: str | Path | None = None,
        label: str | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Load weights from outside into a model, all of them or none.

    Exits are fitted to weights. So the exits of a dynamic model are replaced by those of the source, or dropped if it
    has none.

    Args:
        model: A model made by timm's builder, of this package or of timm.
        source: A file; a folder, with or without 'local-dir:' before it: exported, or with the authors' files; a
            mapping from part to file; weights by part; a state dict; or the content of an authors' checkpoint.
        adapt: Accept other input channels and classes, see `load_weights`.
        reset_head: With `adapt`, keep the initial values of the classifier.
        use_ema: Prefer averaged weights.
        optional: Submodules that the source may lack, see `load_weights`. E.g. the authors' files of GFNet's first
            training stage have no 'policy'. Members of a cascade may always be absent: timm's weights are fetched.
        take_exits: False leaves the exits as they are.
        cache_dir: Folder for downloads. Default: that of the Hub's client.
        label: Name of the source in messages.

    Returns:
        State dicts of what only training needs, by name, as far as the source has it: auxiliary heads, critics.

    Raises:
        CheckpointError: The source cannot be read or does not fit, or weights of a member are not available.
    """
    architecture = getattr(model, 'pretrained_cfg', {}).get('architecture') or ''
    family = Family.of(architecture)
    # Everything is read before the model is changed.
    content, name, folder = _read_source(source, family, use_ema)
    label = label or name
    exits = _read_exits(content, folder, family, architecture, label)
    state = family.training_state_from_checkpoint(content) if family.training_state_from_checkpoint else {}
    state = state or (read_task_state(folder) if folder else {})
    absent = family.find_absent_members(content, model) if family.find_absent_members else []
    load_weights(
        model, content, family.checkpoint_filter_fn, adapt=adapt, reset_head=reset_head,
        optional=[*optional, *(f'members.{index}' for index in absent)], label=label)
    if family.fetch_members:
        family.fetch_members(model, absent, cache_dir)
    if take_exits and isinstance(model, DynamicNet):
        if not exits.exit_cfg:
            model.drop_exits(f'{label} has none.')
        model.load_exit_cfg(exits.exit_cfg)
        _check_exits_match(model, exits.model_args)
    return state


def _read_source(source: Source, family: Family, use_ema: bool) -> tuple[Any, str, Path | None]:
    """Content of a source, its name in messages, and the folder with the config.json that is about these weights."""
    def read(path: str | Path) -> Any:
        return family.read_checkpoint_fn(Path(str(path).removeprefix('local-dir:')), use_ema)

    if not isinstance(source, Mapping):
        return read(source), f"'{source}'", _exported_folder(Path(str(source).removeprefix('local-dir:')))
    if source and all(isinstance(value, (str, Path)) for value in source.values()):
        return {part: read(path) for part, path in source.items()}, ', '.join(f"'{v}'" for v in source.values()), None
    return source, 'The state dict', None


def _exported_folder(path: Path) -> Path | None:
    """The exported folder that a path is, or whose weights it is; None if it is neither."""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        return None
    try:
        return folder if path in (folder, find_weights(folder)) else None
    except CheckpointError:  # several weights: nobody knows which ones config.json is about
        return None


class _Exits(NamedTuple):
    """What a source says about exits."""
    exit_cfg: dict[str, Any]
    model_args: dict[str, Any]  # constructor arguments of the model that they are for


def _read_exits(content: Any, folder: Path | None, family: Family, architecture: str, label: str) -> _Exits:
    if family.exit_cfg_from_checkpoint:
        try:
            exit_cfg = family.exit_cfg_from_checkpoint(content)
        except (TypeError, ValueError, LookupError, AttributeError) as e:  # a file may hold anything
            raise CheckpointError(f'The results in {label} are damaged ({type(e).__name__}: {e}).') from e
        if exit_cfg:
            return _Exits(exit_cfg, {})
    if folder is None:
        return _Exits({}, {})
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError) as e:
        raise CheckpointError(str(e)) from e
    args = config.get('model_args') if config.get('architecture') == architecture else None
    args = args if isinstance(args, dict) else {}
    exit_cfg = args.get('exit_cfg') or {}
    if not isinstance(exit_cfg, dict):
        raise CheckpointError(f"exit_cfg in '{folder / CONFIG}' must be a dict, got {type(exit_cfg).__name__}.")
    return _Exits(exit_cfg, args)


def _check_exits_match(model: DynamicNet, exported: Mapping[str, Any]) -> None:
    """Drop exits that were fitted with another confidence, other members, or whatever else the family records."""
    own = model.recorded_args()
    other = [k for k in own if k != 'exit_cfg' and k in exported and _as_json(exported[k]) != _as_json(own[k])]
    if other:
        model.drop_exits(f"they are for another {' and '.join(other)}.")


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def build_dynamic_model(
        create_fn: Callable[..., Any],
        variant: str,
        pretrained: bool,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
) -> Any:
    """Build a model with timm and load its weights, all of them or none.

    Args:
        create_fn: Called as `create_fn(pretrained=False, pretrained_cfg=..., **kwargs)`, e.g. timm's own entry point.
        variant: Registered name.
        pretrained: Load weights. Their source is, as in timm, `state_dict`, `file` or `hf_hub_id` of the cfg; the first
            two may be whatever `load_checkpoint` takes.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm.
        cache_dir: As in timm.
        **kwargs: Passed on to `create_fn`.

    Raises:
        CheckpointError: There are no weights, they are not available, or they do not fit.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)  # type: ignore[arg-type]
    source: Any = cfg.state_dict if cfg.state_dict is not None else cfg.file
    # The source of the weights is not a property of the model: neither tensors nor local paths stay in its cfg.
    cfg = replace(cfg, architecture=cfg.architecture or variant, state_dict=None, file=None)
    features: dict[str, Any] = {}
    if pretrained and kwargs.get('features_only'):
        features = {k: kwargs.pop(k) for k in ('features_only', *_FEATURE_ARGS) if k in kwargs}
    # timm passes the arguments in the config.json of a folder or repository on as if the caller had given them.
    exported = kwargs.get('pretrained_model_args') or {}
    own_exits = kwargs.get('exit_cfg') is not None and kwargs['exit_cfg'] != exported.get('exit_cfg')
    if pretrained and not own_exits:
        kwargs.pop('exit_cfg', None)  # exits come with the weights
    model = create_fn(pretrained=False, pretrained_cfg=cfg.to_dict(), **kwargs)
    if pretrained:
        source = _fetch(cfg, variant, cache_dir) if source is None else source
        load_checkpoint(model, source, adapt=True, take_exits=not own_exits, cache_dir=cache_dir)
    elif isinstance(model, DynamicNet) and not own_exits:
        _check_exits_match(model, exported)
    if features:  # timm removes the classifier while it loads, so it gets the weights of the whole model
        input_size = (get_model_traits(model)['in_chans'], *cfg.input_size[1:])
        cfg = replace(cfg, state_dict=model.state_dict(), input_size=input_size, source=None)
        model = create_fn(pretrained=True, pretrained_cfg=cfg.to_dict(), **features, **kwargs)
        model.pretrained_cfg.pop('state_dict', None)
    return model


def _fetch(cfg: PretrainedCfg, variant: str, cache_dir: str | Path | None) -> Path:
    """Find weights in the package or on the Hub. Their folder or file, beside which is config.json."""
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    overlay = f"create_model('{variant}', pretrained=True, pretrained_cfg_overlay=dict(file='FILE'))"
    if cfg.hf_hub_id == hub_id(name) and (BUNDLED / name).is_dir():
        return BUNDLED / name
    if not cfg.hf_hub_id:
        raise CheckpointError(
            f'There are no weights of {name}. Use pretrained=False for initial values, or give a file: {overlay}.')
    try:
        return fetch_weights(cfg.hf_hub_id, cfg.hf_hub_filename or 'model.safetensors', cache_dir)
    except CheckpointError as e:
        advice = f'The authors link their file at {cfg.origin_url}; load it with {overlay}.' if cfg.origin_url else \
            f'Load a file of your own with {overlay}.'
        raise CheckpointError(f'The weights of {name} are not available. {e} {advice}') from e
