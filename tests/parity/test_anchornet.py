"""AnchorNet and AnchorNet-patch against the outputs of the original code, from its own layout of checkpoints on."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from parity.reference import fill, make_images

import timm_dynamic  # noqa: F401
from timm_dynamic.exits import collect_exit_table
from timm_dynamic.layers import choose_windows, class_activation_map

DATA = Path(__file__).parent / 'data'
RECORD = json.loads((DATA / 'anchornet.json').read_text())
GRID = torch.arange(17) * 8


@pytest.fixture(scope='module')
def numbers():
    with np.load(DATA / 'anchornet.npz') as stored:
        return {k: torch.from_numpy(v) for k, v in stored.items()}


@pytest.fixture(scope='module')
def authors():
    """The authors' three files with the reference weights, as parts of our model."""
    out = {}
    for part, spec in RECORD['components'].items():
        shapes = spec.get('shapes')
        if shapes:
            template = {k: torch.empty(shape, device='meta') for k, shape in shapes.items()}
        else:  # torchvision's DenseNet has timm's keys
            with torch.device('meta'):
                template = timm.create_model('densenet201').state_dict()
        out['localizer' if part == 'anchornet' else part] = weights = fill(template, spec['salt'], spec['gains'])
        digest = hashlib.sha256()
        for value in weights.values():
            digest.update(value.numpy().tobytes())
        assert digest.hexdigest()[:16] == spec['sha256_16'], part
    return out


def test_localizer(authors, numbers):
    model = timm.create_model(
        'anchornet', pretrained=True, pretrained_cfg_overlay=dict(state_dict=authors['localizer'])).eval()
    x = make_images(**RECORD['input'])
    with torch.inference_mode():
        features = model.forward_features(x)
        logits = model.forward_head(features)
        cam = class_activation_map(features, model.fc.weight, logits.argmax(dim=1))
    torch.testing.assert_close(logits[:, ::8], numbers['anchornet/logits'], rtol=0, atol=1e-4)
    torch.testing.assert_close(features[:, ::32][:, :4], numbers['anchornet/features'], rtol=0, atol=4e-4)
    torch.testing.assert_close(
        features.flatten(2).norm(dim=2)[:, ::8], numbers['anchornet/fea_l2'], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cam, numbers['anchornet/cam'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', RECORD['settings'])
def test_windows(name, numbers):
    setting = RECORD['settings'][name]
    cams, boxes = numbers['boxes/cams'], numbers[f'boxes/{name}/boxes'].long()
    counts = numbers[f'boxes/{name}/count'].long()
    args = (95, setting['num'], setting['iou_thresholds'])
    if len(setting['iou_thresholds']) < setting['num'] - 1:
        assert counts.min() == -1  # the original raised an error in its course
        with pytest.raises(ValueError, match='5 windows need 4 overlap thresholds, got 3'):
            choose_windows(cams, (GRID, GRID), *args)
        return
    index, found = choose_windows(cams, (GRID, GRID), *args)
    assert torch.equal(found, counts)
    corners = torch.stack([GRID[index // 17], GRID[index % 17]], dim=2)
    for mine, recorded, count in zip(corners, boxes, counts):
        assert torch.equal(mine[:count], recorded[:count, :2])


def test_pipeline(authors, numbers):
    model = timm.create_model(
        'anchornet_patch_densenet201_95', pretrained=True, pretrained_cfg_overlay=dict(state_dict=authors)).eval()
    x, target = make_images(**RECORD['input']), numbers['pipeline/target'].long()
    with torch.inference_mode():
        out = model.forward_all(x)
        steps = torch.stack(list(model.forward_steps(x)))
    torch.testing.assert_close(steps, out['logits'], rtol=0, atol=1e-4)
    torch.testing.assert_close(steps[..., ::16], numbers['pipeline/logits'], rtol=0, atol=1e-4)
    assert torch.equal(out['coords'].transpose(0, 1), numbers['pipeline/boxes'].long()[..., :2])
    table = collect_exit_table(model, [(x, target)])
    torch.testing.assert_close(table.confidence, numbers['pipeline/confidence'], rtol=0, atol=1e-5)
    assert torch.equal(table.correct, numbers['pipeline/correct'])
    # Only images that go on pay for the localizer, and for its map.
    one, anchor = RECORD['pass_macs'], RECORD['macs'] + 512 * 17 * 17
    assert model.step_macs == (one, *(anchor + t * one for t in range(2, 6)))
