"""A model is run once: metrics are those of what it answers, and the table tells what every exit would give."""
import pytest
import timm
import torch
from accelerate import Accelerator
from exit_tables import make_table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_dynamic  # noqa: F401
from timm_dynamic.evaluation.metrics import evaluate
from timm_dynamic.exits import collect_exit_table, solve_policy
from timm_dynamic.exits.confidence_scale import ConfidenceScale


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


def plain_metrics(model, loader):
    """Metrics of what `forward` gives, batch by batch."""
    logits, target = (torch.cat(values) for values in zip(*((model(x).detach(), y) for x, y in loader)))
    ranks = (logits > logits.gather(1, target[:, None])).sum(dim=1)
    return {
        'loss': nn.functional.cross_entropy(logits, target).item(), 'count': len(target),
        'top1': 100 * (ranks < 1).float().mean().item(), 'top5': 100 * (ranks < 5).float().mean().item()}


class TestEvaluate:
    def test_is_what_forward_gives(self, model, loader, accelerator):
        metrics, table = evaluate(model, loader, accelerator)
        gmacs = metrics['gmacs']
        assert {k: metrics[k] for k in ('loss', 'top1', 'top5', 'count')} == pytest.approx(plain_metrics(model, loader))
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
            policy.scale = ConfidenceScale([v.item() for v in table.confidence.aminmax()], [0., 1.])
        model.set_exit(policy)
        seen = []
        metrics, again = evaluate(
            model, loader, accelerator, on_batch=lambda output, target, outputs, x: seen.append((output, target)))
        expected = torch.cat([model(x) for x, _ in loader])
        torch.testing.assert_close(torch.cat([output for output, _ in seen]), expected, rtol=0, atol=1e-5)
        assert torch.equal(torch.cat([target for _, target in seen]), loader.dataset.tensors[1])
        point = table.evaluate(policy)
        assert len(point.steps_used.unique()) > 1
        gmacs = metrics['gmacs']
        assert {k: metrics[k] for k in ('loss', 'top1', 'top5', 'count')} == pytest.approx(plain_metrics(model, loader))
        assert (gmacs, metrics['top1']) == pytest.approx((point.gmacs, point.top1))
        assert torch.equal(again.confidence, table.confidence)  # all steps, whatever is set

    def test_classes_that_count(self, model, loader, accelerator):
        """They are told apart among themselves; the model's confidence is its own."""
        x, target = loader.dataset.tensors
        few = DataLoader(TensorDataset(x, target % 3), batch_size=8)
        metrics, table = evaluate(model, few, accelerator, classes=torch.tensor([4, 0, 2]))
        logits = torch.stack(list(model.forward_steps(x)), dim=1)
        expected = logits[:, :, [4, 0, 2]].argmax(dim=2) == (target % 3)[:, None]
        assert torch.equal(table.correct, expected)
        torch.testing.assert_close(table.confidence, logits.softmax(-1).amax(-1).detach(), rtol=0, atol=1e-5)
        assert metrics['top1'] == pytest.approx(100 * expected[:, -1].float().mean().item())

    def test_dtype_and_layout(self, model, loader, accelerator, monkeypatch):
        seen, init_state = [], model.init_state
        monkeypatch.setattr(model, 'init_state', lambda x: seen.append(x) or init_state(x.float()))
        evaluate(model, loader, accelerator)
        evaluate(model, loader, accelerator, channels_last=True, dtype=torch.bfloat16)
        for i, (layout, dtype) in enumerate([
                (torch.contiguous_format, torch.float32), (torch.channels_last, torch.bfloat16)]):
            assert seen[5 * i].is_contiguous(memory_format=layout)
            assert seen[5 * i].dtype == dtype

    def test_train_mode_is_an_error(self, model, loader, accelerator):
        model.train()
        try:
            with pytest.raises(ValueError, match='eval mode'):
                evaluate(model, loader, accelerator)
        finally:
            model.eval()

    def test_a_static_model_has_one_step(self, loader, accelerator):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 7))
        metrics, table = evaluate(net, loader, accelerator)
        assert metrics == pytest.approx(plain_metrics(net, loader))
        assert table is None

    def test_every_step(self, model, loader, accelerator):
        metrics, table = evaluate(model, loader, accelerator)
        assert [metrics[f'top1_step{t}'] for t in (1, 2, 3)] == [point.top1 for point in table.anytime()]
