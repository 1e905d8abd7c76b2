"""The confidence net and the cascade against the original's outputs on the official weights, where those are at hand.

They are not part of this repository. What needs no weights runs anywhere, against a straightforward version with random
ones; see also tests/layers/test_confidence_net.py.
"""
import json

import numpy as np
import pytest
import timm
import torch
from helpers import SHARED
from parity.confidence_reference import make_probabilities, make_state_dict, run
from torch import nn

from timm_dynamic import ConfidenceNet
from timm_dynamic.exits import ExitTable, early_exit
from timm_dynamic.layers import restricted_attention

PARITY = SHARED / 'parity/clcnet'
# Printed in the authors' tutorial, computed on a GPU with TF32: inputs are these, padded with zeros to 1000.
TUTORIAL_INPUT = ([0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [1.0])
TUTORIAL_ANSWER = (0.3019623, 1.0001363)
TUTORIAL_FLOAT32 = (0.3019891, 1.0002862)  # what the original gives in float32


def official(name: str):
    if not (PARITY / 'official').is_dir():
        pytest.skip('the official weights are not at hand')
    return ConfidenceNet.from_pretrained(PARITY / f'official/{name}.safetensors')


def load(*names):
    return np.load(PARITY.joinpath(*names))


@pytest.mark.parametrize('classes', [2, 10, 345, 1000])
def test_scores_are_those_of_the_straightforward_version(classes):
    state_dict, x = make_state_dict(1000), make_probabilities(64, classes)
    net = ConfidenceNet.from_pretrained(state_dict)
    with torch.inference_mode():
        expected, _ = run(state_dict, x)
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.002


@pytest.mark.parametrize('split', ['split_1', 'split_3'])
@pytest.mark.parametrize('classes', [10, 100, 345, 1000])
def test_recorded_scores(split, classes):
    net, expected = official(split), load(split, 'expected.npz')
    parts = ['dim1000_part0', 'dim1000_part1'] if classes == 1000 else [f'dim{classes}']
    x = torch.from_numpy(np.concatenate([load('inputs', f'{part}.npz')['x'] for part in parts]))
    with torch.inference_mode():
        scores = net(x)
        again = net.score(x.flip(1))
    torch.testing.assert_close(scores, torch.from_numpy(expected[f'confidence_dim{classes}'][:, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(again, scores)
    if classes == 1000:
        mapped = restricted_attention(x[:32], net.attention_logits(x[:32]))
        torch.testing.assert_close(mapped, torch.from_numpy(expected['res_att_first32']), rtol=0, atol=1e-6)


@pytest.mark.parametrize('split', ['split_1', 'split_3'])
def test_tutorial(split):
    net, inputs = official(split), load('inputs', 'tutorial.npz')
    x = torch.nn.functional.pad(torch.from_numpy(inputs['x']), (0, 994))
    with torch.inference_mode():
        scores = net(x)
    recorded = torch.from_numpy(load(split, 'expected.npz')['confidence_tutorial'][:, 0])
    torch.testing.assert_close(scores, recorded, rtol=0, atol=1e-5)
    if split == 'split_1':
        printed = torch.from_numpy(inputs['printed_split_1_f64']).float()
        torch.testing.assert_close(scores, printed, rtol=0, atol=5e-4)
        x = torch.zeros(2, 1000)
        for row, values in zip(x, TUTORIAL_INPUT):
            row[:len(values)] = torch.tensor(values)
        scores = net(x)
        torch.testing.assert_close(scores, torch.tensor(TUTORIAL_FLOAT32), rtol=0, atol=1e-5)
        torch.testing.assert_close(scores, torch.tensor(TUTORIAL_ANSWER), rtol=0, atol=5e-4)


class Recorded(nn.Module):
    """Gives out recorded logits for images that hold the number of their row; notes for how many rows."""
    num_classes, in_chans = 1000, 1

    def __init__(self, logits):
        super().__init__()
        self.register_buffer('logits', logits)
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x):
        self.calls += len(x)
        return self.logits[x[:, 0, 0, 0].long()]


def make_cascade_logits(n, c, seed):
    """The logits that the decisions were recorded with; see the README beside them."""
    rng = np.random.default_rng(seed)
    target, ease = rng.integers(0, c, n), rng.uniform(-2, 12, n)
    out = []
    for bonus in (0.0, 2.5):
        logits = rng.standard_normal((n, c)) * rng.uniform(0.7, 1.8, (n, 1))
        logits[np.arange(n), target] += ease + bonus + rng.standard_normal(n) * 2
        out.append(torch.from_numpy((np.round(logits * 1024) / 1024).astype(np.float32)))
    return *out, torch.from_numpy(target)


def test_cascade_decisions():
    net = official('split_1')
    manifest = json.loads((PARITY / 'cascade_split_1/manifest.json').read_text())
    expected = load('cascade_split_1', 'expected.npz')
    shallow, deep, target = make_cascade_logits(**manifest['inputs']['args'])
    members = [Recorded(shallow), Recorded(deep)]
    model = timm.create_model('clcnet', models=members, in_chans=1, img_size=4).eval()
    model.set_confidence('clcnet', net=net)
    x = torch.arange(200.).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    with torch.no_grad():
        out = model(x, all_steps=True)
    for i, name in enumerate(('confidence_shallow', 'confidence_deep')):
        own = model.replay(out['member_logits'], final_rule='last').confidence[i]
        torch.testing.assert_close(own, torch.from_numpy(expected[name]), rtol=0, atol=1e-5)
    table = ExitTable(
        out['confidence'].T, (out['logits'].argmax(-1) == target).T, (390_000_000, 4_590_000_000))
    assert len(manifest['thresholds']) == 5
    for threshold, numbers in manifest['thresholds'].items():
        members[1].calls = 0
        result = early_exit(model, x, [float(threshold), 0.])
        assert members[1].calls == numbers['deep_calls']
        key = threshold.replace('.', '_')
        assert torch.equal(result.logits.argmax(1), torch.from_numpy(expected[f'prediction_{key}']).long())
        ran_deep = result.steps_used == 2
        took_deep = ran_deep & (out['logits'][1] == deep).all(1) & ~(out['logits'][1] == shallow).all(1)
        assert torch.equal(took_deep, torch.from_numpy(expected[f'took_deep_{key}']))
        assert took_deep.sum() == numbers['deep_results_used']
        point = table.evaluate([float(threshold), 0.])
        assert point.top1 == pytest.approx(numbers['correct'] / 2)
        assert point.gmacs == pytest.approx(numbers['gflops_b0_b4'], abs=1e-9)
