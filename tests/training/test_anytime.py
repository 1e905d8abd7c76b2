"""A dynamic model is run once; what is told of it then is what running it at every budget would give."""
import builtins
import math

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_dynamic  # noqa: F401
from timm_dynamic.exits import ExitTable, collect_exit_table, geometric_thresholds, solve_policy
from timm_dynamic.training import anytime
from timm_dynamic.training.evaluate import evaluate
from timm_dynamic.utils.report import check_plot, format_table, plot_accuracy_over_macs, read_rows, write_rows


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('test_gfnet', num_classes=7, img_size=48, patch_size=16).eval()


@pytest.fixture(autouse=True)
def no_exit(model):
    yield
    model.clear_exit()


@pytest.fixture(scope='module')
def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(37, 3, 48, 48, generator=generator), torch.randint(0, 7, (37,), generator=generator))
    return DataLoader(data, batch_size=8)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def make_table(num=400, seed=0, step_macs=(1_000_000_000, 2_000_000_000, 4_000_000_000), top5=True):
    """A model that is right as often as it is sure, and surer from step to step."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(1, 4)
    confidence = torch.rand(num, 3, generator=generator) ** (1 / steps)
    correct = torch.rand(num, 3, generator=generator) < confidence
    return ExitTable(confidence, correct, step_macs, correct | (confidence > 0.9) if top5 else None)


class TestEvaluateDynamic:
    def test_is_what_forward_gives(self, model, loader, accelerator):
        metrics, table = anytime.evaluate_dynamic(model, loader, accelerator)
        gmacs = metrics.pop('gmacs')
        assert metrics == pytest.approx(evaluate(model, loader, accelerator))
        assert gmacs == model.step_macs[-1] / 1e9
        expected = collect_exit_table(model, loader)
        assert torch.equal(table.confidence, expected.confidence)
        assert torch.equal(table.correct, expected.correct)
        assert metrics['top1'] == pytest.approx(table.anytime()[-1].top1)

    @pytest.mark.parametrize('kind', ['thresholds', 'policy'])
    def test_is_what_early_exit_gives(self, model, loader, accelerator, kind):
        table = collect_exit_table(model, loader)
        policy = [table.confidence[:, t].median().item() for t in range(3)]
        if kind == 'policy':
            policy = solve_policy(make_table(step_macs=model.step_macs), model.step_macs[1] / 1e9)
            policy.scale = (table.confidence.min().item(), table.confidence.max().item())
        model.set_exit(policy)
        seen = []
        metrics, again = anytime.evaluate_dynamic(
            model, loader, accelerator, on_batch=lambda output, target: seen.append((output, target)))
        expected = torch.cat([model(x) for x, _ in loader])
        torch.testing.assert_close(torch.cat([output for output, _ in seen]), expected, rtol=0, atol=1e-5)
        assert torch.equal(torch.cat([target for _, target in seen]), loader.dataset.tensors[1])
        point = table.evaluate(policy)
        assert len(point.steps_used.unique()) > 1
        gmacs = metrics.pop('gmacs')
        assert metrics == pytest.approx(evaluate(model, loader, accelerator))
        assert (gmacs, metrics['top1']) == pytest.approx((point.gmacs, point.top1))
        assert torch.equal(again.confidence, table.confidence)  # all steps, whatever is set

    def test_classes_that_count(self, model, loader, accelerator):
        """They are told apart among themselves; the model's confidence is its own."""
        x, target = loader.dataset.tensors
        few = DataLoader(TensorDataset(x, target % 3), batch_size=8)
        metrics, table = anytime.evaluate_dynamic(model, few, accelerator, classes=torch.tensor([4, 0, 2]))
        logits = torch.stack(list(model.forward_steps(x)), dim=1)
        expected = logits[:, :, [4, 0, 2]].argmax(dim=2) == (target % 3)[:, None]
        assert torch.equal(table.correct, expected)
        torch.testing.assert_close(table.confidence, logits.softmax(-1).amax(-1).detach(), rtol=0, atol=1e-5)
        assert metrics['top1'] == pytest.approx(100 * expected[:, -1].float().mean().item())

    def test_dtype_and_layout(self, model, loader, accelerator, monkeypatch):
        seen, init_state = [], model.init_state
        monkeypatch.setattr(model, 'init_state', lambda x: seen.append(x) or init_state(x.float()))
        anytime.evaluate_dynamic(model, loader, accelerator)
        anytime.evaluate_dynamic(model, loader, accelerator, channels_last=True, dtype=torch.bfloat16)
        for i, (layout, dtype) in enumerate([
                (torch.contiguous_format, torch.float32), (torch.channels_last, torch.bfloat16)]):
            assert seen[5 * i].is_contiguous(memory_format=layout)
            assert seen[5 * i].dtype == dtype

    def test_train_mode_is_an_error(self, model, loader, accelerator):
        model.train()
        try:
            with pytest.raises(ValueError, match='eval mode'):
                anytime.evaluate_dynamic(model, loader, accelerator)
        finally:
            model.eval()


class TestCountMacs:
    def test_by_hand(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 6 * 5, 4))
        net[1].train()
        assert anytime.count_macs(net, (3, 6, 5)) == 8 * 27 * 30 + 240 * 4
        assert net[1].training
        assert net[0].weight.device.type == 'cpu'

    def test_dynamic_models_have_all_steps(self, model):
        assert anytime.count_macs(model, (3, 48, 48)) == model.step_macs[-1]

    def test_tensors_that_do_not_move_to_meta(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 2)
                self.scale = torch.ones(3)  # no buffer

            def forward(self, x):
                return self.linear((x.mean((2, 3)) * self.scale).repeat(1, 2)[:, :4])

        assert anytime.count_macs(Net(), (3, 4, 4)) == 8

    def test_what_cannot_be_counted(self, caplog):
        assert anytime.count_macs(nn.Linear(4, 2), (3, 4, 5)) is None
        assert 'Linear cannot be counted' in caplog.text


class TestRows:
    def test_steps(self):
        table = make_table()
        rows = anytime.step_rows(table, split='test')
        assert [row['point'] for row in rows] == ['step 1', 'step 2', 'step 3']
        assert [row['gmacs'] for row in rows] == [1, 2, 4]
        for t, row in enumerate(rows):
            assert row['top1'] == pytest.approx(100 * table.correct[:, t].float().mean().item(), abs=1e-4)
            assert row['top5'] == pytest.approx(100 * table.correct_top5[:, t].float().mean().item(), abs=1e-4)
            assert (row['images'], row['split']) == (400, 'test')
        assert [(g, round(top1, 4)) for g, top1 in anytime.step_curve(table)] == [(r['gmacs'], r['top1']) for r in rows]
        assert 'top5' not in anytime.step_rows(make_table(top5=False))[0]

    @pytest.mark.parametrize('method', ['thresholds', 'value'])
    def test_budgets_are_fitted_on_one_and_judged_on_the_other(self, method):
        fit, judge = make_table(seed=0), make_table(300, seed=1)
        rows = anytime.budget_rows(fit, judge, [1.5, 3.0], method, split='evaluated', fitted_on='fitted')
        kept = anytime.budgets_to_keep(fit, judge, [1.5, 3.0], method, split='evaluated', fitted_on='fitted')
        for row, keep, budget in zip(rows, kept, (1.5, 3.0)):
            assert row['budget'] == budget
            assert keep['gmacs'] == fit.evaluate(keep['policy']).gmacs <= budget
            point = judge.evaluate(keep['policy'])
            assert (row['gmacs'], row['top1'], row['top5']) == pytest.approx(
                (point.gmacs, point.top1, point.top5), abs=1e-4)
            assert row['exit_shares'] == pytest.approx(point.exit_shares.tolist(), abs=1e-4)
            assert ('thresholds' in row) == (method == 'thresholds')
            assert (row['split'], row['fitted_on'], row['images']) == ('evaluated', 'fitted', 300)
            assert keep['evaluated']['gmacs'] == row['gmacs']
        with pytest.raises(ValueError, match='5 GMACs is out of range: the first step costs 1, all steps 4'):
            anytime.budget_rows(fit, judge, [5])

    def test_thresholds_of_a_row_give_it_again(self):
        fit, judge = make_table(seed=0), make_table(seed=1)
        row, = anytime.budget_rows(fit, judge, [2.0])
        assert anytime.policy_row(judge, row['thresholds'], 'again')['top1'] == row['top1']

    def test_budgets_that_nobody_asked_for(self):
        rows = anytime.budget_rows(make_table(), make_table(seed=1), num=6)
        budgets = [row['budget'] for row in rows]
        assert len(budgets) == len(set(budgets)) <= 6
        assert budgets == sorted(budgets)
        alike = ExitTable(torch.full((9, 2), 0.5), torch.ones(9, 2, dtype=torch.bool), (1, 2))
        assert len(anytime.budget_rows(alike, alike, num=6)) == 1

    def test_kept_budgets_are_json_and_can_be_set(self, model):
        table = make_table(step_macs=model.step_macs)
        budget = (model.step_macs[0] + model.step_macs[2]) / 2e9
        try:
            model.store_budgets(anytime.budgets_to_keep(table, table, [budget], split='s', fitted_on='f'))
            chosen = model.set_budget(gmacs=budget)
            assert chosen['evaluated']['fitted_on'] == 'f'
            assert table.evaluate(chosen['policy']).gmacs <= budget
        finally:
            model.load_exit_cfg({})

    def test_geometric(self):
        fit, judge = make_table(seed=0), make_table(seed=1)
        rows = anytime.geometric_rows(fit, judge)
        assert [row['point'] for row in rows] == [f'geometric p={p}' for p in range(1, 40)]
        point = judge.evaluate(geometric_thresholds(fit, 20))
        assert (rows[19]['gmacs'], rows[19]['top1']) == pytest.approx((point.gmacs, point.top1), abs=1e-4)

    def test_curve(self):
        fit, judge = make_table(seed=0), make_table(seed=1)
        curve = anytime.budget_curve(fit, judge)
        costs = [gmacs for gmacs, _ in curve]
        assert costs == sorted(costs)
        assert costs[0] == 1
        assert max(top1 for _, top1 in curve) > anytime.step_curve(judge)[1][1]


class TestReport:
    def test_small_numbers_and_lists(self, tmp_path):
        rows = [{'point': 'a', 'gmacs': 0.001234, 'thresholds': [0.5, 1 / 3]}, {'point': 'b', 'gmacs': 2.0}]
        text = format_table(rows)
        assert '0.00123  0.5 0.3333' in text
        assert '2.00000' in text
        write_rows(tmp_path / 'r.csv', rows)
        assert read_rows(tmp_path / 'r.csv')[0]['thresholds'] == f'0.5 {1 / 3}'
        odd = format_table([{'zero': 0.0, 'nan': math.nan, 'inf': math.inf}])
        assert odd.splitlines()[-1].split() == ['0.000', 'nan', 'inf']

    @pytest.mark.parametrize('costs', [(1., 2.), (0.01, 2.)])
    def test_picture(self, tmp_path, costs):
        path = tmp_path / 'new' / 'c.png'
        assert plot_accuracy_over_macs(
            path, {'steps': [(c, 50.) for c in costs]}, {'static': [(1.5, 60.)], 'points': [(1., 2.), (2., 3.)]}, 'It')
        with Image.open(path) as image:
            colours = {image.getpixel((x, y))[:3] for x in range(image.width) for y in range(image.height)}
        assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # a line and two kinds of markers
        assert not list(path.parent.glob('.partial*'))

    def test_picture_that_cannot_be_drawn(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match=r"--curve: expected a file that ends in one of .*png.*, got 'c.xyz'"):
            check_plot('c.xyz', '--curve')
        check_plot('c.PNG', '--curve')
        import_module = builtins.__import__

        def without(name, *args, **kwargs):
            if name.startswith('matplotlib'):
                raise ImportError(name)
            return import_module(name, *args, **kwargs)

        monkeypatch.setattr(builtins, '__import__', without)
        with pytest.raises(ValueError, match=r'--curve needs matplotlib.*pip install timm-dynamic\[plot\]'):
            check_plot('c.png', '--curve')
        assert not plot_accuracy_over_macs(tmp_path / 'c.png', {'steps': [(1., 2.)]})
