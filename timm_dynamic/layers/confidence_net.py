"""The confidence net: how likely is a classifier right, judged by its sorted probabilities alone.

Paper: `CLCNet: Rethinking of Ensemble Modeling with Classification Confidence Network` - Yao et al., 2022,
https://arxiv.org/abs/2205.09612

The n sorted probabilities are mapped to 100 numbers by an attention in which the largest one asks; these go through the
feature transformers of a TabNet (https://arxiv.org/abs/1908.07442).

Departures from the released code (https://github.com/yaoching0/CLCNet-Rethinking-of-Ensemble-Modeling), none of which
changes a score:
* There, every token asks and one answer is used; a second attention, two input norms and the sparse masks are computed
  and never reach the score. None of that is in the model, so that cost and memory are linear in n. The masks shape the
  training loss, and live in `SparseMasks`.
* Layers that the steps share have one name.
"""
import io
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import clean_state_dict
from torch import nn

from ..utils import CheckpointError, atomic_write, describe_mismatch, fetch_weights, read_state_dict

_BUMP_WIDTH = 0.01  # standard deviation of the bumps, on a scale where the tokens span 0..1
_SUM_TOLERANCE = 0.15  # the authors' tutorial scores vectors that sum to 1.1
_SQRT_HALF = math.sqrt(0.5)
# With ten classes the released nets give scores of up to 49, in which a rounding of the attention shows in the fourth
# decimal. Up to so many classes, sums are taken in the authors' order, so that their scores come out to the last digit.
_FEW = 128


def restricted_attention(probabilities: torch.Tensor, logits: torch.Tensor, size: int = 100) -> torch.Tensor:
    """Map any number of sorted probabilities to a fixed number of values: the answer to one query.

    The value of token j is x_j · g_j, where g_j is a Gaussian bump at j / n, sampled at `size` points from 0 to 1.

    Args:
        probabilities: Sorted falling [B, n].
        logits: Attention logits of the query for each token [B, n].
        size: Number of values.

    Returns:
        Values, sorted falling [B, size].
    """
    n, device = probabilities.shape[1], probabilities.device
    weights = logits.softmax(dim=1)
    points = torch.arange(size, device=device) * n
    distance = points - torch.arange(n, device=device)[:, None] * (size - 1)  # in units of 1 / (n · (size - 1))
    exact = n <= _FEW and device.type != 'mps'
    distance = distance.to(torch.float64 if exact else torch.float32) / ((size - 1) * n * _BUMP_WIDTH)
    bumps = (-distance.square() / 2).exp().to(probabilities.dtype)
    if n <= _FEW:
        mapped = (weights[:, None] @ (bumps * probabilities[..., None])).squeeze(1)
    else:
        mapped = (weights * probabilities) @ bumps
    return mapped.sort(dim=1, descending=True).values


def _no_autocast(x: torch.Tensor) -> Any:
    """Scores differ by less than half precision can tell; and the net costs next to nothing."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class GhostBatchNorm(nn.BatchNorm1d):
    """Batch norm that in training takes the statistics of equal parts of the batch, of at most so many samples.

    Args:
        num_features: Width.
        virtual_batch_size: Largest part.
        momentum: Of the running statistics.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            num_features: int,
            virtual_batch_size: int = 128,
            momentum: float = 0.02,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, momentum=momentum, device=device, dtype=dtype)
        self.virtual_batch_size = virtual_batch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = math.ceil(len(x) / self.virtual_batch_size)
        if not self.training or parts < 2:
            return super().forward(x)
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in x.chunk(parts)])


def _linear(in_features: int, out_features: int, gain: float, **dd: Any) -> nn.Linear:
    """A layer without bias, with TabNet's initial values: normal with a deviation of gain · in_features^-1/4."""
    layer = nn.Linear(in_features, out_features, bias=False, **dd)
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight, std=gain * in_features ** -0.25)
    return layer


class FeatureTransformer(nn.Module):
    """Gated linear layers with residuals: first the shared ones, which the caller hands in, then its own.

    Args:
        width: Width of the output; layers are twice as wide, half of it being gates.
        num_shared: Number of shared layers, one at least. The first has no residual.
        num_own: Number of layers of its own.
        **norm_args: For `GhostBatchNorm`. Every layer has a norm of its own.
    """

    def __init__(self, width: int, num_shared: int, num_own: int, **norm_args: Any) -> None:
        super().__init__()
        dd = {k: norm_args[k] for k in ('device', 'dtype') if k in norm_args}
        self.layers = nn.ModuleList([_linear(width, 2 * width, math.sqrt(2), **dd) for _ in range(num_own)])
        self.norms = nn.ModuleList([GhostBatchNorm(2 * width, **norm_args) for _ in range(num_shared + num_own)])

    def forward(self, projected: torch.Tensor, shared: Sequence[nn.Module]) -> torch.Tensor:
        """Transform.

        Args:
            projected: What the first shared layer gives [B, 2 · width]; it is the same for all transformers.
            shared: The other shared layers.

        Returns:
            Features [B, width].
        """
        x = F.glu(self.norms[0](projected))
        for layer, norm in zip([*shared, *self.layers], list(self.norms)[1:], strict=True):
            x = (x + F.glu(norm(layer(x)))) * _SQRT_HALF
        return x


class ConfidenceNet(nn.Module):
    """Predict from sorted probabilities how likely it is that the largest one is the right class's.

    It takes any number of classes n. The score is about 0 (wrong) to 1 (right), not confined to that range.

    Args:
        num_steps: Number of decision steps.
        decision_dim: Width of what a step adds to the decision.
        attention_dim: Width of what a step hands to the masks in training.
        mapping_dim: Number of values that the probabilities are mapped to.
        key_dim: Width of query and keys.
        num_shared: Layers that all steps share.
        num_independent: Layers of each step.
        virtual_batch_size: See `GhostBatchNorm`.
        momentum: See `GhostBatchNorm`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            num_steps: int = 3,
            decision_dim: int = 8,
            attention_dim: int = 8,
            mapping_dim: int = 100,
            key_dim: int = 10,
            num_shared: int = 2,
            num_independent: int = 2,
            virtual_batch_size: int = 128,
            momentum: float = 0.02,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(num_steps, decision_dim, mapping_dim, key_dim, num_shared) < 1 or mapping_dim < 2:
            raise ValueError('num_steps, decision_dim, key_dim and num_shared must be at least 1, mapping_dim 2.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        width = decision_dim + attention_dim
        self.decision_dim = decision_dim
        self.mapping_dim = mapping_dim
        self.query = nn.Linear(1, key_dim, **dd)
        self.key = nn.Linear(1, key_dim, **dd)
        self.shared = nn.ModuleList([
            _linear(width if i else mapping_dim, 2 * width, math.sqrt(2), **dd) for i in range(num_shared)])
        self.steps = nn.ModuleList([
            FeatureTransformer(
                width, num_shared, num_independent, virtual_batch_size=virtual_batch_size, momentum=momentum, **dd)
            for _ in range(num_steps)])
        self.head = _linear(decision_dim, 1, 1., **dd)

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Score sorted probabilities.

        Args:
            probabilities: [B, n], sorted falling, each row summing to about 1.

        Returns:
            Scores [B], in the dtype of the parameters.

        Raises:
            ValueError: They are no probabilities, or not sorted: sort them, or let `score` do it.
        """
        if not torch.compiler.is_compiling() and not probabilities.is_meta:
            check_probabilities(probabilities, is_sorted=True)
        return self.score_sorted(probabilities)

    def score(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Score probabilities in any order, of any classifier: the classes in theirs, for example.

        Args:
            probabilities: [B, n], each row summing to about 1.

        Returns:
            Scores [B].

        Raises:
            ValueError: They are no probabilities.
        """
        check_probabilities(probabilities, is_sorted=False)
        return self.score_sorted(probabilities.sort(dim=1, descending=True).values)

    def score_sorted(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Like `forward`, with nothing checked: a GPU is not waited for."""
        _, features = self.forward_steps(probabilities)
        return self.decide(features)

    def forward_steps(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decision is made of, for training.

        Returns:
            The mapped probabilities [B, mapping_dim], and the steps' features
            [num_steps, B, decision_dim + attention_dim].
        """
        with _no_autocast(probabilities):
            x = probabilities.to(self.head.weight.dtype)
            mapped = restricted_attention(x, self.attention_logits(x), self.mapping_dim)
            first, *shared = self.shared
            projected = first(mapped)
            return mapped, torch.stack([step(projected, shared) for step in self.steps])

    def attention_logits(self, probabilities: torch.Tensor) -> torch.Tensor:
        """How much the first token asks for each token [B, n]. Keys are linear in x, and so are the logits."""
        x, scale = probabilities, math.sqrt(self.mapping_dim)  # the authors' scale; key_dim would be the usual one
        if x.shape[1] <= _FEW:
            return (self.query(x[..., None]) @ self.key(x[..., None]).transpose(1, 2) / scale)[:, 0]
        query = self.query(x[:, :1])
        slope, offset = (query @ self.key.weight) / scale, (query @ self.key.bias[:, None]) / scale
        return slope * x + offset

    def decide(self, features: torch.Tensor) -> torch.Tensor:
        """Scores [B] from the steps' features."""
        with _no_autocast(features):
            return self.head(features[..., :self.decision_dim].relu().sum(dim=0)).squeeze(1)

    @classmethod
    def from_pretrained(
            cls,
            source: str | Path | Mapping[str, torch.Tensor],
            cache_dir: str | Path | None = None,
    ) -> 'ConfidenceNet':
        """Make a net from weights, in eval mode. Its widths are those of the weights.

        Args:
            source: A file (also the authors' zip), a folder, 'ORG/NAME' or 'ORG/NAME@REVISION' on the Hugging Face Hub,
                or a state dict: of such a net, of the authors', or of a whole cascade.
            cache_dir: Where the Hub's files are kept.

        Raises:
            CheckpointError: There are no such weights, or they are of something else.
        """
        label = 'The state dict' if isinstance(source, Mapping) else f"'{source}'"
        state_dict = source if isinstance(source, Mapping) else read_confidence_net(_locate(source, cache_dir))
        state_dict = confidence_net_filter_fn(state_dict)
        prefix = 'confidence_net.'
        if any(k.startswith(prefix) for k in state_dict):
            state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        try:
            args: dict[str, Any] = _args_of(state_dict)
            net = cls(**args)
        except (KeyError, IndexError, ValueError) as e:
            first = next(iter(state_dict), 'nothing')
            raise CheckpointError(f"{label} holds no confidence net (its first key: '{first}').") from e
        target = net.state_dict()
        missing = [k for k in target if k not in state_dict]
        unexpected = [k for k in state_dict if k not in target]
        shapes = [f"'{k}' {tuple(v.shape)} instead of {tuple(target[k].shape)}"
                  for k, v in state_dict.items() if k in target and v.shape != target[k].shape]
        if missing or unexpected or shapes:
            raise CheckpointError(f'{label} is no confidence net: {describe_mismatch(missing, unexpected, shapes)}.')
        net.load_state_dict(dict(state_dict))
        return net.eval()

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors, whole or not at all: for `from_pretrained`."""
        with atomic_write(path) as tmp:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, tmp)


class SparseMasks(nn.Module):
    """The attentive masks of TabNet, which the authors' training loss keeps sparse: for training only.

    A mask chooses among the mapped values of a step. Here nothing is masked; but the loss has the masks' entropy in it,
    which shapes the features that they are made of.

    Args:
        net: The confidence net to be trained. It is not kept.
        gamma: 1 forbids to choose a value twice; larger allows more.
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
        self.layers = nn.ModuleList([_linear(attention_dim, net.mapping_dim, 1., **dd) for _ in net.steps])
        self.norms = nn.ModuleList([GhostBatchNorm(net.mapping_dim, **norm_args) for _ in net.steps])

    def forward(self, net: ConfidenceNet, mapped: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Mean entropy of the masks.

        Args:
            net: The net; the masks before the first step are made with its shared layers.
            mapped: See `ConfidenceNet.forward_steps`.
            features: Likewise.

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
    """Nearest point of the probability simplex, with many exact zeros (https://arxiv.org/abs/1602.02068).

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


def check_probabilities(probabilities: torch.Tensor, is_sorted: bool) -> None:
    """Raise a ValueError, which names the row, if these are no probabilities [B, n], or not sorted falling."""
    if probabilities.ndim != 2 or probabilities.shape[1] < 1 or not probabilities.is_floating_point():
        raise ValueError(
            f'Expected probabilities [batch, classes], floating point, got {list(probabilities.shape)} '
            f'{str(probabilities.dtype)[6:]}.')
    x = probabilities.detach()
    sums = x.sum(dim=1, dtype=torch.float32)
    bad = ~((x.amin(dim=1) >= 0) & ((sums - 1).abs() <= _SUM_TOLERANCE))  # also what is not a number
    unsorted = (x[:, 1:] > x[:, :-1]).any(dim=1) if is_sorted else torch.zeros_like(bad)
    if not (bad | unsorted).any():
        return
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(
            f'Expected probabilities, each row non-negative and summing to 1: row {row} has a minimum of '
            f'{x[row].min():.4g} and a sum of {sums[row]:.4g}. Of logits, take the softmax first.')
    raise ValueError(
        f'Expected probabilities sorted falling: row {int(unsorted.int().argmax())} is not. Sort them, or use score().')


# Weights from outside

_ALIASES = (r'encoder\.(?:initial_splitter|feat_transformers\.\d+)\.shared\.'
            r'(?:shared_layers\.(\d+)|glu_layers\.(\d+)\.fc)')
_UNUSED = r'(?:encoder\.)?initial_bn\.|encoder\.(?:initial_splitter|att_transformers|nor_att)\.'


def confidence_net_filter_fn(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Map the keys of the authors' confidence nets onto ours. Other weights pass as they are.

    What never reaches a score is left out, and layers that are stored under several names are merged.

    Raises:
        CheckpointError: Layers that are one in the net differ in the file, or there are keys of something else.
    """
    state_dict = {k.removeprefix('tabnet.'): v for k, v in clean_state_dict(dict(state_dict)).items()}
    if 'encoder.res_att.query.weight' not in state_dict:
        return state_dict
    out: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    num_shared = 1 + max((int(i) for key in state_dict for match in [re.match(_ALIASES, key)] if match
                          for i in match.groups() if i), default=-1)
    unexpected = []
    for key, value in state_dict.items():
        if match := re.fullmatch(rf'{_ALIASES}\.weight', key):
            name = f'shared.{match[1] or match[2]}.weight'
            if name in out and not torch.equal(out[name], value):
                raise CheckpointError(
                    f"'{names[name]}' and '{key}' are one layer in the net, but differ in the file: it is damaged, or "
                    'made by other code.')
        elif match := re.fullmatch(r'encoder\.feat_transformers\.(\d+)\.(shared|specifics)\.glu_layers\.(\d+)\.'
                                   r'(bn\.bn|fc)\.(\w+)', key):
            step, part, layer, kind, leaf = match.groups()
            place = int(layer) + (num_shared if part == 'specifics' and kind == 'bn.bn' else 0)
            name = f'steps.{step}.{"layers" if kind == "fc" else "norms"}.{place}.{leaf}'
        elif re.match(_UNUSED, key):
            continue
        elif match := re.fullmatch(r'encoder\.res_att\.((?:query|key)\.(?:weight|bias))', key):
            name = match[1]
        elif key == 'final_mapping.weight':
            name = 'head.weight'
        else:
            unexpected.append(key)
            continue
        out[name], names[name] = value, key
    if unexpected:
        raise CheckpointError(f"this is no confidence net of the authors': {describe_mismatch([], unexpected)}")
    return out


def _args_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Constructor arguments, from the shapes of weights with our keys."""
    def count(pattern: str) -> int:
        return 1 + max(int(match[1]) for key in state_dict for match in [re.match(pattern, key)] if match)

    layers = [k for k in state_dict if re.match(r'steps\.0\.layers\.\d+\.weight', k)]
    width = state_dict['shared.0.weight'].shape[0] // 2
    decision_dim = state_dict['head.weight'].shape[1]
    return dict(
        num_steps=count(r'steps\.(\d+)\.'), decision_dim=decision_dim, attention_dim=width - decision_dim,
        mapping_dim=state_dict['shared.0.weight'].shape[1], key_dim=state_dict['query.weight'].shape[0],
        num_shared=count(r'shared\.(\d+)\.'), num_independent=len(layers))


def read_confidence_net(path: str | Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Read weights, also from the authors' zip (a network.pt beside their parameters), without executing anything.

    Raises:
        CheckpointError: See `read_checkpoint`.
    """
    path = Path(path)
    name = ''
    try:
        if path.is_file() and zipfile.is_zipfile(path):  # files of torch.save are zips, too
            with zipfile.ZipFile(path) as archive:
                name = next((name for name in archive.namelist() if name.rpartition('/')[2] == 'network.pt'), '')
                if name:
                    return dict(torch.load(io.BytesIO(archive.read(name)), map_location='cpu', weights_only=True))
    except Exception as e:  # of damaged archives, whatever comes first
        if name:
            raise CheckpointError(f"Cannot read {name} in '{path}': {e}") from e
    return read_state_dict(path, use_ema)


def _locate(source: str | Path, cache_dir: str | Path | None) -> Path:
    path = Path(source)
    if path.exists() or not re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', str(source)) or path.suffix in (
            '.safetensors', '.pt', '.pth', '.zip', '.bin'):
        return path
    try:
        return fetch_weights(str(source), cache_dir=cache_dir)
    except CheckpointError as e:
        raise CheckpointError(f"'{source}' is no file. {e}") from e
