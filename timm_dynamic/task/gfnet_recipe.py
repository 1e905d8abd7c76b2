"""Recipes that train GFNets: the paper's three stages, and all parts end to end."""
import argparse
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from timm.task import ClassificationTask, TrainingTask

from ..models.builder import checkpoint_filter_of, load_checkpoint
from ..models.gfnet import GFNet
from ..models.networks import create_encoder
from ..utils import CheckpointError, load_weights, read_state_dict
from .gfnet import OWN_FIRST_HEADS, EndToEndTask, GlanceFocusTask, PatchPolicyTask
from .stage import Recipe, Stage, StageContext

_logger = logging.getLogger(__name__)

# The paper's, by family of the backbone: SGD with Nesterov momentum, cosine to 0, batches of 256, crops and flips.
_COMMON: dict[str, Any] = dict(
    global_batch_size=256, opt='sgd', momentum=0.9, lr_base_size=256, opt_kwargs={'filter_bias_and_bn': False},
    sched='cosine', warmup_epochs=0, smoothing=0., color_jitter=0., train_interpolation='bilinear',
)
STATIC_PAPER: dict[str, Any] = dict(_COMMON, epochs=90, lr_base=0.1, weight_decay=1e-4)
_FAMILIES: dict[str, dict[str, Any]] = {
    'regnet': dict(epochs=60, lr_base=0.02, weight_decay=5e-5, aux_weight=1.),
    'mobilenetv3': dict(epochs=90, lr_base=0.005, weight_decay=1e-4, aux_weight=5., freeze_global=True),
    # Trained on images of 224 pixels, whatever the size at inference.
    'efficientnet': dict(
        epochs=30, lr_base=0.005, weight_decay=1e-4, aux_weight=5., freeze_global=True, train_img_sizes=[224]),
    '': dict(epochs=60, lr_base=0.01, weight_decay=1e-4, aux_weight=1.),  # ResNet, DenseNet, and any other
}
_CLASSIFIER_LR = 0.1, 0.01  # in stages 1 and 3
_POLICY: dict[str, Any] = dict(
    global_batch_size=256, epochs=15, opt='adam', opt_betas=[0.9, 0.999], lr=3e-4, weight_decay=0., sched='none',
    warmup_epochs=0, color_jitter=0., train_interpolation='bilinear',
)


# For minutes on a CPU with the embedded demo set. Digits must not be flipped, nor cropped away.
DEMO_COMMON: dict[str, Any] = dict(
    global_batch_size=64, opt='adamw', lr=3e-3, weight_decay=0.05, sched='cosine', warmup_epochs=1, warmup_lr=1e-3,
    smoothing=0., color_jitter=0., train_interpolation='bilinear', hflip=0., scale=[0.9, 1.0], ratio=[0.95, 1.05],
    demo_digit_scale=[24, 36], demo_clutter=0.5, workers=2, channels_last=True, img_size=96,
)
_DEMO: dict[str, dict[str, Any]] = {
    'static': dict(DEMO_COMMON, epochs=6),
    'warmup': dict(
        DEMO_COMMON, epochs=4, lr=1e-3, warmup_epochs=0, classifier_lr_scale=3., init_local='scratch'),
    'policy': dict(DEMO_COMMON, epochs=3, opt='adam', lr=1e-3, weight_decay=0., warmup_epochs=0),
    'finetune': dict(DEMO_COMMON, epochs=4, lr=1e-3, warmup_epochs=0),
    'end-to-end': dict(DEMO_COMMON, epochs=11, lr=1e-3, policy_std=0., init_local='scratch'),
}


def create_static_task(model: Any, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Plain classification by the backbone on whole images."""
    return ClassificationTask(
        model, criterion_kwargs=dict(smoothing=args.smoothing), device=context.device, dtype=context.dtype,
        verbose=context.verbose)


def create_glance_focus_task(
        model: GFNet,
        args: argparse.Namespace,
        context: StageContext,
        positions: str = 'random',
) -> TrainingTask:
    """Stage 1 or 3, see `GlanceFocusTask`."""
    return GlanceFocusTask(
        model, positions, args.aux_weight, args.freeze_global, args.policy_std, args.smoothing,
        device=context.device, dtype=context.dtype, verbose=context.verbose)


# The policy is rewarded for one true class.
_NO_MIXING: dict[str, Any] = dict(mixup=0., cutmix=0., cutmix_minmax=None)


def _check_policy_updates(args: argparse.Namespace) -> None:
    if args.policy_updates > 1 and args.grad_accum_steps > 1:
        raise ValueError('--policy-updates goes again over one batch: it does not go with --grad-accum-steps.')


def create_policy_task(model: GFNet, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Stage 2, see `PatchPolicyTask`."""
    _check_policy_updates(args)
    if args.grad_accum_steps > 1:
        _logger.warning('Rewards are compared within a batch: with --grad-accum-steps, within each part of it.')
    return PatchPolicyTask(
        model, args.policy_updates, args.policy_gamma, args.policy_std, args.policy_epsilon, args.policy_value_coeff,
        args.policy_entropy_coeff, device=context.device, dtype=context.dtype, verbose=context.verbose)


def create_end_to_end_task(model: GFNet, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """All parts in one stage, see `EndToEndTask`."""
    return EndToEndTask(
        model, args.aux_weight, args.policy_std, args.smoothing, device=context.device, dtype=context.dtype,
        verbose=context.verbose)


def load_training_checkpoint(model: GFNet, source: str | Path, needs_policy: bool = True) -> Mapping[str, Any]:
    """Load weights to train on from.

    Args:
        model: The model.
        source: A folder or file of this package, or an authors' checkpoint.
        needs_policy: Refuse an authors' file of their first stage, which holds no policy.

    Returns:
        State of auxiliary heads and critic, as far as the source has it.

    Raises:
        CheckpointError: It cannot be read or does not fit.
    """
    return load_checkpoint(model, source, optional=() if needs_policy else ('policy',))


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


def _init_encoders(model: GFNet, args: argparse.Namespace, context: StageContext) -> Mapping[str, Any] | None:
    """Load the encoders. Their classifiers become auxiliary heads, or the head of step 1 if that is what they are."""
    if args.init_from:
        return load_training_checkpoint(model, args.init_from, needs_policy=False)
    local = args.init_local
    if local == 'scratch':
        local = context.stage_weights['static']
        if not local.exists():
            raise ValueError(
                f"The encoders start from the weights of stage 'static', which are not at '{local}': run that stage "
                'first, or give weights with --init-local.')
    heads = {}
    for name, source in (('local', local), ('global', args.init_global or local)):
        encoder = getattr(model, f'{name}_encoder')
        try:
            classifier = load_encoder(encoder, source or model.backbone, model)
        except CheckpointError as e:
            if source:
                raise
            if name == 'global' and args.freeze_global:
                raise CheckpointError(
                    f'The encoder of the glance is frozen, and has no weights. {e} Give others with --init-global, or '
                    'let it learn with --no-freeze-global.') from e
            _logger.warning(f'The {name} encoder starts from random weights. {e} Give others with --init-{name}.')
            continue
        if classifier:
            heads[f'{name}_aux'] = classifier
    first = model.classifier.head_name(0)
    if 'global_aux' in heads and first in OWN_FIRST_HEADS:
        model.classifier.heads[first].load_state_dict(heads.pop('global_aux'))
    return heads


def _load_init_from(model: GFNet, args: argparse.Namespace, context: StageContext, needs_policy: bool) -> Any:
    return load_training_checkpoint(model, args.init_from, needs_policy) if args.init_from else None


def _paper_defaults(model: GFNet, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options by stage. 'end-to-end' is not in the paper: it follows what is."""
    family = next(v for k, v in _FAMILIES.items() if model.backbone.startswith(k))
    if args.img_size or args.input_size:  # the paper's size for training is of the paper's models
        family = {k: v for k, v in family.items() if k != 'train_img_sizes'}
    warmup, finetune = (
        {**_COMMON, **family, 'classifier_lr_scale': lr / family['lr_base']} for lr in _CLASSIFIER_LR)
    return {
        'warmup': warmup,
        'policy': {**_POLICY, **{k: v for k, v in family.items() if k == 'train_img_sizes'}},
        'finetune': finetune,
        'end-to-end': {**warmup, 'freeze_global': False, 'policy_std': 0.},
    }


def _check(args: argparse.Namespace, model: Any, recipe: str) -> None:
    if not isinstance(model, GFNet):
        raise ValueError(
            f"The recipe '{recipe}' trains GFNet models, e.g. --model gfnet_resnet50_96; got '{args.model}'.")
    for option in ('init_local', 'init_global'):
        if args.init_from and getattr(args, option):
            raise ValueError(
                f"--{option.replace('_', '-')} does not go with --init-from, which gives the weights of all parts.")


def _static_stages(
        args: argparse.Namespace,
        model: GFNet,
        defaults: Mapping[str, Mapping[str, Any]],
) -> tuple[Stage, ...]:
    if args.init_from:
        return ()
    if (args.init_local or defaults['warmup'].get('init_local')) != 'scratch':
        if args.init_global == 'scratch':
            raise ValueError('--init-global scratch: it is --init-local scratch that trains a net to start from.')
        return ()
    return (create_static_stage(model, defaults.get('static'), '--init-local'),)


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


def create_gfnet_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Warm-up, policy, finetune; with `--init-local scratch` after a static net that the encoders start from."""
    _check(args, model, 'gfnet')
    defaults = _DEMO if demo else _paper_defaults(model, args)
    return Recipe('gfnet', (
        *_static_stages(args, model, defaults),
        Stage('warmup', create_glance_focus_task, defaults['warmup'], prepare=_init_encoders, shown=False),
        Stage('policy', create_policy_task, defaults['policy'], starts_from='warmup', shown=False, options=_NO_MIXING,
              check=_check_policy_updates,
              prepare=partial(_load_init_from, needs_policy=False)),
        Stage('finetune', partial(create_glance_focus_task, positions='policy'), defaults['finetune'],
              starts_from='policy', prepare=partial(_load_init_from, needs_policy=True), label=args.model),
    ))


def create_end_to_end_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """One stage in which the policy learns through patches cut between pixels."""
    _check(args, model, 'end-to-end')
    defaults = _DEMO if demo else _paper_defaults(model, args)
    return Recipe('end-to-end', (
        *_static_stages(args, model, defaults),
        Stage('end-to-end', create_end_to_end_task, defaults['end-to-end'], prepare=_init_encoders, label=args.model),
    ))
