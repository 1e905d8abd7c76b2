import copy
import json
import math
import pickle

import pytest
import timm
import torch
from torch import nn

from timm_dynamic.models.dynamic_net import DynamicNet, num_rows, select_rows
from timm_dynamic.models.exit_cfg import policy_from_json, policy_to_json, register_exit_policy


class Refiner(DynamicNet):
    """Three steps, of 12, 20 and 20 multiply-adds for 4 inputs and 3 classes."""

    def __init__(self, num_classes=3, **kwargs):
        super().__init__(3, num_classes, in_chans=4, img_size=1, **kwargs)
        self.mix = nn.Linear(4, 2)
        self.head = nn.Linear(4, num_classes)

    def init_state(self, x):
        return {'x': x.flatten(1)}

    def step(self, t, state):
        x = state['x'] if t == 0 else torch.cat([self.mix(state['x']), state['x'][:, 2:]], dim=1).tanh()
        return self.head(x), {'x': x}


class Recorded(DynamicNet):
    """Gives out recorded logits [T, B, C], and counts the rows of each step."""

    def __init__(self, logits):
        super().__init__(len(logits), logits.shape[2])
        self.logits, self.rows = logits, []

    def init_state(self, x):
        return {'row': x}

    def step(self, t, state):
        self.rows.append(len(state['row']))
        return self.logits[t, state['row']], state


@pytest.fixture
def model():
    return Refiner().eval()


def test_rows_of_a_state():
    state = {'a': torch.arange(6).view(3, 2), 'b': torch.tensor([True, False, True])}
    assert num_rows(state) == 3
    assert select_rows(state, torch.tensor([2, 0]))['a'].tolist() == [[4, 5], [0, 1]]
    assert select_rows(state, torch.tensor([False, True, False]))['a'].tolist() == [[2, 3]]


def test_forward_is_the_last_step_and_the_mean_in_training(model):
    x = torch.randn(5, 4, 1, 1)
    steps = list(model.forward_steps(x))
    assert torch.equal(model(x), steps[-1])
    assert torch.equal(model(x, all_steps=True)['logits'], torch.stack(steps))
    model.train()
    torch.testing.assert_close(model(x), torch.stack(steps).mean(dim=0))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(TypeError, match='Further arguments need all_steps=True, got actions'):
        model(x, actions=None)


def test_steps_are_run_when_asked_for():
    model = Recorded(torch.randn(3, 2, 4))
    steps = model.forward_steps(torch.arange(2))
    next(steps)
    assert model.rows == [2]


def test_costs_are_counted(model):
    assert model.step_macs == (12, 32, 52)
    model.train()
    assert model.step_macs is model.step_macs
    assert model.training
    assert all(not p.is_meta for p in model.parameters())


def test_exit_by_hand():
    # confidences of two classes with logits (z, 0): 1 / (1 + exp(-z)); thresholds sit between them
    z = torch.tensor([[3., 0., 0., 1.], [0., 3., 0., 1.], [0., 0., 0., 0.]])
    model = Recorded(torch.stack([z, torch.zeros_like(z)], dim=-1)).eval()
    result = model.forward_exit(torch.arange(4), model.make_stop_rule([0.9, 0.7, 2.0]))
    assert result.steps_used.tolist() == [1, 2, 3, 2]
    assert model.rows == [4, 3, 1]  # no step is run for an image that has left
    torch.testing.assert_close(result.confidence, torch.tensor([3., 3., 0., 1.]).sigmoid())
    torch.testing.assert_close(result.logits[:, 0], torch.tensor([3., 3., 0., 1.]))


@torch.no_grad()
def test_steps_of_many_models_are_compiled():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    x = torch.randn(2, 4, 1, 1)
    for _ in range(4):  # torch gives up after 8 variants of a function
        model = Refiner().eval()
        state = model.init_state(x)
        expected = list(model.forward_steps(x))
        model.compile_steps(backend=count)
        for t in range(3):
            logits, _, state = model.run_step(t, state)
            torch.testing.assert_close(logits, expected[t])
    assert len(graphs) == 4 * 3
    torch._dynamo.reset()


@pytest.mark.parametrize('batch', [0, 1, 7])
@pytest.mark.parametrize('thresholds', [[0., 0., 0.], [2., 2., 2.], [0.42, 0.45, torch.nan]])
def test_exit_is_simulated_exit(model, batch, thresholds):
    x = torch.randn(batch, 4, 1, 1)
    logits = model(x, all_steps=True)['logits']
    confidence = logits.softmax(-1).amax(-1)
    reached = confidence >= torch.tensor(thresholds)[:, None]
    reached[-1] = True
    step = reached.int().argmax(dim=0)
    model.set_exit(thresholds)
    result = model.forward_exit(x, model.make_stop_rule(thresholds))
    assert torch.equal(result.steps_used, step + 1)
    torch.testing.assert_close(result.logits, logits[step, range(batch)], rtol=0, atol=1e-6)
    torch.testing.assert_close(result.confidence, confidence[step, range(batch)], rtol=0, atol=1e-6)
    assert torch.equal(model(x), result.logits)
    model.clear_exit()
    torch.testing.assert_close(model(x), logits[-1])


def test_a_rule_sees_the_history_of_those_that_go_on(model):
    seen = []

    def rule(history):
        seen.append(tuple(history.shape))
        return history[:, 0] > history[:, 0].median()

    model.forward_exit(torch.randn(9, 4, 1, 1), rule)
    assert seen == [(9, 1), (5, 2)]


def test_exit_keeps_the_graph(model):
    x = torch.randn(6, 4, 1, 1)
    model.forward_exit(x, model.make_stop_rule([0.4, 0.4, 0.])).logits.sum().backward()
    assert model.head.weight.grad is not None


@register_exit_policy
class Between:
    """Thresholds as a policy that can be interpolated with those above it."""

    def __init__(self, bounds):
        self.bounds, self.num_steps = list(bounds), len(bounds)

    def __call__(self, history):
        return history[:, -1] >= self.bounds[history.shape[1] - 1]

    def interpolate(self, other, share):
        if other.bounds < self.bounds:
            return None
        return Between([a + share * (b - a) for a, b in zip(self.bounds, other.bounds)])

    def state_dict(self):
        return {'bounds': self.bounds}

    @classmethod
    def from_state_dict(cls, state):
        return cls(**state)


@pytest.mark.parametrize(('thresholds', 'message'), [
    ([0.5, 0.5], r'Expected 3 thresholds, one a step, got a tensor of shape \[2\]'),
    ([0.5, float('nan'), 0.], 'must be numbers'),
    (None, 'Expected 3 thresholds or an ExitPolicy, got NoneType'),
    (Between([0.5, 0.5]), 'Expected a policy for 3 steps, got one for 2'),
])
def test_bad_thresholds(model, thresholds, message):
    with pytest.raises(ValueError, match=message):
        model.set_exit(thresholds)
    with pytest.raises(ValueError, match=message):
        model.store_budgets([{'gmacs': 40e-9, 'policy': thresholds}])
    assert model.exit_cfg == {}


BUDGETS = [
    {'gmacs': 40e-9, 'policy': [0.7, 0.8, 0.], 'top1': 70.},
    {'gmacs': 20e-9, 'policy': torch.tensor([0.4, 0.5, 0.]), 'top1': 60.},
]


def test_budgets(model):
    with pytest.raises(ValueError, match=r'no stored budgets.*validate\.py --model .*model\.store_budgets'):
        model.set_budget(30e-9)
    model.store_budgets(BUDGETS)
    assert [b['gmacs'] for b in model.exit_cfg['budgets']] == [20e-9, 40e-9]
    assert model.set_budget(gmacs=20e-9)['top1'] == 60.
    assert model.exit_cfg['exit'] == pytest.approx([0.4, 0.5, 0.])
    for gmacs in (40e-9, 52e-9):  # more than any of them: the dearest
        assert model.set_budget(gmacs=gmacs)['top1'] == 70.
    with pytest.raises(ValueError, match=r'the first step costs 1.2e-08, all steps 5.2e-08'):
        model.set_budget(gmacs=1e-9)
    with pytest.raises(ValueError, match=r'the first step costs 1.2e-08, all steps 5.2e-08'):
        model.set_budget(gmacs=1.)
    with pytest.raises(ValueError, match='below the smallest stored one, 2e-08'):
        model.set_budget(gmacs=13e-9)
    with pytest.raises(ValueError, match="A budget is a number of GMACs, got 'much'"):
        model.set_budget(gmacs='much')


def test_budgets_between(model):
    model.store_budgets([*BUDGETS, {'gmacs': 50e-9, 'policy': [1e8, 0.9, 0.]}])
    chosen = model.set_budget(gmacs=25e-9)  # a quarter of the way
    assert chosen == {'gmacs': 25e-9, 'policy': pytest.approx([0.475, 0.575, 0.]), 'between': [20e-9, 40e-9]}
    assert model.exit_cfg['exit'] == chosen['policy']
    z = torch.tensor([0.474, 0.476]).logit()
    assert model.make_stop_rule(chosen['policy'])(z.sigmoid()[:, None]).tolist() == [False, True]
    # 1e8 stops nobody, as 1 does: 0.85 is half of the way there, 5e7 would be all of it.
    assert model.set_budget(gmacs=45e-9)['policy'] == pytest.approx([0.85, 0.85, 0.])
    json.dumps(model.exit_cfg, allow_nan=False)
    assert len(model.exit_cfg['budgets']) == 3  # what is kept stays


def test_budgets_between_richer_policies(model):
    low, high = Between([0.4, 0.5, 0.]), Between([0.6, 0.9, 0.])
    model.store_budgets([{'gmacs': 20e-9, 'policy': low}, {'gmacs': 40e-9, 'policy': high}])
    assert model.set_budget(30e-9)['policy'] == {'type': 'Between', 'bounds': pytest.approx([0.5, 0.7, 0.])}
    # The cheaper one, where they refuse, are of different kinds, or cannot be interpolated.
    for cheap, dear in ((high, low), (low, [0.5] * 3), ([0.5] * 3, low), (NotWorse(0.5), NotWorse(0.6))):
        model.store_budgets([{'gmacs': 20e-9, 'policy': cheap}, {'gmacs': 40e-9, 'policy': dear}])
        chosen = model.set_budget(30e-9)
        assert chosen == model.exit_cfg['budgets'][0]
        assert model.exit_cfg['exit'] == chosen['policy']


def test_exit_cfg_is_plain_json_and_brings_everything_back(model):
    model.store_budgets(BUDGETS)
    model.set_budget(gmacs=40e-9)
    kept = json.loads(json.dumps(model._model_args['exit_cfg']))
    again = Refiner(exit_cfg=kept).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(8, 4, 1, 1)
    assert torch.equal(again(x), model(x))
    assert again.set_budget(gmacs=20e-9)['top1'] == 60.
    assert again._model_args['exit_cfg']['exit'] == pytest.approx([0.4, 0.5, 0.])  # the recorded argument follows


@register_exit_policy
class NotWorse:
    """Stops as soon as the confidence is no higher than at the step before, or above a bound."""

    def __init__(self, bound):
        self.bound = bound

    def __call__(self, history):
        return (history[:, -1] > self.bound) | (history.diff(dim=1) <= 0).any(dim=1)

    def state_dict(self):
        return {'bound': torch.tensor(self.bound)}

    @classmethod
    def from_state_dict(cls, state):
        return cls(**state)


def test_richer_policies_are_kept_too(model, caplog):
    model.set_exit(NotWorse(0.5))
    model.store_budgets([{'gmacs': 40e-9, 'policy': NotWorse(0.75)}])
    kept = json.loads(json.dumps(model.exit_cfg))
    assert kept['exit'] == {'type': 'NotWorse', 'bound': 0.5}
    again = Refiner(exit_cfg=kept).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(8, 4, 1, 1)
    assert torch.equal(again(x), model(x))
    again.set_budget(gmacs=45e-9)
    assert again.exit_cfg['exit']['bound'] == 0.75

    model.set_exit(lambda history: history[:, -1] > 0.5)  # works, but a function cannot be exported
    assert 'function is not a registered exit policy: it will not be exported' in caplog.text
    assert model(x).shape == (8, 3)
    assert 'exit' not in model.exit_cfg
    with pytest.raises(ValueError, match='function is not a registered exit policy and cannot be stored'):
        model.store_budgets([{'gmacs': 40e-9, 'policy': lambda history: history[:, -1] > 0.5}])
    Refiner(exit_cfg={'exit': {'type': 'Unknown'}})
    assert "dropped: there is no exit policy of type 'Unknown'" in caplog.text


def test_other_classes_drop_budgets_with_a_notice(model, caplog):
    model.store_budgets(BUDGETS)
    other = Refiner(num_classes=5, exit_cfg={**copy.deepcopy(model.exit_cfg), 'origin': {'flops': [1, 2, 3]}})
    assert 'dropped: they are for 3 classes, the model has 5' in caplog.text
    assert other.exit_cfg == {'origin': {'flops': [1, 2, 3]}}
    assert other._model_args == {'exit_cfg': other.exit_cfg}


def test_copies_and_pickles(model):
    model.set_exit([0.4, 0.4, 0.])
    x = torch.randn(8, 4, 1, 1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        twin.clear_exit()
        assert twin._model_args['exit_cfg'] == {'num_classes': 3}
    assert 'exit' in model.exit_cfg


def test_infinity_is_kept_as_json_of_all_languages(model):
    thresholds = [math.inf, -math.inf, math.nan]
    model.set_exit(thresholds)
    model.store_budgets([{'gmacs': 40e-9, 'policy': NotWorse(math.inf)}, {'gmacs': 20e-9, 'policy': thresholds}])
    kept = json.loads(json.dumps(model.exit_cfg, allow_nan=False))
    x = torch.randn(8, 4, 1, 1)
    again = Refiner(exit_cfg=kept).eval()
    assert str(list(again.exit_policy.values)) == str(thresholds)  # nan is not equal to itself
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    again.set_budget(gmacs=40e-9)
    assert again.exit_policy.bound == math.inf
    again.set_exit(kept['exit'])
    assert again.exit_policy.values[:2] == (math.inf, -math.inf)


@pytest.mark.parametrize('exit_cfg', [
    {'exit': None}, {'exit': {'type': [1]}}, {'exit': [10 ** 400, 0, 0]}, {'budgets': 5}, {'budgets': [5]},
    {'budgets': [{'gmacs': 20e-9}]}, {'budgets': [{'policy': [0, 0, 0]}]},
    {'budgets': [{'gmacs': 'a', 'policy': [0, 0, 0]}]}, {'budgets': [{'gmacs': math.nan, 'policy': [0, 0, 0]}]},
])
def test_a_damaged_exit_cfg_is_dropped_with_a_notice(exit_cfg, caplog):
    model = Refiner(exit_cfg={**exit_cfg, 'num_classes': 3, 'origin': {'flops': [1]}})
    assert 'The exit policy and budgets of the model are dropped: ' in caplog.text
    assert model.exit_cfg == {'origin': {'flops': [1]}}


def test_what_cannot_be_kept_as_a_budget(model):
    for cfg in ([1], 'abc'):
        with pytest.raises(ValueError, match='exit_cfg must be a dict'):
            Refiner(exit_cfg=cfg)
        with pytest.raises(ValueError, match='exit_cfg must be a dict'):
            model.load_exit_cfg(cfg)
    for gmacs in (math.nan, math.inf, 0, -1):
        with pytest.raises(ValueError, match='must be a positive number of GMACs'):
            model.store_budgets([{'gmacs': gmacs, 'policy': [0., 0., 0.]}])
    for top1 in (math.nan, torch.ones(1)):
        with pytest.raises(ValueError, match='must be plain JSON'):
            model.store_budgets([{'gmacs': 1., 'policy': [0., 0., 0.], 'top1': top1}])
    assert 'budgets' not in model.exit_cfg


def test_budgets_of_confidences_that_are_not_from_0_to_1():
    """Thresholds between two kept ones lie between these; only what is beyond all confidences is cut off."""
    model = timm.create_model('test_gfnet')
    low, _, high = (macs / 1e9 for macs in model.step_macs)
    kept = [{'gmacs': low, 'policy': [-1e9, 3., 0.], 'confidence_range': [-2., 8.]},
            {'gmacs': high, 'policy': [6., 5., 0.], 'confidence_range': [-2., 8.]}]
    model.store_budgets(kept)
    model.set_budget((low + high) / 2)
    assert model.exit_cfg['exit'][:2] == pytest.approx([2., 4.])


def test_the_rule_in_use_can_be_set_on_another_model(model):
    assert model.exit_policy is None
    model.set_exit([0.5, math.inf, 0.])
    other = Refiner()
    other.set_exit(model.exit_policy)
    assert other.exit_cfg == model.exit_cfg == {'exit': [0.5, 'inf', 0.], 'num_classes': 3}
    assert policy_from_json(policy_to_json(other.exit_policy)) == [0.5, math.inf, 0.]
    two = Refiner()
    two.num_steps = 2
    with pytest.raises(ValueError, match='Expected a policy for 2 steps, got one for 3'):
        two.set_exit(model.exit_policy)


def test_public_names():
    from timm_dynamic.models import AnchorNet, AnchorNetPatch, CLCNet, ConfidenceNet, ExitResult, GFNet, load_checkpoint
    from timm_dynamic.models import DynamicNet as Base
    assert all(issubclass(family, Base) for family in (AnchorNetPatch, CLCNet, GFNet))
    assert not any(issubclass(net, Base) for net in (AnchorNet, ConfidenceNet))
    assert Base is DynamicNet
    assert load_checkpoint(timm.create_model('test_focusnet'), timm.create_model('test_focusnet').state_dict()) == {}
    assert ExitResult._fields == ('logits', 'steps_used', 'confidence')
