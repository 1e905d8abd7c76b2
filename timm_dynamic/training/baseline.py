"""The accuracy of a task's frozen baseline, before training."""
import argparse
import logging
from typing import Any

from accelerate import Accelerator

from ..evaluation.metrics import evaluate, is_better_than_chance
from ..exits.collect import with_confidence
from ..launch.build import model_dtype

_logger = logging.getLogger(__name__)


def check_baseline(
        task: Any,
        loader: Any,
        num_classes: int,
        args: argparse.Namespace,
        accelerator: Accelerator,
) -> None:
    """Log the accuracy of the frozen baseline on the validation split, if the task has a baseline.

    Args:
        task: The task, see `TaskHooks.baseline_name`.
        loader: Loader of the validation split; None if there is none.
        num_classes: Number of classes.
        args: Options of the stage.
        accelerator: Processes, device, precision.

    Raises:
        ValueError: The baseline is no better than chance.
    """
    name = task.baseline_name
    if not name:
        return
    if loader is None:
        _logger.info(f"The accuracy of the baseline '{name}' is not checked: no validation split.")
        return
    metrics, _ = evaluate(
        task.baseline, loader, accelerator, predict=lambda x: with_confidence(task.baseline_logits(x)[None]),
        create_evaluator=lambda device, **kwargs: task.create_evaluator(**kwargs), channels_last=args.channels_last,
        dtype=model_dtype(args), desc='baseline')
    images, top1 = int(metrics['count']), metrics['top1']
    top5 = f", top5 {metrics['top5']:.3f}" if 'top5' in metrics else ''
    _logger.info(f"Baseline '{name}' on {args.val_split} ({images} images), before training: top1 {top1:.3f}{top5}")
    correct = round(top1 * images / 100)
    if not is_better_than_chance(correct, images, num_classes):
        raise ValueError(
            f"The baseline '{name}' classifies {correct} of {images} images of {args.val_split} correctly. With "
            f'{num_classes} classes this is no better than chance. Name a trained --focus-baseline whose classes are '
            'in the order of the data, or train that of --focus-baseline scratch for longer.')
