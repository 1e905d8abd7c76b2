"""benchmarks/gpu.sh: its parts on the CPU, time limits, failures, and the table.

TIMM_DYNAMIC_FULL_TESTS=1 runs the whole dry run.
"""
import json
import os
import subprocess

import psutil
import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file

from benchmarks import gpu_parts
from benchmarks.gpu import Part, run_parts
from benchmarks.gpu_parts import Settings, check_compiled, compare_devices, compare_runs, main, run_cases
from timm_dynamic.exits import early_exit
from timm_dynamic.utils.report import read_rows

QUICK = Settings('cpu', quick=True)


# The driver

def shell(name, script, seconds=60, alone=True):
    """A part that runs a shell script; $file is where its rows go."""
    return Part(name, seconds, alone, ('sh', '-c', f'for file; do :; done; {script}'))


ROW = 'echo \'{"case": "a", "ms": 1.5}\' >> "$file"'


def test_every_part_is_in_the_table(tmp_path, capsys):
    """What was measured before a part fails or hangs is kept, and the next part runs."""
    rows = run_parts([
        shell('good', f'{ROW}; echo said'),
        shell('crashes', f'{ROW}; exit 3'),
        shell('hangs', f'{ROW}; printf \'{{"case": "b\' >> "$file"; sleep 600 & echo $! > {tmp_path}/pid; wait', 3),
        shell('options', 'echo "{\\"case\\": \\"$0 $1\\"}" >> "$file"'),
    ], ['--quick'], tmp_path, 60)
    case = {'case': 'a', 'ms': 1.5}
    assert rows == [
        {'part': 'good', **case},
        {'part': 'crashes', **case}, {'part': 'crashes', 'result': 'failed: exit status 3, see gpu.log'},
        {'part': 'hangs', **case}, {'part': 'hangs', 'result': 'stopped after 3 s'},
        {'part': 'options', 'case': 'options --quick'}]
    everything = [{k: row.get(k) for k in ('part', 'case', 'ms', 'result')} for row in rows]
    assert json.loads((tmp_path / 'gpu.json').read_text()) == everything
    assert read_rows(tmp_path / 'gpu.csv') == everything
    assert (tmp_path / 'gpu.log').read_text() == 'said\n'
    table = capsys.readouterr().out.partition('\n\n')[2].splitlines()
    assert table[0].split() == ['part', 'case', 'ms', 'result']
    assert len(table) == 2 + len(rows)
    pid = int((tmp_path / 'pid').read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_parts_that_measure_no_time_run_beside_each_other(tmp_path):
    def meet(name, other):
        wait = f'touch {tmp_path}/{name}; until [ -e {tmp_path}/{other} ]; do sleep 0.05; done'
        return shell(name, f'{wait}; {ROW}', alone=False)

    parts = [meet('a', 'b'), meet('b', 'a'), shell('after', f'rm {tmp_path}/a {tmp_path}/b; {ROW}')]
    assert [row.get('result') for row in run_parts(parts, [], tmp_path, 60)] == [None] * 3


def test_no_part_is_started_without_time(tmp_path):
    assert run_parts([shell('late', ROW)], [], tmp_path, 0) == [{'part': 'late', 'result': 'stopped: no time was left'}]


# The parts

def test_cases_that_fail_are_rows():
    def fail():
        yield {'ms': 1}
        raise RuntimeError('out of memory\nmore')

    rows = list(run_cases([({'model': 'a'}, fail), ({'model': 'b'}, lambda: [{'ms': 2}])], QUICK))
    assert rows == [
        {'model': 'a', 'ms': 1}, {'model': 'a', 'result': 'failed: RuntimeError: out of memory'},
        {'model': 'b', 'ms': 2}]


@pytest.mark.parametrize('name', ['test_focusnet', 'test_gfnet', 'test_anchornet_patch', 'test_clcnet'])
def test_devices_agree(name):
    rows = list(compare_devices(name, QUICK, 6))
    assert len(rows) == (1 if name == 'test_focusnet' else 3)
    assert all(row['result'] == 'ok' for row in rows)
    assert rows[0]['difference'] == 0


def test_devices_that_disagree(monkeypatch):
    """Other logits, and images that stop elsewhere though no confidence is near its threshold."""
    to = gpu_parts._to
    monkeypatch.setattr(gpu_parts, '_to', lambda x, device: x + 0.05)
    logits, = compare_devices('test_focusnet', QUICK, 6)
    assert logits['difference'] > 1e-4
    assert logits['result'].startswith('failed: more than 0.00')
    monkeypatch.setattr(gpu_parts, '_to', to)
    monkeypatch.setattr(gpu_parts, 'place_thresholds', lambda *args: [0.] * 3)  # all stop at once
    monkeypatch.setattr(gpu_parts, 'early_exit', lambda model, x, thresholds: early_exit(model, x, [2.] * 3))
    _, batches, stream = compare_devices('test_gfnet', QUICK, 6)
    assert batches['result'] == 'ok'
    assert stream['result'] == 'failed: 6 images stop elsewhere'


def test_compiled_steps_agree(monkeypatch):
    row, = check_compiled('test_gfnet', 'eager', QUICK)
    assert row['result'] == 'ok'
    monkeypatch.setattr(gpu_parts, 'early_exit', lambda model, x, thresholds: early_exit(model, x, [2.] * 3))
    monkeypatch.setattr(gpu_parts.DynamicNet, 'compile_steps', lambda self, **kwargs: None)  # saves time
    row, = check_compiled('test_gfnet', 'eager', QUICK)
    assert row['result'] == 'failed: 32 images stop elsewhere'  # all but a third


@pytest.mark.parametrize('part', ['copies', 'train', 'loader'])
def test_quick_part(part, tmp_path):
    assert main([part, '--device', 'cpu', '--quick', str(tmp_path / 'rows.jsonl')]) == 0
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    assert [row.get('result') for row in rows] == [None] * len(rows)
    assert all(row['images_per_s'] > 0 for row in rows)
    assert [row['case'].partition(',')[0].partition(':')[0] for row in rows] == {
        'copies': ['ExitStream'] * 5,
        'train': ['train step'] * 5,
        'loader': ['loader alone', 'train steps alone', 'train steps and loader'],
    }[part]


def test_a_part_that_fails_at_once(tmp_path):
    assert main(['copies', '--device', 'nowhere', '--quick', str(tmp_path / 'rows.jsonl')]) == 0
    row, = map(json.loads, (tmp_path / 'rows.jsonl').read_text().splitlines())
    assert row['result'].startswith('failed: RuntimeError: Expected one of cpu, cuda')


def test_runs_are_compared_by_all_their_tensors(tmp_path):
    for run, value in (('a', 1.), ('b', 1.), ('c', 1.25)):
        (tmp_path / run / 'last').mkdir(parents=True)
        save_file({'x': torch.ones(2), 'empty': torch.ones(0)}, tmp_path / run / 'one.safetensors')
        save_file({'x': torch.tensor([1., value])}, tmp_path / run / 'last' / 'two.safetensors')
    assert compare_runs(tmp_path / 'a', tmp_path / 'b') == {
        'difference': 0., 'result': 'ok, all 3 tensors are equal'}
    assert compare_runs(tmp_path / 'a', tmp_path / 'c') == {'difference': 0.25, 'result': '1 of 3 tensors differ'}
    save_file({'y': torch.ones(2)}, tmp_path / 'c' / 'one.safetensors')
    with pytest.raises(AssertionError, match=r"'one\.safetensors' holds other tensors"):
        compare_runs(tmp_path / 'a', tmp_path / 'c')
    (tmp_path / 'c' / 'one.safetensors').unlink()
    with pytest.raises(AssertionError, match='have written other files'):
        compare_runs(tmp_path / 'a', tmp_path / 'c')


@pytest.mark.skipif(os.environ.get('TIMM_DYNAMIC_FULL_TESTS') != '1', reason='only with TIMM_DYNAMIC_FULL_TESTS=1')
@pytest.mark.timeout(1800)
def test_dry_run(tmp_path):
    command = [ROOT / 'benchmarks/gpu.sh', '--device', 'cpu', '--quick', '--seconds', '1500', '--out', tmp_path]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout + (tmp_path / 'gpu.log').read_text()[-4000:]
    rows = json.loads((tmp_path / 'gpu.json').read_text())
    assert {row['part'] for row in rows} == set(gpu_parts.PARTS)
    resumed = [row for row in rows if row['part'] == 'resume']
    assert [row['case'] for row in resumed] == ['the same run twice', 'killed in the third stage, and resumed']
    assert all(row['result'].startswith('ok') and row['difference'] == 0 for row in resumed)
