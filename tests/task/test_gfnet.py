import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import unwrap_model

from timm_dynamic.loss.policy_gradient import compute_log_prob
from timm_dynamic.task import EndToEndTask, GlanceFocusTask, PatchPolicyTask

CONCAT = dict(step_classifier='concat')
FIRST = dict(first_head=True)


def make(num_classes=5, **kwargs):
    return timm.create_model('test_gfnet', num_classes=num_classes, img_size=48, patch_size=16, **kwargs)


def batch(n=6, classes=5):
    return torch.randn(n, 3, 48, 48), torch.arange(n) % classes


def learning(task):
    return {name.split('.')[0] if name.startswith('heads') else '.'.join(name.split('.')[:2])
            for name, p in task.module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize('kwargs', [{}, CONCAT, FIRST], ids=['recurrent', 'concat', 'first head'])
def test_loss_is_the_sum_over_steps(kwargs):
    model = make(**kwargs).eval()
    task = GlanceFocusTask(model, aux_weight=5., smoothing=0.1, verbose=False)  # in eval mode: no batch statistics
    x, target = batch()
    torch.manual_seed(1)
    result = task(x, target)
    torch.manual_seed(1)
    out = model.forward_all(x, actions=torch.rand(2, 6, 2))
    heads = task.module.heads
    total = 0.
    for t in range(3):
        logits = out['rnn_logits'] if t == 0 and 'rnn_logits' in out else out['logits'][t]
        aux = out['logits'][0] if t == 0 and kwargs else heads['local_aux' if t else 'global_aux'](out['features'][t])
        total = total + F.cross_entropy(logits, target, label_smoothing=0.1)
        total = total + 5 * F.cross_entropy(aux, target, label_smoothing=0.1)
        hits = (out['logits'][t].argmax(1) == target).float().mean()
        assert result['step_top1'][t].item() == pytest.approx(100 * hits.item())
    torch.testing.assert_close(result['loss'], total / 3)
    torch.testing.assert_close(result['output'], out['logits'][-1])


def test_soft_targets_of_mixup():
    task = GlanceFocusTask(make().eval(), smoothing=0.1, verbose=False)
    x, target = batch()
    losses = []
    for value in (target, F.one_hot(target, 5) * 0.9 + 0.02):  # mixup smooths by itself
        torch.manual_seed(1)
        losses.append(task(x, value)['loss'])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize('kwargs', [{}, CONCAT, FIRST], ids=['recurrent', 'concat', 'first head'])
def test_what_learns(kwargs):
    x, target = batch()
    encoders = {'model.global_encoder', 'model.local_encoder', 'model.classifier', 'heads'}
    for positions in ('random', 'policy'):
        task = GlanceFocusTask(make(**kwargs), positions, verbose=False).train()
        task(x, target)['loss'].backward()
        assert learning(task) == encoders
        assert all(p.grad is not None for n, p in task.module.named_parameters() if p.requires_grad)  # for DDP
    task = EndToEndTask(make(**kwargs), std=0.1, verbose=False).train()
    task(x, target)['loss'].backward()
    assert learning(task) == encoders | {'model.policy'}
    assert all(p.grad is not None for n, p in task.module.named_parameters() if p.requires_grad)

    task = PatchPolicyTask(make(**kwargs), verbose=False).train()
    assert not any(m.training for m in task.module.modules())
    before = {k: v.clone() for k, v in task.module.state_dict().items()}
    task(x, target)['loss'].backward()
    assert learning(task) == {'model.policy', 'heads'}
    assert task.module.heads['local_aux'].weight.grad is None
    assert all(torch.equal(v, before[k]) for k, v in task.module.state_dict().items())


@pytest.mark.parametrize(('classes', 'head_learns'), [(10, False), (5, True)])
def test_frozen_global_encoder(classes, head_learns):
    """The head of step 1 stays as it is if it came with the encoder: test_focusnet's has 10 classes."""
    model = make(classes, **CONCAT)
    task = GlanceFocusTask(model, freeze_global=True, verbose=False).train()
    assert not any(m.training for m in model.global_encoder.modules())
    assert model.local_encoder.training
    task(*batch(classes=classes))['loss'].backward()
    assert all(p.grad is None for p in model.global_encoder.parameters())
    assert (model.classifier.heads['1'].weight.grad is not None) == head_learns
    assert model.classifier.heads['2'].weight.grad is not None


def test_only_warm_up_validates_at_random_places():
    model = make().eval()
    x, _ = batch()
    task = GlanceFocusTask(model, verbose=False)
    assert not torch.equal(task.predict(model, x)['logits'][-1], task.predict(model, x)['logits'][-1])
    task = GlanceFocusTask(model, 'policy', verbose=False)
    assert torch.equal(task.predict(model, x)['logits'][-1], model(x))


def test_policy_learns_where_the_reward_is(monkeypatch):
    """The class shows at the bottom left: row 1, column 0."""
    model = make()
    task = PatchPolicyTask(model, num_updates=2, verbose=False).train()
    forward_all = model.forward_all

    def rewarding(x, **kwargs):
        out = forward_all(x, **kwargs)
        closeness = 1 - (out['actions'] - torch.tensor([1., 0.])).abs().mean(dim=-1)  # [S, B]
        right = torch.cat([torch.zeros_like(closeness[:1]), 4 * closeness])
        return {**out, 'logits': F.one_hot(target, 5) * right[..., None]}

    monkeypatch.setattr(model, 'forward_all', rewarding)
    x, target = batch(16)
    optimizer = torch.optim.Adam([p for p in task.module.parameters() if p.requires_grad], lr=3e-3)
    kl = []
    for _ in range(30):
        for loss in (lambda: task(x, target)['loss'], lambda: next(task.further_losses())):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        kl.append(task.diagnose()['approx_kl'].item())
    means = forward_all(x)['action_means'].mean(dim=1)
    assert (means[:, 0] > 0.8).all(), means
    assert (means[:, 1] < 0.2).all(), means
    assert min(kl) >= 0
    assert max(kl) > 1e-4


def test_policy_terms():
    task = PatchPolicyTask(make(), verbose=False).train()
    result = task(*batch())
    memory = task._memory
    assert memory['actions'].shape == (2, 6, 2)
    assert ((memory['actions'] >= 0) & (memory['actions'] <= 1)).all()
    assert abs(memory['returns'].mean().item()) < 1e-6
    assert memory['returns'].std().item() == pytest.approx(1, abs=1e-2)
    assert not memory['maps'].requires_grad
    # The first update has a ratio of one everywhere: what is left is the mean advantage, returns having a mean of 0.
    surrogate = result['loss'].detach() + 0.01 * result['entropy'] - 0.5 * result['value']
    assert surrogate.item() == pytest.approx(task.module(memory['maps'])['values'].mean().item(), abs=1e-5)
    assert task.diagnose() == {'approx_kl': 0, 'clip_fraction': 0}
    assert task._memory == {}


def test_log_prob_is_of_the_action_taken():
    task = PatchPolicyTask(make(), verbose=False).train()
    task(*batch())
    memory = task._memory
    means = task.module(memory['maps'])['action_means']
    torch.testing.assert_close(memory['log_prob'], compute_log_prob(memory['actions'], means))


def test_policy_is_float32_under_autocast():
    task = PatchPolicyTask(make(), verbose=False).train()
    x, target = batch()
    with torch.autocast('cpu', torch.bfloat16):
        result = task(x, target)
        out = task.trainable_module(x)
    assert out['logits'].dtype == torch.bfloat16
    assert out['action_means'].dtype == out['values'].dtype == result['loss'].dtype == torch.float32
    result['loss'].backward()
    for warm in (GlanceFocusTask(make(), verbose=False), EndToEndTask(make(), verbose=False)):
        with torch.autocast('cpu', torch.bfloat16):
            loss = warm.train()(x, target)['loss']
        assert loss.dtype == torch.float32
        loss.backward()


def test_state_goes_round():
    task = PatchPolicyTask(make(), verbose=False)
    assert set(task.get_task_state()) == {'global_aux', 'local_aux', 'critic'}
    assert set(PatchPolicyTask(make(**CONCAT), verbose=False).get_task_state()) == {'local_aux', 'critic'}
    task.setup_ema(decay=0.5)
    assert unwrap_model(task.get_eval_model(ema=True)) is not task.get_eval_model()
    other = GlanceFocusTask(make(), verbose=False)
    other.setup_ema(decay=0.5)
    other.load_checkpoint_state(**task.get_checkpoint_state())
    state = task.get_checkpoint_state(ema=True)
    other.load_checkpoint_state(state['state_dict_ema'], state['task_state_ema'], ema=True)
    for ema in (False, True):
        assert str(other.get_checkpoint_state(ema=ema)) == str(task.get_checkpoint_state(ema=ema))
    assert not any(k.startswith(('model.', 'heads.')) for k in task.get_checkpoint_state()['state_dict'])

    other.load_task_state({'critic': task.get_task_state()['critic']}, strict=False)
    with pytest.raises(RuntimeError, match="no 'global_aux'"):
        other.load_task_state({'critic': task.get_task_state()['critic']})


def test_clipping_can_leave_classifiers_out():
    task = GlanceFocusTask(make(), verbose=False)
    parameters = list(task.get_clip_parameters())
    without = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    model = task.module.model
    assert {id(p) for p in parameters} - without == {
        id(p) for m in (model.classifier, task.module.heads['global_aux'], task.module.heads['local_aux'])
        for p in m.parameters()}


def test_bad_input():
    x, target = batch()
    with pytest.raises(ValueError, match='Expected a GFNet model, got ResNet'):
        GlanceFocusTask(timm.create_model('test_focusnet'), verbose=False)
    with pytest.raises(ValueError, match='num_classes=0'):
        PatchPolicyTask(make(0), verbose=False)
    with pytest.raises(ValueError, match="'random' or 'policy', got 'centre'"):
        GlanceFocusTask(make(), 'centre', verbose=False)
    with pytest.raises(ValueError, match='at least 1, got 0'):
        PatchPolicyTask(make(), num_updates=0, verbose=False)
    with pytest.raises(ValueError, match='cannot be combined with mixup or cutmix'):
        PatchPolicyTask(make(), verbose=False)(x, F.one_hot(target, 5).float())
