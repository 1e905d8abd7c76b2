"""Training of confidence nets: to tell from sorted probabilities whether a classifier is right."""
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

WRONG_WEIGHT = 2.0  # wrong predictions are drawn so many times as often as right ones


class SparseMasks(nn.Module):
    """The attentive masks of TabNet, which the authors' training loss keeps sparse.

    In TabNet, a mask selects among the inputs of a step. Here nothing is masked, but the entropy of the masks is part
    of the loss and shapes the features that the masks are computed from.

    Args:
        net: The confidence net to be trained. Only its sizes are read.
        gamma: With 1, a value can be selected once; larger values allow more.
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
            raise ValueError('Masks need a net with an attention_dim of at least 1.')
        self.gamma = gamma
        self.decision_dim = net.decision_dim
        self.splitter = FeatureTransformer(width, len(net.shared), num_own, **norm_args)
        dd = {k: norm_args[k] for k in ('device', 'dtype')}
        self.layers = nn.ModuleList([tabnet_linear(attention_dim, net.mapping_dim, 1., **dd) for _ in net.steps])
        self.norms = nn.ModuleList([GhostBatchNorm(net.mapping_dim, **norm_args) for _ in net.steps])

    def forward(self, net: ConfidenceNet, mapped: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Mean entropy of the masks.

        Args:
            net: The net; the masks of the first step use its shared layers.
            mapped: Mapped probabilities, see `ConfidenceNet.forward_steps`.
            features: Features of the steps, see `ConfidenceNet.forward_steps`.

        Returns:
            Mean over samples and steps, in nats, scalar.
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
    """A confidence net and the masks that its training loss needs: wrapped, optimised and saved together.

    Args:
        net: The net.
    """

    def __init__(self, net: ConfidenceNet) -> None:
        super().__init__()
        self.net = net
        self.masks = SparseMasks(net)

    def forward(self, probabilities: torch.Tensor) -> dict[str, torch.Tensor]:
        """'output' [B], the scores of sorted probabilities [B, n]; and in train mode the masks' 'entropy', scalar."""
        mapped, features = self.net.forward_steps(probabilities)
        out = {'output': self.net.decide(features)}
        return {**out, 'entropy': self.masks(self.net, mapped, features)} if self.training else out


class ConfidenceTask(OneModuleTask):
    """Regression of 1 (right) and 0 (wrong), with masks that are kept sparse.

    Loss: mean squared error + `sparsity` · entropy of the masks.

    Args:
        net: Confidence net.
        sparsity: Weight of the entropy.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log what is used.
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
            input: Probabilities [B, n], sorted falling.
            target: Whether the classifier was right [B], bool or numbers from 0 to 1.

        Returns:
            'loss', 'output' (scores [B]), 'error' (the mean squared one), and in train mode 'entropy'.
        """
        out = self.trainable_module(input)
        error = F.mse_loss(out['output'], target.to(out['output'].dtype))
        return {**out, 'error': error, 'loss': error + self.sparsity * out['entropy'] if 'entropy' in out else error}


@dataclass
class ConfidenceFit:
    """A trained confidence net, and how it came about.

    Attributes:
        net: With the weights of the best epoch, in eval mode.
        best_epoch: Counted from 0.
        val_error: Mean squared error of the held-out part that chose the epoch.
        test_error: That of the part that chose nothing.
        history: 'train_loss' and 'val_error' of each epoch.
    """
    net: ConfidenceNet
    best_epoch: int
    val_error: float
    test_error: float
    history: list[dict[str, float]] = field(repr=False)


def draw_batches(correct: torch.Tensor, batch_size: int, seed: int, epoch: int) -> Iterator[torch.Tensor]:
    """Indices of an epoch's batches: as many samples as there are, with replacement, wrong ones drawn twice as often.

    Args:
        correct: Whether the classifier was right [N], bool.
        batch_size: Size of a batch; the last one may be smaller, but has two samples at least.
        seed: Seed; each epoch has draws of its own.
        epoch: Epoch.
    """
    weights = torch.where(correct.cpu(), 1.0, WRONG_WEIGHT).double().cumsum(0)
    generator = torch.Generator().manual_seed(derive_seed(seed, 'confidence', epoch))
    drawn = torch.rand(len(correct), dtype=torch.float64, generator=generator) * weights[-1]
    order = torch.searchsorted(weights, drawn, right=True).clamp(max=len(correct) - 1)
    for batch in order.split(batch_size):
        if len(batch) > 1:  # a batch norm needs two
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
    """Train a confidence net as the paper does.

    Adam, weighted sampling, a random part to stop early on and one to test on. Departure from the released code: the
    statistics of the norms are measured after each epoch. Running ones (momentum 0.02) need some hundred updates to
    leave their initial values, and on small data early stopping would judge nets by those.

    Args:
        probabilities: Sorted falling [N, n], float32.
        correct: Whether the classifier was right [N], bool.
        net: Net to start from; by default a new one.
        epochs: At most so many.
        batch_size: Batch size.
        lr: Learning rate.
        clip_grad: Largest norm of the gradient.
        sparsity: See `ConfidenceTask`.
        patience: Stop after so many epochs without a smaller validation error.
        split: Shares to train and to validate on; the rest is for testing.
        seed: Seed of everything random. The same seed gives the same net on the same machine.

    Raises:
        ValueError: Shapes do not go together, these are no sorted probabilities, or there are too few samples for three
            parts.
    """
    if probabilities.ndim != 2 or correct.shape != (len(probabilities),):
        raise ValueError(
            f'Expected probabilities [N, classes] and correct [N], got {list(probabilities.shape)} and '
            f'{list(correct.shape)}.')
    check_probabilities(probabilities, is_sorted=True)
    sizes = [math.floor(len(correct) * share) for share in split]
    sizes.append(len(correct) - sum(sizes))
    if min(sizes[0] - 1, *sizes[1:]) < 1:
        raise ValueError(f'{len(correct)} samples are too few to be split into training, validation and test: {sizes}.')
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
            f'The validation error is no number in any of {len(history)} epochs: try a smaller lr than {lr}.')
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
    """Set the norms' running statistics to their mean over batches such as are trained on."""
    norms = [m for m in task.net.modules() if isinstance(m, GhostBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all
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
    """Random folds of equal size, or one more in some [N] int64.

    Raises:
        ValueError: There are more folds than samples, or fewer than two.
    """
    if not 2 <= num_folds <= num_samples:
        raise ValueError(f'Expected 2 to {num_samples} folds, as many as there are samples, got {num_folds}.')
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
        correct: Likewise.
        folds: Fold of each sample [N] int64, from 0; each has samples. Rows of one image belong to one fold.
        seed: Seed.
        **kwargs: For `fit_confidence_net`.
    """
    num_folds = int(folds.max()) + 1
    empty = [k for k in range(num_folds) if not (folds == k).any()]
    if folds.shape != correct.shape or empty or num_folds < 2:
        raise ValueError(
            f'Expected a fold for each of {len(correct)} samples and none empty, got shape {list(folds.shape)}, '
            f'{num_folds} folds, empty: {empty}.')
    return [
        fit_confidence_net(probabilities[folds != k], correct[folds != k], seed=derive_seed(seed, 'fold', k), **kwargs)
        for k in range(num_folds)]


@torch.no_grad()
def score_folds(nets: Sequence[ConfidenceNet], probabilities: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """Score each sample with the net that has not seen it.

    Args:
        nets: A net for each fold.
        probabilities: Sorted falling [N, n].
        folds: Fold of each sample [N] int64; -1 for what no net has seen, which has the mean score of all.

    Returns:
        Scores [N], float32.

    Raises:
        ValueError: There are more folds than nets.
    """
    if len(folds) and int(folds.max()) >= len(nets):
        raise ValueError(f'There are {len(nets)} nets, but a sample of fold {int(folds.max())}, counted from 0.')
    scores = torch.zeros(len(probabilities))
    for k, net in enumerate(nets):
        rows = ((folds == k) | (folds < 0)).nonzero().squeeze(1)
        for part in rows.split(1024):
            scores[part] += net(probabilities[part]).float()
    return torch.where(folds < 0, scores / len(nets), scores)


def match_scores(scores: torch.Tensor, reference: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """Bring the scores of several nets to the scale of one, so that thresholds fitted on them fit that one.

    Nets that were trained alike still differ in scale. In each fold the k-th smallest score becomes the k-th smallest
    of the reference, equal ones the mean of theirs: the order of what one net has scored stays, and any threshold parts
    as many as in the reference.

    Args:
        scores: Of each sample by the net of its fold [N], see `score_folds`.
        reference: Of the same samples by one net [N].
        folds: Fold of each sample [N] int64.

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
