"""Base classes of the tasks."""
from collections.abc import Iterator
from typing import Any

import torch
from timm.task import TrainingTask
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..exits.collect import predict_steps


class TaskHooks:
    """Methods that the trainer calls in addition to those of timm's `TrainingTask`.

    Attributes:
        baseline_name: Name of the frozen baseline that the task learns from; '' if it has none. With a name, the task
            has `baseline` and `baseline_logits`, and the baseline's accuracy is checked before training.
    """
    baseline_name: str = ''

    def predict(self, model: nn.Module, x: Any) -> dict[str, torch.Tensor]:
        """Compute outputs for validation: 'logits' [T, B, num_classes] and 'confidence' [T, B], see `predict_steps`."""
        return predict_steps(model, x)

    def num_predictions(self, model: nn.Module) -> int:
        """Number of steps T that `predict` returns."""
        return getattr(model, 'num_steps', 1)

    def further_losses(self) -> Iterator[torch.Tensor]:
        """Yield the losses of additional updates on the last batch. Each is computed after the previous update."""
        return iter(())

    def diagnose(self) -> dict[str, torch.Tensor]:
        """Return scalars to log after the last update on a batch."""
        return {}


class OneModuleTask(TaskHooks, TrainingTask):
    """A task that trains one module. Only this module is wrapped.

    Attributes:
        trainable_module: The trained module. It may be wrapped.
        frozen: Modules that are not trained. They stay in eval mode.
    """
    trainable_module: Any
    frozen: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> Any:
        """Set the mode. Frozen modules stay in eval mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> Any:
        """Wrap the trained module, and only it, in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile the trained module."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module
