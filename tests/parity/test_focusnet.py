"""FocusNet against the outputs of the original code."""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from parity.reference import fill, make_images, make_normal

import timm_dynamic  # noqa: F401
from timm_dynamic.loss import FocusPickingLoss
from timm_dynamic.task import FocusPickingTask

DATA = Path(__file__).parent / 'data'


@pytest.fixture(scope='module')
def numbers():
    return np.load(DATA / 'focusnet.npz')


@pytest.fixture(scope='module')
def recipe():
    return json.loads((DATA / 'focusnet.json').read_text())


@pytest.mark.parametrize(('dtype', 'suffix', 'tolerance'), [(torch.float64, 'f64', 1e-6), (torch.float32, 'f32', 1e-5)])
def test_loss_terms_total_and_gradient(numbers, dtype, suffix, tolerance):
    target = torch.from_numpy(numbers['targets']).long()
    logits = make_normal((16, 1000), 41, 2.0).to(dtype).requires_grad_()
    baseline = make_normal((16, 1000), 42, 2.0).to(dtype)
    baseline[range(16), target] += 3

    loss = FocusPickingLoss()
    terms = loss.terms(logits, target, baseline)
    total = loss(logits, target, baseline)
    got = torch.stack([*terms, total]).double()
    expected = torch.from_numpy(numbers[f'terms_{suffix}'])
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)

    grad, = torch.autograd.grad(total, logits)
    expected_grad = torch.from_numpy(numbers[f'grad_{suffix}']).to(dtype)
    assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm()


def test_converted_checkpoint_gives_the_original_logits(numbers, recipe, tmp_path):
    spec = recipe['resnet18']
    template = timm.create_model('resnet18').state_dict()
    weights = fill(template, spec['salt'], spec['gains'])
    # the authors' layout: as saved without --gpu, with the optimizer beside
    file = tmp_path / 'clonalnet_resnet18_model_best.pth.tar'
    torch.save({
        'epoch': 90, 'arch': 'resnet18', 'state_dict': {f'module.{k}': v for k, v in weights.items()},
        'best_acc1': torch.tensor(70.422), 'optimizer': torch.optim.SGD([torch.zeros(1)], 0.1).state_dict(),
    }, file)
    model = timm.create_model('focusnet_resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=file)).eval()
    with torch.inference_mode():
        logits = model(make_images(**spec['input']))
    torch.testing.assert_close(logits, torch.from_numpy(numbers['logits']), rtol=0, atol=1e-4)


def test_three_steps_of_sgd(numbers, recipe):
    spec = recipe['train']
    focus, baseline = timm.create_model('focusnet_resnet18'), timm.create_model('resnet18')
    focus.load_state_dict(fill(focus.state_dict(), 'focus/', spec['focus_gains']))
    baseline.load_state_dict(fill(baseline.state_dict(), 'baseline/', spec['baseline_gains']))
    task = FocusPickingTask(focus, baseline, verbose=False).train()
    optimizer = torch.optim.SGD(focus.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images, target = make_images(**spec['input']), torch.tensor(spec['target'])
    rows = []
    for _ in range(4):
        result = task(images, target)
        rows.append([result[k].item() for k in ('classification', 'attention', 'negentropy', 'loss')])
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    np.testing.assert_allclose(rows, numbers['train_terms'], rtol=0, atol=1e-3)
