import copy
import json
from functools import partial
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from models.model_tester import DynamicModelTester, StepTester
from parity.confidence_reference import make_state_dict
from PIL import Image
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic  # noqa: F401
from timm_dynamic import ConfidenceNet
from timm_dynamic.exits import collect_exit_table, early_exit
from timm_dynamic.models.builder import load_checkpoint
from timm_dynamic.models.clcnet import CONFIDENCES, FINAL_RULES
from timm_dynamic.utils import CheckpointError, save_pretrained

# members, their sizes, first convolution, parameters (M)
VARIANTS = {
    'clcnet_tf_efficientnet_b0_b4': (
        ['tf_efficientnet_b0.aa_in1k', 'tf_efficientnet_b4.aa_in1k'], (224, 380), 'conv_stem', 24.64),
    'clcnet_tf_efficientnet_b4_b7': (
        ['tf_efficientnet_b4.aa_in1k', 'tf_efficientnet_b7.ra_in1k'], (380, 600), 'conv_stem', 85.70),
}
SMALL = dict(models=('test_efficientnet@48', 'test_resnet@64'), num_classes=7)
create_small = partial(timm.create_model, 'clcnet', **SMALL)


def spread(model):
    """Make the confidences of new members differ."""
    with torch.no_grad():
        for net in model.members:
            net.fc.weight.mul_(40)
    return model


def create_spread():
    model = spread(timm.create_model('test_clcnet').eval())
    model.set_confidence('clcnet', net=ConfidenceNet.from_pretrained(make_state_dict()))
    return model


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return create_spread()


def images(batch=24, side=96, seed=0):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(('name', 'spec'), VARIANTS.items())
def test_variants_are_those_of_the_paper(name, spec):
    models, sizes, conv, millions = spec
    model = timm.create_model(name, device='meta')
    assert model._model_args['models'] == models
    assert (model.view_sizes, model.img_size, model.num_steps, model.num_classes) == (sizes, sizes[1], 2, 1000)
    assert (model.confidence_kind, model.final_rule) == ('clcnet', 'most_confident')
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    cfg = timm.get_pretrained_cfg(f'{name}.paper_in1k')
    assert cfg.hf_hub_id == f'timm-dynamic/{name}.paper_in1k'
    assert any('aa_in1k' in note for note in cfg.notes)
    deep = timm.get_pretrained_cfg(models[1])
    for key in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation'):
        assert getattr(cfg, key) == getattr(deep, key) == model.pretrained_cfg[key]
    assert tuple(cfg.first_conv) == model.pretrained_cfg['first_conv'] == (f'members.0.{conv}', f'members.1.{conv}')
    assert tuple(cfg.classifier) == model.pretrained_cfg['classifier']
    assert cfg.classifier[1] == 'members.1.classifier'


def test_cost_is_that_of_the_members_and_the_confidence_net():
    model = timm.create_model('clcnet_tf_efficientnet_b0_b4', device='meta')
    alone = []
    for name, side in (('tf_efficientnet_b0', 224), ('tf_efficientnet_b4', 380)):
        with torch.device('meta'), FlopCounterMode(display=False) as counter:
            timm.create_model(name).eval()(torch.zeros(1, 3, side, side))
        alone.append(counter.get_total_flops() // 2)
    shallow, both = model.step_macs
    net = shallow - alone[0]
    assert 0 < net < 0.12e6
    assert both == sum(alone) + 2 * net
    assert shallow / 1e9 == pytest.approx(0.39, abs=0.005)  # as the paper counts
    model.set_confidence('max_prob')
    assert model.step_macs == (alone[0], sum(alone))


def test_the_tiny_model(tiny):
    assert sum(p.numel() for p in tiny.parameters()) < 1e6
    assert (tiny.pretrained_cfg['input_size'], tiny.num_classes, tiny.view_sizes) == ((3, 96, 96), 10, (48, 96))
    assert tiny.step_macs[0] * 5 < tiny.step_macs[1] < 20e6
    cfg = timm.get_pretrained_cfg('test_clcnet')
    assert tuple(cfg.first_conv) == tiny.pretrained_cfg['first_conv']
    assert tuple(cfg.classifier) == tiny.pretrained_cfg['classifier']
    for key in ('crop_pct', 'interpolation', 'mean'):
        assert tiny.pretrained_cfg[key] == getattr(cfg, key)


class TestCLCNet(DynamicModelTester):
    name = 'test_clcnet'
    atol = 1e-3  # scores of the confidence net are up to 50

    @classmethod
    def make_model(cls):
        return create_spread()

    def test_a_tuple_has_one_tensor_per_member(self, model, all_steps):
        x, steps = all_steps
        small = F.interpolate(x, (48, 48), mode='bilinear', antialias=True)
        with torch.no_grad():
            for pair in ((small, x), [small, x]):
                torch.testing.assert_close(
                    model(pair, all_steps=True)['confidence'], torch.stack([s[1] for s in steps]), rtol=0, atol=1e-3)
            _, state = model.step(0, model.init_state((small, x)))
            result = early_exit(model, (small, x), self.thresholds(steps))
        assert state['view_1'] is x
        assert 'view_0' not in state
        assert torch.equal(result.steps_used, early_exit(model, x, self.thresholds(steps)).steps_used)

    @pytest.mark.parametrize(('x', 'message'), [
        ((torch.zeros(2, 3, 48, 48),), 'one tensor for each of 2 members, got 1'),
        ((torch.zeros(2, 3, 48, 48), torch.zeros(3, 3, 96, 96)), r'as many images for each member, got \[2, 3\]'),
        ((torch.zeros(2, 3, 48, 48), None), 'Expected images for member 1 .* got NoneType'),
    ])
    def test_bad_tuples(self, model, x, message):
        for call in (model, model.forward_features, model.init_state):
            with pytest.raises(ValueError, match=message):
                call(x)

    def test_groups_are_those_of_the_members(self, model):
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        last = max(groups.values())
        assert {n.split('.')[0] for n, g in groups.items() if g == last} >= {'members'}
        assert all(g == last for n, g in groups.items() if n.startswith('confidence_net.'))
        assert groups['members.1.layer1.0.conv1.weight'] not in (0, last)


class TestThreeMembers(StepTester):
    """Of two networks."""
    name = 'clcnet'
    kwargs: ClassVar = dict(
        models=('test_focusnet@48', 'test_resnet@64', 'test_focusnet@96'), confidence='agreement', num_classes=10)

    @classmethod
    def make_model(cls):
        return spread(cls.create().eval())


@pytest.mark.parametrize('final_rule', FINAL_RULES)
@pytest.mark.parametrize('confidence', CONFIDENCES)
def test_every_parameter_learns_with_every_confidence(confidence, final_rule):
    model = timm.create_model('test_clcnet', confidence=confidence, final_rule=final_rule)
    model(images(2)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert hasattr(model, 'confidence_net') == (confidence == 'clcnet')


def test_parameters_without_weight_decay():
    swin = timm.create_model('clcnet', models=['test_resnet', 'swin_tiny_patch4_window7_224'], device='meta')
    assert swin.no_weight_decay() <= dict(swin.named_parameters()).keys()
    assert any(name.startswith('members.1.') for name in swin.no_weight_decay())


class TestViews:
    def test_one_tensor_is_scaled_and_normalised_for_each_member(self):
        views = [dict(mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), interpolation='bilinear'), None]
        model = create_small(views=views).eval()
        pixels = torch.rand(2, 3, 64, 64)
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
        state = model.init_state((pixels - mean) / std)
        small = F.interpolate(pixels, (48, 48), mode='bilinear', antialias=True)
        mean, std = (torch.tensor(views[0][k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
        expected = (small - mean) / std
        torch.testing.assert_close(model._view(0, state), expected)
        assert model._view(1, state) is state['image']
        seen = []
        for net in model.members:
            net.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
        model(state['image'])
        assert seen == [48, 64]

    def test_the_largest_view_need_not_be_the_last(self):
        model = create_small(models=('test_resnet@64', 'test_efficientnet@32')).eval()
        assert (model.img_size, model.view_sizes) == (64, (64, 32))
        assert model(images(2, 64)).shape == (2, 7)

    def test_other_sizes_scale_all_views(self):
        model = create_small(img_size=32).eval()
        assert model.view_sizes == (24, 32)
        assert model(images(2, 32)).shape == (2, 7)
        model.set_input_size(80)
        assert (model.view_sizes, model.img_size) == ((60, 80), 80)
        cost = model.step_macs
        model.set_input_size(40)
        assert model.step_macs[1] < cost[1] / 3
        assert model(images(2, 96)).shape == (2, 7)  # any size, in the same proportion

    def test_members_of_a_fixed_size(self):
        model = timm.create_model(
            'clcnet', models=('test_resnet@32', 'test_vit@64'), num_classes=7, confidence='max_prob').eval()
        assert model.members[1].patch_embed.img_size == (64, 64)
        assert model(images(2, 64)).shape == (2, 7)
        with pytest.raises(ValueError, match='Expected image of 64x64, got 80x80'):
            model(images(2, 80))
        with pytest.raises(ValueError, match='Expected images for member 1 of 64x64, got 32x32'):
            model((images(2, 32), images(2, 32)))
        with pytest.raises(ValueError, match="member 'test_vit' takes images of one size only"):
            model.set_input_size(80)

    def test_configs(self, tiny):
        small, large = tiny.view_configs
        assert (small['input_size'], large['input_size']) == ((3, 48, 48), (3, 96, 96))
        transform = timm.data.create_transform(**small)
        assert transform(Image.new('RGB', (60, 50))).shape == (3, 48, 48)

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_half_precision(self, tiny, dtype):
        twin = copy.deepcopy(tiny).to(dtype)
        assert twin(images(2).to(dtype)).dtype == dtype
        assert twin(images(2).to(dtype), all_steps=True)['confidence'].dtype == torch.float32


class Fixed(nn.Module):
    """A member of no family of timm's: logits are the mean of the image's quarters."""
    num_classes, in_chans, num_features = 4, 3, 4

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 2).mean(1).flatten(1) * self.gain


class TestMembers:
    def test_modules(self, caplog):
        members = [Fixed(1), timm.create_model('test_resnet', num_classes=4), Fixed(10)]
        model = timm.create_model('clcnet', models=members, img_size=64, confidence='margin').eval()
        assert (model.num_classes, model.num_steps) == (4, 3)
        assert model.members[1] is members[1]
        x = images(4, 64)
        assert torch.equal(model(x, all_steps=True)['member_logits'][2], members[2](x))

    def test_modules_that_timm_knows_are_exported(self, tmp_path):
        members = [timm.create_model(name, num_classes=4) for name in ('test_resnet', 'test_efficientnet')]
        model = timm.create_model('clcnet', models=members, confidence='max_prob').eval()
        save_pretrained(model, tmp_path / 'm')
        again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True).eval()
        assert torch.equal(again(images(2)), model(images(2)))
        other = timm.create_model('clcnet', models=[Fixed(1), members[0]], confidence='max_prob')
        with pytest.raises(ValueError, match='cannot be saved: its member Fixed'):
            save_pretrained(other, tmp_path / 'other')

    def test_one_net_at_two_sizes_is_one_net(self):
        model = create_small(models=('test_resnet@32', 'test_efficientnet', 'test_resnet@64'))
        assert (len(model.members), model.member_of_step, model.num_steps) == (2, (0, 1, 0), 3)
        other = create_small(models=('test_resnet@32', 'test_resnet@64'), member_args=(dict(drop_rate=0.1), None))
        assert len(other.members) == 2
        x = images(2, model.img_size)
        assert len(model.eval()(x, all_steps=True)['logits']) == 3

    def test_arguments_of_members(self):
        model = create_small(member_args=(None, dict(channels=(8, 8, 16, 16))))
        assert model.members[1].layer4[-1].conv2.out_channels == 16
        assert create_small(drop_rate=0.25).members[0].drop_rate == 0.25

    @pytest.mark.parametrize(('arguments', 'message'), [
        (dict(models=['test_resnet']), 'at least two members, got 1'),
        (dict(models='test_resnet'), "Expected a list of members, got 'test_resnet'"),
        (dict(models=['test_resnet', 'resnet51']), r"Unknown model 'resnet51'. Did you mean \w*resnet\w* or"),
        (dict(models=['test_resnet', 'resnet18.nothing']), "Unknown weights in 'resnet18.nothing'"),
        (dict(member_args=[{}]), 'Expected member_args for 2 members, got 1'),
        (dict(member_args=[dict(width=3), None]), r"'test_efficientnet' cannot be created with \{'width': 3\}"),
        (dict(views=[dict(mode=3), None]), 'A view has size, interpolation.* got mode'),
        (dict(confidence='oracle'), "confidence must be one of 'clcnet', .*, got 'oracle'"),
        (dict(final_rule='first'), "final_rule must be one of 'most_confident', 'last', got 'first'"),
        (dict(models=[Fixed(1), Fixed(2)]), "member Fixed has {'num_classes': 4, 'in_chans': 3}, the cascade needs"),
        (dict(models=[Fixed(1), 'test_resnet'], num_classes=4, member_args=[dict(a=1), None]), 'takes no arguments'),
    ])
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            create_small(**arguments)

    def test_members_for_other_classes(self):
        with pytest.raises(ValueError, match=r"numbers of classes \(Fixed 4, 'test_resnet' 1000\): give num_c"):
            timm.create_model('clcnet', models=[Fixed(1), 'test_resnet'])
        members = []
        for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
            members.append(timm.create_model('test_resnet', num_classes=4))
            members[-1].pretrained_cfg['label_names'] = [f'animal {i}' for i in order]
        with pytest.raises(ValueError, match="in another order: class 1 is 'animal 1' and 'animal 2'"):
            timm.create_model('clcnet', models=members)


class TestConfidence:
    LOGITS = torch.tensor([[[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]], [[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]]]).log()  # [T, B, C]

    @pytest.fixture
    def model(self):
        members = [Fixed(1), Fixed(2)]
        for member in members:
            member.num_classes = 3
        return timm.create_model('clcnet', models=members, num_classes=3, img_size=8, confidence='max_prob').eval()

    @pytest.mark.parametrize(('kind', 'expected'), [
        ('max_prob', [[0.6, 0.5], [0.5, 0.8]]),
        ('margin', [[0.3, 0.25], [0.2, 0.7]]),
        # step 2: mean of what both say of the second class: (0.3 + 0.5) / 2, (0.25 + 0.8) / 2
        ('agreement', [[0.6, 0.5], [0.4, 0.525]]),
        # 1 - 1.0397 / log 3 with 1.0397 = 1.5 log 2, for [0.5, 0.25, 0.25]
        ('entropy', [[0.18267, 0.05360], [0.06272, 0.41835]]),
    ])
    def test_by_hand(self, model, kind, expected):
        found = model.replay(self.LOGITS, kind, 'last')
        torch.testing.assert_close(found.confidence, torch.tensor(expected), rtol=0, atol=1e-4)
        assert torch.equal(found.logits, self.LOGITS)

    def test_the_more_confident_answer(self, model):
        answers, confidence = model.replay(self.LOGITS, 'max_prob', 'most_confident')
        torch.testing.assert_close(confidence, torch.tensor([[0.6, 0.5], [0.6, 0.8]]))
        assert answers.argmax(-1).tolist() == [[0, 0], [0, 1]]  # image 0 keeps the first answer
        tie = model.replay(self.LOGITS[:, :1].flip(-1)[[0, 0]], 'max_prob', 'most_confident')
        assert torch.equal(tie.logits[1], tie.logits[0])

    def test_the_net(self, tiny):
        logits = torch.randn(2, 6, 10) * 3
        found = tiny.replay(logits, final_rule='last').confidence
        torch.testing.assert_close(found, torch.stack([tiny.confidence_net.score(v.softmax(-1)) for v in logits]))

    def test_setting_it(self, tiny, caplog, tmp_path):
        model = copy.deepcopy(tiny)
        model.set_exit([0.5, 0.])
        model.set_confidence('clcnet')  # as it was
        assert 'exit' in model.exit_cfg
        model.set_confidence('margin', final_rule='last')
        assert 'dropped: its confidence changes' in caplog.text
        assert model.exit_cfg == {}
        x = images(8)
        with torch.inference_mode():
            out = model(x, all_steps=True)
            torch.testing.assert_close(out['logits'][1], out['member_logits'][1])
            expected = tiny.replay(out['member_logits'], 'margin', 'last')
            torch.testing.assert_close(out['confidence'], expected.confidence)
        save_pretrained(model, tmp_path / 'm')
        again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True)
        assert (again.confidence_kind, again.final_rule) == ('margin', 'last')
        with pytest.raises(ValueError, match=r"'clcnet' needs a net, e\.g\. ConfidenceNet\.from_pretrained"):
            model.set_confidence('clcnet')
        with pytest.raises(ValueError, match="not used with the confidence 'entropy'"):
            model.set_confidence('entropy', net=ConfidenceNet())
        with pytest.raises(ValueError, match='so it has no confidence net'):
            model.replay(out['member_logits'], 'clcnet')
        with pytest.raises(ValueError, match=r'Expected logits \[2, batch, 10\], got \[3, 4, 10\]'):
            model.replay(torch.zeros(3, 4, 10))


def spread_threshold(model, x):
    with torch.inference_mode():
        return [model(x, all_steps=True)['confidence'][0].median().item(), 0.]


class TestProtocol:
    @pytest.mark.parametrize('confidence', CONFIDENCES)
    @pytest.mark.parametrize('final_rule', FINAL_RULES)
    def test_real_exit_is_simulated_exit_and_costs_what_the_table_says(self, tiny, confidence, final_rule):
        model = copy.deepcopy(tiny)
        model.set_confidence(confidence, final_rule)
        x = images()
        thresholds = spread_threshold(model, x)
        target = torch.arange(24) % 10
        table = collect_exit_table(model, [(x[:10], target[:10]), (x[10:], target[10:])])
        with torch.inference_mode():
            out = model(x, all_steps=True)
        torch.testing.assert_close(table.confidence, out['confidence'].T, rtol=0, atol=1e-4)
        point = table.evaluate(thresholds)
        assert 0 < point.exit_shares[0] < 1
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            result = early_exit(model, x, thresholds)
        assert torch.equal(result.steps_used, point.steps_used)
        rows = torch.arange(24)
        torch.testing.assert_close(result.logits, out['logits'][result.steps_used - 1, rows], rtol=0, atol=1e-3)
        assert counter.get_total_flops() / 2 == sum(model.step_macs[t - 1] for t in result.steps_used.tolist())

    def test_weighing_in_training_follows_confidence(self, tiny):
        model = copy.deepcopy(tiny)
        x = images(4)
        with torch.no_grad():
            out = model(x, all_steps=True)
            confidence = model.replay(out['member_logits'], final_rule='last').confidence
            weights = confidence.softmax(0)[..., None]
            torch.testing.assert_close(model.forward_train(x), (weights * out['member_logits']).sum(0))


class TestWeights:
    @pytest.fixture
    def fetched(self, monkeypatch):
        """Names that timm was asked to fetch; it gives weights that are known by their size."""
        asked, create = [], timm.create_model

        def create_model(name, pretrained=False, cache_dir=None, **kwargs):
            if pretrained:
                asked.append(name)
                torch.manual_seed(len(name))
            return create(name, **kwargs)

        monkeypatch.setattr(timm, 'create_model', create_model)
        monkeypatch.setattr('timm_dynamic.utils.download.can_connect', lambda: True)  # the weights could be fetched
        self.create = create
        return asked

    def test_authors_net_and_members_from_timm(self, fetched, tmp_path):
        save_file(make_state_dict(), tmp_path / 'authors.safetensors')
        model = self.create(
            'clcnet', models=('test_efficientnet@48', 'test_resnet@64'), pretrained=True,
            pretrained_cfg_overlay=dict(file=tmp_path / 'authors.safetensors')).eval()
        assert fetched == ['test_efficientnet', 'test_resnet']
        torch.manual_seed(len('test_resnet'))
        expected = self.create('test_resnet').state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in model.members[1].state_dict().items())
        net = ConfidenceNet.from_pretrained(make_state_dict())
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.confidence_net.state_dict().items())
        assert 'file' not in model.pretrained_cfg

        # a whole cascade: nothing is fetched
        fetched.clear()
        save_pretrained(model, tmp_path / 'm')
        assert json.loads((tmp_path / 'm/config.json').read_text())['model_args']['models'] == [
            'test_efficientnet', 'test_resnet']
        for again in (
                self.create(f'local-dir:{tmp_path / "m"}', pretrained=True),
                self.create('clcnet', models=('test_efficientnet@48', 'test_resnet@64'), pretrained=True,
                            pretrained_cfg_overlay=dict(file=tmp_path / 'm'))):
            assert torch.equal(again.eval()(images(2, 64)), model(images(2, 64)))
        assert fetched == []

    def test_parts(self, fetched, tmp_path):
        members = [self.create(name).eval() for name in ('test_efficientnet', 'test_resnet')]
        files = {'confidence_net': tmp_path / 'net.safetensors', '0': tmp_path / 'a.pth'}
        ConfidenceNet().save(files['confidence_net'])
        torch.save({'state_dict': members[0].state_dict()}, files['0'])
        save_file(members[1].state_dict(), tmp_path / 'b.safetensors')
        create = partial(self.create, 'clcnet', models=SMALL['models'], pretrained=True)
        model = create(pretrained_cfg_overlay=dict(file=files))
        assert fetched == ['test_resnet']
        assert torch.equal(model.members[0].classifier.weight, members[0].classifier.weight)
        model = create(pretrained_cfg_overlay=dict(file={**files, 'test_resnet': tmp_path / 'b.safetensors'}))
        assert fetched == ['test_resnet']
        assert torch.equal(model.members[1].fc.weight, members[1].fc.weight)
        with pytest.raises(CheckpointError, match=r"numbers of classes \('test_efficientnet' 7, 'test_resnet' 1000\)"):
            create(pretrained_cfg_overlay=dict(file=files), num_classes=7)
        with pytest.raises(CheckpointError, match='has the parts 7; expected confidence_net'):
            create(pretrained_cfg_overlay=dict(file={**files, '7': files['0']}))
        with pytest.raises(CheckpointError, match=r"missing, all in 'members' \(first: 'members.1.conv1.0.weight'\)"):
            create(pretrained_cfg_overlay=dict(file={**files, '1': files['0']}))
        with pytest.raises(CheckpointError, match='holds no confidence_net'):
            create(pretrained_cfg_overlay=dict(file={'0': files['0']}))

    def test_without_a_confidence_net_only_members_are_fetched(self, fetched):
        model = self.create(
            'clcnet', models=('test_efficientnet', 'test_resnet'), pretrained=True, confidence='max_prob')
        assert fetched == ['test_efficientnet', 'test_resnet']
        assert model.num_classes == 1000
        fetched.clear()
        part = self.create('test_resnet')
        model = self.create(
            'clcnet', models=[part, 'test_efficientnet'], pretrained=True, confidence='max_prob')
        assert fetched == ['test_efficientnet']
        assert model.members[0] is part

    def test_a_member_from_a_folder(self, tmp_path):
        part = timm.create_model('test_resnet', num_classes=4, channels=(8, 16, 24, 32)).eval()
        save_pretrained(part, tmp_path / 'part', data_config=dict(mean=(0.1, 0.2, 0.3)))
        name = f'local-dir:{tmp_path / "part"}'
        model = timm.create_model(
            'clcnet', models=[f'{name}@32', f'{name}@64'], confidence='entropy', pretrained=True).eval()
        assert (model.num_classes, len(model.members), model.view_sizes) == (4, 1, (32, 64))
        x = images(2, 64)
        assert torch.equal(model(x, all_steps=True)['member_logits'][1], part(x))
        assert tuple(model.view_configs[0]['mean']) == (0.1, 0.2, 0.3)
        save_pretrained(model, tmp_path / 'm')
        assert str(tmp_path) not in (tmp_path / 'm/config.json').read_text()
        again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True).eval()
        assert torch.equal(again(x), model(x))

    def test_members_that_cannot_be_had(self, tmp_path, monkeypatch):
        ConfidenceNet().save(tmp_path / 'net.safetensors')
        overlay = dict(file=tmp_path / 'net.safetensors')
        with pytest.raises(CheckpointError, match=r"the member 'mnasnet_050' are not available"):
            timm.create_model('clcnet', models=['mnasnet_050', 'mnasnet_050@32'], pretrained=True,
                              pretrained_cfg_overlay=overlay)
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        with pytest.raises(CheckpointError, match=r"the member 'test_resnet' are not available .*'test_resnet': FILE"):
            timm.create_model('clcnet', models=['test_resnet', 'test_efficientnet'], pretrained=True,
                              cache_dir=tmp_path / 'empty', pretrained_cfg_overlay=overlay)

    def test_members_trained_for_other_classes(self, fetched):
        with pytest.raises(CheckpointError, match=r"different numbers of classes \('resnet18' 1000, .*in21k.* 21843\)"):
            self.create('clcnet', models=['resnet18', 'tf_efficientnetv2_s.in21k'], num_classes=1000, device='meta',
                        pretrained=True, confidence='max_prob')

    def test_no_weights_yet(self):
        with pytest.raises(CheckpointError, match=r'github.com/yaoching0/CLCNet'):
            timm.create_model('clcnet_tf_efficientnet_b0_b4', pretrained=True, device='meta')

    def test_other_classes_and_channels(self, tiny):
        model = timm.create_model(
            'test_clcnet', pretrained=True, num_classes=3, in_chans=1,
            pretrained_cfg_overlay=dict(state_dict=tiny.state_dict()))
        assert model(torch.randn(2, 1, 96, 96)).shape == (2, 3)
        for i in range(2):
            torch.testing.assert_close(
                model.members[i].conv1[0].weight, tiny.members[i].conv1[0].weight.sum(dim=1, keepdim=True))
        assert torch.equal(model.confidence_net.head.weight, tiny.confidence_net.head.weight)

    def test_whole_or_not_at_all(self, tiny, caplog):
        twin = timm.create_model('test_clcnet')
        load_checkpoint(twin, tiny.state_dict())
        assert torch.equal(twin.eval()(images(2)), tiny(images(2)))
        state = tiny.state_dict()
        del state['members.1.fc.bias']
        with pytest.raises(CheckpointError, match=r"1 keys are missing \(first: 'members.1.fc.bias'\)"):
            load_checkpoint(twin, state)
        # without its net, into a cascade that needs none
        plain = timm.create_model('test_clcnet', confidence='max_prob')
        load_checkpoint(plain, tiny.state_dict())
        assert torch.equal(plain.members[0].fc.weight, tiny.members[0].fc.weight)


def test_budgets_hold_for_what_they_were_fitted_with(tmp_path, caplog):
    save_pretrained(timm.create_model('test_clcnet', pretrained=True), tmp_path)
    mine = {'exit': [0.5, 0.], 'num_classes': 10}
    for name in ('test_clcnet', f'local-dir:{tmp_path}'):
        assert timm.create_model(name, pretrained=True, confidence='clcnet').exit_cfg['budgets']
        for other in ({'confidence': 'max_prob'}, {'final_rule': 'last'}):
            caplog.clear()
            model = timm.create_model(name, pretrained=True, **other)
            assert model.exit_cfg == {}
            assert caplog.text.count(f'dropped: they are for another {next(iter(other))}') == 1
            assert timm.create_model(name, pretrained=True, exit_cfg=dict(mine), **other).exit_cfg == mine
    whole = timm.create_model('test_clcnet', pretrained=True)
    assert torch.equal(model.members[0].fc.weight, whole.members[0].fc.weight)


def test_members_of_one_architecture(tmp_path):
    """They are one network only if they are named alike."""
    nets = [timm.create_model('test_resnet', num_classes=5) for _ in range(2)]
    for i, net in enumerate(nets):
        save_pretrained(net, tmp_path / str(i))
    folders = [f'local-dir:{tmp_path}/{i}' for i in (0, 1)]
    x = torch.randn(2, 3, 160, 160)
    expected = [net.eval()(x) for net in nets]
    for models, networks in ((folders, None), (nets, None), (folders, (0, 1))):
        model = timm.create_model(
            'clcnet', models=models, networks=networks, confidence='max_prob', num_classes=5, pretrained=True).eval()
        assert model.member_of_step == (0, 1)
        save_pretrained(model, tmp_path / 'out')
        for cascade in (model, timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()):
            for logits, right in zip(cascade.forward_all((x, x))['member_logits'], expected):
                torch.testing.assert_close(logits, right)
    names = ['test_resnet@64', 'test_resnet@96', 'test_resnet@160']
    create = partial(timm.create_model, 'clcnet', models=names, confidence='max_prob', num_classes=5)
    assert create().member_of_step == (0, 0, 0)
    assert create(networks=[0, 1, 0]).member_of_step == (0, 1, 0)
    assert len(create(networks=[0, 1, 0]).members) == 2
    # two sizes of one folder, and another one
    models = [f'{folders[0]}@64', folders[0], folders[1]]
    assert timm.create_model('clcnet', models=models, confidence='max_prob').member_of_step == (0, 0, 1)


@pytest.mark.parametrize(('networks', 'message'), [
    ([0], 'Expected networks for 2 members, got 1'),
    ([1, 0], r'expected numbers from 0 in the order in which they appear, got \[1, 0\]'),
    ([0, 0], "'test_resnet', 'test_efficientnet' cannot be one network"),
])
def test_networks_that_cannot_be(networks, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('clcnet', models=['test_resnet', 'test_efficientnet'], networks=networks)


def test_a_module_is_one_network():
    net = timm.create_model('test_resnet')
    with pytest.raises(ValueError, match='a module that is given twice is one network'):
        timm.create_model('clcnet', models=[net, net], networks=[0, 1])


def test_only_a_confidence_net_costs_anything(tiny):
    free = timm.create_model('test_clcnet', confidence='max_prob')
    assert tiny.step_macs_of('max_prob') == tiny.step_macs_of('entropy') == free.step_macs
    assert free.step_macs_of('clcnet') == tiny.step_macs_of('clcnet') == tiny.step_macs != free.step_macs
    assert (free.confidence_kind, hasattr(free, 'confidence_net')) == ('max_prob', False)


def test_views_of_grey_images():
    for view in timm.create_model('test_clcnet', in_chans=1).view_configs:
        assert [len(view[k]) for k in ('input_size', 'mean', 'std')] == [3, 1, 1]


@pytest.mark.parametrize(('view', 'message'), [
    (dict(size=0), 'whole number of pixels, got 0'),
    (dict(size='48'), "whole number of pixels, got '48'"),
    (dict(crop_pct=0), 'share above 0, got 0'),
    (dict(crop_pct=float('nan')), 'share above 0, got nan'),
    (dict(mean=0.5), 'number for each channel, got 0.5'),
    (dict(std=[1, 0, 1]), 'number above 0 for each channel'),
    (dict(interpolation='foo'), "got 'foo'"),
    (dict(crop_mode='foo'), "center, squash or border, got 'foo'"),
])
def test_views_that_cannot_be(view, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_clcnet', views=[view, None])


def test_a_module_that_does_not_say_its_classes():
    with pytest.raises(ValueError, match='needs a num_classes: Linear has none'):
        timm.create_model('clcnet', models=['test_resnet', nn.Linear(2, 2)])


def test_agreement_is_of_several_members(tiny):
    with pytest.raises(ValueError, match='needs the probabilities of all members so far'):
        tiny.measure(torch.full((2, 10), 0.1), 'agreement')
