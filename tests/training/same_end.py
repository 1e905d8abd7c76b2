"""What a run that was interrupted must share with one that was not."""
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from timm_dynamic.training.run_folder import CheckpointManager


def equal(a: Any, b: Any) -> bool:
    """Whether two states of a run are the same: types, keys and values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def check_same_end(reference: Path, other: Path, folders: Iterable[str]) -> None:
    """Check that two runs left the same bytes in the folders of their stages, and the same state."""
    for folder in folders:
        for name in ('last', 'best'):
            left = sorted((reference / folder / name).iterdir())
            assert [p.name for p in left] == sorted(p.name for p in (other / folder / name).iterdir())
            for path in left:
                assert path.read_bytes() == (other / folder / name / path.name).read_bytes(), path
        rows = [list(csv.DictReader((run / folder / 'summary.csv').open())) for run in (reference, other)]
        for row in rows[0] + rows[1]:
            del row['seconds']
        assert rows[0] == rows[1]
    for file in ('results.csv', 'results.json'):
        assert (reference / file).read_bytes() == (other / file).read_bytes()
    states = [CheckpointManager(run / 'state').load() for run in (reference, other)]
    for name in ('optimizer', 'model', 'ema', 'best', 'totals'):
        assert equal(states[0][name], states[1][name]), name
