import os
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from timm_dynamic.exits import ExitPolicy, ExitTable, load_exit_table, solve_curve, solve_policy, solve_thresholds

# Four samples, three steps of 1, 2 and 4 GMACs.
CONFIDENCE = [[0.9, 0.1, 0.2], [0.5, 0.8, 0.9], [0.5, 0.6, 0.1], [0.2, 0.3, 0.4]]
CORRECT = [[True, True, True], [False, True, True], [True, False, False], [False, False, True]]
TOP5 = [[True, True, True], [True, True, True], [True, True, False], [False, False, True]]
MACS = [10**9, 2 * 10**9, 4 * 10**9]


@pytest.fixture
def table():
    return ExitTable(CONFIDENCE, CORRECT, MACS, TOP5)


@pytest.mark.parametrize(('thresholds', 'strict', 'steps', 'top1', 'top5'), [
    # The first sample stops at once (0.9 >= 0.6), the second and third at step 2 (0.8 and 0.6 >= 0.6), the fourth runs
    # to the end although 0.4 < 9: hits 1, 1, 0, 1. The cost is (1 + 2 + 2 + 4) / 4.
    ([0.6, 0.6, 9], False, [1, 2, 2, 3], 75., 100.),
    # 0.6 > 0.6 does not hold: the third sample goes on to step 3, where it is wrong, and not among the best five.
    ([0.6, 0.6, 9], True, [1, 2, 3, 3], 75., 75.),
    ([0, 0, 0], False, [1, 1, 1, 1], 50., 75.),
    ([2, 2, 2], False, [3, 3, 3, 3], 75., 75.),
    ([2, 0, float('nan')], False, [2, 2, 2, 2], 50., 75.),  # the last threshold is ignored, whatever it is
    ([0.9, float('inf'), 0], True, [3, 3, 3, 3], 75., 75.),  # 0.9 as float32 does not exceed itself
])
def test_thresholds_by_hand(table, thresholds, strict, steps, top1, top5):
    point = table.evaluate(thresholds, strict=strict)
    assert point.steps_used.tolist() == steps
    assert table.steps_used(torch.tensor(thresholds), strict).tolist() == steps
    assert (point.top1, point.top5) == (top1, top5)
    assert point.gmacs == sum([1, 2, 4][s - 1] for s in steps) / 4
    assert point.exit_shares.tolist() == [steps.count(t) / 4 for t in (1, 2, 3)]
    assert point.thresholds.dtype == torch.float32
    torch.testing.assert_close(point.thresholds, torch.tensor(thresholds, dtype=torch.float32), equal_nan=True)


class Falling(ExitPolicy):
    """Stop when the confidence falls."""
    num_steps = 3

    def __call__(self, history):
        return history[:, -1] < history[:, 0]

    def state_dict(self):
        return {}

    @classmethod
    def from_state_dict(cls, state):
        return cls()


def test_policy_by_hand(table):
    # Nothing has fallen after step 1. After step 2: 0.1 < 0.9, no other. So the first stops there.
    point = table.evaluate(Falling())
    assert point.steps_used.tolist() == [2, 3, 3, 3]
    assert point.thresholds is None
    assert isinstance(point.policy, Falling)
    with pytest.raises(ValueError, match='strict'):
        table.evaluate(Falling(), strict=True)
    with pytest.raises(ValueError, match='policy for 2 steps, got one for 3'):
        ExitTable([[0.5, 0.6]], [[True, True]], [1, 2]).evaluate(Falling())


def test_anytime_by_hand(table):
    points = table.anytime()
    assert [p.top1 for p in points] == [50., 50., 75.]
    assert [p.top5 for p in points] == [75., 75., 75.]
    assert [p.gmacs for p in points] == [1., 2., 4.]
    for t, point in enumerate(points):
        again = table.evaluate(point.thresholds)
        assert (again.top1, again.steps_used.tolist()) == (point.top1, [t + 1] * 4)


def test_correct_samples_of_each_step():
    confidence = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.1, 0.9], [0.2, 0.9], [0.3, 0.9]])
    correct = torch.tensor([[True, False], [False, True], [True, True], [True, False], [False, True]])
    point = ExitTable(confidence, correct, [1, 2]).evaluate([0.5, 0.])
    assert point.steps_used.tolist() == [1, 1, 2, 2, 2]
    assert point.exit_correct.tolist() == [1, 2]


def test_without_top5_and_with_one_step():
    table = ExitTable(np.float32([[0.3], [0.4]]), np.array([[True], [False]]), torch.tensor([7]))
    point = table.evaluate([0.5])
    assert (point.top1, point.top5, point.gmacs, point.exit_shares.tolist()) == (50., None, 7e-9, [1.])
    assert table.step_macs == (7,)


def test_reprs_are_short(table):
    assert repr(table) == (
        'ExitTable(num_samples=4, num_steps=3, gmacs=[1, 2, 4], top1=[50.00, 50.00, 75.00])')
    assert repr(table.evaluate([0.6, 0.654321987, 9])) == (
        'ExitPoint(top1=75.00, top5=75.00, gmacs=2.75, exit_shares=[0.250, 0.250, 0.500], '
        'thresholds=[0.6, 0.65432, 9])')
    plain = ExitTable(CONFIDENCE, CORRECT, [1_234_567_890, 2_345_678_901, 3_456_789_012])
    assert repr(plain.anytime()[1]) == (
        'ExitPoint(top1=50.00, gmacs=2.346, exit_shares=[0.000, 1.000, 0.000], thresholds=[inf, -inf, inf])')
    policy = solve_policy(plain, 2.)
    point = repr(plain.evaluate(policy))
    assert point.endswith(f'policy={policy!r})')
    assert '\n' not in point
    assert len(point) < 200


def test_not_a_number_is_never_confident():
    table = ExitTable([[float('nan'), 0.5], [0.4, 0.5]], [[True, False], [True, True]], [1, 2])
    assert table.steps_used([0., 0.]).tolist() == [2, 1]
    assert [p.steps_used.tolist() for p in table.anytime()] == [[1, 1], [2, 2]]


def test_a_table_keeps_its_own_numbers():
    confidence, correct = torch.full((2, 2), 0.5), torch.ones(2, 2, dtype=torch.bool)
    table = ExitTable(confidence, correct, [1, 2])
    confidence.fill_(0)
    correct.fill_(False)
    assert (table.confidence.min().item(), table.correct.all().item()) == (0.5, True)


@pytest.mark.parametrize(('arguments', 'message'), [
    ((torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), MACS), r'at least one sample.*\[0, 3\]'),
    ((torch.zeros(4), torch.zeros(4, dtype=torch.bool), MACS), r'shape \[4\]'),
    ((CONFIDENCE, [[True, True]] * 4, MACS), r'Expected correct as bool of shape \[4, 3\].*bool of shape \[4, 2\]'),
    ((CONFIDENCE, [[1, 5, 7]] * 4, MACS), r'Expected correct as bool of shape \[4, 3\].*int64'),
    ((CONFIDENCE, CORRECT, MACS, [[True]]), r'Expected correct_top5 as bool .*\[1, 1\]'),
    ((CONFIDENCE, CORRECT, MACS[:2]), 'Expected 3 integers for step_macs'),
    ((CONFIDENCE, CORRECT, [1.5, 2, 3]), 'Expected 3 integers for step_macs'),
    ((CONFIDENCE, CORRECT, [2, 1, 3]), 'not falling'),
    ((CONFIDENCE, CORRECT, [0, 1, 3]), 'positive'),
    ((CONFIDENCE, CORRECT, [1, 2, float('inf')]), 'not falling'),
    ((CONFIDENCE, CORRECT, [float('nan'), 2, 3]), 'positive'),
])
def test_bad_tables(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExitTable(*arguments)


@pytest.mark.parametrize(('thresholds', 'message'), [
    ([0.5, 0.5], r'Expected 3 thresholds, one a step, got a tensor of shape \[2\]'),
    (0.5, r'Expected 3 thresholds'),
    ([0.5, float('nan'), 0.5], 'must be numbers'),
    (['a', 'b', 'c'], 'Expected 3 thresholds or an ExitPolicy, got list'),
    (None, 'Expected 3 thresholds or an ExitPolicy, got NoneType'),
])
def test_bad_thresholds(table, thresholds, message):
    with pytest.raises(ValueError, match=message):
        table.evaluate(thresholds)


@pytest.mark.parametrize('solve', [
    solve_thresholds, solve_policy, lambda table, gmacs: solve_curve(table, [2., gmacs])])
@pytest.mark.parametrize('gmacs', [0.99, 4.01, -1, float('nan'), float('inf')])
def test_bad_budgets(table, solve, gmacs):
    with pytest.raises(ValueError, match='GMACs is out of range: the first step costs 1, all steps 4'):
        solve(table, gmacs)


def test_subset_and_split(table):
    assert table.subset([2, 0]).confidence.tolist() == torch.tensor(CONFIDENCE)[[2, 0]].tolist()
    part = table.subset(torch.tensor([True, False, False, True]))
    assert (part.correct.tolist(), part.correct_top5.tolist()) == ([CORRECT[0], CORRECT[3]], [TOP5[0], TOP5[3]])
    assert part.step_macs == tuple(MACS)
    with pytest.raises(ValueError, match='at least one sample'):
        table.subset([])
    big = ExitTable(torch.arange(20.)[:, None] / 20, torch.ones(20, 1, dtype=torch.bool), [1])
    a, b = big.split(0.3, seed=1)
    assert (len(a), len(b)) == (6, 14)
    assert sorted(torch.cat([a.confidence, b.confidence]).flatten().tolist()) == big.confidence.flatten().tolist()
    assert torch.equal(big.split(0.3, seed=1)[0].confidence, a.confidence)
    assert not torch.equal(big.split(0.3, seed=2)[0].confidence, a.confidence)
    for fraction in (0, 1, 0.01):
        with pytest.raises(ValueError, match='leaves no samples in one of the parts'):
            big.split(fraction)


# Files

@pytest.mark.parametrize('top5', [TOP5, None])
def test_file_round_trip(tmp_path, top5):
    table = ExitTable(CONFIDENCE, CORRECT, MACS, top5)
    table.save(tmp_path / 'table.safetensors')
    again = ExitTable.load(tmp_path / 'table.safetensors')
    assert torch.equal(again.confidence, table.confidence)
    assert torch.equal(again.correct, table.correct)
    assert again.step_macs == tuple(MACS)
    assert (again.correct_top5 is None) == (top5 is None)
    if top5:
        assert torch.equal(again.correct_top5, table.correct_top5)
    assert os.listdir(tmp_path) == ['table.safetensors']  # nothing temporary is left


def test_saving_is_all_or_nothing(table, tmp_path, monkeypatch):
    table.save(tmp_path / 'table.safetensors')
    before = (tmp_path / 'table.safetensors').read_bytes()

    def fail(*args, **kwargs):
        raise OSError('disk full')

    monkeypatch.setattr('timm_dynamic.exits.table.save_file', fail)
    with pytest.raises(OSError, match='disk full'):
        table.subset([0]).save(tmp_path / 'table.safetensors')
    assert os.listdir(tmp_path) == ['table.safetensors']
    assert (tmp_path / 'table.safetensors').read_bytes() == before


def test_bad_files(table, tmp_path):
    file = tmp_path / 'table.safetensors'
    table.save(file)
    whole = file.read_bytes()
    for size in (0, 1, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r'table.safetensors cannot be read as an exit table: truncated'):
            ExitTable.load(file)
    file.write_text('{"json": 1}')
    with pytest.raises(ValueError, match='cannot be read as an exit table'):
        ExitTable.load(file)
    save_file({'weight': torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"its format is not .* it holds \['weight'\]"):
        ExitTable.load(file)
    form = {'format': 'timm_dynamic.exit_table.1'}
    save_file({'confidence': torch.zeros(2, 2)}, file, metadata=form)
    with pytest.raises(ValueError, match=r"\['correct', 'step_macs'\] missing"):
        ExitTable.load(file)
    good = {'confidence': torch.zeros(2, 2), 'correct': torch.zeros(2, 2, dtype=torch.bool),
            'step_macs': torch.tensor([1, 2])}
    for change, message in [
            ({'correct': torch.zeros(2, 3, dtype=torch.bool)}, 'got bool of shape'),
            ({'correct': torch.zeros(4, dtype=torch.bool)}, 'got bool of shape'),
            ({'confidence': torch.zeros(2)}, r'shape \[2\]'),
            ({'confidence': torch.zeros(2, 2, dtype=torch.int64)}, 'must be floating point, got int64'),
            ({'step_macs': torch.tensor([1])}, 'Expected 2 integers'),
            ({'step_macs': torch.tensor([[1], [2]])}, 'cannot be read as an exit table'),
            ({'confidence': torch.tensor([[0., 1.], [torch.nan, 0.]])}, '1 of 2 samples .* not numbers'),
    ]:
        save_file({**good, **change}, file, metadata=form)
        with pytest.raises(ValueError, match=message):
            ExitTable.load(file)
    with pytest.raises(FileNotFoundError):
        ExitTable.load(tmp_path / 'none.safetensors')
    with pytest.raises(ValueError, match=r'not numbers \(.*table.safetensors\)'):
        ExitTable([[torch.nan]], [[True]], [1]).save(file)


@pytest.mark.parametrize('top5', [TOP5, None])
def test_door(tmp_path, top5):
    file = tmp_path / 'table.pth'  # the content counts, not the name
    ExitTable(CONFIDENCE, CORRECT, MACS, top5).save(file)
    table = load_exit_table(file)
    assert (table.correct.tolist(), table.step_macs) == (CORRECT, tuple(MACS))
    first = load_exit_table(file, steps=2)
    assert (first.correct.tolist(), first.step_macs) == ([row[:2] for row in CORRECT], tuple(MACS[:2]))
    assert first.confidence.tolist() == torch.tensor(CONFIDENCE)[:, :2].tolist()
    assert top5 is None or first.correct_top5.tolist() == [row[:2] for row in TOP5]
    with pytest.raises(ValueError, match=r'table.pth: 4 steps asked for, confidences have shape \[4, 3\]'):
        load_exit_table(file, steps=4)
    with pytest.raises(ValueError, match=r'table.pth has costs of its own: step_macs .* AnchorNet tables only'):
        load_exit_table(file, step_macs=MACS)
    with pytest.raises(FileNotFoundError):
        load_exit_table(tmp_path / 'none')
    file.write_bytes(b'')
    with pytest.raises(ValueError, match=r'table.pth cannot be read as an exit table: truncated'):
        load_exit_table(file)


def test_threads_share_a_table():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, 3, generator=generator)
    table = ExitTable(confidence, torch.rand(500, 3, generator=generator) < confidence, MACS)
    expected = [ExitTable(table.confidence, table.correct, MACS).evaluate(
        solve_policy(ExitTable(table.confidence, table.correct, MACS), g)).top1 for g in (1.5, 2.5)]
    found = {}

    def run(i):
        found[i] = [table.evaluate(solve_policy(table, g)).top1 for g in (1.5, 2.5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 4


def test_predicted_classes_stay_with_their_samples(tmp_path):
    predicted = torch.tensor([[1, 2], [3, 3], [0, 4]])
    table = ExitTable(torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.bool), [1, 2], predicted=predicted)
    assert table.agreement().correct.tolist() == [[False, True], [True, True], [False, True]]
    assert torch.equal(table.subset([2, 0]).predicted, predicted[[2, 0]])
    assert torch.equal(table.first_steps(1).predicted, predicted[:, :1])
    table.save(tmp_path / 'table.safetensors')
    assert torch.equal(ExitTable.load(tmp_path / 'table.safetensors').predicted, predicted)
    with pytest.raises(ValueError, match='does not have the predicted classes'):
        ExitTable(torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.bool), [1, 2]).agreement()
    with pytest.raises(ValueError, match=r'predicted classes as integers of shape \[3, 2\].*got float32'):
        ExitTable(torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.bool), [1, 2], predicted=torch.rand(3, 2))
