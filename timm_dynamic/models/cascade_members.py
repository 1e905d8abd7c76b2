"""Members of a cascade: which networks they are, how each sees an image, and what a config records of them."""
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, get_model_input_config, get_pretrained_cfg, is_model, list_models
from torch import nn

from ..utils import did_you_mean

# How a member sees an image, unless its pretrained_cfg or the user says otherwise.
_VIEW: dict[str, Any] = dict(
    size=224, interpolation='bicubic', crop_pct=0.875, crop_mode='center', mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD)


@dataclass
class Member:
    """A member before its network is created.

    Attributes:
        model: Registered name, or a module.
        source: Name that timm loads its weights by; None for a module, which has weights.
        args: Arguments of the network.
        view: How it sees an image: 'size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std'.
        num_classes: Classes that its weights are for.
        own_size: Side of the images that its weights are for.
        fixed_size: It takes images of one size only.
        label_names: Names of its classes, if they are known.
    """
    model: Any
    source: str | None
    args: dict[str, Any]
    view: dict[str, Any]
    num_classes: int
    own_size: int
    fixed_size: bool
    label_names: tuple[str, ...] | None

    @property
    def label(self) -> str:
        """Name in messages."""
        return f"'{self.source}'" if self.source else type(self.model).__name__

    def create(self, size: int, num_classes: int, in_chans: int, **kwargs: Any) -> Any:
        """Create the network for images of a size. A module is used as it is.

        Raises:
            ValueError: The module has other classes, channels or sizes, or the network does not take its arguments.
        """
        if isinstance(self.model, nn.Module):
            expected = {'num_classes': num_classes, 'in_chans': in_chans}
            found = {k: getattr(self.model, k, v) for k, v in expected.items()}
            if self.fixed_size:
                expected['img_size'], found['img_size'] = size, self.own_size
            if found != expected:
                raise ValueError(f'The member {self.label} has {found}, the cascade needs {expected}.')
            return self.model
        args = dict(self.args, img_size=size) if self.fixed_size else self.args
        try:
            return timm.create_model(self.model, num_classes=num_classes, in_chans=in_chans, **args, **kwargs)
        except TypeError as e:
            raise ValueError(f'The member {self.label} cannot be created with {args}: {e}') from e


def resolve_members(models: Any, member_args: Any, views: Any) -> list[Member]:
    """Find out what members are, see `CLCNet`.

    Raises:
        ValueError: A model does not exist, a view or the number of arguments is wrong, or the members do not form a
            cascade.
    """
    if isinstance(models, (str, nn.Module)):
        raise ValueError(f'Expected a list of members, got {models!r}.')
    models = list(models)
    args, views = (_per_member(n, v, len(models)) for n, v in (('member_args', member_args), ('views', views)))
    members = [_resolve(*values) for values in zip(models, args, views)]
    if len(members) < 2:
        raise ValueError(f'A cascade has at least two members, got {len(members)}.')
    _check_labels([m for m in members if m.label_names])
    return members


def _per_member(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    values = [None] * count if values is None else list(values)
    if len(values) != count:
        raise ValueError(f'Expected {name} for {count} members, got {len(values)}.')
    return values


def _resolve(model: str | nn.Module, args: Mapping[str, Any] | None, view: Mapping[str, Any] | None) -> Member:
    """Find out what a member is: a name, 'name@size', 'local-dir:FOLDER', 'hf-hub:ORG/NAME', or a module."""
    args, view = dict(args or {}), dict(view or {})
    source: str | None = None
    if isinstance(model, str):
        match = re.fullmatch(r'(.+)@(\d+)', model)
        if match:
            model = match[1]
            view.setdefault('size', int(match[2]))
        source = model
    if isinstance(model, nn.Module) or ':' in model:
        net: Any = model
        if not isinstance(model, nn.Module):
            with torch.device('meta'):
                net = timm.create_model(model)
        elif args:
            raise ValueError(f'A member given as a module takes no arguments, got {args}.')
        cfg = getattr(net, 'pretrained_cfg', {})
        config = get_model_input_config(net) if cfg else {}
        if not isinstance(model, nn.Module):
            recorded = {k: v for k, v in net._model_args.items() if k not in ('num_classes', 'in_chans', 'img_size')}
            model, args = cfg['architecture'], {**recorded, **args}
        if not isinstance(getattr(net, 'num_classes', None), int):
            raise ValueError(
                f'A member given as a module needs a num_classes: {type(net).__name__} has none.')
        num_classes = net.num_classes
        size, fixed = config.get('input_size', (3, 224, 224))[1:], bool(config.get('fixed_input_size'))
    else:
        cfg = _registered_cfg(model)
        num_classes = cfg['num_classes'] - (cfg['label_offset'] or 0)
        size, fixed = args.get('img_size') or cfg['input_size'][1:], cfg['fixed_input_size']
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if height != width and 'size' not in view:
        raise ValueError(f'Members take square images, {source or type(model).__name__} takes {height}x{width}.')
    _check_view(view)
    own = {k: cfg[k] for k in _VIEW if cfg.get(k) is not None}
    labels = cfg.get('label_names')
    return Member(
        model, source, args, {**_VIEW, **own, 'size': height, **view}, num_classes, height, fixed,
        tuple(labels) if labels else None)


def _registered_cfg(name: str) -> dict[str, Any]:
    if not is_model(name.split('.')[0]):
        raise ValueError(f"Unknown model '{name}'.{did_you_mean(name, list_models())}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as e:
        raise ValueError(f"Unknown weights in '{name}': {e}") from e
    return vars(cfg or PretrainedCfg())


def _check_view(view: Mapping[str, Any]) -> None:
    """Raise a ValueError if an image cannot be prepared like this."""
    unknown = view.keys() - _VIEW.keys()
    if unknown:
        raise ValueError(f"A view has {', '.join(_VIEW)}; got {', '.join(sorted(unknown))}.")

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value)

    def are_numbers(values: Any) -> bool:
        return isinstance(values, (list, tuple)) and len(values) > 0 and all(map(is_number, values))

    checks = {
        'size': ('a whole number of pixels', lambda v: type(v) is int and v > 0),
        'crop_pct': ('a share above 0', lambda v: is_number(v) and v > 0),
        'mean': ('a number for each channel', are_numbers),
        'std': ('a number above 0 for each channel', lambda v: are_numbers(v) and min(v) > 0),
        'crop_mode': ('center, squash or border', lambda v: v in ('center', 'squash', 'border')),
        'interpolation': ('bilinear, bicubic, nearest, box, hamming or lanczos', lambda v: v in (
            'bilinear', 'bicubic', 'nearest', 'box', 'hamming', 'lanczos')),
    }
    for name, value in view.items():
        expected, fits = checks[name]
        if not fits(value):
            raise ValueError(f'{name} of a view: expected {expected}, got {value!r}.')


def _check_labels(members: Sequence[Member]) -> None:
    """Raise a ValueError if members whose class names are known have other classes, or another order."""
    for other in members[1:]:
        names, other_names = members[0].label_names or (), other.label_names or ()
        if names != other_names:
            pairs = enumerate(zip(names, other_names))
            first = next((f'class {i} is {a!r} and {b!r}' for i, (a, b) in pairs if a != b), 'their numbers differ')
            raise ValueError(
                f'The members {members[0].label} and {other.label} were trained on other classes, or in another order: '
                f'{first}.')


def number_networks(
        members: Sequence[Member],
        sizes: Sequence[int],
        networks: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Decide which members share a network.

    Args:
        members: Members.
        sizes: Side of the images of each.
        networks: See `CLCNet`.

    Returns:
        Number of the network of each member, from 0 in the order in which they appear.

    Raises:
        ValueError: `networks` is not numbered like this, or unlike members are to share a network.
    """
    alike = [(member.model if member.source else id(member.model),
              json.dumps(member.args, sort_keys=True, default=repr), member.fixed_size and size)
             for member, size in zip(members, sizes)]
    keys: list[Any] = [(member.source, *key) for member, key in zip(members, alike)]
    if networks is not None:
        keys = _per_member('networks', networks, len(members))
        numbers = list(dict.fromkeys(keys))
        if numbers != list(range(len(numbers))):
            raise ValueError(f'networks: expected numbers from 0 in the order in which they appear, got {keys}.')
        for number in numbers:
            if len({key for key, k in zip(alike, keys) if k == number}) > 1:
                labels = ', '.join(member.label for member, k in zip(members, keys) if k == number)
                raise ValueError(f'networks: {labels} cannot be one network: their models or arguments differ.')
        modules = {(id(member.model), k) for member, k in zip(members, keys) if not member.source}
        if len(modules) > len({module for module, _ in modules}):
            raise ValueError('networks: a module that is given twice is one network.')
    order = list(dict.fromkeys(keys))
    return tuple(order.index(key) for key in keys)


def can_rebuild(net: nn.Module, num_classes: int, in_chans: int) -> bool:
    """Whether timm creates a network with the same weights' names and shapes from what a config records of it."""
    architecture = getattr(net, 'pretrained_cfg', {}).get('architecture') or ''
    if not is_model(architecture):
        return False
    args = {k: v for k, v in getattr(net, '_model_args', {}).items() if k not in ('num_classes', 'in_chans')}
    try:
        with torch.device('meta'):
            twin = timm.create_model(architecture, num_classes=num_classes, in_chans=in_chans, **args)
        json.dumps(args)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return False
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (net, twin)]
    return type(net) is type(twin) and shapes[0] == shapes[1]


def record_members(members: Sequence[Member]) -> dict[str, Any]:
    """Arguments of `CLCNet` that create the same members on any machine: without the folders that they came from."""
    models, args = [], []
    for member in members:
        cfg = getattr(member.model, 'pretrained_cfg', {})
        known = isinstance(member.model, nn.Module) and cfg.get('architecture')
        models.append(cfg['architecture'] if known else member.model)
        args.append({k: v for k, v in getattr(member.model, '_model_args', {}).items()
                     if k not in ('num_classes', 'in_chans')} if known else member.args)
    views = [{k: list(v) if isinstance(v, tuple) else v for k, v in m.view.items()} for m in members]
    return dict(models=models, member_args=args, views=views)
