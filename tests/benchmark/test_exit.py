"""benchmark.py: its command line, and the exit benchmark."""
import json
import runpy
import sys

import pytest
import timm
from helpers import ROOT

from timm_dynamic.benchmark import benchmark_exit, benchmark_main, run_benchmark, time_interleaved
from timm_dynamic.data import DEMO_DATASET, create_dataset
from timm_dynamic.evaluation.predict import run_prediction
from timm_dynamic.utils.report import read_rows


def test_timing_takes_turns():
    order = []
    seconds = time_interleaved({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, repeats=3)
    assert order == [*'aabb', *'ababab']  # twice beforehand, then by turns
    assert set(seconds) == {'a', 'b'}
    assert all(s > 0 for s in seconds.values())


@pytest.mark.parametrize('model', ['test_gfnet', 'test_clcnet'])
def test_exit(model, capsys, tmp_path):
    args = ['exit', '--model', model, '--batch-size', '8', '--num-images', '44', '--repeats', '1', '--json',
            '--latency-images', '2', '--channels-last', '--fuse', '--results-file', str(tmp_path / 'new' / 'exit.csv')]
    rows = run_benchmark([*args, *(['--exit-shares', '50', '25', '25'] if model == 'test_gfnet' else [])])
    assert json.loads(capsys.readouterr().out) == rows
    assert [row['exit'] for row in read_rows(tmp_path / 'new' / 'exit.csv')] == [row['exit'] for row in rows]
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


@pytest.mark.parametrize('member', [False, True])
def test_own_exits_and_images(member, tmp_path):
    """The shares are those of the same policy on the same images, from a model with its own weights."""
    name = 'test_clcnet' if member else 'test_gfnet'
    model = timm.create_model(name, pretrained=True).eval()
    images = tmp_path / 'images' / 'validation' / 'any'
    images.mkdir(parents=True)
    demo = create_dataset(DEMO_DATASET, None, 'test', img_size=96)
    for i in range(20):
        demo[i][0].save(images / f'{i}.png')
    budget = model.exit_cfg['budgets'][5]
    rows = benchmark_exit(
        name, batch_size=8, repeats=1, static='none', latency_images=1, budget=budget['gmacs'],
        data_dir=str(tmp_path / 'images'))
    model.set_budget(budget['gmacs'])
    steps = predict_folder(model, name, tmp_path)
    shares = [round(steps.count(t) / 20, 4) for t in range(1, model.num_steps + 1)]
    assert len(set(steps)) > 1
    assert rows[1]['exit_shares'] == rows[2]['exit_shares'] == shares
    mean = sum(model.step_macs[t - 1] for t in steps) / 20 / 1e9
    assert rows[2]['gmacs'] == pytest.approx(mean, rel=1e-3)


def predict_folder(model, name, folder):
    """Steps used, in the results of predict.py."""
    file = folder / 'predictions.csv'
    run_prediction([
        '--model', name, '--pretrained', '--data-dir', str(folder / 'images'), '--budget',
        str(model.exit_cfg['budgets'][5]['gmacs']), '--results-file', str(file), '--workers', '0',
        '--no-console-results'])
    return [int(row['steps_used']) for row in read_rows(file)]


def test_thresholds_on_the_demo_set():
    rows = benchmark_exit(
        'test_gfnet', batch_size=8, num_images=12, repeats=1, static='none', latency_images=0, thresholds=[2, -1, 0])
    assert [row['exit_shares'] for row in rows[:3]] == [None, [0, 1, 0], [0, 1, 0]]
    assert rows[2]['gmacs'] == pytest.approx(timm.create_model('test_gfnet').step_macs[1] / 1e9)


@pytest.mark.parametrize(('flags', 'message'), [
    (['--budget', '0.008', '--thresholds', '0', '0', '0'], '--budget and --thresholds both say when to exit'),
    (['--thresholds', '0', '0', '0', '--exit-shares', '1', '1', '1'], '--exit-shares places thresholds on noise'),
    (['--data-dir', 'images'], '--data-dir: without --budget or --thresholds, images are noise'),
    (['--split', 'test', '--dataset', 'torch/cifar10'], '--dataset, --split: without'),
    (['--thresholds', '0', '0'], 'Expected 3 thresholds'),
    (['--budget', '9'], 'budget of 9 GMACs is out of range'),
    (['--thresholds', '0', '0', '0', '--num-images', '99999999'], '--num-images: expected at most the'),
    (['--thresholds', '0', '0', '0', '--data-dir', 'nowhere'], 'nowhere'),
])
def test_options_of_own_exits_that_are_refused(flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_benchmark(['exit', '--model', 'test_gfnet', '--latency-images', '0', *flags])


def test_compiled_steps_compete_with_eager_ones():
    rows = benchmark_exit(
        'test_gfnet', batch_size=4, num_images=10, repeats=1, static='none', torchcompile='eager', cuda_graphs=True,
        latency_images=0)
    assert [row['exit'] for row in rows[:3]] == ['all steps', 'early_exit', 'ExitStream']
    assert all(row['x_static'] is row['latency_ms'] is None for row in rows[:3])
    assert rows[1]['exit_shares'] == rows[2]['exit_shares']
    candidates = {row['exit'].rpartition(', ')[2] for row in rows[3:]}
    assert candidates <= {'contiguous', 'channels last', 'compiled'}


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


def test_arguments_are_checked_before_anything_is_measured(tmp_path, capsys):
    for file in (tmp_path, tmp_path / 'rows.txt'):
        with pytest.raises(ValueError, match=r'--results-file: expected a file that ends in \.csv or \.json'):
            run_benchmark(['exit', '--results-file', str(file), '--device', 'nowhere'])
    with pytest.raises(ValueError, match=r"There is no model 'test_gfnett'\. Did you mean test_gfnet"):
        run_benchmark(['exit', '--model', 'test_gfnett'])
    assert benchmark_main(['exit', '--device', 'nowhere']) == 1
    assert capsys.readouterr().err.startswith("ValueError: There is no device 'nowhere': ")


def test_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'exit', '--repeats', '0'])
    with pytest.raises(SystemExit, match='1'):
        runpy.run_path(str(ROOT / 'benchmark.py'), run_name='__main__')
    assert 'Expected positive numbers' in capsys.readouterr().err
    monkeypatch.setattr(sys, 'argv', ['benchmark.py'])
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(ROOT / 'benchmark.py'), run_name='__main__')
    assert 'benchmark.py: error: the following arguments are required: BENCHMARK' in capsys.readouterr().err
