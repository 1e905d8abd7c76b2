"""What the tasks of this package have in common."""
from collections.abc import Iterator
from typing import Any

import torch
from timm.task import TrainingTask
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..exits.collect import predict_steps


class TaskHooks:
    """What the trainer asks of a task beside timm's `TrainingTask`."""

    def predict(self, model: nn.Module, x: Any) -> dict[str, torch.Tensor]:
        """Outputs to validate by: 'logits' [T, B, num_classes] and 'confidence' [T, B], see `predict_steps`."""
        return predict_steps(model, x)

    def num_predictions(self, model: nn.Module) -> int:
        """Number of steps T that `predict` gives."""
        return getattr(model, 'num_steps', 1)

    def further_losses(self) -> Iterator[torch.Tensor]:
        """Losses of further updates on the batch just learned from, each computed after the update before it."""
        return iter(())

    def diagnose(self) -> dict[str, torch.Tensor]:
        """Scalars to log after the last update on a batch."""
        return {}


class OneModuleTask(TaskHooks, TrainingTask):
    """A task with one module that learns: only that is wrapped.

    Attributes:
        trainable_module: What learns, maybe wrapped.
        frozen: Parts that do not learn: they stay in eval mode.
    """
    trainable_module: Any
    frozen: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> Any:
        """Set the mode; what is frozen stays in eval mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> Any:
        """Wrap what learns, and only it, in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile what learns."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module
