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


class StepRecorder:
    """A dynamic model to `evaluate`: gives the logits of the last step, and remembers who was right after each step.

    Args:
        forward: Gives the logits of all steps [T, B, num_classes].
        keep: Remember so many images, too.

    Attributes:
        images: The first images [n, C, S, S] seen, and `targets` their classes [n]; None if none are kept.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], keep: int = 0) -> None:
        self.forward, self.keep = forward, keep
        self.images: torch.Tensor | None = None
        self.targets: torch.Tensor | None = None
        self._logits = torch.empty(0)
        self._input = torch.empty(0)
        self._hits: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._input, self._logits = x, self.forward(x)
        return self._logits[-1]

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take in the targets of the batch just seen. See `evaluate`, which may have averaged neighbouring outputs."""
        logits = self._logits.unflatten(1, (len(target), -1)).mean(dim=2)
        self._hits.append(logits.argmax(dim=-1) == target)
        if self.keep and self.images is None:
            first_views = self._input[::len(self._input) // len(target)]
            self.images, self.targets = first_views[:self.keep].clone(), target[:self.keep].clone()

    def accuracy(self, limit: int | None, accelerator: Accelerator) -> dict[str, float]:
        """Top-1 accuracy (%) after each step, over all processes: 'top1_step1' and so on.

        Args:
            limit: Number of this process's samples that count; the rest is padding.
            accelerator: Processes.
        """
        hits = torch.cat(self._hits, dim=1)[:, :limit]
        sums = torch.cat([hits.sum(dim=1), hits.new_ones(1, dtype=torch.int64) * hits.shape[1]])
        *right, count = accelerator.reduce(sums, 'sum').tolist()
        return {f'top1_step{t}': 100 * n / count for t, n in enumerate(right, 1)}


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
