"""Evaluating one model: its row in the table, every step, budgets, predictions. Used by validate.py and by train.py."""
import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from timm.data import RealLabelsImagenet
from timm.layers import apply_test_time_pool

from ..data import ConfidenceFeatures, RandomView
from ..data.image_names import image_names
from ..exits import ExitTable, solve_curve
from ..exits.anchornet_table import save_anchornet_table
from ..exits.collect import Outputs, SampleRecorder
from ..launch.build import build_eval_loader, eval_views, model_dtype, resolve_data
from ..launch.describe import describe_data, describe_device, describe_model
from ..models.clcnet import CLCNet
from ..models.dynamic_net import DynamicNet
from ..models.macs import count_macs
from ..utils.report import format_block, write_rows
from .calibration import CROSS, HALF, Calibration, open_calibration_loader, same_split, share_images
from .cascade import CascadeReplay, FoldNets, MemberAnswers, answering_members
from .exit_report import Report, Row, report_points, report_steps, short_name
from .metrics import evaluate
from .requests import load_table, needs_fit

_logger = logging.getLogger(__name__)


class OutOfFold(NamedTuple):
    """Exit table of a cascade by the nets of a cross-validation: the cascade's own net was trained on these images."""
    table: ExitTable
    split: str


class _Measured(NamedTuple):
    """What was found on the images of one split."""
    metrics: dict[str, float]
    table: ExitTable | None
    top5: torch.Tensor  # best classes [N, <= 5] by what `forward` gives
    steps_top1: torch.Tensor  # class after each step [N, T]
    target: torch.Tensor  # [N]
    members: MemberAnswers | None = None
    probabilities: torch.Tensor | None = None  # of what `forward` gives, sorted [N, C]; for --save-features


class ModelEvaluator:
    """Evaluates one model by the options of validate.py.

    Args:
        model: The model, in any mode, with its weights.
        name: Name in tables.
        args: Options of validate.py.
        accelerator: Processes, device, precision.
        data_config: Preprocessing (default: the options', else the model's).
        out_of_fold: Exit table of a cascade. It is used instead of running the model on the images of its split.
        fit_splits: Splits to fit exits on, the best first, unless `--calibrate-split` names one.
        fold_nets: Confidence nets of a cross-validation, for a cascade.
        compared: The model is one of `--compare`: only its accuracy and cost are reported.
        announce: Log data, model, device and batch before the model is run.
    """

    def __init__(
            self,
            model: Any,
            name: str,
            args: argparse.Namespace,
            accelerator: Accelerator,
            data_config: Mapping[str, Any] | None = None,
            out_of_fold: OutOfFold | None = None,
            fit_splits: Sequence[str] = ('validation', CROSS),
            fold_nets: FoldNets | None = None,
            compared: bool = False,
            announce: bool = False,
    ) -> None:
        self.announce = announce
        self.name, self.args, self.accelerator = name, args, accelerator
        self.out_of_fold, self.fit_splits, self.compared = out_of_fold, fit_splits, compared
        self.dynamic = isinstance(model, DynamicNet)
        self.num_classes = model.num_classes
        self.data_config: dict[str, Any] = dict(data_config or resolve_data(args, model))
        pooled = False
        if args.test_pool and not self.dynamic:
            model, pooled = apply_test_time_pool(model, self.data_config)
        self.params = sum(p.numel() for p in model.parameters())
        self.macs = count_macs(model, self.data_config['input_size'])
        if pooled:
            self.data_config['crop_pct'] = 1.0
        model = model.eval().to(device=accelerator.device, dtype=model_dtype(args))
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.exported = model  # to be saved
        self.model = model  # to be run, perhaps compiled
        self.replay: CascadeReplay | None = None
        if isinstance(model, CLCNet) and not compared and (fold_nets or args.confidence == 'all'):
            self.replay = CascadeReplay(model, fold_nets, args.confidence == 'all')
        self._compile()
        self.classes: torch.Tensor | None = None
        if args.valid_labels:
            labels = Path(args.valid_labels).read_text(encoding='utf-8').split()
            self.classes = torch.tensor([int(label) for label in labels])
            self.num_classes = max(len(labels), 1)

    def _compile(self) -> None:
        args = self.args
        if not args.torchcompile:
            return
        how: dict[str, Any] = dict(backend=args.torchcompile, mode=args.torchcompile_mode)
        if not self.dynamic:
            self.model = torch.compile(self.model, **how)
        elif self.replay is not None:
            self.model.forward_all = torch.compile(self.model.forward_all, **how)
        else:
            self.model.step = torch.compile(self.model.step, **how)

    def run(self) -> Report:
        """Evaluate, and report all that the options ask for. Budgets to save are kept in the model.

        Raises:
            ValueError: The data does not fit the model, or exits would be fitted on the images they are evaluated on.
        """
        args = self.args
        loader = self._open_loader(args.split, args.num_samples)
        if args.save_features and isinstance(loader.dataset, torch.utils.data.IterableDataset):
            raise ValueError('--save-features needs images that can be counted; this dataset can only be iterated.')
        if self.out_of_fold is not None and self._has_seen(self.out_of_fold.split, loader):
            return self._report_out_of_fold(self.out_of_fold.table)
        if self.replay is not None:
            self.replay.add_split(args.split, loader.dataset, some=True)
        fit_on, fit_loader = '', None
        if self.dynamic and not self.compared and needs_fit(args) and not args.calibrate_table:
            # Before the model runs, so that errors come early.
            fit_on, fit_loader = self._find_calibration(loader)
        if self.announce and self.accelerator.is_main_process:
            loaders = {args.split: loader} if fit_loader is None else {args.split: loader, fit_on: fit_loader}
            _logger.info(format_block({
                'data': describe_data(args, loaders),
                'model': describe_model(self.name, self.exported, self.data_config, self.num_classes),
                'device': describe_device(args, self.accelerator),
                'batch': f'{args.batch_size} images per process',
            }))
        measured = self._measure(loader, args.split, self.name)
        report = Report(self._row(measured, loader))
        assert report.row is not None
        if measured.probabilities is not None and self.accelerator.is_main_process:
            self._save_features(measured.probabilities, measured, loader)
        if not self.dynamic:
            if report.row['gmacs']:
                report.static[short_name(self.name)] = [(report.row['gmacs'], report.row['top1'])]
            return report
        answers, calibration = measured.steps_top1, None
        if self.replay is not None and measured.members is not None:
            fitted = self._measure(fit_loader, fit_on, f'{self.name}: {fit_on}').members if fit_loader else None
            (table, answers), calibration = self.replay.finish(
                report, self.name, measured.members, fitted, args.seed)
            self._update_row(report.row, table, measured.members)
            report.static.update({
                row['member']: [(row['gmacs'], row['top1'])] for row in report.points if 'member' in row})
        else:
            assert measured.table is not None
            table = measured.table
        report_steps(
            report, self.name, table, args.split, ", by the dataset's own labels" if args.real_labels else '')
        if self.compared:
            return report
        self._warn_of_seen_images()
        if calibration is None:
            calibration = self._calibrate(table, fit_on, fit_loader)
        self._save(table, answers, measured.target, loader, calibration)
        report_points(report, args, self.name, table, calibration, self.exported)
        return report

    # Data

    def _open_loader(self, split: str, samples: int | None, random_samples: int | None = None) -> Any:
        args = self.args
        return build_eval_loader(
            args, split, self.data_config, self.num_classes, self.accelerator.device, self.accelerator.num_processes,
            samples=samples, random_samples=random_samples, views=eval_views(args, self.exported),
            crop_border_pixels=args.crop_border_pixels, tf_preprocessing=args.tf_preprocessing)

    def _find_calibration(self, loader: Any) -> tuple[str, Any]:
        if self.out_of_fold is not None:
            return f'{self.out_of_fold.split}, out of fold', None
        num = self.args.calibrate_samples
        one_policy = self.replay is not None or self.args.save_predictions
        candidates = [HALF if one_policy and name == CROSS else name for name in self.fit_splits]
        fit_on, fit_loader = open_calibration_loader(
            self.args.split, self.args.calibrate_split, candidates, loader,
            lambda split: self._open_loader(split, num, random_samples=num))
        if fit_on == CROSS and one_policy:
            raise ValueError(
                f'--calibrate-split {CROSS} evaluates two policies, one on each half. With --save-predictions, '
                f'--fold-nets or --confidence all, choose {HALF}.')
        if num and fit_on in (HALF, CROSS):
            raise ValueError(
                '--calibrate-samples: exits are fitted on the images that are evaluated on. Name others with '
                '--calibrate-split.')
        if self.replay is not None and fit_loader is not None:
            self.replay.add_split(fit_on, fit_loader.dataset)
        if self.args.calibrate_augment:
            self._augment(fit_loader)
            _logger.info(f"Exits are fitted on random crops and flips of '{fit_on}'.")
        return fit_on, fit_loader

    def _augment(self, fit_loader: Any) -> None:
        """Let a loader of images to fit on give random views of them."""
        if fit_loader is None:
            raise ValueError(
                '--calibrate-augment needs images to fit on that are not evaluated on: name them with '
                '--calibrate-split, e.g. train.')
        if fit_loader.views is not None:
            raise ValueError('--calibrate-augment is not for cascades: each member has its own preprocessing.')
        dataset: Any = fit_loader.dataset
        dataset = dataset.dataset if isinstance(dataset, torch.utils.data.Subset) else dataset
        dataset.transform = RandomView(self.data_config, self.args.no_prefetcher, self.args.seed)

    def _calibrate(self, table: ExitTable, fit_on: str, fit_loader: Any) -> Calibration | None:
        """Tables to fit and evaluate on; None if no exits are fitted."""
        args = self.args
        if args.calibrate_table:
            fitted = load_table(args, '--calibrate-table', self.exported.step_macs)
            return Calibration.of_tables(fitted, table, args.calibrate_table, args.split)
        if self.out_of_fold is not None and fit_on:
            return Calibration.of_tables(self.out_of_fold.table, table, fit_on, args.split)
        if fit_loader is not None:
            measured = self._measure(fit_loader, fit_on, f'{self.name}: {fit_on}')
            assert measured.table is not None
            return Calibration.of_tables(measured.table, table, fit_on, args.split)
        if fit_on == CROSS and len(table) > 1:
            return Calibration.cross_fitted(table, args.split, args.seed)
        return Calibration.in_halves(table, args.split, args.seed) if fit_on == HALF else None

    # Running it

    def _measure(self, loader: Any, split: str, desc: str) -> _Measured:
        args = self.args
        with_features = bool(args.save_features) and not self.compared
        recorder = SampleRecorder(loader, self.accelerator)

        def on_batch(output: torch.Tensor, target: torch.Tensor, outputs: Outputs, x: Any) -> None:
            top5 = output.topk(min(5, output.shape[1]), dim=1).indices
            steps = outputs['logits'] if self.classes is None else outputs['logits'][..., self.classes]
            members = [] if self.replay is None else [outputs['member_logits'].float().transpose(0, 1)]
            features = [output.float().softmax(dim=1).sort(dim=1, descending=True).values] if with_features else []
            recorder.add(target, top5, steps.argmax(dim=-1).T, *members, *features)

        metrics, table = evaluate(
            self.model, loader, self.accelerator, predict=None if self.replay is None else self.replay.predict,
            classes=self.classes, channels_last=args.channels_last, dtype=model_dtype(args), desc=desc,
            log_freq=args.log_freq, on_batch=on_batch)
        target, top5, steps_top1, *more = recorder.gather()
        if self.replay is None:
            return _Measured(metrics, table, top5, steps_top1, target, probabilities=more[0] if with_features else None)
        answers = self.replay.answers(split, more[0], target)
        return _Measured(metrics, table, top5, steps_top1, target, answers)

    # Results

    def _row(self, measured: _Measured, loader: Any) -> Row:
        args, metrics = self.args, dict(measured.metrics)
        if args.real_labels:
            metrics['top1'], metrics['top5'] = _real_accuracy(loader.dataset, args.real_labels, measured.top5)
        gmacs = metrics.get('gmacs', None if self.macs is None else self.macs / 1e9)
        row = {
            'model': self.name, **accuracy(metrics['top1'], metrics['top5']), 'loss': round(metrics['loss'], 5),
            'images': metrics['count'], 'gmacs': gmacs and round(gmacs, 6), **self._described()}
        if args.metrics_avg:
            from sklearn.metrics import precision_recall_fscore_support
            precision, recall, f1, _ = precision_recall_fscore_support(
                measured.target.numpy(), measured.top5[:, 0].numpy(), average=args.metrics_avg, zero_division=0)
            row.update(precision=round(100 * precision, 4), recall=round(100 * recall, 4), f1_score=round(100 * f1, 4))
        return row

    def _described(self) -> Row:
        config = self.data_config
        return {'param_count': round(self.params / 1e6, 2), 'img_size': config['input_size'][-1],
                'crop_pct': config['crop_pct'], 'interpolation': config['interpolation']}

    def _update_row(self, row: Row, table: ExitTable, members: MemberAnswers) -> None:
        """Replace the figures in the row by those of the replayed cascade."""
        last = table.anytime()[-1]
        row.update(**accuracy(last.top1, last.top5), gmacs=round(last.gmacs, 6))
        row.pop('loss')  # that of another answer
        if members.folds is not None:
            row['cross_validated'] = bool((members.folds >= 0).all())

    def _warn_of_seen_images(self) -> None:
        if getattr(self.exported, 'confidence_kind', '') == 'clcnet' and not (self.replay and self.replay.fold_nets):
            _logger.info(
                f'{short_name(self.name)} on {self.args.split}: not cross-validated. This is valid only if the '
                'confidence net has not seen these images (else: --fold-nets).')

    def _has_seen(self, split: str, loader: Any) -> bool:
        """Whether the images of a loader are those of a split."""
        return same_split(split, self.args.split) or share_images(
            self._open_loader(split, self.args.num_samples).dataset, loader.dataset)

    def _report_out_of_fold(self, table: ExitTable) -> Report:
        """Report by a table that was measured before. Exits are cross-fitted on it."""
        args, last, where = self.args, table.anytime()[-1], f'{self.args.split}, out of fold'
        report = Report({
            'model': self.name, 'top1': round(last.top1, 4), 'images': len(table),
            'gmacs': round(last.gmacs, 6), **self._described(), 'split': where})
        report_steps(report, self.name, table, where)
        calibration = Calibration.cross_fitted(table, where, args.seed) if needs_fit(args) else None
        report_points(report, args, self.name, table, calibration, self.exported)
        return report

    # Files

    def _save(
            self,
            table: ExitTable,
            answers: torch.Tensor,
            target: torch.Tensor,
            loader: Any,
            calibration: Calibration | None,
    ) -> None:
        args = self.args
        if not self.accelerator.is_main_process:
            return
        if args.save_exit_table:
            save_table(table, args.save_exit_table, self.exported)
        if args.save_predictions:
            self._save_predictions(table, answers, target, loader, calibration)

    def _save_features(self, probabilities: torch.Tensor, measured: _Measured, loader: Any) -> None:
        path = Path(self.args.save_features)
        path.parent.mkdir(parents=True, exist_ok=True)
        correct = measured.top5[:, 0] == measured.target
        features = ConfidenceFeatures(probabilities, correct, image_names(loader.dataset, self.args.split))
        (features.save_csv if path.suffix == '.csv' else features.save)(path)
        _logger.info(f'Features of {len(features)} images of {self.args.split}: {path}')

    def _save_predictions(
            self,
            table: ExitTable,
            answers: torch.Tensor,
            target: torch.Tensor,
            loader: Any,
            calibration: Calibration | None,
    ) -> None:
        """Write a row per image: with the given policy, else that of the model, else after all steps."""
        args, policy, where = self.args, self.exported.exit_policy, self.args.split
        images = torch.arange(len(table))
        if args.thresholds:
            policy = args.thresholds[0]
        elif args.budget and calibration is not None:
            point, = solve_curve(calibration.calibration, args.budget, method=args.budget_rule)
            policy, where = point.policy, calibration.evaluated_on
            images = images if calibration.rows is None else calibration.rows
        steps = torch.full((len(table),), table.num_steps)
        if policy is not None:
            steps = table.steps_used(policy, strict=args.strict and bool(args.thresholds))
        names, at = image_names(loader.dataset, args.split), (images, steps[images] - 1)
        columns = (
            [names[i] for i in images.tolist()], answers[at].tolist(), target[images].tolist(),
            steps[images].tolist(), table.confidence[at].tolist())
        keys = ('file', 'prediction', 'target', 'steps_used', 'confidence')
        rows: list[Row] = [dict(zip(keys, row)) for row in zip(*columns)]
        if isinstance(self.exported, CLCNet):
            members = answering_members(table, steps, self.exported.final_rule)[images]
            rows = [{**row, 'member': member} for row, member in zip(rows, members.tolist())]
        write_rows(args.save_predictions, rows, 'csv')
        _logger.info(f'Answer to every image of {where} ({len(images)}): {args.save_predictions}')


def accuracy(top1: float, top5: float | None) -> dict[str, float]:
    """timm's columns of a table of results."""
    row = {'top1': round(top1, 4), 'top1_err': round(100 - top1, 4)}
    return row if top5 is None else {**row, 'top5': round(top5, 4), 'top5_err': round(100 - top5, 4)}


def _real_accuracy(dataset: Any, path: str, top5: torch.Tensor) -> tuple[float, float]:
    """Top-1 and top-5 accuracy (%) by the ImageNet ReaL labels."""
    real = RealLabelsImagenet(dataset.filenames(basename=True), real_json=path)
    ranks = torch.arange(top5.shape[1], 0, -1, dtype=torch.float32)
    for part in top5.split(1024):  # scores that rank the classes as the model did
        real.add_result(torch.zeros(len(part), 1000).scatter_(1, part, ranks.expand(len(part), -1)))
    return real.get_accuracy(k=1), real.get_accuracy(k=5)


def save_table(table: ExitTable, path: str, model: Any) -> None:
    """Write an exit table, as AnchorNet's scripts do if the file ends in .pth."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == '.pth':
        save_anchornet_table(table, path, getattr(model, 'setup_name', model.pretrained_cfg['architecture']))
    else:
        table.save(path)
    _logger.info(f'Exit table: {path}')
