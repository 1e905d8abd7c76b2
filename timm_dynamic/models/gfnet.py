"""GFNet: glance at the whole image at low resolution, then focus on one patch after another.

Papers:
* `Glance and Focus: a Dynamic Approach to Reducing Spatial Redundancy in Image Classification` - Wang et al.,
  NeurIPS 2020, https://arxiv.org/abs/2010.05300
* `Glance and Focus Networks for Dynamic Visual Recognition` - Huang et al., T-PAMI 2023,
  https://arxiv.org/abs/2201.03014

Step 1 sees the image scaled down to the size of a patch. Every later step sees a patch at full resolution, whose
position a patch policy chooses. Each step makes a prediction.

Departures from the released code (https://github.com/blackfeather-wang/GFNet-Pytorch):
* What only training needs (critic, auxiliary classifiers) and heads that no step uses are not in the model.
  `training_state_from_checkpoint` returns the former for a training task.
* RegNets have a separate head for step 1. The original also runs the recurrent classifier's head in step 1 and does not
  use the result; here it is not run and not counted.
* The prediction head of the global encoder, which predicts step 1, is part of the step classifier.
* The glance of a family is scaled the same way in training and at inference. In the original, training is bicubic.
"""
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import (
    build_model_with_cfg,
    clean_state_dict,
    generate_default_cfgs,
    register_model,
)
from torch import nn

from ..layers import (
    ConcatStepClassifier,
    PatchPolicy,
    RecurrentStepClassifier,
    StepClassifier,
    crop_patches,
    crop_patches_bilinear,
    get_glance,
    get_patch_coords,
)
from ..utils import CheckpointError, read_checkpoint
from ..utils.checkpoint import find_state_dict
from .builder import build_dynamic_model, hub_id
from .dynamic_net import DynamicNet, State, count_call, on_meta
from .exit_cfg import plain_json
from .networks import (
    check_pool,
    create_encoder,
    join_group_matchers,
    join_layer_names,
    join_no_weight_decay,
    map_pycls_keys,
)

__all__ = ['GFNet']

_logger = logging.getLogger(__name__)

class GFNet(DynamicNet):
    """Glance-and-focus network with any timm backbone that has a spatial feature map.

    Args:
        backbone: Name of a timm model. It is created twice: as encoder of the glance and as encoder of the patches.
        patch_size: Side of glance and patches P.
        num_steps: Number of steps T, including the glance.
        num_classes: Number of classes.
        in_chans: Number of input channels.
        img_size: Side of the images that costs are counted for. Images of other sizes work if they are larger than a
            patch.
        step_classifier: 'recurrent' (a GRU over the steps) or 'concat' (one head per step, on all features so far).
        first_head: With 'recurrent', step 1 has a separate head on the glance alone.
        classifier_hidden: Width of the recurrent step classifier.
        policy: How the patch policy encodes feature maps: 'linear' or 'conv', see `PatchPolicy`.
        policy_hidden: Width of the patch policy. Default: see `PatchPolicy`.
        glance_mode: Interpolation of the glance: 'bicubic' or 'bilinear'.
        drop_rate: Dropout before the prediction heads.
        drop_path_rate: Stochastic depth of the backbone.
        global_pool: 'avg' leaves pooling to the backbone; '' with `num_classes=0` returns feature maps.
        backbone_args: Further arguments for the backbone, e.g. dict(output_stride=16). Plain JSON.
        exit_cfg: See `DynamicNet`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: The backbone is unknown, has no spatial feature map, or does not take images of the size of a patch;
            or images are not larger than patches.
    """

    def __init__(
            self,
            backbone: str = 'resnet50',
            patch_size: int = 96,
            num_steps: int = 5,
            num_classes: int = 1000,
            in_chans: int = 3,
            img_size: int | tuple[int, int] = 224,
            step_classifier: str = 'recurrent',
            first_head: bool = False,
            classifier_hidden: int = 1024,
            policy: str = 'linear',
            policy_hidden: int | None = None,
            glance_mode: str = 'bicubic',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            global_pool: str = 'avg',
            backbone_args: dict[str, Any] | None = None,
            exit_cfg: dict[str, Any] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        if num_steps < 2:
            raise ValueError(f'num_steps must be at least 2, a glance and a patch, got {num_steps}.')
        if step_classifier not in ('recurrent', 'concat'):
            raise ValueError(f"step_classifier must be 'recurrent' or 'concat', got {step_classifier!r}.")
        if glance_mode not in ('bicubic', 'bilinear'):
            raise ValueError(f"glance_mode must be 'bicubic' or 'bilinear', got {glance_mode!r}.")
        super().__init__(num_steps, num_classes, in_chans, img_size, exit_cfg)
        self.backbone = backbone
        self.backbone_args = dict(backbone_args or {})
        self.patch_size = patch_size
        self.check_img_size(self.img_size)
        self.glance_mode = glance_mode
        self.drop_rate = drop_rate
        self.global_pool = check_pool(global_pool, num_classes)

        encoder_args = dict({'drop_path_rate': drop_path_rate} if drop_path_rate else {}, **(backbone_args or {}), **dd)
        create = partial(create_encoder, backbone, in_chans, patch_size, **encoder_args)
        self.global_encoder: Any = create()
        self.local_encoder: Any = create()
        map_shape, feature_size = self._probe()
        self.feature_size = feature_size
        self.policy = PatchPolicy(map_shape[0], map_shape[1:], policy, policy_hidden, **dd)
        self.classifier: StepClassifier
        if step_classifier == 'recurrent':
            self.classifier = RecurrentStepClassifier(
                feature_size, num_classes, num_steps, classifier_hidden, first_head, drop_rate, **dd)
        else:
            self.classifier = ConcatStepClassifier(feature_size, num_classes, num_steps, drop_rate, **dd)

        self.num_features = num_steps * map_shape[0]
        self.head_hidden_size = self.classifier.num_features
        self._traits: Any = {'first_conv': join_layer_names(self._encoders(), 'first_conv')}

    def _encoders(self) -> dict[str, Any]:
        return {'global_encoder': self.global_encoder, 'local_encoder': self.local_encoder}

    def _probe(self) -> tuple[tuple[int, int, int], int]:
        """Shape [C, h, w] of the encoders' feature map, and the width of their feature vector."""
        encoder = on_meta(self.global_encoder).eval()
        images = self.example_input(device='meta', dtype=next(encoder.parameters()).dtype)
        try:
            with torch.no_grad():
                feature_map = encoder.forward_features(images[..., :self.patch_size, :self.patch_size])
                if not isinstance(feature_map, torch.Tensor) or feature_map.ndim != 4:
                    raise ValueError(
                        f"The backbone '{self.backbone}' has no spatial feature map, which the patch policy needs: "
                        'use a convolutional network or a transformer with windows.')
                feature_map, feature = self._encode(encoder, images[..., :self.patch_size, :self.patch_size])
        except (AssertionError, RuntimeError, TypeError) as e:
            raise ValueError(
                f"The backbone '{self.backbone}' does not take patches of {self.patch_size} pixels: {e}") from e
        channels, height, width = feature_map.shape[1:]
        return (channels, height, width), feature.shape[1]

    def _encode(self, encoder: Any, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature map [B, C, h, w] and feature vector [B, F] of a glance or patch [B, in_chans, P, P]."""
        x = encoder.forward_features(view)
        feature = encoder.forward_head(x, pre_logits=True)
        return (x.permute(0, 3, 1, 2) if _is_nhwc(encoder) else x), feature

    def check_img_size(self, side: int) -> None:
        if not 0 < self.patch_size < side:
            raise ValueError(
                f'Images of {side} pixels have no patches of {self.patch_size}: patches must be smaller than images.')

    def init_state(self, x: torch.Tensor) -> State:
        self.check_images(x)
        return {'image': x}

    def step(self, t: int, state: State) -> tuple[torch.Tensor, State]:
        """Run one step, see `DynamicNet.step`.

        Returns:
            Logits, and a state with 'image' [n, C, S, S]; 'map' [n, C, h, w] and 'feature' [n, F] of this step; the
            'memory' of the step classifier; and from t = 1 on the 'action' in [0, 1] [n, 2] and the 'coords' of the
            patch [n, 2] (both row and column), and the 'policy_hidden' of the patch policy [n, H].
        """
        state = self._look(t, state)
        logits, memory = self.classifier(t, state['feature'], state.get('memory'))
        return logits, {**state, 'map': state['map'].detach(), 'memory': memory}

    def _look(
            self,
            t: int,
            state: State,
            action: torch.Tensor | None = None,
            noise: torch.Tensor | None = None,
            differentiable: bool = False,
    ) -> State:
        """Choose the view of step t and encode it. The caller does the classification."""
        image, state = state['image'], dict(state)
        if t == 0:
            view = get_glance(image, self.patch_size, self.glance_mode)
        else:
            if action is None:
                action, state['policy_hidden'] = self.policy(state['map'].detach(), state.get('policy_hidden'))
                if noise is not None:
                    state['action_mean'] = action
                    action = (action + noise).clamp(0, 1)
            state['action'] = action
            state['coords'] = get_patch_coords(action, image.shape[-1], self.patch_size)
            if differentiable:
                view = crop_patches_bilinear(image, action, self.patch_size)
            else:
                view = crop_patches(image, state['coords'], self.patch_size)
        state['map'], state['feature'] = self._encode(self.local_encoder if t else self.global_encoder, view)
        return state

    def forward_all(
            self,
            x: torch.Tensor,
            actions: torch.Tensor | None = None,
            noise: torch.Tensor | None = None,
            differentiable: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Run all steps.

        Args:
            x: Images [B, C, S, S].
            actions: Positions of the patches in [0, 1], row and column [T - 1, B, 2]. The patch policy is not run then.
            noise: Added to the actions that the patch policy proposes [T - 1, B, 2]; the sum is clamped to [0, 1].
            differentiable: Cut patches between pixels, so that the patch policy gets a gradient from later steps.

        Returns:
            'logits' [T, B, num_classes], 'features' of the encoders [T, B, F], 'actions' as taken [T - 1, B, 2] and
            'coords' [T - 1, B, 2]; if the patch policy has run also 'action_means' [T - 1, B, 2], 'policy_hidden'
            [T - 1, B, H] and its inputs, the 'maps' [T - 1, B, C, h, w]; with a first head also 'rnn_logits'
            [B, num_classes], the logits of the recurrent classifier at step 1. Actions, coordinates and maps are
            constants; the rest has gradients.
        """
        expected = (self.num_steps - 1, x.shape[0], 2)
        for name, value in (('actions', actions), ('noise', noise)):
            if value is not None and value.shape != expected:
                raise ValueError(f'Expected {name} {list(expected)}, got {list(value.shape)}.')
        state, steps, logits = self.init_state(x), [], []
        for t in range(self.num_steps):
            action = actions[t - 1] if t and actions is not None else None
            state = self._look(t, state, action, noise[t - 1] if t and noise is not None else None, differentiable)
            step_logits, state['memory'] = self.classifier(t, state['feature'], state.get('memory'))
            logits.append(step_logits)
            steps.append(state)
        out = {
            'logits': torch.stack(logits),
            'features': torch.stack([s['feature'] for s in steps]),
            'actions': torch.stack([s['action'] for s in steps[1:]]).detach(),
            'coords': torch.stack([s['coords'] for s in steps[1:]]),
        }
        if actions is None:
            out['action_means'] = torch.stack([s.get('action_mean', s['action']) for s in steps[1:]])
            out['policy_hidden'] = torch.stack([s['policy_hidden'] for s in steps[1:]])
            out['maps'] = torch.stack([s['map'] for s in steps[:-1]]).detach()
        if self.classifier.head_name(0) == 'first':
            out['rnn_logits'] = self.classifier.heads['rnn'](self.classifier.drop(steps[0]['memory']))
        return out

    def forward_train(self, x: torch.Tensor) -> torch.Tensor:
        if self.num_classes:
            return self.forward_all(x, differentiable=True)['logits'].mean(dim=0)
        return self.forward_head(self.forward_features(x))  # without heads, the steps differ in width

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps of all steps, concatenated along channels [B, T·C, h, w]. `forward_head` takes them."""
        state, maps = self.init_state(x), []
        for t in range(self.num_steps):
            state = self._look(t, state, differentiable=self.training)
            maps.append(state['map'])
        return torch.cat(maps, dim=1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of the last step from the feature maps of all steps, or the input of its head."""
        if not self.global_pool:
            return x
        memory = None
        for t, feature_map in enumerate(x.chunk(self.num_steps, dim=1)):
            encoder = self.local_encoder if t else self.global_encoder
            feature_map = feature_map.permute(0, 2, 3, 1) if _is_nhwc(encoder) else feature_map
            x, memory = self.classifier.pre_logits(t, encoder.forward_head(feature_map, pre_logits=True), memory)
        return x if pre_logits else self.classifier.heads[self.classifier.head_name(self.num_steps - 1)](x)

    def forward(self, x: torch.Tensor, all_steps: bool = False, **kwargs: Any) -> Any:
        if not self.global_pool:
            return self.forward_features(x)
        return super().forward(x, all_steps, **kwargs)

    @torch.no_grad()
    def count_part_macs(self) -> dict[str, tuple[int, ...]]:
        net = on_meta(self).eval()
        state = net.init_state(net.example_input(device='meta', dtype=next(net.parameters()).dtype))
        macs: dict[str, list[int]] = {
            part: [0] * net.num_steps for part in ('glance encoder', 'local encoder', 'patch policy', 'classifier')}
        for t in range(net.num_steps):
            if t:
                macs['patch policy'][t] = count_call(net.policy, state['map'], state.get('policy_hidden'))[1]
            state, look_macs = count_call(net._look, t, state)
            macs['local encoder' if t else 'glance encoder'][t] = look_macs - macs['patch policy'][t]
            (_, state['memory']), macs['classifier'][t] = count_call(
                net.classifier, t, state['feature'], state.get('memory'))
        return {part: tuple(values) for part, values in macs.items()}

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the Linear layers that give logits."""
        return tuple(f'classifier.heads.{name}' for name in self.classifier.heads)

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        return tuple(self.classifier.heads.values())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all prediction heads. Exits for other classes are dropped."""
        if global_pool is not None:
            self.global_pool = check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        self.classifier.reset(num_classes, **get_device_dtype(self))
        self._classifier_changed()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for encoder in self._encoders().values():
            encoder.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return join_no_weight_decay(self._encoders())

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of the backbone, each for both encoders. Patch policy and classifier come last."""
        return join_group_matchers(self._encoders(), coarse)


def _is_nhwc(encoder: Any) -> bool:
    return getattr(encoder, 'output_fmt', 'NCHW') == 'NHWC'


# The authors' names of backbones that differ from timm's.
_AUTHORS_BACKBONES = {'regnety_600m': 'regnety_006', 'regnety_800m': 'regnety_008', 'regnety_1.6g': 'regnety_016'}
# Entries of an authors' checkpoint beside weights.
_AUTHORS_NUMBERS = (
    'model_name', 'patch_size', 'model_flops', 'policy_flops', 'fc_flops', 'flops', 'anytime_classification',
    'dynamic_threshold', 'budgeted_batch_classification',
)
_CLASSIFIERS = ('fc', 'classifier', 'head.fc')  # of the encoders


def _is_authors(checkpoint: Any) -> bool:
    return isinstance(checkpoint, Mapping) and {'model_prime_state_dict', 'model_state_dict'} <= checkpoint.keys()


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """Map the content of an authors' checkpoint onto the model's keys. Other weights are returned unchanged.

    Critic, auxiliary classifiers and heads of steps that the model does not run are left out.

    Args:
        state_dict: An authors' checkpoint, or weights.
        model: The model.

    Raises:
        CheckpointError: The checkpoint is of another variant, or lacks a part.
    """
    out = _map_authors(state_dict, model) if _is_authors(state_dict) else dict(state_dict)
    if not model.num_classes:
        out = {k: v for k, v in out.items() if not k.startswith('classifier.heads.')}
    return out


def _map_authors(checkpoint: Mapping[str, Any], model: Any) -> dict[str, torch.Tensor]:
    _check_authors_variant(checkpoint, model)
    out: dict[str, torch.Tensor] = {}
    dropped = set()
    first = model.classifier.head_name(0)
    for part, encoder in (('model_prime_state_dict', 'global_encoder'), ('model_state_dict', 'local_encoder')):
        for key, value in map_pycls_keys(clean_state_dict(dict(checkpoint[part]))).items():
            module, _, leaf = key.rpartition('.')
            if module not in _CLASSIFIERS:
                out[f'{encoder}.{key}'] = value
            elif encoder == 'global_encoder' and first in ('first', '1'):
                out[f'classifier.heads.{first}.{leaf}'] = value
            else:
                dropped.add(f'{part}.{module}')
    for key, value in clean_state_dict(dict(checkpoint['fc'])).items():
        module, _, leaf = key.rpartition('.')
        if module == 'rnn':
            out[f'classifier.rnn.{leaf.removesuffix("_l0")}'] = value
        elif module == 'fc':
            out[f'classifier.heads.rnn.{leaf}'] = value
        elif int(module.removeprefix('fc_')) <= model.num_steps:
            out[f'classifier.heads.{module.removeprefix("fc_")}.{leaf}'] = value
        else:
            dropped.add(f'fc.{module}')
    for key, value in clean_state_dict(dict(checkpoint.get('policy') or {})).items():
        if key.startswith('critic.'):
            dropped.add('policy.critic')
        else:
            out[f'policy.{key.replace("actor.0.", "actor.").removesuffix("_l0")}'] = value
    _logger.info(f"Not needed for inference and left out: {', '.join(sorted(dropped))}.")
    return out


def _check_authors_variant(checkpoint: Mapping[str, Any], model: GFNet) -> None:
    if not checkpoint.get('fc'):
        raise CheckpointError('it holds no fc, the step classifier')
    patch_size, name = checkpoint.get('patch_size'), checkpoint.get('model_name')
    if patch_size is not None and int(patch_size) != model.patch_size:
        raise CheckpointError(f'it is made for patches of {int(patch_size)} pixels, the model for {model.patch_size}')
    backbone = _AUTHORS_BACKBONES.get(str(name), name)
    known = {cfg.removeprefix('gfnet_').rpartition('_')[0] for cfg in default_cfgs}
    if backbone in known and backbone != model.backbone:
        raise CheckpointError(f'it is made for {backbone}, the model for {model.backbone}')


def exit_cfg_from_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Read what the authors measured from their checkpoint: for `DynamicNet.load_exit_cfg`.

    Returns:
        'origin': their costs, anytime results, thresholds and results of budgets; 'budgets': their thresholds with the
        cost and accuracy measured for them, if both are there and match. Empty for any other checkpoint.
    """
    if not _is_authors(checkpoint):
        return {}
    origin = {k: checkpoint[k] for k in _AUTHORS_NUMBERS if checkpoint.get(k) is not None}
    out: dict[str, Any] = {'origin': origin}
    steps, thresholds, results = (
        origin.get(k) for k in ('flops', 'dynamic_threshold', 'budgeted_batch_classification'))
    if steps is None or thresholds is None or results is None or {len(r) for r in results} != {len(thresholds)}:
        return plain_json(out)
    # The cost may be the first or the second coordinate. It lies between the cost of one step and that of all.
    costs = next((r for r in results if all(0.99 * steps[0] <= v <= 1.01 * steps[-1] for v in r)), None)
    heads = [v for k, v in (checkpoint.get('fc') or {}).items() if k.startswith('fc') and k.endswith('.bias')]
    if costs is not None and heads:
        accuracies = results[1] if costs is results[0] else results[0]
        scale = 1e-9 if steps[-1] > 1e6 else 1.  # multiply-adds, or 10⁹ of them
        budgets = [
            {'gmacs': float(cost * scale), 'top1': accuracy, 'policy': policy}
            for cost, accuracy, policy in zip(costs, accuracies, thresholds)
        ]
        out['budgets'] = sorted(budgets, key=lambda b: b['gmacs'])
        out['num_classes'] = len(heads[0])
    return plain_json(out)


def training_state_from_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Read what only training needs from an authors' checkpoint.

    Returns:
        State dicts ('weight', 'bias') of Linear layers: 'global_aux' and 'local_aux', the auxiliary classifiers of the
        encoders (the former is also the head of step 1 if the model has a separate one), and the 'critic', if there is
        one. Empty for any other checkpoint.
    """
    if not _is_authors(checkpoint):
        return {}
    out: dict[str, dict[str, torch.Tensor]] = {}
    for part, name in (('model_prime_state_dict', 'global_aux'), ('model_state_dict', 'local_aux')):
        for key, value in clean_state_dict(dict(checkpoint[part])).items():
            module, _, leaf = key.rpartition('.')
            if module in _CLASSIFIERS:
                out.setdefault(name, {})[leaf] = value
    critic = {k.rpartition('.')[2]: v for k, v in (checkpoint.get('policy') or {}).items() if k.startswith('critic.')}
    return {**out, 'critic': critic} if critic else out


def read_checkpoint_fn(path: str | Path, use_ema: bool = True) -> Mapping[str, Any]:
    """Read the whole content of an authors' checkpoint; the weights of any other."""
    checkpoint = read_checkpoint(path)
    return checkpoint if _is_authors(checkpoint) else find_state_dict(checkpoint, path, use_ema)


def _cfg(name: str = '', first_conv: str = 'conv1', heads: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'hf_hub_id': hub_id(name) if name else None,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (3, 3),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': (f'global_encoder.{first_conv}', f'local_encoder.{first_conv}'),
        'classifier': tuple(f'classifier.heads.{h}' for h in heads.split()),
        'paper_name': 'Glance and Focus Networks for Dynamic Visual Recognition',
        'paper_ids': ('arXiv:2010.05300', 'arXiv:2201.03014'),
        'origin_url': 'https://github.com/blackfeather-wang/GFNet-Pytorch',
        **kwargs,
    }


# Settings of the backbone families of the paper.
_densenet: dict[str, Any] = dict(first_conv='features.conv0', heads='rnn')
_regnet: dict[str, Any] = dict(first_conv='stem.conv', heads='first rnn')
_mobilenet: dict[str, Any] = dict(first_conv='conv_stem', heads='1 2 3')
_efficientnet: dict[str, Any] = dict(first_conv='conv_stem', heads='1 2 3 4', interpolation='bicubic')

default_cfgs = generate_default_cfgs({
    'gfnet_resnet50_96.paper_in1k': _cfg('gfnet_resnet50_96.paper_in1k', heads='rnn'),
    'gfnet_resnet50_128.paper_in1k': _cfg('gfnet_resnet50_128.paper_in1k', heads='rnn', pool_size=(4, 4)),
    'gfnet_densenet121_96.paper_in1k': _cfg('gfnet_densenet121_96.paper_in1k', **_densenet),
    'gfnet_densenet169_96.paper_in1k': _cfg('gfnet_densenet169_96.paper_in1k', **_densenet),
    'gfnet_densenet201_96.paper_in1k': _cfg('gfnet_densenet201_96.paper_in1k', **_densenet),
    'gfnet_regnety_006_96.paper_in1k': _cfg('gfnet_regnety_006_96.paper_in1k', **_regnet),
    'gfnet_regnety_008_96.paper_in1k': _cfg('gfnet_regnety_008_96.paper_in1k', **_regnet),
    'gfnet_regnety_016_96.paper_in1k': _cfg('gfnet_regnety_016_96.paper_in1k', **_regnet),
    'gfnet_mobilenetv3_large_100_96.paper_in1k': _cfg('gfnet_mobilenetv3_large_100_96.paper_in1k', **_mobilenet),
    'gfnet_mobilenetv3_large_100_128.paper_in1k': _cfg(
        'gfnet_mobilenetv3_large_100_128.paper_in1k', **_mobilenet, pool_size=(4, 4)),
    'gfnet_mobilenetv3_large_125_128.paper_in1k': _cfg(
        'gfnet_mobilenetv3_large_125_128.paper_in1k', **_mobilenet, pool_size=(4, 4)),
    'gfnet_efficientnet_b2_128.paper_in1k': _cfg(
        'gfnet_efficientnet_b2_128.paper_in1k', **_efficientnet,
        input_size=(3, 260, 260), pool_size=(4, 4)),
    'gfnet_efficientnet_b3_128.paper_in1k': _cfg(
        'gfnet_efficientnet_b3_128.paper_in1k', **_efficientnet,
        input_size=(3, 300, 300), pool_size=(4, 4), crop_pct=0.904),
    'gfnet_efficientnet_b3_144.paper_in1k': _cfg(
        'gfnet_efficientnet_b3_144.paper_in1k', **_efficientnet,
        input_size=(3, 300, 300), min_input_size=(3, 144, 144), pool_size=(5, 5), crop_pct=0.904),
    'gfnet.untrained': _cfg(heads='rnn', origin_url=None),
    'test_gfnet.digits': _cfg(
        'test_gfnet.digits', first_conv='conv1.0', heads='rnn', num_classes=10, input_size=(3, 96, 96),
        pool_size=(3, 3), crop_pct=1.0, origin_url=None),
})


def _create(pretrained: bool = False, pretrained_cfg: Any = None, variant: str = '', **kwargs: Any) -> GFNet:
    model: Any = build_model_with_cfg(GFNet, variant, pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
    # Heads depend on the arguments; so do the first convolutions of the generic model.
    model.pretrained_cfg.update(first_conv=model._traits['first_conv'], classifier=model.classifier_names)
    return model


def _create_gfnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GFNet:
    if kwargs.pop('features_only', False):
        raise RuntimeError('features_only is not implemented for GFNet models: the maps are of different patches.')
    return build_dynamic_model(partial(_create, variant=variant), variant, pretrained, **kwargs)


_DENSENET = dict(patch_size=96, glance_mode='bilinear')
_REGNET = dict(patch_size=96, policy='conv', first_head=True, glance_mode='bilinear')
_MOBILENET = dict(num_steps=3, policy='conv', step_classifier='concat')
_EFFICIENTNET = dict(num_steps=4, policy='conv', step_classifier='concat')


@register_model
def gfnet(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over the timm model `backbone`, ResNet-50 by default."""
    return _create_gfnet('gfnet', pretrained, **kwargs)


@register_model
def gfnet_resnet50_96(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over ResNet-50, patches of 96, 5 steps."""
    model_args = dict(backbone='resnet50', patch_size=96)
    return _create_gfnet('gfnet_resnet50_96', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_resnet50_128(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over ResNet-50, patches of 128, 5 steps."""
    model_args = dict(backbone='resnet50', patch_size=128)
    return _create_gfnet('gfnet_resnet50_128', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_densenet121_96(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over DenseNet-121, patches of 96, 5 steps."""
    model_args = dict(_DENSENET, backbone='densenet121')
    return _create_gfnet('gfnet_densenet121_96', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_densenet169_96(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over DenseNet-169, patches of 96, 5 steps."""
    model_args = dict(_DENSENET, backbone='densenet169')
    return _create_gfnet('gfnet_densenet169_96', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_densenet201_96(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over DenseNet-201, patches of 96, 5 steps."""
    model_args = dict(_DENSENET, backbone='densenet201')
    return _create_gfnet('gfnet_densenet201_96', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_regnety_006_96(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over RegNetY-600MF, patches of 96, 5 steps."""
    model_args = dict(_REGNET, backbone='regnety_006')
    return _create_gfnet('gfnet_regnety_006_96', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_regnety_008_96(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over RegNetY-800MF, patches of 96, 5 steps."""
    model_args = dict(_REGNET, backbone='regnety_008')
    return _create_gfnet('gfnet_regnety_008_96', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_regnety_016_96(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over RegNetY-1.6GF, patches of 96, 5 steps."""
    model_args = dict(_REGNET, backbone='regnety_016')
    return _create_gfnet('gfnet_regnety_016_96', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_mobilenetv3_large_100_96(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over MobileNetV3-Large, patches of 96, 3 steps."""
    model_args = dict(_MOBILENET, backbone='mobilenetv3_large_100', patch_size=96)
    return _create_gfnet('gfnet_mobilenetv3_large_100_96', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_mobilenetv3_large_100_128(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over MobileNetV3-Large, patches of 128, 3 steps."""
    model_args = dict(_MOBILENET, backbone='mobilenetv3_large_100', patch_size=128)
    return _create_gfnet('gfnet_mobilenetv3_large_100_128', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_mobilenetv3_large_125_128(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over MobileNetV3-Large of 1.25 times the width, patches of 128, 3 steps."""
    model_args = dict(_MOBILENET, backbone='mobilenetv3_large_125', patch_size=128)
    return _create_gfnet('gfnet_mobilenetv3_large_125_128', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_efficientnet_b2_128(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over EfficientNet-B2, patches of 128 from images of 260, 4 steps."""
    model_args = dict(_EFFICIENTNET, backbone='efficientnet_b2', patch_size=128, img_size=260)
    return _create_gfnet('gfnet_efficientnet_b2_128', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_efficientnet_b3_128(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over EfficientNet-B3, patches of 128 from images of 300, 4 steps."""
    model_args = dict(_EFFICIENTNET, backbone='efficientnet_b3', patch_size=128, img_size=300)
    return _create_gfnet('gfnet_efficientnet_b3_128', pretrained, **dict(model_args, **kwargs))


@register_model
def gfnet_efficientnet_b3_144(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """GFNet over EfficientNet-B3, patches of 144 from images of 300, 4 steps."""
    model_args = dict(_EFFICIENTNET, backbone='efficientnet_b3', patch_size=144, img_size=300)
    return _create_gfnet('gfnet_efficientnet_b3_144', pretrained, **dict(model_args, **kwargs))


@register_model
def test_gfnet(pretrained: bool = False, **kwargs: Any) -> GFNet:
    """A GFNet of 0.7 M parameters for demonstration and tests, over the ResNet of test_focusnet."""
    model_args = dict(
        backbone='test_focusnet', backbone_args=dict(output_stride=16), patch_size=48, num_steps=3, img_size=96,
        classifier_hidden=128, policy='conv', policy_hidden=128)
    return _create_gfnet('test_gfnet', pretrained, **dict(model_args, **kwargs))
