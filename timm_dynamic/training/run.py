"""train.py: from a command line to trained, validated and compared weights."""
import argparse
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.models import is_model_in_modules, parse_model_name
from timm.utils import unwrap_model

from .. import hub
from ..data import DEMO_DATASET, class_to_idx, find_split
from ..evaluation.calibration import same_split
from ..launch.accelerator import create_accelerator
from ..launch.build import (
    build_eval_loader,
    build_model,
    eval_views,
    model_dtype,
    open_dataset,
    resolve_data,
    uses_demo_data,
)
from ..launch.describe import describe_data, describe_device, describe_model, describe_training_batch
from ..launch.script import import_modules, run_script
from ..launch.settings import TrainOptions
from ..models.builder import check_model_name
from ..task import Recipe, Stage, StageContext, create_recipe
from ..task.recipe import FAMILIES, used_settings
from ..utils import UserError
from ..utils.report import format_block, format_table, write_yaml
from ..utils.signals import StopRequest
from .baseline import check_baseline
from .compare import compare_stages
from .progress import log_once
from .run_folder import OUTPUT, CheckpointManager, check_identity, check_options, find_run_folder
from .trainer import Trainer

_logger = logging.getLogger(__name__)


def run_training(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run train.py.

    Args:
        argv: Command line without the script's name (default: this process's).

    Returns:
        'folder' of the run, 'results' by stage, and 'table', the final comparison.
    """
    options = TrainOptions(argv)
    _check_names(options.base)
    classes_note = _resolve_classes(options)
    recipe = create_recipe(options.base, uses_demo_data(options.base), _model_with_recipes(options.base))
    run = TrainingRun(options, recipe, classes_note)
    try:
        with StopRequest() as stop:
            for stage in run.stages:
                run.run_stage(stage, stop)
        table = run.compare()
        run.publish(table)
    finally:
        run.lock.release()
    return {'folder': run.folder, 'results': dict(run.results), 'table': table}


def _check_names(base: argparse.Namespace) -> None:
    """Find mistakes in names early: of modules, models, backends, and the Hub's login."""
    import_modules(base.device_modules)  # they may register the model
    check_model_name(base.model)
    if base.kd_model_name:
        check_model_name(base.kd_model_name)
    if base.torchcompile and base.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        backends = ', '.join(torch.compiler.list_backends())
        raise ValueError(f'--torchcompile {base.torchcompile}: expected one of {backends}.')
    if base.push_to_hub:
        hub.check_login(base.push_to_hub)


def _count_classes(args: argparse.Namespace) -> int | None:
    """Number of classes of the data to train on; None if the data does not say it.

    Where there is no split to train on, e.g. only features are computed, it is that of the split to validate on.

    Raises:
        FileNotFoundError: There is no data.
        ValueError: There is neither split, or it cannot be opened.
    """
    if args.features:  # no images are read
        return None
    data_config = {'input_size': tuple(args.input_size or (args.in_chans or 3, 224, 224))}
    try:
        dataset = open_dataset(args, args.train_split, data_config, True, args.train_num_samples)
    except ValueError as e:
        try:
            dataset = open_dataset(args, args.feature_split or args.val_split, data_config, False, args.val_num_samples)
        except ValueError:
            raise e from None
    classes = class_to_idx(dataset)
    return None if classes is None else max(classes.values()) + 1


def _resolve_classes(options: TrainOptions) -> str:
    """Take the number of classes from the data, unless it is given. Returns a note about it; empty if both agree.

    Raises:
        FileNotFoundError: There is no data.
        ValueError: The data cannot be opened, or has more classes than given.
    """
    given, found = options.base.num_classes, _count_classes(options.base)
    if found is None:
        unknown = "The data does not say how many classes it has: the model's own number is used. Set --num-classes."
        return unknown if given is None and not options.base.features else ''
    if given is None:
        options.set_num_classes(found)
        return f'{found} classes, from the data.'
    if given < found:
        raise ValueError(f'--num-classes {given}: the data has {found} classes. Give at least {found}, or omit it.')
    return f'--num-classes {given}: the data has {found} classes, the others have no images.' if given > found else ''


def _check_splits(args: argparse.Namespace) -> None:
    """Raise a ValueError if a folder without splits, or a tar file, would be trained and validated on.

    It is allowed if both options name the same split.
    """
    root = args.data_dir or args.data
    if not args.val_split or args.dataset or not root or not Path(root).exists():
        return
    if same_split(args.train_split, args.val_split):
        _logger.warning(f"Training and validation use the same images: --val-split is '{args.val_split}'.")
    elif find_split(root, args.train_split) == find_split(root, args.val_split):
        raise ValueError(
            f"'{root}' has no splits: training and validation would use the same images. Expected folders "
            f"'{args.train_split}' and '{args.val_split}' in it. --val-split '' trains without validation.")


def _model_with_recipes(args: argparse.Namespace) -> Any:
    """The model, if it is of a family that has recipes of its own."""
    source, name = parse_model_name(args.model)
    if source is None and not is_model_in_modules(name.split('.')[0], FAMILIES):
        return None
    return build_model(args)


class TrainingRun:
    """A run: its folder, its state, and what its stages have in common.

    Args:
        options: Options by where they come from.
        recipe: What to run.
        classes_note: A line for the log about the number of classes.

    Attributes:
        folder: Folder of the run.
        stages: Stages of the recipe that were asked for.
        weights: Folder of the best weights of every stage of the recipe.
        results: Results of the stages that are finished, by name.

    Raises:
        ValueError: Options do not go together, or the folder holds another run.
    """

    def __init__(self, options: TrainOptions, recipe: Recipe, classes_note: str = '') -> None:
        base = options.base
        self.options, self.recipe, self.demo = options, recipe, uses_demo_data(base)
        self.stages = self._select_stages()
        # Accelerate needs the accumulation steps before stages are resolved; a recipe's own would come too late.
        self.accelerator = create_accelerator(base, project_dir=base.output or OUTPUT)
        self.main = self.accelerator.is_main_process
        self.folder, self.timm_checkpoint, self.lock = find_run_folder(base, self.accelerator)
        project = self.accelerator.project_configuration
        project.project_dir = project.logging_dir = str(self.folder)
        if not self.main:
            for name in ('timm_dynamic', 'timm'):
                logging.getLogger(name).setLevel(logging.WARNING)
        elif classes_note:
            _logger.info(classes_note)
        _start_trackers(self.accelerator, base, self.folder)

        self.checkpoints = CheckpointManager(self.folder / 'state')
        resumes = base.resume and not self.timm_checkpoint and self.checkpoints.exists()
        self.state = self.checkpoints.load() if resumes else None  # to continue from, until its stage begins
        self.identity = {'recipe': recipe.name, 'model': base.model}
        if self.state is not None:
            check_identity(self.state, self.identity, self.checkpoints.folder)
        self.run_state: dict[str, Any] = self.state['run'] if self.state is not None else {'results': {}, 'options': {}}
        self.results: dict[str, Any] = self.run_state['results']
        for stage in self.stages:
            self._check_stage(stage, self._args_of(stage))
        if self.main:
            self._show_stages()
        self.weights = {s.name: self._folder_of(s) / 'best' for s in recipe.stages}
        self._shown: Mapping[str, str] = {}  # of the stage before

    def _check_stage(self, stage: Stage, args: argparse.Namespace) -> None:
        if stage.check is not None:
            stage.check(args)
        if stage.run is None:
            _check_splits(args)
        recorded = self.run_state['options'].get(stage.name)
        if self.state is not None and recorded is not None:
            last = self.state['identity']['stage'] == stage.name
            epochs = self.state['progress']['epoch'] if last else recorded['epochs'] * (stage.name in self.results)
            check_options(stage.name, recorded, args, epochs)
            if not last and stage.name in self.results and args.epochs != recorded['epochs']:
                raise ValueError(
                    f"--epochs {args.epochs}: stage {stage.name} finished after {recorded['epochs']} epochs. Give more "
                    f"to the last stage: --stage-args {self.state['identity']['stage']}.epochs={args.epochs}.")

    def _select_stages(self) -> list[Stage]:
        base, names = self.options.base, [s.name for s in self.recipe.stages]
        for name in [*(base.stage or ()), *self.options.for_one_stage]:
            if name not in names:
                raise ValueError(
                    f"The recipe {self.recipe.name} has no stage '{name}': choose from {', '.join(names)}.")
        return [s for s in self.recipe.stages if not base.stage or s.name in base.stage]

    def _args_of(self, stage: Stage) -> argparse.Namespace:
        return self.options.for_stage(stage, self.accelerator.num_processes)

    def _folder_of(self, stage: Stage) -> Path:
        """The last stage's results are the run's; earlier ones have a folder each."""
        return self.folder if stage.name == self.recipe.stages[-1].name else self.folder / stage.name

    def _show_stages(self) -> None:
        """Print what the recipe sets in each stage and the stage uses, before training."""
        columns = {stage.name: used_settings(stage, self._args_of(stage)) for stage in self.stages}
        names = dict.fromkeys(name for settings in columns.values() for name in settings)
        rows = [{'option': k, **{stage: settings.get(k, '') for stage, settings in columns.items()}} for k in names]
        if rows:
            _logger.info('What the recipe sets (other options change it):\n' + format_table(rows))

    def _show_block(self, stage: Stage, rows: Mapping[str, str]) -> None:
        """Print what a stage works with; after the first stage, what is different from the stage before."""
        epochs = ', '.join(f'{s.name} {self._args_of(s).epochs}' for s in self.stages)
        rows = {**rows, 'epochs': epochs, 'results': str(self.folder)}
        new = {k: v for k, v in rows.items() if v != self._shown.get(k)}
        self._shown = rows
        if new and self.main:
            _logger.info(f'Stage {stage.name}\n{format_block(new)}')

    # Stages

    def run_stage(self, stage: Stage, stop: StopRequest) -> None:
        """Run a stage, or skip it if it is finished.

        Raises:
            Stopped: A signal came; the state is saved.
        """
        args = self._args_of(stage)
        if stage.name != next((s.name for s in self.stages if s.model is None), None):
            args.init_from = ''  # is for the first stage that trains the model
        if stage.name in self.results:
            # The last stage that ran may be given more epochs.
            last = self.state is not None and self.state['identity']['stage'] == stage.name
            if self.state is None or not last or args.epochs <= self.state['progress']['epoch']:
                _logger.info(f'Stage {stage.name} is finished.')
                return
            del self.results[stage.name]
        if self.main and not (self.results or (self.folder / 'args.yaml').exists()):  # what the run began with
            write_yaml(self.folder / 'args.yaml', self.options.as_config())
        self.run_state['options'][stage.name] = _plain(vars(args))
        state = self._take_state()
        if stage.run is not None:
            self._run_own(stage, args, stop)
        else:
            self._train(stage, args, state, stop)

    def _take_state(self) -> dict[str, Any] | None:
        """The state to continue from, unless its stage is finished. The first call only."""
        state, self.state = self.state, None
        return None if state is None or state['identity']['stage'] in self.results else state

    def _train(
            self,
            stage: Stage,
            args: argparse.Namespace,
            state: dict[str, Any] | None,
            stop: StopRequest,
    ) -> None:
        later = self.stages[self.stages.index(stage) + 1:]
        with log_once('timm.models._builder', 'timm_dynamic.utils.checkpoint'):  # by several encoders
            trainer = Trainer(
                stage, args, self.accelerator, self._folder_of(stage), self.checkpoints, self.identity,
                StageContext(stage_weights=self.weights, resumed=state is not None), self.run_state,
                sum(self._args_of(s).epochs for s in later if s.run is None))
        if self.main:
            loaders = {args.train_split: trainer.loader}
            if trainer.eval_loader is not None:
                loaders[args.val_split] = trainer.eval_loader
            self._show_block(stage, {
                'data': describe_data(args, loaders),
                'model': describe_model(
                    args.model, trainer.model, trainer.data_config, unwrap_model(trainer.model).num_classes),
                'device': describe_device(args, self.accelerator),
                'batch': describe_training_batch(args, self.accelerator, trainer.updates_per_epoch),
            })
        if state is not None:
            trainer.load_state_dict(state)
            if self.main:
                _logger.info(f'Continuing stage {stage.name} at epoch {trainer.epoch}, batch {trainer.batch}.')
        else:
            check_baseline(trainer.task, trainer.eval_loader, trainer.model.num_classes, args, self.accelerator)
            if self.timm_checkpoint:
                trainer.load_timm_checkpoint(self.timm_checkpoint)
                self.timm_checkpoint = None
        del state
        self.results[stage.name] = trainer.fit(stop)
        trainer.save_state()
        self.accelerator.wait_for_everyone()
        del trainer
        self.accelerator.free_memory()

    def _run_own(self, stage: Stage, args: argparse.Namespace, stop: StopRequest) -> None:
        """Run a stage that does not train by batches of images, and note that it is finished."""
        assert stage.run is not None
        folder, device = self._folder_of(stage), self.accelerator.device

        def open_loader(model: Any, split: str, indices: Sequence[int] | None = None) -> Any:
            return build_eval_loader(
                args, split, resolve_data(args, model), model.num_classes, device, 1,
                samples=args.val_num_samples, views=eval_views(args, model), indices=indices)

        self._show_block(stage, {'device': describe_device(args, self.accelerator)})
        context = StageContext(
            device=device, dtype=model_dtype(args), stage_weights=self.weights, verbose=self.main, demo=self.demo,
            folder=folder, accelerator=self.accelerator, stop=stop, build_model=partial(build_model, args),
            open_loader=open_loader, data_config_of=partial(resolve_data, args))
        begun = self.main and not self.checkpoints.exists()
        if begun:  # so that --resume auto finds the run
            self._save_progress(stage, 0)
        try:
            result = stage.run(args, context)
        except (UserError, ValueError, FileNotFoundError):
            if begun:  # the command will be another one
                shutil.rmtree(self.checkpoints.folder)
            raise
        self.results[stage.name] = result
        if self.main:
            write_yaml(folder / 'stage.yaml', vars(args))
            self._save_progress(stage, args.epochs)
        self.accelerator.wait_for_everyone()

    def _save_progress(self, stage: Stage, epoch: int) -> None:
        self.checkpoints.save({
            'identity': {**self.identity, 'stage': stage.name}, 'run': self.run_state,
            'progress': {'epoch': epoch, 'batch': 0, 'updates': 0}}, stage.name)

    # The end

    def compare(self) -> list[dict[str, Any]]:
        """Compare the best weights of the stages; budgets for the result are kept with it."""
        table = compare_stages(
            self.recipe, self.stages, self.options, self.accelerator, self.folder, self.weights, self.results)
        best = self.weights[self.stages[-1].name]
        if self.main and table:
            _logger.info(f'\n{format_table(table)}')
        if self.main and best.exists():
            _logger.info(
                f"\nWeights: {best}\nLoad them with: timm.create_model('local-dir:{best}', pretrained=True)")
        self.accelerator.end_training()
        return table

    def publish(self, table: list[dict[str, Any]]) -> None:
        """Publish the best weights of the last stage with a card of the run, if `--push-to-hub` asks for it."""
        base = self.options.base
        if not base.push_to_hub or not self.main:
            return
        dataset = DEMO_DATASET if self.demo else base.dataset or 'a folder of images'
        folder = self.folder / 'hub'
        hub.describe_run(
            self.weights[self.stages[-1].name], folder, base.push_to_hub, self.recipe.name,
            {s.name: self._args_of(s) for s in self.stages}, self.options.defaults,
            [row for row in table if 'error' not in row], dataset)
        try:
            report = hub.publish(folder, base.push_to_hub, private=base.hub_private)
        except hub.PublishError as e:
            raise hub.PublishError(
                f'{e}\nThe run is finished and nothing of it is lost. Publish it with: python hfhub/publish.py '
                f"{folder}{' --private' if base.hub_private else ''}") from e
        _logger.info(f"Published: {report['url']} (commit {report['commit']})\n"
                     f"Load it with: timm.create_model('hf-hub:{base.push_to_hub}', pretrained=True)")


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as a state stores them."""
    return json.loads(json.dumps(options, default=str))


def _start_trackers(accelerator: Accelerator, args: argparse.Namespace, folder: Path) -> None:
    if not accelerator.log_with:
        return
    wandb: dict[str, Any] = {'name': folder.name, 'tags': args.wandb_tags}
    if args.wandb_resume_id:
        wandb.update(resume='must', id=args.wandb_resume_id)
    config = {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in vars(args).items()}
    accelerator.init_trackers(args.wandb_project or 'timm_dynamic', config=config, init_kwargs={'wandb': wandb})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of train.py.

    Returns:
        Exit status: see `run_script`; 1 if a model of the final table could not be loaded.
    """
    def script() -> int:
        return int(any('error' in row for row in run_training(argv)['table']))

    return run_script(script)
