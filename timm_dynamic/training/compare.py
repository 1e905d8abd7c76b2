"""The end of a run: the best weights of every stage on the same images, and budgets for the result."""
import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..evaluation.calibration import CROSS
from ..evaluation.clock import clock_model, describe_clock
from ..evaluation.exit_report import Report, Row
from ..evaluation.model_evaluator import ModelEvaluator, OutOfFold
from ..exits import ExitTable
from ..launch.build import default_split, resolve_data, uses_demo_data
from ..launch.settings import TrainOptions, validation_options
from ..models.dynamic_net import DynamicNet
from ..task import Recipe, Stage, create_baseline
from ..task.clcnet import CALIBRATION, train_confidence
from ..utils import CheckpointError, save_exit_cfg
from ..utils.report import format_table, plot_accuracy_over_macs, write_rows

_logger = logging.getLogger(__name__)


def compare_stages(
        recipe: Recipe,
        stages: Sequence[Stage],
        options: TrainOptions,
        accelerator: Accelerator,
        folder: Path,
        weights: Mapping[str, Path],
        results: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """Evaluate the best weights of every stage, and the recipe's references, on the same images.

    The last model, if it is a dynamic one, gets budgets, which are kept in its config.json: exits are fitted on the
    validation split or, if that is the one to evaluate on, cross-fitted on its halves.

    Args:
        recipe: The recipe.
        stages: The stages that were run.
        options: Options of the run.
        accelerator: Processes, device, precision.
        folder: Folder of the run; results.csv/json and budgets.csv/json are written there.
        weights: Folder of the best weights, by stage.
        results: Results of the stages, by stage.

    Returns:
        A row for each model. That of a reference that cannot be loaded has only 'model' and 'error'.
    """
    args = options.for_stage(stages[-1], accelerator.num_processes)
    split = args.test_split or (default_split(args) if uses_demo_data(args) else args.val_split)
    if not split:
        return []
    models: list[tuple[str, Any, argparse.Namespace]] = [
        (s.label or s.name, timm.create_model(f'local-dir:{weights[s.name]}', pretrained=True),
         options.for_stage(s, accelerator.num_processes))
        for s in stages if s.shown and (weights[s.name] / 'config.json').exists()]
    if not models:
        return []
    references, rows, reports = [], [], []
    for label, source in recipe.references.items():
        try:
            model, error = create_baseline(source, models[-1][1]), ''
        except (CheckpointError, OSError, RuntimeError, ValueError) as e:
            model, error = None, (str(e) or type(e).__name__).splitlines()[0]
        error = next(filter(None, gather_object([error])), '')  # all processes leave out the same models
        if error:
            _logger.error(f'The {label} {source} is not in the table: {error}')
            rows.append({'model': label, 'error': error})
        else:
            references.append((label, model, args))
    out_of_fold = _out_of_fold(stages[-1], folder, results, args)
    for label, model, own in [*references, *models]:
        last = model is models[-1][1]
        budgets = last and isinstance(model, DynamicNet)
        evaluator = ModelEvaluator(
            model, label, validation_options(own, split, save_budgets=budgets, curve=budgets), accelerator,
            resolve_data(own, model), out_of_fold if last else None,
            fit_splits=[own.val_split, CROSS] if own.val_split else [CROSS], compared=not budgets)
        report = evaluator.run()
        rows.append(_result_row(report.row or {}, evaluator, split))
        reports.append(report)
    if accelerator.is_main_process:
        for name in ('results.csv', 'results.json'):
            write_rows(folder / name, rows)
        if isinstance(models[-1][1], DynamicNet):
            static = {label: points for report in reports for label, points in report.static.items()}
            _keep_budgets(models[-1][1], reports[-1], static, split, folder)
            if args.clock:
                _clock(models, args, split, accelerator, folder)
        elif args.clock:
            _logger.warning(f'--clock: {models[-1][0]} has no exits, so nothing was clocked.')
    accelerator.wait_for_everyone()
    return rows


def _out_of_fold(
        stage: Stage,
        folder: Path,
        results: Mapping[str, Mapping[str, Any]],
        args: argparse.Namespace,
) -> OutOfFold | None:
    """What a cascade's confidence stage left."""
    if stage.run is not train_confidence or not (folder / CALIBRATION).exists():
        return None
    return OutOfFold(ExitTable.load(folder / CALIBRATION), results[stage.name].get('split', args.val_split))


def _result_row(row: Row, evaluator: ModelEvaluator, split: str) -> Row:
    gmacs = {} if row.get('gmacs') is None else {'gmacs': row['gmacs']}
    return {
        'model': row['model'], **{k: row[k] for k in ('loss', 'top1', 'top5') if k in row},
        'split': row.get('split', split), 'images': row['images'],
        'params_m': round(evaluator.params / 1e6, 3), **gmacs}


def _keep_budgets(
        model: DynamicNet,
        report: Report,
        static: Mapping[str, Any],
        split: str,
        folder: Path,
) -> None:
    """Show and write what every step and budget gives; budgets go into the exported folder, too."""
    text = '\n\n'.join(report.text)
    if model.exit_cfg.get('budgets'):
        save_exit_cfg(folder / 'best', model.exit_cfg)
    else:
        text += (f"\n\nFor budgets, exits must be fitted on other images than '{split}': "
                 f"validate.py --model local-dir:{folder / 'best'} --budget G ... --calibrate-split NAME")
    for name in ('budgets.csv', 'budgets.json'):
        write_rows(folder / name, report.points)
    picture = folder / 'accuracy_over_macs.png'
    title = f'evaluated on {split}'
    if plot_accuracy_over_macs(picture, report.curves, report.markers, title, static, report.images):
        text += f'\n\nAccuracy over multiply-adds: {picture}'
    _logger.info('\n' + text)


def _clock(
        models: Sequence[tuple[str, Any, argparse.Namespace]],
        args: argparse.Namespace,
        split: str,
        accelerator: Accelerator,
        folder: Path,
) -> None:
    """Clock the last model and the static ones before it; show, write and keep what came out."""
    model = models[-1][1]
    static = {f'static {label}': net for label, net, _ in models if not isinstance(net, DynamicNet)}
    options = validation_options(args, split)
    clock = clock_model(options, model, static, split, resolve_data(args, model), accelerator)
    for name in ('clock.csv', 'clock.json'):
        write_rows(folder / name, clock['rows'])
    _logger.info(f"\n{describe_clock(clock)}:\n{format_table(clock['rows'])}")
    save_exit_cfg(folder / 'best', {**model.exit_cfg, 'clock': clock})
