"""Policies with a promise."""
import math

import pytest
import timm
import torch
from exits.tables import table_like

import timm_dynamic  # noqa: F401
from benchmarks.guarantee import benchmark_guarantee
from timm_dynamic.exits import ExitTable, GuaranteedPolicy, early_exit, solve_curve, solve_guaranteed


def with_predictions(num, seed=0):
    """A table whose later predictions mostly agree with the last one."""
    table = table_like(num, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randint(1, 10, (num, 3), generator=generator)
    return ExitTable(table.confidence, table.correct, table.step_macs, predicted=torch.where(table.correct, 0, wrong))


@pytest.fixture(scope='module')
def tables():
    return table_like(1000, 3).split(0.4)


def test_a_drop_is_promised(tables):
    calibration, holdout = tables
    policy = solve_guaranteed(calibration, holdout, max_drop=4, split='validation')
    point, whole = holdout.evaluate(policy), holdout.anytime()[-1]
    promise = policy.promise
    assert point.gmacs < whole.gmacs
    assert (promise.kind, promise.limit, promise.confidence, promise.num_samples) == ('max_drop', 4, 0.95, 600)
    assert promise.observed == pytest.approx(whole.top1 - point.top1)
    assert promise.observed < 4  # with room for chance
    assert (promise.gmacs, promise.top1) == (point.gmacs, point.top1)
    assert str(promise).startswith('With 95 % confidence, the top-1 drop against all steps is at most 4 points; ')
    assert str(promise).endswith(' on 600 images of validation.')
    surer = solve_guaranteed(calibration, holdout, max_drop=4, confidence=0.999)
    assert holdout.evaluate(surer).gmacs >= point.gmacs
    looser = solve_guaranteed(calibration, holdout, max_drop=8)
    assert holdout.evaluate(looser).gmacs <= point.gmacs
    curve = solve_curve(calibration, num=96)
    assert solve_guaranteed(curve, holdout, max_drop=4).state_dict()['policy'] == policy.state_dict()['policy']


def test_promises_are_kept():
    """On fresh draws, hardly one is broken; and they cost less than all steps. The benchmark has 1,000 draws."""
    row, = benchmark_guarantee(table_like(4000, 3, seed=5), 600, [3.], num_draws=6)
    assert row['violations'] <= 17
    assert row['oracle_gmacs'] <= row['gmacs'] < 3


def test_too_few_images(tables, caplog):
    calibration, holdout = tables
    few = holdout.subset(torch.arange(60))
    policy = solve_guaranteed(calibration, few, max_drop=0.5)
    assert few.evaluate(policy).exit_shares.tolist() == [0, 0, 1]
    assert (policy.promise.observed, policy.promise.num_samples) == (0, 60)
    assert 'Nothing cheaper than all steps can be promised for max_drop 0.5 with 95 % confidence' in caplog.text
    assert 'would do' in caplog.text or 'not below the limit' in caplog.text


def test_a_reference(tables, caplog):
    calibration, holdout = tables
    cheap = [-math.inf] * 3
    policy = solve_guaranteed(calibration, holdout, max_drop=3, reference=cheap, reference_name='one step')
    assert holdout.evaluate(policy).gmacs < holdout.evaluate(
        solve_guaranteed(calibration, holdout, max_drop=3)).gmacs  # less is expected of it
    assert 'against one step' in str(policy.promise)
    perfect = torch.ones(600, dtype=torch.bool)
    policy = solve_guaranteed(calibration, holdout, max_drop=3, reference=perfect)
    assert policy.promise is None
    assert 'Nothing, not even all steps, can be promised' in caplog.text


def test_agreement_needs_no_labels():
    table = with_predictions(1500)
    calibration, holdout = table.agreement().split(0.4)
    assert torch.equal(holdout.correct, holdout.predicted == holdout.predicted[:, -1:])
    policy = solve_guaranteed(calibration, holdout, max_disagreement=10)
    point = holdout.evaluate(policy)
    assert point.exit_shares[:2].sum() > 0.05
    assert policy.promise.observed == pytest.approx(100 - point.top1)
    assert policy.promise.observed < 10
    with pytest.raises(ValueError, match='does not have the predicted classes'):
        solve_guaranteed(*table_like(100, 3).split(), max_disagreement=5)


def test_a_cost_is_promised(tables):
    calibration, holdout = tables
    policy = solve_guaranteed(calibration, holdout, max_gmacs=2)
    point = holdout.evaluate(policy)
    assert 1.7 < point.gmacs < 2
    assert policy.promise.observed == point.gmacs
    with pytest.raises(ValueError, match=r'No policy can be promised to cost at most 0\.9 GMACs with 600 images'):
        solve_guaranteed(calibration, holdout, max_gmacs=0.9)


def test_models_keep_the_promise(tables):
    """In exit_cfg, as plain JSON; and the engine takes the policy."""
    policy = solve_guaranteed(*tables, max_drop=4)
    model = timm.create_model('test_gfnet', num_classes=3).eval()
    model.set_exit(policy)
    again = timm.create_model('test_gfnet', num_classes=3, exit_cfg=model.exit_cfg).eval()
    assert isinstance(again.exit_policy, GuaranteedPolicy)
    assert again.exit_policy.promise == policy.promise
    history = torch.rand(50, 2)
    assert torch.equal(again.exit_policy(history), policy(history))
    assert early_exit(again, torch.randn(4, 3, 96, 96)).logits.shape == (4, 3)
    with pytest.raises(ValueError, match='is not one of a GuaranteedPolicy'):
        GuaranteedPolicy.from_state_dict({'policy': [0., 0.]})


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(max_drop=1, max_gmacs=2), 'Expected one limit, got max_drop and max_gmacs'),
    (dict(confidence=1.), 'confidence must be between 0 and 1'),
    (dict(max_drop=0), 'max_drop must be above 0 and below 100'),
    (dict(max_gmacs=2, reference=[0., 0., 0.]), 'A reference is for max_drop, not for max_gmacs'),
    (dict(reference=torch.ones(3, dtype=torch.bool)), r'must have the 600 images of the holdout table, got \[3\]'),
])
def test_bad_arguments(tables, kwargs, message):
    with pytest.raises(ValueError, match=message):
        solve_guaranteed(*tables, **kwargs)


def test_tables_of_other_steps(tables):
    with pytest.raises(ValueError, match='The tables are not of one model'):
        solve_guaranteed(tables[0], table_like(100, 2))
