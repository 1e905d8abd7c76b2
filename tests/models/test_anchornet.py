import copy
from functools import partial
from typing import ClassVar

import pytest
import timm
import torch
from models.model_tester import DynamicModelTester, ModelTester, StepTester
from timm.models import group_parameters, save_for_hf

import timm_dynamic  # noqa: F401
from timm_dynamic.layers import crop_patches, get_glance
from timm_dynamic.utils import CheckpointError

create_small = partial(timm.create_model, 'test_anchornet_patch', num_classes=7)


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return timm.create_model('test_anchornet_patch').eval()


class TestAnchorNet(ModelTester):
    name = 'anchornet'
    kwargs: ClassVar = dict(num_classes=10)


class TestAnchorNetPatch(DynamicModelTester):
    name = 'test_anchornet_patch'

    def expected_head_output(self, model, x):
        return next(model.forward_steps(x))  # `forward_features` sees the scaled image only

    def test_groups_are_those_of_both_classifiers(self, model):
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        for name, group in groups.items():
            if name.startswith('resized.'):
                assert groups[name.replace('resized', 'patch')] == group
        first, later = (groups[f'localizer.blocks.{i}.project.0.weight'] for i in (0, 3))
        assert 0 < first < later < max(groups.values())


class TestTimmLocalizer(StepTester):
    name = 'test_anchornet_patch'
    kwargs: ClassVar = dict(localizer='test_focusnet', localizer_stride=32)
    other_size = 128

    def expected_head_output(self, model, x):
        return next(model.forward_steps(x))


@pytest.mark.parametrize(('name', 'millions'), [
    ('anchornet_patch_densenet201_95', 40.70), ('anchornet_patch_resnet50_95', 51.79), ('anchornet_patch', 40.70)])
def test_the_papers_models(name, millions):
    model = timm.create_model(name, device='meta')
    assert (model.patch_size, model.num_steps, model.img_size, model.iou_thresholds) == (95, 5, 224, (0.3,) * 3)
    assert (model.localizer_field, model.localizer_stride) == (95, 8)
    assert model.exact_original == (name != 'anchornet_patch')
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    weights, cfg = model.state_dict(), timm.get_pretrained_cfg(name)
    assert tuple(cfg.classifier) == model.pretrained_cfg['classifier'] == model.classifier_names
    assert tuple(cfg.first_conv) == model.pretrained_cfg['first_conv']
    assert all(f'{layer}.weight' in weights for layer in (*cfg.classifier, *cfg.first_conv))


def test_anchornet_sees_windows():
    model = timm.create_model('anchornet').eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        features = model.forward_features(x)
        assert features.shape == (1, 512, 17, 17)
        changed = x.clone()
        changed[:, :, 8 * 3:8 * 3 + 95, 8 * 5:8 * 5 + 95] += 1
        moved = (model.forward_features(changed) - features).abs().amax(dim=1)[0] > 1e-6
        # a window somewhere else does not change what position (3, 5) sees
        outside = x.clone()
        outside[:, :, :8 * 3] += 1
        outside[:, :, 8 * 3 + 95:] += 1
        still = (model.forward_features(outside) - features).abs().amax(dim=1)[0]
    assert moved[3, 5]
    assert (still[3] < 1e-4).all()
    with pytest.raises(ValueError, match='Images of 64x64 pixels hold no window of 95'):
        model(torch.randn(1, 3, 64, 64))
    assert model.reset_classifier(5) is None
    assert model(x).shape == (1, 5)


def test_a_step_adds_a_window(tiny):
    x = torch.randn(3, 3, 96, 96)
    with torch.inference_mode():
        state = tiny.init_state(x)
        first, state = tiny.step(0, state)
        torch.testing.assert_close(first, tiny.resized(get_glance(x, 48)))
        assert 'windows' not in state  # the localizer has not run
        second, state = tiny.step(1, state)
        torch.testing.assert_close(second, first + tiny.patch(crop_patches(x, state['windows'][:, 0], 48)))
        out = tiny.forward_all(x)
    assert all(len(v) == 3 for v in state.values())
    assert torch.equal(out['coords'], state['windows'].transpose(0, 1))
    torch.testing.assert_close(out['logits'][1], second)
    torch.testing.assert_close(out['localizer_logits'], tiny.localizer(x))
    assert ((state['windows'] >= 0) & (state['windows'] <= 48)).all()


def test_any_localizer_and_backbone():
    model = timm.create_model(
        'anchornet_patch', backbone='test_efficientnet', patch_size=64, num_steps=3, num_classes=4, img_size=128,
        localizer='test_resnet', localizer_stride=32).eval()
    x = torch.randn(2, 3, 128, 128)
    assert model(x).shape == (2, 4)
    located = model.locate(x)
    assert located['cam'].shape == (2, 4, 4)
    # windows of 64 around the middles 16, 48, 80, 112 of what the positions see, within the image
    assert model._corners(4, 128, x.device).tolist() == [0, 16, 48, 64]
    with pytest.raises(ValueError, match="localizer 'test_resnet' needs its stride in pixels: localizer_stride"):
        timm.create_model('anchornet_patch', backbone='test_resnet', localizer='test_resnet')


def test_folders_that_timm_has_written(tiny, tmp_path):
    save_for_hf(tiny, tmp_path)  # without safetensors
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), tiny(x))


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(patch_size=97), 'Images of 96 pixels have no windows of 97'),
    (dict(num_steps=1), 'num_steps must be at least 2'),
    (dict(iou_thresholds=[0.3, 0.3]), '3 steps have 2 windows, which need 1 iou_thresholds, got 2'),
    (dict(backbone='resnet51'), "Unknown backbone 'resnet51'"),
    (dict(global_pool='max'), "must be 'avg', or '' without classes, got 'max' with 7 classes"),
    (dict(iou_thresholds=[1.5]), r'Overlap thresholds are shares in 0..1, got \[1.5\]'),
    (dict(iou_thresholds=float('nan')), r'Overlap thresholds are shares in 0..1, got \[nan\]'),
    (dict(num_steps=27), "Images of 96 pixels have 5x5 windows for the localizer 'anchornet', 27 steps need 26"),
    (dict(img_size=60), "Images of 60 pixels have 0x0 windows for the localizer 'anchornet'"),
    (dict(localizer='test_vit', localizer_stride=16), r"'test_vit' needs a feature map .* got \[1, 37, 64\]"),
    (dict(localizer='inception_v3', localizer_stride=32, img_size=60, device='meta'),
     "localizer 'inception_v3' cannot take images of 60 pixels"),
    (dict(localizer='test_efficientnet', localizer_stride=8), 'with localizer_stride 8 there would be 12x12'),
    (dict(localizer='mobilenetv4_conv_small_035', localizer_stride=32, device='meta'),
     'classifies 1280 features, but its map has'),
    (dict(localizer='test_resnet', localizer_stride=32, localizer_args=dict(global_pool='catavgmax')),
     'classifies .* features, but its map has'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_small(**arguments)


@pytest.mark.parametrize(('shape', 'message'), [
    ((2, 3, 96, 80), 'square images, got 96x80'),
    ((2, 3, 40, 40), 'Images of 40 pixels have no windows of 48'),
    ((2, 3, 70, 70), "Images of 70 pixels have 1x1 windows for the localizer 'anchornet', 3 steps need 2"),
    ((2, 3, 62, 62), 'Images of 62 pixels have 0x0 windows'),
])
def test_bad_images(tiny, shape, message):
    for run in (tiny, tiny.init_state):  # at once, not only where an image goes on
        with pytest.raises(ValueError, match=message), torch.inference_mode():
            run(torch.zeros(shape))


def test_sizes_that_hold_too_few_windows_cannot_be_set(tiny):
    for size, message in ((70, 'have 1x1 windows'), (40, 'Images of 40 pixels have no windows of 48')):
        with pytest.raises(ValueError, match=message):
            tiny.set_input_size(size)
    assert tiny.img_size == 96


@pytest.mark.parametrize('size', [95, 96, 103, 119, 224])
def test_the_grid_is_that_of_the_map(size):
    model = timm.create_model('anchornet_patch', backbone='test_resnet', num_steps=2, img_size=size).eval()
    with torch.inference_mode():
        assert model._grid(size) == model.localizer.forward_features(torch.zeros(1, 3, size, size)).shape[2:]
    other = timm.create_model('anchornet_patch', backbone='test_resnet', patch_size=64, num_steps=2, img_size=size,
                              localizer='test_resnet', localizer_stride=32).eval()
    with torch.inference_mode():
        assert other._grid(size) == other.localizer.forward_features(torch.zeros(1, 3, size, size)).shape[2:]


def test_without_classes(tiny):
    x = torch.randn(2, 3, 96, 96)
    model = copy.deepcopy(tiny)
    with torch.inference_mode():
        maps = model.forward_features(x)
        features = model.forward_head(maps, pre_logits=True)
        model.reset_classifier(0)
        with pytest.raises(ValueError, match=r'Windows are chosen for a class: without classes \(num_classes=0\)'):
            list(model.forward_steps(x))
        model.reset_classifier(0, '')
        torch.testing.assert_close(model(x), maps)
        with pytest.raises(ValueError, match="got 'max' with 5 classes"):
            model.reset_classifier(5, 'max')
        assert create_small(num_classes=0, global_pool='').eval()(x).ndim == 4
        weights = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=tiny.state_dict()))
        torch.testing.assert_close(create_small(**{**weights, 'num_classes': 0}).eval()(x), features)


def test_anchornet_without_classes():
    x = torch.randn(2, 3, 96, 96)
    model = timm.create_model('anchornet', num_classes=0).eval()
    with torch.inference_mode():
        features = model.forward_features(x)
        torch.testing.assert_close(model(x), features.mean(dim=(2, 3)))
        model.reset_classifier(0, '')
        torch.testing.assert_close(model(x), features)
        assert timm.create_model('anchornet', num_classes=0, global_pool='').eval()(x).shape == features.shape
    for call in (lambda: timm.create_model('anchornet', global_pool='max'), lambda: model.reset_classifier(7, 'max')):
        with pytest.raises(ValueError, match="must be 'avg', or '' without classes, got 'max'"):
            call()


def test_authors_files(tmp_path):
    model = create_small(num_classes=5)
    parts = {'anchornet.pth': model.localizer, 'r18_resized_48_best.pth.tar': model.resized,
             'r18_patch_48_best.pth.tar': model.patch}
    for name, net in parts.items():
        torch.save({'net': net.state_dict()}, tmp_path / name)
    load = partial(create_small, num_classes=5, pretrained=True)
    mapping = dict(zip(('localizer', 'resized', 'patch'), (str(tmp_path / name) for name in parts)))
    for file in (tmp_path, mapping):
        again = load(pretrained_cfg_overlay=dict(file=file))
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(CheckpointError, match='does not fit test_anchornet_patch: it holds no patch'):
        load(pretrained_cfg_overlay=dict(file={k: v for k, v in mapping.items() if k != 'patch'}))
    for name, message in (('anchornet.pth', 'it holds the localizer alone. Give all three'),
                          ('r18_patch_48_best.pth.tar', r'it holds one network \(resized or patch\) alone')):
        with pytest.raises(CheckpointError, match=message):
            load(pretrained_cfg_overlay=dict(file=tmp_path / name))
    two = {k: v for k, v in model.state_dict().items() if not k.startswith('localizer.')}
    with pytest.raises(CheckpointError, match='it holds no localizer'):
        load(pretrained_cfg_overlay=dict(state_dict=two))
    (tmp_path / 'r18_patch_48_best.pth.tar').unlink()
    with pytest.raises(CheckpointError, match="Expected one file with 'patch' in its name"):
        load(pretrained_cfg_overlay=dict(file=tmp_path))
