"""Static nets that recipes start from: trained on whole images first, or loaded."""
import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from timm.task import TrainingTask
from torch import nn

from ..models.builder import checkpoint_filter_of
from ..models.networks import create_encoder
from ..utils import CheckpointError, load_weights, read_state_dict
from .classification import Classification
from .stage import Stage, StageContext

_logger = logging.getLogger(__name__)

# The paper's, by family of the backbone: SGD with Nesterov momentum, cosine to 0, batches of 256, crops and flips.
PAPER_COMMON: dict[str, Any] = dict(
    global_batch_size=256, opt='sgd', momentum=0.9, lr_base_size=256, opt_kwargs={'filter_bias_and_bn': False},
    sched='cosine', warmup_epochs=0, smoothing=0., color_jitter=0., train_interpolation='bilinear',
)
STATIC_PAPER: dict[str, Any] = dict(PAPER_COMMON, epochs=90, lr_base=0.1, weight_decay=1e-4)
# For minutes on a CPU with the embedded demo set. Digits must not be flipped, nor cropped away.
DEMO_COMMON: dict[str, Any] = dict(
    global_batch_size=64, opt='adamw', lr=3e-3, weight_decay=0.05, sched='cosine', warmup_epochs=1, warmup_lr=1e-3,
    smoothing=0., color_jitter=0., train_interpolation='bilinear', hflip=0., scale=[0.9, 1.0], ratio=[0.95, 1.05],
    demo_digit_scale=[24, 36], demo_clutter=0.5, workers=2, channels_last=True, img_size=96,
)


def create_static_task(model: nn.Module, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Plain classification by a net that a recipe starts from."""
    return Classification(
        model, criterion_kwargs=dict(smoothing=args.smoothing), device=context.device, dtype=context.dtype,
        verbose=context.verbose)


def create_static_stage(model: Any, defaults: Mapping[str, Any] | None, option: str) -> Stage:
    """Train the backbone of a dynamic model on whole images, to start from and to compare with.

    Args:
        model: The dynamic model.
        defaults: Options that differ from timm's (default: the paper's).
        option: What names weights to start from instead.

    Raises:
        ValueError: The backbone is known to the dynamic model alone, not to timm.
    """
    if not is_model(model.backbone.split('.')[0]):
        raise ValueError(
            f"The backbone '{model.backbone}' is no model of timm and cannot be trained by itself first: give weights "
            f'that it starts from with {option}.')
    if defaults is None:
        defaults = {**STATIC_PAPER, 'img_size': model.img_size}
    return Stage(
        'static', create_static_task, defaults, model=model.backbone, model_kwargs=model.backbone_args,
        label=f'{model.backbone}, whole images')


def load_encoder(encoder: Any, source: str | Path, model: Any) -> dict[str, torch.Tensor]:
    """Load an encoder with weights of its backbone. If it has a classifier, that stays as it is.

    Args:
        encoder: The encoder.
        source: A timm model name, 'hf-hub:ORG/NAME', or a folder or file with weights of the backbone.
        model: What the encoder is part of.

    Returns:
        'weight' and 'bias' of the classifier that was among them, if it is one for the model's classes.

    Raises:
        CheckpointError: There are no such weights, they cannot be reached, or they do not fit.
    """
    text = str(source).removeprefix('local-dir:')
    cfg = encoder.pretrained_cfg
    architecture, head = cfg['architecture'], cfg.get('classifier') or ''
    # A folder that happens to be called as a model is: 'local-dir:' or './' names it.
    if Path(text).exists() and not (text == str(source) and is_model(text)):
        filter_fn = checkpoint_filter_of(architecture) if is_model(architecture) else None
        state_dict = read_state_dict(text)
        state_dict = dict(filter_fn(state_dict, encoder)) if filter_fn else state_dict
    else:
        try:
            if text.startswith('hf-hub:'):
                net: Any = timm.create_model(text, pretrained=True, in_chans=model.in_chans)
            else:
                net = create_encoder(
                    text, model.in_chans, model.patch_size, model.num_classes, pretrained=True, **model.backbone_args)
        except (OSError, RuntimeError, ValueError) as e:
            reason = str(e).strip().splitlines()[0]
            raise CheckpointError(f"The weights of '{text}' are not to be had: {reason}") from e
        state_dict = net.state_dict()
        if net.pretrained_cfg['num_classes'] != model.num_classes:
            state_dict = {k: v for k, v in state_dict.items() if k.rpartition('.')[0] != head}
    weights = {k: v for k, v in state_dict.items() if k.rpartition('.')[0] != head}
    classifier = {k.rpartition('.')[2]: v for k, v in state_dict.items() if k.rpartition('.')[0] == head}
    fits = 'weight' in classifier and classifier['weight'].ndim == 2 and len(classifier['weight']) == model.num_classes
    own = {k: v for k, v in encoder.state_dict().items() if k.rpartition('.')[0] == head}  # of a net with a classifier
    load_weights(encoder, {**weights, **own}, adapt=True, label=f"'{text}'")
    return classifier if fits else {}


def load_backbone_or_warn(net: Any, source: str | Path | None, model: Any, what: str, option: str) -> None:
    """Load a network with weights of its backbone, classifier included where the classes are as many.

    Args:
        net: The network.
        source: See `load_encoder`; if None, the backbone's pretrained weights, or a warning.
        model: What the network is part of.
        what: What to call it.
        option: What names another source.

    Raises:
        CheckpointError: A source was given, and its weights are not to be had or do not fit.
    """
    try:
        classifier = load_encoder(net, source or model.backbone, model)
    except CheckpointError as e:
        if source:
            raise
        _logger.warning(f'The {what} starts from random weights. {e} Give others with {option}.')
        return
    if classifier:
        net.get_classifier().load_state_dict(classifier)
