"""Whole validations: from a command line to a table of models."""
import argparse
import copy
import glob
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import RealLabelsImagenet, resolve_data_config
from timm.layers import apply_test_time_pool
from timm.models import is_model, is_model_in_modules, list_pretrained, model_entrypoint, parse_model_name
from timm.task import evaluation_sample_limit
from timm.utils import check_batch_size_retry, decay_batch_step, reparameterize_model
from torch import nn

from ..exits import ExitTable
from ..exits.engine import interleave
from ..launch.accelerator import create_accelerator
from ..launch.build import build_eval_loader, build_model, eval_views, model_dtype, uses_demo_data
from ..launch.options import create_validate_parser
from ..models.anchornet import AnchorNetPatch, is_anchornet_folder, read_anchornet_checkpoint
from ..models.builder import checkpoint_filter_of
from ..models.clcnet import CONFIDENCES, CLCNet
from ..models.dynamic_net import DynamicNet
from ..utils import CheckpointError, load_weights, read_checkpoint, save_pretrained, seeded
from ..utils.report import check_plot, format_table, plot_accuracy_over_macs, write_rows
from .anytime import count_macs, evaluate_dynamic
from .budgets import (
    Calibration,
    Report,
    calibrate_on,
    check_requests,
    check_stored,
    check_table,
    chosen_steps,
    dynamic_options,
    load_table,
    needs_fit,
    only_stored,
    open_calibration_loader,
    report_points,
    report_steps,
    short_name,
    split_in_halves,
    stored_rows,
    take_samples,
)
from .cascade import load_cascade
from .confidences import FoldNets, MemberRecorder, Replayed, advice, compare_confidences, image_names, replay_members
from .evaluate import evaluate
from .run import run_script

_logger = logging.getLogger(__name__)


class _Predictions:
    """The best five classes of every sample over all processes, in the order of the dataset if it has one."""

    def __init__(self, limit: int | None, accelerator: Accelerator) -> None:
        self.limit, self.accelerator = limit, accelerator
        self.top5: list[torch.Tensor] = []
        self.target: list[torch.Tensor] = []
        self.answers: list[torch.Tensor] = []

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.top5.append(output.topk(min(5, output.shape[1]), dim=1).indices)
        self.target.append(target)

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather [N, 5] classes and [N] targets."""
        return self._gather(self.top5), self._gather(self.target)

    def gather_answers(self) -> torch.Tensor:
        """Gather the classes after each step of a dynamic model [N, T]."""
        return self._gather(self.answers)

    def _gather(self, batches: list[torch.Tensor]) -> torch.Tensor:
        share = torch.cat(batches)[:self.limit]
        if self.accelerator.num_processes == 1:
            return share
        join = torch.cat if self.limit is None else interleave  # as `collect_exit_table`
        return join(tuple(gather_object([share.cpu()])))


# What a cascade's answers are not known for if they are made of what its members said.
_NOT_REPLAYED = (
    'calibrate_table', 'valid_labels', 'real_labels', 'metrics_avg', 'stored_results', 'stored_thresholds')


def _restricted(model: nn.Module, valid_labels: list[int] | None) -> Any:
    if valid_labels is None:
        return model
    index = torch.tensor(valid_labels)

    def restricted(x: torch.Tensor) -> torch.Tensor:
        return model(x)[:, index.to(x.device)]

    return restricted


def _open_model(
        args: argparse.Namespace,
        checkpoint: str,
        fold_nets: FoldNets | None = None,
        compared: bool = False,
) -> Any:
    """Create a model with its weights, and with what a checkpoint says about exits."""
    kind = None if args.confidence == 'all' or compared else args.confidence
    more = {}
    if parse_model_name(args.model)[0] is None and is_model_in_modules(args.model.split('.')[0], ['clcnet']):
        more['confidence'] = 'max_prob' if fold_nets else kind  # no net is fetched that is not needed
    with seeded(args.seed, 'model'):  # a classifier that the weights do not fit has initial values
        model = build_model(args, pretrained=args.pretrained or not checkpoint, **more)
    if checkpoint and isinstance(model, CLCNet):
        load_cascade(model, checkpoint, use_ema=args.use_ema)
    elif checkpoint:
        architecture = model.pretrained_cfg['architecture']
        family = sys.modules[model_entrypoint(architecture).__module__]
        exit_cfg_fn = getattr(family, 'exit_cfg_from_checkpoint', None)
        source = read_checkpoint(checkpoint) if exit_cfg_fn else None
        exit_cfg = exit_cfg_fn(source) if exit_cfg_fn and isinstance(source, Mapping) else {}
        weights: Any = source if exit_cfg else checkpoint
        if isinstance(model, AnchorNetPatch) and Path(checkpoint).is_dir():
            weights = read_anchornet_checkpoint(checkpoint, args.use_ema)
        load_weights(
            model, weights, checkpoint_filter_of(architecture), use_ema=args.use_ema, label=f"'{checkpoint}'")
        if exit_cfg:
            model.load_exit_cfg(exit_cfg)
    if isinstance(model, CLCNet) and not compared:
        if fold_nets and (more or args.confidence in ('clcnet', 'all')) and not hasattr(model, 'confidence_net'):
            model.set_confidence('clcnet', net=copy.deepcopy(fold_nets.nets[0]))
        if kind or args.final_rule:
            model.set_confidence(kind or model.confidence_kind, args.final_rule)
    if args.reparam:
        model = reparameterize_model(model)
    return model


def validate_model(
        args: argparse.Namespace,
        name: str,
        checkpoint: str,
        accelerator: Accelerator,
        compared: bool = False,
) -> Report:
    """Evaluate one model.

    Args:
        args: Options of validate.py.
        name: Model name, as `timm.create_model` takes it.
        checkpoint: File with its weights; empty for pretrained ones.
        accelerator: Processes, device, precision.
        compared: It is one of --compare: budgets and the like are not asked of it.

    Returns:
        A row of the table, with timm's column names and 'gmacs'; for dynamic models also all that is asked of them.
    """
    args = argparse.Namespace(**{**vars(args), 'model': name})
    fold_nets = FoldNets.read(args.fold_nets, args.fold_dir) if args.fold_nets and not compared else None
    model = _open_model(args, checkpoint, fold_nets, compared)
    dynamic = isinstance(model, DynamicNet)
    if not compared:
        _check_dynamic(args, name, model)
        if only_stored(args):
            report = Report(None)
            caption = f'{short_name(name)}, results kept in the model (nothing was run):'
            report.add(name, caption, stored_rows(model, name), hide=())
            return report
    num_classes = model.num_classes
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    pooled = False
    if args.test_pool and not dynamic:
        model, pooled = apply_test_time_pool(model, data_config)
    params = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, data_config['input_size'])
    exported = model
    model = model.eval().to(device=accelerator.device, dtype=model_dtype(args))
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.torchcompile:
        compile_args: dict[str, Any] = dict(backend=args.torchcompile, mode=args.torchcompile_mode)
        if dynamic:
            model.step = torch.compile(model.step, **compile_args)
        else:
            model = torch.compile(model, **compile_args)

    valid_labels = None
    if args.valid_labels:
        valid_labels = [int(line) for line in Path(args.valid_labels).read_text(encoding='utf-8').split()]
        num_classes = max(len(valid_labels), 1)
    if pooled:
        data_config['crop_pct'] = 1.0

    def open_loader(split: str, samples: int | None) -> Any:
        return build_eval_loader(
            args, split, data_config, num_classes, accelerator.device, accelerator.num_processes, samples=samples,
            views=eval_views(args, exported), crop_border_pixels=args.crop_border_pixels,
            tf_preprocessing=args.tf_preprocessing)

    loader = open_loader(args.split, args.num_samples)
    how: dict[str, Any] = dict(channels_last=args.channels_last, log_freq=args.log_freq, dtype=model_dtype(args))
    predictions = _Predictions(evaluation_sample_limit(loader), accelerator)
    on_batch = predictions.add if args.real_labels or args.metrics_avg or args.save_predictions else None
    recorder, folds = None, []
    if (args.confidence == 'all' or fold_nets) and isinstance(model, CLCNet) and not compared:
        recorder = MemberRecorder(model, evaluation_sample_limit(loader), accelerator)
        if fold_nets:  # before hours are spent
            if isinstance(loader.dataset, torch.utils.data.IterableDataset):
                raise ValueError("--fold-nets needs images that can be counted; this dataset can only be iterated.")
            folds.append(fold_nets.folds_of(image_names(loader.dataset, args.split), some=True))
    if dynamic:
        classes = None if valid_labels is None else torch.tensor(valid_labels)
        fit_on, fit_loader = '', None
        if not compared and needs_fit(args) and not args.calibrate_table:  # before hours are spent
            fit_on, fit_loader = open_calibration_loader(
                args, loader, lambda split: open_loader(split, args.calibrate_samples))
            if fold_nets and fit_loader is not None:
                folds.append(fold_nets.folds_of(image_names(fit_loader.dataset, fit_on)))
        metrics, table = evaluate_dynamic(
            model, loader, accelerator, desc=name, classes=classes, on_batch=_all_of(recorder, on_batch),
            on_answers=predictions.answers.append if args.save_predictions else None, **how)
    else:
        metrics = evaluate(_restricted(model, valid_labels), loader, accelerator, desc=name, on_batch=on_batch, **how)

    if args.real_labels:
        dataset = loader.dataset
        real = RealLabelsImagenet(dataset.filenames(basename=True), real_json=args.real_labels)
        top5, _ = predictions.gather()
        ranks = torch.arange(top5.shape[1], 0, -1, dtype=torch.float32, device=top5.device)
        for part in top5.split(1024):  # scores that rank the classes as the model did
            scores = torch.zeros(len(part), 1000, device=part.device)
            real.add_result(scores.scatter_(1, part, ranks.expand(len(part), -1)))
        metrics['top1'], metrics['top5'] = real.get_accuracy(k=1), real.get_accuracy(k=5)
    gmacs = metrics.get('gmacs', None if macs is None else macs / 1e9)
    row = {
        'model': name, **_accuracy(metrics['top1'], metrics['top5']), 'loss': round(metrics['loss'], 5),
        'images': metrics['count'], 'gmacs': gmacs and round(gmacs, 6), 'param_count': round(params / 1e6, 2),
        'img_size': data_config['input_size'][-1], 'crop_pct': data_config['crop_pct'],
        'interpolation': data_config['interpolation'],
    }
    if checkpoint:
        row['checkpoint'] = checkpoint
    if args.metrics_avg:
        from sklearn.metrics import precision_recall_fscore_support
        top5, target = predictions.gather()
        precision, recall, f1, _ = precision_recall_fscore_support(
            target.cpu().numpy(), top5[:, 0].cpu().numpy(), average=args.metrics_avg, zero_division=0)
        row.update(precision=round(100 * precision, 4), recall=round(100 * recall, 4), f1_score=round(100 * f1, 4))
    report = Report(row)
    if not dynamic:
        if gmacs:
            report.markers[short_name(name)] = [(gmacs, row['top1'])]
        return report

    compared_tables = answers = None
    if recorder is not None:
        said = recorder.finish()
        if args.calibrate_samples and fit_loader is not None:
            take_samples(
                fit_loader, args.calibrate_samples, args.seed, accelerator.process_index, accelerator.num_processes)
        said_to_fit = None
        if fit_loader is not None:
            fit_recorder = MemberRecorder(model, evaluation_sample_limit(fit_loader), accelerator)
            evaluate_dynamic(
                model, fit_loader, accelerator, desc=f'{name}: {fit_on}', on_batch=_all_of(fit_recorder), **how)
            said_to_fit = fit_recorder.finish()
        (table, answers), compared_tables = _replay(
            report, args, name, model, said, said_to_fit, fit_on, fold_nets, folds)
        last = table.anytime()[-1]
        row.update(**_accuracy(last.top1, last.top5), gmacs=round(last.gmacs, 6))
        row.pop('loss')  # that of another answer
        if fold_nets:
            row['cross_validated'] = bool((folds[0] >= 0).all())
    report_steps(report, name, table, args.split, ", by the dataset's own labels" if args.real_labels else '')
    if compared:
        return report
    if getattr(exported, 'confidence_kind', '') == 'clcnet' and not fold_nets:
        _logger.info(
            f'{short_name(name)} on {args.split}: not cross-validated; this holds only if the confidence net has not '
            'seen these images (else: --fold-nets).')
    if accelerator.is_main_process and args.save_exit_table:
        _save_table(table, args.save_exit_table, exported)
    calibration = compared_tables
    if calibration is not None:
        pass
    elif args.calibrate_table:
        fit = load_table(args, '--calibrate-table', exported.step_macs)
        calibration = calibrate_on(fit, table, args.calibrate_table, args.split)
    elif fit_loader is not None:
        if args.calibrate_samples:
            take_samples(
                fit_loader, args.calibrate_samples, args.seed, accelerator.process_index, accelerator.num_processes)
        _, fit = evaluate_dynamic(model, fit_loader, accelerator, desc=f'{name}: {fit_on}', classes=classes, **how)
        calibration = calibrate_on(fit, table, fit_on, args.split)
    elif fit_on:
        calibration = split_in_halves(table, args.split, args.seed)
    if args.save_predictions:
        answers = predictions.gather_answers() if answers is None else answers
        _, target = predictions.gather()
        if accelerator.is_main_process:
            names = image_names(loader.dataset, args.split)
            _save_predictions(args, answers, target, table, calibration, exported, names)
    _finish(report, args, name, table, args.split, calibration, exported, data_config, accelerator)
    return report


def _all_of(recorder: MemberRecorder | None, on_batch: Any = None) -> Any:
    if recorder is None:
        return on_batch

    def both(output: torch.Tensor, target: torch.Tensor) -> None:
        recorder.add(output, target)
        if on_batch is not None:
            on_batch(output, target)

    return both


def _replay(
        report: Report,
        args: argparse.Namespace,
        name: str,
        model: CLCNet,
        said: tuple[torch.Tensor, torch.Tensor],
        said_to_fit: tuple[torch.Tensor, torch.Tensor] | None,
        fit_on: str,
        fold_nets: FoldNets | None,
        folds: Sequence[torch.Tensor],
) -> tuple[Replayed, Calibration | None]:
    """See what a cascade does with the nets of a cross-validation, or with the confidence that suits it best.

    Returns:
        What it does, and with `--confidence all` the tables to fit and to judge budgets on.
    """
    logits, target = said
    kinds = CONFIDENCES if args.confidence == 'all' else (model.confidence_kind,)
    judged = replay_members(model, logits, target, fold_nets, folds[0] if folds else None, kinds)
    fitted = None
    if said_to_fit is not None:
        fitted = replay_members(model, *said_to_fit, fold_nets, folds[1] if folds else None, kinds)
    if fold_nets:
        for split, of in zip((args.split, fit_on), folds):
            _logger.info(f'{short_name(name)} on {split}: {fold_nets.note(of)}')
    macs = model.step_macs_of('max_prob')
    members = [{
        'member': spec.label, 'img_size': size, 'gmacs': round((b - a) / 1e9, 6),
        'top1': round(100 * float((logits[:, t].argmax(dim=1) == target).float().mean()), 4),
    } for t, (spec, size, a, b) in enumerate(zip(model.specs, model.view_sizes, (0, *macs), macs))]
    report.add(name, f'{short_name(name)} on {args.split}, each member alone:', members)
    key = model.confidence_kind, model.final_rule
    if args.confidence != 'all':
        if fitted is None:
            return judged[key], None
        return judged[key], calibrate_on(fitted[key].table, judged[key].table, fit_on, args.split)
    judge = {key: replayed.table for key, replayed in judged.items()}
    note, judged_rows = '', None
    if fitted is not None:
        fit = {key: replayed.table for key, replayed in fitted.items()}
        where = fit_on, args.split
        note = calibrate_on(fit[key], judge[key], *where).note
    else:
        parts = judge[key].split_indices(0.5, args.seed)
        fit, judge = [{key: table.subset(part) for key, table in judge.items()} for part in parts]
        judged_rows = parts[1]
        where = f'a random half of {args.split}', f'the other half of {args.split}'
    rows = compare_confidences(fit, judge)
    best = max(rows, key=lambda row: row['fit_area'])
    report.add(
        name, f'{short_name(name)}, confidences (fitted on {where[0]}, judged on {where[1]}; area: mean top-1 over all '
        f'budgets):\n{advice(rows)} Taken, by what is best on {where[0]} alone: {best["confidence"]}, '
        f'{best["final_rule"]}.', rows)
    if key != (best['confidence'], best['final_rule']):
        key = best['confidence'], best['final_rule']
        model.set_confidence(*key)
    return judged[key], Calibration(fit[key], judge[key], *where, note, judged_rows)


def _save_predictions(
        args: argparse.Namespace,
        answers: torch.Tensor,
        target: torch.Tensor,
        table: ExitTable,
        calibration: Calibration | None,
        model: DynamicNet,
        names: Sequence[str],
) -> None:
    """Write a row an image, as the exits that are asked for answer: by one of `answers` [N, T]."""
    images, steps = chosen_steps(args, table, calibration, model)
    columns = (
        [names[i] for i in images.tolist()], answers.cpu()[images, steps - 1].tolist(), target.cpu()[images].tolist(),
        steps.tolist(), table.confidence[images, steps - 1].tolist())
    write_rows(args.save_predictions, [
        dict(zip(('file', 'prediction', 'truth', 'steps_used', 'confidence'), row)) for row in zip(*columns)], 'csv')
    judged_on = calibration.judged_on if args.budget and calibration is not None else args.split
    _logger.info(f'Answer to every image of {judged_on} ({len(images)}): {args.save_predictions}')


def _accuracy(top1: float, top5: float | None) -> dict[str, float]:
    row = {'top1': round(top1, 4), 'top1_err': round(100 - top1, 4)}
    return row if top5 is None else {**row, 'top5': round(top5, 4), 'top5_err': round(100 - top5, 4)}


def _check_dynamic(args: argparse.Namespace, name: str, model: Any) -> None:
    """See that a model and what is asked of it fit each other."""
    given = dynamic_options(args)
    if (args.confidence or args.final_rule or args.fold_nets) and not isinstance(model, CLCNet):
        raise ValueError(f"--confidence, --final-rule and --fold-nets are for cascades; '{name}' is none.")
    asked = '--confidence all' if args.confidence == 'all' else '--fold-nets' if args.fold_nets else ''
    given_too = [f"--{name.replace('_', '-')}" for name in _NOT_REPLAYED if asked and getattr(args, name)]
    if given_too:
        raise ValueError(
            f'{asked} judges what the members say of images and their labels: it does not go with '
            f"{' and '.join(given_too)}.")
    if args.fold_nets and model.confidence_kind != 'clcnet' and args.confidence != 'all':
        raise ValueError(
            f"--fold-nets are confidence nets, the cascade's confidence is '{model.confidence_kind}': ask for "
            '--confidence clcnet or all.')
    if args.fold_nets and args.save_budgets:
        raise ValueError(
            "--fold-nets does not go with --save-budgets: budgets kept in a model are for the model's own net. "
            'train.py solves them out of fold; or fit them on images that this net has not seen.')
    if args.fold_nets and args.calibrate_samples:
        raise ValueError('--fold-nets does not go with --calibrate-samples: the folds of random images are not known.')
    if args.confidence == 'all' and args.final_rule:
        raise ValueError('--confidence all also chooses the final rule: leave out --final-rule.')
    if not isinstance(model, DynamicNet):
        if given:
            raise ValueError(
                f"{', '.join(given)}: '{name}' ({type(model).__name__}) makes one prediction and cannot stop before. "
                'Expected a dynamic model, e.g. a GFNet; static ones stand beside it with --compare.')
        return
    if args.test_pool:
        raise ValueError(f"--test-pool changes how a static model pools; '{name}' is a dynamic one.")
    if args.save_budgets and args.reparam:
        raise ValueError('--save-budgets does not go with --reparam: what it exports could not be loaded.')
    check_requests(args, model.step_macs, f"'{name}'")
    if args.stored_thresholds:
        check_stored(model, name)
    if args.stored_results:
        stored_rows(model, name)
    for option, path in (('--exit-table', args.exit_table), ('--calibrate-table', args.calibrate_table)):
        if path:
            check_table(path, load_table(args, option, model.step_macs), model.step_macs, f"'{name}'")


def _save_table(table: ExitTable, path: str, model: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == '.pth':
        table.save_anchornet(path, getattr(model, 'setup_name', model.pretrained_cfg['architecture']))
    else:
        table.save(path)
    _logger.info(f'Exit table: {path}')


def _finish(
        report: Report,
        args: argparse.Namespace,
        name: str,
        table: ExitTable,
        split: str,
        calibration: Calibration | None,
        model: Any,
        data_config: dict[str, Any] | None,
        accelerator: Accelerator,
) -> None:
    """Add what is asked for to a report; export the budgets."""
    report_points(report, args, name, table, split, calibration, model)
    if args.save_budgets and accelerator.is_main_process:
        save_pretrained(model, args.save_budgets, data_config)
        _logger.info(
            f"Model with {len(model.exit_cfg['budgets'])} budgets: {args.save_budgets}\n"
            f"Load it with: timm.create_model('local-dir:{args.save_budgets}', pretrained=True).set_budget(gmacs=...)")


def validate_table(args: argparse.Namespace, name: str, checkpoint: str, accelerator: Accelerator) -> Report:
    """Judge exits on a table that was measured before.

    Args:
        args: Options of validate.py.
        name: Name of the model that it is of; empty if nobody says.
        checkpoint: File with its weights.
        accelerator: Processes.

    Returns:
        A row with what the last step gives, and all that is asked for.
    """
    model = data_config = step_macs = None
    if name:
        args = argparse.Namespace(**{**vars(args), 'model': name})
        model = _open_model(args, checkpoint)
        _check_dynamic(args, name, model)
        step_macs = model.step_macs
        data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    table = load_table(args, '--exit-table', step_macs)
    if not name:
        check_requests(args, table.step_macs, f"'{args.exit_table}'")
    last = table.anytime()[-1]
    label = name or Path(args.exit_table).stem
    report = Report({
        'model': label, **_accuracy(last.top1, last.top5), 'images': len(table), 'gmacs': round(last.gmacs, 6),
        'exit_table': args.exit_table})
    split = Path(args.exit_table).name
    report_steps(report, label, table, split)
    calibration = None
    if args.calibrate_table:
        fit = load_table(args, '--calibrate-table', step_macs)
        check_table(args.calibrate_table, fit, table.step_macs, f"'{args.exit_table}'")
        calibration = calibrate_on(fit, table, Path(args.calibrate_table).name, split)
    elif needs_fit(args):
        calibration = split_in_halves(table, split, args.seed)
    _finish(report, args, label, table, split, calibration, model, data_config, accelerator)
    return report


def _with_retry(
        args: argparse.Namespace,
        name: str,
        checkpoint: str,
        accelerator: Accelerator,
        compared: bool,
) -> Report:
    batch_size = args.batch_size
    while True:
        try:
            smaller = argparse.Namespace(**{**vars(args), 'batch_size': batch_size})
            return validate_model(smaller, name, checkpoint, accelerator, compared)
        except RuntimeError as e:
            if not args.retry or accelerator.num_processes > 1 or batch_size <= 1 or not check_batch_size_retry(str(e)):
                raise
            batch_size = decay_batch_step(batch_size)
            _logger.warning(f'{name}: {str(e).splitlines()[0]} - trying again with batch size {batch_size}.')


def _jobs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Model names and checkpoint files to evaluate."""
    name, checkpoint = args.model, args.checkpoint
    if checkpoint and Path(checkpoint).is_dir():
        folders = sorted(p.parent for p in Path(checkpoint).glob('**/config.json'))
        files = sorted(f for s in ('*.pth.tar', '*.pth', '*.safetensors') for f in glob.glob(f'{checkpoint}/{s}'))
        if not folders and not files:
            raise CheckpointError(f"--checkpoint: there are no weights in '{checkpoint}'.")
        if folders:
            yield from ((f'local-dir:{folder}', '') for folder in folders)
        elif is_model_in_modules(name.split('.')[0], ['anchornet']) and is_anchornet_folder(checkpoint):
            yield name, checkpoint  # three files of one model
        else:
            yield from ((name, file) for file in files)
    elif checkpoint:
        yield name, checkpoint
    elif name == 'all':
        # The pretrained ones whose images are of ordinary size, as timm does
        skip = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae']
        yield from ((n, '') for n in list_pretrained('*', exclude_filters=skip))
    elif name and not name.startswith(('local-dir:', 'hf-hub:')) and not is_model(name.split('.')[0]):
        if Path(name).is_file():
            yield from ((line, '') for line in Path(name).read_text(encoding='utf-8').split())
        else:
            names = list_pretrained(name) if '*' in name else []
            if not names:
                build_model(argparse.Namespace(**{**vars(args), 'model': name}))  # its error names the nearest
            yield from ((n, '') for n in names)
    elif name:
        yield name, ''


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = create_validate_parser()
    args = parser.parse_args(argv)
    many = bool(args.checkpoint) and Path(args.checkpoint).is_dir()
    if not args.model and not many and not args.exit_table:
        parser.error('--model is needed (a name, local-dir:FOLDER, a wildcard, all, or a text file of names).')
    if args.exit_table:
        others = ('save_exit_table', 'save_predictions', 'confidence', 'final_rule', 'fold_nets')
        for option in ('calibrate_split', 'calibrate_samples', *others):
            if getattr(args, option):
                parser.error(
                    f"--exit-table judges what was measured before and runs no model: --{option.replace('_', '-')} has "
                    'no meaning beside it. Exits are fitted on --calibrate-table, or on one half of the table.')
        if not args.model and (args.stored_results or args.stored_thresholds or args.save_budgets):
            parser.error('--stored-results, --stored-thresholds and --save-budgets need --model beside --exit-table.')
    if args.fold_dir and not args.fold_nets:
        parser.error('--fold-dir says which images each of --fold-nets has not seen: give some.')
    several = len(args.thresholds or ()) + len(args.budget or ()) > 1 or (args.save_budgets and not args.budget)
    if args.save_predictions and (several or args.geometric or args.stored_thresholds):
        parser.error(
            '--save-predictions writes one answer to an image: beside it, ask for one list of --thresholds or for one '
            '--budget, not for several exits.')
    if args.strict and not args.thresholds:
        parser.error('--strict says how to compare with --thresholds: give some.')
    for option in ('steps', 'anchor_gmacs'):
        if getattr(args, option) is not None and not (args.exit_table or args.calibrate_table):
            parser.error(
                f"--{option.replace('_', '-')} says how to read a table: give one with --exit-table or "
                '--calibrate-table.')
    if args.anchor_gmacs is not None and not 0 <= args.anchor_gmacs < float('inf'):
        parser.error(f'--anchor-gmacs: expected a cost, got {args.anchor_gmacs:g}.')
    if args.calibrate_table and (args.calibrate_split or args.calibrate_samples):
        parser.error('--calibrate-table and --calibrate-split both say what to fit on: choose one.')
    if args.calibrate_samples is not None and args.calibrate_samples < 1:
        parser.error(f'--calibrate-samples: expected at least 1, got {args.calibrate_samples}.')
    fitting = [option for option in dynamic_options(args) if option.startswith('--calibrate-')]
    if fitting and not needs_fit(args):
        parser.error(
            f'{fitting[0]} says what exits are fitted on: ask for some with --budget, --geometric, --curve or '
            '--save-budgets.')
    return args


def run_validation(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run validate.py.

    Args:
        argv: Command line without the script's name (default: this process's).

    Returns:
        One row a model, in the order in which they were evaluated; after them those of dynamic models' steps, budgets
        and so on, which have a 'point'.
    """
    args = _parse(argv)
    if args.curve:
        check_plot(args.curve, '--curve')
    accelerator = create_accelerator(args)
    if accelerator.is_main_process and uses_demo_data(args) and not args.exit_table and not only_stored(args):
        _logger.info('No data given: the embedded demo set cluttered_digits is used.')
    if not accelerator.is_main_process:
        logging.getLogger('timm_dynamic').setLevel(logging.WARNING)
    reports: list[Report] = []
    jobs = list(_jobs(args)) if args.model or args.checkpoint else [('', '')]
    if len(jobs) > 1 and (args.save_exit_table or args.save_budgets or args.save_predictions or args.exit_table):
        raise ValueError(
            '--exit-table, --save-exit-table, --save-budgets and --save-predictions are for one model, found '
            f"{len(jobs)}: {', '.join(name for name, _ in jobs[:3])}, ...")
    for i, (name, checkpoint) in enumerate(jobs + [(name, '') for name in args.compare]):
        compared = i >= len(jobs)
        try:
            if args.exit_table and not compared:
                reports.append(validate_table(args, name, checkpoint, accelerator))
            else:
                reports.append(_with_retry(args, name, checkpoint, accelerator, compared))
        except (CheckpointError, RuntimeError) as e:
            if len(jobs) + len(args.compare) == 1 or accelerator.num_processes > 1:
                raise
            reports.append(Report({'model': name, 'error': str(e).splitlines()[0]}))  # the others' results are not lost
        if accelerator.is_main_process and args.results_file:  # after every model: a long list may be interrupted
            write_rows(args.results_file, _rows(reports), args.results_format)
    if accelerator.is_main_process:
        _show(reports, args)
    accelerator.end_training()
    return _rows(reports)


def _rows(reports: Sequence[Report]) -> list[dict[str, Any]]:
    return [r.row for r in reports if r.row is not None] + [row for r in reports for row in r.points]


def _show(reports: Sequence[Report], args: argparse.Namespace) -> None:
    rows = [r.row for r in reports if r.row is not None]
    tables = [text for r in reports for text in r.text] + ([format_table(rows)] if rows else [])
    _logger.info('\n' + '\n\n'.join(tables))
    if args.curve:
        curves = {label: curve for r in reports for label, curve in r.curves.items()}
        markers = {label: curve for r in reports for label, curve in r.markers.items()}
        plot_accuracy_over_macs(args.curve, curves, markers, f'judged on {args.exit_table or args.split}')
        _logger.info(f'Accuracy over multiply-adds: {args.curve}')


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of validate.py.

    Returns:
        Exit status: 0; 1 for what the user can mend, or if a model failed.
    """
    def script() -> int:
        return int(any('error' in row for row in run_validation(argv)))

    return run_script(script)
