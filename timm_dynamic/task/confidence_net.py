"""Training of confidence nets, which predict from sorted probabilities whether a classifier is correct."""
import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import nn

from ..layers.tabnet import FeatureTransformer, GhostBatchNorm, tabnet_linear
from ..models.confidence_net import ConfidenceNet, check_probabilities
from ..utils import derive_seed, seeded
from .base import OneModuleTask

_logger = logging.getLogger(__name__)

WRONG_WEIGHT = 2.0  # sampling weight of a wrong prediction; a correct one has 1


class SparseMasks(nn.Module):
    """The attentive masks of TabNet, whose entropy is part of the authors' training loss.

    In TabNet, a mask selects inputs of a step. Here the masks are not applied. Only the gradient of their entropy
    changes the features that they are computed from.

    Args:
        net: The confidence net to train. Only its sizes are read.
        gamma: With 1, each value can be selected once. Larger values allow it to be selected again.
        virtual_batch_size: See `GhostBatchNorm`.
        momentum: See `GhostBatchNorm`.
    """

    def __init__(
            self,
            net: ConfidenceNet,
            gamma: float = 1.3,
            virtual_batch_size: int = 128,
            momentum: float = 0.02,
    ) -> None:
        super().__init__()
        first: Any = net.steps[0]
        norm_args: dict[str, Any] = dict(
            virtual_batch_size=virtual_batch_size, momentum=momentum, device=net.head.weight.device,
            dtype=net.head.weight.dtype)
        width, num_own = first.norms[0].num_features // 2, len(first.layers)
        attention_dim = width - net.decision_dim
        if attention_dim < 1:
            raise ValueError(f'SparseMasks needs a net with an attention_dim of at least 1, got {attention_dim}.')
        self.gamma = gamma
        self.decision_dim = net.decision_dim
        self.splitter = FeatureTransformer(width, len(net.shared), num_own, **norm_args)
        dd = {k: norm_args[k] for k in ('device', 'dtype')}
        self.layers = nn.ModuleList([tabnet_linear(attention_dim, net.mapping_dim, 1., **dd) for _ in net.steps])
        self.norms = nn.ModuleList([GhostBatchNorm(net.mapping_dim, **norm_args) for _ in net.steps])

    def forward(self, net: ConfidenceNet, mapped: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Mean entropy of the masks.

        Args:
            net: The net. The masks of the first step use its shared layers.
            mapped: Mapped probabilities, see `ConfidenceNet.forward_steps`.
            features: Features of the steps, see `ConfidenceNet.forward_steps`.

        Returns:
            Mean over samples and steps in nats, a scalar.
        """
        layers = list(net.shared)
        source = self.splitter(layers[0](mapped), layers[1:])
        prior, entropy = torch.ones_like(mapped), mapped.new_zeros(())
        for layer, norm, feature in zip(self.layers, self.norms, features):
            mask = sparsemax(norm(layer(source[:, self.decision_dim:])) * prior)
            entropy = entropy - torch.special.xlogy(mask, mask.clamp(min=1e-15)).sum(dim=1).mean()
            prior, source = prior * (self.gamma - mask), feature
        return entropy / len(self.layers)


def sparsemax(x: torch.Tensor) -> torch.Tensor:
    """Project onto the probability simplex, which gives many exact zeros (https://arxiv.org/abs/1602.02068).

    Args:
        x: [B, n], floating point.

    Returns:
        Probabilities [B, n].
    """
    ordered = x.sort(dim=1, descending=True).values
    count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    excess = ordered.cumsum(dim=1) - 1
    support = (count * ordered > excess).sum(dim=1, keepdim=True)
    return (x - excess.gather(1, support - 1) / support).relu()


class ConfidenceModule(nn.Module):
    """A confidence net and the masks that its training loss needs, in one module to wrap.

    Args:
        net: The net.
    """

    def __init__(self, net: ConfidenceNet) -> None:
        super().__init__()
        self.net = net
        self.masks = SparseMasks(net)

    def forward(self, probabilities: torch.Tensor) -> dict[str, torch.Tensor]:
        """Score sorted probabilities [B, n]: 'output' [B], and in train mode the masks' 'entropy', a scalar."""
        mapped, features = self.net.forward_steps(probabilities)
        out = {'output': self.net.decide(features)}
        return {**out, 'entropy': self.masks(self.net, mapped, features)} if self.training else out


class ConfidenceTask(OneModuleTask):
    """Regression of 1 for correct and 0 for wrong predictions.

    Loss: mean squared error + `sparsity` · entropy of the masks.

    Args:
        net: Confidence net.
        sparsity: Weight of the entropy.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: As in timm's `TrainingTask`.
    """

    def __init__(
            self,
            net: ConfidenceNet,
            sparsity: float = 1e-3,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = ConfidenceModule(net).to(self.device)
        self.sparsity = sparsity

    @property
    def net(self) -> ConfidenceNet:
        module: Any = unwrap_model(self.trainable_module)
        return module.net

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Probabilities [B, n], in descending order.
            target: Whether the classifier is correct [B], bool or numbers from 0 to 1.

        Returns:
            'loss', 'output' (scores [B]), 'error' (mean squared error), and in train mode 'entropy'.
        """
        out = self.trainable_module(input)
        error = F.mse_loss(out['output'], target.to(out['output'].dtype))
        return {**out, 'error': error, 'loss': error + self.sparsity * out['entropy'] if 'entropy' in out else error}


@dataclass
class ConfidenceFit:
    """A trained confidence net and its errors.

    Attributes:
        net: The net with the weights of the best epoch, in eval mode.
        best_epoch: The epoch with the smallest validation error, counted from 0.
        val_error: Mean squared error on the validation part in that epoch.
        test_error: Mean squared error on the test part.
        history: 'train_loss' and 'val_error' of each epoch.
    """
    net: ConfidenceNet
    best_epoch: int
    val_error: float
    test_error: float
    history: list[dict[str, float]] = field(repr=False)


def draw_batches(correct: torch.Tensor, batch_size: int, seed: int, epoch: int) -> Iterator[torch.Tensor]:
    """Draw the batches of an epoch: N samples with replacement, wrong predictions twice as often as correct ones.

    Args:
        correct: Whether the classifier is correct [N], bool.
        batch_size: Batch size. The last batch may be smaller, but a batch of one sample is left out.
        seed: Seed.
        epoch: Epoch. Each epoch draws other samples.

    Yields:
        Indices of a batch, int64.
    """
    weights = torch.where(correct.cpu(), 1.0, WRONG_WEIGHT).double().cumsum(0)
    generator = torch.Generator().manual_seed(derive_seed(seed, 'confidence', epoch))
    drawn = torch.rand(len(correct), dtype=torch.float64, generator=generator) * weights[-1]
    order = torch.searchsorted(weights, drawn, right=True).clamp(max=len(correct) - 1)
    for batch in order.split(batch_size):
        if len(batch) > 1:  # batch norm needs two samples
            yield batch


def fit_confidence_net(
        probabilities: torch.Tensor,
        correct: torch.Tensor,
        net: ConfidenceNet | None = None,
        epochs: int = 200,
        batch_size: int = 256,
        lr: float = 0.02,
        clip_grad: float = 1.0,
        sparsity: float = 1e-3,
        patience: int = 50,
        split: tuple[float, float] = (0.8, 0.1),
        seed: int = 0,
) -> ConfidenceFit:
    """Train a confidence net as in the paper: Adam, weighted sampling, early stopping on a random validation part.

    Departure from the released code: the batch norm statistics are measured after each epoch. Running statistics
    (momentum 0.02) need some hundred updates to leave their initial values. On small data, early stopping would
    evaluate nets with wrong statistics.

    Args:
        probabilities: Probabilities in descending order [N, n], float32.
        correct: Whether the classifier is correct [N], bool.
        net: Net to start from (default: a new one).
        epochs: Largest number of epochs.
        batch_size: Batch size, at least 2.
        lr: Learning rate.
        clip_grad: Largest norm of the gradient.
        sparsity: See `ConfidenceTask`.
        patience: Stop after this number of epochs without a smaller validation error.
        split: Shares of the training and the validation part. The rest is the test part.
        seed: Random seed. The same seed gives the same net on the same machine.

    Raises:
        ValueError: The shapes do not match, the batch size is below 2, the probabilities are not valid or not sorted,
            there are too few samples for three parts, or the training diverges.
    """
    if probabilities.ndim != 2 or correct.shape != (len(probabilities),):
        raise ValueError(
            f'Expected probabilities [N, classes] and correct [N], got {list(probabilities.shape)} and '
            f'{list(correct.shape)}.')
    if batch_size < 2:
        raise ValueError(f'A confidence net needs batches of at least 2 rows, got {batch_size}.')
    check_probabilities(probabilities, is_sorted=True)
    sizes = [math.floor(len(correct) * share) for share in split]
    sizes.append(len(correct) - sum(sizes))
    if min(sizes[0] - 1, *sizes[1:]) < 1:
        raise ValueError(
            f'{len(correct)} samples are too few: the training, validation and test part would have {sizes}.')
    order = torch.randperm(len(correct), generator=torch.Generator().manual_seed(derive_seed(seed, 'confidence split')))
    parts = [(probabilities[rows], correct[rows].float()) for rows in order.split(sizes)]

    with seeded(seed, 'confidence weights'):
        task = ConfidenceTask(net or ConfidenceNet(), sparsity, verbose=False)
    parameters = list(task.trainable_module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    best: tuple[float, int, dict[str, Any]] = (math.inf, -1, {})
    history = []
    for epoch in range(epochs):
        task.train()
        total = 0.0
        for rows in draw_batches(parts[0][1] > 0.5, batch_size, seed, epoch):
            loss = task(parts[0][0][rows], parts[0][1][rows])['loss']
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip_grad)
            optimizer.step()
            total += loss.item() * len(rows)
        _measure_statistics(task, parts[0][0], draw_batches(parts[0][1] > 0.5, batch_size, seed, epoch))
        error = _error(task, *parts[1])
        history.append({'train_loss': total / sizes[0], 'val_error': error})
        if error < best[0]:
            best = error, epoch, copy.deepcopy(task.net.state_dict())
        elif epoch - best[1] >= patience:
            break
    if best[1] < 0:
        raise ValueError(
            f'The validation error is not finite in any of {len(history)} epochs. Try a smaller lr than {lr}.')
    task.net.load_state_dict(best[2])
    fit = ConfidenceFit(task.net.eval(), best[1], best[0], _error(task, *parts[2]), history)
    _logger.info(
        f'Confidence net: best of {len(history)} epochs is {fit.best_epoch}, mean squared error {fit.val_error:.4f} '
        f'(validation), {fit.test_error:.4f} (test).')
    return fit


@torch.no_grad()
def _measure_statistics(
        task: ConfidenceTask,
        probabilities: torch.Tensor,
        batches: Iterator[torch.Tensor],
        num_batches: int = 25,
) -> None:
    """Set the running statistics of the norms to their means over training batches."""
    norms = [m for m in task.net.modules() if isinstance(m, GhostBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    task.train()
    for rows in islice(batches, num_batches):
        task.net.score_sorted(probabilities[rows])
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


@torch.no_grad()
def _error(task: ConfidenceTask, probabilities: torch.Tensor, correct: torch.Tensor) -> float:
    task.eval()
    batches = zip(probabilities.split(1024), correct.split(1024))
    return float(sum((task.net.score_sorted(x) - y).square().sum() for x, y in batches) / len(correct))


def make_folds(num_samples: int, num_folds: int, seed: int = 0) -> torch.Tensor:
    """Assign samples to random folds, whose sizes differ by at most one.

    Returns:
        Fold of each sample [N], int64, from 0.

    Raises:
        ValueError: There are more folds than samples, or fewer than two.
    """
    if not 2 <= num_folds <= num_samples:
        raise ValueError(f'Expected 2 to {num_samples} (the number of samples) folds, got {num_folds}.')
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(derive_seed(seed, 'confidence folds')))
    folds = torch.empty(num_samples, dtype=torch.int64)
    folds[order] = torch.arange(num_samples) % num_folds
    return folds


def fit_folds(
        probabilities: torch.Tensor,
        correct: torch.Tensor,
        folds: torch.Tensor,
        seed: int = 0,
        **kwargs: Any,
) -> list[ConfidenceFit]:
    """Train a net for each fold, on the samples of the other folds.

    Args:
        probabilities: See `fit_confidence_net`.
        correct: See `fit_confidence_net`.
        folds: Fold of each sample [N], int64, from 0. Each fold needs samples. Rows of one image belong in one fold.
        seed: Seed.
        **kwargs: Arguments of `fit_confidence_net`.

    Raises:
        ValueError: There are not as many fold numbers as samples, fewer than two folds, or an empty fold.
    """
    num_folds = int(folds.max()) + 1
    empty = [k for k in range(num_folds) if not (folds == k).any()]
    if folds.shape != correct.shape or empty or num_folds < 2:
        raise ValueError(
            f'Expected the fold of each of {len(correct)} samples, and at least two folds with samples in each; got '
            f'shape {list(folds.shape)}, {num_folds} folds, empty folds: {empty}.')
    return [
        fit_confidence_net(probabilities[folds != k], correct[folds != k], seed=derive_seed(seed, 'fold', k), **kwargs)
        for k in range(num_folds)]


@torch.no_grad()
def score_folds(nets: Sequence[ConfidenceNet], probabilities: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """Score each sample with the net that was not trained on it.

    Args:
        nets: A net for each fold.
        probabilities: Probabilities in descending order [N, n].
        folds: Fold of each sample [N], int64. -1: no net was trained on it, its score is the mean over all nets.

    Returns:
        Scores [N], float32.

    Raises:
        ValueError: There are more folds than nets.
    """
    if len(folds) and int(folds.max()) >= len(nets):
        raise ValueError(f'Expected a net for each fold, got {len(nets)} nets for {int(folds.max()) + 1} folds.')
    scores = torch.zeros(len(probabilities))
    for k, net in enumerate(nets):
        rows = ((folds == k) | (folds < 0)).nonzero().squeeze(1)
        for part in rows.split(1024):
            scores[part] += net(probabilities[part]).float()
    return torch.where(folds < 0, scores / len(nets), scores)


def match_scores(scores: torch.Tensor, reference: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """Map the scores of several nets to the scale of one net. Then thresholds fitted on them are valid for that net.

    The nets of a cross-validation differ in scale. In each fold, the k-th smallest score is replaced with the k-th
    smallest reference score; equal scores get the mean of their replacements. The order within a fold does not change.

    Args:
        scores: Score of each sample by the net of its fold [N], see `score_folds`.
        reference: Score of each sample by the one net [N].
        folds: Fold of each sample [N], int64.

    Returns:
        Scores [N].
    """
    out = torch.empty_like(reference)
    for k in folds.unique().tolist():
        rows = (folds == k).nonzero().squeeze(1)
        _, group, counts = scores[rows].unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), dtype=out.dtype)
        sums.index_add_(0, group.sort().values, reference[rows].sort().values)
        out[rows] = (sums / counts)[group]
    return out
