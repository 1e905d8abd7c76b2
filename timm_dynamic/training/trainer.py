"""The training loop, for any task, loader and options."""
import argparse
import itertools
import logging
import math
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, distribute_bn, unwrap_model
from torch import nn
from torchvision.utils import save_image

from ..evaluation.metrics import check_metric, evaluate
from ..evaluation.pictures import ImagePicker, draw_patches
from ..exits.collect import Outputs
from ..launch.accelerator import create_control_channel
from ..launch.build import (
    build_eval_loader,
    build_optimizer,
    build_train_loader,
    build_training_model,
    model_dtype,
    place_model,
    resolve_data,
    resolve_learning_rate,
)
from ..launch.classes import sorted_classes
from ..models.builder import load_checkpoint
from ..models.dynamic_net import DynamicNet
from ..task import Stage, StageContext
from ..utils import CheckpointError, seeded
from ..utils.report import write_yaml
from ..utils.signals import Stopped, StopRequest
from .progress import LossGuard, NonFiniteLoss, Pace, RunningMeans, TrainingLog
from .run_folder import CheckpointManager, StageResults, check_identity, read_resumable

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains one stage of a recipe.

    Everything that a resumed run needs is in `state_dict`; no random generator is, because every batch begins with a
    seed of its own (see `timm_dynamic.utils.seeding`).

    Args:
        stage: The stage.
        args: Its options, resolved. `batch_size` is per process.
        accelerator: Processes, device, precision.
        folder: Where results go: last/, best/, checkpoints/, summary.csv, stage.yaml, curve.png.
        checkpoints: Where the state of the run goes.
        identity: What a state must agree with to be continued: recipe, stage, model.
        context: For the task: weights of earlier stages.
        run_state: State of the run beside this stage's, saved along (earlier stages' results).
        later_epochs: Epochs of the stages after this one, for the time that is left.
    """

    def __init__(
            self,
            stage: Stage,
            args: argparse.Namespace,
            accelerator: Accelerator,
            folder: Path,
            checkpoints: CheckpointManager,
            identity: Mapping[str, Any],
            context: StageContext,
            run_state: dict[str, Any],
            later_epochs: int = 0,
    ) -> None:
        self.stage, self.args, self.accelerator = stage, args, accelerator
        self.folder, self.states, self.run_state = folder, checkpoints, run_state
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.accum = accelerator.gradient_accumulation_steps
        self.any_process = create_control_channel(accelerator)

        model = build_training_model(args)
        task_state: Mapping[str, Any] | None = None
        if not context.resumed:
            if stage.starts_from is not None and not args.init_from:
                task_state = self._start_from(model, context.stage_weights[stage.starts_from])
            if stage.prepare is not None:
                task_state = stage.prepare(model, args, context) or task_state
        if args.num_classes is None:
            args.num_classes = model.num_classes
        self.identity = {**identity, 'stage': stage.name, 'num_classes': model.num_classes}
        self.data_config = resolve_data(args, model)
        model = place_model(model, args, self.device, self.world_size)

        self.loader, self.mixup_fn = build_train_loader(
            args, self.data_config, model.num_classes, self.device, self.rank, self.world_size)
        if self.loader.class_to_idx is not None:  # those to validate on are matched to these
            self.data_config['class_to_idx'] = self.loader.class_to_idx
        self.eval_loader = build_eval_loader(
            args, args.val_split, self.data_config, model.num_classes, self.device, self.world_size,
            samples=args.val_num_samples) if args.val_split else None
        self.identity['classes'] = sorted_classes(self.loader)
        if not self.loader.resumable and self.main:
            _logger.info('This dataset can only be iterated: a run killed within an epoch repeats it from its start.')

        context.device, context.dtype, context.verbose = self.device, model_dtype(args), self.main
        context.data_config = self.data_config
        with seeded(args.seed, 'task'):  # modules of the task, e.g. a critic, have initial values, too
            assert stage.create_task is not None
            self.task: TrainingTask = stage.create_task(model, args, context).to(self.device)
        if task_state:
            self.task.load_task_state(dict(task_state), strict=False)
        self.model = model
        if args.model_ema and (self.main or not args.model_ema_force_cpu):
            self.task.setup_ema(
                decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
                device=torch.device('cpu') if args.model_ema_force_cpu else None)
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)

        args.lr = resolve_learning_rate(args, args.batch_size * self.world_size * self.accum, stage.name)
        trainable: Any = self.task.get_trainable_module()
        self.raw_optimizer = build_optimizer(trainable, args)
        self.optimizer = accelerator.prepare(self.raw_optimizer)
        self.task.trainable_module = accelerator.prepare(trainable)
        self.updates_per_epoch = math.ceil(len(self.loader) / self.accum)
        self.metric = 'loss' if self.eval_loader is None else check_metric(args.eval_metric, self.task, self.model)
        self.decreasing = self.metric == 'loss'
        self.scheduler, self.num_epochs = create_scheduler_v2(
            self.raw_optimizer, **scheduler_kwargs(args, decreasing_metric=self.decreasing),
            updates_per_epoch=self.updates_per_epoch)

        self.epoch = self.batch = self.updates = 0
        self.results = StageResults(folder, self.metric, self.decreasing, args.checkpoint_hist)
        pace = Pace(len(self.loader), args.batch_size * self.world_size, self.num_epochs, later_epochs)
        first_update = sum(result.get('updates', 0) for result in run_state['results'].values())
        self.log = TrainingLog(stage.name, accelerator, pace, first_update)
        self.means = RunningMeans()  # over the epoch's samples so far
        self.guard = LossGuard(self.device)

    def _start_from(self, model: nn.Module, folder: Path) -> Mapping[str, Any]:
        if not folder.exists():
            raise ValueError(
                f"Stage '{self.stage.name}' starts from the weights of stage '{self.stage.starts_from}', which are not "
                f"at '{folder}': run that stage first, or give weights with --init-from.")
        return load_checkpoint(model, folder)

    # state

    def state_dict(self) -> dict[str, Any]:
        """What training continues with, at the end of an update; but for the means so far, which each process has."""
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else {}
        ema = self.task.get_trainable_module(ema=True)
        return {
            'identity': self.identity,
            'run': self.run_state,
            'progress': {
                'epoch': self.epoch, 'batch': self.batch, 'updates': self.updates,
                'samples_per_batch': self.args.batch_size * self.world_size,
            },
            'model': self.task.get_checkpoint_state(),
            'ema': self.task.get_checkpoint_state(ema=True) if ema is not None else None,
            'optimizer': self.raw_optimizer.state_dict(),
            'scheduler': {k: v for k, v in scheduler.items() if not callable(v)},
            'scaler': self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            'best': self.results.best,
            'checkpoints': self.results.kept,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: It belongs to something else; what differs is named.
        """
        check_identity(state, self.identity, self.states.folder)
        try:
            self.task.load_checkpoint_state(state['model']['state_dict'], state['model'].get('task_state'))
            if state['ema'] is not None and self.task.has_ema():
                self.task.load_checkpoint_state(
                    state['ema']['state_dict_ema'], state['ema'].get('task_state_ema'), ema=True)
            elif self.task.has_ema():  # it begins here
                ema: Any = self.task.get_trainable_module(ema=True)
                ema.module.load_state_dict(unwrap_model(self.task.get_trainable_module()).state_dict())
            if self.args.no_resume_opt:
                self._schedule(state['progress']['epoch'], state['progress']['updates'])
            else:
                self.raw_optimizer.load_state_dict(state['optimizer'])
                if state['scaler'] is not None and self.accelerator.scaler is not None:
                    self.accelerator.scaler.load_state_dict(state['scaler'])
                if self.scheduler is not None:
                    own = self.scheduler.state_dict().get('t_initial')  # for the number of epochs given now
                    self.scheduler.load_state_dict({k: v for k, v in state['scheduler'].items() if k != 't_initial'})
                    if own != state['scheduler'].get('t_initial'):
                        self._schedule(state['progress']['epoch'], state['progress']['updates'])
        except (RuntimeError, KeyError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"The state at '{self.states.folder}' does not fit this model: {reason}") from e
        progress = state['progress']
        self.epoch, self.batch, self.updates = (progress[k] for k in ('epoch', 'batch', 'updates'))
        per_batch = self.args.batch_size * self.world_size
        if per_batch != progress['samples_per_batch']:
            self.batch = self.batch * progress['samples_per_batch'] // per_batch
            self.batch -= self.batch % self.accum
            _logger.info(
                f'Batches have {per_batch} samples over all processes now, not {progress["samples_per_batch"]}: '
                f'epoch {self.epoch} goes on from batch {self.batch}.')
        if not self.loader.resumable:
            self.batch = 0
        self.results.best, self.results.kept = dict(state['best']), [list(c) for c in state['checkpoints']]
        self.means = RunningMeans.from_gathered(state['totals'] if self.batch else [], self.accelerator)
        self._override_start_epoch()

    def load_timm_checkpoint(self, path: str) -> None:
        """Continue from a .pth.tar of timm's own train.py or of the FocusNet authors' code, or from bare weights.

        Raises:
            CheckpointError: It is neither, or is for another model or optimizer.
        """
        checkpoint = read_resumable(path)
        load_checkpoint(unwrap_model(self.task.get_eval_model()), path, use_ema=False)
        if self.task.has_ema():
            load_checkpoint(unwrap_model(self.task.get_eval_model(ema=True)), path)
        if not self.args.no_resume_opt and 'optimizer' in checkpoint:
            try:
                self.raw_optimizer.load_state_dict(checkpoint['optimizer'])
            except (ValueError, KeyError, TypeError) as e:
                raise CheckpointError(
                    f"--resume: the optimizer's state in '{path}' is for another optimizer or model ({e}). "
                    '--no-resume-opt continues without it.') from e
            if self.accelerator.scaler is not None and 'amp_scaler' in checkpoint:
                self.accelerator.scaler.load_state_dict(checkpoint['amp_scaler'])
        if 'epoch' in checkpoint:
            # timm stores the last epoch's number; the FocusNet authors store the number of finished epochs.
            self.epoch = checkpoint['epoch'] + (checkpoint.get('version', 2) > 1 and 'best_acc1' not in checkpoint)
        self.updates = self.epoch * self.updates_per_epoch
        self._schedule(self.epoch, self.updates)
        self._override_start_epoch()

    def _override_start_epoch(self) -> None:
        if self.args.start_epoch is not None and self.args.start_epoch != self.epoch:
            self.epoch, self.batch, self.means = self.args.start_epoch, 0, RunningMeans()
            self.updates = self.epoch * self.updates_per_epoch
            self._schedule(self.epoch, self.updates)

    def _schedule(self, epoch: int, updates: int) -> None:
        if self.scheduler is not None:
            self.scheduler.step_update(updates)
            self.scheduler.step(epoch)

    def save_state(self) -> None:
        """Write the state, in the main process. All processes call it.

        Raises:
            NonFiniteLoss: The loss of some process went wrong; the last good state is kept.
        """
        self._check_finite()
        totals, name = self.means.gather(), f'{self.stage.name}-{self.epoch:04d}-{self.batch:07d}'
        if self.main:
            self.states.save({**self.state_dict(), 'totals': totals}, name)

    def fit(self, stop: StopRequest) -> dict[str, Any]:
        """Train to the end.

        Returns:
            The last epoch's row of the summary, and 'best', 'best_epoch', and 'updates' of the stage.

        Raises:
            Stopped: A signal came; the state is saved.
            NonFiniteLoss: The loss went wrong; the last good state is kept.
        """
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_yaml(self.folder / 'stage.yaml', vars(self.args))
        if self.epoch == self.batch == 0 and self.args.start_epoch is not None:
            self._override_start_epoch()
        row: dict[str, Any] = {}
        while self.epoch < self.num_epochs:
            row = self._run_epoch(stop)
        row = row or (self.results.last_row() if self.main else {})  # if nothing was left to do
        best = self.results.best
        return {**row, 'best': best['value'], 'best_epoch': best['epoch'], 'updates': self.updates}

    def _run_epoch(self, stop: StopRequest) -> dict[str, Any]:
        epoch, began = self.epoch, time.time()
        train_metrics = self._train_epoch(stop)
        if self.world_size > 1 and self.args.dist_bn and not self.args.sync_bn:
            distribute_bn(self.model, self.world_size, self.args.dist_bn == 'reduce')
            if self.task.has_ema() and not self.args.model_ema_force_cpu:
                distribute_bn(self.task.get_trainable_module(ema=True), self.world_size, self.args.dist_bn == 'reduce')
        rates = self._learning_rates()
        row: dict[str, Any] = {'epoch': epoch, **{f'train_{k}': v for k, v in train_metrics.items()}}

        metrics: dict[str, float] = {}
        ema = self.task.has_ema() and not self.args.model_ema_force_cpu
        due = (epoch + 1) % self.args.val_interval == 0 or epoch + 1 >= self.num_epochs
        if due and self.eval_loader is not None:
            metrics = self.evaluate()
            row.update({f'eval_{k}': v for k, v in metrics.items() if k != 'count'})
            if ema:
                metrics = self.evaluate(ema=True)
                row.update({f'eval_ema_{k}': v for k, v in metrics.items() if k != 'count'})
        value = metrics.get(self.metric) if self.eval_loader is not None else train_metrics['loss']
        row['lr'] = sum(rates) / len(rates)  # as timm has it
        if min(rates) < max(rates):
            row.update(lr_min=min(rates), lr_max=max(rates))
        row.update(seconds=round(time.time() - began, 1))

        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, value)
        self.epoch, self.batch, self.means = epoch + 1, 0, RunningMeans()
        if self.main:
            self._write_results(row, value, ema)
        self.log.end_epoch(row, self.updates, self.loader.skipped)
        if self.epoch == self.num_epochs:
            return row  # the caller of `fit` notes the result and saves
        self.save_state()
        if self.any_process(bool(stop)):
            raise Stopped(stop.signum or signal.SIGTERM)
        return row

    def _train_epoch(self, stop: StopRequest) -> dict[str, float]:
        args, epoch, num_batches = self.args, self.epoch, len(self.loader)
        self.task.train()
        self.loader.set_epoch(epoch, self.batch)
        if self.mixup_fn is not None:
            self.mixup_fn.mixup_enabled = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
        module: Any = self.task.get_trainable_module()
        tail = num_batches % self.accum
        self.optimizer.zero_grad()
        self.log.start_epoch(epoch, self.batch, num_batches)
        batches = iter(self.loader)
        while self.batch < num_batches:
            try:
                input, target = next(batches)
            except StopIteration:  # an iterable dataset that is shorter than it said
                break
            except RuntimeError:
                if not stop:
                    raise
                # The signal went to the loader's workers, too. Other processes cannot be asked about their losses.
                if self.batch % self.accum == 0 and self.world_size == 1:
                    self.save_state()
                raise Stopped(stop.signum or signal.SIGTERM) from None
            window = tail if tail and self.batch >= num_batches - tail else self.accum
            update = self.batch + 1 == num_batches or (self.batch + 1) % self.accum == 0
            with seeded(args.seed, 'step', self.rank, epoch, self.batch, device=self.device, keep=True):
                with nullcontext() if update else self.accelerator.no_sync(module):
                    self._forward_backward(input, target, self.accum / window)
                self.batch += 1
                if not update:
                    continue
                if self.device.type == 'cpu':
                    self._check_finite()
                self._update(len(input))
            self.log.advance(self.batch)
            number = math.ceil(self.batch / self.accum)  # of this update within the epoch
            if (number - 1) % args.log_interval == 0 or self.batch == num_batches:
                if self.device.type != 'cpu':
                    self._check_finite()
                rates = self._learning_rates()
                self.log.update(
                    f'{number}/{self.updates_per_epoch}', self.means, sum(rates) / len(rates), self.updates)
                if args.save_images and self.main:
                    save_image(
                        input, self.folder / f'train-batch-{self.batch - 1}.jpg', padding=0, normalize=True)
            if self.scheduler is not None:
                self.scheduler.step_update(num_updates=self.updates)
            stopping = self.any_process(bool(stop))
            due = stopping or (args.checkpoint_interval and number % args.checkpoint_interval == 0)
            if due and self.batch < num_batches:
                self.save_state()
                if stopping:
                    raise Stopped(stop.signum or signal.SIGTERM)
        self.log.end_batches()
        if self.loader.resumable:
            for _ in batches:  # let the loader see its end
                pass
        if hasattr(self.raw_optimizer, 'sync_lookahead'):
            self.raw_optimizer.sync_lookahead()
        self._check_finite()
        return self.means.reduce(self.accelerator)

    def _forward_backward(self, input: torch.Tensor, target: torch.Tensor, scale: float) -> None:
        args = self.args
        if args.no_prefetcher:
            input, target = input.to(self.device, model_dtype(args)), target.to(self.device)
            if self.mixup_fn is not None:
                input, target = self.mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            result = self.task(input, target)
        loss = result['loss']
        share = input.shape[0] / args.batch_size
        if args.variable_batch_loss_scale != 'none' and args.train_img_sizes:
            scale *= share if args.variable_batch_loss_scale == 'linear' else share ** 0.5
        self.accelerator.backward(loss * scale, **(
            {'create_graph': True} if getattr(self.raw_optimizer, 'is_second_order', False) else {}))

        self.guard.watch(loss, self.batch)
        with torch.no_grad():
            for key, value in result.items():
                if key != 'output' and isinstance(value, torch.Tensor) and (value.ndim < 2 or value.numel() == 1):
                    self.means.add(key, value, input.shape[0])
            self.means.add('count', loss.new_ones(()), input.shape[0])

    def _update(self, count: int) -> None:
        """Update on the last batch, and again for each further loss of the task, as in reinforcement learning."""
        self._step()
        self.updates += 1
        self.task.update_ema(step=self.updates)
        task: Any = self.task
        losses = task.further_losses()
        while True:
            with self.accelerator.autocast():
                loss = next(losses, None)
            if loss is None:
                break
            self.accelerator.backward(loss)
            self.guard.watch(loss, self.batch - 1)
            self._step()
        with self.accelerator.autocast():
            diagnostics = task.diagnose()
        for key, value in diagnostics.items():
            self.means.add(key, value, count)

    def _learning_rates(self) -> list[float]:
        """Learning rate of each parameter group."""
        return [group['lr'] for group in self.raw_optimizer.param_groups]

    def _step(self) -> None:
        args = self.args
        if args.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            parameters = self.task.get_clip_parameters(exclude_head=args.clip_mode == 'agc')
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if args.synchronize_step and self.device.type != 'cpu':
            torch.accelerator.synchronize()

    def _check_finite(self) -> None:
        """Raise in every process if one of them has seen a loss that is not finite. All of them call it alike.

        Gradients are averaged over the processes, so that one bad loss spoils the weights of all.
        """
        if not self.any_process(self.guard.is_bad()):
            return
        where = self.guard.describe(self.loader, self.epoch, self.rank)
        found = f'{where}. Terms so far: {self.means}.' if where else ''
        first = next(text for text in gather_object([found]) if text)
        lr = self.raw_optimizer.param_groups[0]['lr']
        kept = f" The last good state is kept at '{self.states.folder}'." if self.states.exists() else ''
        raise NonFiniteLoss(
            f'The loss of stage {self.stage.name} is not finite: {first} The learning rate was {lr:.3g}.{kept}')

    # results

    def evaluate(self, ema: bool = False) -> dict[str, float]:
        """Evaluate the model, or its moving average, on the validation split."""
        task: Any = self.task
        model = unwrap_model(task.get_eval_model(ema=ema)).eval()
        picker = ImagePicker(self.args.save_patches if self.main else 0)

        def on_batch(output: torch.Tensor, target: torch.Tensor, outputs: Outputs, x: Any) -> None:
            picker.add(x, target)

        batches = itertools.count()

        def predict(x: torch.Tensor) -> Outputs:  # seeded by batch: a loader's iterator draws a number, but not always
            with seeded(self.args.seed, 'validation', self.rank, next(batches), device=self.device):
                return task.predict(model, x)

        metrics, _ = evaluate(
            model, self.eval_loader, self.accelerator, predict=predict,
            create_evaluator=lambda device, **kwargs: task.create_evaluator(**kwargs),
            channels_last=self.args.channels_last, dtype=model_dtype(self.args), tta=self.args.tta,
            desc='validation' + (' (EMA)' if ema else ''), on_batch=on_batch if self.args.save_patches else None)
        if picker.images is not None and isinstance(model, DynamicNet) and self.eval_loader is not None:
            draw_patches(
                self.folder / 'patches.png', model, picker.images, picker.targets, self.data_config,
                self.eval_loader.class_to_idx)
        return metrics

    def _write_results(self, row: dict[str, Any], value: float | None, ema: bool) -> None:
        weights = unwrap_model(self.task.get_eval_model(ema=ema)).state_dict()
        state_dict = {k: v for k, v in weights.items() if '.aux_bn.' not in k}  # of --split-bn, for training only
        labels = sorted_classes(self.loader)
        task_state = {
            k: v for k, v in self.task.get_task_state(ema=ema).items()
            if isinstance(v, Mapping) and all(isinstance(t, torch.Tensor) for t in v.values())}
        self.results.write(
            row, value, self.model, data_config=self.data_config, state_dict=state_dict, task_state=task_state,
            **({'label_names': labels} if labels else {}))
