"""Rows and curves of exit tables."""
import pytest
import timm
import torch
from exit_tables import make_table

import timm_dynamic  # noqa: F401
from timm_dynamic.evaluation import exit_report
from timm_dynamic.evaluation.calibration import Calibration
from timm_dynamic.exits import ExitTable, geometric_thresholds, solve_curve


@pytest.fixture
def model():
    return timm.create_model('test_gfnet', num_classes=7, img_size=48, patch_size=16).eval()


def calibrated(calibration, evaluation):
    return Calibration(calibration, evaluation, 'fitted', 'evaluated')


class TestRows:
    def test_steps(self):
        table = make_table()
        rows = exit_report.step_rows(table, split='test')
        assert [row['point'] for row in rows] == ['step 1', 'step 2', 'step 3']
        assert [row['gmacs'] for row in rows] == [1, 2, 4]
        for t, row in enumerate(rows):
            assert row['top1'] == pytest.approx(100 * table.correct[:, t].float().mean().item(), abs=1e-4)
            assert row['top5'] == pytest.approx(100 * table.correct_top5[:, t].float().mean().item(), abs=1e-4)
            assert (row['images'], row['split']) == (400, 'test')
        curve = [(gmacs, round(top1, 4)) for gmacs, top1 in exit_report.step_curve(table)]
        assert curve == [(row['gmacs'], row['top1']) for row in rows]
        assert 'top5' not in exit_report.step_rows(make_table(top5=False))[0]

    @pytest.mark.parametrize('method', ['thresholds', 'value'])
    def test_cross_fitting_by_hand(self, method):
        table = make_table(201, seed=3)
        calibration = Calibration.cross_fitted(table, 'val', seed=5)
        first, second = table.split_indices(0.5, 5)
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(201))
        row, = exit_report.budget_rows(calibration, [2.0], method)
        kept, = exit_report.budgets_to_keep(calibration, [2.0], method)
        top1 = gmacs = 0.
        for fit, held_out in ((first, second), (second, first)):
            policy, = (p.policy for p in solve_curve(table.subset(fit), [2.0], method=method))
            point = table.subset(held_out).evaluate(policy)
            top1, gmacs = top1 + point.top1 * len(held_out) / 201, gmacs + point.gmacs * len(held_out) / 201
        assert (row['top1'], row['gmacs']) == (pytest.approx(top1, abs=1e-4), pytest.approx(gmacs, abs=1e-6))
        assert (row['images'], row['split'], row['fitted_on']) == (201, 'val, cross-fitted in halves', 'all of val')
        whole, = solve_curve(table, [2.0], method=method)
        assert kept['gmacs'] == whole.gmacs == table.evaluate(kept['policy']).gmacs  # what is kept is fitted on all
        assert kept['evaluated']['top1'] == row['top1']
        assert len(exit_report.budget_rows(calibration, method=method)) > 3
        assert len(exit_report.geometric_rows(calibration)) == 39

    @pytest.mark.parametrize('method', ['thresholds', 'value'])
    def test_budgets_are_fitted_on_one_and_evaluated_on_the_other(self, method):
        fit, other = make_table(seed=0), make_table(300, seed=1)
        calibration = Calibration(fit, other, 'fitted', 'evaluated')
        rows = exit_report.budget_rows(calibration, [1.5, 3.0], method)
        kept = exit_report.budgets_to_keep(calibration, [1.5, 3.0], method)
        for row, keep, budget in zip(rows, kept, (1.5, 3.0)):
            assert row['budget'] == budget
            assert keep['gmacs'] == fit.evaluate(keep['policy']).gmacs <= budget
            point = other.evaluate(keep['policy'])
            assert (row['gmacs'], row['top1'], row['top5']) == pytest.approx(
                (point.gmacs, point.top1, point.top5), abs=1e-4)
            assert row['exit_shares'] == pytest.approx(point.exit_shares.tolist(), abs=1e-4)
            assert ('thresholds' in row) == (method == 'thresholds')
            assert (row['split'], row['fitted_on'], row['images']) == ('evaluated', 'fitted', 300)
            assert keep['evaluated']['gmacs'] == row['gmacs']
        with pytest.raises(ValueError, match='5 GMACs is out of range: the first step costs 1, all steps 4'):
            exit_report.budget_rows(calibration, [5])

    def test_thresholds_of_a_row_give_it_again(self):
        other = make_table(seed=1)
        row, = exit_report.budget_rows(calibrated(make_table(), other), [2.0])
        assert exit_report.policy_row(other, row['thresholds'], 'again')['top1'] == row['top1']

    def test_default_budgets(self):
        rows = exit_report.budget_rows(calibrated(make_table(), make_table(seed=1)), num=6)
        budgets = [row['budget'] for row in rows]
        assert len(budgets) == len(set(budgets)) <= 6
        assert budgets == sorted(budgets)
        alike = ExitTable(torch.full((9, 2), 0.5), torch.ones(9, 2, dtype=torch.bool), (1, 2))
        assert len(exit_report.budget_rows(calibrated(alike, alike), num=6)) == 1

    def test_kept_budgets_are_json_and_can_be_set(self, model):
        table = make_table(step_macs=model.step_macs)
        budget = (model.step_macs[0] + model.step_macs[2]) / 2e9
        try:
            model.store_budgets(exit_report.budgets_to_keep(calibrated(table, table), [budget]))
            chosen = model.set_budget(gmacs=budget)
            assert chosen['evaluated']['fitted_on'] == 'fitted'
            assert table.evaluate(chosen['policy']).gmacs <= budget
        finally:
            model.load_exit_cfg({})

    def test_geometric(self):
        fit, other = make_table(seed=0), make_table(seed=1)
        rows = exit_report.geometric_rows(calibrated(fit, other))
        assert [row['point'] for row in rows] == [f'geometric p={p}' for p in range(1, 40)]
        point = other.evaluate(geometric_thresholds(fit, 20))
        assert (rows[19]['gmacs'], rows[19]['top1']) == pytest.approx((point.gmacs, point.top1), abs=1e-4)

    def test_curve(self):
        other = make_table(seed=1)
        curve = exit_report.budget_curve(calibrated(make_table(), other))
        costs = [gmacs for gmacs, _ in curve]
        assert costs == sorted(costs)
        assert costs[0] == 1
        assert max(top1 for _, top1 in curve) > exit_report.step_curve(other)[1][1]
