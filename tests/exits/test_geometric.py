from pathlib import Path

import numpy as np
import pytest
import torch

from timm_dynamic.exits import ExitTable, geometric_thresholds

MACS = [760_000_000, 1_570_000_000, 2_380_000_000, 3_180_000_000, 3_990_000_000]


@pytest.fixture(scope='module')
def reference():
    """What the released code of GFNet gave on fabricated probabilities, of which these are largest value and hit."""
    with np.load(Path(__file__).parent / 'data' / 'gfnet_thresholds.npz') as arrays:
        arrays = dict(arrays)
    tables = {s: ExitTable(arrays[f'{s}_confidence'], arrays[f'{s}_correct'], MACS) for s in ('calib', 'eval')}
    return tables, arrays


@pytest.mark.parametrize('p', range(1, 40))
def test_geometric_thresholds_are_the_original_ones(reference, p):
    tables, arrays = reference
    thresholds = geometric_thresholds(tables['calib'], p)
    assert thresholds.tolist() == arrays['thresholds'][p - 1].tolist()
    calib, point = tables['calib'].evaluate(thresholds), tables['eval'].evaluate(thresholds)
    assert (point.steps_used - 1).tolist() == arrays['eval_exit_step'][p - 1].tolist()
    counts = arrays['eval_exit_counts'][p - 1].tolist()
    assert torch.bincount(point.steps_used, minlength=6)[1:].tolist() == counts
    assert point.exit_shares.tolist() == [count / 400 for count in counts]
    row = arrays['rows_f64'][p - 1]  # p, then accuracy in % and multiply-adds in float32, on both tables
    assert (p, calib.top1, point.top1) == (row[0], *(round(float(r), 4) for r in row[[1, 3]]))
    assert [calib.gmacs * 1e9, point.gmacs * 1e9] == pytest.approx(row[[2, 4]], rel=2e-7)


def test_geometric_thresholds_by_hand():
    # p = 20: equal shares of 6 samples for 3 steps, 2 each. Step 1: 0.9, 0.8 leave. Of the others, at step 2: 0.7 and
    # 0.6 (the first sample's 0.99 is out already).
    table = ExitTable(
        [[0.9, 0.99, 0], [0.8, 0.1, 0], [0.7, 0.5, 0], [0.3, 0.6, 0], [0.2, 0.7, 0], [0.1, 0.2, 0]],
        [[True] * 3] * 6, [1, 2, 3])
    assert geometric_thresholds(table, 20).tolist() == torch.tensor([0.8, 0.6, -1e8]).tolist()


def test_corner_cases_of_the_original():
    """manifest.json of the fixture: ties leave together, so nobody is left; and a share of less than one sample."""
    tied = ExitTable([[0.5] * 3] * 9, [[True] * 3] * 9, [1, 2, 3])
    assert geometric_thresholds(tied, 20).tolist() == [0.5, 1e8, -1e8]
    # p = 39: shares 1.95, 3.8, 7.4 of 13.2, of 5 samples: 0.74, 1.44: none at step 1, one at step 2.
    few = ExitTable([[0.1, 0.2 * i, 0] for i in range(5)], [[True] * 3] * 5, [1, 2, 3])
    assert geometric_thresholds(few, 39).tolist() == torch.tensor([1e8, 0.8, -1e8]).tolist()
    # 0.95 of 10 samples: 9 leave at step 1; 0.0475 of them is none.
    ten = ExitTable([[0.1 * i, 0.5, 0.5] for i in range(10)], [[True] * 3] * 10, [1, 2, 3])
    assert geometric_thresholds(ten, 1).tolist() == torch.tensor([0.1, 1e8, -1e8]).tolist()


@pytest.mark.parametrize('p', [0, 40, -1, 1.5, True, None, '3'])
def test_geometric_thresholds_out_of_range(p):
    with pytest.raises(ValueError, match=r'p must be an integer in 1\.\.39'):
        geometric_thresholds(ExitTable([[0.5]], [[True]], [1]), p)
