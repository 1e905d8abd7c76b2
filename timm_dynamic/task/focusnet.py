"""FocusNet training: a net learns to separate the true class from those that a frozen baseline confuses with it."""
import argparse
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_model_input_config, get_pretrained_cfg, is_model, list_models
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..layers.renormalize import Renormalize
from ..loss import FocusPickingLoss
from ..models.builder import check_timm_weights, checkpoint_filter_of
from ..utils import did_you_mean, hash_weights, load_weights
from .base import OneModuleTask
from .classification import LOSS_OPTIONS, create_classification_task
from .stage import Recipe, Stage, StageContext
from .static import DEMO_COMMON

_logger = logging.getLogger(__name__)


def create_baseline(source: str | Path | nn.Module, model: nn.Module) -> Any:
    """Create the frozen baseline for a focus net.

    Args:
        source: A timm model name (with pretrained weights), 'local-dir:FOLDER', 'hf-hub:ORG/NAME', a folder exported by
            timm, a checkpoint file of the focus net's architecture, or a module.
        model: The focus net.

    Returns:
        The baseline, frozen and in eval mode.

    Raises:
        ValueError: The baseline does not exist, or has another number of classes or input channels than the focus net.
        CheckpointError: Its weights cannot be read or do not match.
    """
    focus = unwrap_model(model)
    name = getattr(focus, 'pretrained_cfg', {}).get('architecture', '')
    label = str(source) if not isinstance(source, nn.Module) else type(source).__name__
    baseline: Any
    if isinstance(source, nn.Module):
        baseline = source
    elif label.startswith(('local-dir:', 'hf-hub:')):
        baseline = timm.create_model(label, pretrained=True)
    elif (Path(label) / 'config.json').is_file():
        baseline = timm.create_model(f'local-dir:{label}', pretrained=True)
    elif Path(label).exists():
        baseline = timm.create_model(name, num_classes=focus.num_classes)
        load_weights(baseline, label, checkpoint_filter_of(name))
    elif is_model(label.split('.')[0]):
        check_timm_weights(label)
        baseline = timm.create_model(label, pretrained=True)
    else:
        raise ValueError(
            f"There is no baseline '{label}': it is neither a file, a folder nor a timm model."
            f'{did_you_mean(label, list_models())}')

    for what in ('num_classes', 'in_chans'):
        ours, theirs = getattr(focus, what, None), getattr(baseline, what, None)
        if ours is not None and theirs is not None and ours != theirs:
            noun = 'classes' if what == 'num_classes' else 'input channels'
            raise ValueError(
                f"The baseline '{label}' has {theirs} {noun}, the focus net has {ours}. They must be equal. Name "
                f'another --focus-baseline, or train one first with --focus-baseline scratch.')
    return baseline.requires_grad_(False).eval()


class FocusPickingTask(OneModuleTask):
    """Train a focus net with a frozen baseline.

    The baseline is not wrapped, averaged, optimised or saved, and is always in eval mode. It runs without gradients, in
    channels_last, under the caller's autocast. It sees the same batch as the focus net, but with its own normalisation.
    The task's state holds only a hash of its weights. Resuming with another baseline is an error.

    Args:
        model: Focus net.
        baseline: See `source` of `create_baseline`.
        criterion: Loss, called with logits, targets (soft with mixup) and baseline logits.
        mean: Channel means that batches are normalised with, as in timm's data config (default: the model's).
        std: Channel standard deviations that batches are normalised with (default: the model's).
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log the baseline, the loss, and whether batches are renormalised.
    """

    def __init__(
            self,
            model: nn.Module,
            baseline: str | Path | nn.Module,
            criterion: FocusPickingLoss | None = None,
            mean: tuple[float, ...] | None = None,
            std: tuple[float, ...] | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = model
        self.criterion = criterion if criterion is not None else FocusPickingLoss()
        self.baseline: Any = create_baseline(baseline, model)
        self.baseline_name = type(baseline).__name__ if isinstance(baseline, nn.Module) else str(baseline)
        self.frozen = (self.baseline,)
        self.baseline_hash = hash_weights(self.baseline.state_dict())[:16]
        self.baseline.to(device=self.device, memory_format=torch.channels_last)

        cfg = getattr(unwrap_model(model), 'pretrained_cfg', {})
        base_cfg = getattr(self.baseline, 'pretrained_cfg', {})
        mean, std = mean or cfg.get('mean', IMAGENET_DEFAULT_MEAN), std or cfg.get('std', IMAGENET_DEFAULT_STD)
        self.renormalize = Renormalize(
            mean, std, base_cfg.get('mean', IMAGENET_DEFAULT_MEAN), base_cfg.get('std', IMAGENET_DEFAULT_STD),
            in_chans=len(mean), device=self.device, dtype=self.dtype)

        config = get_model_input_config(self.baseline)
        self.baseline_size = tuple(config['input_size'][1:]) if config['fixed_input_size'] else None
        if self.verbose:
            name = base_cfg.get('architecture', type(self.baseline).__name__)
            renormalize = not self.renormalize.is_identity
            _logger.info(f'FocusPickingTask: baseline={name}, renormalize={renormalize}, {self.criterion}')

    def compile(  # type: ignore[override]
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile the focus net and the baseline."""
        self.baseline = torch.compile(self.baseline, backend=backend, mode=mode, **compile_kwargs)
        self.frozen = (self.baseline,)
        self.eval_model = super().compile(backend, mode, **compile_kwargs)
        return self.eval_model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {} if ema else {'baseline_hash': self.baseline_hash}

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        saved = (state or {}).get('baseline_hash')
        if strict and saved is not None and saved != self.baseline_hash:
            raise ValueError(
                f'The baseline has other weights (hash {self.baseline_hash}) than the one this run was started with '
                f'({saved}). Resume it with the same --focus-baseline.')

    def baseline_logits(self, input: torch.Tensor) -> torch.Tensor:
        """Run the baseline.

        Args:
            input: Images [B, C, H, W], normalised for the focus net.

        Returns:
            Logits [B, num_classes], without gradient.
        """
        if self.baseline_size is not None and tuple(input.shape[-2:]) != self.baseline_size:
            raise ValueError(
                f'The baseline needs images of size {self.baseline_size}, but training uses {tuple(input.shape[-2:])}. '
                'Change --img-size or --focus-baseline.')
        with torch.inference_mode():
            logits = self.baseline(self.renormalize(input).contiguous(memory_format=torch.channels_last))
        return logits.clone()  # autograd cannot save tensors of inference mode

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Images [B, C, H, W].
            target: Class indices [B] or soft targets [B, num_classes].

        Returns:
            'loss', 'output' (focus logits [B, num_classes]), and the terms 'classification', 'attention', 'negentropy'.
        """
        output = self.trainable_module(input)
        terms = self.criterion.terms(output, target, self.baseline_logits(input))
        return {'loss': self.criterion.total(terms), 'output': output, **terms._asdict()}


# The recipe

def create_focus_task(model: nn.Module, args: argparse.Namespace, context: StageContext) -> TrainingTask:
    """Create the task with `--focus-baseline`, or with the net of the stage 'baseline'."""
    baseline = args.focus_baseline
    if baseline == 'scratch':
        baseline = str(context.stage_weights['baseline'])
    criterion = FocusPickingLoss(
        smoothing=args.smoothing, temperature=args.focus_temperature,
        attention_weight=args.focus_attention_weight, negentropy_weight=args.focus_negentropy_weight)
    return FocusPickingTask(
        model, baseline, criterion, mean=context.data_config.get('mean'), std=context.data_config.get('std'),
        device=context.device, dtype=context.dtype, verbose=context.verbose)


# Settings of the paper: SGD without Nesterov momentum, weight decay on all parameters, only crops and flips.
_FOCUS_PAPER = dict(
    epochs=90, global_batch_size=256, opt='momentum', momentum=0.9, lr_base=0.1, lr_base_size=256, weight_decay=1e-4,
    opt_kwargs={'filter_bias_and_bn': False}, sched='step', decay_epochs=30, decay_rate=0.1, warmup_epochs=0,
    color_jitter=0., train_interpolation='bilinear',
)
_FOCUS_DEMO = dict(DEMO_COMMON, epochs=6)
# The paper's baselines that timm has. That of MobileNetV2 is a file of the authors.
_PAPER_BASELINES = {'focusnet_resnet18': 'resnet18.tv_in1k', 'focusnet_resnet34': 'resnet34.tv_in1k'}
_MOBILENET_BASELINE = 'baseline_mobilenet_v2_model_best.pth.tar'


def architecture_of(args: argparse.Namespace, model: Any = None) -> str:
    """Registered name of the model of the options, without its tag."""
    cfg = getattr(model, 'pretrained_cfg', {})
    return cfg.get('architecture') or args.model.split('.')[0]


def _default_baseline(args: argparse.Namespace, demo: bool, model: Any) -> str:
    """The baseline if `--focus-baseline` is not given: the paper's; on the demo set one that is trained first.

    Raises:
        ValueError: There is none, or it has another number of classes than the data.
    """
    if demo:
        return 'scratch'
    name = architecture_of(args, model)
    others = '--focus-baseline scratch to train one first, or --recipe classification for plain classification'
    baseline = _PAPER_BASELINES.get(name)
    if baseline is None:
        example = f'FILE (the paper\'s is {_MOBILENET_BASELINE})' if name == 'focusnet_mobilenetv2_100' else \
            'MODEL (e.g. resnet18.tv_in1k)'
        raise ValueError(f'The recipe focusnet needs a baseline: --focus-baseline {example}, {others}.')
    cfg = get_pretrained_cfg(baseline)
    if cfg is not None and args.num_classes not in (None, cfg.num_classes):
        raise ValueError(
            f'The recipe focusnet needs a baseline with {args.num_classes} classes, but that of the paper, {baseline}, '
            f'has {cfg.num_classes}. Add --focus-baseline MODEL, {others}.')
    return baseline


def create_focusnet_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Create the recipe: a focus net, and before it a baseline and a plain net if the options ask for them."""
    baseline = args.focus_baseline or _default_baseline(args, demo, model)
    defaults = dict(_FOCUS_DEMO if demo else _FOCUS_PAPER)
    scratch = baseline == 'scratch'
    stages = []
    if scratch:
        stages.append(Stage(
            'baseline', create_classification_task, defaults, label='baseline (frozen)', seed_offset=1))
    if args.focus_plain:
        stages.append(Stage('plain', create_classification_task, defaults, label='plain cross-entropy'))
    for option in LOSS_OPTIONS:
        if getattr(args, option) and not stages:
            raise ValueError(
                f"--{option.replace('_', '-')} has no effect on the focus net, which has another loss. Use it with "
                '--focus-baseline scratch or --focus-plain.')
    stages.append(Stage('focus', create_focus_task, dict(defaults, focus_baseline=baseline), label='focus net'))
    return Recipe('focusnet', tuple(stages), {} if scratch else {'baseline (frozen)': baseline})
