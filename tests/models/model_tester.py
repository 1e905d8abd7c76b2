"""What every model of this package does. A family subclasses a tester and names a small model.

`ModelTester` is timm's contract, `StepTester` the step protocol, and `DynamicModelTester` both. Variants of a family
need only a `StepTester`.
"""
import copy
import json
import pickle
import threading
from typing import Any, ClassVar

import pytest
import timm
import torch
from timm.models import get_model_args, group_parameters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_dynamic.exits import ExitTable, early_exit, solve_policy, solve_thresholds
from timm_dynamic.models.dynamic_net import select_rows
from timm_dynamic.utils import save_pretrained


class Tester:
    """Base: learning and features.

    Attributes:
        name: Registered name.
        kwargs: Arguments that make it small.
        size: Side of its images.
        other_size: Another side that it takes.
        atol: How far logits may differ between batches of different size.
    """
    name = ''
    kwargs: ClassVar[dict[str, Any]] = {}
    size = 96
    other_size = 112
    atol = 1e-5

    @classmethod
    def create(cls, **kwargs):
        return timm.create_model(cls.name, **{**cls.kwargs, **kwargs})

    @classmethod
    def make_model(cls):
        """The model that the tests share."""
        return cls.create().eval()

    @pytest.fixture(scope='class')
    @classmethod
    def model(cls):
        torch.manual_seed(0)
        return cls.make_model()

    @classmethod
    def images(cls, batch=2, chans=3, size=None):
        size = size or cls.size
        return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(batch))

    def expected_head_output(self, model, x):
        """What `forward_head` makes of the features."""
        return model(x)

    def heads(self, model):
        classifier = model.get_classifier()
        return classifier if isinstance(classifier, tuple) else (classifier,)

    def test_every_parameter_learns(self):
        model = self.create(num_classes=7)
        out = model(self.images())
        assert out.shape == (2, 7)
        out.square().mean().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []

    def test_features_and_other_classifiers(self, model):
        model, x = copy.deepcopy(model), self.images()
        with torch.no_grad():
            features = model.forward_features(x)
            assert features.shape[:2] == (2, model.num_features)
            pre_logits = model.forward_head(features, pre_logits=True)
            assert pre_logits.shape == (2, model.head_hidden_size)
            torch.testing.assert_close(
                model.forward_head(features), self.expected_head_output(model, x), rtol=0, atol=self.atol)
            model.reset_classifier(0)
            torch.testing.assert_close(model(x), pre_logits, rtol=0, atol=self.atol)
            assert self.create(num_classes=0).eval()(x).shape == pre_logits.shape
            model.reset_classifier(5, 'avg')
            assert model(x).shape == (2, 5)
        assert [head.out_features for head in self.heads(model)] == [5] * len(self.heads(model))


class ModelTester(Tester):
    """timm's contract."""

    def train_logits(self, model, x):
        """Logits that depend on all parameters."""
        return model(x)

    def test_layers_named_in_the_config(self, model):
        weights = model.state_dict()
        for what in ('first_conv', 'classifier'):
            names = model.pretrained_cfg[what]
            names = names if isinstance(names, tuple) else (names,)
            assert names
            assert all(f'{name}.weight' in weights for name in names)
        registered = timm.get_pretrained_cfg(self.name)
        if not self.kwargs:
            assert (registered.first_conv, registered.classifier) == (
                model.pretrained_cfg['first_conv'], model.pretrained_cfg['classifier'])

    def test_channels_classes_and_sizes(self):
        model = self.create(in_chans=1, num_classes=4).eval()
        with torch.no_grad():
            for size in (self.size, self.other_size):
                assert model(self.images(chans=1, size=size)).shape == (2, 4)

    @pytest.mark.parametrize('batch', [0, 1])
    def test_small_batches(self, model, batch):
        with torch.no_grad():
            assert model(self.images(batch)).shape == (batch, model.num_classes)

    def test_channels_last(self, model):
        x = self.images()
        with torch.no_grad():
            expected = model(x)
            twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
            torch.testing.assert_close(
                twin(x.contiguous(memory_format=torch.channels_last)), expected, rtol=0, atol=10 * self.atol)

    def test_half_precision(self, model):
        x = self.images()
        with torch.no_grad():
            assert copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
            with torch.autocast('cpu', dtype=torch.bfloat16):
                low = model(x)
        assert low.dtype == torch.bfloat16
        assert low.isfinite().all()

    def test_copies_and_pickles(self, model):
        x = self.images()
        with torch.no_grad():
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(x), model(x))

    def test_export(self, model, tmp_path):
        x = self.images()
        save_pretrained(model, tmp_path / 'm')
        with torch.no_grad():
            again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True).eval()
            assert torch.equal(again(x), model(x))
            save_pretrained(again, tmp_path / 'again')
            third = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True).eval()
            assert torch.equal(third(x), model(x))
            other = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True, num_classes=4, in_chans=1).eval()
            assert other(self.images(chans=1)).shape == (2, 4)
        config, again = (json.loads((tmp_path / name / 'config.json').read_text()) for name in ('m', 'again'))
        assert config == again

    def test_grad_checkpointing_changes_no_gradient(self):
        model, x = self.create().eval(), self.images()  # eval: batch statistics would be updated twice
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            self.train_logits(model, x).square().mean().backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        torch.testing.assert_close(*gradients)

    def test_group_matcher_covers_all_parameters(self, model):
        names = dict(model.named_parameters()).keys()
        assert getattr(model, 'no_weight_decay', set)() <= names
        for coarse in (False, True):
            groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
            assert groups.keys() == names
            of_layers = {name.rpartition('.')[0]: group for name, group in groups.items()}
            convs, heads = model.pretrained_cfg['first_conv'], model.pretrained_cfg['classifier']
            assert {of_layers[n] for n in (convs if isinstance(convs, tuple) else (convs,))} == {0}
            last = max(groups.values())
            assert {of_layers[n] for n in (heads if isinstance(heads, tuple) else (heads,))} == {last}
            assert last > 1


class StepTester(Tester):
    """The step protocol.

    Attributes:
        costs_grow: Larger images cost more.
    """
    costs_grow = True

    @pytest.fixture(scope='class')
    @classmethod
    def all_steps(cls, model):
        """Images, and for each step the logits [B, C], confidences [B], and the state after it."""
        x, steps = cls.images(12), []
        with torch.no_grad():
            state = model.init_state(x)
            for t in range(model.num_steps):
                logits, state = model.step(t, state)
                steps.append((logits, model.confidence(logits, state), state))
        return x, steps

    def thresholds(self, steps):
        """About half of the images stop after each step."""
        return [confidence.quantile(0.5).item() for _, confidence, _ in steps]

    def test_forward_is_the_last_step(self, model, all_steps):
        x, steps = all_steps
        with torch.no_grad():
            torch.testing.assert_close(model(x), steps[-1][0], rtol=0, atol=self.atol)
            torch.testing.assert_close(
                model(x, all_steps=True)['logits'], torch.stack([logits for logits, _, _ in steps]), rtol=0,
                atol=self.atol)

    def test_a_state_is_batch_first_tensors(self, model, all_steps):
        x, _ = all_steps
        with torch.no_grad():
            state = model.init_state(x)
            for t in range(model.num_steps):
                before = {k: v.clone() for k, v in state.items()}
                logits, after = model.step(t, state)
                assert state.keys() == before.keys()
                assert all(torch.equal(v, before[k]) for k, v in state.items())  # it is not changed
                state = after
                assert all(type(v) is torch.Tensor and len(v) == len(x) for v in state.values())
                confidence = model.confidence(logits, state)
                assert (confidence.dtype, confidence.shape) == (torch.float32, (len(x),))

    @pytest.mark.parametrize('rows', [[], [3], [7, 0, 11, 4]])
    def test_rows_are_independent(self, model, all_steps, rows):
        x, steps = all_steps
        rows = torch.tensor(rows, dtype=torch.int64)
        with torch.no_grad():
            for t in range(model.num_steps):  # rows leave before each step
                state = select_rows(steps[t - 1][2], rows) if t else model.init_state(x[rows])
                logits, state = model.step(t, state)
                torch.testing.assert_close(logits, steps[t][0][rows], rtol=0, atol=self.atol)
                torch.testing.assert_close(model.confidence(logits, state), steps[t][1][rows], rtol=0, atol=self.atol)
                assert {k: v.shape[1:] for k, v in state.items()} == {k: v.shape[1:] for k, v in steps[t][2].items()}

    def test_costs_are_counted(self, model):
        assert list(model.step_macs) == sorted(set(model.step_macs))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(self.images())
        assert counter.get_total_flops() == 2 * 2 * model.step_macs[-1]
        twin = copy.deepcopy(model)
        twin.set_input_size(self.other_size)
        assert (twin.step_macs[-1] > model.step_macs[-1]) == self.costs_grow
        assert get_model_args(twin)['img_size'] == (self.other_size, self.other_size)
        with pytest.raises(ValueError, match='square images, got img_size 96x80'):
            twin.set_input_size((96, 80))
        assert twin.img_size == self.other_size

    def test_real_exit_is_simulated_exit(self, model, all_steps):
        x, steps = all_steps
        thresholds = self.thresholds(steps)
        confidence = torch.stack([confidence for _, confidence, _ in steps])
        stops = confidence >= torch.tensor(thresholds)[:, None]
        stops[-1] = True
        expected = stops.int().argmax(dim=0)
        with FlopCounterMode(display=False) as counter:
            result = early_exit(model, x, thresholds)
        assert torch.equal(result.steps_used, expected + 1)
        assert len(expected.unique()) > 1
        rows = torch.arange(len(x))
        logits = torch.stack([logits for logits, _, _ in steps])[expected, rows]
        torch.testing.assert_close(result.logits, logits, rtol=0, atol=self.atol)
        torch.testing.assert_close(result.confidence, confidence[expected, rows], rtol=0, atol=self.atol)
        assert counter.get_total_flops() == 2 * sum(model.step_macs[step] for step in expected.tolist())
        assert early_exit(model, x[:0], thresholds).logits.shape == (0, model.num_classes)
        alone = early_exit(model, x[5:6], thresholds)
        assert alone.steps_used == result.steps_used[5]
        torch.testing.assert_close(alone.logits[0], result.logits[5], rtol=0, atol=self.atol)


class DynamicModelTester(ModelTester, StepTester):
    """Both, and what concerns both: exits in exported folders, copies of models."""

    def train_logits(self, model, x):
        return model.forward_train(x)

    def test_exits_are_exported_and_dropped_with_their_classes(self, model, all_steps, tmp_path, caplog):
        model, (x, steps) = copy.deepcopy(model), all_steps
        thresholds = self.thresholds(steps)
        model.store_budgets([{'gmacs': model.step_macs[0] / 1e9, 'policy': thresholds, 'top1': 50.}])
        model.set_exit(thresholds)
        save_pretrained(model, tmp_path)
        with torch.no_grad():
            again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
            assert again.exit_cfg == model.exit_cfg
            for twin in (again, pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(x), model(x))
            again.clear_exit()
            assert not torch.equal(again(x), model(x))
            assert again.set_budget(gmacs=model.step_macs[0] / 1e9)['top1'] == 50.
        assert caplog.text == ''
        other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=4)
        assert caplog.text.count(f'dropped: they are for {model.num_classes} classes, the model has 4') == 1
        model.reset_classifier(4)
        assert other.exit_cfg == model.exit_cfg == {}

    def test_exits_that_the_caller_gives_are_copied(self, model):
        given = {'budgets': [{'gmacs': 1., 'policy': [0.5] * model.num_steps}], 'num_classes': model.num_classes}
        before = copy.deepcopy(given)
        models = [self.create(exit_cfg=given, num_classes=n) for n in (3, model.num_classes)]
        models[1].set_exit([0.5] * model.num_steps)
        models[1].exit_cfg['budgets'][0]['gmacs'] = 2.
        assert given == before
        assert [sorted(m.exit_cfg) for m in models] == [[], ['budgets', 'exit', 'num_classes']]
        assert all(get_model_args(m)['exit_cfg'] is m.exit_cfg for m in models)  # the model's own is exported

    def test_threads_share_a_model(self, model, all_steps):
        x, steps = all_steps
        results = {}

        def work(first):
            with torch.no_grad():
                results[first] = torch.cat([model(x[i:i + 1]) for i in range(first, len(x), 2)])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for first in range(2):
            torch.testing.assert_close(results[first], steps[-1][0][first::2], rtol=0, atol=self.atol)

    def test_for_inference(self, model):
        x, twin = self.images(), copy.deepcopy(model).train()
        with torch.no_grad():
            expected = list(model.forward_steps(x))
            assert twin.for_inference() is twin
            for _ in range(2):
                assert not twin.training
                assert not any(isinstance(m, nn.BatchNorm2d) for m in twin.modules())
                assert all(p.is_contiguous(memory_format=torch.channels_last) for p in twin.parameters() if p.ndim == 4)
                for a, b in zip(twin.forward_steps(x), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
                weights = {k: v.clone() for k, v in twin.state_dict().items()}
                twin.for_inference()
                assert all(torch.equal(v, weights[k]) for k, v in twin.state_dict().items())
        for fused in (twin, copy.deepcopy(twin)):
            with pytest.raises(RuntimeError, match='cannot be trained'):
                fused.train()
            assert not any(m.training for m in fused.modules())
            assert fused.eval() is fused

    def test_compiles_without_graph_breaks(self, model):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend='eager', fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(self.images()), model(self.images()), rtol=0, atol=self.atol)

    @pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
    def test_graphs_serve_any_batch(self, model):
        batch = torch.export.Dim('batch', min=1)
        with torch.no_grad():
            traced = torch.jit.trace(model, self.images(1), check_trace=False)
            exported = torch.export.export(model, (self.images(2),), dynamic_shapes=({0: batch},)).module()
            for number in (1, 2, 5):
                x = self.images(number)
                torch.testing.assert_close(traced(x), model(x), rtol=0, atol=self.atol)
                torch.testing.assert_close(exported(x), model(x), rtol=0, atol=self.atol)

    @pytest.mark.filterwarnings('ignore::FutureWarning')
    def test_a_graph_of_early_exit_is_refused(self, model, all_steps):
        model, (x, steps) = copy.deepcopy(model), all_steps
        model.set_exit(self.thresholds(steps))
        for trace in (torch.jit.trace, lambda model, x: torch.export.export(model, (x,))):
            with pytest.raises(RuntimeError, match=r'A traced graph cannot exit early'):
                trace(model, x)

    @pytest.mark.parametrize('solve', [solve_thresholds, solve_policy])
    def test_exits_outlive_the_meta_device(self, model, all_steps, solve):
        """transformers creates models there."""
        _, steps = all_steps
        table = ExitTable(
            torch.stack([confidence for _, confidence, _ in steps], dim=1),
            torch.rand(len(steps[0][0]), len(steps), generator=torch.Generator().manual_seed(0)) < 0.7, model.step_macs)
        budget = sum(model.step_macs[:2]) / 2e9
        twin = copy.deepcopy(model)
        twin.store_budgets([{'gmacs': budget, 'policy': solve(table, budget)}])
        twin.set_budget(budget)
        with torch.device('meta'):
            again = self.create(exit_cfg=twin.exit_cfg, num_classes=model.num_classes)
        assert again.exit_cfg == twin.exit_cfg
        assert torch.equal(again.exit_policy(table.confidence[:, :1]), twin.exit_policy(table.confidence[:, :1]))
        assert again.set_budget(budget) == twin.set_budget(budget)

    @pytest.mark.parametrize(('x', 'message'), [
        (torch.zeros(2, 1, 96, 96), r'\[batch, 3, height, width\], got \[2, 1, 96, 96\]'),
        (torch.zeros(3, 96, 96), r'\[batch, 3, height, width\], got \[3, 96, 96\]'),
        (None, 'Expected image.* got NoneType'),
    ])
    def test_bad_images(self, model, x, message):
        for call in (model, model.forward_features, model.init_state):
            with pytest.raises(ValueError, match=message):
                call(x)

    def test_arguments_that_are_refused(self):
        with pytest.raises(ValueError, match=r"global_pool must be 'avg'.*, got 'max'"):
            self.create(global_pool='max')
        with pytest.raises(ValueError, match='square images, got img_size 96x80'):
            self.create(img_size=(96, 80))
        with pytest.raises(RuntimeError, match='features_only is not implemented'):
            self.create(features_only=True)
