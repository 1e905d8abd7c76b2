"""CLCNet cascades: any timm models, the cheapest first. The next one runs if the confidence so far is too low.

Paper: `CLCNet: Rethinking of Ensemble Modeling with Classification Confidence Network` - Yao et al., 2022,
https://arxiv.org/abs/2205.09612

After each member, a confidence net predicts from its sorted probabilities how likely it is right. Other measures of
confidence can replace the net. Which one is best depends on the members; compare them on calibration data.

Departures from the released code (https://github.com/yaoching0/CLCNet-Rethinking-of-Ensemble-Modeling):
* A cascade may have more than two members, and the answer may always be that of the last member.
* The cost of the confidence net is counted (0.0001 GMACs per member with 1000 classes). The original neglects it.
* Members whose weights are for different classes raise an error that says so, in place of a shape mismatch.
"""
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ..layers.renormalize import Renormalize, per_channel
from ..utils import CheckpointError
from .builder import BUNDLED, build_dynamic_model, check_timm_weights, checkpoint_filter_of, hub_id
from .cascade_members import Member, can_rebuild, number_networks, record_members, resolve_members
from .confidence_net import ConfidenceNet, confidence_net_filter_fn, read_confidence_net
from .dynamic_net import DynamicNet, State, check_float, on_meta
from .networks import check_pool, join_group_matchers, join_layer_names, join_no_weight_decay

__all__ = ['CLCNet']

_logger = logging.getLogger(__name__)

CONFIDENCES = ('clcnet', 'max_prob', 'margin', 'entropy', 'agreement')
FINAL_RULES = ('most_confident', 'last')


class CascadeAnswers(NamedTuple):
    """Answers of a cascade after each member."""
    logits: torch.Tensor  # [T, B, num_classes]
    confidence: torch.Tensor  # [T, B]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


class CLCNet(DynamicNet):
    """Cascade of classifiers.

    Args:
        models: Members, cheapest first: timm names, 'name@size' (another resolution), 'local-dir:FOLDER',
            'hf-hub:ORG/NAME', or modules.
        member_args: Further arguments for each member that is given by name, or None.
        views: For each member its preprocessing if it differs from its pretrained_cfg: 'size', 'interpolation',
            'crop_pct', 'crop_mode', 'mean', 'std'.
        networks: For each member the number of its network, from 0 in the order in which they appear, e.g. (0, 0, 1).
            By default, members with the same name (without size) and arguments share a network, and so does a module
            that is given twice.
        confidence: Measure that decides whether the next member runs: 'clcnet' (the confidence net), 'max_prob'
            (largest probability), 'margin' (difference between the two largest), 'entropy'
            (1 - entropy / log(num_classes)), or 'agreement' (mean probability that the members so far give to the class
            that the last of them predicts).
        final_rule: 'most_confident' (the paper's: the answer of a later member replaces the answer so far if it is more
            confident) or 'last' (the answer is that of the last member that was run).
        num_classes: Number of classes.
        in_chans: Number of input channels.
        img_size: Side of images given as one tensor. Default: that of the largest view. Otherwise all views are scaled
            by the same factor.
        drop_rate: Dropout of the members.
        drop_path_rate: Stochastic depth of the members.
        global_pool: 'avg' leaves pooling to the members; '' with `num_classes=0` returns a map of one position.
        exit_cfg: See `DynamicNet`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A member is unknown or does not take its arguments; or members have other classes or channels.
    """

    def __init__(
            self,
            models: Sequence[str | nn.Module] = ('mobilenetv3_small_100', 'resnet50'),
            member_args: Sequence[Mapping[str, Any] | None] | None = None,
            views: Sequence[Mapping[str, Any] | None] | None = None,
            networks: Sequence[int] | None = None,
            confidence: str = 'clcnet',
            final_rule: str = 'most_confident',
            num_classes: int = 1000,
            in_chans: int = 3,
            img_size: int | tuple[int, int] | None = None,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            global_pool: str = 'avg',
            exit_cfg: dict[str, Any] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        members = resolve_members(models, member_args, views)
        _check_choice('confidence', confidence, CONFIDENCES)
        _check_choice('final_rule', final_rule, FINAL_RULES)
        largest = max(m.view['size'] for m in members)
        super().__init__(len(members), num_classes, in_chans, img_size or largest, exit_cfg)
        self.confidence_kind = confidence
        self.final_rule = final_rule
        self.global_pool = check_pool(global_pool, num_classes)
        self.specs = members

        kwargs: dict[str, Any] = {k: v for k, v in dict(
            drop_rate=drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype).items() if v}
        self.member_of_step = number_networks(members, self.view_sizes, networks)
        nets = []
        for i in range(max(self.member_of_step) + 1):
            member, size = next(pair for pair, k in zip(zip(members, self.view_sizes), self.member_of_step) if k == i)
            nets.append(member.create(size, num_classes, in_chans, **(kwargs if member.source else {})))
        self.members: Any = nn.ModuleList(nets)
        if confidence == 'clcnet':
            self.confidence_net = ConfidenceNet(device=device, dtype=dtype)

        # Images given as one tensor are normalised for the member with the largest view.
        view = self.reference_view
        self.renormalize = nn.ModuleList([Renormalize(
            view['mean'], view['std'], m.view['mean'], m.view['std'], in_chans, device, dtype) for m in members])
        self.num_features = self.head_hidden_size = sum(self._widths())
        self._traits: Any = {'first_conv': join_layer_names(self._networks(), 'first_conv')}
        if any(m.fixed_size for m in members):
            self._traits['img_size'] = (self.img_size, self.img_size)

    def recorded_args(self) -> dict[str, Any]:
        return {
            **super().recorded_args(), **record_members(self.specs), 'networks': list(self.member_of_step),
            'confidence': self.confidence_kind, 'final_rule': self.final_rule}

    def check_export(self) -> None:
        """Raise a ValueError if a member is a module that config.json cannot describe."""
        for member, net in zip(self.specs, (self._net(t) for t in range(self.num_steps))):
            if not member.source and not can_rebuild(net, self.num_classes, self.in_chans):
                raise ValueError(
                    f'The cascade cannot be saved: its member {member.label} is a module that timm.create_model does '
                    'not create with its recorded arguments. Register it with timm.models.register_model and name the '
                    'member, or save model.state_dict().')

    @property
    def reference_view(self) -> dict[str, Any]:
        """Largest view of a member. Images given as one tensor are prepared for it."""
        return max((m.view for m in reversed(self.specs)), key=lambda view: view['size'])

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """Side of the images that each member sees if the images of the cascade have the side `img_size`."""
        scale = self.img_size / self.reference_view['size']
        return tuple(max(1, round(m.view['size'] * scale)) for m in self.specs)

    @property
    def view_configs(self) -> tuple[dict[str, Any], ...]:
        """Preprocessing of each member, as arguments of timm's `create_transform`."""
        return tuple({
            **{k: v for k, v in m.view.items() if k != 'size'}, 'input_size': (self.in_chans, size, size),
            **{k: per_channel(m.view[k], self.in_chans) for k in ('mean', 'std')},
        } for m, size in zip(self.specs, self.view_sizes))

    def step_macs_of(self, confidence: str) -> tuple[int, ...]:
        """The `step_macs` with another measure of confidence. Only 'clcnet' has a cost."""
        if confidence == self.confidence_kind:
            return self.step_macs
        twin = on_meta(self)
        twin.confidence_kind, twin._step_macs = confidence, None
        if confidence == 'clcnet' and not hasattr(twin, 'confidence_net'):
            twin.confidence_net = ConfidenceNet(device='meta').eval()
        return twin.step_macs

    def _net(self, t: int) -> Any:
        return self.members[self.member_of_step[t]]

    def check_img_size(self, side: int) -> None:
        fixed = [m.label for m in self.specs if m.fixed_size]
        if fixed and side != self.img_size:
            raise ValueError(f'The member {fixed[0]} takes images of one size only: give img_size to create_model.')

    # Steps

    def init_state(self, x: Any) -> State:
        """Make the state before the first step.

        Args:
            x: One tensor [B, C, S, S], prepared for the member with the largest view. Smaller views are scaled from it
                with antialiasing and normalised for their members. Or a tuple with one tensor per member
                [B, C, S_i, S_i], each prepared for its member, see `view_configs`. The published accuracies of the
                members are for the latter.

        Raises:
            ValueError: The members cannot take images of this shape.
        """
        if not isinstance(x, (tuple, list)):
            self._check_images(x, 'image', self.img_size)
            return {'image': x}
        if len(x) != self.num_steps:
            raise ValueError(f'Expected one tensor for each of {self.num_steps} members, got {len(x)}.')
        for i, (view, size) in enumerate(zip(x, self.view_sizes)):
            self._check_images(view, f'images for member {i}', size, self.specs[i].fixed_size)
        if len({len(view) for view in x}) > 1:
            raise ValueError(f'Expected as many images for each member, got {[len(view) for view in x]}.')
        return {f'view_{i}': view for i, view in enumerate(x)}

    def _check_images(self, x: Any, what: str, size: int, fixed: bool | None = None) -> None:
        if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != self.in_chans:
            got = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f'Expected {what} [batch, {self.in_chans}, height, width], got {got}.')
        check_float(x)
        if fixed is None:
            fixed = any(m.fixed_size for m in self.specs)
        if fixed and x.shape[2:] != (size, size):
            raise ValueError(f'Expected {what} of {size}x{size}, got {x.shape[2]}x{x.shape[3]}.')

    def _view(self, t: int, state: State) -> torch.Tensor:
        """Images for member t [n, C, S_t, S_t]."""
        if 'image' not in state:
            return state[f'view_{t}']
        x = state['image']
        sides = tuple(int(side) for side in x.shape[2:])  # int: constant in a trace
        size = tuple(max(1, round(side * self.view_sizes[t] / self.img_size)) for side in sides)
        if size != sides:
            mode = 'bilinear' if self.specs[t].view['interpolation'] == 'bilinear' else 'bicubic'
            low = x.dtype in (torch.float16, torch.bfloat16)  # not implemented on the CPU
            x = F.interpolate(x.float() if low else x, size, mode=mode, antialias=True).to(x.dtype)
        return self.renormalize[t](x)

    def step(self, t: int, state: State) -> tuple[torch.Tensor, State]:
        """Run one member, see `DynamicNet.step`.

        Returns:
            Logits of the answer [n, num_classes], and a state with the views of later members, the 'confidence' of the
            answer [n], with 'most_confident' the 'answer', and with 'agreement' the sum of the 'probabilities' so far
            [n, num_classes].
        """
        logits = self._net(t)(self._view(t, state))
        views = {k: v for k, v in state.items() if k == 'image' or (k.startswith('view_') and k != f'view_{t}')}
        logits, answer = self._answer(t, logits, state, self.confidence_kind, self.final_rule)
        return logits, {**(views if t < self.num_steps - 1 else {}), **answer}

    def _answer(
            self,
            t: int,
            logits: torch.Tensor,
            state: State,
            kind: str,
            rule: str,
            score: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Logits of the answer after member t, and the entries of the state that belong to it."""
        if not self.num_classes:
            return logits, {'confidence': logits.new_zeros(logits.shape[0], dtype=torch.float32)}
        out: State = {}
        probabilities = logits.float().softmax(dim=1)
        if kind == 'agreement':
            out['probabilities'] = probabilities + state['probabilities'] if t else probabilities
            own = probabilities.argmax(dim=1, keepdim=True)
            confidence = out['probabilities'].gather(1, own).squeeze(1) / (t + 1)
        else:
            confidence = self.measure(probabilities, kind) if score is None else score
        if rule == 'most_confident':
            if t:
                better = confidence > state['confidence']
                logits = torch.where(better[:, None], logits, state['answer'])
                confidence = torch.where(better, confidence, state['confidence'])
            out['answer'] = logits
        return logits, {**out, 'confidence': confidence}

    def measure(self, probabilities: torch.Tensor, kind: str) -> torch.Tensor:
        """Confidence [n], float32, from the probabilities of one member [n, num_classes]; not for 'agreement'."""
        if kind == 'clcnet':
            return self.confidence_net.score_sorted(probabilities.sort(dim=1, descending=True).values).float()
        if kind == 'agreement':
            raise ValueError("'agreement' needs the probabilities of all members so far, got those of one.")
        if kind == 'margin':
            if self.num_classes < 2:
                return probabilities[:, 0]
            best = probabilities.topk(2, dim=1).values
            return best[:, 0] - best[:, 1]
        if kind == 'entropy':
            entropy = -torch.special.xlogy(probabilities, probabilities).sum(dim=1)
            return 1 - entropy / math.log(max(self.num_classes, 2))
        return probabilities.amax(dim=1)

    def confidence(self, logits: torch.Tensor, state: State) -> torch.Tensor:
        """Confidence of the answer, which `step` has already computed. See the argument `confidence`."""
        return state['confidence']

    def replay(
            self,
            member_logits: torch.Tensor,
            confidence: str | None = None,
            final_rule: str | None = None,
            scores: torch.Tensor | None = None,
    ) -> CascadeAnswers:
        """Answers of the cascade with another measure of confidence or final rule, from the logits of its members.

        Args:
            member_logits: [T, B, num_classes], see `forward_all`.
            confidence: Measure of confidence. Default: the one in use.
            final_rule: Final rule. Default: the one in use.
            scores: Confidence in each member [T, B], in place of measuring it: e.g. scores of confidence nets that were
                not trained on these images.

        Returns:
            `.logits` [T, B, num_classes] and `.confidence` [T, B] of the answers after each member.

        Raises:
            ValueError: There is no such choice, or the model has no confidence net.
        """
        kind = _check_choice('confidence', confidence or self.confidence_kind, CONFIDENCES)
        rule = _check_choice('final_rule', final_rule or self.final_rule, FINAL_RULES)
        if kind == 'clcnet' and scores is None and not hasattr(self, 'confidence_net'):
            raise ValueError(f"The cascade's confidence is '{self.confidence_kind}', so it has no confidence net.")
        if member_logits.ndim != 3 or len(member_logits) != self.num_steps:
            raise ValueError(
                f'Expected logits [{self.num_steps}, batch, {self.num_classes}], got {list(member_logits.shape)}.')
        if scores is not None and scores.shape != member_logits.shape[:2]:
            raise ValueError(f'Expected scores {list(member_logits.shape[:2])}, got {list(scores.shape)}.')
        state: State = {}
        answers, confidences = [], []
        for t, logits in enumerate(member_logits):
            logits, state = self._answer(t, logits, state, kind, rule, None if scores is None else scores[t])
            answers.append(logits)
            confidences.append(state['confidence'])
        return CascadeAnswers(torch.stack(answers), torch.stack(confidences))

    def set_confidence(
            self,
            confidence: str,
            final_rule: str | None = None,
            net: ConfidenceNet | None = None,
    ) -> None:
        """Set the measure of confidence and the final rule. Exits for other ones are dropped.

        Args:
            confidence: See the class.
            final_rule: See the class. Default: the one in use.
            net: Confidence net, for 'clcnet'. It may be omitted if the model has one.

        Raises:
            ValueError: There is no such choice, or a net is missing.
        """
        _check_choice('confidence', confidence, CONFIDENCES)
        rule = _check_choice('final_rule', final_rule or self.final_rule, FINAL_RULES)
        if confidence == 'clcnet' and net is None and not hasattr(self, 'confidence_net'):
            raise ValueError("The confidence 'clcnet' needs a net, e.g. ConfidenceNet.from_pretrained(FILE).")
        if net is not None and confidence != 'clcnet':
            raise ValueError(f"A confidence net is not used with the confidence '{confidence}'.")
        if net is not None:
            parameter = next(self.parameters())
            self.confidence_net = net.to(device=parameter.device, dtype=parameter.dtype).train(self.training)
        elif confidence != 'clcnet' and hasattr(self, 'confidence_net'):
            del self.confidence_net
        if (confidence, rule) != (self.confidence_kind, self.final_rule) or net is not None:
            self.drop_exits('its confidence changes.')
        self.confidence_kind, self.final_rule, self._step_macs = confidence, rule, None

    # Running the members

    def forward_all(self, x: Any) -> dict[str, torch.Tensor]:
        """Run all members.

        Returns:
            'logits' of the answers after each member [T, B, num_classes], their 'confidence' [T, B], and
            'member_logits' [T, B, num_classes].
        """
        state = self.init_state(x)
        member_logits = torch.stack([self._net(t)(self._view(t, state)) for t in range(self.num_steps)])
        return {**self.replay(member_logits)._asdict(), 'member_logits': member_logits}

    def forward_train(self, x: Any) -> torch.Tensor:
        """Logits [B, num_classes] that depend on every parameter: mean of the members, weighted by confidence."""
        if not self.num_classes:
            return self.forward_head(self.forward_features(x))
        state = self.init_state(x)
        member_logits = torch.stack([self._net(t)(self._view(t, state)) for t in range(self.num_steps)])
        weights = self.replay(member_logits, final_rule='last').confidence.softmax(dim=0)
        return (weights[..., None].to(member_logits.dtype) * member_logits).sum(dim=0)

    def forward(self, x: Any, all_steps: bool = False, **kwargs: Any) -> Any:
        """See `DynamicNet.forward`; for x see `init_state`. Without classes, the features of all members."""
        if not self.num_classes and not all_steps:
            return self.forward_head(self.forward_features(x))
        return super().forward(x, all_steps, **kwargs)

    def forward_features(self, x: Any) -> torch.Tensor:
        """Pooled features of all members, concatenated, as a map of one position [B, num_features, 1, 1]."""
        state = self.init_state(x)
        nets = [(self._net(t), self._view(t, state)) for t in range(self.num_steps)]
        features = [net.forward_head(net.forward_features(view), pre_logits=True) for net, view in nets]
        return torch.cat(features, dim=1)[..., None, None]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of the answer [B, num_classes] from the features of all members."""
        if not self.global_pool:
            return x
        x = x.flatten(1)
        if pre_logits or not self.num_classes:
            return x
        parts = x.split(self._widths(), dim=1)
        logits = torch.stack([self._net(t).get_classifier()(part) for t, part in enumerate(parts)])
        return self.replay(logits).logits[-1]

    def _widths(self) -> list[int]:
        nets: list[Any] = [self._net(t) for t in range(self.num_steps)]
        return [int(getattr(net, 'head_hidden_size', 0) or getattr(net, 'num_features', 0)) for net in nets]

    # What timm asks of its models

    def _networks(self) -> dict[str, Any]:
        return {f'members.{i}': net for i, net in enumerate(self.members)}

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        return tuple(self._net(t).get_classifier() for t in range(self.num_steps))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers of the members. Exits for other classes are dropped."""
        if global_pool is not None:
            self.global_pool = check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        for net in self.members:
            net.reset_classifier(num_classes)
        self._classifier_changed()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for net in self.members:
            net.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return join_no_weight_decay(self._networks())

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of the members, side by side. The confidence net comes last."""
        return join_group_matchers(self._networks(), coarse)


def read_checkpoint_fn(path: str | Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Read weights, also from the authors' zip of a confidence net."""
    return read_confidence_net(path, use_ema)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """Map weights onto the model's keys: of a whole cascade, of a confidence net (ours or the authors'), or by part.

    Args:
        state_dict: Weights; or weights by part: 'confidence_net', and members by name or by number, from 0.
        model: The model.

    Returns:
        Weights of the parts that are there. A confidence net that the model does not use is left out.

    Raises:
        CheckpointError: A part is unknown, or does not fit.
    """
    if _is_whole(state_dict):
        unused = '' if hasattr(model, 'confidence_net') else 'confidence_net.'
        return {k: v for k, v in state_dict.items() if not unused or not k.startswith(unused)}
    parts, unknown = _split_parts(state_dict, model)
    if unknown:
        raise CheckpointError(
            f"it has the parts {', '.join(unknown)}; expected confidence_net, names of members, or their numbers")
    out: dict[str, torch.Tensor] = {}
    net_state = confidence_net_filter_fn(parts.pop('confidence_net', {}))
    if hasattr(model, 'confidence_net'):
        out.update({f'confidence_net.{k.removeprefix("confidence_net.")}': v for k, v in net_state.items()})
    elif net_state:
        _logger.info(f"The confidence net is left out: the cascade's confidence is '{model.confidence_kind}'.")
    for index, weights in parts.items():
        weights = _map_member(weights, model.specs[model.member_of_step.index(index)], model.members[index])
        out.update({f'members.{index}.{k}': v for k, v in weights.items()})
    return out


def find_absent_members(state_dict: Mapping[str, Any], model: Any) -> list[int]:
    """Numbers in `model.members` of the members that there are no weights for, see `checkpoint_filter_fn`."""
    if _is_whole(state_dict):
        return []
    parts, _ = _split_parts(state_dict, model)
    return [index for index in range(len(model.members)) if index not in parts]


def _is_whole(state_dict: Mapping[str, Any]) -> bool:
    return any(key.startswith('members.') for key in state_dict)


def _split_parts(state_dict: Mapping[str, Any], model: Any) -> tuple[dict[Any, Any], list[str]]:
    """Weights by part: 'confidence_net', and numbers in `model.members`; and the names of unknown parts."""
    if not all(isinstance(v, Mapping) for v in state_dict.values()):
        state_dict = {'confidence_net': state_dict}
    given = dict(state_dict)
    out: dict[Any, Any] = {'confidence_net': given.pop('confidence_net')} if 'confidence_net' in given else {}
    for index in range(len(model.members)):
        steps = [t for t, i in enumerate(model.member_of_step) if i == index]
        spec = model.specs[steps[0]]
        name = next((n for n in (*map(str, steps), spec.source, spec.model) if isinstance(n, str) and n in given), None)
        if name is not None:
            out[index] = given.pop(name)
    return out, list(given)


def _map_member(state_dict: Any, spec: Member, net: Any) -> dict[str, torch.Tensor]:
    """Map the weights of a member with the filter of its family."""
    filter_fn = checkpoint_filter_of(spec.model) if isinstance(spec.model, str) else None
    return dict(filter_fn(state_dict, net) if filter_fn else state_dict)


def fetch_members(model: CLCNet, absent: Sequence[int], cache_dir: str | Path | None) -> None:
    """Load the weights that timm has into members, by their numbers in `model.members`. Modules keep theirs.

    Raises:
        CheckpointError: They are not available, or not all members are for the same classes.
    """
    specs = {index: (model.specs[t], model.view_sizes[t]) for t, index in enumerate(model.member_of_step)}
    # Members with weights of their own have them for the classes of the cascade.
    classes = {spec.label: spec.num_classes if index in absent else model.num_classes
               for index, (spec, _) in specs.items()}
    if model.num_classes in classes.values() and len(set(classes.values())) > 1:
        raise CheckpointError(
            f'The members have weights for different numbers of classes ({_listed(classes)}) and do not form a '
            'cascade.')
    for index in absent:
        spec, size = specs[index]
        if spec.source is None:
            continue
        args = {**spec.args, 'img_size': size} if spec.fixed_size else spec.args
        try:
            check_timm_weights(spec.source, cache_dir)
            net: Any = timm.create_model(
                spec.source, pretrained=True, num_classes=model.num_classes, in_chans=model.in_chans,
                cache_dir=cache_dir, **args)
        except CheckpointError:
            raise
        except (RuntimeError, OSError, HfHubHTTPError, ValueError) as e:  # timm's and the Hub's
            raise CheckpointError(
                f'The weights of the member {spec.label} are not available ({str(e).splitlines()[0]}). Load your own '
                f"files with pretrained_cfg_overlay=dict(file={{'confidence_net': FILE, '{spec.source}': FILE}})."
            ) from e
        model.members[index].load_state_dict(net.state_dict())


def _listed(classes: Mapping[str, int]) -> str:
    return ', '.join(f'{label} {count}' for label, count in classes.items())


def _cfg(name: str = '', members: Sequence[tuple[str, str]] = (), **kwargs: Any) -> dict[str, Any]:
    """Config of a cascade. `members` has the names of the first convolution and the classifier of each."""
    return {
        'hf_hub_id': hub_id(name) if name else None,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (1, 1),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': tuple(f'members.{i}.{conv}' for i, (conv, _) in enumerate(members)),
        'classifier': tuple(f'members.{i}.{classifier}' for i, (_, classifier) in enumerate(members)),
        'paper_name': 'CLCNet: Rethinking of Ensemble Modeling with Classification Confidence Network',
        'paper_ids': 'arXiv:2205.09612',
        'origin_url': 'https://github.com/yaoching0/CLCNet-Rethinking-of-Ensemble-Modeling',
        **kwargs,
    }


_efficientnets = [('conv_stem', 'classifier')] * 2
# The authors used timm 0.5.4, whose default weights these were.
_NOTES = (
    "members: timm's weights trained with AutoAugment (aa_in1k: B0, B4) and RandAugment (ra_in1k: B7)",
    "confidence net: the authors' net for fold 1 of 5 of the ImageNet-1k validation set",
)

default_cfgs = generate_default_cfgs({
    'clcnet_tf_efficientnet_b0_b4.paper_in1k': _cfg(
        'clcnet_tf_efficientnet_b0_b4.paper_in1k', _efficientnets, input_size=(3, 380, 380), crop_pct=0.922,
        notes=_NOTES),
    'clcnet_tf_efficientnet_b4_b7.paper_in1k': _cfg(
        'clcnet_tf_efficientnet_b4_b7.paper_in1k', _efficientnets, input_size=(3, 600, 600), crop_pct=0.949,
        notes=_NOTES),
    'clcnet.paper_in1k': _cfg('clcnet.paper_in1k', [('conv_stem', 'classifier'), ('conv1', 'fc')], notes=_NOTES[1:]),
    'test_clcnet.digits': _cfg(
        'test_clcnet.digits', members=[('conv1.0', 'fc')] * 2, num_classes=10, input_size=(3, 96, 96), crop_pct=1.0,
        interpolation='bilinear', origin_url=None),
})


def _create(pretrained: bool = False, pretrained_cfg: Any = None, variant: str = '', **kwargs: Any) -> CLCNet:
    model: Any = build_model_with_cfg(CLCNet, variant, pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
    cfg = model.pretrained_cfg
    cfg.update(first_conv=model._traits['first_conv'], classifier=join_layer_names(model._networks(), 'classifier'))
    # Images are prepared for the member with the largest view, unless the caller has given another preprocessing.
    view, static = model.reference_view, vars(get_pretrained_cfg(variant))
    for key, value in dict(view, input_size=(model.in_chans, view['size'], view['size'])).items():
        if key in static and cfg.get(key) == static[key]:
            cfg[key] = tuple(value) if isinstance(value, list) else value
    return model


def _create_clcnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CLCNet:
    if kwargs.pop('features_only', False):
        raise RuntimeError('features_only is not implemented for CLCNet models: the maps are of several networks.')
    if pretrained and kwargs.get('confidence', 'clcnet') != 'clcnet':
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        has_source = cfg.file or cfg.state_dict is not None or cfg.source in ('hf-hub', 'local-dir') or \
            (BUNDLED / f'{variant}.{cfg.tag}').is_dir()
        if not has_source:  # without a confidence net, all weights are those of the members
            kwargs['pretrained_cfg_overlay'] = {**(kwargs.get('pretrained_cfg_overlay') or {}), 'state_dict': {}}
    return build_dynamic_model(partial(_create, variant=variant), variant, pretrained, **kwargs)


@register_model
def clcnet(pretrained: bool = False, **kwargs: Any) -> CLCNet:
    """Cascade of the timm models `models`, MobileNetV3-Small and ResNet-50 by default."""
    exported = kwargs.get('pretrained_model_args')  # then num_classes comes from config.json
    if 'num_classes' not in kwargs and kwargs.get('models') and not exported:
        members = resolve_members(kwargs['models'], kwargs.get('member_args'), kwargs.get('views'))
        classes = {m.label: m.num_classes for m in members}
        if len(set(classes.values())) > 1:
            raise ValueError(
                f'The members are made for different numbers of classes ({_listed(classes)}): give num_classes to '
                'create them for other data.')
        kwargs['num_classes'] = next(iter(classes.values()))
    return _create_clcnet('clcnet', pretrained, **kwargs)


@register_model
def clcnet_tf_efficientnet_b0_b4(pretrained: bool = False, **kwargs: Any) -> CLCNet:
    """EfficientNet-B0 at 224, then B4 at 380."""
    model_args = dict(models=('tf_efficientnet_b0.aa_in1k', 'tf_efficientnet_b4.aa_in1k'))
    return _create_clcnet('clcnet_tf_efficientnet_b0_b4', pretrained, **dict(model_args, **kwargs))


@register_model
def clcnet_tf_efficientnet_b4_b7(pretrained: bool = False, **kwargs: Any) -> CLCNet:
    """EfficientNet-B4 at 380, then B7 at 600."""
    model_args = dict(models=('tf_efficientnet_b4.aa_in1k', 'tf_efficientnet_b7.ra_in1k'))
    return _create_clcnet('clcnet_tf_efficientnet_b4_b7', pretrained, **dict(model_args, **kwargs))


@register_model
def test_clcnet(pretrained: bool = False, **kwargs: Any) -> CLCNet:
    """A cascade of 0.3 M parameters for demonstration and tests: two sizes of test_focusnet, at 48 and 96 pixels."""
    model_args = dict(
        models=('test_focusnet@48', 'test_focusnet@96'), member_args=(dict(channels=(8, 16, 32, 48)), None))
    return _create_clcnet('test_clcnet', pretrained, **dict(model_args, **kwargs))
