"""Accuracy and exit table of any model on a loader, the same in training and validation."""
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from timm.task import ClassificationEvaluator
from timm.utils import unwrap_model

from ..exits import ExitTable
from ..exits.collect import Outputs, SampleRecorder, predict_steps, rank_of, run_loader
from ..exits.table import run_policy
from ..models.dynamic_net import DynamicNet
from ..utils import did_you_mean


def check_metric(metric: str, task: Any, model: Any) -> str:
    """Give a metric's name back, if validation of a task gives such a metric.

    Raises:
        ValueError: It does not.
    """
    steps = task.num_predictions(model)
    names = [*task.create_evaluator().metric_names, *(f'top1_step{t + 1}' for t in range(steps) if steps > 1)]
    if metric not in names:
        raise ValueError(
            f"--eval-metric {metric}: there is no such metric. Choose from {', '.join(names)}."
            f'{did_you_mean(metric, names)}')
    return metric


class Evaluation(NamedTuple):
    """What a model does on a set of images.

    Attributes:
        metrics: timm's 'loss', 'top1' and 'top5' (%), and 'count', the number of images. With several steps also
            'top1_step1' and so on. Of dynamic models also 'gmacs', the mean cost of an image.
        table: Exit table of all steps; None for static models.
    """
    metrics: dict[str, float]
    table: ExitTable | None


def is_better_than_chance(correct: int, images: int, num_classes: int, level: float = 0.01) -> bool:
    """Whether a result is better than that of a classifier that guesses.

    A guess is correct with probability 1 / num_classes, so that the number of correct guesses is binomial. The result
    is better if guesses reach it with a probability of less than `level`. It counts as better, too, if there are so
    few images that even a result without an error would not show a difference.

    Args:
        correct: Number of images that are classified correctly.
        images: Number of images.
        num_classes: Number of classes.
        level: Probability of calling a guess better than chance.
    """
    chance = 1 / num_classes
    if chance ** images >= level:
        return True

    def probability(k: int) -> float:
        ways = math.lgamma(images + 1) - math.lgamma(k + 1) - math.lgamma(images - k + 1)
        return math.exp(ways + k * math.log(chance) + (images - k) * math.log1p(-chance))

    return sum(map(probability, range(correct, images + 1))) < level


def evaluate(
        model: Any,
        loader: Any,
        accelerator: Accelerator,
        predict: Callable[[Any], Outputs] | None = None,
        create_evaluator: Callable[..., ClassificationEvaluator] = ClassificationEvaluator,
        classes: torch.Tensor | None = None,
        tta: int = 0,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
        desc: str = '',
        log_freq: int = 1,
        on_batch: Callable[[torch.Tensor, torch.Tensor, Outputs, Any], Any] | None = None,
) -> Evaluation:
    """Evaluate a model, all its steps in one pass. In several processes every image counts once.

    The metrics are those of what `forward` gives: the logits of the last step, or of the step at which an image stops
    if an exit policy is set on the model.

    Args:
        model: A static model, or a `DynamicNet` in eval mode. Its mode is not changed.
        loader: A timm evaluation loader, of this process's share.
        accelerator: For device, autocast and processes.
        predict: Computes the outputs of all steps for x (default: `predict_steps` of the model). There is an exit table
            with the default only.
        create_evaluator: Makes a timm evaluator.
        classes: Indices of the classes that count [C'], int64 (default: all); targets are positions among them.
        tta: Average this many neighbouring outputs.
        channels_last: Memory layout of images.
        dtype: Of images (default: as the loader gives them).
        desc: For the progress bar.
        log_freq: Batches between updates of the progress bar.
        on_batch: Called with logits [B, num_classes], targets [B], the outputs of all steps, and x of every batch.

    Raises:
        ValueError: A dynamic model is in train mode, or the loader gives nothing.
    """
    plain: Any = unwrap_model(model)
    dynamic = isinstance(plain, DynamicNet)
    if dynamic and plain.training:
        raise ValueError('Early exit needs a model in eval mode: call model.eval() first.')
    policy = plain.exit_policy if dynamic else None
    recorder = SampleRecorder(loader, accelerator)
    evaluator = create_evaluator(device=accelerator.device, max_samples=recorder.limit)

    def take(outputs: Outputs, target: torch.Tensor, x: Any) -> None:
        logits, confidence = outputs['logits'], outputs['confidence']
        if classes is not None:
            logits = logits[..., classes.to(logits.device)]
        if tta > 1:
            logits, confidence = (v.unfold(1, tta, tta).mean(dim=-1) for v in (logits, confidence))
            target = target[::tta]
        output = logits[-1]
        if policy is not None and predict is None:
            last = run_policy(policy, confidence.T.cpu()).to(logits.device) - 1
            output = logits.gather(0, last[None, :, None].expand(1, *output.shape))[0]
        evaluator.update(output, target)
        recorder.add(confidence.T, rank_of(logits, target).T)
        if on_batch is not None:
            on_batch(output, target, outputs, x)

    run_loader(
        predict or partial(predict_steps, plain if dynamic else model), loader, take, accelerator.device, accelerator,
        dtype, channels_last, desc, log_freq)
    confidence, rank = recorder.gather()
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    num_steps = rank.shape[1]
    if num_steps > 1:
        metrics.update({f'top1_step{t + 1}': 100 * int((rank[:, t] < 1).sum()) / len(rank) for t in range(num_steps)})
    metrics['count'] = len(rank)
    if not dynamic or predict is not None:
        return Evaluation(metrics, None)
    table = ExitTable(confidence, rank < 1, plain.step_macs, rank < 5)
    metrics['gmacs'] = plain.step_macs[-1] / 1e9 if policy is None else table.evaluate(policy).gmacs
    return Evaluation(metrics, table)
