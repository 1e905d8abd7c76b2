"""Rows and curves of exit tables."""
import itertools
import math

import pytest
import timm
import torch
from exit_tables import make_table

import timm_dynamic  # noqa: F401
from timm_dynamic.evaluation import exit_report
from timm_dynamic.evaluation.calibration import Calibration
from timm_dynamic.exits import ExitPoint, ExitTable, geometric_thresholds, solve_curve


@pytest.fixture
def model():
    return timm.create_model('test_gfnet', num_classes=7, img_size=48, patch_size=16).eval()


def calibrated(calibration, evaluation):
    return Calibration(calibration, evaluation, 'fitted', 'evaluated')


def point(gmacs, top1):
    nothing = torch.zeros(0)
    return ExitPoint(top1, None, gmacs, nothing, nothing, nothing, nothing)


class TestRows:
    def test_steps(self):
        table = make_table()
        rows = exit_report.step_rows(table, split='test')
        assert [row['point'] for row in rows] == ['step 1', 'step 2', 'step 3']
        assert [row['gmacs'] for row in rows] == [1, 2, 4]
        for t, row in enumerate(rows):
            assert row['top1'] == pytest.approx(100 * table.correct[:, t].float().mean().item(), abs=1e-4)
            assert row['top5'] == pytest.approx(100 * table.correct_top5[:, t].float().mean().item(), abs=1e-4)
            assert (row['images'], row['correct'], row['split']) == (400, int(table.correct[:, t].sum()), 'test')
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

    def test_default_budgets_are_where_the_curve_moves(self):
        # 60 points of accuracy within the first tenth of the cost, 40 in the rest: hypot(0.1, 0.6) and hypot(0.9, 0.4).
        points = [point(1., 30.), point(1.5, 55.), point(2., 90.), point(11., 130.), point(6., 89.)]
        first, rest = math.hypot(0.05, 0.25) + math.hypot(0.05, 0.35), math.hypot(0.9, 0.4)
        budgets = exit_report.spread_budgets(points, 9)
        assert (budgets[0], budgets[-1]) == (1., 11.)
        step = (first + rest) / 8
        expected = 2 + 9 * (5 * step - first) / rest  # the sixth one is on the flat part
        assert budgets[5] == pytest.approx(expected)
        assert sum(b <= 2 for b in budgets) == 1 + int(first / step)
        assert all(a < b for a, b in itertools.pairwise(budgets))
        assert exit_report.spread_budgets(points[:1], 9) == [1.]
        assert exit_report.spread_budgets([point(1., 30.), point(2., 30.)], 9) == [1.]
        assert exit_report.spread_budgets(points, 1) == [11.]

    def test_half_of_the_default_budgets_are_on_the_steep_part_of_a_table(self):
        def table(seed):  # the tenth of the images with the least confidence gains from a second step of 10 GMACs
            generator = torch.Generator().manual_seed(seed)
            confidence, luck = torch.rand(2, 4000, 2, generator=generator)
            first = (confidence[:, 0] > 0.1) & (luck[:, 0] < 0.99)
            return ExitTable(confidence, torch.stack([first, luck[:, 1] < 0.999], dim=1), (10**9, 11 * 10**9))

        rows = exit_report.budget_rows(calibrated(table(0), table(1)), num=6)
        assert sum(1 < row['budget'] <= 2.1 for row in rows) >= 2  # evenly spaced, the second one costs 3 GMACs
        assert rows[-1]['budget'] > 9

    def test_thresholds_as_words(self):
        confidence = torch.tensor([[0.25, 0.25, 0.125], [0.75, 0.875, 0.75]])
        table = ExitTable(confidence, torch.ones(2, 3, dtype=torch.bool), (1, 2, 3))
        assert exit_report.show_thresholds([-0.4, 1.5, 0.5], table) == ['always', 'never', 'always']
        assert exit_report.show_thresholds([0.25, 0.875, 0.5], table) == ['always', 0.875, 'always']  # reached
        assert exit_report.show_thresholds([-0.4, 1.5, 0.5]) == [-0.4, 1.5, 'always']
        assert exit_report.show_thresholds([-1e8, 1e8, 0.5]) == ['always', 'never', 'always']

    def test_words_are_in_the_terminal_only(self):
        report, table = exit_report.Report({}), make_table()
        rows = exit_report.budget_rows(calibrated(table, make_table(seed=1)), [1.0, 2.0])
        report.add('net', 'budgets:', rows, fitted=table)
        cheapest = report.text[0].splitlines()[3]
        assert cheapest.split()[-3:] == ['always', 'always', 'always']
        assert all(isinstance(v, float) for row in report.points for v in row['thresholds'])

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
