"""The benchmarks of single parts, in benchmarks/."""
import itertools
import json
import math
import runpy
import sys

import pytest
import timm
import torch

from benchmarks import crop, train_step, windows
from benchmarks.__main__ import parser
from benchmarks.crop import benchmark_crop
from benchmarks.exits import benchmark_exits, compare_with_given
from benchmarks.families import FAMILIES, benchmark_families, best_thresholds
from benchmarks.loader import benchmark_loader
from benchmarks.train_step import benchmark_train_step
from benchmarks.windows import benchmark_windows
from timm_dynamic.benchmark import run_benchmark
from timm_dynamic.exits import ExitTable, solve_thresholds
from timm_dynamic.utils.report import read_rows


def run(*argv):
    return run_benchmark([str(arg) for arg in argv], parser)


def test_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmarks', 'crop', '-b', '2', '--patch-size', '300'])
    monkeypatch.delitem(sys.modules, 'benchmarks.__main__')  # imported above
    with pytest.raises(SystemExit, match='1'):
        runpy.run_module('benchmarks', run_name='__main__')
    assert capsys.readouterr().err == 'ValueError: A patch of 300 pixels is larger than the image of 224.\n'


@pytest.mark.parametrize('benchmark', ['train-step', 'crop', 'windows', 'confidence'])
def test_devices_are_checked(benchmark):
    with pytest.raises(ValueError, match="There is no device 'nowhere'"):
        run(benchmark, '-b', 2, '--device', 'nowhere')


# crop

@pytest.mark.parametrize('channels_last', [False, True])
def test_crop(channels_last, tmp_path):
    file = tmp_path / 'new' / 'crop.json'
    rows = run('crop', '--batch-size', 3, '--img-size', 20, '--patch-size', 8, '--repeats', 2,
               '--results-file', file, *['--channels-last'] * channels_last)
    assert json.loads(file.read_text()) == rows
    assert [row['crop'] for row in rows] == ['loop', 'vectorised']
    for row in rows:
        assert (row['batch_size'], row['img_size'], row['patch_size']) == (3, 20, 8)
        assert row['channels_last'] is channels_last
        assert row['images_per_s'] == pytest.approx(3000 / row['ms'])
        assert row['speedup'] == pytest.approx(rows[0]['ms'] / row['ms'])


def test_crop_is_checked_before_it_is_timed(monkeypatch):
    monkeypatch.setattr(crop, 'crop_patches', lambda images, coords, size: images[:, :, :size, :size])
    with pytest.raises(AssertionError, match='differ from those of the loop'):
        benchmark_crop(2, 20, 8, repeats=1)


@pytest.mark.parametrize(('args', 'message'), [
    (dict(patch_size=30), 'A patch of 30 pixels is larger than the image of 20'),
    (dict(repeats=0), 'Expected positive numbers.*0 repeats'),
    (dict(batch_size=0), 'Expected positive numbers, got batch size 0'),
])
def test_bad_crop(args, message):
    with pytest.raises(ValueError, match=message):
        benchmark_crop(**{'batch_size': 2, 'img_size': 20, 'patch_size': 8, **args})


# windows

def test_windows():
    rows = run('windows', '--batch-size', 2, '--repeats', 1)
    assert [row['windows'] for row in rows] == ['loop', 'loop, plain numbers', 'vectorised']
    assert [row['speedup'] for row in rows] == pytest.approx([rows[0]['ms'] / row['ms'] for row in rows])


def test_windows_are_checked_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(windows, 'choose_windows', lambda cam, *args: (
        torch.arange(5).expand(len(cam), 5), torch.full((len(cam),), 5)))
    with pytest.raises(AssertionError, match='differs from that of the loop'):
        benchmark_windows(2, repeats=1)
    with pytest.raises(ValueError, match='Expected positive numbers, got batch size 0, 5 windows'):
        benchmark_windows(0)


# exits

@pytest.fixture(scope='module')
def table():
    """Correct with the confidence as probability. Step 2 halves the distance to 1, step 3 adds almost nothing."""
    generator = torch.Generator().manual_seed(0)
    u, luck = torch.rand(2, 2000, 1, generator=generator)
    confidence = 1 - (1 - u) * torch.tensor([1., 0.5, 0.45])
    return ExitTable(confidence, luck < confidence, [10**9, 2 * 10**9, 3 * 10**9])


@pytest.fixture(scope='module')
def table_file(table, tmp_path_factory):
    path = tmp_path_factory.mktemp('table') / 'table.safetensors'
    table.save(path)
    return path


def test_exits(table_file, tmp_path):
    """The paper's exits spend without regard to what a step gains."""
    file = tmp_path / 'exits.csv'
    rows = run('exits', table_file, '--splits', 1, '--results-file', file)
    assert [row['given'] for row in rows] == [*map(str, range(1, 40)), 'all']
    total = rows[-1]
    assert total['gain'] == pytest.approx(sum(row['gain'] for row in rows[:-1]) / 39)
    assert total['least_gain'] == min(row['least_gain'] for row in rows[:-1])
    assert total['share'] == pytest.approx(total['gain'] / total['oracle_gain'])
    assert total['gain'] > 0
    assert total['solve_seconds'] > 0
    assert read_rows(file)[-1]['gain'] == pytest.approx(total['gain'])


@pytest.mark.parametrize('method', ['thresholds', 'value'])
def test_exits_against_given_ones(table, table_file, method, tmp_path):
    good, bad = solve_thresholds(table, 1.5).tolist(), [-1., 0., 0.]
    bad[0] = table.confidence[:, 0].quantile(0.5).item()  # as many go on, but all to the end
    given = tmp_path / 'given.json'
    given.write_text(json.dumps([good, {'thresholds': [bad[0], 2., 0.], 'top1': 1}]))
    rows = run('exits', table_file, '--given', given, '--splits', 1, '--no-oracle', '--budget-rule', method)
    assert [row['given'] for row in rows] == ['1', '2', 'all']
    assert rows[0]['gmacs'] == table.evaluate(good).gmacs
    assert rows[0]['top1'] == table.evaluate(good).top1
    assert abs(rows[0]['gain']) < 1
    assert rows[1]['gain'] > 1
    assert 'oracle_gain' not in rows[2]


def test_bad_given_exits(table, table_file, tmp_path):
    file = tmp_path / 'given.json'
    for text, message in [
            ('[[0.5, 0.5]]', 'Expected 3 thresholds'),
            ('[]', 'at least one list of thresholds'),
            ('{', 'expected a JSON list of thresholds'),
            ('[{"top1": 1}]', 'expected a JSON list of thresholds'),
            ('[[null, 0, 0]]', 'expected a JSON list of thresholds'),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run('exits', table_file, '--given', file)
    with pytest.raises(ValueError, match='at least one list of thresholds and one split, got 1 and 0'):
        benchmark_exits(table, [[0.5] * 3], splits=0)


def test_comparison_by_hand():
    # The solver under test always gives the same two policies. On any half of this table, step 1 costs 1 and is
    # correct for all, step 2 costs 2 and is correct for none: their line is 100 % at 1, 0 % at 2. The given policy
    # stops at step 1 where the confidence is 1, a share s of the half. It is correct for these and costs 2 - s, so it
    # lies on the line, without gain or loss.
    confidence = torch.tensor([[0., 0.], [1., 1.]] * 20)
    table = ExitTable(confidence, torch.tensor([[True, False]] * 40), [10**9, 2 * 10**9])
    ends = [[0., 0.], [2., 0.]]
    result = compare_with_given(table, [[1., 0.]], range(2), lambda t: [t.evaluate(e) for e in ends])
    assert result['gains'].shape == result['oracle_gains'].shape == (4, 1)
    torch.testing.assert_close(result['gains'], torch.zeros(4, 1, dtype=torch.float64))
    # Now step 1 is correct only where the confidence is 0. The given policy stops where it is 1, wrong, and the others
    # go on, wrong: 0 %. The line falls from the share s of the others at cost 1 to 0 % at cost 2. The given policy
    # costs 1 + s: the gain is s (1 - s).
    worse = ExitTable(confidence, torch.tensor([[True, False], [False, False]] * 20), [10**9, 2 * 10**9])
    result = compare_with_given(worse, [[0.5, 0.]], range(1), lambda t: [t.evaluate(e) for e in ends], oracle=False)
    for gain, half in zip(result['gains'], worse.split(0.5, 0)[::-1]):
        s = (half.confidence[:, 0] == 0).double().mean().item()
        assert gain.item() == pytest.approx(100 * s * (1 - s))


# families

def test_families(table, table_file):
    names = ['logits x1', 'constant']
    rows = run('families', table_file, '--num-budgets', 3, '--families', *names)
    assert rows == benchmark_families(*table.split(), names, num_budgets=3)
    assert [row['family'] for row in rows] == names
    for row in rows:
        for method in ('thresholds', 'policy'):
            assert row[f'{method}_loss'] <= row[f'{method}_worst'] < 3  # 6 of 200 samples
    assert rows[1]['thresholds_loss'] == 0
    assert rows[1]['geometric_worst'] > 5  # cannot divide equal confidences, and stops all of them
    with pytest.raises(ValueError, match='at least one budget and one cut, got 0 and 20'):
        benchmark_families(table, table, num_budgets=0)


def test_families_keep_the_order_of_confidences():
    confidence = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None].expand(-1, 3)
    for convert in FAMILIES.values():
        assert (convert(confidence).diff(dim=0) >= 0).all()


@pytest.mark.parametrize('steps', [2, 3])
def test_best_thresholds_are_the_best(table, steps):
    table = table.subset(torch.arange(40)).first_steps(steps)
    points, budgets = best_thresholds(table, num_budgets=4, num_cuts=60)  # every sample is a cut
    cuts = [[-math.inf, *column.tolist(), math.inf] for column in table.confidence.T[:-1]]
    every = [table.evaluate([*thresholds, 0.]) for thresholds in itertools.product(*cuts)]
    for point, budget in zip(points, budgets):
        assert point.top1 == max(p.top1 for p in every if p.gmacs <= budget * (1 + 1e-9))
        assert point.gmacs <= budget * (1 + 1e-9)


# train-step

@pytest.mark.parametrize(('arguments', 'backend'), [
    ({}, 'eager'), ({'step_classifier': 'concat'}, None), ({'first_head': True}, None)])
def test_train_step(arguments, backend, monkeypatch):
    model = timm.create_model('test_gfnet', img_size=32, patch_size=16, num_classes=3, **arguments)
    monkeypatch.setattr(train_step.timm, 'create_model', lambda name: model)
    rows = benchmark_train_step('test_gfnet', 3, repeats=1, torchcompile=backend)
    assert [row['train-step'] for row in rows] == ['loop', 'vectorised', *['vectorised, compiled'] * bool(backend)]
    assert all(row['images_per_s'] == pytest.approx(3000 / row['ms']) for row in rows)
    monkeypatch.setattr(train_step, '_loop', lambda task, images, target: 2 * task(images, target)['loss'])
    with pytest.raises(AssertionError, match='another gradient than the loop'):
        benchmark_train_step('test_gfnet', 3, repeats=1)


@pytest.mark.parametrize('flags', [[], ['--channels-last', '--amp-dtype', 'bfloat16', '--torchcompile', 'eager']])
def test_train_step_of_a_focusnet(flags, monkeypatch):
    seconds = {'plain step': [1., 2., 4.], 'baseline forward': [0.5, 1., 1.], 'focus step': [1.8, 3., 5.1]}

    def time_each(steps, repeats, device):
        for step in steps.values():
            step()
        assert (list(steps), repeats) == (list(seconds), 3)
        return seconds

    monkeypatch.setattr(train_step, 'time_each', time_each)
    rows = run('train-step', '--model', 'test_focusnet', '-b', 2, '--repeats', 3, *flags)
    assert [row['train-step'] for row in rows] == list(seconds)
    assert [row['ms'] for row in rows] == [2000, 1000, 3000]
    assert [row['images_per_s'] for row in rows] == [1, 2, pytest.approx(2 / 3)]
    assert [row['overhead'] for row in rows] == [None, None, pytest.approx(0.02)]  # median of 0.2, 0 and 0.02


def test_train_step_needs_a_gfnet_or_a_static_network():
    with pytest.raises(ValueError, match=r"a GFNet or a network without steps, .*; got 'test_clcnet'"):
        benchmark_train_step('test_clcnet')
    with pytest.raises(ValueError, match=r"There is no model 'test_gfnett'\. Did you mean test_gfnet"):
        benchmark_train_step('test_gfnett')


# confidence, thresholds, loader

def test_confidence():
    rows = run('confidence', '-b', 64, '--classes', 150, 300, '--part', 8, '--repeats', 1)
    assert [(r['confidence_net'], r['classes'], r['rows']) for r in rows] == [
        ('straightforward', 150, 8), ('timm_dynamic', 150, 64), ('straightforward', 300, 8), ('timm_dynamic', 300, 64)]
    slow, fast, slow2, fast2 = rows
    assert fast2['speedup'] == pytest.approx(fast2['rows_per_s'] / slow2['rows_per_s'])
    assert slow2['speedup'] == 1
    assert slow2['largest_mib'] == pytest.approx(4 * slow['largest_mib'])  # quadratic in the classes
    assert fast2['largest_mib'] <= 2.01 * fast['largest_mib']
    with pytest.raises(ValueError, match='got batch size 0'):
        run('confidence', '-b', 0)


def test_thresholds():
    rows = run('thresholds', '--num-images', 500, '--num-steps', 3, '--repeats', 1)
    assert [row['thresholds'].split(',')[0] for row in rows] == [
        'first solve of a table', 'solve_thresholds', 'solve_policy', *['solve_curve'] * 2, 'geometric_thresholds',
        *['evaluate'] * 2]
    assert all((row['images'], row['steps']) == (500, 3) and row['ms'] > 0 for row in rows)
    with pytest.raises(ValueError, match='got 0 and 3'):
        run('thresholds', '--num-images', 0, '--num-steps', 3)


def test_loader():
    rows = run('loader', '--batch-size', 4, '--num-batches', 2, '--workers', 0, 1)
    assert [row['loader'] for row in rows] == ['0 workers', '1 workers']
    assert all(row['images_per_s'] > 0 and row['first_batch_s'] > 0 for row in rows)
    with pytest.raises(ValueError, match='batches of 64 were asked for'):
        benchmark_loader(num_batches=10**6)
