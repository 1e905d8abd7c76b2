"""The recipe of CLCNet cascades: members, what they say of held-out images, the confidence net."""
import argparse
from pathlib import Path
from typing import Any

from ..data import FoldMap
from ..models.clcnet import CLCNet
from .gfnet_recipe import DEMO_COMMON, STATIC_PAPER, create_static_task
from .stage import Recipe, Stage

_DEMO_EPOCHS = 12, 8  # of the first member, and of the dearer ones
NUM_FOLDS = 5  # the paper's
# The paper's, for the confidence net; its batches have 256 rows.
_CONFIDENCE: dict[str, Any] = dict(epochs=200, lr=0.02, clip_grad=1., patience_epochs=50)


def member_stage(index: int) -> str:
    """Name of the stage that trains a member, counted from 0."""
    return f'member{index + 1}'


def member_sources(args: argparse.Namespace, demo: bool, model: CLCNet) -> list[str]:
    """Where each member's weights come from: 'scratch', 'pretrained', or a path.

    Raises:
        ValueError: There are not as many as members, or a member without weights of its own is asked for them.
    """
    trained = args.pretrained or args.initial_checkpoint or ':' in args.model
    default = 'scratch' if demo and not trained else 'pretrained'
    given = list(args.init_members or [default])
    count = len(model.members)
    if len(given) == 1:
        given *= count
    if len(given) != count:
        raise ValueError(f'--init-members: expected one source, or one for each of {count} members, got {len(given)}.')
    return given


def create_clcnet_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Members that are trained from scratch; then features, then the confidence net."""
    if not isinstance(model, CLCNet):
        raise ValueError(f"The recipe 'clcnet' is for cascades, e.g. --model clcnet; got '{args.model}'.")
    if args.folds is not None and (args.folds < 0 or args.folds == 1):
        raise ValueError(f'--folds: expected at least 2, or 0 for none, got {args.folds}.')
    if args.fold_dir and args.folds is not None:
        raise ValueError('--fold-dir says how many folds there are: leave out --folds.')
    if model.confidence_kind == 'agreement' and not args.confidence:
        raise ValueError(
            "The cascade's confidence is 'agreement', which cannot be told from what one member says: give another one "
            'with --confidence here, and choose it with validate.py.')
    for path in args.features or ():
        if not Path(path).is_file():
            raise ValueError(f"--features: there is no file '{path}'.")
    if args.fold_dir:
        FoldMap.read(args.fold_dir)  # before hours are spent
    if args.confidence == 'all' and (args.features or args.folds == 0):
        raise ValueError('--confidence all compares out of fold: it needs the features stage and folds.')
    stages = []
    for index, source in enumerate(member_sources(args, demo, model)):
        steps = [t for t, i in enumerate(model.member_of_step) if i == index]
        spec, sizes = model.specs[steps[0]], [model.view_sizes[t] for t in steps]
        if source != 'scratch':
            continue
        defaults: dict[str, Any] = dict(DEMO_COMMON, epochs=_DEMO_EPOCHS[index > 0]) if demo else STATIC_PAPER
        if not isinstance(spec.model, str):
            raise ValueError(f'--init-members scratch: {spec.label} is a module and is not trained here.')
        view: dict[str, Any] = dict(
            img_size=max(sizes), input_size=None, crop_pct=spec.view['crop_pct'],
            interpolation=spec.view['interpolation'], mean=list(spec.view['mean']), std=list(spec.view['std']),
            demo_img_size=model.img_size)
        if len(sizes) > 1:  # one network at several sizes sees all of them
            view['train_img_sizes'] = sorted(sizes)
        label = f'{spec.model} at {max(sizes)}'
        stages.append(Stage(
            member_stage(index), create_static_task, defaults, model=spec.model, model_kwargs=spec.args, options=view,
            label=label, seed_offset=index + 1))
    collect: dict[str, Any] = {
        k: v for k, v in DEMO_COMMON.items() if k.startswith('demo_') or k in ('global_batch_size', 'workers')
    } if demo else {}
    if not args.features:
        stages.append(Stage('features', None, collect, runs='features', shown=False))
    stages.append(Stage('confidence', None, {**collect, **_CONFIDENCE}, runs='confidence', label=args.model))
    return Recipe('clcnet', tuple(stages))
