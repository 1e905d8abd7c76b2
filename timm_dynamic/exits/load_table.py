"""Exit tables of any format."""
from collections.abc import Sequence
from pathlib import Path

from .anchornet_table import load_anchornet_table
from .table import ExitTable


def load_exit_table(
        path: str | Path,
        step_macs: Sequence[int] | None = None,
        steps: int | None = None,
        anchor_macs: int = 60_000_000,
) -> ExitTable:
    """Read an exit table of any format: the file's first bytes say which.

    Args:
        path: What `ExitTable.save` wrote, or a table of winycg/AnchorNet, see `load_anchornet_table`.
        step_macs: Costs, for AnchorNet tables, which have none.
        steps: Number of steps to read, from the first; by default all.
        anchor_macs: For AnchorNet tables without `step_macs`.

    Raises:
        ValueError: The file is no exit table or is damaged; costs are not known, or given for a table that has its own.
    """
    with open(path, 'rb') as f:
        head = f.read(2)
    if head == b'PK' or head[:1] == b'\x80':  # torch's zip, and its old pickle
        return load_anchornet_table(path, step_macs, steps, anchor_macs)
    if step_macs is not None:
        raise ValueError(f'{path} has costs of its own: step_macs can be given for AnchorNet tables only.')
    table = ExitTable.load(path)
    if steps is None:
        return table
    try:
        return table.first_steps(steps)
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from e
