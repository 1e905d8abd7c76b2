"""Exit tables in the file format of winycg/AnchorNet's make_table.py (.pth)."""
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from ..utils import atomic_write
from .table import ExitTable, check_numbers

# What winycg/AnchorNet's dynamic_inference.py charges for one pass through a net at 95 px, by its name in `setup`.
_PASS_MACS = {'densenet201': 790_000_000, 'resnet50': 752_000_000}


def load_anchornet_table(
        path: str | Path,
        step_macs: Sequence[int] | None = None,
        steps: int | None = None,
        anchor_macs: int = 60_000_000,
) -> ExitTable:
    """Read a table of winycg/AnchorNet.

    Args:
        path: A .pth file with 'setup' str, 'thresholds' float32 [N, K] (the confidences) and 'predictions' bool [N, K]
            (whether they are right). Nothing in it is executed.
        step_macs: Costs, which the file does not have. By default what the setup's net costs in AnchorNet's
            dynamic_inference.py: step 1 is one pass, step t >= 2 is `anchor_macs` and t passes.
        steps: Number of columns to read, from the first; by default all.
        anchor_macs: Charge for AnchorNet itself. The released script has 0.06 G; the published list of operating
            points has 0.08 G.

    Raises:
        ValueError: The file is no such table, is damaged, or has wrong shapes or confidences that are not numbers; or
            costs are neither given nor known for the setup.
    """
    try:
        confidence, correct, setup = _read(path)
        columns = confidence.shape[1]
        if steps is not None and not 1 <= steps <= columns:
            raise ValueError(f'it has {columns} columns, {steps} steps were asked for')
        if steps is None and step_macs is not None and len(step_macs) != columns:
            raise ValueError(f'it has {columns} columns, step_macs has {len(step_macs)}: choose with steps')
        check_numbers(confidence[:, :steps], path)
        if step_macs is None:
            step_macs = _step_macs_of(setup, columns, anchor_macs)
        return ExitTable(confidence[:, :steps], correct[:, :steps], step_macs[:steps])
    except ValueError as e:
        raise ValueError(f'{path} cannot be read as an exit table: {e}') from e


def save_anchornet_table(table: ExitTable, path: str | Path, setup: str) -> None:
    """Write a table as make_table.py does, whole or not at all; costs and top-5 are left out.

    Args:
        table: The table.
        path: A .pth file.
        setup: What was run, e.g. 'densenet201_95_[0.3, 0.3, 0.3, 0.3]'.

    Raises:
        ValueError: A confidence is not a number.
    """
    check_numbers(table.confidence, path)
    with atomic_write(path) as tmp:
        torch.save({'setup': setup, 'thresholds': table.confidence, 'predictions': table.correct}, tmp)


def _read(path: str | Path) -> tuple[torch.Tensor, torch.Tensor, str]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # says that it may fail; we say if it does
            values = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as e:  # a damaged pickle raises errors of any kind
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"truncated, or no table of AnchorNet's ({reason})") from e
    names = {'setup', 'thresholds', 'predictions'}
    if not isinstance(values, dict) or not names <= values.keys():
        found = sorted(map(str, values))[:8] if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"a table of AnchorNet's has {sorted(names)}, found {found}")
    confidence, correct = values['thresholds'], values['predictions']
    if not isinstance(confidence, torch.Tensor) or not isinstance(correct, torch.Tensor):
        raise ValueError("'thresholds' and 'predictions' are not both tensors")
    if confidence.ndim != 2 or confidence.shape != correct.shape:
        raise ValueError(
            f'expected thresholds and predictions of the same shape [N, K], got {list(confidence.shape)} and '
            f'{list(correct.shape)}')
    return confidence, correct, str(values['setup'])


def _step_macs_of(setup: str, steps: int, anchor_macs: int) -> list[int]:
    net = re.split(r'[_ ]', setup)[0]
    if net not in _PASS_MACS:
        raise ValueError(
            f'the costs of its setup {setup!r} are not known (known: {sorted(_PASS_MACS)}): give step_macs, or '
            f'validate.py the model')
    return [t * _PASS_MACS[net] + (anchor_macs if t > 1 else 0) for t in range(1, steps + 1)]
