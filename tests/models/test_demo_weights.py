"""The weights that come with the package do what the README says of them."""
import numpy as np
import pytest
import timm
import torch

import timm_dynamic  # noqa: F401
from timm_dynamic.data import create_dataset
from timm_dynamic.exits import collect_exit_table
from timm_dynamic.models.builder import BUNDLED


def _batches(model, num):
    dataset = create_dataset(
        'cluttered_digits', split='test', num_samples=num)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    samples = [dataset[i] for i in range(num)]
    images = torch.stack([(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
                          for image, _ in samples])
    targets = torch.tensor([target for _, target in samples])
    return list(zip(images.split(100), targets.split(100)))


def test_gfnet_for_digits():
    model = timm.create_model('test_gfnet', pretrained=True).eval()  # from the package: the tests are offline
    assert model.pretrained_cfg['tag'] == 'digits'
    static = timm.create_model('test_focusnet', output_stride=16)
    from timm_dynamic.models.macs import count_macs
    whole = count_macs(static, (3, 96, 96))
    chosen = model.set_budget(gmacs=0.5 * whole / 1e9)
    with torch.inference_mode():
        table = collect_exit_table(model, _batches(model, 600))
    point = table.evaluate(model.make_stop_rule(model.exit_policy))
    assert point.top1 > 97
    assert point.gmacs * 1e9 < 0.55 * whole
    assert table.anytime()[0].top1 < 90  # one glance does not do
    assert chosen['gmacs'] <= 0.5 * whole / 1e9


def test_anchornet_patch_for_digits():
    model = timm.create_model('test_anchornet_patch', pretrained=True).eval()
    assert model.pretrained_cfg['tag'] == 'digits'
    chosen = model.set_budget(gmacs=0.01)
    with torch.inference_mode():
        table = collect_exit_table(model, _batches(model, 400))
    steps = [p.top1 for p in table.anytime()]
    assert steps[0] < 65 < 86 < min(steps[1:])
    point = table.evaluate(model.make_stop_rule(model.exit_policy))
    assert point.top1 > 86
    assert point.gmacs == pytest.approx(chosen['gmacs'], rel=0.04)


def test_other_classes_start_from_these_encoders():
    model = timm.create_model('test_gfnet', pretrained=True, num_classes=3)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 3)
    assert 'budgets' not in model.exit_cfg
    own = timm.create_model('test_gfnet', pretrained=True)
    assert torch.equal(model.local_encoder.conv1[0].weight, own.local_encoder.conv1[0].weight)


@pytest.mark.parametrize('folder', sorted(BUNDLED.iterdir()), ids=lambda p: p.name)
def test_bundled_weights_are_small_and_whole(folder):
    assert {p.name for p in folder.iterdir()} == {'model.safetensors', 'config.json'}
    assert (folder / 'model.safetensors').stat().st_size < 2e6
    assert timm.create_model(folder.name, pretrained=True).pretrained_cfg['architecture'] == folder.name.split('.')[0]


def test_clcnet_for_digits():
    model = timm.create_model('test_clcnet', pretrained=True).eval()
    assert model.confidence_kind == 'clcnet'
    size, *_ = model.view_sizes
    shallow, whole = model.step_macs
    with torch.inference_mode():
        batches = [((torch.nn.functional.interpolate(x, size, mode='bilinear', antialias=True), x), y)
                   for x, y in _batches(model, 600)]
        table = collect_exit_table(model, batches)
        point = table.evaluate(model.make_stop_rule(model.set_budget(gmacs=0.7 * whole / 1e9)['policy']))
    alone = [p.top1 for p in table.anytime()]
    assert alone[0] < 60
    assert alone[1] > 88
    assert point.gmacs * 1e9 < 0.75 * whole
    # better than sending on as many images at random
    share = (point.gmacs * 1e9 - shallow) / (whole - shallow)
    assert point.top1 > alone[0] + share * (alone[1] - alone[0]) + 4
    assert timm.create_model('test_clcnet', pretrained=True, num_classes=3)(torch.randn(2, 3, 96, 96)).shape == (2, 3)
