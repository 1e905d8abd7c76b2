"""Training of AnchorNet-patch: its three networks are trained one after another.

Paper: `Localizing Semantic Patches for Accelerating Image Classification` - Yang et al., ICME 2022,
https://arxiv.org/abs/2206.03367
"""
import argparse
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..exits.collect import with_confidence
from ..layers import crop_patches, get_glance
from ..models.anchornet import AnchorNet, AnchorNetPatch, find_part_files
from ..models.builder import load_checkpoint
from .base import OneModuleTask
from .stage import Recipe, Stage, StageContext
from .static import (
    DEMO_COMMON,
    create_static_stage,
    create_static_task,
    demo_defaults,
    load_backbone_or_warn,
    whole_weights,
)

_logger = logging.getLogger(__name__)

PARTS = ('localizer', 'resized', 'patch')


class AnchorNetModule(nn.Module):
    """One network of an AnchorNet-patch.

    Args:
        model: The whole model.
        part: 'localizer' (sees images), 'resized' (sees images scaled down) or 'patch' (sees the windows that the
            localizer selects).
    """

    def __init__(self, model: AnchorNetPatch, part: str) -> None:
        super().__init__()
        self.model = model
        self.part = part

    def no_weight_decay(self) -> set[str]:
        return {f'model.{name}' for name in self.model.no_weight_decay()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits [n·B, num_classes]: one row per image or window, first windows of all images first."""
        model = self.model
        if self.part == 'localizer':
            return model.localizer(x)
        if self.part == 'resized':
            return model.resized(get_glance(x, model.patch_size))
        with torch.no_grad():
            windows = model.locate(x)['windows'].transpose(0, 1)
        views = crop_patches(x.repeat(len(windows), 1, 1, 1), windows.flatten(0, 1), model.patch_size)
        return model.patch(views)


class AnchorNetTask(OneModuleTask):
    """Train one network of an AnchorNet-patch with cross-entropy. The other two are frozen, in eval mode.

    The target of a window is the class of its image. The patch net is validated with the whole model, step by step (the
    original: with the mean of five crops).

    Args:
        model: The whole model.
        part: 'localizer', 'resized' or 'patch'.
        smoothing: Label smoothing.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log how many parameters are trained.
    """

    def __init__(
            self,
            model: AnchorNetPatch,
            part: str,
            smoothing: float = 0.,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not isinstance(model, AnchorNetPatch):
            raise ValueError(f'Expected an AnchorNet-patch model, got {type(model).__name__}.')
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}.")
        self.part, self.smoothing = part, smoothing
        self.trainable_module = AnchorNetModule(model, part)
        self.frozen = tuple(getattr(model, name) for name in PARTS if name != part)
        for name in PARTS:
            getattr(model, name).requires_grad_(name == part)
        if self.verbose:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            _logger.info(f'AnchorNetTask: {trained / 1e6:.2f} M parameters of the {part} net are trained.')

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """Return the whole model."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return unwrap_model(module).model if module is not None else None

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Images [B, in_chans, S, S].
            target: Class indices [B], int64, or probabilities [B, C].

        Returns:
            'loss', and 'output' (logits of the images, or of their first windows [B, C]).
        """
        logits = self.trainable_module(input)
        repeated = target.repeat(len(logits) // len(target), *[1] * (target.ndim - 1))
        smoothing = 0. if target.is_floating_point() else self.smoothing  # mixup has already smoothed the targets
        loss = F.cross_entropy(logits.float(), repeated, label_smoothing=smoothing)
        return {'loss': loss, 'output': logits[:len(input)]}

    def num_predictions(self, model: nn.Module) -> int:
        """See `TaskHooks.num_predictions`."""
        return super().num_predictions(model) if self.part == 'patch' else 1

    def predict(self, model: Any, x: Any) -> dict[str, torch.Tensor]:
        """See `TaskHooks.predict`: all steps of the model for the part 'patch', else the trained network alone."""
        if self.part == 'patch':
            return with_confidence(model.forward_all(x)['logits'])
        return with_confidence(AnchorNetModule(model, self.part)(x)[None])


# The recipe

# Settings of the paper. The resized and the patch net start from the backbone's pretrained weights.
_COMMON: dict[str, Any] = dict(
    global_batch_size=256, momentum=0.9, lr_base_size=256, weight_decay=1e-4,
    opt_kwargs={'filter_bias_and_bn': False}, warmup_epochs=0, smoothing=0., color_jitter=0.,
    train_interpolation='bilinear')
_DOWNSTREAM: dict[str, Any] = dict(_COMMON, epochs=30, opt='momentum', lr_base=0.01, sched='cosine')
_PAPER: dict[str, dict[str, Any]] = {
    'localizer': dict(
        _COMMON, epochs=100, opt='sgd', lr_base=0.1, sched='step', decay_epochs=30, decay_rate=0.1),
    'resized': _DOWNSTREAM,
    'patch': _DOWNSTREAM,
}
_DEMO: dict[str, dict[str, Any]] = {
    'static': dict(DEMO_COMMON, epochs=6),
    'localizer': dict(DEMO_COMMON, epochs=10),
    'resized': dict(DEMO_COMMON, epochs=4, lr=1e-3, warmup_epochs=0, init_downstream='scratch'),
    'patch': dict(DEMO_COMMON, epochs=4, lr=1e-3, warmup_epochs=0, init_downstream='scratch'),
}


def create_anchornet_task(
        model: AnchorNetPatch,
        args: argparse.Namespace,
        context: StageContext,
        part: str,
) -> TrainingTask:
    """Create the task of one stage, see `AnchorNetTask`."""
    return AnchorNetTask(
        model, part, args.smoothing, device=context.device, dtype=context.dtype, verbose=context.verbose)


def _given_parts(args: argparse.Namespace, model: AnchorNetPatch) -> tuple[str, ...]:
    """The networks whose initial weights the options give; not those of `--init-downstream`."""
    if args.init_from:
        return tuple(find_part_files(args.init_from, model)) or PARTS
    return PARTS if whole_weights(args) else ()


def _prepare(
        model: AnchorNetPatch,
        args: argparse.Namespace,
        context: StageContext,
        part: str,
        given: tuple[str, ...],
) -> None:
    """Load the initial weights of a stage.

    `--init-from`, which the first stage sees, has those of the whole model, or of some networks. The net that the stage
    trains, and a resized net that the stage needs, start from `--init-downstream` if their weights are not given.
    """
    if args.init_from:
        load_checkpoint(
            model, find_part_files(args.init_from, model) or args.init_from,
            optional=[name for name in PARTS if name not in given])
    if args.init_from and part == 'patch' and 'resized' not in given:
        _logger.warning(
            f"--init-from {args.init_from} has no resized net: it is not trained for small images. Train it with "
            '--stage resized patch, or give a folder with the files of both nets.')
        _load_downstream(model, args, context, 'resized')
    if part != 'localizer' and (part not in given or args.init_downstream):
        _load_downstream(model, args, context, part)


def _load_downstream(model: AnchorNetPatch, args: argparse.Namespace, context: StageContext, part: str) -> None:
    source = args.init_downstream
    if source == 'scratch':
        source = context.stage_weights['static']
    load_backbone_or_warn(getattr(model, part), source, model, f'{part} net', '--init-downstream')


def create_anchornet_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Create the recipe: localizer, resized net, patch net; `--init-downstream scratch` trains a static net first.

    An AnchorNet alone has the stage of the localizer only.
    """
    if not isinstance(model, (AnchorNetPatch, AnchorNet)):
        raise ValueError(
            f"The recipe 'anchornet' trains AnchorNet-patch models, e.g. --model anchornet_patch_densenet201_95, and "
            f'--model anchornet; got --model {args.model}.')
    defaults: Mapping[str, Mapping[str, Any]]
    defaults = demo_defaults(_DEMO, model, 'test_anchornet_patch') if demo else _PAPER
    if isinstance(model, AnchorNet):
        if args.init_downstream:
            raise ValueError(
                '--init-downstream is for the nets that an AnchorNet-patch has beside its localizer: --model anchornet '
                'has none.')
        if args.init_from:
            raise ValueError(
                '--init-from is for an AnchorNet-patch. Weights for --model anchornet: --initial-checkpoint.')
        return Recipe('anchornet', (
            Stage('localizer', create_static_task, defaults['localizer'], label=args.model),))
    given = _given_parts(args, model)
    if given:  # no static net is trained for nets that have weights
        defaults = {
            name: {k: v for k, v in options.items() if k != 'init_downstream'} for name, options in defaults.items()}
    scratch = (args.init_downstream or defaults['patch'].get('init_downstream')) == 'scratch'
    task = partial(partial, create_anchornet_task)
    prepare = partial(partial, _prepare, given=given)
    return Recipe('anchornet', (
        *([create_static_stage(model, defaults.get('static'), '--init-downstream')] if scratch else ()),
        Stage('localizer', task(part='localizer'), defaults['localizer'], prepare=prepare(part='localizer'),
              shown=False),
        Stage('resized', task(part='resized'), defaults['resized'], starts_from='localizer',
              prepare=prepare(part='resized'), shown=False),
        Stage('patch', task(part='patch'), defaults['patch'], starts_from='resized', prepare=prepare(part='patch'),
              label=args.model),
    ))
