"""Focus-picking loss.

Paper: `FocusNet: Classifying better by focusing on confusing classes` - Zhang, Sheng, Shen, Pattern Recognition 2022,
https://doi.org/10.1016/j.patcog.2022.108709
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class FocusPickingTerms(NamedTuple):
    """The three terms of the loss: scalars, averaged over the batch."""
    classification: torch.Tensor
    attention: torch.Tensor
    negentropy: torch.Tensor


class FocusPickingLoss(nn.Module):
    """Cross-entropy that concentrates on the classes that a frozen baseline confuses.

    With focus logits z, baseline logits b (constant) and smoothed one-hot targets t:

    - classification: cross-entropy of t and z + softmax(z) - softmax(b). The more confident the baseline is in a wrong
      class, the more confident the focus net must be in the right one.
    - attention: cross-entropy of z and the uniform distribution over the target and the classes that the baseline
      considers, i.e. those with softmax(b / temperature) > 1 / num_classes.
    - negentropy: sum of p log p with p = softmax(z). It counteracts over-confidence.

    Departure from the released code: its targets are float64, and so are its sums. Here sums are float32, or in the
    dtype of the logits if that is wider; the two agree to about 1e-6 relative. Half precision logits, as in autocast,
    are converted first.

    Args:
        smoothing: Label smoothing of the classification term.
        temperature: Softens the probabilities of the baseline when its confused classes are picked.
        attention_weight: Weight of the attention term.
        negentropy_weight: Weight of the negative entropy.
    """

    def __init__(
            self,
            smoothing: float = 0.1,
            temperature: float = 2.0,
            attention_weight: float = 1.0,
            negentropy_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f'smoothing must be in [0, 1), got {smoothing}.')
        if temperature <= 0:
            raise ValueError(f'temperature must be positive, got {temperature}.')
        self.smoothing = smoothing
        self.temperature = temperature
        self.attention_weight = attention_weight
        self.negentropy_weight = negentropy_weight

    def extra_repr(self) -> str:
        return (f'smoothing={self.smoothing}, temperature={self.temperature}, '
                f'attention_weight={self.attention_weight}, negentropy_weight={self.negentropy_weight}')

    def terms(self, logits: torch.Tensor, target: torch.Tensor, baseline_logits: torch.Tensor) -> FocusPickingTerms:
        """Compute the terms, unweighted.

        Args:
            logits: Logits of the focus net [B, C], floating point.
            target: Class indices [B], int64; or soft targets [B, C], e.g. from mixup. Soft targets are not smoothed
                again, and every class in them counts as a target in the attention term.
            baseline_logits: Logits of the baseline [B, C]. They get no gradient.

        Raises:
            ValueError: The shapes do not match.
        """
        if logits.ndim != 2 or baseline_logits.shape != logits.shape:
            raise ValueError(
                f'Expected logits and baseline logits of one shape [batch, classes], got {tuple(logits.shape)} '
                f'and {tuple(baseline_logits.shape)}.')
        soft = target.ndim == 2
        if target.shape != (logits.shape if soft else logits.shape[:1]):
            raise ValueError(
                f'Expected targets [batch] or [batch, classes] for logits {tuple(logits.shape)}, '
                f'got {tuple(target.shape)}.')
        dtype = torch.promote_types(logits.dtype, torch.float32)
        z, b = logits.to(dtype), baseline_logits.detach().to(dtype)
        num_classes = z.shape[1]
        log_p = F.log_softmax(z, dim=1)
        p = log_p.exp()

        if soft:
            target = target.to(dtype)
            classification = F.cross_entropy(z + p - b.softmax(dim=1), target)
            picked = target > target.amin(dim=1, keepdim=True)  # the floor is mixup's smoothing
        else:
            classification = F.cross_entropy(z + p - b.softmax(dim=1), target, label_smoothing=self.smoothing)
            picked = F.one_hot(target, num_classes).bool()

        picked = picked | ((b / self.temperature).softmax(dim=1) > 1 / num_classes)
        attention = -((picked * log_p).sum(dim=1) / picked.sum(dim=1)).mean()
        negentropy = (p * log_p).sum(dim=1).mean()
        return FocusPickingTerms(classification, attention, negentropy)

    def total(self, terms: FocusPickingTerms) -> torch.Tensor:
        """Weighted sum of the terms, a scalar."""
        classification, attention, negentropy = terms
        return classification + self.attention_weight * attention + self.negentropy_weight * negentropy

    def forward(self, logits: torch.Tensor, target: torch.Tensor, baseline_logits: torch.Tensor) -> torch.Tensor:
        """Compute the loss, a scalar. See `terms` for the arguments."""
        return self.total(self.terms(logits, target, baseline_logits))
