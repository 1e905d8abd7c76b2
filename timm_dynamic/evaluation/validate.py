"""validate.py: from a command line to a table of models."""
import argparse
import copy
import glob
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from timm.models import is_model, is_model_in_modules, list_pretrained, parse_model_name
from timm.utils import check_batch_size_retry, decay_batch_step, reparameterize_model

from ..launch.accelerator import create_accelerator
from ..launch.build import build_model, default_split, resolve_data
from ..launch.options import create_validate_parser
from ..launch.script import import_modules, run_script
from ..models.builder import Family, check_model_name, load_checkpoint
from ..models.clcnet import CLCNet
from ..models.dynamic_net import DynamicNet
from ..utils import CheckpointError, save_pretrained, seeded
from ..utils.report import check_plot, format_table, plot_accuracy_over_macs, write_rows
from .calibration import Calibration
from .cascade import FoldNets
from .exit_report import Report, report_parts, report_points, report_steps, short_name, stored_rows
from .model_evaluator import ModelEvaluator, accuracy
from .requests import (
    check_model,
    check_requests,
    check_table,
    dynamic_options,
    load_table,
    needs_fit,
    only_stored,
)

_logger = logging.getLogger(__name__)

Checkpoint = str | dict[str, str]  # a file or folder, or a file for each part


def open_model(
        args: argparse.Namespace,
        checkpoint: Checkpoint,
        fold_nets: FoldNets | None = None,
        compared: bool = False,
        needs_data: bool = True,
) -> Any:
    """Create a model with its weights, and with what a checkpoint says about exits.

    Without data (`needs_data=False`), the number of classes does not depend on a data set.
    """
    kind = None if args.confidence == 'all' or compared else args.confidence
    more = {}
    if parse_model_name(args.model)[0] is None and is_model_in_modules(args.model.split('.')[0], ['clcnet']):
        more['confidence'] = 'max_prob' if fold_nets else kind  # no net is fetched that is not needed
    with seeded(args.seed, 'model'):  # a classifier that the weights do not fit has initial values
        model = build_model(args, needs_data=needs_data, pretrained=args.pretrained or not checkpoint, **more)
    if checkpoint:
        load_checkpoint(model, checkpoint, use_ema=args.use_ema)
    if isinstance(model, CLCNet) and not compared:
        if fold_nets and (more or args.confidence in ('clcnet', 'all')) and not hasattr(model, 'confidence_net'):
            model.set_confidence('clcnet', net=copy.deepcopy(fold_nets.nets[0]))
        if kind or args.final_rule:
            model.set_confidence(kind or model.confidence_kind, args.final_rule)
    return reparameterize_model(model) if args.reparam else model


def validate_model(
        args: argparse.Namespace,
        name: str,
        checkpoint: Checkpoint,
        accelerator: Accelerator,
        compared: bool = False,
) -> Report:
    """Evaluate one model.

    Args:
        args: Options of validate.py.
        name: Model name, as `timm.create_model` takes it.
        checkpoint: File or folder with its weights, or a file for each part; empty for pretrained ones.
        accelerator: Processes, device, precision.
        compared: The model is one of `--compare`: only its accuracy and cost are reported.

    Returns:
        A row of the table, with timm's column names and 'gmacs'; for dynamic models also steps, budgets and curves.
    """
    args = argparse.Namespace(**{**vars(args), 'model': name})
    fold_nets = FoldNets.read(args.fold_nets, args.fold_dir) if args.fold_nets and not compared else None
    stored = only_stored(args)
    model = open_model(args, checkpoint, fold_nets, compared, needs_data=not stored)
    if not compared:
        check_model(args, name, model)
    if stored:
        report = Report(None)
        caption = f'{short_name(name)}, results kept in the model (nothing was run):'
        report.add(name, caption, stored_rows(model, name), hide=())
        report_parts(report, name, model)
        return report
    evaluator = ModelEvaluator(
        model, name, args, accelerator, fold_nets=fold_nets, compared=compared, announce=True)
    report = evaluator.run()
    if checkpoint and report.row is not None:
        report.row['checkpoint'] = checkpoint if isinstance(checkpoint, str) else \
            ' '.join(f'{part}={file}' for part, file in checkpoint.items())
    if not compared:
        if isinstance(model, DynamicNet):
            report_parts(report, name, model)
        _save_budgets(args, evaluator.exported, evaluator.data_config, accelerator)
    return report


def _save_budgets(
        args: argparse.Namespace,
        model: Any,
        data_config: dict[str, Any] | None,
        accelerator: Accelerator,
) -> None:
    if not args.save_budgets or not accelerator.is_main_process:
        return
    save_pretrained(model, args.save_budgets, data_config)
    _logger.info(
        f"Model with {len(model.exit_cfg['budgets'])} budgets: {args.save_budgets}\n"
        f"Load it with: timm.create_model('local-dir:{args.save_budgets}', pretrained=True).set_budget(gmacs=...)")


def validate_table(args: argparse.Namespace, name: str, checkpoint: Checkpoint, accelerator: Accelerator) -> Report:
    """Evaluate exits on a table that was measured before.

    Args:
        args: Options of validate.py.
        name: Name of the model that was measured; empty if not known.
        checkpoint: File with the model's weights, or a file for each part.
        accelerator: Processes.

    Returns:
        A row for the last step, and the results for the given exits.
    """
    model = data_config = step_macs = None
    if name:
        args = argparse.Namespace(**{**vars(args), 'model': name})
        model = open_model(args, checkpoint, needs_data=False)
        check_model(args, name, model)
        step_macs = model.step_macs
        data_config = resolve_data(args, model)
    table = load_table(args, '--exit-table', step_macs)
    if not name:
        check_requests(args, table.step_macs, f"'{args.exit_table}'")
    last, label = table.anytime()[-1], name or Path(args.exit_table).stem
    report = Report({
        'model': label, **accuracy(last.top1, last.top5), 'images': len(table), 'gmacs': round(last.gmacs, 6),
        'exit_table': args.exit_table})
    args = argparse.Namespace(**{**vars(args), 'split': Path(args.exit_table).name})
    report_steps(report, label, table, args.split)
    calibration = None
    if args.calibrate_table:
        fitted = load_table(args, '--calibrate-table', step_macs)
        check_table(args.calibrate_table, fitted, table.step_macs, f"'{args.exit_table}'")
        calibration = Calibration.of_tables(fitted, table, Path(args.calibrate_table).name, args.split)
    elif needs_fit(args):
        calibration = Calibration.in_halves(table, args.split, args.seed)
    report_points(report, args, label, table, calibration, model)
    if model is not None:
        report_parts(report, name, model)
    _save_budgets(args, model, data_config, accelerator)
    return report


def _with_retry(
        args: argparse.Namespace,
        name: str,
        checkpoint: Checkpoint,
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


def _is_folder(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint, str) and bool(checkpoint) and Path(checkpoint).is_dir()


def _jobs(args: argparse.Namespace) -> Iterator[tuple[str, Checkpoint]]:
    """Model names and checkpoints to evaluate."""
    name, checkpoint = args.model, args.checkpoint
    in_parts = Family.of(name).is_checkpoint_folder
    if _is_folder(checkpoint) and not (in_parts and in_parts(Path(checkpoint))):
        folders = sorted(p.parent for p in Path(checkpoint).glob('**/config.json'))
        files = sorted(f for s in ('*.pth.tar', '*.pth', '*.safetensors') for f in glob.glob(f'{checkpoint}/{s}'))
        if not folders and not files:
            raise CheckpointError(f"--checkpoint: there are no weights in '{checkpoint}'.")
        if folders:
            yield from ((f'local-dir:{folder}', '') for folder in folders)
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
                check_model_name(name)
            yield from ((n, '') for n in names)
    elif name:
        yield name, ''


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = create_validate_parser()
    args = parser.parse_args(argv)
    args.split = args.split or default_split(args)
    if not args.model and not _is_folder(args.checkpoint) and not args.exit_table:
        parser.error('--model is needed (a name, local-dir:FOLDER, a wildcard, all, or a text file of names).')
    if args.exit_table:
        others = ('save_exit_table', 'save_predictions', 'save_features', 'confidence', 'final_rule', 'fold_nets')
        for option in ('calibrate_split', 'calibrate_samples', 'calibrate_augment', *others):
            if getattr(args, option):
                parser.error(
                    f"--exit-table evaluates what was measured before and runs no model: --{option.replace('_', '-')} "
                    'has no effect with it. Exits are fitted on --calibrate-table, or on one half of the table.')
        if not args.model and (args.stored_results or args.stored_thresholds or args.save_budgets):
            parser.error(
                '--stored-results, --stored-thresholds and --save-budgets need --model if --exit-table is given.')
    several = len(args.thresholds or ()) + len(args.budget or ()) > 1 or (args.save_budgets and not args.budget)
    if args.save_predictions and (several or args.geometric or args.stored_thresholds or args.threshold_sweep):
        parser.error(
            '--save-predictions writes one prediction per image: give one list of --thresholds or one --budget with '
            'it, not several.')
    if args.fold_dir and not args.fold_nets:
        parser.error('--fold-dir needs --fold-nets: it says which images each net has not seen.')
    if args.save_features and Path(args.save_features).suffix not in ('.safetensors', '.csv'):
        parser.error(f"--save-features: expected a file that ends in .safetensors or .csv, got '{args.save_features}'.")
    if args.strict and not (args.thresholds or args.threshold_sweep):
        parser.error(
            '--strict needs --thresholds or --threshold-sweep: it says how confidences are compared with them.')
    for option in ('steps', 'anchor_gmacs'):
        if getattr(args, option) is not None and not (args.exit_table or args.calibrate_table):
            parser.error(
                f"--{option.replace('_', '-')} says how to read a table: give one with --exit-table or "
                '--calibrate-table.')
    if args.anchor_gmacs is not None and not 0 <= args.anchor_gmacs < float('inf'):
        parser.error(f'--anchor-gmacs: expected a cost, got {args.anchor_gmacs:g}.')
    if args.calibrate_table and (args.calibrate_split or args.calibrate_samples or args.calibrate_augment):
        parser.error('--calibrate-table and the other --calibrate options both say what to fit on: choose one.')
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
        One row a model, in the order in which they were evaluated; then the rows of dynamic models' steps, budgets
        and so on, which have a 'point'.
    """
    args = _parse(argv)
    import_modules(args.device_modules)
    if args.curve:
        check_plot(args.curve, '--curve')
    accelerator = create_accelerator(args)
    if not accelerator.is_main_process:
        logging.getLogger('timm_dynamic').setLevel(logging.WARNING)
    reports: list[Report] = []
    jobs = list(_jobs(args)) if args.model or args.checkpoint else [('', '')]
    one_model = ('exit_table', 'save_exit_table', 'save_budgets', 'save_predictions', 'save_features')
    if len(jobs) > 1 and any(getattr(args, option) for option in one_model):
        raise ValueError(
            '--exit-table, --save-exit-table, --save-budgets, --save-predictions and --save-features are for one '
            f"model, found {len(jobs)}: {', '.join(name for name, _ in jobs[:3])}, ...")
    for i, (name, checkpoint) in enumerate(jobs + [(name, '') for name in args.compare]):
        compared = i >= len(jobs)
        try:
            if args.exit_table and not compared:
                reports.append(validate_table(args, name, checkpoint, accelerator))
            else:
                reports.append(_with_retry(args, name, checkpoint, accelerator, compared))
        except (CheckpointError, RuntimeError, OSError, ValueError) as e:
            # Errors of the first model may be about the options or the data, which are those of all models.
            about_model = i > 0 or isinstance(e, (CheckpointError, RuntimeError))
            if len(jobs) + len(args.compare) == 1 or not about_model or accelerator.num_processes > 1:
                if reports and accelerator.is_main_process:
                    _logger.error(f'{name} failed. Results of the models before it:')
                    _show(reports, args)
                raise
            reason = (str(e) or type(e).__name__).splitlines()[0]
            _logger.error(f'{name} failed: {reason}')
            reports.append(Report({'model': name, 'error': reason}))  # the others' results are not lost
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
        static = {label: curve for r in reports for label, curve in r.static.items()}
        images = {r.images for r in reports if r.images is not None}
        plot_accuracy_over_macs(
            args.curve, curves, markers, f'evaluated on {args.exit_table or args.split}', static,
            images.pop() if len(images) == 1 else None)
        _logger.info(f'Accuracy over multiply-adds: {args.curve}')


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of validate.py.

    Returns:
        Exit status: 0; 1 for an error that the user can act on, or if a model failed.
    """
    def script() -> int:
        return int(any('error' in row for row in run_validation(argv)))

    return run_script(script)
