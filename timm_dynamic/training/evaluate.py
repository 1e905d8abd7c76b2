"""Evaluation, the same in training and validation, in one process and in several."""
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from tqdm import tqdm


def progress_bar(iterable: Any, accelerator: Accelerator, **kwargs: Any) -> tqdm:
    """Progress bar of the main process: in a terminal, not in a log file."""
    return tqdm(iterable, disable=None if accelerator.is_main_process else True, **kwargs)


@torch.inference_mode()
def evaluate(
        model: Callable[[torch.Tensor], torch.Tensor],
        loader: Any,
        accelerator: Accelerator,
        create_evaluator: Callable[..., ClassificationEvaluator] = ClassificationEvaluator,
        channels_last: bool = False,
        tta: int = 0,
        desc: str = '',
        log_freq: int = 1,
        dtype: torch.dtype | None = None,
        on_batch: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
) -> dict[str, float]:
    """Evaluate a model on a loader, exact to the sample in several processes, uneven splits included.

    Args:
        model: Gives logits [B, num_classes]. Its mode is not changed.
        loader: A timm evaluation loader, of this process's share.
        accelerator: For autocast and processes.
        create_evaluator: Makes a timm evaluator.
        channels_last: Memory layout of images.
        tta: Average this many neighbouring outputs.
        desc: For the progress bar.
        log_freq: Batches between updates of the progress bar.
        dtype: Of images (default: as the loader gives them).
        on_batch: Called with logits and targets of every batch.

    Returns:
        Metrics of the evaluator and 'count', over all processes.
    """
    limit = evaluation_sample_limit(loader)
    evaluator = create_evaluator(device=accelerator.device, max_samples=limit)
    for input, target in progress_bar(loader, accelerator, desc=desc, leave=False, miniters=log_freq):
        input, target = input.to(accelerator.device, dtype), target.to(accelerator.device)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output = model(input)
            if isinstance(output, (tuple, list)):
                output = output[0]
        if tta > 1:
            output = output.unfold(0, tta, tta).mean(dim=2)
            target = target[::tta]
        evaluator.update(output, target)
        if on_batch is not None:
            on_batch(output, target)
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    metrics['count'] = int(accelerator.reduce(evaluator.counts[:1].clone(), 'sum')[0])
    return metrics
