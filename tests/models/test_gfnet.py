import copy
import json
from functools import partial
from typing import ClassVar

import pytest
import timm
import torch
from helpers import authors_checkpoint
from models.model_tester import DynamicModelTester, StepTester
from timm.models import group_parameters
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic  # noqa: F401
from timm_dynamic.layers import crop_patches, get_glance
from timm_dynamic.models.gfnet import checkpoint_filter_fn, training_state_from_checkpoint
from timm_dynamic.utils import CheckpointError, save_pretrained

# patch, steps, image, feature width, map channels, first head of its own, width before the last head, parameters (M)
VARIANTS = {
    'gfnet_resnet50_96': (96, 5, 224, 2048, 2048, False, 1024, 103.63),
    'gfnet_resnet50_128': (128, 5, 224, 2048, 2048, False, 1024, 132.99),
    'gfnet_densenet121_96': (96, 5, 224, 1024, 1024, False, 1024, 48.50),
    'gfnet_densenet169_96': (96, 5, 224, 1664, 1664, False, 1024, 73.33),
    'gfnet_densenet201_96': (96, 5, 224, 1920, 1920, False, 1024, 90.05),
    'gfnet_regnety_006_96': (96, 5, 224, 608, 608, True, 1024, 18.03),
    'gfnet_regnety_008_96': (96, 5, 224, 768, 768, True, 1024, 18.79),
    'gfnet_regnety_016_96': (96, 5, 224, 888, 888, True, 1024, 28.92),
    'gfnet_mobilenetv3_large_100_96': (96, 3, 224, 1280, 960, True, 3 * 1280, 16.59),
    'gfnet_mobilenetv3_large_100_128': (128, 3, 224, 1280, 960, True, 3 * 1280, 16.64),
    'gfnet_mobilenetv3_large_125_128': (128, 3, 224, 1280, 1200, True, 3 * 1280, 20.79),
    'gfnet_efficientnet_b2_128': (128, 4, 260, 1408, 1408, True, 4 * 1408, 30.06),
    'gfnet_efficientnet_b3_128': (128, 4, 300, 1536, 1536, True, 4 * 1536, 37.33),
    'gfnet_efficientnet_b3_144': (144, 4, 300, 1536, 1536, True, 4 * 1536, 37.41),
}
# The same heads with a backbone, a twentieth of the time
SMALL = dict(backbone='test_resnet', patch_size=64, num_classes=7, classifier_hidden=24, policy_hidden=16)
create_small = partial(timm.create_model, 'gfnet', **SMALL)


class TestGFNet(DynamicModelTester):
    name = 'test_gfnet'
    other_size = 131
    costs_grow = False

    @pytest.mark.parametrize(('shape', 'message'), [
        ((2, 3, 96, 80), 'square images, got 96x80'),
        ((2, 3, 24, 24), 'Images of 24 pixels have no patches of 48'),
    ])
    def test_images_of_a_wrong_size(self, model, shape, message):
        for call in (model, model.forward_features, model.init_state):
            with pytest.raises(ValueError, match=message):
                call(torch.zeros(shape))

    def test_the_policy_learns_through_the_crop(self):
        model = self.create()
        model(self.images()).square().mean().backward()
        assert model.policy.actor.weight.grad.abs().sum() > 0

    def test_feature_maps(self, model):
        x, twin = self.images(), copy.deepcopy(model)
        with torch.no_grad():
            maps = model.forward_features(x)
            twin.reset_classifier(0, '')
            assert torch.equal(twin(x), maps)
            assert self.create(num_classes=0, global_pool='').eval()(x).shape == maps.shape

    def test_groups_are_those_of_both_encoders(self, model):
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        for name, group in groups.items():
            if name.startswith('global_encoder.'):
                assert groups[name.replace('global', 'local')] == group
        last = max(groups.values())
        assert {n.split('.')[0] for n, g in groups.items() if g == last} == {'policy', 'classifier'}


class TestConcatenated(StepTester):
    name = 'test_gfnet'
    kwargs: ClassVar = dict(step_classifier='concat')
    costs_grow = False


class TestFirstHead(StepTester):
    name = 'test_gfnet'
    kwargs: ClassVar = dict(first_head=True)
    costs_grow = False


def test_parameters_without_weight_decay():
    swin = timm.create_model(
        'gfnet', backbone='swin_tiny_patch4_window7_224', patch_size=64, policy='conv', device='meta')
    names = swin.no_weight_decay()
    assert {name.partition('.')[0] for name in names} == {'global_encoder', 'local_encoder'}
    assert names <= dict(swin.named_parameters()).keys()


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return timm.create_model('test_gfnet').eval()


@pytest.mark.parametrize(('name', 'spec'), VARIANTS.items())
def test_variants_are_those_of_the_paper(name, spec):
    patch, steps, side, width, channels, own_head, last_width, millions = spec
    model = timm.create_model(name, device='meta')
    assert (model.patch_size, model.num_steps, model.img_size, model.num_classes) == (patch, steps, side, 1000)
    assert model.num_features == steps * channels
    assert model.head_hidden_size == last_width
    first = model.classifier.heads[model.classifier.head_name(0)]
    assert (model.classifier.head_name(0) in ('first', '1')) == own_head
    assert not own_head or first.in_features == width
    cells = -(-patch // 32)
    assert model.policy.state_encoder[0].weight.shape[1] in (channels * cells ** 2, channels)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)

    cfg = timm.get_pretrained_cfg(f'{name}.paper_in1k')
    assert cfg.input_size == (3, side, side)
    assert cfg.pool_size == (cells, cells)
    assert cfg.hf_hub_id == f'timm-dynamic/{name}.paper_in1k'
    assert tuple(cfg.classifier) == model.pretrained_cfg['classifier']  # the static entry says what the model has
    assert tuple(cfg.first_conv) == model.pretrained_cfg['first_conv']
    weights = model.state_dict()
    assert all(f'{layer}.weight' in weights for layer in (*cfg.classifier, *cfg.first_conv))
    bicubic = 'densenet' not in name and 'regnet' not in name
    assert model.glance_mode == ('bicubic' if bicubic else 'bilinear')


def test_the_tiny_model(tiny):
    assert sum(p.numel() for p in tiny.parameters()) < 1e6
    assert tiny.pretrained_cfg['input_size'] == (3, 96, 96)
    assert tiny.num_classes == 10
    assert tiny.step_macs[-1] < 20e6
    cfg = timm.get_pretrained_cfg('test_gfnet')
    assert tuple(cfg.first_conv) == tiny.pretrained_cfg['first_conv']
    assert tiny.forward_features(torch.zeros(1, 3, 96, 96)).shape[2:] == cfg.pool_size


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(img_size=48), 'Images of 48 pixels have no patches of 64'),
    (dict(num_steps=1), 'num_steps must be at least 2'),
    (dict(step_classifier='mean'), "step_classifier must be 'recurrent' or 'concat', got 'mean'"),
    (dict(policy='mlp'), "policy must be 'linear' or 'conv', got 'mlp'"),
    (dict(glance_mode='nearest'), "glance_mode must be 'bicubic' or 'bilinear', got 'nearest'"),
    (dict(backbone='resnet51'), r"Unknown backbone 'resnet51'. Did you mean \w*resnet\w* or"),
    (dict(backbone='test_vit'), "The backbone 'test_vit' has no spatial feature map"),
    (dict(backbone='swin_tiny_patch4_window7_224', patch_size=50, img_size=96, backbone_args=dict(img_size=64)),
     r"The backbone 'swin_tiny_patch4_window7_224' does not take patches of 50 pixels: Input height \(50\)"),
    (dict(backbone_args=dict(width=3)), r"The backbone 'test_resnet' cannot be created with .*'width': 3"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_small(**arguments)


@pytest.mark.parametrize(('backbone', 'classifier', 'policy', 'args'), [
    ('test_convnext', 'recurrent', 'conv', {}),
    ('mobilenetv4_conv_small_035', 'concat', 'conv', {}),
    ('test_byobnet', 'recurrent', 'linear', {}),
    ('test_efficientnet', 'concat', 'conv', {}),
    ('densenet121', 'recurrent', 'conv', dict(block_config=(1, 1, 1, 1), growth_rate=8)),
    # NHWC, and of a fixed size
    ('swin_tiny_patch4_window7_224', 'concat', 'conv', dict(depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 2, 4, 8))),
])
def test_any_backbone(backbone, classifier, policy, args):
    model = timm.create_model(
        'gfnet', backbone=backbone, patch_size=64, num_steps=2, num_classes=5, img_size=80, step_classifier=classifier,
        policy=policy, policy_hidden=32, backbone_args=args)
    x = torch.randn(2, 3, 80, 80)
    out = model(x)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        logits = model(x)
    assert counter.get_total_flops() == 2 * 2 * model.step_macs[-1]
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), logits)
    weights = model.state_dict()
    assert all(f'{n}.weight' in weights for k in ('first_conv', 'classifier') for n in model.pretrained_cfg[k])


def test_backbone_arguments_may_be_named_as_ours():
    model = timm.create_model(
        'gfnet', backbone='swin_tiny_patch4_window7_224', patch_size=64, policy='conv', device='meta',
        backbone_args=dict(patch_size=2, img_size=64))
    assert model.local_encoder.patch_embed.patch_size == (2, 2)


def test_backbone_arguments_are_exported(tmp_path):
    model = create_small(backbone_args=dict(output_stride=16), num_steps=3).eval()
    assert model.policy.state_encoder[0].in_features == 96 * 4 * 4
    save_pretrained(model, tmp_path / 'm')
    again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True).eval()
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(again(x), model(x))


def test_a_step_sees_glance_and_patches(tiny):
    x = torch.randn(3, 3, 96, 96)
    seen = []
    hooks = [encoder.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
             for encoder in (tiny.global_encoder, tiny.local_encoder)]
    with torch.inference_mode():
        state = tiny.init_state(x)
        _, first = tiny.step(0, state)
        _, second = tiny.step(1, first)
    for hook in hooks:
        hook.remove()
    assert list(state) == ['image']
    assert torch.equal(seen[0], get_glance(x, 48))
    assert torch.equal(seen[1], crop_patches(x, second['coords'], 48))
    assert all(len(v) == 3 for s in (first, second) for v in s.values())
    assert not first['map'].requires_grad


def test_autocast_keeps_positions(tiny):
    x = torch.randn(4, 3, 96, 96)
    with torch.inference_mode():
        plain = tiny(x, all_steps=True)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            low = tiny(x, all_steps=True)
    assert low['logits'].dtype == torch.bfloat16
    assert low['action_means'].dtype == torch.float32
    torch.testing.assert_close(low['action_means'], plain['action_means'], rtol=0, atol=0.02)
    torch.testing.assert_close(low['logits'].float(), plain['logits'], rtol=0, atol=0.1)


class TestAllSteps:
    """What training recipes ask a model for, in one call."""

    def test_given_actions(self, tiny):
        x, actions = torch.randn(2, 3, 96, 96), torch.rand(2, 2, 2)
        out = tiny(x, all_steps=True, actions=actions)
        assert out.keys() == {'logits', 'features', 'actions', 'coords'}
        assert torch.equal(out['actions'], actions)
        assert torch.equal(out['coords'], (actions * 48).floor().long())
        assert out['features'].shape == (3, 2, 96)
        out['logits'].sum().backward()
        assert {n.split('.')[0] for n, p in tiny.named_parameters() if p.grad is not None} == {
            'global_encoder', 'local_encoder', 'classifier'}
        tiny.zero_grad()

    def test_sampled_actions_and_what_the_policy_learns_from(self, tiny):
        x, noise = torch.randn(2, 3, 96, 96), 2 * torch.randn(2, 2, 2)
        out = tiny(x, all_steps=True, noise=noise)
        torch.testing.assert_close(out['actions'], (out['action_means'] + noise).clamp(0, 1))
        assert not out['actions'].requires_grad
        assert not out['maps'].requires_grad
        # states and hidden states are those that the policy had
        hidden = None
        for t in range(2):
            mean, hidden = tiny.policy(out['maps'][t], hidden)
            torch.testing.assert_close(mean, out['action_means'][t])
            torch.testing.assert_close(hidden, out['policy_hidden'][t])
        (out['action_means'].sum() + out['policy_hidden'].sum()).backward()
        assert {n.split('.')[0] for n, p in tiny.named_parameters() if p.grad is not None} == {'policy'}
        tiny.zero_grad()
        # the same actions given give the same logits
        torch.testing.assert_close(tiny(x, all_steps=True, actions=out['actions'])['logits'], out['logits'])

    def test_it_is_what_the_steps_do(self, tiny):
        x = torch.randn(2, 3, 96, 96)
        with torch.inference_mode():
            torch.testing.assert_close(tiny(x, all_steps=True)['logits'], torch.stack(list(tiny.forward_steps(x))))

    def test_policy_gets_no_gradient_from_whole_pixels_but_from_between(self, tiny):
        x = torch.randn(2, 3, 96, 96)
        tiny(x, all_steps=True)['logits'].sum().backward()
        assert tiny.policy.actor.weight.grad is None
        tiny(x, all_steps=True, differentiable=True)['logits'].sum().backward()
        assert tiny.policy.actor.weight.grad.abs().sum() > 0
        tiny.zero_grad()

    def test_wrong_shapes(self, tiny):
        for name in ('actions', 'noise'):
            with pytest.raises(ValueError, match=rf'Expected {name} \[2, 2, 2\], got \[3, 2, 2\]'):
                tiny(torch.zeros(2, 3, 96, 96), all_steps=True, **{name: torch.zeros(3, 2, 2)})

    def test_first_head_comes_with_what_the_rnn_would_have_said(self):
        model = create_small(first_head=True).eval()
        x = torch.randn(2, 3, 96, 96)
        out = model(x, all_steps=True)
        plain = create_small().eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if 'heads.first' not in k})
        torch.testing.assert_close(out['rnn_logits'], next(plain.forward_steps(x)))
        torch.testing.assert_close(out['logits'][0], model.classifier.heads['first'](out['features'][0]))


@pytest.fixture(scope='module')
def authors():
    torch.manual_seed(1)
    model = create_small().eval()
    return model, authors_checkpoint(model, 'test_resnet')


class TestAuthorsCheckpoint:
    def test_loads_from_a_file_with_all_it_holds(self, authors, tmp_path):
        source, checkpoint = authors
        torch.save(checkpoint, tmp_path / 'authors.pth.tar')
        model = create_small(pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / 'authors.pth.tar')).eval()
        x = torch.randn(2, 3, 96, 96)
        assert torch.equal(model(x), source(x))
        assert 'file' not in model.pretrained_cfg
        origin = model.exit_cfg['origin']
        assert origin['model_name'] == 'test_resnet'
        assert origin['flops'] == [0.5e9, 1e9, 1.5e9, 2e9, 2.5e9]
        assert origin['anytime_classification'] == [60., 70.]
        assert origin['dynamic_threshold'] == checkpoint['dynamic_threshold'].tolist()
        assert origin['budgeted_batch_classification'][1] == [60.] * 39
        assert (len(model.exit_cfg['budgets']), model.exit_cfg['budgets'][0]['gmacs']) == (39, 0.5)

        # and comes back from an exported folder, in both ways of naming it
        save_pretrained(model, tmp_path / 'm')
        assert json.loads((tmp_path / 'm/config.json').read_text())['model_args']['exit_cfg'] == model.exit_cfg
        for again in (
                timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True),
                create_small(pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / 'm'))):
            assert torch.equal(again.eval()(x), model(x))
            assert again.exit_cfg == model.exit_cfg

    @pytest.mark.parametrize('prefix', ['', 'module.'])
    def test_prefix_or_not(self, authors, prefix):
        model, _ = authors
        create_small(pretrained=True, pretrained_cfg_overlay=dict(
            state_dict=authors_checkpoint(model, 'test_resnet', prefix=prefix)))

    def test_heads_of_steps_that_are_not_taken_are_dropped(self, caplog):
        caplog.set_level('INFO')
        model = timm.create_model(
            'gfnet', backbone='mobilenetv3_small_050', patch_size=64, num_steps=3, num_classes=7, policy='conv',
            policy_hidden=16, step_classifier='concat').eval()
        checkpoint = authors_checkpoint(model, 'mobilenetv3_small_050', steps=3)
        out = checkpoint_filter_fn(checkpoint, model)
        assert out.keys() == model.state_dict().keys()
        assert torch.equal(
            out['classifier.heads.1.weight'], checkpoint['model_prime_state_dict']['module.classifier.weight'])
        assert torch.equal(out['classifier.heads.3.bias'], checkpoint['fc']['fc_3.bias'])
        assert 'Not needed for inference and left out: fc.fc_4, fc.fc_5, model_state_dict.classifier, policy.critic.' \
            in caplog.text

    def test_what_only_training_needs(self, authors):
        model, checkpoint = authors
        state = training_state_from_checkpoint(checkpoint)
        assert state.keys() == {'global_aux', 'local_aux', 'critic'}
        assert torch.equal(state['critic']['weight'], checkpoint['policy']['critic.0.weight'])
        assert torch.equal(state['local_aux']['bias'], checkpoint['model_state_dict']['module.fc.bias'])
        assert training_state_from_checkpoint(model.state_dict()) == {}

    def test_other_classes_and_channels(self, authors, caplog):
        _, checkpoint = authors
        model = create_small(
            pretrained=True, num_classes=3, in_chans=1, pretrained_cfg_overlay=dict(state_dict=checkpoint))
        assert model(torch.randn(2, 1, 96, 96)).shape == (2, 3)
        for encoder, part in (('global', 'model_prime_state_dict'), ('local', 'model_state_dict')):
            torch.testing.assert_close(
                model.get_parameter(f'{encoder}_encoder.conv1.0.weight'),
                checkpoint[part]['module.conv1.0.weight'].sum(dim=1, keepdim=True))
        assert 'dropped: they are for 7 classes, the model has 3' in caplog.text
        assert list(model.exit_cfg) == ['origin']
        none = create_small(pretrained=True, num_classes=0, pretrained_cfg_overlay=dict(state_dict=checkpoint))
        assert none(torch.randn(2, 3, 96, 96)).shape == (2, 24)

    def test_thresholds_for_other_steps_are_dropped(self, authors, caplog):
        model = create_small(num_steps=3, pretrained=True, pretrained_cfg_overlay=dict(state_dict=authors[1]))
        assert 'dropped: Expected 3 thresholds' in caplog.text
        assert list(model.exit_cfg) == ['origin']

    @pytest.mark.parametrize(('change', 'arguments', 'message'), [
        ({}, dict(patch_size=96), 'made for patches of 64 pixels, the model for 96'),
        ({'model_name': 'regnety_1.6g'}, {}, 'made for regnety_016, the model for test_resnet'),
        ({'policy': None}, {}, 'The state dict does not fit gfnet: it holds no policy'),
        ({'fc': None}, {}, 'it holds no fc, the step classifier'),
        ({}, dict(backbone='test_efficientnet'), r"\d+ keys are missing \(first: 'global_encoder.conv_stem.weight'\)"),
        ({}, dict(step_classifier='concat'), r"missing, all in 'classifier' \(first: 'classifier.heads.2.weight'\)"),
        ({}, dict(policy='conv'), "'policy.state_encoder.3.weight'"),
    ])
    def test_another_variant(self, authors, change, arguments, message):
        with pytest.raises(CheckpointError, match=message):
            create_small(**arguments, pretrained=True, pretrained_cfg_overlay=dict(state_dict={**authors[1], **change}))


def test_no_weights_yet():
    with pytest.raises(CheckpointError, match=r'no weights of gfnet.untrained'):
        timm.create_model('gfnet', pretrained=True, device='meta')
    with pytest.raises(CheckpointError, match=r'github.com/blackfeather-wang/GFNet-Pytorch'):
        timm.create_model('gfnet_mobilenetv3_large_100_96', pretrained=True, device='meta')


def test_hub_weights_bring_their_exit_policies(tiny, tmp_path, monkeypatch):
    model = copy.deepcopy(tiny)
    budget = tiny.step_macs[1] / 1e9
    model.store_budgets([{'gmacs': budget, 'policy': [0.5] * 3}])
    snapshot = tmp_path / 'snapshots/abc123'
    save_pretrained(model, snapshot)
    asked = []

    def download(repo, filename, revision=None, cache_dir=None, local_files_only=False):
        asked.append((repo, filename, revision))
        return str(snapshot / filename)

    monkeypatch.setattr('timm_dynamic.utils.download.hf_hub_download', download)
    again = timm.create_model('test_gfnet', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='a/b@main'))
    assert asked == [('a/b', 'model.safetensors', 'main'), ('a/b', 'config.json', 'abc123')]
    assert again.exit_cfg == model.exit_cfg
    again.set_budget(gmacs=budget)
