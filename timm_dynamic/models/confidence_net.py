"""The confidence net: predicts from the sorted probabilities of a classifier alone how likely it is right.

Paper: `CLCNet: Rethinking of Ensemble Modeling with Classification Confidence Network` - Yao et al., 2022,
https://arxiv.org/abs/2205.09612

An attention, whose only query is the largest probability, maps n sorted probabilities to 100 values. The feature
transformers of a TabNet (https://arxiv.org/abs/1908.07442) turn these into a score.

Departures from the released code (https://github.com/yaoching0/CLCNet-Rethinking-of-Ensemble-Modeling), none of which
changes a score:
* There, every token is a query and one result is used; a second attention, two input norms and the sparse masks are
  computed and never reach the score. None of them is in the model, so that cost and memory are linear in n. The masks
  shape the training loss: see `timm_dynamic.task.confidence_net.SparseMasks`.
* Layers that the steps share have one name.
"""
import io
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import clean_state_dict
from torch import nn

from ..layers.autocast import no_autocast
from ..layers.restricted_attention import FEW_CLASSES, restricted_attention
from ..layers.tabnet import FeatureTransformer, tabnet_linear
from ..utils import CheckpointError, atomic_write, describe_mismatch, fetch_weights, read_state_dict

__all__ = ['ConfidenceNet']

_SUM_TOLERANCE = 0.15  # the authors' tutorial scores vectors that sum to 1.1


class ConfidenceNet(nn.Module):
    """Predict from sorted probabilities how likely it is that the most probable class is the right one.

    It takes any number of classes n. The score is about 0 (wrong) to 1 (right), but may lie outside of this range.

    Args:
        num_steps: Number of decision steps.
        decision_dim: Number of features of a step that the score depends on.
        attention_dim: Number of features of a step that the masks depend on, in training.
        mapping_dim: Number of values that the probabilities are mapped to.
        key_dim: Width of query and keys.
        num_shared: Number of layers that all steps share.
        num_independent: Number of layers of each step.
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
            tabnet_linear(width if i else mapping_dim, 2 * width, math.sqrt(2), **dd) for i in range(num_shared)])
        self.steps = nn.ModuleList([
            FeatureTransformer(
                width, num_shared, num_independent, virtual_batch_size=virtual_batch_size, momentum=momentum, **dd)
            for _ in range(num_steps)])
        self.head = tabnet_linear(decision_dim, 1, 1., **dd)

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Score sorted probabilities.

        Args:
            probabilities: [B, n] in descending order, each row summing to about 1.

        Returns:
            Scores [B], in the dtype of the parameters.

        Raises:
            ValueError: These are not probabilities, or not sorted: sort them, or use `score`.
        """
        if not torch.compiler.is_compiling() and not probabilities.is_meta:
            check_probabilities(probabilities, is_sorted=True)
        return self.score_sorted(probabilities)

    def score(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Score probabilities in any order.

        Args:
            probabilities: [B, n], each row summing to about 1.

        Returns:
            Scores [B].

        Raises:
            ValueError: These are not probabilities.
        """
        check_probabilities(probabilities, is_sorted=False)
        return self.score_sorted(probabilities.sort(dim=1, descending=True).values)

    def score_sorted(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Like `forward`, without checks, which would wait for a GPU."""
        _, features = self.forward_steps(probabilities)
        return self.decide(features)

    def forward_steps(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what the score is made of.

        Returns:
            Mapped probabilities [B, mapping_dim], and the features of the steps
            [num_steps, B, decision_dim + attention_dim].
        """
        with no_autocast(probabilities):  # half precision is too coarse for the differences between scores
            x = probabilities.to(self.head.weight.dtype)
            mapped = restricted_attention(x, self.attention_logits(x), self.mapping_dim)
            first, *shared = self.shared
            projected = first(mapped)
            return mapped, torch.stack([step(projected, shared) for step in self.steps])

    def attention_logits(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Attention logits of the first token for each token [B, n]. Keys are linear in x, and so are the logits."""
        x, scale = probabilities, math.sqrt(self.mapping_dim)  # the authors' scale; usual is sqrt(key_dim)
        if x.shape[1] <= FEW_CLASSES:
            return (self.query(x[..., None]) @ self.key(x[..., None]).transpose(1, 2) / scale)[:, 0]
        query = self.query(x[:, :1])
        slope, offset = (query @ self.key.weight) / scale, (query @ self.key.bias[:, None]) / scale
        return slope * x + offset

    def decide(self, features: torch.Tensor) -> torch.Tensor:
        """Scores [B] from the features of the steps."""
        with no_autocast(features):
            return self.head(features[..., :self.decision_dim].relu().sum(dim=0)).squeeze(1)

    @classmethod
    def from_pretrained(
            cls,
            source: str | Path | Mapping[str, torch.Tensor],
            cache_dir: str | Path | None = None,
    ) -> 'ConfidenceNet':
        """Create a net from weights, in eval mode. Its widths follow from the weights.

        Args:
            source: A file (also the authors' zip), a folder, 'ORG/NAME' or 'ORG/NAME@REVISION' on the Hugging Face Hub,
                or a state dict: of a confidence net (ours or the authors'), or of a whole cascade.
            cache_dir: Folder for downloads. Default: that of the Hub's client.

        Raises:
            CheckpointError: There are no weights, or they are not those of a confidence net.
        """
        label = 'The state dict' if isinstance(source, Mapping) else f"'{source}'"
        state_dict = source if isinstance(source, Mapping) else read_confidence_net(_locate(source, cache_dir))
        state_dict = confidence_net_filter_fn(state_dict)
        prefix = 'confidence_net.'
        if any(k.startswith(prefix) for k in state_dict):
            state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        try:
            args: dict[str, Any] = _args_of(state_dict)
            target = cls(**args, device='meta').state_dict()  # no memory is taken for what does not fit
        except (KeyError, IndexError, ValueError) as e:
            first = next(iter(state_dict), 'nothing')
            raise CheckpointError(f"{label} holds no confidence net (its first key: '{first}').") from e
        missing = [k for k in target if k not in state_dict]
        unexpected = [k for k in state_dict if k not in target]
        shapes = [f"'{k}' {tuple(v.shape)} instead of {tuple(target[k].shape)}"
                  for k, v in state_dict.items() if k in target and v.shape != target[k].shape]
        if missing or unexpected or shapes:
            raise CheckpointError(
                f'{label} does not fit a confidence net: {describe_mismatch(missing, unexpected, shapes)}.')
        net = cls(**args)
        net.load_state_dict(dict(state_dict))
        return net.eval()

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors, in one step: for `from_pretrained`."""
        with atomic_write(path) as tmp:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, tmp)


def check_probabilities(probabilities: torch.Tensor, is_sorted: bool) -> None:
    """Check probabilities [B, n].

    Raises:
        ValueError: A row has a negative value, does not sum to about 1, or (with `is_sorted`) is not descending.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] < 1 or not probabilities.is_floating_point():
        raise ValueError(
            f'Expected probabilities [batch, classes], floating point, got {list(probabilities.shape)} '
            f'{str(probabilities.dtype)[6:]}.')
    x = probabilities.detach()
    sums = x.sum(dim=1, dtype=torch.float32)
    bad = ~((x.amin(dim=1) >= 0) & ((sums - 1).abs() <= _SUM_TOLERANCE))  # true for NaN, too
    unsorted = (x[:, 1:] > x[:, :-1]).any(dim=1) if is_sorted else torch.zeros_like(bad)
    if not (bad | unsorted).any():
        return
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(
            f'Expected probabilities, each row non-negative and summing to 1: row {row} has a minimum of '
            f'{x[row].min():.4g} and a sum of {sums[row]:.4g}. Apply softmax to logits first.')
    raise ValueError(
        f'Expected probabilities in descending order: row {int(unsorted.int().argmax())} is not. Sort them, or use '
        'score().')


# Weights from outside

_ALIASES = (r'encoder\.(?:initial_splitter|feat_transformers\.\d+)\.shared\.'
            r'(?:shared_layers\.(\d+)|glu_layers\.(\d+)\.fc)')
_UNUSED = r'(?:encoder\.)?initial_bn\.|encoder\.(?:initial_splitter|att_transformers|nor_att)\.'


def confidence_net_filter_fn(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Map the keys of the authors' confidence nets onto ours. Other weights are returned unchanged.

    Layers that never reach a score are left out, and layers that are stored under several names are merged.

    Raises:
        CheckpointError: Layers that are one in the net differ in the file, or there are unknown keys.
    """
    state_dict = {k.removeprefix('tabnet.'): v for k, v in clean_state_dict(dict(state_dict)).items()}
    if 'encoder.res_att.query.weight' not in state_dict:
        return state_dict
    out: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    steps = {int(match[1]) for key in state_dict for match in [re.match(r'encoder\.feat_transformers\.(\d+)\.', key)]
             if match}
    if steps != set(range(len(steps))):
        raise CheckpointError(f"it does not fit the authors' confidence net: its steps are {sorted(steps)[-8:]}")
    num_shared = 1 + max((int(i) for key in state_dict for match in [re.match(_ALIASES, key)] if match
                          for i in match.groups() if i), default=-1)
    unexpected = []
    for key, value in state_dict.items():
        if match := re.fullmatch(rf'{_ALIASES}\.weight', key):
            name = f'shared.{match[1] or match[2]}.weight'
            if name in out and not torch.equal(out[name], value):
                raise CheckpointError(
                    f"'{names[name]}' and '{key}' are one layer in the net, but differ in the file: it is damaged, or "
                    'was made by other code.')
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
        raise CheckpointError(f"it does not fit the authors' confidence net: {describe_mismatch([], unexpected)}")
    return out


def _args_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Constructor arguments, from the shapes of weights with our keys."""
    def count(pattern: str) -> int:
        found = {int(match[1]) for key in state_dict for match in [re.match(pattern, key)] if match}
        if found != set(range(len(found))):  # a net is built by it: a file may not ask for a million layers
            raise ValueError(f'Layers are numbered {sorted(found)[:8]}.')
        return len(found)

    for key, value in state_dict.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"'{key}' is one value that is repeated {value.numel()} times.")
    layers = [k for k in state_dict if re.match(r'steps\.0\.layers\.\d+\.weight', k)]
    width = state_dict['shared.0.weight'].shape[0] // 2
    decision_dim = state_dict['head.weight'].shape[1]
    return dict(
        num_steps=count(r'steps\.(\d+)\.'), decision_dim=decision_dim, attention_dim=width - decision_dim,
        mapping_dim=state_dict['shared.0.weight'].shape[1], key_dim=state_dict['query.weight'].shape[0],
        num_shared=count(r'shared\.(\d+)\.'), num_independent=len(layers))


def read_confidence_net(path: str | Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Read weights, also from the authors' zip, which holds a network.pt. Nothing is executed.

    Raises:
        CheckpointError: See `read_checkpoint`.
    """
    path = Path(path)
    name = ''
    try:
        if path.is_file() and zipfile.is_zipfile(path):  # torch.save writes zips, too
            with zipfile.ZipFile(path) as archive:
                name = next((name for name in archive.namelist() if name.rpartition('/')[2] == 'network.pt'), '')
                if name:
                    return dict(torch.load(io.BytesIO(archive.read(name)), map_location='cpu', weights_only=True))
    except Exception as e:  # a damaged archive may raise anything
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
        raise CheckpointError(f"'{source}' is not a file. {e}") from e
