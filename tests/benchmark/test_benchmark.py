import json

import pytest
import timm
import torch
from helpers import run_python

from timm_dynamic.benchmark import (
    benchmark_crop,
    benchmark_exit,
    benchmark_exits,
    benchmark_loader,
    benchmark_train_step,
    benchmark_windows,
    crop,
    run_benchmark,
    time_interleaved,
    train_step,
    windows,
)
from timm_dynamic.exits import ExitTable, solve_thresholds
from timm_dynamic.utils.report import read_rows


def test_timing_takes_turns():
    order = []
    seconds = time_interleaved({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, repeats=3)
    assert order == [*'aabb', *'ababab']  # twice beforehand, then by turns
    assert set(seconds) == {'a', 'b'}
    assert all(0 < s < 1 for s in seconds.values())


@pytest.mark.parametrize('channels_last', [False, True])
def test_crop(channels_last, tmp_path):
    file = tmp_path / 'new' / 'crop.json'
    rows = run_benchmark([
        'crop', '--batch-size', '3', '--img-size', '20', '--patch-size', '8', '--device', 'cpu', '--repeats', '2',
        '--results-file', str(file), *['--channels-last'] * channels_last])
    assert json.loads(file.read_text()) == rows
    assert [row['crop'] for row in rows] == ['loop', 'vectorised']
    for row in rows:
        assert (row['batch_size'], row['img_size'], row['patch_size']) == (3, 20, 8)
        assert row['channels_last'] is channels_last
        assert row['images_per_s'] == pytest.approx(3000 / row['ms'])
        assert row['speedup'] == pytest.approx(rows[0]['ms'] / row['ms'])


def test_crop_is_checked_before_it_is_timed(monkeypatch):
    monkeypatch.setattr(crop, 'crop_patches', lambda images, coords, size: images[:, :, :size, :size])
    with pytest.raises(AssertionError, match='not those of the loop'):
        benchmark_crop(2, 20, 8, repeats=1)


def test_windows():
    rows = run_benchmark(['windows', '--batch-size', '16', '--repeats', '1'])
    assert [row['windows'] for row in rows] == ['loop', 'loop, plain numbers', 'vectorised']
    assert [row['speedup'] for row in rows] == pytest.approx([rows[0]['ms'] / row['ms'] for row in rows])
    assert rows[2]['speedup'] > 5  # 16 maps only, and the machine may be busy


def test_windows_are_checked_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(windows, 'choose_windows', lambda cam, *args: (
        torch.arange(5).expand(len(cam), 5), torch.full((len(cam),), 5)))
    with pytest.raises(AssertionError, match='not that of the loop'):
        benchmark_windows(2, repeats=1)
    with pytest.raises(ValueError, match='Expected positive numbers, got batch size 0, 5 windows'):
        benchmark_windows(0)
    with pytest.raises(ValueError, match="There is no device 'nowhere'"):
        benchmark_windows(device='nowhere')


@pytest.mark.parametrize(('args', 'message'), [
    (dict(patch_size=30), 'A patch of 30 pixels is larger than the image of 20'),
    (dict(repeats=0), 'Expected positive numbers.*0 repeats'),
    (dict(batch_size=0), 'Expected positive numbers, got batch size 0'),
    (dict(device='nowhere'), "There is no device 'nowhere'"),
])
def test_bad_crop(args, message):
    with pytest.raises(ValueError, match=message):
        benchmark_crop(**{'batch_size': 2, 'img_size': 20, 'patch_size': 8, **args})


@pytest.fixture(scope='module')
def table():
    """Right with a probability of the confidence. Step 2 halves the distance to 1, step 3 adds almost nothing."""
    generator = torch.Generator().manual_seed(0)
    u, luck = torch.rand(2, 2000, 1, generator=generator)
    confidence = 1 - (1 - u) * torch.tensor([1., 0.5, 0.45])
    return ExitTable(confidence, luck < confidence, [10**9, 2 * 10**9, 3 * 10**9])


def test_exits(table, tmp_path, caplog):
    """The default rivals spend without regard to what a step gains."""
    table.save(tmp_path / 'table.safetensors')
    file = tmp_path / 'exits.csv'
    rows = run_benchmark(['exits', str(tmp_path / 'table.safetensors'), '--splits', '1', '--results-file', str(file)])
    assert [row['rival'] for row in rows] == [*map(str, range(1, 40)), 'all']
    total = rows[-1]
    assert total['gain'] == pytest.approx(sum(row['gain'] for row in rows[:-1]) / 39)
    assert total['least_gain'] == min(row['least_gain'] for row in rows[:-1])
    assert total['share'] == pytest.approx(total['gain'] / total['oracle_gain'])
    assert total['gain'] > 0
    assert 0 < total['solve_seconds'] < 5
    assert read_rows(file)[-1]['gain'] == pytest.approx(total['gain'])


@pytest.mark.parametrize('method', ['thresholds', 'value'])
def test_exits_against_given_rivals(table, method, tmp_path):
    table.save(tmp_path / 'table.safetensors')
    good, bad = solve_thresholds(table, 1.5).tolist(), [-1., 0., 0.]
    bad[0] = table.confidence[:, 0].quantile(0.5).item()  # as many go on, but all to the end
    rivals = tmp_path / 'rivals.json'
    rivals.write_text(json.dumps([good, {'thresholds': [bad[0], 2., 0.], 'top1': 1}]))
    rows = run_benchmark([
        'exits', str(tmp_path / 'table.safetensors'), '--rivals', str(rivals), '--splits', '2', '--no-oracle',
        '--budget-rule', method])
    assert [row['rival'] for row in rows] == ['1', '2', 'all']
    assert rows[0]['gmacs'] == table.evaluate(good).gmacs
    assert rows[0]['top1'] == table.evaluate(good).top1
    assert abs(rows[0]['gain']) < 1
    assert rows[1]['gain'] > 1
    assert 'oracle_gain' not in rows[2]


def test_bad_rivals(table, tmp_path):
    table.save(tmp_path / 'table.safetensors')
    file = tmp_path / 'rivals.json'
    for text, message in [
            ('[[0.5, 0.5]]', 'Expected 3 thresholds'),
            ('[]', 'at least one rival'),
            ('{', 'expected a JSON list of thresholds'),
            ('[{"top1": 1}]', 'expected a JSON list of thresholds'),
            ('[[null, 0, 0]]', 'expected a JSON list of thresholds'),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run_benchmark(['exits', str(tmp_path / 'table.safetensors'), '--rivals', str(file)])
    with pytest.raises(ValueError, match='at least one rival and one split, got 1 and 0'):
        benchmark_exits(table, [[0.5] * 3], splits=0)


def test_script():
    result = run_python('benchmark.py', 'crop', '-b', '2', '--img-size', '20', '--patch-size', '8', '--repeats', '1')
    assert 'vectorised' in result.stdout
    result = run_python('benchmark.py', 'crop', '--patch-size', '300', check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == 'ValueError: A patch of 300 pixels is larger than the image of 224.'
    assert run_python('benchmark.py', check=False).returncode == 2


@pytest.mark.parametrize('arguments', [{}, {'step_classifier': 'concat'}, {'first_head': True}])
def test_train_step(arguments, monkeypatch):
    model = timm.create_model('test_gfnet', img_size=32, patch_size=16, num_classes=3, **arguments)
    monkeypatch.setattr(train_step.timm, 'create_model', lambda name: model)
    rows = benchmark_train_step('test_gfnet', 3, repeats=1)
    assert [row['train-step'] for row in rows] == ['loop', 'vectorised']
    assert all(row['images_per_s'] == pytest.approx(3000 / row['ms']) for row in rows)
    monkeypatch.setattr(train_step, '_loop', lambda task, images, target, actions: task(images, target)['loss'])
    with pytest.raises(AssertionError, match='another gradient than the loop'):
        benchmark_train_step('test_gfnet', 3, repeats=1)


@pytest.mark.parametrize('flags', [[], ['--channels-last', '--amp-dtype', 'bfloat16']])
def test_train_step_of_a_focusnet(flags, monkeypatch):
    seconds = {'plain step': [1., 2., 4.], 'baseline forward': [0.5, 1., 1.], 'focus step': [1.8, 3., 5.1]}

    def time_each(steps, repeats, device):
        for step in steps.values():
            step()
        assert (list(steps), repeats) == (list(seconds), 3)
        return seconds

    monkeypatch.setattr(train_step, 'time_each', time_each)
    rows = run_benchmark(['train-step', '--model', 'test_focusnet', '-b', '2', '--repeats', '3', *flags])
    assert [row['train-step'] for row in rows] == list(seconds)
    assert [row['ms'] for row in rows] == [2000, 1000, 3000]
    assert [row['images_per_s'] for row in rows] == [1, 2, pytest.approx(2 / 3)]
    assert [row['overhead'] for row in rows] == [None, None, pytest.approx(0.02)]  # median of 0.2, 0 and 0.02


def test_train_step_of_what_has_none():
    with pytest.raises(ValueError, match=r"a GFNet or a network without steps, .*; got 'test_clcnet'"):
        benchmark_train_step('test_clcnet')


def test_confidence(tmp_path):
    rows = run_benchmark([
        'confidence', '-b', '64', '--classes', '150', '300', '--part', '8', '--repeats', '1',
        '--results-file', str(tmp_path / 'rows.json')])
    assert [(r['confidence_net'], r['classes'], r['rows']) for r in rows] == [
        ('straightforward', 150, 8), ('timm_dynamic', 150, 64), ('straightforward', 300, 8), ('timm_dynamic', 300, 64)]
    slow, fast, slow2, fast2 = rows
    assert fast2['speedup'] > 0
    assert slow2['speedup'] == 1
    assert slow2['largest_mib'] == pytest.approx(4 * slow['largest_mib'])  # quadratic in the classes
    assert fast2['largest_mib'] <= 2.01 * fast['largest_mib']
    with pytest.raises(ValueError, match='got batch size 0'):
        run_benchmark(['confidence', '-b', '0'])


@pytest.mark.parametrize('model', ['test_gfnet', 'test_clcnet'])
def test_exit(model, capsys):
    args = ['exit', '--model', model, '--batch-size', '8', '--num-images', '44', '--repeats', '1', '--json',
            '--latency-images', '2', '--channels-last', '--fuse']
    rows = run_benchmark([*args, *(['--exit-shares', '50', '25', '25'] if model == 'test_gfnet' else [])])
    assert json.loads(capsys.readouterr().out) == rows
    net = timm.create_model(model)
    assert [row['exit'].split()[0] for row in rows] == [
        'static', 'static', 'all', 'early_exit', 'ExitStream', *['step'] * net.num_steps]
    static, plain, all_steps, batches, stream = rows[:5]
    assert plain['exit'] == static['exit'] + ', plain'
    assert stream['x_plain'] == pytest.approx(stream['images_per_s'] / plain['images_per_s'])
    assert all_steps['gmacs'] == pytest.approx(net.step_macs[-1] / 1e9)
    # 44 images are noise, of which the first 4 come twice
    assert batches['exit_shares'] == stream['exit_shares']
    wanted = [0.5, 0.25, 0.25] if model == 'test_gfnet' else [0.6, 0.4]
    assert stream['exit_shares'] == pytest.approx(wanted, abs=0.06)
    table_gmacs = sum(share * macs for share, macs in zip(stream['exit_shares'], net.step_macs)) / 1e9
    assert stream['gmacs'] == pytest.approx(table_gmacs, rel=1e-3)
    assert stream['macs_static'] == pytest.approx(static['gmacs'] / stream['gmacs'])
    assert stream['x_static'] == pytest.approx(stream['images_per_s'] / static['images_per_s'])
    assert batches['x_all_steps'] == pytest.approx(batches['images_per_s'] / all_steps['images_per_s'])
    unit = [1 / row['images_per_s'] for row in rows[5:]]
    needed = sum(share * sum(unit[:t + 1]) for t, share in enumerate(stream['exit_shares']))
    assert stream['efficiency'] == pytest.approx(needed * stream['images_per_s'], rel=1e-3)
    assert static['latency_ms'] > 0
    assert stream['latency_ms'] is None


@pytest.mark.parametrize(('args', 'message'), [
    (dict(repeats=0), 'Expected positive numbers.*0 repeats'),
    (dict(model='test_focusnet'), "'test_focusnet' has no steps"),
    (dict(static='resnet51'), "There is no model 'resnet51'"),
    (dict(cuda_graphs=True), '--cuda-graphs needs --torchcompile'),
    (dict(exit_shares=[1, 1]), 'Expected 3 exit shares'),
    (dict(exit_shares=[1, -1, 1]), 'none below 0'),
])
def test_bad_exit(args, message):
    with pytest.raises(ValueError, match=message):
        benchmark_exit(**{'model': 'test_gfnet', **args})


@pytest.mark.parametrize('benchmark', ['exit', 'train-step', 'crop', 'windows', 'confidence'])
def test_names_are_checked_before_anything_is_measured(benchmark, tmp_path):
    size = ['--patch-size', '8', '--img-size', '20'] if benchmark == 'crop' else []
    with pytest.raises(ValueError, match="There is no device 'nowhere'"):
        run_benchmark([benchmark, '-b', '2', *size, '--device', 'nowhere'])
    for file in (tmp_path, tmp_path / 'rows.txt'):
        with pytest.raises(ValueError, match=r'--results-file: expected a file that ends in \.csv or \.json'):
            run_benchmark([benchmark, '--results-file', str(file), '--device', 'nowhere'])
    if benchmark in ('exit', 'train-step'):
        with pytest.raises(ValueError, match=r"There is no model 'test_gfnett'\. Did you mean test_gfnet"):
            run_benchmark([benchmark, '--model', 'test_gfnett'])


def test_thresholds():
    rows = run_benchmark(['thresholds', '--num-images', '500', '--num-steps', '3', '--repeats', '1'])
    assert [row['thresholds'].split(',')[0] for row in rows] == [
        'first solve of a table', 'solve_thresholds', 'solve_policy', *['solve_curve'] * 2, 'geometric_thresholds',
        *['evaluate'] * 2]
    assert all((row['images'], row['steps']) == (500, 3) and row['ms'] > 0 for row in rows)
    with pytest.raises(ValueError, match='got 0 and 3'):
        run_benchmark(['thresholds', '--num-images', '0', '--num-steps', '3'])


def test_loader():
    rows = run_benchmark(['loader', '--batch-size', '4', '--num-batches', '2', '--workers', '0', '1'])
    assert [row['loader'] for row in rows] == ['0 workers', '1 workers']
    assert all(row['images_per_s'] > 0 and row['first_batch_s'] > 0 for row in rows)
    with pytest.raises(ValueError, match='batches of 64 were asked for'):
        benchmark_loader(num_batches=10**6)
