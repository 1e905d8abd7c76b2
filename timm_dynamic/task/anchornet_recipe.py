"""The recipe that trains AnchorNet-patch: localizer, resized net, patch net."""
import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.task import TrainingTask

from ..models.anchornet import AnchorNetPatch
from .anchornet import AnchorNetTask
from .gfnet_recipe import DEMO_COMMON, create_static_stage, load_backbone_or_warn
from .stage import Recipe, Stage, StageContext

# The paper's. The resized and the patch net start from the backbone's pretrained weights.
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
    """One stage, see `AnchorNetTask`."""
    return AnchorNetTask(
        model, part, args.smoothing, device=context.device, dtype=context.dtype, verbose=context.verbose)


def _load_downstream(model: Any, args: argparse.Namespace, context: StageContext, part: str) -> None:
    source = args.init_downstream
    if source == 'scratch':
        source = context.stage_weights['static']
    load_backbone_or_warn(getattr(model, part), source, model, f'{part} net', '--init-downstream')


def create_anchornet_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Localizer, resized net, patch net; with `--init-downstream scratch` a static net first, to start these from."""
    if not isinstance(model, AnchorNetPatch):
        raise ValueError(
            f"The recipe 'anchornet' trains AnchorNet-patch models, e.g. --model anchornet_patch_densenet201_95; got "
            f"'{args.model}'.")
    defaults: Mapping[str, Mapping[str, Any]] = _DEMO if demo else _PAPER
    scratch = (args.init_downstream or defaults['patch'].get('init_downstream')) == 'scratch'
    task = partial(partial, create_anchornet_task)
    load = partial(partial, _load_downstream)
    return Recipe('anchornet', (
        *([create_static_stage(model, defaults.get('static'), '--init-downstream')] if scratch else ()),
        Stage('localizer', task(part='localizer'), defaults['localizer'], num_steps=1, shown=False),
        Stage('resized', task(part='resized'), defaults['resized'], starts_from='localizer',
              prepare=load(part='resized'), num_steps=1, shown=False),
        Stage('patch', task(part='patch'), defaults['patch'], starts_from='resized', prepare=load(part='patch'),
              label=args.model),
    ))
