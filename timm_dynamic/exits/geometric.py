"""The rule of GFNet's paper for thresholds."""
import math
from collections.abc import Sequence

import torch

from .table import ExitTable


def geometric_thresholds(table: ExitTable, p: int) -> torch.Tensor:
    """Thresholds of GFNet's paper (arXiv 2010.05300, 'budgeted batch classification'): exits fall geometrically.

    The share of the samples that stop at step t is proportional to (p / 20)^t. A threshold is the confidence of the
    last sample that must stop to make up the share, among those that have not stopped. As in the released code, in
    float32: shares times N are rounded down, and if that is 0, or fewer samples are left, no sample stops (1e8).

    Args:
        table: The table to calibrate on.
        p: 1..39; the larger, the later samples stop.

    Returns:
        [T] float32, the last one -1e8.

    Raises:
        ValueError: p is not an integer in 1..39.
    """
    if isinstance(p, bool) or p not in range(1, 40):
        raise ValueError(f'p must be an integer in 1..39, got {p!r}.')
    return _fit(table, [p])[0]


def all_geometric_thresholds(table: ExitTable) -> list[torch.Tensor]:
    """`geometric_thresholds` for p = 1..39."""
    return _fit(table, range(1, 40))


def _fit(table: ExitTable, numbers: Sequence[int]) -> list[torch.Tensor]:
    columns = table.confidence.nan_to_num(nan=-math.inf).T.contiguous()[:-1]
    values, order = columns.sort(dim=1, descending=True)
    all_thresholds = []
    for p in numbers:
        ratio = torch.tensor([p / 20], dtype=torch.float32)
        shares = torch.exp(torch.log(ratio) * torch.arange(1, table.num_steps + 1))
        shares = shares / shares.sum()
        thresholds = torch.full((table.num_steps,), 1e8)
        staying = torch.ones(table.num_samples, dtype=torch.bool)
        for t, column in enumerate(columns):
            num_ahead = staying[order[t]].cumsum(dim=0)  # from the most confident sample on
            count = math.floor(table.num_samples * shares[t])
            if 0 < count <= num_ahead[-1]:
                thresholds[t] = values[t, torch.searchsorted(num_ahead, count)]
            staying &= ~(column >= thresholds[t])
        thresholds[-1] = -1e8
        all_thresholds.append(thresholds)
    return all_thresholds
