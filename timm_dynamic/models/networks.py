"""Networks inside a dynamic model: creating them, and answering timm's questions for several side by side."""
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, list_models
from timm.models.mobilenetv3 import _gen_mobilenet_v3  # timm has the generator, but no entry point of this width

from ..utils import did_you_mean
from ..utils.checkpoint import layer_names

# Backbones in addition to timm's registered ones.
_BACKBONES = {'mobilenetv3_large_125': partial(_gen_mobilenet_v3, 'mobilenetv3_large_100', 1.25)}


def create_encoder(backbone: str, in_chans: int, side: int, num_classes: int = 0, /, **kwargs: Any) -> Any:
    """Create a timm model for images of a size.

    Args:
        backbone: Name of a timm model.
        in_chans: Number of input channels.
        side: Side of the images. It is passed on only to networks of a fixed size.
        num_classes: Number of classes; with 0, the network ends with its feature vector.
        **kwargs: Further arguments of the model, `img_size` and `patch_size` among them.

    Raises:
        ValueError: There is no such backbone, or it does not take these arguments.
    """
    name = backbone.split('.')[0]
    if name not in _BACKBONES and not is_model(name):
        raise ValueError(f"Unknown backbone '{backbone}'.{did_you_mean(backbone, [*list_models(), *_BACKBONES])}")
    cfg = get_pretrained_cfg(backbone)
    if cfg is not None and cfg.fixed_input_size:
        kwargs = {'img_size': side, **kwargs}
    create_fn: Any = _BACKBONES.get(name) or partial(timm.create_model, backbone)
    try:
        return create_fn(num_classes=num_classes, in_chans=in_chans, **kwargs)
    except TypeError as e:
        raise ValueError(f"The backbone '{backbone}' cannot be created with {kwargs}: {e}") from e


def map_pycls_keys(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Map the keys of a RegNet of pycls (https://github.com/facebookresearch/pycls) onto timm's.

    The GFNet authors' RegNets have pycls' keys, but call the classifier 'fc'. Other weights are returned unchanged.
    """
    if not any(re.match(r's\d\.b\d+\.f\.', key) for key in state_dict):
        return dict(state_dict)
    out = {}
    for key, value in state_dict.items():
        if re.match(r's\d\.b\d+\.', key):
            key = re.sub(r'\.f\.se\.f_ex\.([02])\.', lambda m: f'.se.fc{1 + int(m[1]) // 2}.', key)
            key = re.sub(r'\.f\.([abc])_bn\.', lambda m: f'.conv{"abc".index(m[1]) + 1}.bn.', key)
            key = re.sub(r'\.f\.([abc])\.', lambda m: f'.conv{"abc".index(m[1]) + 1}.conv.', key)
            key = re.sub(r'(b\d+)\.proj\.', r'\1.downsample.conv.', key)
            key = re.sub(r'(b\d+)\.bn\.', r'\1.downsample.bn.', key)
        out[re.sub(r'^fc\.', 'head.fc.', key)] = value
    return out


def check_pool(global_pool: str, num_classes: int) -> str:
    """Raise a ValueError unless pooling is left to the networks ('avg'), or off in a model without classes ('')."""
    if global_pool not in ('avg', '') or (not global_pool and num_classes):
        raise ValueError(
            f"The networks do the pooling: global_pool must be 'avg', or '' without classes, got {global_pool!r} with "
            f'{num_classes} classes.')
    return global_pool


# Each of the following takes the networks by the names of the submodules that they are in the model.

def join_layer_names(networks: Mapping[str, Any], what: str) -> tuple[str, ...]:
    """Names of all layers that the pretrained_cfg of the networks calls 'first_conv' or 'classifier'."""
    return tuple(
        f'{prefix}.{name}' for prefix, net in networks.items()
        for name in layer_names(getattr(net, 'pretrained_cfg', {}).get(what)))


def join_no_weight_decay(networks: Mapping[str, Any]) -> set[str]:
    """Names of all parameters that the networks exempt from weight decay."""
    return {f'{prefix}.{name}' for prefix, net in networks.items() for name in getattr(net, 'no_weight_decay', set)()}


def join_group_matchers(networks: Mapping[str, Any], coarse: bool = False) -> dict[str, Any]:
    """Groups of the networks' layers, side by side: groups of the same name are one. Other parameters come last."""
    out: dict[str, Any] = {}
    for prefix, net in networks.items():
        for name, spec in net.group_matcher(coarse=coarse).items():
            for pattern, suffix in ([(spec, None)] if isinstance(spec, str) else spec or ()):
                inner = pattern.replace('^', '')
                out.setdefault(name, []).append((rf'^{prefix}\.(?:{inner})', suffix))
    return out
