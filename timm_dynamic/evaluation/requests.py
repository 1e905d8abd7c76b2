"""Checks of the options about exits, before anything is run."""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..exits import ExitTable, load_exit_table
from ..models.dynamic_net import DynamicNet
from .cascade import check_cascade_options
from .exit_report import check_stored, stored_rows


def dynamic_options(args: argparse.Namespace) -> list[str]:
    """Options that were given and only mean something for dynamic models."""
    names = (
        'anytime', 'budget', 'thresholds', 'threshold_sweep', 'geometric', 'stored_results', 'stored_thresholds',
        'calibrate_split', 'calibrate_samples', 'calibrate_augment', 'exit_table', 'calibrate_table', 'save_exit_table',
        'save_budgets', 'save_predictions', 'fold_nets', 'curve')
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]


def needs_fit(args: argparse.Namespace) -> bool:
    """Whether an option needs exits to be fitted."""
    return bool(args.budget or args.geometric or args.save_budgets or args.curve or args.confidence == 'all')


def only_stored(args: argparse.Namespace) -> bool:
    """Whether only results stored in the model are requested, so that no data is needed."""
    return args.stored_results and dynamic_options(args) == ['--stored-results'] and not args.compare


def check_model(args: argparse.Namespace, name: str, model: Any) -> None:
    """Check that the options fit the model.

    Raises:
        ValueError: They do not.
    """
    given = dynamic_options(args)
    check_cascade_options(args, name, model)
    if not isinstance(model, DynamicNet):
        if given:
            raise ValueError(
                f"{', '.join(given)}: '{name}' ({type(model).__name__}) makes one prediction and cannot exit early. "
                'Expected a dynamic model, e.g. a GFNet; static ones are compared with --compare.')
        return
    if args.test_pool:
        raise ValueError(f"--test-pool changes how a static model pools; '{name}' is a dynamic one.")
    if args.save_budgets and args.reparam:
        raise ValueError('--save-budgets cannot be combined with --reparam: the exported model could not be loaded.')
    check_requests(args, model.step_macs, f"'{name}'")
    if args.stored_thresholds:
        check_stored(model, name)
    if args.stored_results:
        stored_rows(model, name)
    for option, path in (('--exit-table', args.exit_table), ('--calibrate-table', args.calibrate_table)):
        if path:
            check_table(path, load_table(args, option, model.step_macs), model.step_macs, f"'{name}'")


def check_requests(args: argparse.Namespace, step_macs: Sequence[int], what: str) -> None:
    """See that budgets and thresholds fit the steps.

    Args:
        args: Options.
        step_macs: Costs of the steps.
        what: The model or table, for the message.

    Raises:
        ValueError: A budget is out of range, there are not as many thresholds as steps, or one is not a number.
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
                f'--thresholds {given}: expected {len(step_macs)} for {what}, one per step (the last is '
                f'ignored: all remaining images stop there), got {len(thresholds)}.')
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
        ValueError: It does not exist, or is not a table.
    """
    path = Path(getattr(args, option[2:].replace('-', '_')))
    if not path.is_file():
        raise ValueError(f"{option}: there is no file '{path}'.")
    costs: dict[str, Any] = {}
    if path.suffix in ('.pth', '.pt'):
        if step_macs is not None:
            costs['step_macs'] = step_macs
        elif args.anchor_gmacs is not None:
            costs['anchor_macs'] = round(1e9 * args.anchor_gmacs)
    return load_exit_table(path, steps=args.steps, **costs)
