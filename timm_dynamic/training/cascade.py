"""Stages of a cascade's recipe that do not train by batches of images: features, and the confidence net."""
import argparse
import hashlib
import json
import logging
import shutil
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data import ConfidenceFeatures, FoldMap, fold_names
from ..exits.measures import auroc
from ..launch.build import (
    build_eval_loader,
    build_model,
    eval_views,
    model_dtype,
    training_data_config,
    uses_demo_data,
)
from ..layers.confidence_net import read_confidence_net
from ..models.builder import checkpoint_filter_of
from ..models.clcnet import CLCNet, checkpoint_filter_fn, fetch_members
from ..task import (
    NUM_FOLDS,
    Stage,
    fit_confidence_net,
    fit_folds,
    make_folds,
    match_scores,
    member_sources,
    member_stage,
    score_folds,
)
from ..utils import atomic_write, copy_pretrained, load_weights, read_json, save_pretrained, seeded, write_json
from ..utils.report import format_table, write_rows
from ..utils.signals import Stopped, StopRequest
from .confidences import FOLDS_FILE, advice, compare_out_of_fold, image_names, tables_out_of_fold
from .evaluate import progress_bar

_logger = logging.getLogger(__name__)

CALIBRATION = 'calibration.safetensors'
_BATCHES_PER_PART = 50  # what a killed run loses, at most


def build_cascade(args: argparse.Namespace, stage_weights: Mapping[str, Path]) -> CLCNet:
    """Create a cascade with its members' weights; the confidence net has initial values.

    Raises:
        CheckpointError: A member's weights are not to be had, or do not fit.
    """
    whole = args.pretrained or ':' in args.model
    with seeded(args.seed, 'model'):
        model: CLCNet = build_model(args, pretrained=whole)
    if args.initial_checkpoint:
        load_cascade(model, args.initial_checkpoint)
        whole = True
    absent = []
    for index, source in enumerate(member_sources(args, uses_demo_data(args), model)):
        spec: Any = model.specs[model.member_of_step.index(index)]
        if source == 'pretrained':
            if not whole:
                if spec.num_classes != model.num_classes:
                    raise ValueError(
                        f'The member {spec.label} has weights for {spec.num_classes} classes, the cascade is for '
                        f'{model.num_classes}: name weights for these with --init-members, or train it first '
                        "(--init-members scratch).")
                absent.append(index)
            continue
        if source == 'scratch':
            path = stage_weights.get(member_stage(index))
            if path is None or not path.exists():
                raise ValueError(
                    f"The weights of the cascade's member {index + 1} are not at '{path}': run the stage "
                    f"'{member_stage(index)}' first, or name weights with --init-members.")
        else:
            path = Path(source)
        filter_fn = checkpoint_filter_of(spec.model) if isinstance(spec.model, str) else None
        load_weights(model.members[index], path, filter_fn, label=f"'{path}' (of member {index + 1})")
    fetch_members(model, absent, None)
    return model


def load_cascade(model: CLCNet, source: Any, **kwargs: Any) -> None:
    """Load weights of a cascade, or of parts of it; members that are not among them have those that timm has for them.

    Args:
        model: The cascade.
        source: See `load_weights`; the authors' zip will do.
        **kwargs: For `load_weights`.

    Raises:
        CheckpointError: They do not fit, or a member's weights are not to be had.
    """
    absent: list[int] = []
    if not isinstance(source, Mapping) and Path(source).suffix == '.zip':
        kwargs.setdefault('label', f"'{source}'")
        source = read_confidence_net(source)
    load_weights(model, source, partial(checkpoint_filter_fn, absent=absent), **kwargs)
    fetch_members(model, absent, None)


# What the members say

def collect_features(
        stage: Stage,
        args: argparse.Namespace,
        accelerator: Accelerator,
        folder: Path,
        stage_weights: Mapping[str, Path],
        stop: StopRequest,
) -> dict[str, Any]:
    """Run the members once over a split, and keep what they say: see `ConfidenceFeatures`, a file for each member.

    Parts are kept on the way. A run that was killed goes on with the images that are in none.

    Raises:
        ValueError: There is no split, or its images have no order.
        Stopped: A signal came; what is done is kept.
    """
    split = feature_split(args)
    model = build_cascade(args, stage_weights).eval()
    views = eval_views(args, model)
    model = model.to(device=accelerator.device, dtype=model_dtype(args))
    data_config = training_data_config(args, model)

    def open_loader(indices: Sequence[int]) -> Any:
        return build_eval_loader(
            args, split, data_config, model.num_classes, accelerator.device, 1, samples=args.val_num_samples,
            views=views, indices=indices)

    first = open_loader([0])
    whole, labels = first.dataset.dataset, _label_names(first.class_to_idx, model.num_classes)
    if isinstance(whole, torch.utils.data.IterableDataset):
        raise ValueError(f"Features need images that can be counted; '{split}' of this dataset can only be iterated.")
    names = image_names(whole, split)
    print_ = _fingerprint(model, split, names, views, str(model_dtype(args)), accelerator.mixed_precision)
    if args.fold_dir:
        _given_folds(args.fold_dir, names)  # or its error would come when all is done
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for path in _parts(folder):
            if _read_part(path, print_) is None:
                path.unlink()
    accelerator.wait_for_everyone()
    done = {int(i) for path in _parts(folder) for i in _done(path)}
    accelerator.wait_for_everyone()  # all have seen the same parts
    left = [i for i in range(len(whole)) if i not in done]
    if done and left:
        _logger.info(f'Features of {len(done)} images are here already, {len(left)} are left.')
    mine = left[accelerator.process_index::accelerator.num_processes]
    if mine:
        _run_members(model, open_loader(mine), mine, accelerator, folder, print_, stop, f'features of {split}')
    accelerator.wait_for_everyone()
    result = {'split': split, 'images': len(whole)}
    if accelerator.is_main_process:
        parts = [part for path in _parts(folder) if (part := _read_part(path, print_)) is not None]
        order = torch.cat([part['index'] for part in parts]).argsort()
        logits = torch.cat([part['logits'] for part in parts])[order]
        target = torch.cat([part['target'] for part in parts])[order]
        for t in range(model.num_steps):
            ConfidenceFeatures.from_logits(logits[:, t], target, names).save(folder / f'member{t + 1}.safetensors')
            result[f'top1_member{t + 1}'] = round(100 * float((logits[:, t].argmax(1) == target).float().mean()), 4)
        write_json(folder / 'index.json', {
            'label_names': labels, 'split': split, 'images': len(whole), 'classes': model.num_classes,
            'members': {f'member{t + 1}.safetensors': spec.label for t, spec in enumerate(model.specs)}})
        for path in _parts(folder):
            path.unlink()
        _logger.info(f'Features of {len(whole)} images of {split}: {folder}')
    accelerator.wait_for_everyone()
    return result


def _label_names(class_to_idx: Mapping[str, int] | None, num_classes: int) -> list[str] | None:
    if class_to_idx is None or len(class_to_idx) != num_classes:
        return None
    return sorted(class_to_idx, key=lambda name: class_to_idx[name])


def feature_split(args: argparse.Namespace) -> str:
    """Split that the confidence net is trained on."""
    split = args.feature_split or args.val_split
    if not split:
        raise ValueError('A confidence net is trained on images that its members were not: name some, --feature-split.')
    return split


@torch.inference_mode()
def _run_members(
        model: CLCNet,
        loader: Any,
        indices: Sequence[int],
        accelerator: Accelerator,
        folder: Path,
        fingerprint: str,
        stop: StopRequest,
        desc: str,
) -> None:
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    begin = end = 0

    def keep() -> None:
        nonlocal begin
        path = folder / f'part-{indices[begin]:08d}-{end - begin}.safetensors'
        logits, target = (torch.cat(values).cpu().contiguous() for values in zip(*waiting))
        with atomic_write(path) as tmp:
            save_file(
                {'index': torch.tensor(indices[begin:end]), 'logits': logits, 'target': target}, tmp,
                metadata={'of': fingerprint})
        waiting.clear()
        begin = end

    for number, (views, target) in enumerate(progress_bar(loader, accelerator, desc=desc, leave=False), 1):
        with accelerator.autocast():
            logits = model.forward_all(views)['member_logits']
        waiting.append((logits.float().transpose(0, 1), target))
        end += len(target)
        if number % _BATCHES_PER_PART == 0 or end == len(indices) or stop:
            keep()
        if stop and end < len(indices):
            raise Stopped(stop.signum or signal.SIGTERM)


def _fingerprint(model: CLCNet, *what: Any) -> str:
    """What features depend on."""
    digest = hashlib.sha256(json.dumps(what, default=str).encode())
    for name, value in model.members.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob('part-*.safetensors'))


def _read_part(path: Path, fingerprint: str) -> dict[str, torch.Tensor] | None:
    """A part; None if it is of other members."""
    try:
        with safe_open(path, framework='pt') as f:
            if (f.metadata() or {}).get('of') == fingerprint:
                return {name: f.get_tensor(name) for name in ('index', 'logits', 'target')}
    except (SafetensorError, OSError):
        pass
    return None


def _done(path: Path) -> list[int]:
    with safe_open(path, framework='pt') as f:
        return f.get_tensor('index').tolist()


# The confidence net

def train_confidence(
        stage: Stage,
        args: argparse.Namespace,
        accelerator: Accelerator,
        folder: Path,
        stage_weights: Mapping[str, Path],
        stop: StopRequest,
) -> dict[str, Any]:
    """Train the confidence net on features, and export the cascade with it.

    Out of fold, each image is scored by a net that has not seen it, on the scale of the net that is exported, which has
    seen all: measures of confidence are compared by that, and the exit table that exits are fitted on is made of it.

    Raises:
        ValueError: There are no features, or they do not go together, with the folds or with the cascade.
    """
    model = build_cascade(args, stage_weights).eval()
    asked = args.confidence or model.confidence_kind
    data_config = training_data_config(args, model)
    result: dict[str, Any] = {}
    if accelerator.is_main_process:
        features = _read_features(args, stage_weights, model)
        merged = ConfidenceFeatures.merge(features)
        folder.mkdir(parents=True, exist_ok=True)
        how = dict(epochs=args.epochs, lr=args.lr, clip_grad=args.clip_grad, patience=args.patience_epochs)
        folds = _choose_folds(args, merged.names)
        fit = fit_confidence_net(merged.probabilities, merged.correct, seed=args.seed, **how)
        fits = [] if folds is None else fit_folds(merged.probabilities, merged.correct, folds, seed=args.seed, **how)
        nets = [fold.net for fold in fits]
        result = {'val_error': fit.val_error, 'test_error': fit.test_error, 'best': fit.val_error,
                  'best_epoch': fit.best_epoch}
        model.set_confidence('clcnet', net=fit.net)
        own = args.features is None  # the rows of one are those of the other members, image by image
        index = _read_index(stage_weights) if own else {}
        if own:
            result['split'] = index['split']
        if folds is not None and own:
            scores = score_folds(nets, merged.probabilities, folds)
            with torch.no_grad():
                seen = torch.cat([fit.net(part) for part in merged.probabilities.split(1024)])
            scores = match_scores(scores, seen, folds).unflatten(0, (len(features), -1))
            tables = tables_out_of_fold(model, features, scores)
            rows = compare_out_of_fold(tables)
            write_rows(folder / 'confidences.csv', rows)
            _logger.info(
                f'Measures of confidence on {len(features[0])} images, out of {len(nets)} folds (area: mean top-1 '
                f'over all budgets, exits fitted on the other half):\n{format_table(rows)}\n{advice(rows)}')
            kind, rule = _choose(asked, model.final_rule, rows)
            tables[kind, rule].save(folder / CALIBRATION)
            result['auroc'] = next(r['auroc'] for r in rows if r['confidence'] == kind)
        else:
            kind, rule = asked, model.final_rule
            (folder / CALIBRATION).unlink(missing_ok=True)
            (folder / 'confidences.csv').unlink(missing_ok=True)
            if folds is not None:
                area = auroc(score_folds(nets, merged.probabilities, folds), merged.correct)
                result['auroc_all_members'] = area
                _logger.info(f'AUROC of the answers being right, out of {len(nets)} folds: {area:.4f}')
            else:
                _logger.warning('--folds 0: no accuracy on the images that the confidence net was trained on is '
                                'cross-validated.')
        if (kind, rule) != (model.confidence_kind, model.final_rule):
            model.set_confidence(kind, rule)
        write_rows(folder / 'summary.csv', [{'epoch': i, **row} for i, row in enumerate(fit.history)])
        labels = index.get('label_names')
        save_pretrained(
            model, folder / 'last', data_config=data_config, **({'label_names': labels} if labels else {}))
        copy_pretrained(folder / 'last', folder / 'best')
        shutil.rmtree(folder / 'folds', ignore_errors=True)
        if folds is not None:
            (folder / 'folds').mkdir()
            for k, net in enumerate(nets):
                net.save(folder / 'folds' / f'fold{k + 1}.safetensors')
            FoldMap(fold_names(merged.names, folds)).save(folder / 'folds' / FOLDS_FILE)
    accelerator.wait_for_everyone()
    shared: list[Any] = [result]
    broadcast_object_list(shared)  # all processes go on from the same
    return shared[0]


def _read_index(stage_weights: Mapping[str, Path]) -> dict[str, Any]:
    """What the features of a run are of, see `collect_features`."""
    return read_json(stage_weights['features'].parent / 'index.json')


def _read_features(
        args: argparse.Namespace,
        stage_weights: Mapping[str, Path],
        model: CLCNet,
) -> list[ConfidenceFeatures]:
    if args.features:
        paths = [Path(path) for path in args.features]
    else:
        folder = stage_weights['features'].parent
        paths = [folder / f'member{t + 1}.safetensors' for t in range(model.num_steps)]
    for path in paths:
        if not path.is_file():
            advice = '' if args.features else ": run the stage 'features' first, or name files with --features"
            raise ValueError(f"There are no features at '{path}'{advice}.")
    features = [ConfidenceFeatures.load(path) for path in paths]
    for path, f in zip(paths, features):
        if f.probabilities.shape[1] != model.num_classes:
            raise ValueError(
                f"'{path}' holds probabilities of {f.probabilities.shape[1]} classes, the cascade has "
                f'{model.num_classes}.')
    return features


def _choose_folds(args: argparse.Namespace, names: Sequence[str]) -> torch.Tensor | None:
    """Fold of each row of features, those of one image in one fold; None if there are to be none."""
    if args.fold_dir:
        return _given_folds(args.fold_dir, names)
    if args.folds == 0:
        return None
    if any('/' not in name for name in names):  # the authors' files have base names
        names = [name.rpartition('/')[2] for name in names]
    numbers: dict[str, int] = {}
    image = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])
    return make_folds(len(numbers), args.folds or NUM_FOLDS, args.seed)[image]


def _given_folds(path: str, names: Sequence[str]) -> torch.Tensor:
    known = FoldMap.read(path)
    folds = known.folds_of(names)
    outside = (folds < 0).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"--fold-dir: {len(outside)} of {len(folds)} images are in no fold of '{path}', the first is "
            f"'{names[outside[0]]}'.")
    if len(folds.unique()) < known.num_folds:
        raise ValueError(f"--fold-dir: some of the {known.num_folds} folds of '{path}' have none of the images.")
    return folds


def _choose(asked: str, rule: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    best = max(rows, key=lambda row: row['area'])
    return (best['confidence'], best['final_rule']) if asked == 'all' else (asked, rule)


RUNNERS = {'features': collect_features, 'confidence': train_confidence}
