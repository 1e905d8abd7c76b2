"""Recipes that train GFNets: the paper's three stages, and end-to-end training in one stage."""
import argparse
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.task import TrainingTask

from ..models.builder import load_checkpoint
from ..models.gfnet import GFNet
from ..utils import CheckpointError
from .gfnet import OWN_FIRST_HEADS, EndToEndTask, GlanceFocusTask, PatchPolicyTask
from .stage import Recipe, Stage, StageContext
from .static import (
    DEMO_COMMON,
    PAPER_COMMON,
    create_static_stage,
    demo_defaults,
    load_encoder,
    whole_weights,
)

_logger = logging.getLogger(__name__)

# Settings of the paper, by family of the backbone. '' is the default (ResNet, DenseNet, others).
_FAMILIES: dict[str, dict[str, Any]] = {
    'regnet': dict(epochs=60, lr_base=0.02, weight_decay=5e-5, aux_weight=1.),
    'mobilenetv3': dict(epochs=90, lr_base=0.005, weight_decay=1e-4, aux_weight=5., freeze_global=True),
    # Trained on images of 224 pixels at any inference size.
    'efficientnet': dict(
        epochs=30, lr_base=0.005, weight_decay=1e-4, aux_weight=5., freeze_global=True, train_img_sizes=[224]),
    '': dict(epochs=60, lr_base=0.01, weight_decay=1e-4, aux_weight=1.),
}
_CLASSIFIER_LR = 0.1, 0.01  # in stages 1 and 3
_POLICY: dict[str, Any] = dict(
    global_batch_size=256, epochs=15, opt='adam', opt_betas=[0.9, 0.999], lr=3e-4, weight_decay=0., sched='none',
    warmup_epochs=0, color_jitter=0., train_interpolation='bilinear',
)
_DEMO: dict[str, dict[str, Any]] = {
    'static': dict(DEMO_COMMON, epochs=6),
    'warmup': dict(
        DEMO_COMMON, epochs=4, lr=1e-3, warmup_epochs=0, classifier_lr_scale=3., init_local='scratch'),
    'policy': dict(DEMO_COMMON, epochs=3, opt='adam', lr=1e-3, weight_decay=0., warmup_epochs=0),
    'finetune': dict(DEMO_COMMON, epochs=4, lr=1e-3, warmup_epochs=0),
    'end-to-end': dict(DEMO_COMMON, epochs=11, lr=1e-3, policy_std=0., init_local='scratch'),
}


def create_glance_focus_task(
        model: GFNet,
        args: argparse.Namespace,
        context: StageContext,
        positions: str,
) -> TrainingTask:
    """Create the task of stage 1 or 3, see `GlanceFocusTask`."""
    return GlanceFocusTask(
        model, positions, args.aux_weight, args.freeze_global, args.policy_std, args.smoothing,
        device=context.device, dtype=context.dtype, verbose=context.verbose)


# The reward of the patch policy needs one true class per image.
_NO_MIXING: dict[str, Any] = dict(mixup=0., cutmix=0., cutmix_minmax=None)


def _check_policy_updates(args: argparse.Namespace) -> None:
    if args.policy_updates > 1 and args.grad_accum_steps > 1:
        raise ValueError(
            f'--policy-updates {args.policy_updates} cannot be combined with --grad-accum-steps '
            f'{args.grad_accum_steps}: each update needs a whole batch.')


def create_policy_task(model: GFNet, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Create the task of stage 2, see `PatchPolicyTask`."""
    _check_policy_updates(args)
    if args.grad_accum_steps > 1:
        _logger.warning(
            'PPO normalises returns within a batch. With --grad-accum-steps, each of the accumulated batches is '
            'normalised separately.')
    return PatchPolicyTask(
        model, args.policy_updates, args.policy_gamma, args.policy_std, args.policy_epsilon, args.policy_value_coeff,
        args.policy_entropy_coeff, device=context.device, dtype=context.dtype, verbose=context.verbose)


def create_end_to_end_task(model: GFNet, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Create the task that trains all parts in one stage, see `EndToEndTask`."""
    return EndToEndTask(
        model, args.aux_weight, args.policy_std, args.smoothing, device=context.device, dtype=context.dtype,
        verbose=context.verbose)


def _init_encoders(model: GFNet, args: argparse.Namespace, context: StageContext) -> Mapping[str, Any] | None:
    """Load initial weights into the encoders, and return their classifiers as auxiliary heads.

    The global encoder's classifier becomes the head of step 1 if that head classifies only the glance's features.
    """
    if args.init_from:
        return load_checkpoint(model, args.init_from, optional=('policy',))
    if whole_weights(args):  # the encoders have theirs
        return None
    local = args.init_local
    if local == 'scratch':
        local = context.stage_weights['static']
        if not local.exists():
            raise ValueError(
                f"The encoders start from the weights of the stage 'static', but '{local}' does not exist. Run that "
                'stage first, or name weights with --init-local.')
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
                    f'The global encoder is frozen (--freeze-global), but has no pretrained weights. {e} Name weights '
                    'with --init-global, or train it with --no-freeze-global.') from e
            _logger.warning(f'The {name} encoder starts from random weights. {e} Name others with --init-{name}.')
            continue
        if classifier:
            heads[f'{name}_aux'] = classifier
    first = model.classifier.head_name(0)
    if 'global_aux' in heads and first in OWN_FIRST_HEADS:
        model.classifier.heads[first].load_state_dict(heads.pop('global_aux'))
    return heads


def _load_init_from(
        model: GFNet,
        args: argparse.Namespace,
        context: StageContext,
        optional: tuple[str, ...] = (),
) -> Mapping[str, Any] | None:
    return load_checkpoint(model, args.init_from, optional=optional) if args.init_from else None


def _paper_defaults(model: GFNet, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options of each stage. 'end-to-end' is not in the paper: it is 'warmup' with nothing frozen and no noise."""
    family = next(v for k, v in _FAMILIES.items() if model.backbone.startswith(k))
    if args.img_size or args.input_size:  # the paper's training size is only for the paper's image size
        family = {k: v for k, v in family.items() if k != 'train_img_sizes'}
    warmup, finetune = (
        {**PAPER_COMMON, **family, 'classifier_lr_scale': lr / family['lr_base']} for lr in _CLASSIFIER_LR)
    return {
        'warmup': warmup,
        'policy': {**_POLICY, **{k: v for k, v in family.items() if k == 'train_img_sizes'}},
        'finetune': finetune,
        'end-to-end': {**warmup, 'freeze_global': False, 'policy_std': 0.},
    }


def _check(args: argparse.Namespace, model: Any, recipe: str) -> None:
    if not isinstance(model, GFNet):
        raise ValueError(
            f"The recipe '{recipe}' trains GFNet models, e.g. --model gfnet_resnet50_96; got --model {args.model}.")
    whole = whole_weights(args)
    for option in ('init_local', 'init_global'):
        if whole and getattr(args, option):
            raise ValueError(
                f"--{option.replace('_', '-')} cannot be combined with {whole}, which loads the weights of all parts.")


def _static_stages(
        args: argparse.Namespace,
        model: GFNet,
        defaults: Mapping[str, Mapping[str, Any]],
) -> tuple[Stage, ...]:
    if whole_weights(args):
        return ()
    if (args.init_local or defaults['warmup'].get('init_local')) != 'scratch':
        if args.init_global == 'scratch':
            raise ValueError('--init-global scratch needs --init-local scratch, which trains the net to start from.')
        return ()
    return (create_static_stage(model, defaults.get('static'), '--init-local'),)


def create_gfnet_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Create the recipe: warmup, policy, finetune; `--init-local scratch` trains a static net first."""
    _check(args, model, 'gfnet')
    defaults = demo_defaults(_DEMO, model, 'test_gfnet') if demo else _paper_defaults(model, args)
    return Recipe('gfnet', (
        *_static_stages(args, model, defaults),
        Stage('warmup', partial(create_glance_focus_task, positions='random'), defaults['warmup'],
              prepare=_init_encoders, shown=False),
        Stage('policy', create_policy_task, defaults['policy'], starts_from='warmup', shown=False, options=_NO_MIXING,
              check=_check_policy_updates, prepare=partial(_load_init_from, optional=('policy',))),
        Stage('finetune', partial(create_glance_focus_task, positions='policy'), defaults['finetune'],
              starts_from='policy', prepare=_load_init_from, label=args.model),
    ))


def create_end_to_end_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Create the recipe with one stage, see `EndToEndTask`; `--init-local scratch` trains a static net first."""
    _check(args, model, 'end-to-end')
    defaults = demo_defaults(_DEMO, model, 'test_gfnet') if demo else _paper_defaults(model, args)
    return Recipe('end-to-end', (
        *_static_stages(args, model, defaults),
        Stage('end-to-end', create_end_to_end_task, defaults['end-to-end'], prepare=_init_encoders, label=args.model),
    ))
