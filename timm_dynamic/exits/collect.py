"""Running a model over a loader once, with the results in the order of the dataset."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.task import evaluation_sample_limit
from timm.utils import unwrap_model
from tqdm import tqdm

from ..models.dynamic_net import DynamicNet
from .table import ExitTable

if TYPE_CHECKING:
    from accelerate import Accelerator

Outputs = Mapping[str, torch.Tensor]


def predict_steps(model: Any, x: Any) -> dict[str, torch.Tensor]:
    """Run all steps of a model; a static model has one.

    Args:
        model: A `DynamicNet`, or any classifier.
        x: Images, as the model's input.

    Returns:
        'logits' [T, B, num_classes] and 'confidence' [T, B].
    """
    if not hasattr(model, 'init_state'):
        logits = model(x)
        return with_confidence((logits[0] if isinstance(logits, (tuple, list)) else logits)[None])
    state = model.init_state(x)
    logits, confidence = [], []
    for t in range(model.num_steps):
        step_logits, state = model.step(t, state)
        logits.append(step_logits)
        confidence.append(model.confidence(step_logits, state))
    return {'logits': torch.stack(logits), 'confidence': torch.stack(confidence)}


def with_confidence(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of steps that are known by their logits [T, B, num_classes]: their confidence is the top probability."""
    return {'logits': logits, 'confidence': logits.float().softmax(dim=-1).amax(dim=-1)}


@torch.no_grad()
def run_loader(
        predict: Callable[[Any], Outputs],
        loader: Iterable[Any],
        on_batch: Callable[[Outputs, torch.Tensor, Any], Any],
        device: torch.device,
        accelerator: Accelerator | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        desc: str = '',
        log_freq: int = 1,
) -> None:
    """Run a model on all batches of a loader. Everything that evaluates goes through this loop.

    Args:
        predict: Gives the outputs for a batch, e.g. `predict_steps`. It is called under autocast.
        loader: Gives (x, target): the model's input and class indices [B].
        on_batch: Called with outputs, targets [B] and x of every batch, all on the device.
        device: Device of the model.
        accelerator: For autocast and a progress bar on the main process; without it there is neither.
        dtype: Dtype of the images. Default: that of the loader.
        channels_last: Use the channels-last memory format for the images.
        desc: Text of the progress bar.
        log_freq: Batches between updates of the progress bar.
    """
    layout = torch.channels_last if channels_last else torch.preserve_format
    hidden = True if accelerator is None or not accelerator.is_main_process else None  # None: in a terminal only
    for x, target in tqdm(loader, desc=desc, leave=False, miniters=log_freq, disable=hidden):
        x, target = move_images(x, device, dtype, layout), target.to(device)
        with accelerator.autocast() if accelerator else nullcontext():
            outputs = predict(x)
        on_batch(outputs, target, x)


def move_images(
        x: Any,
        device: torch.device,
        dtype: torch.dtype | None = None,
        layout: torch.memory_format = torch.preserve_format,
) -> Any:
    """Move images, or a tuple with images for each member of a cascade, to a device."""
    if isinstance(x, (tuple, list)):
        return tuple(move_images(view, device, dtype, layout) for view in x)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f'Expected images as a tensor, or a tuple of tensors, got {type(x).__name__}.')
    return x.to(device, dtype, memory_format=layout)


class SampleRecorder:
    """Collects values of every sample, batch by batch, and gathers those of all processes in the order of the dataset.

    Args:
        loader: The loader of the samples. Samples that its sampler repeats to make the processes' shares even are
            dropped.
        accelerator: Knows the processes; without it there is one.
    """

    def __init__(self, loader: Any, accelerator: Accelerator | None = None) -> None:
        self.limit = evaluation_sample_limit(loader)
        self.accelerator = accelerator
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def add(self, *values: torch.Tensor) -> None:
        """Add a batch: tensors [B, ...], the same number of tensors every time."""
        self._batches.append(tuple(value.detach().cpu() for value in values))

    def gather(self) -> tuple[torch.Tensor, ...]:
        """The values of all samples: tensors [N, ...] on the CPU, the same in every process.

        Raises:
            ValueError: There were no batches.
        """
        if not self._batches:
            raise ValueError('The loader gives no images.')
        values = tuple(torch.cat(parts)[:self.limit] for parts in zip(*self._batches))
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return values
        from accelerate.utils import gather_object  # late: importing accelerate takes a second
        join = torch.cat if self.limit is None else interleave  # an iterable dataset has no order
        return tuple(join(shares) for shares in zip(*gather_object([values])))


def interleave(shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put shares of processes, each of which took every n-th sample, into the order of the dataset."""
    out = torch.cat(list(shares))
    for rank, share in enumerate(shares):
        out[rank::len(shares)] = share
    return out


def rank_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Number of classes ranked before the true one. Of equal logits the first class comes first, as with argmax.

    Args:
        logits: [..., B, num_classes].
        target: True classes [B], int64.

    Returns:
        [..., B] int64; 0 where the prediction is correct.
    """
    own = logits.gather(-1, target.expand(logits.shape[:-1])[..., None])
    later = torch.arange(logits.shape[-1], device=logits.device) >= target[:, None]
    ahead = ~(logits < own) & ~((logits == own) & later)  # NaN logits: all classes
    return ahead.sum(dim=-1)


def collect_exit_table(model: Any, loader: Iterable[Any], accelerator: Accelerator | None = None) -> ExitTable:
    """Run all steps on all images once, and record confidence, correctness and prediction after each step.

    Args:
        model: A `DynamicNet` in eval mode.
        loader: Gives (x, target) with x as for `early_exit` and class indices [B]. With several processes, timm's
            loader of this process's share (`distributed=True`).
        accelerator: For device, autocast and processes; without it, one process on the model's device.

    Returns:
        The same table in every process, in the order of the dataset.

    Raises:
        ValueError: The model is in train mode, or the loader is empty.
    """
    model = check_ready(model)
    recorder = SampleRecorder(loader, accelerator)

    def on_batch(outputs: Outputs, target: torch.Tensor, x: Any) -> None:
        logits = outputs['logits']
        recorder.add(outputs['confidence'].T, rank_of(logits, target).T, logits.argmax(dim=-1).T)

    run_loader(partial(predict_steps, model), loader, on_batch, next(model.parameters()).device, accelerator)
    confidence, rank, predicted = recorder.gather()
    return ExitTable(confidence, rank < 1, model.step_macs, correct_top5=rank < 5, predicted=predicted)


def check_ready(model: Any) -> DynamicNet:
    """Unwrap a model, and check that it can exit early.

    Raises:
        ValueError: It has no steps, or is in train mode.
    """
    model = unwrap_model(model)
    if not hasattr(model, 'num_steps'):  # anything that follows the step protocol will do
        raise ValueError(f'A {type(model).__name__} has no steps to exit after: expected a DynamicNet.')
    if model.training:
        raise ValueError('Early exit needs a model in eval mode: call model.eval() first.')
    return model
