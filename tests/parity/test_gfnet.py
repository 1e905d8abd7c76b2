"""GFNet against the outputs of the original code, from its own layout of checkpoints on.

Two of the nine recorded variants run by default; TIMM_DYNAMIC_FULL_TESTS=1 runs all.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import FULL_TESTS
from parity.reference import fill, make_images

import timm_dynamic  # noqa: F401
from timm_dynamic.models.gfnet import training_state_from_checkpoint

DATA = Path(__file__).parent / 'data'
RECIPES = json.loads((DATA / 'gfnet.json').read_text())
VARIANTS = list(RECIPES) if FULL_TESTS else ['gfnet_resnet50_96', 'gfnet_mobilenetv3_large_100_96']
STRIDE = 16  # of classes and features, every 16th is stored


@pytest.fixture(scope='module')
def numbers():
    return np.load(DATA / 'gfnet.npz')


def build_checkpoint(name: str) -> dict:
    """A checkpoint as the authors publish them, with the reference weights."""
    recipe = RECIPES[name]
    out = {'model_name': recipe['model_name'], 'patch_size': recipe['patch_size']}
    shapes = None
    for part, spec in recipe['components'].items():
        shapes = spec.get('shapes', shapes)
        if part in ('fc', 'policy') or recipe['model_name'].startswith('regnet'):
            template = {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}
        else:  # the authors' encoders have timm's keys, in timm's order
            with torch.device('meta'):
                encoder = timm.create_model(recipe['model_name'])
            template = {f'module.{key}': value for key, value in encoder.state_dict().items()}
        out[part] = fill(template, spec['salt'], spec['gains'])
        digest = hashlib.sha256()
        for value in out[part].values():
            digest.update(value.numpy().tobytes())
        assert digest.hexdigest()[:16] == spec['sha256_16'], part
    flops = recipe['macs']['cumulative']
    thresholds = torch.rand(39, len(flops), generator=torch.Generator().manual_seed(0))
    return {
        **out, 'model_flops': np.float64(1.), 'policy_flops': 1., 'fc_flops': 1., 'flops': flops,
        'anytime_classification': [np.float64(60. + t) for t in range(len(flops))], 'dynamic_threshold': thresholds,
        'budgeted_batch_classification': [list(np.linspace(flops[0], flops[-1], 39)), list(np.linspace(60, 70, 39))],
    }


def step_by_step(model, x):
    """Arrays of a run by the step protocol, named as in the fixtures."""
    state, steps, logits = model.init_state(x), [], []
    for t in range(model.num_steps):
        step_logits, state = model.step(t, state)
        logits.append(step_logits)
        steps.append(state)
    return {
        'logits': torch.stack(logits), 'features': torch.stack([s['feature'] for s in steps]),
        'action_mean': torch.stack([s['action'] for s in steps[1:]]),
        'patch_coords': torch.stack([s['coords'] for s in steps[1:]]),
        'hidden': torch.stack([s['policy_hidden'] for s in steps[1:]]),
    }


def differences(name, numbers, checkpoint, model):
    """Largest absolute difference to the recorded numbers, by array."""
    recipe, x = RECIPES[name], make_images(**RECIPES[name]['input'])
    with torch.inference_mode():
        got = step_by_step(model, x)
        extras = training_state_from_checkpoint(checkpoint)
        aux = [F.linear(feature, *extras['local_aux' if t else 'global_aux'].values())
               for t, feature in enumerate(got['features'])]
        got['dsn_logits'] = torch.stack(aux)
        got['value'] = F.linear(got.pop('hidden'), *extras['critic'].values()).squeeze(-1)
        if 'first' in model.classifier.heads:
            got['fc_step0_logits'] = model(x, all_steps=True)['rnn_logits']
    recorded = {key.split('/')[1] for key in numbers.files if key.startswith(f'{name}/')}
    assert recorded == got.keys() | {f'{k}_norm' for k in got if f'{name}/{k}_norm' in numbers}
    out = {}
    for key, value in got.items():
        sampled = f'{name}/{key}_norm' in numbers
        expected = torch.from_numpy(numbers[f'{name}/{key}'])
        assert value[..., ::STRIDE if sampled else 1].shape == expected.shape, key
        out[key] = (value[..., ::STRIDE if sampled else 1] - expected).abs().max().item()
        if sampled:
            norm = torch.from_numpy(numbers[f'{name}/{key}_norm'])
            out[f'{key}_norm_relative'] = (value.norm(dim=-1) / norm - 1).abs().max().item()
    floors = recipe['floor']
    return out, floors


@pytest.mark.parametrize('name', VARIANTS)
def test_inference_is_the_original(name, numbers):
    checkpoint = build_checkpoint(name)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=checkpoint)).eval()
    found, _ = differences(name, numbers, checkpoint, model)
    print(name, found)
    coarse = 'mobilenet' in name or 'efficientnet' in name  # their features reach 130, their logits 70
    assert found.pop('patch_coords') == 0
    assert found.pop('action_mean') <= (3e-4 if coarse else 1e-4)
    for key, difference in found.items():
        assert difference <= (1e-5 if key.endswith('_relative') else 2e-3 if coarse else 1e-4), key

    # Costs are those of the original, which runs the recurrent head of step 1 even where it throws the result away.
    macs = RECIPES[name]['macs']
    unused = macs['classifier_per_step'][0] and macs['step0_head'] and model.head_hidden_size * model.num_classes
    assert model.step_macs == tuple(m - unused for m in macs['cumulative'])

    parts = model.count_part_macs()
    assert parts['glance encoder'] == (macs['global_encoder'], *[0] * (model.num_steps - 1))
    assert parts['local encoder'] == (0, *[macs['local_encoder']] * (model.num_steps - 1))
    assert parts['patch policy'] == (0, *[macs['policy_analytic']] * (model.num_steps - 1))
    assert parts['classifier'][1:] == tuple(macs['classifier_per_step'][1:])
    assert tuple(np.cumsum([sum(step) for step in zip(*parts.values())])) == model.step_macs

    # The numbers beside the weights have come along.
    assert model.exit_cfg['origin']['flops'] == macs['cumulative']
    assert model.exit_cfg['origin']['anytime_classification'][0] == 60.0
    assert len(model.exit_cfg['budgets']) == 39
    assert model.exit_cfg['budgets'][-1]['policy'] == checkpoint['dynamic_threshold'][-1].tolist()
