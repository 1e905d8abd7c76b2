"""Rewards and the PPO update against the outputs of GFNet's original code."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.reference import fill, make_normal
from torch import nn

from timm_dynamic.layers import PatchPolicy
from timm_dynamic.loss.policy_gradient import (
    compute_log_prob,
    compute_ppo_terms,
    compute_returns,
    compute_rewards,
    normalise_returns,
)

DATA = Path(__file__).parent / 'data'


@pytest.fixture(scope='module')
def numbers():
    with np.load(DATA / 'gfnet_ppo.npz') as stored:
        return {k: torch.from_numpy(v) if v.dtype.kind in 'fi' else v for k, v in stored.items()}


def test_rewards_and_returns(numbers):
    logits, target = numbers['reward/logits'], numbers['reward/target'].long()
    torch.testing.assert_close(logits, make_normal((5, 6, 10), 31, 1.5), rtol=0, atol=0)
    rewards = compute_rewards(logits, target)
    returns = compute_returns(rewards)
    for name, value in (('rewards', rewards), ('returns', returns), ('returns_normalised', normalise_returns(returns))):
        torch.testing.assert_close(value, numbers[f'reward/{name}'], rtol=0, atol=1e-6)


@pytest.mark.parametrize(('name', 'channels', 'encoder', 'steps'), [
    ('gfnet_resnet50_96', 2048, 'linear', 4), ('gfnet_mobilenetv3_large_100_96', 960, 'conv', 2)])
def test_one_update(name, channels, encoder, steps, numbers):
    expected = {k.removeprefix(f'{name}/'): v for k, v in numbers.items() if k.startswith(name)}
    spec = json.loads((DATA / 'gfnet.json').read_text())[name]['components']['policy']
    template = {k: torch.empty(shape, device='meta') for k, shape in spec['shapes'].items()}
    weights = fill(template, spec['salt'], spec['gains'])
    policy = PatchPolicy(channels, (3, 3), encoder)
    critic = nn.Linear(policy.hidden_size, 1)
    ours = {k: k.replace('actor.0.', 'actor.').removesuffix('_l0') for k in weights if not k.startswith('critic')}
    policy.load_state_dict({ours[k]: weights[k] for k in ours})
    critic.load_state_dict({'weight': weights['critic.0.weight'], 'bias': weights['critic.0.bias']})
    states = make_normal((steps, 6, channels, 3, 3), 11).clamp(min=0)

    def evaluate():
        hidden, means, values = None, [], []
        for state in states:
            mean, hidden = policy(state, hidden)
            means.append(mean)
            values.append(critic(hidden).squeeze(1))
        return compute_log_prob(expected['actions'], torch.stack(means)), torch.stack(values)

    log_prob, values = evaluate()
    returns = normalise_returns(compute_returns(expected['rewards']))
    terms = compute_ppo_terms(log_prob, expected['old_logprobs'], values, returns)
    torch.testing.assert_close(returns, expected['returns_normalised'], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_prob, expected['logprobs'], rtol=0, atol=1e-4)
    torch.testing.assert_close(values, expected['values'], rtol=0, atol=1e-5)
    torch.testing.assert_close((log_prob - expected['old_logprobs']).exp(), expected['ratios'], rtol=1e-4, atol=0)
    torch.testing.assert_close(terms.entropy, expected['entropy'][0, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(terms.loss, expected['loss'], rtol=0, atol=1e-5)

    parameters = {**{k: policy.get_parameter(v) for k, v in ours.items()},
                  'critic.0.weight': critic.weight, 'critic.0.bias': critic.bias}
    optimizer = torch.optim.Adam(parameters.values(), lr=3e-4, betas=(0.9, 0.999))
    terms.loss.backward()
    optimizer.step()
    for key, grad_norm, norm in zip(expected['param_keys'], expected['grad_l2'], expected['param_l2_after']):
        assert parameters[key].grad.double().norm().item() == pytest.approx(grad_norm.item(), rel=1e-4), key
        assert parameters[key].detach().double().norm().item() == pytest.approx(norm.item(), rel=1e-5), key
    for key in ('actor.0.weight', 'actor.0.bias', 'critic.0.weight', 'critic.0.bias'):
        stored = key.replace('.', '_')
        torch.testing.assert_close(parameters[key].grad, expected[f'grad_{stored}'], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parameters[key].detach(), expected[f'after_{stored}'], rtol=0, atol=1e-6)
    log_prob, values = evaluate()
    torch.testing.assert_close(log_prob, expected['logprobs_after'], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(values, expected['values_after'], rtol=0, atol=1e-4)
