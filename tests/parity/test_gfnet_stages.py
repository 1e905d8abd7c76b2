"""One iteration of GFNet's first and second training stage against the original's training script.

Recorded with `torch.rand`'s and the policy's own actions, which are given back here; the glance is bicubic in training.
"""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import FULL_TESTS
from parity.reference import make_images
from parity.test_gfnet import build_checkpoint

import timm_dynamic  # noqa: F401
from timm_dynamic.models.gfnet import checkpoint_filter_fn, training_state_from_checkpoint
from timm_dynamic.task import GlanceFocusTask, PatchPolicyTask
from timm_dynamic.utils import load_weights

DATA = Path(__file__).parent / 'data'
RECORDS = json.loads((DATA / 'gfnet_stages.json').read_text())


def set_up(stage: str, name: str):
    """Model with the reference weights, images, targets, and what was recorded."""
    with np.load(DATA / 'gfnet_stages.npz') as stored:
        prefix = f'{stage}/{name}/'
        expected = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in stored.items() if k.startswith(prefix)}
    record = RECORDS[f'{stage}/{name}']
    checkpoint = build_checkpoint(name)
    model = timm.create_model(name)
    load_weights(model, checkpoint, checkpoint_filter_fn)
    model.glance_mode = 'bicubic'
    x = make_images((4, 3, 224, 224), record['seed'])
    return model, training_state_from_checkpoint(checkpoint), x, expected['target'].long(), expected, record


def give(monkeypatch, function: str, value: torch.Tensor) -> None:
    """Let torch draw a given value."""
    def draw(*shape, **kwargs):
        assert torch.Size(shape[0] if len(shape) == 1 else shape) == value.shape
        return value

    monkeypatch.setattr(torch, function, draw)


@pytest.mark.parametrize('name', ['gfnet_regnety_006_96', *(['gfnet_resnet50_96'] if FULL_TESTS else [])])
def test_stage_1(name, monkeypatch):
    model, state, x, target, expected, record = set_up('stage1', name)
    task = GlanceFocusTask(model, aux_weight=1., verbose=False)
    task.load_task_state(state)
    task.train()
    give(monkeypatch, 'rand', expected['actions'])
    result = task(x, target)
    torch.testing.assert_close(result['step_ce'], expected['ce'], rtol=0, atol=2e-3)
    torch.testing.assert_close(result['step_aux'], expected['ce_dsn'], rtol=0, atol=2e-3)
    assert result['loss'].item() == pytest.approx(record['loss'], abs=2e-3)

    result['loss'].backward()
    heads = task.module.heads
    first = [model.classifier.heads['first']] if 'first' in model.classifier.heads else []
    parts = {
        'model_prime_state_dict': [model.global_encoder, *first, *([heads['global_aux']] if not first else [])],
        'model_state_dict': [model.local_encoder, heads['local_aux']],
        'fc': [model.classifier.rnn, model.classifier.heads['rnn']],
    }
    for part, modules in parts.items():
        norm = sum(p.grad.double().square().sum() for m in modules for p in m.parameters()).sqrt().item()
        assert norm == pytest.approx(record['grad_l2_per_component'][part], rel=0.01), part
    assert all(p.grad is None for p in model.policy.parameters())


@pytest.mark.parametrize('name', ['gfnet_mobilenetv3_large_100_96', *(['gfnet_resnet50_96'] if FULL_TESTS else [])])
def test_stage_2(name, monkeypatch):
    model, state, x, target, expected, record = set_up('stage2', name)
    task = PatchPolicyTask(model, verbose=False)
    task.load_task_state(state)
    task.train()

    actions, means = expected['actions'], []
    with torch.no_grad():  # what must be drawn for these actions to come out
        steps, hidden = model._look(0, model.init_state(x)), None
        for action in actions:
            mean, hidden = model.policy(steps['map'], hidden)
            means.append(mean)
            steps = model._look(1, steps, action)
    noise = actions - torch.stack(means)
    noise += (actions == 1).float() - (actions == 0).float()  # those were clamped
    give(monkeypatch, 'randn', noise / 0.1)
    result = task(x, target)
    torch.testing.assert_close(task._memory['actions'], actions, rtol=0, atol=1e-6)
    torch.testing.assert_close(task._memory['log_prob'], expected['logprobs'], rtol=0, atol=2e-4)
    torch.testing.assert_close(result['patch_reward'], expected['rewards'].mean(dim=1), rtol=0, atol=2e-6)
    assert result['loss'].item() == pytest.approx(record['loss'], abs=2e-5)

    policy, critic = model.policy, task.module.heads['critic']
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=3e-4, betas=(0.9, 0.999))
    result['loss'].backward()
    optimizer.step()
    assert all(p.grad is None for p in model.classifier.parameters())
    for key, norm in record['grad_l2'].items():
        ours = key.replace('actor.0.', 'actor.').removesuffix('_l0')
        parameter = critic.get_parameter(key[9:]) if key.startswith('critic') else policy.get_parameter(ours)
        assert parameter.grad.double().norm().item() == pytest.approx(norm, rel=2e-4), key
        assert parameter.detach().double().norm().item() == pytest.approx(record['param_l2_after'][key], rel=1e-5), key
    torch.testing.assert_close(policy.actor.bias.grad, expected['grad_actor_0_bias'], rtol=0, atol=1e-4)
    torch.testing.assert_close(policy.actor.weight.detach(), expected['after_actor_0_weight'], rtol=0, atol=4e-6)
    torch.testing.assert_close(critic.weight.detach(), expected['after_critic_0_weight'], rtol=0, atol=4e-6)
