"""Recipes: what train.py runs, as an ordered list of stages.

A stage names its task, what of the model it trains, where its weights start, and the options it changes. The training
loop knows only `task(input, target) -> {'loss', 'output', ...}`.
"""
import argparse
from collections.abc import Callable
from typing import Any

from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from ..loss import FocusPickingLoss
from ..models.anchornet import AnchorNetPatch
from ..models.clcnet import CLCNet
from ..models.gfnet import GFNet
from .anchornet_recipe import create_anchornet_recipe
from .clcnet_recipe import create_clcnet_recipe
from .focusnet import FocusPickingTask
from .gfnet_recipe import create_end_to_end_recipe, create_gfnet_recipe
from .stage import Recipe, Stage, StageContext


def mixes(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on, so that targets are soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_classification_task(model: nn.Module, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Plain classification with timm's losses, or one of timm's distillations if a teacher is named."""
    criterion_kwargs: dict[str, Any] = dict(smoothing=args.smoothing, soft_targets=mixes(args))
    if args.jsd_loss:
        criterion_kwargs = dict(loss_type='jsd', jsd_splits=args.aug_splits, smoothing=args.smoothing)
    elif args.bce_loss:
        criterion_kwargs.update(
            loss_type='bce', bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum,
            pos_weight=args.bce_pos_weight)
    common: dict[str, Any] = dict(
        criterion_kwargs=criterion_kwargs, device=context.device, dtype=context.dtype, verbose=context.verbose)
    if args.kd_model_name is None:
        return ClassificationTask(model, **common)
    common.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            model, args.kd_model_name, student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim, **common)
    common['temperature'] = args.kd_temperature
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(model, args.kd_model_name, distill_type=args.kd_token_distill_type, **common)
    return LogitDistillationTask(model, args.kd_model_name, loss_type=args.kd_loss_type, **common)


def create_focus_task(model: nn.Module, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """FocusNet training beside `--focus-baseline`, or beside the net of the stage 'baseline'."""
    baseline = args.focus_baseline
    if baseline == 'scratch':
        baseline = str(context.stage_weights['baseline'])
    criterion = FocusPickingLoss(
        smoothing=args.smoothing, temperature=args.focus_temperature,
        attention_weight=args.focus_attention_weight, negentropy_weight=args.focus_negentropy_weight)
    return FocusPickingTask(
        model, baseline, criterion, mean=context.data_config.get('mean'), std=context.data_config.get('std'),
        device=context.device, dtype=context.dtype, verbose=context.verbose)


# The paper's: 90 epochs, batch 256, SGD without Nesterov and with weight decay on everything, only crops and flips.
_FOCUS_PAPER = dict(
    epochs=90, global_batch_size=256, opt='momentum', momentum=0.9, lr_base=0.1, lr_base_size=256, weight_decay=1e-4,
    opt_kwargs={'filter_bias_and_bn': False}, sched='step', decay_epochs=30, decay_rate=0.1, warmup_epochs=0,
    color_jitter=0., train_interpolation='bilinear',
)
# For minutes on a CPU with the embedded demo set. Digits must not be flipped, nor cropped away.
_FOCUS_DEMO = dict(
    epochs=5, global_batch_size=64, opt='adamw', lr=3e-3, weight_decay=0.05, sched='cosine', warmup_epochs=1,
    warmup_lr=1e-3, color_jitter=0., train_interpolation='bilinear', hflip=0., scale=[0.75, 1.0], ratio=[0.9, 1.1],
    demo_digit_scale=[24, 44], demo_clutter=0.5, workers=2, channels_last=True,
)


def _focusnet(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    if args.focus_baseline is None:
        raise ValueError(
            'The recipe focusnet needs a baseline: --focus-baseline MODEL (e.g. resnet18.tv_in1k), or '
            '--focus-baseline scratch to train one first.')
    defaults = _FOCUS_DEMO if demo else _FOCUS_PAPER
    scratch = args.focus_baseline == 'scratch'
    stages = []
    if scratch:
        stages.append(Stage(
            'baseline', create_classification_task, defaults, label='baseline (frozen)', seed_offset=1))
    if args.focus_plain:
        stages.append(Stage('plain', create_classification_task, defaults, label='plain cross-entropy'))
    for option in _LOSS_OPTIONS:
        if getattr(args, option) and not stages:
            raise ValueError(
                f"--{option.replace('_', '-')} has no effect: the focus net has a loss of its own. It is for "
                '--focus-baseline scratch and --focus-plain.')
    stages.append(Stage('focus', create_focus_task, defaults, label='focus net'))
    return Recipe('focusnet', tuple(stages), {} if scratch else {'baseline (frozen)': args.focus_baseline})


def _classification(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    return Recipe('classification', (Stage('classification', create_classification_task, label=args.model),))


RECIPES: dict[str, Callable[[argparse.Namespace, bool, Any], Recipe]] = {
    'classification': _classification,
    'focusnet': _focusnet,
    'gfnet': create_gfnet_recipe,
    'anchornet': create_anchornet_recipe,
    'clcnet': create_clcnet_recipe,
    'end-to-end': create_end_to_end_recipe,
}
_FAMILIES: dict[type, str] = {GFNet: 'gfnet', AnchorNetPatch: 'anchornet', CLCNet: 'clcnet'}
# What only `create_classification_task` reads.
_LOSS_OPTIONS = (
    'kd_model_name', 'distill_loss_weight', 'task_loss_weight', 'kd_student_feature_dim', 'kd_teacher_feature_dim',
    'jsd_loss', 'bce_loss', 'bce_sum', 'bce_target_thresh', 'bce_pos_weight')
# Options that only some recipes know. Their defaults are false, and no number.
_OWN_OPTIONS = {
    'focus_baseline': ('focusnet',), 'focus_plain': ('focusnet',),
    **dict.fromkeys(('init_global', 'init_local', 'init_from'), ('gfnet', 'end-to-end')),
    'freeze_global': ('gfnet',),
    'init_downstream': ('anchornet',),
    **dict.fromkeys(('init_members', 'feature_split', 'features', 'folds', 'fold_dir', 'confidence'), ('clcnet',)),
    **dict.fromkeys(_LOSS_OPTIONS, ('classification', 'focusnet')),
}


def create_recipe(args: argparse.Namespace, demo: bool = False, model: Any = None) -> Recipe:
    """Choose the recipe by `--recipe`, else by the other options: a baseline makes it 'focusnet'; else by the model.

    Args:
        args: Options, without any recipe's defaults.
        demo: The embedded demo set is trained on.
        model: The model, if it is of a family that has recipes of its own.

    Raises:
        ValueError: There is no such recipe, or it lacks something.
    """
    own = next((name for family, name in _FAMILIES.items() if isinstance(model, family)), 'classification')
    name = args.recipe or ('focusnet' if args.focus_baseline else own)
    if name not in RECIPES:
        raise ValueError(f"There is no recipe '{name}': choose from {', '.join(RECIPES)}.")
    for option, recipes in _OWN_OPTIONS.items():
        value = getattr(args, option)
        if (value or (value == 0 and value is not False)) and name not in recipes:
            raise ValueError(
                f"--{option.replace('_', '-')} belongs to the recipe {' and '.join(map(repr, recipes))}, "
                f"not to '{name}'.")
    return RECIPES[name](args, demo, model)
