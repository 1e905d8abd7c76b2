"""AnchorNet-patch: a small localizer chooses windows of an image, and a classifier looks at one after another.

Paper: `Localizing Semantic Patches for Accelerating Image Classification` - Yang et al., ICME 2022,
https://arxiv.org/abs/2206.03367

Step 1 sees the whole image scaled down to the size of a window. In step 2, AnchorNet predicts a class and chooses the
windows with the most evidence for it. Every later step adds the logits of one window.

Departures from the released code (https://github.com/winycg/AnchorNet):
* Layers that AnchorNet never uses (the expansion of the first block) are not in the model.
* If fewer windows than steps follow the overlap rule, the best of the others fill the rest. The original raises an
  error, or adds the windows of one image to all images of the batch.
* Windows of equal value are ordered row by row. In the original, an unstable sort orders them.
"""
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SqueezeExcite, get_device_dtype
from timm.models import build_model_with_cfg, clean_state_dict, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from ..layers import check_iou_thresholds, choose_windows, class_activation_map, crop_patches, get_glance
from ..utils import CheckpointError, read_state_dict
from .builder import build_dynamic_model, hub_id
from .dynamic_net import DynamicNet, State, on_meta
from .networks import check_pool, create_encoder, join_group_matchers, join_layer_names, join_no_weight_decay

__all__ = ['AnchorNet', 'AnchorNetPatch']

_logger = logging.getLogger(__name__)

# Blocks of AnchorNet: input and output channels, expansion, stride.
_BLOCKS = (
    (16, 16, 1, 2), (16, 24, 3, 2), (24, 24, 4, 1), (24, 48, 4, 1), (48, 96, 2, 1), (96, 96, 1.5, 1), (96, 96, 1.5, 1))


class ValidBlock(nn.Module):
    """Inverted residual with squeeze-and-excitation and without padding: every output depends on one input window.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        expansion: Width of the depthwise convolution divided by that of the input; 1 leaves the expansion out.
        stride: Stride of the depthwise convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            expansion: float,
            stride: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        mid = int(expansion * in_chs)
        self.expand = nn.Sequential()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(in_chs, mid, 1, bias=False, **dd), nn.BatchNorm2d(mid, **dd), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(mid, mid, 3, stride, groups=mid, bias=False, **dd), nn.BatchNorm2d(mid, **dd), nn.SiLU())
        self.se = SqueezeExcite(mid, rd_channels=int(in_chs * 0.25), act_layer=nn.SiLU, **dd)
        self.project = nn.Sequential(nn.Conv2d(mid, out_chs, 1, bias=False, **dd), nn.BatchNorm2d(out_chs, **dd))
        self.has_skip = stride == 1 and in_chs == out_chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.project(self.se(self.depthwise(self.expand(x))))
        # Cropped at the bottom and the right, as in the original, though the center would be aligned.
        return out + x[..., :-2, :-2] if self.has_skip else out


class AnchorNet(nn.Module):
    """AnchorNet: a classifier with a feature map whose positions each depend on one window of 95x95 pixels.

    Windows are 8 pixels apart and start in the top left corner. An image of 224 pixels has 17x17 of them.

    Args:
        num_classes: Number of classes.
        in_chans: Number of input channels.
        blocks: Input and output channels, expansion and stride of each block.
        num_features: Channels of the feature map.
        drop_rate: Dropout before the classifier.
        global_pool: 'avg', or '' with `num_classes=0` for feature maps.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `global_pool` is something else: class activation maps are valid for the mean only.

    Attributes:
        receptive_field: Side of the windows in pixels.
        stride: Distance of neighbouring windows in pixels.
    """

    def __init__(
            self,
            num_classes: int = 1000,
            in_chans: int = 3,
            blocks: Sequence[tuple[int, int, float, int]] = _BLOCKS,
            num_features: int = 512,
            drop_rate: float = 0.,
            global_pool: str = 'avg',
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.drop_rate, self.global_pool = drop_rate, check_pool(global_pool, num_classes)
        self.num_features = self.head_hidden_size = num_features
        self.grad_checkpointing = False
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, blocks[0][0], 3, 2, bias=False, **dd), nn.BatchNorm2d(blocks[0][0], **dd), nn.SiLU())
        self.blocks = nn.Sequential(*(ValidBlock(*block, **dd) for block in blocks))
        self.conv_head: nn.Module = nn.Conv2d(blocks[-1][1], num_features, 1, **dd)
        self.fc = nn.Linear(num_features, num_classes, **dd) if num_classes else nn.Identity()
        self.stride, self.receptive_field = 2, 3
        self.feature_info: list[dict[str, Any]] = []  # of the last layer before each downsampling
        module, num_chs = 'stem', blocks[0][0]
        for i, (_, out_chs, _, stride) in enumerate(blocks):
            if stride > 1:
                self.feature_info.append(dict(num_chs=num_chs, reduction=self.stride, module=module))
            self.receptive_field += 2 * self.stride
            self.stride *= stride
            module, num_chs = f'blocks.{i}', out_chs
        self.feature_info.append(dict(num_chs=num_chs, reduction=self.stride, module=module))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values as in the original: Kaiming for convolutions, small normal ones for the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.001)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map [B, num_features, h, w], with one position per window."""
        self._check_images(x)
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = timm.models.checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.conv_head(x)

    def _check_images(self, x: torch.Tensor) -> None:
        if min(x.shape[-2:]) < self.receptive_field:
            raise ValueError(
                f'Images of {x.shape[-2]}x{x.shape[-1]} pixels hold no window of {self.receptive_field} pixels, which '
                'AnchorNet needs.')

    def _take_indices(self, indices: int | list[int] | None) -> tuple[list[int], list[int]]:
        """Indices into `feature_info`, and the positions of these layers among the stem and the blocks."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        names = ['stem', *(f'blocks.{i}' for i in range(len(self.blocks)))]
        return taken, [names.index(self.feature_info[i]['module']) for i in taken]

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Feature maps [B, num_chs, h, w] of the layers in `feature_info`, with timm's arguments; `norm` has no effect.

        Returns:
            What `forward_features` returns, and the list of feature maps; or the latter only.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        _, positions = self._take_indices(indices)
        self._check_images(x)
        intermediates = []
        for i, layer in enumerate((self.stem, *self.blocks)):
            if intermediates_only and stop_early and i > max(positions):
                break
            x = timm.models.checkpoint(layer, x) if self.grad_checkpointing else layer(x)
            if i in positions:
                intermediates.append(x)
        return intermediates if intermediates_only else (self.conv_head(x), intermediates)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers that `forward_intermediates` does not need for these indices, as in timm."""
        taken, positions = self._take_indices(indices)
        self.blocks = self.blocks[:max(positions)]
        if prune_head:
            self.conv_head = nn.Identity()
            self.reset_classifier(0, '')
        return taken

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits [B, num_classes] from the feature map, or its mean [B, num_features]."""
        if not self.global_pool:
            return x
        x = nn.functional.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier."""
        if global_pool is not None:
            self.global_pool = check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes else nn.Identity()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            'stem': r'^stem',
            'blocks': r'^blocks\.(\d+)' if coarse else [(r'^blocks\.(\d+)', None), (r'^conv_head', (99999,))],
        }


class AnchorNetPatch(DynamicNet):
    """Classifier that sees the whole image scaled down, then windows that a localizer chooses. Their logits add up.

    Args:
        backbone: Name of a timm model. It is created twice: for the whole image and for windows.
        patch_size: Side of the windows and of the scaled image P.
        num_steps: Number of steps T, including the scaled image.
        num_classes: Number of classes.
        in_chans: Number of input channels.
        img_size: Side of the images that costs are counted for. Other sizes work if they have enough windows.
        iou_thresholds: Largest overlap with earlier windows: one number, or one for each window from the second on.
        exact_original: See `choose_windows`.
        localizer: 'anchornet', or any timm CNN with a linear classifier on pooled features.
        localizer_args: Arguments of the localizer. Plain JSON.
        localizer_stride: Distance in pixels of the windows of neighbouring positions of the localizer's feature map.
            Not needed for AnchorNet.
        localizer_field: Side of these windows; 0 for a network with padding: then they are assumed to be centered.
        backbone_args: Further arguments for the backbone. Plain JSON.
        drop_rate: Dropout before the classifiers.
        drop_path_rate: Stochastic depth of the backbone.
        global_pool: 'avg' leaves pooling to the networks; '' with `num_classes=0` returns feature maps.
        exit_cfg: See `DynamicNet`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A network is unknown, the localizer is not a linear classifier of the mean of a feature map, or
            images are too small.
    """

    def __init__(
            self,
            backbone: str = 'densenet201',
            patch_size: int = 95,
            num_steps: int = 5,
            num_classes: int = 1000,
            in_chans: int = 3,
            img_size: int | tuple[int, int] = 224,
            iou_thresholds: float | Sequence[float] = 0.3,
            exact_original: bool = True,
            localizer: str = 'anchornet',
            localizer_args: dict[str, Any] | None = None,
            localizer_stride: int | None = None,
            localizer_field: int = 0,
            backbone_args: dict[str, Any] | None = None,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            global_pool: str = 'avg',
            exit_cfg: dict[str, Any] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        if num_steps < 2:
            raise ValueError(f'num_steps must be at least 2, the scaled image and a window, got {num_steps}.')
        check_pool(global_pool, num_classes)
        thresholds = [iou_thresholds] * (num_steps - 2) if isinstance(iou_thresholds, (int, float)) else iou_thresholds
        if len(thresholds) != num_steps - 2:
            raise ValueError(
                f'{num_steps} steps have {num_steps - 1} windows, which need {num_steps - 2} iou_thresholds, got '
                f'{len(thresholds)}.')
        super().__init__(num_steps, num_classes, in_chans, img_size, exit_cfg)
        self.backbone, self.backbone_args = backbone, dict(backbone_args or {})
        self.patch_size = patch_size
        self.iou_thresholds = check_iou_thresholds(thresholds)
        self.exact_original = exact_original
        self.global_pool = global_pool
        args = dict({'drop_path_rate': drop_path_rate} if drop_path_rate else {}, **self.backbone_args, **dd)
        create = partial(create_encoder, backbone, in_chans, patch_size, num_classes, drop_rate=drop_rate, **args)
        self.resized: Any = create()
        self.patch: Any = create()
        if localizer == 'anchornet':
            self.localizer: Any = AnchorNet(num_classes, in_chans, **(localizer_args or {}), **dd)
            self.localizer_stride, self.localizer_field = self.localizer.stride, self.localizer.receptive_field
        else:
            if localizer_stride is None:
                raise ValueError(f"The localizer '{localizer}' needs its stride in pixels: localizer_stride.")
            self.localizer = create_encoder(
                localizer, in_chans, self.img_size, num_classes, **(localizer_args or {}), **dd)
            self.localizer_stride, self.localizer_field = localizer_stride, localizer_field
        self.localizer_name = localizer
        self._grids: dict[int, tuple[int, int]] = {}  # cache, by side of the image
        self._check_localizer()
        self.check_img_size(self.img_size)
        self.num_features = self.resized.num_features
        self.head_hidden_size = self.resized.head_hidden_size
        localizer_conv = ('localizer.stem.0',) if isinstance(self.localizer, AnchorNet) else \
            join_layer_names({'localizer': self.localizer}, 'first_conv')
        self._traits: dict[str, Any] = {'first_conv': (
            *join_layer_names({'resized': self.resized, 'patch': self.patch}, 'first_conv'), *localizer_conv)}

    @property
    def setup_name(self) -> str:
        """Name of such a model in the tables of the released code, e.g. 'densenet201_95_[0.3, 0.3, 0.3]'."""
        return f'{self.backbone}_{self.patch_size}_{list(self.iou_thresholds)}'

    def _networks(self) -> dict[str, Any]:
        return {'resized': self.resized, 'patch': self.patch, 'localizer': self.localizer}

    def init_state(self, x: torch.Tensor) -> State:
        self.check_images(x)
        return {'image': x}

    def _grid(self, img_size: int) -> tuple[int, int]:
        """Rows and columns of windows in images of a size."""
        if isinstance(self.localizer, AnchorNet):
            cells = (img_size - self.localizer_field) // self.localizer_stride + 1
            return max(cells, 0), max(cells, 0)
        if img_size not in self._grids:
            shape = self._map_shape(img_size)
            self._grids[img_size] = shape[2], shape[3]
        return self._grids[img_size]

    @torch.no_grad()
    def _map_shape(self, img_size: int) -> torch.Size:
        net = on_meta(self.localizer).eval()
        shape, dtype = (1, self.in_chans, img_size, img_size), next(net.parameters()).dtype
        try:
            return net.forward_features(torch.zeros(shape, device='meta', dtype=dtype)).shape
        except (RuntimeError, AssertionError) as e:
            raise ValueError(
                f"The localizer '{self.localizer_name}' cannot take images of {img_size} pixels: "
                f'{str(e).splitlines()[0]}') from e

    def check_img_size(self, side: int) -> None:
        if not 0 < self.patch_size <= side:
            raise ValueError(
                f'Images of {side} pixels have no windows of {self.patch_size}.{self._least_size(self.patch_size)}')
        rows, columns = self._grid(side)
        if rows * columns < self.num_steps - 1:
            raise ValueError(
                f"Images of {side} pixels have {rows}x{columns} windows for the localizer '{self.localizer_name}', "
                f'{self.num_steps} steps need {self.num_steps - 1}.{self._least_size(side)}')

    def _least_size(self, side: int) -> str:
        """Say which size above a side is the least with enough windows; nothing if it is not near."""
        for larger in range(max(side, self.patch_size, 1), side + 8 * self.localizer_stride + self.localizer_field + 1):
            try:
                rows, columns = self._grid(larger)
            except ValueError:
                continue
            if rows * columns >= self.num_steps - 1:
                return f' The least size is {larger} (--img-size).'
        return ''

    def _check_localizer(self) -> None:
        """Raise a ValueError unless the localizer is a linear classifier of the mean of a feature map."""
        if isinstance(self.localizer, AnchorNet):
            return
        what = f"The localizer '{self.localizer_name}'"
        shape = self._map_shape(self.img_size)
        if len(shape) != 4 or getattr(self.localizer, 'output_fmt', 'NCHW') != 'NCHW':
            raise ValueError(
                f'{what} needs a feature map [batch, channels, height, width], got {list(shape)}.')
        self._grids[self.img_size] = shape[2], shape[3]
        expected = -(-self.img_size // self.localizer_stride)
        if not self.localizer_field and max(abs(n - expected) for n in shape[2:]) > 1:
            raise ValueError(
                f'{what} has {shape[2]}x{shape[3]} positions in an image of {self.img_size}; with localizer_stride '
                f'{self.localizer_stride} there would be {expected}x{expected}.')
        classifier = self.localizer.get_classifier()
        if not self.num_classes:
            return
        if not isinstance(classifier, nn.Linear):
            raise ValueError(
                f'{what} needs one linear classifier, for class activation maps; it has {type(classifier).__name__}.')
        if classifier.in_features != shape[1]:
            raise ValueError(
                f'{what} classifies {classifier.in_features} features, but its map has {shape[1]} channels: expected a '
                'classifier of the mean of the map.')

    def step(self, t: int, state: State) -> tuple[torch.Tensor, State]:
        """Run one step, see `DynamicNet.step`.

        Returns:
            Sum of the logits so far, and a state with 'image' [n, C, S, S] and 'logits' [n, num_classes]; from step 1
            on also the class activation map 'cam' [n, h, w], the 'windows' of all steps (top-left row and column
            [n, T - 1, 2], int64), and 'num_valid' [n], the number of windows that follow the overlap rule.
        """
        state, image = dict(state), state['image']
        if t == 0:
            state['logits'] = self.resized(get_glance(image, self.patch_size))
            return state['logits'], state
        if t == 1:
            state.update(self.locate(image))
            del state['localizer_logits']
        view = crop_patches(image, state['windows'][:, t - 1], self.patch_size)
        state['logits'] = state['logits'] + self.patch(view)
        return state['logits'], state

    def locate(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Choose the windows of images [B, in_chans, S, S].

        Returns:
            'windows', 'cam', 'num_valid' as in `step`; and 'localizer_logits' [B, num_classes].
        """
        if not self.num_classes:
            raise ValueError('Windows are chosen for a class: without classes (num_classes=0) there are none.')
        features = self.localizer.forward_features(x)
        logits = self.localizer.forward_head(features)
        with torch.no_grad():
            classifier = self.localizer.get_classifier()
            cam = class_activation_map(features.float(), classifier.weight.float(), logits.argmax(dim=1))
            rows, columns = (self._corners(n, x.shape[-1], x.device) for n in cam.shape[1:])
            index, found = choose_windows(
                cam, (rows, columns), self.patch_size, self.num_steps - 1, self.iou_thresholds, self.exact_original)
            windows = torch.stack([rows[index // cam.shape[2]], columns[index % cam.shape[2]]], dim=2)
        return {'cam': cam, 'windows': windows, 'num_valid': found, 'localizer_logits': logits}

    def _corners(self, cells: int, img_size: int, device: torch.device) -> torch.Tensor:
        """First row or column of the window of each position of the feature map, centered on its receptive field."""
        position = torch.arange(cells, device=device) * self.localizer_stride
        field = self.localizer_field or self.localizer_stride
        return (position + (field - self.patch_size) // 2).clamp(0, img_size - self.patch_size)

    def forward_all(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run all steps.

        Returns:
            Cumulative 'logits' [T, B, num_classes], 'patch_logits' of each window [T - 1, B, num_classes],
            'localizer_logits' [B, num_classes], 'cam' [B, h, w], and 'coords' of the windows [T - 1, B, 2].
        """
        state = self.init_state(x)
        first = self.resized(get_glance(x, self.patch_size))
        located = self.locate(state['image'])
        coords = located['windows'].transpose(0, 1)
        views = crop_patches(x.repeat(self.num_steps - 1, 1, 1, 1), coords.flatten(0, 1), self.patch_size)
        patches = self.patch(views).unflatten(0, (self.num_steps - 1, -1))
        return {
            'logits': torch.cat([first[None], patches]).cumsum(dim=0), 'patch_logits': patches,
            'localizer_logits': located['localizer_logits'], 'cam': located['cam'], 'coords': coords,
        }

    def forward(self, x: Any, all_steps: bool = False, **kwargs: Any) -> Any:
        """See `DynamicNet.forward`. Without classes, the features of the scaled image, see `forward_head`."""
        if not self.num_classes and not all_steps:
            return self.forward_head(self.forward_features(x), pre_logits=True)
        return super().forward(x, all_steps, **kwargs)

    def forward_train(self, x: torch.Tensor) -> torch.Tensor:
        out = self.forward_all(x)
        return torch.cat([out['logits'], out['localizer_logits'][None]]).mean(dim=0)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map of the scaled image [B, num_features, h, w]."""
        self.init_state(x)
        return self.resized.forward_features(get_glance(x, self.patch_size))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of step 1 from the feature map of the scaled image, or the input of its classifier."""
        if not self.global_pool:
            return x
        return self.resized.forward_head(x, pre_logits=pre_logits)

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the Linear layers that give logits."""
        modules = {id(m): name for name, m in self.named_modules()}
        return tuple(modules[id(m)] for m in self.get_classifier())

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        return tuple(net.get_classifier() for net in self._networks().values())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all classifiers. Exits for other classes are dropped."""
        if global_pool is not None:
            self.global_pool = check_pool(global_pool, num_classes)
        self.num_classes = num_classes
        for net in self._networks().values():
            net.reset_classifier(num_classes)
        self._check_localizer()
        self._classifier_changed()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for net in self._networks().values():
            net.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return join_no_weight_decay(self._networks())

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of the networks, side by side."""
        return join_group_matchers(self._networks(), coarse)


# Parts of the model, and the word in the name of the authors' file with its weights.
_PARTS = {'localizer': 'anchornet', 'resized': 'resized', 'patch': 'patch'}
_ALL_PARTS = "pretrained_cfg_overlay=dict(file=dict(localizer='...', resized='...', patch='...'))"


def _weight_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if re.search(r'\.(pth|pt|tar|safetensors)$', p.name)]


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a folder has one file for each of the three networks, named as the authors' files are."""
    found = [[p for p in _weight_files(folder) if word in p.name.lower()] for word in _PARTS.values()]
    return all(len(part) == 1 for part in found) and len({part[0] for part in found}) == len(found)


def read_checkpoint_fn(path: str | Path, use_ema: bool = True) -> dict[str, Any]:
    """Read weights; from a folder with the authors' three files, {'localizer', 'resized', 'patch'} of weights.

    Raises:
        CheckpointError: A part is missing, or there is more than one file for it.
    """
    path = Path(path)
    files = _weight_files(path) if path.is_dir() else []
    if len(files) < 2 or (path / 'model.safetensors').is_file() or (path / 'config.json').is_file():
        return dict(read_state_dict(path, use_ema))
    out = {}
    for part, word in _PARTS.items():
        found = [p for p in files if word in p.name.lower()]
        if len(found) != 1:
            names = ', '.join(p.name for p in found or files)
            raise CheckpointError(
                f"Expected one file with '{word}' in its name in '{path}', for the {part} network; found {names}. Or "
                f'name the files: {_ALL_PARTS}.')
        out[part] = read_state_dict(found[0], use_ema)
    return out


def find_part_files(path: str | Path, model: AnchorNetPatch) -> dict[str, Path]:
    """Find files of single networks of a model: those of an `anchornet` trained alone, and the authors'.

    The weights say that they are the localizer's. The words 'resized' and 'patch' in the names say which of the other
    networks they are. In a folder of several files, 'anchornet' in the name says that it is the localizer.

    Args:
        path: A file, or a folder.
        model: The model.

    Returns:
        Files by part, for `load_checkpoint` with the other parts as `optional`. Empty for weights of a whole model.

    Raises:
        CheckpointError: The weights cannot be read, or it is unknown which network they are for.
    """
    path = Path(str(path).removeprefix('local-dir:'))
    files = _weight_files(path) if path.is_dir() and not (path / 'config.json').is_file() else []
    if len(files) > 1:
        named = {part: [p for p in files if word in p.name.lower()] for part, word in _PARTS.items()}
        return {part: found[0] for part, found in named.items() if len(found) == 1}
    weights = read_state_dict(path)
    if any(key.partition('.')[0] in _PARTS for key in weights):
        return {}
    if 'exp_conv.weight' in weights or weights.keys() == model.localizer.state_dict().keys():
        return {'localizer': path}
    parts = [part for part in ('resized', 'patch') if part in path.name.lower()]
    if len(parts) != 1:
        raise CheckpointError(
            f"'{path}' holds one network that is not the localizer. Put 'resized' or 'patch' into its name to say "
            'which of the others it is.')
    return {parts[0]: path}


def _map_localizer(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Map an authors' AnchorNet onto our keys. Layers that it never uses are dropped."""
    if 'exp_conv.weight' not in state_dict:
        return dict(state_dict)
    names = {'conv1': 'expand.0', 'bn1': 'expand.1', 'conv2': 'depthwise.0', 'bn2': 'depthwise.1', 'se.se1': 'se.fc1',
             'se.se2': 'se.fc2', 'conv3': 'project.0', 'bn3': 'project.1'}
    out, dropped = {}, set()
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition('.')
        match = re.fullmatch(r'bneck\.(\d+)\.(.+)', module)
        if match and match[1] == '0' and match[2] in ('conv1', 'bn1'):
            dropped.add(module)
        elif match:
            out[f'blocks.{match[1]}.{names[match[2]]}.{leaf}'] = value
        else:
            out[f"{ {'conv1': 'stem.0', 'bn1': 'stem.1', 'exp_conv': 'conv_head'}.get(module, module)}.{leaf}"] = value
    _logger.info(f"Never used by AnchorNet and left out: {', '.join(sorted(dropped))}.")
    return out


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """Map the authors' weights onto the model's keys. Other weights are returned unchanged.

    Args:
        state_dict: Weights; for AnchorNet-patch also {'localizer', 'resized', 'patch'} of weights.
        model: An `AnchorNet` or an `AnchorNetPatch`.

    Raises:
        CheckpointError: The weights are those of one network, and the model needs three.
    """
    out = _map_localizer(state_dict) if isinstance(model, AnchorNet) else _map_parts(state_dict)
    if not model.num_classes:
        heads = ('fc',) if isinstance(model, AnchorNet) else model.classifier_names
        out = {k: v for k, v in out.items() if k.rpartition('.')[0] not in heads}
    return out


def _map_parts(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Map weights of AnchorNet-patch, or of its three networks, onto our keys."""
    if not all(isinstance(v, Mapping) for v in state_dict.values()):
        if not any(key.partition('.')[0] in _PARTS for key in state_dict):
            network = 'the localizer' if {'exp_conv.weight', 'conv_head.weight'} & state_dict.keys() else \
                'one network (resized or patch)'
            raise CheckpointError(
                f'it holds {network} alone. Give all three: {_ALL_PARTS}, or a folder with the authors\' three files')
        return dict(state_dict)
    out = {}
    for part, weights in state_dict.items():
        weights = clean_state_dict(dict(weights))
        weights = _map_localizer(weights) if part == 'localizer' else weights
        out.update({f'{part}.{k}': v for k, v in weights.items()})
    return out


def _cfg(name: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'hf_hub_id': hub_id(name) if name else None,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (3, 3),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'paper_name': 'Localizing Semantic Patches for Accelerating Image Classification',
        'paper_ids': 'arXiv:2206.03367',
        'origin_url': 'https://github.com/winycg/AnchorNet',
        **kwargs,
    }


def _three(first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        'first_conv': (f'resized.{first_conv}', f'patch.{first_conv}', 'localizer.stem.0'),
        'classifier': (f'resized.{classifier}', f'patch.{classifier}', 'localizer.fc'),
    }


default_cfgs = generate_default_cfgs({
    'anchornet.paper_in1k': _cfg(
        'anchornet.paper_in1k', pool_size=(17, 17), first_conv='stem.0', classifier='fc'),
    'anchornet_patch_densenet201_95.paper_in1k': _cfg(
        'anchornet_patch_densenet201_95.paper_in1k', **_three('features.conv0', 'classifier')),
    'anchornet_patch_resnet50_95.paper_in1k': _cfg(
        'anchornet_patch_resnet50_95.paper_in1k', **_three('conv1', 'fc')),
    'anchornet_patch.untrained': _cfg(**_three('features.conv0', 'classifier'), origin_url=None),
    'test_anchornet_patch.digits': _cfg(
        'test_anchornet_patch.digits', num_classes=10, input_size=(3, 96, 96), crop_pct=1.0, origin_url=None,
        **_three('conv1.0', 'fc')),
})


def _create(pretrained: bool = False, pretrained_cfg: Any = None, variant: str = '', **kwargs: Any) -> AnchorNetPatch:
    model: Any = build_model_with_cfg(AnchorNetPatch, variant, pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
    model.pretrained_cfg.update(first_conv=model._traits['first_conv'], classifier=model.classifier_names)
    return model


def _create_anchornet_patch(variant: str, pretrained: bool = False, **kwargs: Any) -> AnchorNetPatch:
    if kwargs.pop('features_only', False):
        raise RuntimeError('features_only is not implemented for AnchorNet-patch models.')
    return build_dynamic_model(partial(_create, variant=variant), variant, pretrained, **kwargs)


@register_model
def anchornet(pretrained: bool = False, **kwargs: Any) -> AnchorNet:
    """AnchorNet, the localizer, which is a classifier by itself."""
    create_fn = partial(
        build_model_with_cfg, AnchorNet, 'anchornet', feature_cfg=dict(out_indices=(0, 1, 2), feature_cls='getter'))
    return build_dynamic_model(create_fn, 'anchornet', pretrained, **kwargs)


@register_model
def anchornet_patch(pretrained: bool = False, **kwargs: Any) -> AnchorNetPatch:
    """AnchorNet-patch over the timm model `backbone`, DenseNet-201 by default."""
    return _create_anchornet_patch('anchornet_patch', pretrained, **dict(dict(exact_original=False), **kwargs))


@register_model
def anchornet_patch_densenet201_95(pretrained: bool = False, **kwargs: Any) -> AnchorNetPatch:
    """AnchorNet-patch over DenseNet-201, windows of 95, 5 steps."""
    model_args = dict(backbone='densenet201')
    return _create_anchornet_patch('anchornet_patch_densenet201_95', pretrained, **dict(model_args, **kwargs))


@register_model
def anchornet_patch_resnet50_95(pretrained: bool = False, **kwargs: Any) -> AnchorNetPatch:
    """AnchorNet-patch over ResNet-50, windows of 95, 5 steps."""
    model_args = dict(backbone='resnet50')
    return _create_anchornet_patch('anchornet_patch_resnet50_95', pretrained, **dict(model_args, **kwargs))


@register_model
def test_anchornet_patch(pretrained: bool = False, **kwargs: Any) -> AnchorNetPatch:
    """An AnchorNet-patch of 0.6 M parameters for demonstration and tests, over the ResNet of test_focusnet."""
    blocks = [(8, 16, 1, 2), (16, 24, 2, 2), (24, 32, 2, 1), (32, 48, 2, 1), (48, 48, 2, 1)]
    model_args: dict[str, Any] = dict(
        backbone='test_focusnet', backbone_args=dict(output_stride=16), patch_size=48, num_steps=3, img_size=96,
        exact_original=False)
    if kwargs.get('localizer', 'anchornet') == 'anchornet':
        model_args['localizer_args'] = dict(blocks=blocks, num_features=128)
    return _create_anchornet_patch('test_anchornet_patch', pretrained, **dict(model_args, **kwargs))
