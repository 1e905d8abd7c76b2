"""Whole runs: from a command line to trained, validated and compared weights."""
import argparse
import importlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.models import is_model_in_modules, parse_model_name, safe_model_name
from timm.task import ClassificationEvaluator
from timm.utils import setup_default_logging

from .. import hub
from ..exits import ExitTable
from ..launch.accelerator import create_accelerator
from ..launch.build import (
    DEMO_DATASET,
    build_eval_loader,
    build_model,
    check_model_name,
    eval_views,
    model_dtype,
    training_data_config,
    uses_demo_data,
)
from ..launch.options import create_train_parser, given_options, read_config, typed_value
from ..models.dynamic_net import DynamicNet
from ..task import Recipe, Stage, StageContext, create_baseline, create_recipe
from ..utils import CheckpointError, clean_partial_files, save_exit_cfg
from ..utils.report import format_table, plot_accuracy_over_macs, write_rows, write_yaml
from ..utils.signals import Stopped, StopRequest
from .anytime import (
    budget_curve,
    budget_rows,
    budgets_to_keep,
    count_macs,
    evaluate_dynamic,
    step_curve,
    step_rows,
)
from .budgets import same_images, split_in_halves
from .cascade import CALIBRATION, RUNNERS
from .evaluate import evaluate
from .state import StateError, StateStore
from .trainer import NonFiniteLoss, Trainer, check_identity

_logger = logging.getLogger(__name__)

_OUTPUT = 'output/train'

# What a user can mend: shown as one line, not as a traceback.
_USER_ERRORS = (ValueError, FileNotFoundError, CheckpointError, NonFiniteLoss, StateError, hub.PublishError)


class TrainOptions:
    """The options of a run, by where they come from.

    Args:
        argv: Command line without the script's name.

    Raises:
        SystemExit: As argparse does: the command line or the config file is wrong.
    """

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        self.parser = create_train_parser()
        self.given = given_options(self.parser, argv)
        if self.given.get('data') is None:
            self.given.pop('data', None)
        self.defaults = vars(self.parser.parse_args([]))
        self.config = read_config(self.parser, self.given['config']) if self.given.get('config') else {}
        self.base = argparse.Namespace(**{**self.defaults, **self.config, **self.given})
        self.for_one_stage: dict[str, dict[str, Any]] = {}
        for text in self.base.stage_args:
            self._add_stage_arg(text)

    def _add_stage_arg(self, text: str) -> None:
        path, equals, value = text.partition('=')
        stage, dot, option = path.partition('.')
        option = option.replace('-', '_')
        if not (equals and dot and option in self.defaults):
            self.parser.error(f"--stage-args: expected STAGE.OPTION=VALUE with an option of this script, got '{text}'.")
        self.for_one_stage.setdefault(stage, {})[option] = typed_value(self.parser, option, yaml.safe_load(value))

    def as_config(self) -> dict[str, Any]:
        """What --config takes to run the same again: what was given, not what a recipe made of it for one stage."""
        given = {k: v for k, v in {**self.config, **self.given}.items() if k != 'config'}
        if not Path(self.base.resume).is_file():  # a state to continue is the run itself
            given.pop('resume', None)
        return given

    def for_stage(self, stage: Stage, num_processes: int = 1) -> argparse.Namespace:
        """Resolve a stage's options: timm's defaults, the recipe's, --config, the command line, --stage-args."""
        recipe = dict(stage.defaults)
        global_batch = recipe.pop('global_batch_size', None)
        own = {**self.config, **self.given, **self.for_one_stage.get(stage.name, {})}
        if 'opt_kwargs' in own:  # adds to the recipe's, does not undo them
            own['opt_kwargs'] = {**recipe.get('opt_kwargs', {}), **own['opt_kwargs']}
        args = argparse.Namespace(**{**self.defaults, **recipe, **own})
        for name in ('epochs', 'batch_size', 'val_interval', 'log_interval'):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}.")
        if not 0 <= args.smoothing <= 1:
            raise ValueError(f'--smoothing: expected a number from 0 to 1, got {args.smoothing}.')
        for key, value in stage.options.items():
            setattr(args, key, value)
        if stage.model is not None:
            args.model, args.model_kwargs = stage.model, dict(stage.model_kwargs)
            args.pretrained, args.pretrained_path, args.initial_checkpoint = False, None, ''
        if global_batch and 'batch_size' not in own:
            parts = num_processes * max(1, args.grad_accum_steps)
            if global_batch % parts:
                raise ValueError(
                    f"The recipe's batch of {global_batch} cannot be shared by {num_processes} processes x "
                    f'{args.grad_accum_steps} accumulation steps: give a --batch-size (per process).')
            args.batch_size = global_batch // parts
        args.grad_accum_steps = max(1, args.grad_accum_steps)
        if 'seed' not in self.for_one_stage.get(stage.name, {}):
            args.seed += stage.seed_offset
        return args


def _experiment_folder(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Path, str | None]:
    """Folder of the run, and the timm checkpoint to resume from if that is what --resume names."""
    output = Path(args.output or _OUTPUT)
    choice: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            folder, checkpoint = _choose_folder(args, output)
            choice = [str(folder), checkpoint]
        except _USER_ERRORS as e:
            choice = [e, None]
    broadcast_object_list(choice)
    if isinstance(choice[0], Exception):
        raise choice[0]
    return Path(choice[0]), choice[1]


def _choose_folder(args: argparse.Namespace, output: Path) -> tuple[Path, str | None]:
    stamp = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
    named = output / (args.experiment or stamp)
    if not args.resume:
        if args.experiment and StateStore(named / 'state').exists():
            raise ValueError(
                f"'{named}' holds a run already: continue it with --resume auto, or choose another --experiment.")
        return named, None
    if args.resume == 'auto':
        if args.experiment:
            return named, None
        runs = sorted((p.parent for p in output.glob('*/state') if StateStore(p).exists()), key=lambda p: p.name)
        for run in reversed(runs):
            if _model_of(run) == args.model:
                return run, None
        return named, None
    path = Path(args.resume)
    if path.is_dir():
        for run in (path, path.parent, path.parent.parent):  # the run, its state/, or one state in there
            if StateStore(run / 'state').exists():
                return run, None
        raise CheckpointError(f"--resume: there is no state of a run at '{path}'.")
    if not path.is_file():
        raise CheckpointError(f"--resume: there is nothing at '{path}'.")
    return named, str(path)


def _model_of(run: Path) -> str | None:
    try:
        return yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8')).get('model') or None
    except (OSError, yaml.YAMLError, AttributeError):
        pass
    try:
        return StateStore(run / 'state').load()['identity']['model']
    except (CheckpointError, KeyError):
        return None


def _prepare_folder(folder: Path) -> None:
    """Make the folder and see that it can be written, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.partial-{os.getpid()}-probe'
        probe.write_text('')
        probe.unlink()
    except OSError as e:
        raise ValueError(
            f"The output folder '{folder}' cannot be written: {e.strerror or e}. Choose another with --output.") from e
    for path in (folder, *(p for p in folder.iterdir() if p.is_dir())):
        clean_partial_files(path)


def run_training(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run train.py.

    Args:
        argv: Command line without the script's name (default: this process's).

    Returns:
        'folder' of the run, 'results' by stage, and 'table', the final comparison.
    """
    options = TrainOptions(argv)
    base = options.base
    for module in base.device_modules or ():  # they may register the model
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            raise ValueError(f'--device-modules {module}: {e}.') from e
    check_model_name(base.model)
    if base.kd_model_name:
        check_model_name(base.kd_model_name)
    if base.torchcompile and base.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        backends = ', '.join(torch.compiler.list_backends())
        raise ValueError(f'--torchcompile {base.torchcompile}: expected one of {backends}.')
    if base.push_to_hub:
        hub.check_login(base.push_to_hub)  # before hours are spent
    demo = uses_demo_data(base)
    recipe = create_recipe(base, demo, _model_with_recipes(base))
    stages = _select_stages(recipe, base, options)

    # Accelerate needs the accumulation steps before stages are resolved; a recipe's own would come too late.
    accelerator = create_accelerator(base, project_dir=base.output or _OUTPUT)
    folder, timm_checkpoint = _experiment_folder(base, accelerator)
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(folder)
    main = accelerator.is_main_process
    if not main:
        logging.getLogger('timm_dynamic').setLevel(logging.WARNING)
    if main:
        _prepare_folder(folder)
        _logger.info(f"Run folder: {folder}")
        if demo:
            _logger.info('No data given: the embedded demo set cluttered_digits is used.')
    _start_trackers(accelerator, base, folder)

    store = StateStore(folder / 'state')
    state = store.load() if base.resume and not timm_checkpoint and store.exists() else None
    run_state: dict[str, Any] = state['run'] if state is not None else {'results': {}}
    identity = {'recipe': recipe.name, 'model': base.model}
    if state is not None:
        check_identity(state, identity, store.folder)
    for stage in stages:
        args = options.for_stage(stage, accelerator.num_processes)
        _check_metric(stage, args)
        if stage.check is not None:
            stage.check(args)
    if main:
        _show_stages(stages, options, accelerator.num_processes)
    weights = {s.name: _stage_folder(folder, recipe, s) / 'best' for s in recipe.stages}
    begins_with = next((s.name for s in stages if s.model is None), None)  # what --init-from is for

    results = run_state['results']
    with StopRequest() as stop:
        for stage in stages:
            args = options.for_stage(stage, accelerator.num_processes)
            if stage.name != begins_with:
                args.init_from = ''
            if stage.name in results:
                # The stage that the state is of may be given more epochs.
                last = state is not None and state['identity']['stage'] == stage.name
                if state is None or not last or args.epochs <= state['progress']['epoch']:
                    _logger.info(f'Stage {stage.name} is finished.')
                    continue
                del results[stage.name]
            if main and not (run_state['results'] or (folder / 'args.yaml').exists()):  # what the run began with
                write_yaml(folder / 'args.yaml', options.as_config())
            if stage.runs:
                _run_stage(stage, args, accelerator, folder, recipe, store, identity, run_state, weights, stop)
                state = None
                continue
            resume_from = state if state is not None and state['identity']['stage'] not in results else None
            trainer = Trainer(
                stage, args, accelerator, _stage_folder(folder, recipe, stage), store, identity,
                StageContext(stage_weights=weights, resumed=resume_from is not None), run_state)
            if resume_from is not None:
                trainer.load_state_dict(resume_from)
                if main:
                    _logger.info(f'Continuing stage {stage.name} at epoch {trainer.epoch}, batch {trainer.batch}.')
            elif timm_checkpoint:
                trainer.load_timm_checkpoint(timm_checkpoint)
                timm_checkpoint = None
            state = None
            results[stage.name] = trainer.fit(stop)
            trainer.save_state()
            accelerator.wait_for_everyone()
            del trainer
            accelerator.free_memory()
    out_of_fold = None
    if stages[-1].runs == 'confidence' and (folder / CALIBRATION).exists():
        out_of_fold = ExitTable.load(folder / CALIBRATION), results[stages[-1].name].get('split', base.val_split)
    table = _compare(recipe, stages, options, accelerator, folder, weights, out_of_fold)
    best = weights[stages[-1].name]
    if main and table:
        _logger.info(f'\n{format_table(table)}')
    if main and best.exists():
        _logger.info(f"\nWeights: {best}\nLoad them with: timm.create_model('local-dir:{best}', pretrained=True)")
    accelerator.end_training()
    if base.push_to_hub and main:
        _push_to_hub(recipe, stages, options, accelerator.num_processes, folder, weights, table)
    return {'folder': folder, 'results': dict(results), 'table': table}


def _run_stage(
        stage: Stage,
        args: argparse.Namespace,
        accelerator: Accelerator,
        folder: Path,
        recipe: Recipe,
        store: StateStore,
        identity: dict[str, Any],
        run_state: dict[str, Any],
        weights: dict[str, Path],
        stop: StopRequest,
) -> None:
    """Run a stage that is no training by batches, and note that it is finished."""
    own = _stage_folder(folder, recipe, stage)
    begun = accelerator.is_main_process and not store.exists()
    if begun:  # so that --resume auto finds the run
        store.save({
            'identity': {**identity, 'stage': stage.name}, 'run': run_state,
            'progress': {'epoch': 0, 'batch': 0, 'updates': 0}}, stage.name)
    try:
        result = RUNNERS[stage.runs](stage, args, accelerator, own, weights, stop)
    except _USER_ERRORS:
        if begun:  # the command will be another one
            shutil.rmtree(store.folder)
        raise
    run_state['results'][stage.name] = result
    if accelerator.is_main_process:
        write_yaml(own / 'stage.yaml', vars(args))
        store.save({
            'identity': {**identity, 'stage': stage.name}, 'run': run_state,
            'progress': {'epoch': args.epochs, 'batch': 0, 'updates': 0}}, stage.name)
    accelerator.wait_for_everyone()


def _model_with_recipes(args: argparse.Namespace) -> Any:
    """The model, if it is of a family that has recipes of its own."""
    source, name = parse_model_name(args.model)
    if source is None and not is_model_in_modules(name.split('.')[0], ['anchornet', 'clcnet', 'gfnet']):
        return None
    return build_model(args)


def _check_metric(stage: Stage, args: argparse.Namespace) -> None:
    """Raise a ValueError if the validation of a stage will not give what --eval-metric names."""
    names = list(ClassificationEvaluator.metric_names)
    if stage.runs or not args.val_split or args.eval_metric in names:
        return
    model = build_model(args)
    if isinstance(model, DynamicNet):
        names += [f'top1_step{t}' for t in range(1, (stage.num_steps or model.num_steps) + 1)]
    if args.eval_metric not in names:
        raise ValueError(
            f'--eval-metric {args.eval_metric}: stage {stage.name} has no such metric. Choose from {", ".join(names)}.')


def _select_stages(recipe: Recipe, args: argparse.Namespace, options: TrainOptions) -> list[Stage]:
    names = [s.name for s in recipe.stages]
    for name in [*(args.stage or ()), *options.for_one_stage]:
        if name not in names:
            raise ValueError(f"The recipe {recipe.name} has no stage '{name}': choose from {', '.join(names)}.")
    return [s for s in recipe.stages if not args.stage or s.name in args.stage]


def _stage_folder(folder: Path, recipe: Recipe, stage: Stage) -> Path:
    """The last stage's results are the run's; earlier ones have a folder each."""
    return folder if stage.name == recipe.stages[-1].name else folder / stage.name


def _start_trackers(accelerator: Accelerator, args: argparse.Namespace, folder: Path) -> None:
    if not accelerator.log_with:
        return
    wandb: dict[str, Any] = {'name': folder.name, 'tags': args.wandb_tags}
    if args.wandb_resume_id:
        wandb.update(resume='must', id=args.wandb_resume_id)
    config = {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in vars(args).items()}
    accelerator.init_trackers(args.wandb_project or 'timm_dynamic', config=config, init_kwargs={'wandb': wandb})


def _show_stages(stages: Sequence[Stage], options: TrainOptions, num_processes: int) -> None:
    """Print what the recipe changes, before training."""
    names: dict[str, None] = {}
    columns = {}
    for stage in stages:
        args = vars(options.for_stage(stage, num_processes))
        names.update(dict.fromkeys('batch_size' if k == 'global_batch_size' else k for k in stage.defaults))
        columns[stage.name] = args
    rows = [{'option': k, **{stage: str(args[k]) for stage, args in columns.items()}} for k in names]
    if rows:
        _logger.info('What the recipe sets (other options change it):\n' + format_table(rows))


def _compare(
        recipe: Recipe,
        stages: Sequence[Stage],
        options: TrainOptions,
        accelerator: Accelerator,
        folder: Path,
        weights: dict[str, Path],
        out_of_fold: tuple[ExitTable, str] | None,
) -> list[dict[str, Any]]:
    """Evaluate the best weights of every stage, and the recipe's references, on the same images.

    `out_of_fold` is of a cascade: by confidence nets that had not seen the images, and the split that they are of.
    """
    args = options.for_stage(stages[-1], accelerator.num_processes)
    models: list[tuple[str, Any, argparse.Namespace]] = [
        (s.label or s.name, timm.create_model(f'local-dir:{weights[s.name]}', pretrained=True),
         options.for_stage(s, accelerator.num_processes))
        for s in stages if s.shown and (weights[s.name] / 'config.json').exists()
    ]
    split = args.test_split or ('test' if uses_demo_data(args) else args.val_split)
    if not split:
        return []
    rows = []
    dynamic: list[tuple[str, Any, Any]] = []  # label, model, table of its exits
    references = [
        (label, create_baseline(source, models[-1][1]), args) for label, source in recipe.references.items()]
    fit_split = out_of_fold[1] if out_of_fold else args.val_split
    overlap = False  # whether these images are among those of `split`
    if fit_split and any(isinstance(model, DynamicNet) for _, model, _ in [*references, *models]):
        overlap = same_images(
            fit_split, split, lambda name: _open_loader(args, name, models[-1][1], accelerator).dataset)
    for label, model, own in [*references, *models]:
        model = model.eval().to(accelerator.device, model_dtype(args))
        data_config = training_data_config(own, model)
        macs, judged = count_macs(model, data_config['input_size']), split
        if out_of_fold and model is models[-1][1] and overlap:
            # The confidence net has seen these images: what nets say that have not seen them takes its place.
            exits, judged = out_of_fold[0], f'{split}, out of fold'
            metrics = {'top1': exits.anytime()[-1].top1, 'count': len(exits)}
            dynamic.append((label, model, exits))
            rows.append(_result_row(label, metrics, judged, model, macs))
            continue
        loader = _open_loader(own, split, model, accelerator)
        common: dict[str, Any] = dict(
            channels_last=args.channels_last, dtype=model_dtype(args), desc=f'{split}: {label}')
        if isinstance(model, DynamicNet):
            metrics, exits = evaluate_dynamic(model, loader, accelerator, **common)
            dynamic.append((label, model, exits))
        else:
            metrics = evaluate(model, loader, accelerator, **common)
        rows.append(_result_row(label, metrics, judged, model, macs))
    if accelerator.is_main_process:
        write_rows(folder / 'results.csv', rows)
        write_rows(folder / 'results.json', rows)
    if dynamic:
        static = {r['model']: [(r['gmacs'], r['top1'])] for r in rows if r['model'] != dynamic[-1][0] and 'gmacs' in r}
        own_table = out_of_fold if out_of_fold and dynamic[-1][1] is models[-1][1] else None
        _judge_exits(*dynamic[-1], args, split, overlap, accelerator, folder, static, own_table)
    return rows


def _open_loader(args: argparse.Namespace, split: str, model: Any, accelerator: Accelerator) -> Any:
    return build_eval_loader(
        args, split, training_data_config(args, model), model.num_classes, accelerator.device,
        accelerator.num_processes, samples=args.val_num_samples, views=eval_views(args, model))


def _result_row(label: str, metrics: dict[str, Any], split: str, model: Any, macs: int | None) -> dict[str, Any]:
    return {
        'model': label, **{k: round(v, 4) for k, v in metrics.items() if k not in ('count', 'gmacs')},
        'split': split, 'images': metrics['count'],
        'params_m': round(sum(p.numel() for p in model.parameters()) / 1e6, 3),
        **({'gmacs': round(macs / 1e9, 6)} if macs is not None else {})}


def _judge_exits(
        label: str,
        model: DynamicNet,
        table: ExitTable,
        args: argparse.Namespace,
        split: str,
        overlap: bool,
        accelerator: Accelerator,
        folder: Path,
        static: dict[str, list[tuple[float, float]]],
        out_of_fold: tuple[ExitTable, str] | None,
) -> None:
    """Show what every budget gets, and keep the budgets with the weights. Exits are fitted on the validation split."""
    fit_split = out_of_fold[1] if out_of_fold else args.val_split
    own = out_of_fold is not None and overlap  # then `table` is this one
    rows = step_rows(table, split=f'{split}, out of fold' if own else split)
    text = f'{label}, all images stopped after the same step:\n{format_table(rows)}'
    curves, points = {}, {f'{label}, same step': step_curve(table), **static}
    if own:
        halves = split_in_halves(table, f'{split}, out of fold', args.seed)
        calibration, table, fitted_on = halves.fit, halves.judge, halves.fitted_on
        split = halves.judged_on
    elif out_of_fold is not None:
        calibration, fitted_on = out_of_fold[0], f'{fit_split}, out of fold'
    elif fit_split and not overlap:
        _, calibration = evaluate_dynamic(
            model, _open_loader(args, fit_split, model, accelerator), accelerator, channels_last=args.channels_last,
            dtype=model_dtype(args), desc=f'{fit_split}: {label}')
        fitted_on = fit_split
    else:
        calibration = None
    if calibration is not None:
        fitted: dict[str, Any] = dict(split=split, fitted_on=fitted_on)
        budgets = budget_rows(calibration, table, **fitted)
        text += (f"\n\n{label}, budgets (exits fitted on '{fitted_on}', judged on '{split}'):\n"
                 + format_table(budgets))
        curves[f'{label}, budgets'] = budget_curve(calibration, table)
        rows += budgets
        if accelerator.is_main_process:
            model.store_budgets(budgets_to_keep(calibration, table, **fitted))
            save_exit_cfg(folder / 'best', model.exit_cfg)
    else:
        text += (f"\n\nFor budgets, exits must be fitted on other images than '{split}': "
                 f"validate.py --model local-dir:{folder / 'best'} --budget G ... --calibrate-split NAME")
    if accelerator.is_main_process:
        write_rows(folder / 'budgets.csv', rows)
        write_rows(folder / 'budgets.json', rows)
        picture = folder / 'accuracy_over_macs.png'
        if plot_accuracy_over_macs(picture, curves, points, title=f'{split}, {len(table)} images'):
            text += f'\n\nAccuracy over multiply-adds: {picture}'
        _logger.info('\n' + text)


def _push_to_hub(
        recipe: Recipe,
        stages: Sequence[Stage],
        options: TrainOptions,
        num_processes: int,
        folder: Path,
        weights: dict[str, Path],
        table: list[dict[str, Any]],
) -> None:
    """Publish the best weights of the last stage, with a card of the run."""
    base = options.base
    args = {s.name: options.for_stage(s, num_processes) for s in stages}
    dataset = DEMO_DATASET if uses_demo_data(base) else base.dataset or 'a folder of images'
    hub.describe_run(
        weights[stages[-1].name], folder / 'hub', base.push_to_hub, recipe.name, args, options.defaults, table, dataset)
    try:
        report = hub.publish(folder / 'hub', base.push_to_hub, private=base.hub_private)
    except hub.PublishError as e:
        raise hub.PublishError(
            f"{e}\nThe run is finished and nothing of it is lost. Publish it with: python hfhub/publish.py "
            f"{folder / 'hub'}{' --private' if base.hub_private else ''}") from e
    _logger.info(f"Published: {report['url']} (commit {report['commit']})\n"
                 f"Load it with: timm.create_model('hf-hub:{base.push_to_hub}', pretrained=True)")


def run_script(script: Callable[[], int]) -> int:
    """Run a script's body, with logging to the terminal and what a user can mend as one line.

    Returns:
        Exit status: the body's, 1 for what the user can mend, 128 + signal number if stopped by a signal.
    """
    if not logging.root.handlers:
        setup_default_logging()
        for handler in logging.root.handlers:
            handler.setStream(sys.stdout)  # type: ignore[attr-defined]
    try:
        return script()
    except _USER_ERRORS as e:
        print(f'{type(e).__name__}: {e}', file=sys.stderr)
        return 1
    except Stopped as e:
        name = signal.Signals(e.signum).name
        print(f'Stopped by {name}; the state is saved. Continue with --resume auto.', file=sys.stderr)
        return 128 + e.signum
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of train.py. Returns the exit status, see `run_script`."""
    def script() -> int:
        run_training(argv)
        return 0

    return run_script(script)
