"""Static networks that recipes start from: trained on whole images first, or loaded."""
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

from ..models.builder import check_timm_weights, checkpoint_filter_of
from ..models.networks import create_encoder, map_pycls_keys
from ..utils import CheckpointError, load_weights, read_state_dict
from .classification import Classification
from .stage import Stage, StageContext

_logger = logging.getLogger(__name__)

# Settings of the GFNet paper: SGD with Nesterov momentum, cosine schedule to 0, batches of 256, crops and flips.
PAPER_COMMON: dict[str, Any] = dict(
    global_batch_size=256, opt='sgd', momentum=0.9, lr_base_size=256, opt_kwargs={'filter_bias_and_bn': False},
    sched='cosine', warmup_epochs=0, smoothing=0., color_jitter=0., train_interpolation='bilinear',
)
STATIC_PAPER: dict[str, Any] = dict(PAPER_COMMON, epochs=90, lr_base=0.1, weight_decay=1e-4)
# Settings for the embedded demo set, which train in minutes on a CPU. Digits must not be flipped or cropped away.
DEMO_COMMON: dict[str, Any] = dict(
    global_batch_size=64, opt='adamw', lr=3e-3, weight_decay=0.05, sched='cosine', warmup_epochs=1, warmup_lr=1e-3,
    smoothing=0., color_jitter=0., train_interpolation='bilinear', hflip=0., scale=[0.9, 1.0], ratio=[0.95, 1.05],
    workers=2, channels_last=True, img_size=96,
)


def demo_defaults(defaults: Mapping[str, Mapping[str, Any]], model: Any, tiny: str) -> dict[str, dict[str, Any]]:
    """Settings for the demo set with images of the size that a model is made for.

    Args:
        defaults: Settings by stage, for the tiny model.
        model: The model.
        tiny: Name of the tiny model, for the warning that another one is large for the demo.

    Returns:
        The settings by stage.
    """
    size = getattr(model, 'img_size', None) or model.pretrained_cfg['input_size'][-1]
    if size > DEMO_COMMON['img_size']:
        _logger.warning(
            f"{model.pretrained_cfg['architecture']} is large for the demo: its images have {size} pixels. On a CPU, "
            f'training may take days. The model for the demo is --model {tiny}.')
    return {stage: {**settings, 'img_size': size} for stage, settings in defaults.items()}


def create_static_task(model: nn.Module, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Create the task that trains a static network: plain classification."""
    return Classification(
        model, criterion_kwargs=dict(smoothing=args.smoothing), device=context.device, dtype=context.dtype,
        verbose=context.verbose)


def create_static_stage(model: Any, defaults: Mapping[str, Any] | None, option: str) -> Stage:
    """Create the stage that trains the backbone of a dynamic model on whole images.

    The dynamic model starts from its weights, and the final table compares both.

    Args:
        model: The dynamic model.
        defaults: Options that differ from timm's (default: the paper's).
        option: Option that names other initial weights, for the error message.

    Raises:
        ValueError: The backbone is not a timm model.
    """
    if not is_model(model.backbone.split('.')[0]):
        raise ValueError(
            f"The backbone '{model.backbone}' is not a timm model and cannot be trained alone. Name initial weights "
            f'with {option}.')
    if defaults is None:
        defaults = {**STATIC_PAPER, 'img_size': model.img_size}
    return Stage(
        'static', create_static_task, defaults, model=model.backbone, model_kwargs=model.backbone_args,
        label=f'{model.backbone}, whole images')


def whole_weights(args: argparse.Namespace) -> str:
    """The option that gives initial weights of the whole model; empty if there is none."""
    names = ('init_from', 'initial_checkpoint', 'pretrained_path', 'pretrained')
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(args, name)), '')


def load_encoder(encoder: Any, source: str | Path, model: Any) -> dict[str, torch.Tensor]:
    """Load weights of the backbone into an encoder. A classifier of the encoder is not changed.

    Args:
        encoder: The encoder.
        source: A timm model name, 'hf-hub:ORG/NAME', or a folder or file with weights of the backbone.
        model: The model that contains the encoder.

    Returns:
        'weight' and 'bias' of the source's classifier if it has the model's number of classes, else an empty dict.

    Raises:
        CheckpointError: The weights do not exist, cannot be downloaded, or do not match the encoder.
    """
    text = str(source).removeprefix('local-dir:')
    cfg = encoder.pretrained_cfg
    architecture, head = cfg['architecture'], cfg.get('classifier') or ''
    # If a folder has the name of a timm model, the model is meant. 'local-dir:' or './' selects the folder. But a file
    # is meant: densenet201.pth is no model with a tag.
    path = Path(text)
    if path.is_file() or (path.exists() and not (text == str(source) and is_model(text))):
        filter_fn = checkpoint_filter_of(architecture) if is_model(architecture) else None
        state_dict = map_pycls_keys(read_state_dict(text))
        state_dict = dict(filter_fn(state_dict, encoder)) if filter_fn else state_dict
    else:
        try:
            if text.startswith('hf-hub:'):
                net: Any = timm.create_model(text, pretrained=True, in_chans=model.in_chans)
            else:
                check_timm_weights(text)
                net = create_encoder(
                    text, model.in_chans, model.patch_size, model.num_classes, pretrained=True, **model.backbone_args)
        except (OSError, RuntimeError, ValueError) as e:
            reason = str(e).strip().splitlines()[0]
            raise CheckpointError(f"The weights of '{text}' are not available: {reason}") from e
        state_dict = net.state_dict()
        if net.pretrained_cfg['num_classes'] != model.num_classes:
            state_dict = {k: v for k, v in state_dict.items() if k.rpartition('.')[0] != head}
    weights = {k: v for k, v in state_dict.items() if k.rpartition('.')[0] != head}
    classifier = {k.rpartition('.')[2]: v for k, v in state_dict.items() if k.rpartition('.')[0] == head}
    fits = 'weight' in classifier and classifier['weight'].ndim == 2 and len(classifier['weight']) == model.num_classes
    current = {k: v for k, v in encoder.state_dict().items() if k.rpartition('.')[0] == head}
    load_weights(encoder, {**weights, **current}, adapt=True, label=f"'{text}'")
    return classifier if fits else {}


def load_backbone_or_warn(net: Any, source: str | Path | None, model: Any, what: str, option: str) -> None:
    """Load weights of the backbone into a network, with the classifier if the number of classes is equal.

    Args:
        net: The network.
        source: See `load_encoder`. None: the backbone's pretrained weights; if they are not available, only a warning.
        model: The model that contains the network.
        what: Name of the network in the warning.
        option: Option that names another source, for the warning.

    Raises:
        CheckpointError: The weights of the given source are not available, or do not match the network.
    """
    try:
        classifier = load_encoder(net, source or model.backbone, model)
    except CheckpointError as e:
        if source:
            raise
        _logger.warning(f'The {what} starts from random weights. {e} Name other weights with {option}.')
        return
    if classifier:
        net.get_classifier().load_state_dict(classifier)
