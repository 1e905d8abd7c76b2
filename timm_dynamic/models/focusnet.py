"""FocusNet: timm's own networks, trained against the classes that a frozen baseline confuses.

Paper: `FocusNet: Classifying better by focusing on confusing classes` - Zhang, Sheng, Shen, Pattern Recognition 2022,
https://doi.org/10.1016/j.patcog.2022.108709

A FocusNet has the architecture of its backbone. Only its training differs: see `timm_dynamic.loss.FocusPickingLoss`
and `timm_dynamic.task.FocusPickingTask`.
"""
import re
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet, mobilenetv2_100
from timm.models.resnet import ResNet, resnet18, resnet34

from .builder import build_dynamic_model, hub_id


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Map the authors' keys, which are torchvision's, onto timm's.

    Keys of ResNets are equal. For MobileNetV2, torchvision numbers all modules in one sequence: features.0 is the stem,
    features.1 the first block (depthwise, without expansion), features.2..17 the other blocks, features.18 the last
    convolution, classifier.1 the classifier.
    """
    if not isinstance(model, EfficientNet) or 'features.0.0.weight' not in state_dict:
        return state_dict
    # (stage, block) of features.1, features.2, ...
    stages: Any = model.blocks
    blocks = [(s, b) for s, stage in enumerate(stages) for b in range(len(stage))]
    # Position in torchvision's block.conv -> name in timm's block. A convolution with its norm (.0, .1) counts once.
    first = {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2'}
    other = {'0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3'}
    ends = {
        'features.0.0': 'conv_stem', 'features.0.1': 'bn1',
        f'features.{len(blocks) + 1}.0': 'conv_head', f'features.{len(blocks) + 1}.1': 'bn2',
        'classifier.1': 'classifier',
    }
    out = {}
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition('.')
        match = re.fullmatch(r'features\.(\d+)\.conv\.([\d.]+)', module)
        if match and 1 <= int(match[1]) <= len(blocks):
            names = first if match[1] == '1' else other
            stage, block = blocks[int(match[1]) - 1]
            module = f'blocks.{stage}.{block}.{names[match[2]]}' if match[2] in names else module
        out[f'{ends.get(module, module)}.{leaf}'] = value
    return out


def _cfg(name: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'hf_hub_id': hub_id(name) if name else None,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'paper_name': 'FocusNet: Classifying better by focusing on confusing classes',
        'paper_ids': 'doi:10.1016/j.patcog.2022.108709',
        'origin_url': 'https://github.com/XueZ-phd/FocusNet-Classifying-better-by-focusing-on-confusing-classes',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'focusnet_resnet18.paper_in1k': _cfg('focusnet_resnet18.paper_in1k'),
    'focusnet_resnet34.paper_in1k': _cfg('focusnet_resnet34.paper_in1k'),
    'focusnet_mobilenetv2_100.paper_in1k': _cfg(
        'focusnet_mobilenetv2_100.paper_in1k', first_conv='conv_stem', classifier='classifier'),
    'test_focusnet.digits': _cfg(
        'test_focusnet.digits', num_classes=10, input_size=(3, 96, 96), pool_size=(3, 3), crop_pct=1.0,
        first_conv='conv1.0', origin_url=None),
})


def _create_focusnet(variant: str, create_fn: Any, pretrained: bool, **kwargs: Any) -> Any:
    return build_dynamic_model(create_fn, variant, pretrained, **kwargs)


@register_model
def focusnet_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 trained as a FocusNet."""
    return _create_focusnet('focusnet_resnet18', resnet18, pretrained, **kwargs)


@register_model
def focusnet_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 trained as a FocusNet."""
    return _create_focusnet('focusnet_resnet34', resnet34, pretrained, **kwargs)


@register_model
def focusnet_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 trained as a FocusNet."""
    return _create_focusnet('focusnet_mobilenetv2_100', mobilenetv2_100, pretrained, **kwargs)


@register_model
def test_focusnet(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """A ResNet of 0.3 M parameters for demonstration and tests."""
    create_fn = partial(
        resnet18, layers=(1, 1, 1, 1), channels=(16, 32, 64, 96), stem_width=8, stem_type='deep')
    return _create_focusnet('test_focusnet', create_fn, pretrained, **kwargs)
