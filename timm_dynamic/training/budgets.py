"""What validate.py shows of a dynamic model beside its row: every step, budgets, thresholds, what it keeps."""
import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from torchvision.datasets import VisionDataset

from ..data.dataset_factory import TRAIN_SPLITS, VALIDATION_SPLITS
from ..exits import ExitTable, solve_curve
from ..models.dynamic_net import DynamicNet, _from_json
from ..utils.report import Curve, format_table
from .anytime import (
    Row,
    budget_curve,
    budget_rows,
    budgets_to_keep,
    geometric_rows,
    policy_row,
    step_curve,
    step_rows,
)

_logger = logging.getLogger(__name__)

HALF = 'half'


@dataclass
class Report:
    """What is known of a model.

    Attributes:
        row: In the table of models; None if it was not run.
        points: Rows of its steps, budgets and so on.
        text: These as tables, for the terminal.
        curves: Lines of the picture, by label.
        markers: Likewise, to be drawn without a line.
    """
    row: Row | None
    points: list[Row] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    markers: dict[str, Curve] = field(default_factory=dict)

    def add(self, model: str, caption: str, rows: Sequence[Row], hide: Sequence[str] = ('split', 'fitted_on')) -> None:
        """Add rows that belong together. What the caption says is not shown again."""
        self.points += [{'model': model, **row} for row in rows]
        shown = [{k: v for k, v in row.items() if k not in ('images', *hide)} for row in rows]
        self.text.append(f'{caption}\n{format_table(shown)}')


def short_name(name: str) -> str:
    """A model's name for captions: of a folder, the last two parts."""
    source, colon, path = name.partition(':')
    return '/'.join(Path(path).parts[-2:]) if colon and source == 'local-dir' else name


@dataclass(frozen=True)
class Calibration:
    """Tables to fit on and to judge on, and what to call them.

    Attributes:
        fit: To fit on.
        judge: To judge on.
        fitted_on: What the images to fit on are called.
        judged_on: What those to judge on are called.
        note: What has to be said of it.
        rows: Rows of the whole table that are judged on [n] int64; None if all are.
    """
    fit: ExitTable
    judge: ExitTable
    fitted_on: str
    judged_on: str
    note: str = ''
    rows: torch.Tensor | None = None


def dynamic_options(args: argparse.Namespace) -> list[str]:
    """Options that were given and only mean something for dynamic models."""
    names = (
        'anytime', 'budget', 'thresholds', 'geometric', 'stored_results', 'stored_thresholds', 'calibrate_split',
        'calibrate_samples', 'exit_table', 'calibrate_table', 'save_exit_table', 'save_budgets', 'save_predictions',
        'fold_nets', 'curve')
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]


def needs_fit(args: argparse.Namespace) -> bool:
    """Whether exits are to be fitted."""
    return bool(args.budget or args.geometric or args.save_budgets or args.curve or args.confidence == 'all')


def only_stored(args: argparse.Namespace) -> bool:
    """Whether nothing is asked for but what the model keeps, so that no data is needed."""
    return args.stored_results and dynamic_options(args) == ['--stored-results'] and not args.compare


def check_requests(args: argparse.Namespace, step_macs: Sequence[int], what: str) -> None:
    """See that budgets and thresholds fit the steps, before anything is run.

    Args:
        args: Options.
        step_macs: Costs of the steps.
        what: Whose, for the message.

    Raises:
        ValueError: A budget is out of range, or there are not as many thresholds as steps, or one is not a number.
    """
    low, high = step_macs[0] / 1e9, step_macs[-1] / 1e9
    for budget in args.budget or ():
        if not low * (1 - 1e-9) <= budget <= high * (1 + 1e-9):
            raise ValueError(
                f'--budget {budget:g}: out of range for {what}: the first step costs {low:.10g} GMACs, all '
                f'{len(step_macs)} steps {high:.10g}.')
    for thresholds in args.thresholds or ():
        given = ' '.join(f'{value:g}' for value in thresholds)
        if len(thresholds) != len(step_macs):
            raise ValueError(
                f'--thresholds {given}: expected {len(step_macs)} for {what}, one a step (the last is ignored, as all '
                f'that are left stop there), got {len(thresholds)}.')
        if any(value != value for value in thresholds[:-1]):
            raise ValueError(f'--thresholds {given}: expected numbers, to be compared with confidences in 0..1.')


def check_table(path: str, table: ExitTable, step_macs: Sequence[int], what: str) -> None:
    """Raise a ValueError if a table is not of a model with these steps."""
    if table.num_steps != len(step_macs):
        raise ValueError(f"'{path}' is a table of {table.num_steps} steps, {what} has {len(step_macs)}.")
    if any(abs(a - b) > 1e-3 * b for a, b in zip(table.step_macs, step_macs)):
        costs = [', '.join(f'{m / 1e9:.4g}' for m in macs) for macs in (table.step_macs, step_macs)]
        raise ValueError(f"'{path}' is a table of steps that cost {costs[0]} GMACs; those of {what} cost {costs[1]}.")


def load_table(args: argparse.Namespace, option: str, step_macs: Sequence[int] | None = None) -> ExitTable:
    """Read a table that an option names.

    Args:
        args: Options.
        option: '--exit-table' or '--calibrate-table'.
        step_macs: Costs of the model's steps, for tables of AnchorNet, which have none.

    Raises:
        ValueError: It is not there, or no table.
    """
    path = Path(getattr(args, option[2:].replace('-', '_')))
    if not path.is_file():
        raise ValueError(f"{option}: there is no file '{path}'.")
    if path.suffix not in ('.pth', '.pt'):
        return ExitTable.load(path, steps=args.steps)
    if step_macs is not None:
        return ExitTable.load(path, step_macs, args.steps)
    charge = {} if args.anchor_gmacs is None else {'anchor_macs': round(1e9 * args.anchor_gmacs)}
    return ExitTable.load(path, steps=args.steps, **charge)


# What to fit on

def same_split(a: str, b: str) -> bool:
    """Whether two names mean the same split to timm."""
    return a == b or any(a in names and b in names for names in (TRAIN_SPLITS, VALIDATION_SPLITS))


def same_images(a: str, b: str, open_dataset: Callable[[str], Any]) -> bool:
    """Whether two splits have images in common, as far as their names and those of their files tell."""
    return same_split(a, b) or _overlap(open_dataset(a), open_dataset(b))


def calibration_splits(split: str) -> list[str]:
    """Splits to fit on when `split` is judged on, the best first."""
    return [name for name in ('validation', 'train') if not same_split(name, split)]


def open_calibration_loader(
        args: argparse.Namespace,
        judged: Any,
        open_loader: Callable[[str], Any],
) -> tuple[str, Any]:
    """Find images to fit on that are not those judged on.

    Args:
        args: Options.
        judged: Loader of the images judged on.
        open_loader: Makes a loader of a split.

    Returns:
        Name of the split and its loader; 'half' and None if a half of the images judged on must do.

    Raises:
        ValueError: `--calibrate-split` names the images judged on.
    """
    asked = args.calibrate_split
    if asked == HALF:
        return HALF, None
    if asked and same_split(asked, args.split):
        raise ValueError(
            f"--calibrate-split {asked}: this is what --split {args.split} judges on. Name another split to fit on, or "
            f"'{HALF}' to fit on a random half of it and judge on the other.")
    for name in [asked] if asked else calibration_splits(args.split):
        try:
            loader = open_loader(name)
        except (ValueError, FileNotFoundError, RuntimeError) as e:
            if asked:
                raise
            _logger.info(f"There is no split '{name}' to fit on: {e}")
            continue
        if not _overlap(judged.dataset, loader.dataset):
            return name, loader
        if asked:
            raise ValueError(
                f"--calibrate-split {asked}: its images are among those that --split {args.split} judges on. Is there "
                f"a split '{asked}'? '{HALF}' fits on a random half and judges on the other.")
    return HALF, None


def _overlap(a: Any, b: Any) -> bool:
    """Whether two datasets share images, as far as can be told without reading them."""
    samples = [getattr(getattr(dataset, 'reader', None), 'samples', None) for dataset in (a, b)]
    if None not in samples:
        names = [set(dataset.filenames(absolute=True)) for dataset in (a, b)]
        return not names[0].isdisjoint(names[1])
    # torchvision's tell their root and split; to timm, 'test' and 'validation' are one split of some of them.
    return isinstance(a, VisionDataset) and repr(a) == repr(b)


class RandomPart(Sampler):
    """This process's share of a random part of a dataset, without padding.

    Args:
        size: Of the dataset.
        num: Of the part.
        seed: The same seed gives the same part.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, size: int, num: int, seed: int, rank: int, world_size: int) -> None:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:num].sort().values
        self.indices = order[rank::world_size].tolist()
        self.num_valid_samples = len(self.indices)

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def take_samples(loader: Any, num: int, seed: int, rank: int, world_size: int) -> None:
    """Let a loader give only so many random images.

    Raises:
        ValueError: Too few for the processes.
    """
    if num < world_size:
        raise ValueError(f'--calibrate-samples {num}: expected at least {world_size}, one for each process.')
    inner = getattr(loader, 'loader', loader)
    if not isinstance(inner.dataset, torch.utils.data.IterableDataset):  # those were told how many when they were made
        inner.batch_sampler.sampler = RandomPart(len(inner.dataset), num, seed, rank, world_size)


def split_in_halves(table: ExitTable, name: str, seed: int) -> Calibration:
    """Fit on a random half of a table, judge on the other."""
    fit, judge = table.split_indices(0.5, seed)
    return Calibration(
        table.subset(fit), table.subset(judge), f'a random half of {name}', f'the other half of {name}', rows=judge)


def calibrate_on(fit: ExitTable, judge: ExitTable, fitted_on: str, judged_on: str) -> Calibration:
    """Fit on one table, judge on another.

    Raises:
        ValueError: They are one and the same.
    """
    if torch.equal(fit.confidence, judge.confidence) and torch.equal(fit.correct, judge.correct):
        raise ValueError(
            f'Exits must be fitted on other images than they are judged on: {fitted_on} and {judged_on} hold the same.')
    note = ''
    if fitted_on in TRAIN_SPLITS:
        note = (f'\nThe model may have been trained on {fitted_on}: exits fitted there may cost more, and give less, '
                'on images that are new to it.')
    return Calibration(fit, judge, fitted_on, judged_on, note)


# What is shown

def report_steps(report: Report, name: str, table: ExitTable, split: str, note: str = '') -> None:
    """Add accuracy and cost after every step."""
    report.add(
        name, f'{short_name(name)} on {split} ({len(table)} images), all of them stopped after the same step{note}:',
        step_rows(table, split=split))
    report.curves[f'{short_name(name)}: steps'] = step_curve(table)


def report_points(
        report: Report,
        args: argparse.Namespace,
        name: str,
        table: ExitTable,
        split: str,
        calibration: Calibration | None,
        model: DynamicNet | None,
) -> None:
    """Add all that the options ask for but the steps.

    Args:
        report: Added to.
        args: Options.
        name: Of the model.
        table: What was measured on the split.
        split: What it is called.
        calibration: What to fit and judge on, if exits are fitted.
        model: The model, for what it keeps.
    """
    label = short_name(name)
    if args.stored_results and model is not None:
        report.add(name, f'{label}, results kept in the model:', stored_rows(model, name), hide=())
    given: list[Row] = []
    for thresholds in args.thresholds or ():
        given.append(policy_row(
            table, thresholds, 'thresholds', strict=args.strict, split=split, fitted_on='given'))
    if args.stored_thresholds:
        assert model is not None
        given += stored_policies(model, name, table, split)
    if given:
        caption = f'{label}, given exits judged on {split} ({len(table)} images):'
        if any(same_split(row['fitted_on'], split) for row in given):
            caption += f'\nSome were fitted on a split {split} themselves: if on these very images, this flatters them.'
        report.add(name, caption, given, hide=['split'])
        report.markers[f'{label}: given exits'] = [(row['gmacs'], row['top1']) for row in given]
    if calibration is None:
        return
    fit, judge = calibration.fit, calibration.judge
    more: dict[str, Any] = {'split': calibration.judged_on, 'fitted_on': calibration.fitted_on}
    caption = (f'exits fitted on {calibration.fitted_on} ({len(fit)} images), judged on '
               f'{calibration.judged_on} ({len(judge)} images).{calibration.note}')
    if args.budget or args.save_budgets:
        rule = ', looking at all steps so far' if args.budget_rule == 'value' else ''
        rows = budget_rows(fit, judge, args.budget, args.budget_rule, **more)
        report.add(name, f'{label}, budgets{rule}: {caption}', rows)
    if args.geometric:
        rows = geometric_rows(fit, judge, **more)
        report.add(name, f"{label}, GFNet's geometric rule: {caption}", rows)
        report.markers[f'{label}: geometric'] = [(row['gmacs'], row['top1']) for row in rows]
    if args.curve:
        fitted_on = calibration.fitted_on.partition(' of ')[0]
        report.curves[f'{label}: steps'] = step_curve(judge)  # on the same half, if it is one
        report.curves[f'{label}: budgets, fitted on {fitted_on}'] = budget_curve(fit, judge, args.budget_rule)
    if args.save_budgets:
        assert model is not None
        model.store_budgets(budgets_to_keep(fit, judge, args.budget, args.budget_rule, **more))


def chosen_steps(
        args: argparse.Namespace,
        table: ExitTable,
        calibration: Calibration | None,
        model: DynamicNet,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find out where images stop by the exits that are asked for: one budget, or one list of thresholds.

    Args:
        args: Options.
        table: What was measured.
        calibration: What the budget is fitted on.
        model: Its exits are taken if none are asked for, or all steps if it has none.

    Returns:
        Rows of the table that are judged on [n] int64, rising, and their steps [n] int64, in 1..T.
    """
    rows = torch.arange(len(table))
    if args.budget:
        assert calibration is not None
        if calibration.rows is not None:
            rows = calibration.rows.sort().values
        point, = solve_curve(calibration.fit, args.budget, method=args.budget_rule)
        return rows, table.subset(rows).steps_used(point.policy)
    if args.thresholds:
        return rows, table.steps_used(args.thresholds[0], args.strict)
    if model.exit_policy is not None:
        return rows, table.steps_used(model.exit_policy)
    return rows, torch.full((len(table),), table.num_steps)


def stored_policies(model: DynamicNet, name: str, table: ExitTable, split: str) -> list[Row]:
    """Judge the exits that a model keeps, as rows."""
    rows = []
    if model.exit_policy is not None:
        rows.append(policy_row(table, model.exit_policy, 'in use', split=split, fitted_on='kept in the model'))
    budgets = model.exit_cfg.get('budgets')
    for budget in budgets or ():
        fitted_on = budget.get('evaluated', {}).get('fitted_on', 'kept in the model')
        policy = _from_json(budget['policy'])
        rows.append(policy_row(table, policy, 'stored', budget=budget['gmacs'], split=split, fitted_on=fitted_on))
    if not budgets:  # the authors', where nobody knows what they cost
        for thresholds in model.exit_cfg.get('origin', {}).get('dynamic_threshold', ()):
            rows.append(policy_row(table, thresholds, 'stored', split=split, fitted_on='kept in the model'))
    return rows


def check_stored(model: DynamicNet, name: str) -> None:
    """Raise a ValueError if a model keeps no exits."""
    origin = model.exit_cfg.get('origin', {})
    if model.exit_policy is None and not model.exit_cfg.get('budgets') and not origin.get('dynamic_threshold'):
        raise ValueError(
            f'--stored-thresholds: {name} keeps no exits. Fit some with --budget, and keep them with --save-budgets.')


def stored_rows(model: DynamicNet, name: str) -> list[Row]:
    """Results that came with a model, or were kept in it; nothing is run.

    Raises:
        ValueError: There are none.
    """
    origin, rows = model.exit_cfg.get('origin', {}), []
    costs, accuracies = origin.get('flops'), origin.get('anytime_classification')
    if accuracies:
        scale = 1e-9 if costs and costs[-1] > 1e6 else 1.  # multiply-adds, or 10⁹ of them
        for t, top1 in enumerate(accuracies):
            row: Row = {'point': f'step {t + 1}'}
            if costs and t < len(costs):
                row['gmacs'] = round(costs[t] * scale, 6)
            rows.append({**row, 'top1': top1, 'split': "the authors'"})
    for budget in model.exit_cfg.get('budgets', ()):
        gmacs, policy = round(budget['gmacs'], 6), budget['policy']
        row = {'point': 'budget', 'budget': gmacs, 'gmacs': gmacs}
        row.update({k: budget[k] for k in ('top1', 'top5') if k in budget})
        authors = {'split': "the authors'", 'fitted_on': "the authors'"} if origin else {}
        row.update(budget.get('evaluated') or authors)
        if isinstance(policy, list):
            row['thresholds'] = policy
        rows.append(row)
    if not rows:
        raise ValueError(
            f'--stored-results: {name} keeps no results. The authors\' checkpoints and models of --save-budgets do.')
    return rows
