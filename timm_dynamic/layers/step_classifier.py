"""Classifiers of glance-and-focus networks: one prediction per step, from the features of all steps so far."""
from typing import Any

import torch
from torch import nn


class StepClassifier(nn.Module):
    """Base of the step classifiers.

    The memory of the earlier steps is one batch-first tensor, which the caller passes from step to step.

    Args:
        widths: Input width of every head, by name.
        num_classes: Number of classes; with 0, heads are identities.
        num_steps: Number of steps T.
        drop_rate: Dropout before the heads.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            widths: dict[str, int],
            num_classes: int,
            num_steps: int,
            drop_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.widths = widths
        self.num_steps = num_steps
        self.drop = nn.Dropout(drop_rate)
        self.heads = nn.ModuleDict()
        self.reset(num_classes, device=device, dtype=dtype)

    def reset(self, num_classes: int, **dd: Any) -> None:
        """Replace the heads."""
        for name, width in self.widths.items():
            self.heads[name] = nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.heads.train(self.training)

    def head_name(self, t: int) -> str:
        """Name of the head of step t. The input of 'first' is the feature vector, that of other heads the memory."""
        raise NotImplementedError

    def update(self, feature: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        """Add the feature vector of a step [B, F] to the memory."""
        raise NotImplementedError

    @property
    def num_features(self) -> int:
        """Input width of the head of the last step."""
        return self.widths[self.head_name(self.num_steps - 1)]

    def pre_logits(
            self,
            t: int,
            feature: torch.Tensor,
            memory: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `forward`, but with the input of the head of step t in place of the logits."""
        memory = self.update(feature, memory)
        return self.drop(feature if self.head_name(t) == 'first' else memory), memory

    def forward(
            self,
            t: int,
            feature: torch.Tensor,
            memory: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict at step t.

        Args:
            t: Step, counted from 0.
            feature: Feature vector of this step [B, F].
            memory: Memory that the step before returned; None at step 0.

        Returns:
            Logits [B, num_classes], and the memory for the next step.
        """
        x, memory = self.pre_logits(t, feature, memory)
        return self.heads[self.head_name(t)](x), memory


class RecurrentStepClassifier(StepClassifier):
    """A GRU over the features and one head on its state. The memory is that state [B, H].

    Args:
        in_features: Width of the encoders' feature vectors F.
        num_classes: Number of classes.
        num_steps: Number of steps T.
        hidden_size: Width of the GRU H.
        first_head: Step 0 has a separate head on the feature alone. The GRU still processes the feature.
        drop_rate: Dropout before the heads.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            num_steps: int,
            hidden_size: int = 1024,
            first_head: bool = False,
            drop_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        widths = {**({'first': in_features} if first_head else {}), 'rnn': hidden_size}
        super().__init__(widths, num_classes, num_steps, drop_rate, **dd)
        self.first_head = first_head
        self.rnn = nn.GRUCell(in_features, hidden_size, **dd)

    def head_name(self, t: int) -> str:
        return 'first' if t == 0 and self.first_head else 'rnn'

    def update(self, feature: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        return self.rnn(feature, memory)


class ConcatStepClassifier(StepClassifier):
    """One head per step, on the features of all steps so far. The memory is these features [B, t·F].

    Args:
        in_features: Width of the encoders' feature vectors F.
        num_classes: Number of classes.
        num_steps: Number of steps T.
        drop_rate: Dropout before the heads.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            num_steps: int,
            drop_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        widths = {str(t + 1): (t + 1) * in_features for t in range(num_steps)}
        super().__init__(widths, num_classes, num_steps, drop_rate, device=device, dtype=dtype)

    def head_name(self, t: int) -> str:
        return str(t + 1)

    def update(self, feature: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        return feature if memory is None else torch.cat([memory, feature], dim=1)
