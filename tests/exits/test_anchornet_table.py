import csv
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED

from timm_dynamic.exits import ExitTable, load_exit_table
from timm_dynamic.exits.anchornet_table import load_anchornet_table, save_anchornet_table

OFFICIAL = SHARED / 'parity' / 'anchornet'
NEED_OFFICIAL = pytest.mark.skipif(
    not (OFFICIAL / 'official_table.npz').exists(),
    reason='not run: the official AnchorNet table of 50,000 images is not beside the repository (../shared)')


@pytest.fixture
def table():
    return ExitTable(
        [[0.9, 0.1, 0.2], [0.5, 0.8, 0.9], [0.5, 0.6, 0.1], [0.2, 0.3, 0.4]],
        [[True, True, True], [False, True, True], [True, False, False], [False, False, True]],
        [10**9, 2 * 10**9, 4 * 10**9])


@pytest.mark.parametrize('zipped', [True, False])
def test_round_trip(table, tmp_path, zipped):
    file = tmp_path / 'densenet201_95_0.3_0.pth'
    save_anchornet_table(table, file, 'densenet201_95_[0.3, 0.3]')
    values = torch.load(file, weights_only=True)
    assert {k: getattr(v, 'dtype', v) for k, v in values.items()} == {
        'setup': 'densenet201_95_[0.3, 0.3]', 'thresholds': torch.float32, 'predictions': torch.bool}
    torch.save(values, file, _use_new_zipfile_serialization=zipped)  # the original's torch 1.8 can write either
    again = load_exit_table(file)
    assert torch.equal(again.confidence, table.confidence)
    assert torch.equal(again.correct, table.correct)
    assert again.step_macs == (790_000_000, 1_640_000_000, 2_430_000_000)  # 0.79, then 0.06 + 0.79 t
    assert load_anchornet_table(file, anchor_macs=80_000_000).step_macs[1] == 1_660_000_000
    assert load_anchornet_table(file, step_macs=[1, 2, 3]).step_macs == (1, 2, 3)
    assert load_exit_table(file, [1, 2, 3], steps=2).step_macs == (1, 2)
    assert load_exit_table(file, steps=2, anchor_macs=0).step_macs == (790_000_000, 1_580_000_000)
    save_anchornet_table(table, file, 'resnet50_95_[0.3, 0.3]')
    assert load_anchornet_table(file).step_macs[0] == 752_000_000


def test_bad_files(table, tmp_path):
    file = tmp_path / 'table.pth'
    save_anchornet_table(table, file, 'vgg_95')
    with pytest.raises(ValueError, match=r"costs of its setup 'vgg_95' are not known.*give step_macs"):
        load_anchornet_table(file)
    with pytest.raises(ValueError, match='it has 3 columns, step_macs has 2'):
        load_anchornet_table(file, step_macs=[1, 2])
    whole = file.read_bytes()
    for size in (3, 200, len(whole) - 30):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r'table.pth cannot be read as an exit table: truncated'):
            load_anchornet_table(file)
    torch.save({'net': {}, 'epoch': 3}, file)
    with pytest.raises(ValueError, match=r"has \['predictions', 'setup', 'thresholds'\], found \['epoch', 'net'\]"):
        load_anchornet_table(file)
    torch.save([1], file)
    with pytest.raises(ValueError, match='found list'):
        load_anchornet_table(file)
    setup, ok = 'densenet201_95', torch.zeros(2, 3, dtype=torch.bool)
    for thresholds, predictions, message in [
            (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), 'got int64'),  # labels, as its README says
            (torch.zeros(2, 3), ok[:, :2], r'the same shape \[N, K\], got \[2, 3\] and \[2, 2\]'),
            (torch.zeros(3), ok[0], r'the same shape \[N, K\], got \[3\]'),
            (torch.zeros(()), ok, r'the same shape \[N, K\], got \[\]'),
            (torch.full((2, 3), torch.nan), ok, '2 of 2 samples .* not numbers'),
            ([[0.5]], ok, 'not both tensors'),
    ]:
        torch.save({'setup': setup, 'thresholds': thresholds, 'predictions': predictions}, file)
        with pytest.raises(ValueError, match=message):
            load_anchornet_table(file)
    save_anchornet_table(table, file, setup)
    with pytest.raises(ValueError, match='it has 3 columns, 4 steps were asked for'):
        load_anchornet_table(file, steps=4)
    with pytest.raises(ValueError, match=r'not numbers \(.*table.pth\)'):
        save_anchornet_table(ExitTable([[torch.nan]], [[True]], [1]), file, setup)
    with pytest.raises(FileNotFoundError):
        load_anchornet_table(tmp_path / 'none.pth')


@pytest.mark.parametrize('save', [ExitTable.save, lambda table, file: save_anchornet_table(table, file, 'densenet201')])
def test_damaged_files_are_one_kind_of_error(table, tmp_path, save):
    """A table reads as one, or raises a ValueError that names the file."""
    file, rng = tmp_path / 'table.pth', random.Random(0)
    save(table, file)
    whole, refused = file.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            assert load_exit_table(file).num_steps > 0
        except ValueError as e:
            assert str(file) in str(e)  # noqa: PT017
            refused += 1
    assert refused > 50


def test_foreign_code_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'harm'),)

    torch.save({'setup': Harmful(), 'thresholds': torch.zeros(1, 1), 'predictions': torch.zeros(1, 1)},
               tmp_path / 'table.pth')
    with pytest.raises(ValueError, match='cannot be read as an exit table'):
        load_anchornet_table(tmp_path / 'table.pth')
    assert not (tmp_path / 'harm').exists()


@NEED_OFFICIAL
@pytest.mark.parametrize(('anchor_macs', 'costs_reproduced'), [(80_000_000, 34), (60_000_000, 21)])
def test_published_points_of_anchornet(tmp_path, anchor_macs, costs_reproduced):
    """All 34 accuracies, and all costs with the charge the published list was made with, to the printed digit."""
    arrays = np.load(OFFICIAL / 'official_table.npz')
    six = {  # the file as released has a sixth column
        'setup': 'densenet201_95_[0.3, 0.3, 0.3, 0.3]',
        'thresholds': torch.tensor(np.concatenate([arrays['thresholds'], arrays['thresholds_column6'][:, None]], 1)),
        'predictions': torch.tensor(np.concatenate([arrays['predictions'], arrays['predictions_column6'][:, None]], 1)),
    }
    torch.save(six, tmp_path / 'official.pth')
    table = load_anchornet_table(tmp_path / 'official.pth', steps=5, anchor_macs=anchor_macs)
    assert (len(table), table.num_steps) == (50_000, 5)
    rows = json.loads((OFFICIAL / 'official_acc_flops.json').read_text())['rows']
    costs = 0
    for row in rows:
        point = table.evaluate(row['thresholds'], strict=True)
        assert round(point.top1 / 100, 4) == row['acc']
        assert (point.exit_shares * 50_000).round().long().tolist() == row['stage_num']
        assert table.evaluate(row['thresholds']).top1 == point.top1  # >= gives the same on real data
        costs += round(point.gmacs, 2) == row['gflops']
    assert costs == costs_reproduced


def published_points():
    """The 34 operating points of AnchorNet's published list, and how many images of 50,000 stop where, rightly."""
    with open(Path(__file__).parent / 'data' / 'anchornet_points.csv', newline='') as f:
        return [{k: [float(v) for v in text.split()] for k, text in row.items()} for row in csv.DictReader(f)]


def test_published_points_by_their_counts(tmp_path):
    """To the printed digit, from tables in which all that go on have just the threshold: it must be exceeded."""
    points = published_points()
    assert len(points) == 34
    for point in points:
        thresholds, stopped = (torch.tensor(point[k]) for k in ('thresholds', 'stopped'))
        steps = torch.arange(5).repeat_interleave(stopped.long())
        confidence = thresholds.expand(50_000, 5).clone()
        rows = torch.arange(50_000)
        confidence[rows, steps] = torch.nextafter(thresholds, torch.tensor(2.))[steps]
        first = torch.cat([torch.zeros(1), stopped]).cumsum(0)[:5]
        right = rows - first[steps] < torch.tensor(point['right'])[steps]
        correct = torch.zeros(50_000, 5, dtype=torch.bool)
        correct[rows, steps] = right
        torch.save({'setup': 'densenet201_95_[0.3, 0.3, 0.3, 0.3]', 'thresholds': confidence, 'predictions': correct},
                   tmp_path / 'table.pth')
        found = load_anchornet_table(tmp_path / 'table.pth', anchor_macs=80_000_000).evaluate(thresholds, strict=True)
        assert [round(found.top1 / 100, 4)] == point['acc']
        assert [round(found.gmacs, 2)] == point['gmacs']
        assert (50_000 * found.exit_shares).round().tolist() == point['stopped']
