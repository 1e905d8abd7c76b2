"""What is shown of a dynamic model: every step, budgets, thresholds, and what it keeps; as rows, tables and curves."""
import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..exits import ExitPoint, ExitTable, solve_curve
from ..exits.geometric import all_geometric_thresholds
from ..models.dynamic_net import DynamicNet
from ..models.exit_cfg import policy_from_json
from ..utils.report import Curve, format_table
from .calibration import Calibration, same_split

Row = dict[str, Any]
_GRID = 48  # budgets of a curve
_SWEEP = [(5 + 2 * i) / 100 for i in range(49)]  # thresholds 0.05 to 1.01, as in the original CLCNet
_HIDDEN = ('split', 'fitted_on', 'exit_correct')  # columns of files that tables of budgets have no space for


@dataclass
class Report:
    """What is known of a model.

    Attributes:
        row: Row of the table of models; None if the model was not run.
        points: Rows of its steps, budgets and so on.
        text: These as tables, for the terminal.
        curves: Lines of the picture, by label.
        markers: Points of the picture that no line joins, by label.
        static: Points of the picture of static nets and of a cascade's members, by label.
        images: Number of images that the curves are of.
    """
    row: Row | None
    points: list[Row] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    markers: dict[str, Curve] = field(default_factory=dict)
    static: dict[str, Curve] = field(default_factory=dict)
    images: int | None = None

    def add(
            self,
            model: str,
            caption: str,
            rows: Sequence[Row],
            hide: Sequence[str] = ('split', 'fitted_on'),
            fitted: ExitTable | None = None,
    ) -> None:
        """Add rows that belong together. Columns that the caption names are hidden in the terminal.

        Args:
            model: Name of the model.
            caption: Text above the table.
            rows: The rows.
            hide: Columns that are not shown.
            fitted: Table that the thresholds in the rows were fitted on, see `show_thresholds`.
        """
        self.points += [{'model': model, **row} for row in rows]
        shown = [{k: v for k, v in row.items() if k not in ('images', *hide)} for row in rows]
        for row in shown:
            if 'thresholds' in row:
                row['thresholds'] = show_thresholds(row['thresholds'], fitted)
        self.text.append(f'{caption}\n{format_table(shown)}')


def short_name(name: str) -> str:
    """A model's name for captions: of a folder, the last two parts."""
    source, colon, path = name.partition(':')
    return '/'.join(Path(path).parts[-2:]) if colon and source == 'local-dir' else name


def show_thresholds(thresholds: Sequence[float], fitted: ExitTable | None = None) -> list[float | str]:
    """Replace thresholds by 'always' if every image stops at this step, and by 'never' if none does.

    A solver expresses both by a number outside the confidences that it saw, e.g. -0.6807 or 1.84. Files have the
    numbers, tables for the terminal have the words.

    Args:
        thresholds: A threshold for each step [T]. The last one is ignored: every image stops there.
        fitted: Table that they were fitted on. 'always' means not above the least confidence of the step in it, 'never'
            above the greatest. None: only infinite thresholds, and GFNet's ±1e8, are replaced.
    """
    shown: list[float | str] = []
    for t, threshold in enumerate(thresholds):
        low, high = -1e8, math.nextafter(1e8, 0)
        if fitted is not None:
            known = fitted.confidence[:, t]
            known = known[known.isfinite()]
            if len(known):
                low, high = known.min().item(), known.max().item()
        always = t == len(thresholds) - 1 or threshold <= low
        shown.append('always' if always else 'never' if threshold > high else threshold)
    return shown


# Rows

def point_row(label: str, point: ExitPoint, **more: Any) -> Row:
    """Row of a table from a point.

    Args:
        label: Name of the point.
        point: Result of `ExitTable.evaluate`.
        **more: Further entries; 'budget' comes first.
    """
    row: Row = {'point': label}
    if 'budget' in more:
        row['budget'] = round(more.pop('budget'), 6)
    row.update(gmacs=round(point.gmacs, 6), top1=round(point.top1, 4))
    if point.top5 is not None:
        row['top5'] = round(point.top5, 4)
    row.update(images=len(point.steps_used), **more)
    row['exit_shares'] = [round(share, 4) for share in point.exit_shares.tolist()]
    row['exit_correct'] = point.exit_correct.tolist()
    if point.thresholds is not None:
        row['thresholds'] = point.thresholds.tolist()
    return row


def step_rows(table: ExitTable, **more: Any) -> list[Row]:
    """Rows of stopping all images after step 1, 2, ...: 'point', cumulative 'gmacs', 'top1', 'top5', 'images'.

    'correct' is the number of correct predictions.

    Args:
        table: The exit table.
        **more: Further entries of every row, e.g. 'split'.
    """
    rows = [
        point_row(f'step {t}', point, correct=int(point.exit_correct.sum()), **more)
        for t, point in enumerate(table.anytime(), 1)]
    return [{k: v for k, v in row.items() if k not in ('exit_shares', 'exit_correct', 'thresholds')} for row in rows]


def policy_row(table: ExitTable, policy: Any, label: str, strict: bool = False, **more: Any) -> Row:
    """Row of what thresholds or an `ExitPolicy` give on a table, see `ExitTable.evaluate`."""
    return point_row(label, table.evaluate(policy, strict), **more)


def sweep_rows(table: ExitTable, strict: bool = False, **more: Any) -> list[Row]:
    """Rows of the same threshold at all steps. 'sent_on' is the share of images that go on after step 1."""
    rows = []
    for threshold in _SWEEP:
        row = policy_row(table, [threshold] * table.num_steps, 'sweep', strict, threshold=threshold, **more)
        rows.append({**row, 'sent_on': round(1 - row['exit_shares'][0], 4)})
    return [{k: v for k, v in row.items() if k != 'thresholds'} for row in rows]


def budget_rows(
        calibration: Calibration,
        budgets: Sequence[float] | None = None,
        method: str = 'thresholds',
        num: int = 12,
) -> list[Row]:
    """Solve exits for budgets, and evaluate them on other images.

    Args:
        calibration: Tables to solve on and to evaluate on.
        budgets: Mean cost of an image, in 10⁹ multiply-adds. By default `num` of them, see `spread_budgets`.
        method: 'thresholds', or 'value' for policies that look at the confidences of all steps so far.
        num: Number of budgets, by default.

    Returns:
        For each budget 'point', 'budget', 'gmacs' (measured on the table to evaluate on), 'top1', 'top5', 'images',
        'split', 'fitted_on', 'exit_shares', 'exit_correct' and 'thresholds' [T].

    Raises:
        ValueError: A budget is below the cost of the first step or above that of all.
    """
    solved, points = _solve(calibration, budgets, method, num)
    return [
        point_row('budget', point, budget=budget, **_names(calibration))
        for (budget, _), point in zip(solved, points)]


def geometric_rows(calibration: Calibration) -> list[Row]:
    """Fit the 39 points of GFNet's paper, and evaluate them on other images."""
    points = calibration.evaluate(all_geometric_thresholds(calibration.calibration), all_geometric_thresholds)
    return [point_row(f'geometric p={p}', point, **_names(calibration)) for p, point in enumerate(points, 1)]


def budgets_to_keep(
        calibration: Calibration,
        budgets: Sequence[float] | None = None,
        method: str = 'thresholds',
        num: int = 12,
) -> list[Row]:
    """Solve budgets as `budget_rows` does, for `DynamicNet.store_budgets`.

    Returns:
        For each budget 'gmacs', its cost on the images it was fitted on, its 'policy', 'confidence_range' if
        confidences are not all between 0 and 1, and 'evaluated': what `budget_rows` says of it.
    """
    kept = []
    confidence = calibration.calibration.confidence
    low, high = confidence.min().item(), confidence.max().item()
    scale = {'confidence_range': [low, high]} if low < 0 or high > 1 else {}  # to interpolate in
    for (_, fitted), point in zip(*_solve(calibration, budgets, method, num)):
        row = point_row('budget', point, **_names(calibration))
        evaluated = {k: v for k, v in row.items() if k not in ('point', 'exit_correct', 'thresholds')}
        kept.append({'gmacs': fitted.gmacs, 'policy': fitted.policy, **scale, 'evaluated': evaluated})
    return kept


def _names(calibration: Calibration) -> Row:
    return {'split': calibration.evaluated_on, 'fitted_on': calibration.fitted_on}


def _solve(
        calibration: Calibration,
        budgets: Sequence[float] | None,
        method: str,
        num: int,
) -> tuple[list[tuple[float, ExitPoint]], list[ExitPoint]]:
    """Budgets with the points solved for them, on the images to fit on; and the same points on those to evaluate on.

    Of default budgets, those that cost the same count once.
    """
    table = calibration.calibration
    if budgets is None:
        grid = solve_curve(table, None, max(num, _GRID), method)
        fitted = grid if num >= _GRID else solve_curve(table, spread_budgets(grid, num), method=method)
        solved = list({p.gmacs: (p.gmacs, p) for p in fitted}.values())
    else:
        solved = list(zip(budgets, solve_curve(table, budgets, method=method)))

    def refit(table: ExitTable) -> list[Any]:
        low, high = table.step_macs[0] / 1e9, table.step_macs[-1] / 1e9
        return [p.policy for p in solve_curve(table, [min(max(b, low), high) for b, _ in solved], method=method)]

    return solved, calibration.evaluate([point.policy for _, point in solved], refit)


def spread_budgets(points: Sequence[ExitPoint], num: int) -> list[float]:
    """Choose budgets where the curve of a model moves.

    The curve goes from the cheapest point to the most accurate one. Cost and accuracy are both scaled to 0..1. The
    budgets are at equal distances along the curve, so neighbours differ in accuracy where it rises steeply, and in cost
    where it is flat.

    Args:
        points: Points of the curve.
        num: Number of budgets.

    Returns:
        Rising budgets in 10⁹ multiply-adds, at most `num`. The first and the last are those of the curve's ends.
    """
    rising: list[tuple[float, float]] = []
    for gmacs, top1 in sorted({(point.gmacs, point.top1) for point in points}):
        if not rising or top1 > rising[-1][1]:  # a point that costs more and gives less is not on the curve
            rising.append((gmacs, top1))
    span, gain = (rising[-1][i] - rising[0][i] for i in (0, 1))
    if num < 2 or not span:
        return [rising[-1][0]]
    along = [0., *itertools.accumulate(
        math.hypot((b[0] - a[0]) / span, (b[1] - a[1]) / gain) for a, b in itertools.pairwise(rising))]
    budgets = []
    for i in range(num):
        aim = along[-1] * i / (num - 1)
        k = next((k for k in range(len(rising) - 1) if along[k + 1] >= aim), len(rising) - 2)
        share = min((aim - along[k]) / (along[k + 1] - along[k]), 1.)
        budgets.append(rising[k][0] + share * (rising[k + 1][0] - rising[k][0]))
    budgets[-1] = rising[-1][0]
    return budgets


# Curves

def budget_curve(calibration: Calibration, method: str = 'thresholds', num: int = _GRID) -> list[tuple[float, float]]:
    """Solve a grid of budgets on one table and evaluate it on another: (GMACs, top-1 in %), by rising cost."""
    _, points = _solve(calibration, None, method, num)
    return sorted({(point.gmacs, point.top1) for point in points})


def step_curve(table: ExitTable) -> list[tuple[float, float]]:
    """(GMACs, top-1 in %) of stopping all images after step 1, 2, ..."""
    return [(point.gmacs, point.top1) for point in table.anytime()]


# Reports

def report_steps(report: Report, name: str, table: ExitTable, split: str, note: str = '') -> None:
    """Add accuracy and cost after every step."""
    report.add(
        name, f'{short_name(name)} on {split} ({len(table)} images), all of them stopped after the same step{note}:',
        step_rows(table, split=split))
    report.curves[f'{short_name(name)}: steps'] = step_curve(table)
    report.images = len(table)


def report_parts(report: Report, name: str, model: DynamicNet) -> None:
    """Add the costs of the parts of a model, for families that tell them apart, beside those that its authors state."""
    rows = part_rows(model)
    if rows:
        report.text.append(f'{short_name(name)}, cost of one run of each part:\n{format_table(rows)}')


def report_points(
        report: Report,
        args: argparse.Namespace,
        name: str,
        table: ExitTable,
        calibration: Calibration | None,
        model: DynamicNet | None,
) -> None:
    """Add everything that the options ask for but the steps, and keep budgets in the model if they do.

    Args:
        report: Is added to.
        args: Options.
        name: Name of the model.
        table: What was measured on `args.split`.
        calibration: Tables to fit and evaluate on, if exits are fitted.
        model: The model, for what it keeps.
    """
    label = short_name(name)
    if args.stored_results and model is not None:
        report.add(name, f'{label}, results kept in the model:', stored_rows(model, name), hide=())
    given = [
        policy_row(table, thresholds, 'thresholds', strict=args.strict, split=args.split, fitted_on='given')
        for thresholds in args.thresholds or ()]
    if args.stored_thresholds and model is not None:
        given += stored_policies(model, table, args.split)
    if given:
        caption = f'{label}, given exits evaluated on {args.split} ({len(table)} images):'
        if any(same_split(row['fitted_on'], args.split) for row in given):
            caption += f'\nSome were fitted on a split {args.split}: on the same images they look better than they are.'
        report.add(name, caption, given, hide=['split'])
        report.markers[f'{label}: given exits'] = [(row['gmacs'], row['top1']) for row in given]
    if args.threshold_sweep:
        rows = sweep_rows(table, args.strict, split=args.split, fitted_on='given')
        caption = f'{label}, one threshold for all steps, evaluated on {args.split} ({len(table)} images):'
        report.add(name, caption, rows)
        report.markers[f'{label}: one threshold'] = [(row['gmacs'], row['top1']) for row in rows]
    if calibration is None:
        return
    caption = (f'exits fitted on {calibration.fitted_on} ({len(calibration.calibration)} images), evaluated on '
               f'{calibration.evaluated_on} ({len(calibration.evaluation)} images).{calibration.note}')
    if args.budget or args.save_budgets:
        rule = ', looking at all steps so far' if args.budget_rule == 'value' else ''
        report.add(name, f'{label}, budgets{rule}: {caption}', budget_rows(calibration, args.budget, args.budget_rule),
                   hide=_HIDDEN, fitted=calibration.calibration)
    if args.geometric:
        rows = geometric_rows(calibration)
        report.add(name, f"{label}, GFNet's geometric rule: {caption}", rows, hide=_HIDDEN,
                   fitted=calibration.calibration)
        report.markers[f'{label}: geometric'] = [(row['gmacs'], row['top1']) for row in rows]
    if args.curve:
        fitted_on = calibration.fitted_on.partition(' of ')[0]
        report.curves[f'{label}: steps'] = step_curve(calibration.evaluation)  # on the same half, if it is one
        report.images = len(calibration.evaluation)
        report.curves[f'{label}: budgets, fitted on {fitted_on}'] = budget_curve(calibration, args.budget_rule)
    if args.save_budgets and model is not None:
        model.store_budgets(budgets_to_keep(calibration, args.budget, args.budget_rule))


# What a model keeps

def stored_policies(model: DynamicNet, table: ExitTable, split: str) -> list[Row]:
    """Rows of the exits that a model keeps, evaluated on a table."""
    kept: Row = dict(split=split, fitted_on='kept in the model')
    rows = []
    if model.exit_policy is not None:
        rows.append(policy_row(table, model.exit_policy, 'in use', **kept))
    budgets = model.exit_cfg.get('budgets')
    for budget in budgets or ():
        policy, evaluated = policy_from_json(budget['policy']), budget.get('evaluated', {})
        fitted_on = {k: evaluated[k] for k in ('fitted_on',) if k in evaluated}
        rows.append(policy_row(table, policy, 'stored', budget=budget['gmacs'], **{**kept, **fitted_on}))
    if not budgets:  # an authors' file that does not tell what its thresholds cost
        for thresholds in model.exit_cfg.get('origin', {}).get('dynamic_threshold', ()):
            rows.append(policy_row(table, thresholds, 'stored', **kept))
    return rows


def check_stored(model: DynamicNet, name: str) -> None:
    """Raise a ValueError if a model keeps no exits."""
    origin = model.exit_cfg.get('origin', {})
    if model.exit_policy is None and not model.exit_cfg.get('budgets') and not origin.get('dynamic_threshold'):
        raise ValueError(
            f'--stored-thresholds: {name} keeps no exits. Fit some with --budget, and keep them with --save-budgets.')


def part_rows(model: DynamicNet) -> list[Row]:
    """Rows of the parts of a model: 'part', 'steps' in which it runs at this cost, 'gmacs' of one run.

    'authors_gmacs' is the cost in an authors' checkpoint, if the model was loaded from one.
    """
    origin, rows = model.exit_cfg.get('origin', {}), []
    stated = {'glance encoder': 'model_flops', 'local encoder': 'model_flops', 'patch policy': 'policy_flops',
              'classifier': 'fc_flops'}
    for part, macs in model.count_part_macs().items():
        authors = origin.get(stated.get(part, ''))
        for cost in dict.fromkeys(m for m in macs if m):
            steps = [str(t) for t, m in enumerate(macs, 1) if m == cost]
            row: Row = {'part': part, 'steps': ', '.join(steps), 'gmacs': round(cost / 1e9, 6)}
            if isinstance(authors, (int, float)):
                row['authors_gmacs'] = round(authors * _origin_scale(origin), 6)
            rows.append(row)
    return rows


def _origin_scale(origin: Mapping[str, Any]) -> float:
    """Factor from the costs in an authors' checkpoint to GMACs. They are multiply-adds, or 10⁹ of them."""
    costs = origin.get('flops')
    return 1e-9 if costs and costs[-1] > 1e6 else 1.


def stored_rows(model: DynamicNet, name: str) -> list[Row]:
    """Rows of the results that are kept in a model; nothing is run.

    Raises:
        ValueError: There are none.
    """
    origin, rows = model.exit_cfg.get('origin', {}), []
    costs, accuracies = origin.get('flops'), origin.get('anytime_classification')
    authors = {'split': "the authors'", 'fitted_on': "the authors'"}
    if accuracies:
        for t, top1 in enumerate(accuracies):
            row: Row = {'point': f'step {t + 1}'}
            if costs and t < len(costs):
                row['gmacs'] = round(costs[t] * _origin_scale(origin), 6)
            rows.append({**row, 'top1': top1, 'split': authors['split']})
    for budget in model.exit_cfg.get('budgets', ()):
        gmacs, policy = round(budget['gmacs'], 6), budget['policy']
        row = {'point': 'budget', 'budget': gmacs, 'gmacs': gmacs}
        row.update({k: budget[k] for k in ('top1', 'top5') if k in budget})
        row.update(budget.get('evaluated') or (authors if origin else {}))
        if isinstance(policy, list):
            row['thresholds'] = policy
        rows.append(row)
    if not rows:
        raise ValueError(
            f"--stored-results: {name} keeps no results. The authors' checkpoints and models of --save-budgets do.")
    return rows
