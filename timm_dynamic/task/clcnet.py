"""The recipe of CLCNet cascades: train the members, run them on held-out images, train the confidence net.

Paper: `CLCNet: Rethinking of Ensemble Modeling with Classification Confidence Network` - Yao et al., 2022,
https://arxiv.org/abs/2205.09612
"""
import argparse
import logging
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..data import ConfidenceFeatures, FoldMap, fold_names
from ..data.image_names import image_names
from ..exits.collect import Outputs, run_loader
from ..exits.measures import auroc
from ..models.builder import load_checkpoint
from ..models.clcnet import CLCNet, fetch_members
from ..utils import (
    CheckpointError,
    copy_pretrained,
    hash_weights,
    read_json,
    save_pretrained,
    seeded,
    write_json,
)
from ..utils.report import format_table, write_rows
from ..utils.signals import Stopped
from .compare_confidences import Choice, compare_confidences, describe_best, tables_out_of_fold
from .confidence_net import fit_confidence_net, fit_folds, make_folds, match_scores, score_folds
from .feature_parts import FeatureParts
from .stage import Recipe, Stage, StageContext
from .static import DEMO_COMMON, STATIC_PAPER, create_static_task

_logger = logging.getLogger(__name__)

CALIBRATION = 'calibration.safetensors'
FOLDS_FILE = 'folds.csv'
NUM_FOLDS = 5  # as in the paper
_DEMO_EPOCHS = 12, 8  # of the first member, of the other members
_BATCHES_PER_PART = 50  # a killed run loses at most this number of batches
# Settings of the paper for the confidence net. One process trains it, so its batch size is not divided.
_CONFIDENCE: dict[str, Any] = dict(epochs=200, batch_size=256, lr=0.02, clip_grad=1., patience_epochs=50)


# The recipe

def create_clcnet_recipe(args: argparse.Namespace, demo: bool, model: Any) -> Recipe:
    """Create the recipe: members that are trained from scratch, 'features', 'confidence'."""
    _check(args, model)
    stages = []
    for index, source in enumerate(member_sources(args, demo, model)):
        if source == 'scratch':
            stages.append(_member_stage(index, demo, model))
    collect: dict[str, Any] = {
        k: v for k, v in DEMO_COMMON.items() if k in ('global_batch_size', 'workers')
    } if demo else {}
    if not args.features:
        stages.append(Stage('features', None, collect, run=collect_features, shown=False))
    stages.append(Stage('confidence', None, _CONFIDENCE, run=train_confidence, label=args.model))
    return Recipe('clcnet', tuple(stages))


def _check(args: argparse.Namespace, model: Any) -> None:
    if not isinstance(model, CLCNet):
        raise ValueError(f"The recipe 'clcnet' trains cascades, e.g. --model clcnet; got --model {args.model}.")
    if args.folds is not None and (args.folds < 0 or args.folds == 1):
        raise ValueError(f'--folds: expected at least 2, or 0 for no cross-validation, got {args.folds}.')
    if args.fold_dir and args.folds is not None:
        raise ValueError('--fold-dir cannot be combined with --folds: the number of folds is that of --fold-dir.')
    if model.confidence_kind == 'agreement' and not args.confidence:
        raise ValueError(
            "The cascade has confidence='agreement', which features cannot compute: it needs the classes that the "
            'members predict. Train with another --confidence, and select agreement with validate.py afterwards.')
    for path in args.features or ():
        if not Path(path).is_file():
            raise ValueError(f"--features: there is no file '{path}'.")
    if args.fold_dir:
        FoldMap.read(args.fold_dir)  # raises its errors early
    if _without_members(args):
        _check_without_members(args)
    if args.confidence == 'all' and (args.features or args.folds == 0):
        raise ValueError(
            '--confidence all needs cross-validation on the features of this run. It cannot be combined with '
            '--features or --folds 0.')


def _without_members(args: argparse.Namespace) -> bool:
    """Whether only the confidence net is trained. Then no cascade is exported."""
    return 'none' in (args.init_members or ())


def _check_without_members(args: argparse.Namespace) -> None:
    if len(args.init_members) > 1:
        raise ValueError("--init-members: 'none' is for all members. It cannot be combined with other sources.")
    if not args.features:
        raise ValueError('--init-members none trains only the confidence net: it needs --features FILE.')
    for option in ('confidence', 'push_to_hub'):
        if getattr(args, option):
            raise ValueError(
                f"--init-members none exports no cascade. It cannot be combined with --{option.replace('_', '-')}.")


def member_sources(args: argparse.Namespace, demo: bool, model: CLCNet) -> list[str]:
    """Source of each member's weights: 'scratch', 'pretrained', 'none', or a path.

    Raises:
        ValueError: There are neither one source nor as many sources as members.
    """
    trained = args.pretrained or args.initial_checkpoint or ':' in args.model
    default = 'scratch' if demo and not trained else 'pretrained'
    given = list(args.init_members or [default])
    count = len(model.members)
    if len(given) == 1:
        given *= count
    if len(given) != count:
        raise ValueError(f'--init-members: expected one source, or {count} (one for each member), got {len(given)}.')
    return given


def _member_name(index: int) -> str:
    return f'member{index + 1}'


def _member_stage(index: int, demo: bool, model: CLCNet) -> Stage:
    """Create the stage that trains one member."""
    steps = [t for t, i in enumerate(model.member_of_step) if i == index]
    spec, sizes = model.specs[steps[0]], [model.view_sizes[t] for t in steps]
    defaults: dict[str, Any] = dict(DEMO_COMMON, epochs=_DEMO_EPOCHS[index > 0]) if demo else STATIC_PAPER
    if not isinstance(spec.model, str):
        raise ValueError(
            f'--init-members scratch: the member {spec.label} is a module, and only timm models can be trained.')
    view: dict[str, Any] = dict(
        img_size=max(sizes), input_size=None, crop_pct=spec.view['crop_pct'],
        interpolation=spec.view['interpolation'], mean=list(spec.view['mean']), std=list(spec.view['std']),
        demo_img_size=model.img_size)
    if len(sizes) > 1:  # a network that is used at several sizes is trained at all of them
        view['train_img_sizes'] = sorted(sizes)
    return Stage(
        _member_name(index), create_static_task, defaults, model=spec.model, model_kwargs=spec.args, options=view,
        label=f'{spec.model} at {max(sizes)}', seed_offset=index + 1)


def build_cascade(args: argparse.Namespace, context: StageContext) -> CLCNet:
    """Create a cascade with the members' weights. The confidence net is not trained, unless the weights have one.

    Raises:
        ValueError: A member's weights do not exist, or are for another number of classes.
        CheckpointError: A member's weights cannot be read, or do not match.
    """
    whole = args.pretrained or ':' in args.model
    with seeded(args.seed, 'model'):
        model: CLCNet = context.build_model(pretrained=whole)
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
        whole = True
    to_fetch = []
    for index, source in enumerate(member_sources(args, context.demo, model)):
        spec: Any = model.specs[model.member_of_step.index(index)]
        if source == 'pretrained':
            if not whole and spec.num_classes != model.num_classes:
                raise ValueError(
                    f'The pretrained weights of the member {spec.label} have {spec.num_classes} classes, the cascade '
                    f'has {model.num_classes}. Name other weights with --init-members, or train the members first '
                    'with --init-members scratch.')
            to_fetch += [] if whole else [index]
            continue
        path = context.stage_weights.get(_member_name(index)) if source == 'scratch' else Path(source)
        if path is None or (source == 'scratch' and not path.exists()):
            raise ValueError(
                f"There are no weights of the cascade's member {index + 1} at '{path}'. Run the stage "
                f"'{_member_name(index)}' first, or name weights with --init-members.")
        load_checkpoint(model.members[index], path, label=f"'{path}' (of member {index + 1})")
    fetch_members(model, to_fetch, None)
    return model


# Features

def collect_features(args: argparse.Namespace, context: StageContext) -> dict[str, Any]:
    """Run the members over a split, and write the features of each member to a file, see `ConfidenceFeatures`.

    Partial results are written regularly. A resumed run continues with the images that are still missing.

    Raises:
        ValueError: No split is named, or its images cannot be indexed.
        Stopped: A signal asked to stop. The partial results are written.
    """
    accelerator, folder = context.accelerator, context.folder
    split = args.feature_split or args.val_split
    if not split:
        raise ValueError(
            'Name a split for the features with --feature-split. The members should not be trained on its images.')
    model = build_cascade(args, context).eval().to(device=context.device, dtype=context.dtype)
    first = context.open_loader(model, split, [0])
    whole = first.dataset.dataset
    if isinstance(whole, torch.utils.data.IterableDataset):
        raise ValueError(f"--feature-split {split}: features need a dataset with indices, this one is iterable.")
    names = image_names(whole, split)
    if args.fold_dir:
        _read_folds(args.fold_dir, names)  # raises its errors early
    parts = FeatureParts(folder, [
        hash_weights(model.members.state_dict()), split, names, first.views, str(context.dtype),
        accelerator.mixed_precision])
    done = parts.begin(accelerator)
    left = [i for i in range(len(whole)) if i not in done]
    if done and left:
        _logger.info(f'Features of {len(done)} images exist already, {len(left)} are missing.')
    mine = left[accelerator.process_index::accelerator.num_processes]
    if mine:
        _run_members(model, context.open_loader(model, split, mine), mine, parts, context, f'features of {split}')
    accelerator.wait_for_everyone()
    result: dict[str, Any] = {'split': split, 'images': len(whole)}
    if accelerator.is_main_process:
        logits, target = parts.read()
        for t in range(model.num_steps):
            ConfidenceFeatures.from_logits(logits[:, t], target, names).save(folder / f'member{t + 1}.safetensors')
            result[f'top1_member{t + 1}'] = round(100 * float((logits[:, t].argmax(1) == target).float().mean()), 4)
        write_json(folder / 'index.json', {
            'label_names': _label_names(first.class_to_idx, model.num_classes), 'split': split, 'images': len(whole),
            'classes': model.num_classes,
            'members': {f'member{t + 1}.safetensors': spec.label for t, spec in enumerate(model.specs)}})
        parts.remove()
        _logger.info(f'Features of {len(whole)} images of {split}: {folder}')
    accelerator.wait_for_everyone()
    return result


def _label_names(class_to_idx: Mapping[str, int] | None, num_classes: int) -> list[str] | None:
    if class_to_idx is None or len(class_to_idx) != num_classes:
        return None
    return sorted(class_to_idx, key=lambda name: class_to_idx[name])


def _run_members(
        model: CLCNet,
        loader: Any,
        indices: Sequence[int],
        parts: FeatureParts,
        context: StageContext,
        desc: str,
) -> None:
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    begin = end = batches = 0

    def on_batch(outputs: Outputs, target: torch.Tensor, x: Any) -> None:
        nonlocal begin, end, batches
        waiting.append((outputs['member_logits'].float().transpose(0, 1).cpu(), target.cpu()))
        end, batches = end + len(target), batches + 1
        if batches % _BATCHES_PER_PART == 0 or end == len(indices) or context.stop:
            logits, targets = (torch.cat(values) for values in zip(*waiting))
            parts.write(indices[begin:end], logits, targets)
            waiting.clear()
            begin = end
        if context.stop and end < len(indices):
            raise Stopped(context.stop.signum or signal.SIGTERM)

    run_loader(model.forward_all, loader, on_batch, context.device, context.accelerator, desc=desc)


# The confidence net

def train_confidence(args: argparse.Namespace, context: StageContext) -> dict[str, Any]:
    """Train the confidence net on the features, and export the cascade with it.

    The exported net is trained on all images. In addition, a net for each fold is trained on the other folds. Each
    image is scored by the net that was not trained on it, and the scores are mapped to the scale of the exported net.
    These out-of-fold scores are used to compare confidences and to fit exits. With `--init-members none` only the
    confidence nets are trained and written.

    Raises:
        ValueError: There are no features, or they do not match each other, the folds or the cascade.
        CheckpointError: Weights of a member are not available, or do not fit.
    """
    model = None if _without_members(args) else _build_trained_cascade(args, context)
    result: dict[str, Any] = {}
    if context.accelerator.is_main_process:
        context.folder.mkdir(parents=True, exist_ok=True)
        features = _read_features(args, context.stage_weights, model)
        merged = ConfidenceFeatures.merge(features)
        settings = dict(
            epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, clip_grad=args.clip_grad,
            patience=args.patience_epochs)
        folds = _choose_folds(args, merged.names)
        fit = fit_confidence_net(merged.probabilities, merged.correct, seed=args.seed, **settings)
        nets = [] if folds is None else [
            fold.net for fold in fit_folds(merged.probabilities, merged.correct, folds, seed=args.seed, **settings)]
        result = {'val_error': fit.val_error, 'test_error': fit.test_error, 'best': fit.val_error,
                  'best_epoch': fit.best_epoch}
        write_rows(context.folder / 'summary.csv', [{'epoch': i, **row} for i, row in enumerate(fit.history)])
        fit.net.save(context.folder / 'confidence_net.safetensors')  # kept where another confidence was better
        if model is None:
            result.update(_score_out_of_fold(context, merged, nets, folds))
            _logger.info(f"Confidence net: {context.folder / 'confidence_net.safetensors'}")
        else:
            default = model.confidence_kind, model.final_rule
            model.set_confidence('clcnet', net=fit.net)
            choice, entries = _compare_out_of_fold(args, context, model, features, merged, nets, folds, default)
            result.update(entries)
            if choice != (model.confidence_kind, model.final_rule):
                model.set_confidence(*choice)
            _export(context, model, None if args.features else _read_index(context)['label_names'])
        _write_folds(context.folder / 'folds', merged, nets, folds)
    context.accelerator.wait_for_everyone()
    shared: list[Any] = [result]
    broadcast_object_list(shared)  # all processes return the same
    return shared[0]


def _build_trained_cascade(args: argparse.Namespace, context: StageContext) -> CLCNet:
    try:
        return build_cascade(args, context).eval()
    except CheckpointError as e:
        if not args.features:
            raise
        raise CheckpointError(
            f'{e} To train only the confidence net, without weights of the members: --init-members none.') from e


def _requested(args: argparse.Namespace) -> str | None:
    """Confidence that the options name; None if the best is to be chosen."""
    name = args.confidence or args.model_kwargs.get('confidence')
    return None if name == 'all' else name


def _compare_out_of_fold(
        args: argparse.Namespace,
        context: StageContext,
        model: CLCNet,
        features: Sequence[ConfidenceFeatures],
        merged: ConfidenceFeatures,
        nets: Sequence[Any],
        folds: torch.Tensor | None,
        default: Choice,
) -> tuple[Choice, dict[str, Any]]:
    """Choose confidence and final rule, and write the out-of-fold exit table, on which exits are fitted.

    The best out of fold is chosen, among those that the options leave open; without out-of-fold scores of the run's
    own images the default is.

    Returns:
        The choice, and entries of the stage's result.
    """
    folder, choice = context.folder, (_requested(args) or default[0], default[1])
    same_images = args.features is None  # the files of --features may be of different images
    result = {'split': _read_index(context)['split']} if same_images else {}
    if folds is not None and same_images:
        scores = score_folds(nets, merged.probabilities, folds)
        with torch.no_grad():
            reference = torch.cat([model.confidence_net(part) for part in merged.probabilities.split(1024)])
        scores = match_scores(scores, reference, folds).unflatten(0, (len(features), -1))
        tables = tables_out_of_fold(model, features, scores)
        rows = compare_confidences(tables)
        write_rows(folder / 'confidences.csv', rows)
        if not _requested(args):
            best = max(
                (row for row in rows if 'final_rule' not in args.model_kwargs or row['final_rule'] == default[1]),
                key=lambda row: row['area'])
            choice = best['confidence'], best['final_rule']
        _logger.info(
            f'Confidences, {len(nets)}-fold cross-validation on {len(features[0])} images (area: mean top-1 over all '
            f'budgets, exits fitted on the other half):\n{format_table(rows)}\n{describe_best(rows)} The model is '
            f"exported with {choice[0]} and {choice[1]}{'' if _requested(args) else '; --confidence overrides'}.")
        tables[choice].save(folder / CALIBRATION)
        return choice, {**result, 'auroc': next(r['auroc'] for r in rows if r['confidence'] == choice[0])}
    return choice, {**result, **_score_out_of_fold(context, merged, nets, folds)}


def _score_out_of_fold(
        context: StageContext,
        merged: ConfidenceFeatures,
        nets: Sequence[Any],
        folds: torch.Tensor | None,
) -> dict[str, Any]:
    """AUROC of the nets of the cross-validation, where it is not known which rows are of the same image."""
    for name in (CALIBRATION, 'confidences.csv'):
        (context.folder / name).unlink(missing_ok=True)
    if folds is None:
        _logger.warning('--folds 0: results on the images of the features are not cross-validated. The confidence net '
                        'was trained on them.')
        return {}
    area = auroc(score_folds(nets, merged.probabilities, folds), merged.correct)
    _logger.info(f'AUROC of the confidence net, {len(nets)}-fold cross-validation: {area:.4f}')
    return {'auroc_all_members': area}


def _export(context: StageContext, model: CLCNet, label_names: list[str] | None) -> None:
    """Export the cascade."""
    folder = context.folder
    labels: dict[str, Any] = {'label_names': label_names} if label_names else {}
    save_pretrained(model, folder / 'last', data_config=context.data_config_of(model), **labels)
    copy_pretrained(folder / 'last', folder / 'best')


def _write_folds(folder: Path, merged: ConfidenceFeatures, nets: Sequence[Any], folds: torch.Tensor | None) -> None:
    """Write the nets of the cross-validation and their folds."""
    shutil.rmtree(folder, ignore_errors=True)
    if folds is None:
        return
    folder.mkdir()
    for k, net in enumerate(nets):
        net.save(folder / f'fold{k + 1}.safetensors')
    FoldMap(fold_names(merged.names, folds)).save(folder / FOLDS_FILE)


def _read_index(context: StageContext) -> dict[str, Any]:
    """Read the split, class names and members of a run's features, see `collect_features`."""
    return read_json(context.stage_weights['features'].parent / 'index.json')


def _read_features(
        args: argparse.Namespace,
        stage_weights: Mapping[str, Path],
        model: CLCNet | None,
) -> list[ConfidenceFeatures]:
    if args.features:
        paths = [Path(path) for path in args.features]
    else:
        assert model is not None  # see _check_without_members
        folder = stage_weights['features'].parent
        paths = [folder / f'member{t + 1}.safetensors' for t in range(model.num_steps)]
    for path in paths:
        if not path.is_file():
            hint = '' if args.features else " Run the stage 'features' first, or name files with --features."
            raise ValueError(f"There are no features at '{path}'.{hint}")
    features = [ConfidenceFeatures.load(path) for path in paths]
    for path, f in zip(paths, features):
        if model is not None and f.probabilities.shape[1] != model.num_classes:
            raise ValueError(
                f"'{path}' has probabilities of {f.probabilities.shape[1]} classes, the cascade has "
                f'{model.num_classes} classes.')
    return features


def _choose_folds(args: argparse.Namespace, names: Sequence[str]) -> torch.Tensor | None:
    """Fold of each row of the features. Rows of one image are in one fold. None without cross-validation."""
    if args.fold_dir:
        return _read_folds(args.fold_dir, names)
    if args.folds == 0:
        return None
    if any('/' not in name for name in names):  # the authors' files have names without folders
        names = [name.rpartition('/')[2] for name in names]
    numbers: dict[str, int] = {}
    image = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])
    return make_folds(len(numbers), args.folds or NUM_FOLDS, args.seed)[image]


def _read_folds(path: str, names: Sequence[str]) -> torch.Tensor:
    known = FoldMap.read(path)
    folds = known.folds_of(names)
    outside = (folds < 0).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"--fold-dir: {len(outside)} of {len(folds)} images are in no fold of '{path}', first "
            f"'{names[outside[0]]}'.")
    if len(folds.unique()) < known.num_folds:
        raise ValueError(
            f"--fold-dir: only {len(folds.unique())} of the {known.num_folds} folds of '{path}' contain images of the "
            'features.')
    return folds
