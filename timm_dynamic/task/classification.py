"""Plain classification with timm's tasks: for the recipe 'classification', and for static networks in other recipes."""
import argparse
from typing import Any

from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from .base import TaskHooks
from .stage import Recipe, Stage, StageContext

# Options that only `create_classification_task` reads.
LOSS_OPTIONS = (
    'kd_model_name', 'distill_loss_weight', 'task_loss_weight', 'kd_student_feature_dim', 'kd_teacher_feature_dim',
    'jsd_loss', 'bce_loss', 'bce_sum', 'bce_target_thresh', 'bce_pos_weight')


class Classification(TaskHooks, ClassificationTask):
    """timm's `ClassificationTask` with `TaskHooks`."""


class FeatureDistillation(TaskHooks, FeatureDistillationTask):
    """timm's `FeatureDistillationTask` with `TaskHooks`."""


class LogitDistillation(TaskHooks, LogitDistillationTask):
    """timm's `LogitDistillationTask` with `TaskHooks`."""


class TokenDistillation(TaskHooks, TokenDistillationTask):
    """timm's `TokenDistillationTask` with `TaskHooks`."""


def mixes(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on. Then targets are soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_classification_task(model: nn.Module, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Create the task: classification with timm's losses, or one of timm's distillations if there is a teacher."""
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
        return Classification(model, **common)
    common.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'feature':
        return FeatureDistillation(
            model, args.kd_model_name, student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim, **common)
    common['temperature'] = args.kd_temperature
    if args.kd_distill_type == 'token':
        return TokenDistillation(model, args.kd_model_name, distill_type=args.kd_token_distill_type, **common)
    return LogitDistillation(model, args.kd_model_name, loss_type=args.kd_loss_type, **common)


def create_classification_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Create the recipe 'classification', which has one stage."""
    return Recipe('classification', (Stage('classification', create_classification_task, label=args.model),))
