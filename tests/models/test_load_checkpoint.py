"""Weights from outside: every kind of source, for every family."""
import zipfile
from functools import partial

import pytest
import timm
import torch
from helpers import authors_checkpoint
from parity.confidence_reference import make_state_dict
from safetensors.torch import save_file

import timm_dynamic  # noqa: F401
from timm_dynamic import ConfidenceNet
from timm_dynamic.models.builder import Family, load_checkpoint
from timm_dynamic.utils import CheckpointError, save_exit_cfg, save_pretrained

# For each family: model, and how to create it with few parameters.
FAMILIES = {
    'focusnet': partial(timm.create_model, 'test_focusnet'),
    'gfnet': partial(timm.create_model, 'test_gfnet'),
    'anchornet': partial(timm.create_model, 'anchornet', num_classes=10),
    'anchornet_patch': partial(timm.create_model, 'test_anchornet_patch'),
    'clcnet': partial(timm.create_model, 'test_clcnet'),
    'timm': partial(timm.create_model, 'test_resnet', num_classes=10),
}


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def write_timm(model, folder):
    """As timm's train.py: with averaged weights and what training needs."""
    other = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    torch.save({'epoch': 3, 'state_dict': other, 'state_dict_ema': model.state_dict()}, folder / 'last.pth.tar')
    return folder / 'last.pth.tar'


def write_wrapped(model, folder):
    torch.save({f'module.{k}': v for k, v in model.state_dict().items()}, folder / 'weights.pth')
    return folder / 'weights.pth'


def write_safetensors(model, folder):
    save_file(weights(model), folder / 'weights.safetensors')
    return folder / 'weights.safetensors'


def write_exported(model, folder):
    save_pretrained(model, folder)
    return folder


SOURCES = {
    'state dict': lambda model, folder: model.state_dict(),
    'file of torch': write_wrapped,
    'file of timm': write_timm,
    'safetensors': write_safetensors,
    'path as text': lambda model, folder: str(write_safetensors(model, folder)),
    'exported folder': write_exported,
    'local-dir:': lambda model, folder: f'local-dir:{write_exported(model, folder)}',
    'weights in an exported folder': lambda model, folder: write_exported(model, folder) / 'model.safetensors',
}


@pytest.mark.parametrize('family', FAMILIES)
def test_our_own_weights(family, tmp_path):
    source, model = (FAMILIES[family]() for _ in range(2))
    for kind, write in SOURCES.items():
        for value in model.state_dict().values():
            value.zero_()
        folder = tmp_path / kind.rstrip(':')
        folder.mkdir()
        assert load_checkpoint(model, write(source, folder)) == {}
        assert same_weights(model, source), kind


def write_parts(model, folder):
    """The authors' three files of AnchorNet-patch."""
    names = {'localizer': 'anchornet.pth', 'resized': 'r18_resized_48_best.pth.tar', 'patch': 'r18_patch_48.pth.tar'}
    for part, name in names.items():
        torch.save({'net': model.get_submodule(part).state_dict()}, folder / name)
    return {part: folder / name for part, name in names.items()}


@pytest.mark.parametrize('kind', ['folder', 'local-dir:', 'files', 'texts', 'state dicts'])
def test_three_files_of_anchornet_patch(kind, tmp_path):
    source, model = (FAMILIES['anchornet_patch']() for _ in range(2))
    files = write_parts(source, tmp_path)
    assert load_checkpoint(model, {
        'folder': tmp_path, 'local-dir:': f'local-dir:{tmp_path}', 'files': files,
        'texts': {part: str(file) for part, file in files.items()},
        'state dicts': {part: source.get_submodule(part).state_dict() for part in files}}[kind]) == {}
    assert same_weights(model, source)


def test_parts_of_anchornet_patch_that_may_be_absent(tmp_path):
    source, model = (FAMILIES['anchornet_patch']() for _ in range(2))
    files, localizer = write_parts(source, tmp_path), weights(model.localizer)
    del files['localizer']
    with pytest.raises(CheckpointError, match=r"r18_resized_48_best.pth.tar', '.*' does not fit .* holds no localizer"):
        load_checkpoint(model, files)
    load_checkpoint(model, files, optional=('localizer',))
    assert all(torch.equal(v, localizer[k]) for k, v in model.localizer.state_dict().items())
    assert same_weights(model.resized, source.resized)
    files['localiser'] = files['resized']
    with pytest.raises(CheckpointError, match=r"unexpected \(first: 'localiser\."):
        load_checkpoint(model, files, optional=('localizer',))


def write_zip(path):
    torch.save(make_state_dict(), path.with_suffix('.pt'))
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('model_params.json', '{}')
        archive.write(path.with_suffix('.pt'), 'network.pt')
    return path


class TestCascade:
    @pytest.fixture
    def members(self):
        return [timm.create_model(name, num_classes=7) for name in ('test_efficientnet', 'test_resnet')]

    @pytest.fixture
    def model(self, members):
        """Of modules, for which nothing is fetched."""
        return timm.create_model('clcnet', models=members)

    def test_zip(self, model, tmp_path):
        before = weights(model.members)
        assert load_checkpoint(model, write_zip(tmp_path / 'split(MSE_0.1).zip')) == {}
        assert same_weights(model.confidence_net, ConfidenceNet.from_pretrained(make_state_dict()))
        assert all(torch.equal(v, before[k]) for k, v in model.members.state_dict().items())

    def test_parts(self, model, tmp_path):
        other = timm.create_model('test_resnet', num_classes=7)
        write_exported(other, tmp_path / 'b')
        load_checkpoint(model, {'confidence_net': write_zip(tmp_path / 'net.zip'), '1': f'local-dir:{tmp_path / "b"}'})
        assert same_weights(model.members[1], other)
        net = ConfidenceNet()
        load_checkpoint(model, {'confidence_net': net.state_dict(), '0': model.members[0].state_dict()})
        assert same_weights(model.confidence_net, net)
        with pytest.raises(CheckpointError, match='does not fit clcnet: it holds no confidence_net'):
            load_checkpoint(model, {'1': other.state_dict()})
        load_checkpoint(model, {'1': timm.create_model('test_resnet', num_classes=7).state_dict()},
                        optional=('confidence_net',))
        assert same_weights(model.confidence_net, net)

    def test_absent_members_are_fetched(self, monkeypatch, tmp_path):
        asked, create = [], timm.create_model

        def create_model(name, pretrained=False, cache_dir=None, **kwargs):
            asked.append((name, cache_dir))
            return create(name, **kwargs)

        model = create('clcnet', models=('test_efficientnet', 'test_resnet'), num_classes=1000)
        given = create('test_efficientnet')
        monkeypatch.setattr(timm, 'create_model', create_model)
        monkeypatch.setattr('timm_dynamic.utils.download.can_connect', lambda: True)  # it could be fetched
        load_checkpoint(
            model, {'confidence_net': make_state_dict(), '0': given.state_dict()}, cache_dir=tmp_path)
        assert asked == [('test_resnet', tmp_path)]
        assert same_weights(model.members[0], given)


class TestAuthorsGFNet:
    @pytest.fixture
    def source(self):
        torch.manual_seed(1)
        return FAMILIES['gfnet']().eval()

    @pytest.fixture
    def checkpoint(self, source):
        return authors_checkpoint(source, 'test_resnet', steps=3)

    @pytest.mark.parametrize('kind', ['file', 'content'])
    def test_weights_exits_and_what_training_needs(self, source, checkpoint, kind, tmp_path):
        torch.save(checkpoint, tmp_path / 'authors.pth.tar')
        model = FAMILIES['gfnet']()
        state = load_checkpoint(model, {'file': tmp_path / 'authors.pth.tar', 'content': checkpoint}[kind])
        assert same_weights(model, source)
        assert len(model.exit_cfg['budgets']) == 39
        assert model.exit_cfg['origin']['model_name'] == 'test_resnet'
        assert state.keys() == {'global_aux', 'local_aux', 'critic'}
        assert all(sorted(tensors) == ['bias', 'weight'] for tensors in state.values())
        assert torch.equal(state['critic']['bias'], checkpoint['policy']['critic.0.bias'])

    def test_a_file_of_the_first_stage(self, source, checkpoint):
        first = {k: v for k, v in checkpoint.items() if k != 'policy'}
        model = FAMILIES['gfnet']()
        policy = weights(model.policy)
        with pytest.raises(CheckpointError, match='does not fit test_gfnet: it holds no policy'):
            load_checkpoint(model, first)
        state = load_checkpoint(model, first, optional=('policy',))
        assert state.keys() == {'global_aux', 'local_aux'}
        assert all(torch.equal(v, policy[k]) for k, v in model.policy.state_dict().items())
        assert same_weights(model.local_encoder, source.local_encoder)


def test_what_training_needs_beside_exported_weights(tmp_path):
    source, model = (FAMILIES['gfnet']() for _ in range(2))
    critic = {'weight': torch.randn(1, 8), 'bias': torch.randn(1)}
    save_pretrained(source, tmp_path, task_state={'critic': critic})
    for path in (tmp_path, tmp_path / 'model.safetensors'):
        state = load_checkpoint(model, path)
        assert state.keys() == {'critic'}
        assert torch.equal(state['critic']['weight'], critic['weight'])
    torch.save(source.state_dict(), tmp_path / 'other.pth')  # other weights in this folder have no such state
    assert load_checkpoint(model, tmp_path / 'other.pth') == {}


def test_averaged_weights_or_not(tmp_path):
    for family in ('timm', 'gfnet'):
        source, model = (FAMILIES[family]() for _ in range(2))
        file = write_timm(source, tmp_path)
        load_checkpoint(model, file, use_ema=False)
        assert not any(v.any() for v in model.state_dict().values())
        load_checkpoint(model, file)
        assert same_weights(model, source)


def test_averaged_weights_by_part(tmp_path):
    source, model = (FAMILIES['anchornet_patch']() for _ in range(2))
    files = write_parts(source, tmp_path)
    for part in ('resized', 'patch'):
        write_timm(source.get_submodule(part), tmp_path).rename(files[part])
    for origin in (tmp_path, files):
        load_checkpoint(model, origin, use_ema=False)
        assert not model.resized.fc.weight.any()
        load_checkpoint(model, origin)
        assert same_weights(model, source)


@pytest.mark.parametrize('family', FAMILIES)
def test_other_classes_and_channels(family):
    source = FAMILIES[family]()
    model = FAMILIES[family](num_classes=4, in_chans=1)
    with pytest.raises(CheckpointError, match='have another shape'):
        load_checkpoint(model, source.state_dict())
    load_checkpoint(model, source.state_dict(), adapt=True)
    same = FAMILIES[family]()
    heads = [layer.weight.clone() for layer in torch.nn.ModuleList(
        same.get_classifier() if isinstance(same.get_classifier(), tuple) else [same.get_classifier()])]
    load_checkpoint(same, source.state_dict(), adapt=True, reset_head=True)
    now = same.get_classifier() if isinstance(same.get_classifier(), tuple) else [same.get_classifier()]
    assert all(torch.equal(a, b.weight) for a, b in zip(heads, now, strict=True))


def test_the_filter_of_timms_family_is_used():
    source = timm.create_model('test_vit', img_size=96)
    model = timm.create_model('test_vit', img_size=64)
    load_checkpoint(model, source.state_dict())  # timm's filter resizes the position embedding
    assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert Family.of('no_such_model') == Family()


@pytest.mark.parametrize('family', FAMILIES)
def test_all_or_nothing(family, tmp_path):
    model = FAMILIES[family]()
    if family in ('gfnet', 'anchornet_patch', 'clcnet'):
        model.set_exit([0.5] * model.num_steps)
    before, exit_cfg = weights(model), dict(getattr(model, 'exit_cfg', {}))
    state = {k: v + 1 for k, v in before.items()}
    state.pop(next(k for k in state if k.endswith('fc.weight') or k.startswith('classifier')))
    save_file(state, tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError, match=r"^'.*a.safetensors' does not fit"):
        load_checkpoint(model, tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError, match=r'^The backup does not fit'):
        load_checkpoint(model, state, label='The backup')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert getattr(model, 'exit_cfg', {}) == exit_cfg


EXIT = [0.25, 0.5, 0.]


class TestExits:
    @pytest.fixture
    def folder(self, tmp_path):
        source = FAMILIES['gfnet']()
        source.set_exit(EXIT)
        save_pretrained(source, tmp_path / 'm')
        return tmp_path / 'm'

    def test_they_come_with_the_weights(self, folder):
        model = FAMILIES['gfnet']()
        model.set_exit([0.9, 0.9, 0.])
        for source in (folder, folder / 'model.safetensors'):
            load_checkpoint(model, source)
            assert model.exit_cfg['exit'] == EXIT
            assert model.exit_policy.values == tuple(EXIT)

    def test_they_are_dropped_with_other_weights(self, folder, caplog):
        model = FAMILIES['gfnet']()
        model.load_exit_cfg({'exit': EXIT, 'num_classes': 10, 'origin': {'flops': [1]}})
        load_checkpoint(model, FAMILIES['gfnet']().state_dict())
        assert model.exit_cfg == {}
        assert model.exit_policy is None
        assert caplog.text.count('dropped: The state dict has none.') == 1
        load_checkpoint(model, folder / 'model.safetensors', take_exits=False)
        assert model.exit_cfg == {}

    def test_of_several_weights_in_a_folder_config_json_describes_one(self, folder):
        (folder / 'other.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
        for name, exits in (('model', True), ('other', False)):
            model = FAMILIES['gfnet']()
            load_checkpoint(model, folder / f'{name}.safetensors')
            assert ('exit' in model.exit_cfg) == exits
        (folder / 'model.safetensors').rename(folder / 'third.safetensors')
        load_checkpoint(model, folder / 'third.safetensors')
        assert model.exit_cfg == {}

    def test_exits_of_another_architecture_are_not_taken(self, folder):
        model = timm.create_model(
            'gfnet', backbone='test_focusnet', backbone_args=dict(output_stride=16), patch_size=48, num_steps=3,
            img_size=96, classifier_hidden=128, policy='conv', policy_hidden=128, num_classes=10)
        load_checkpoint(model, folder)
        assert model.exit_cfg == {}

    @pytest.mark.parametrize(('text', 'message'), [
        ('[', r'config.json'),
        pytest.param('{"model_args": {"exit_cfg": ' + 99999 * '[' + 99999 * ']' + '}}', r'config.json', id='deep'),
        ('{"architecture": "test_gfnet", "model_args": {"exit_cfg": [1]}}', r'config.json. must be a dict, got list'),
    ])
    def test_a_damaged_config(self, folder, text, message):
        (folder / 'config.json').write_text(text)
        model = FAMILIES['gfnet']()
        before = weights(model)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(model, folder)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_an_exit_cfg_of_thousands_of_levels(self):
        deep = []
        for _ in range(99999):
            deep = [deep]
        with pytest.raises(ValueError, match='exit_cfg must be plain JSON: RecursionError'):
            FAMILIES['gfnet'](exit_cfg={'budgets': deep})

    def test_damaged_results_of_the_authors(self):
        model = FAMILIES['gfnet']()
        checkpoint = authors_checkpoint(FAMILIES['gfnet'](), 'test_resnet', steps=3, flops=7)
        before = weights(model)
        with pytest.raises(CheckpointError, match=r'The results in The backup are damaged \(TypeError'):
            load_checkpoint(model, checkpoint, label='The backup')
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_create_model_takes_the_callers(self, folder):
        create = partial(timm.create_model, pretrained=True)
        mine = {'exit': [0.75, 0.75, 0.], 'num_classes': 10}
        by_file = dict(pretrained_cfg_overlay=dict(file=folder))
        for source in (dict(model_name=f'local-dir:{folder}'), dict(model_name='test_gfnet', **by_file)):
            assert create(**source).exit_cfg['exit'] == EXIT
            assert create(**source, exit_cfg=mine).exit_cfg == mine
            assert create(**source, exit_cfg={}).exit_cfg == {}
        # without weights, those of config.json
        assert timm.create_model(f'local-dir:{folder}').exit_cfg['exit'] == EXIT

    def test_other_classes_are_told_once(self, folder, caplog):
        for source in (dict(model_name=f'local-dir:{folder}'),
                       dict(model_name='test_gfnet', pretrained_cfg_overlay=dict(file=folder))):
            caplog.clear()
            assert timm.create_model(**source, pretrained=True, num_classes=4).exit_cfg == {}
            assert caplog.text.count('dropped: they are for 10 classes, the model has 4') == 1

    def test_exits_of_another_confidence(self, tmp_path, caplog):
        source = FAMILIES['clcnet']()
        source.set_exit([0.5, 0.])
        save_pretrained(source, tmp_path)
        save_exit_cfg(tmp_path, source.exit_cfg)
        model = FAMILIES['clcnet'](confidence='margin')
        load_checkpoint(model, tmp_path)
        assert caplog.text.count('dropped: they are for another confidence.') == 1
        assert model.exit_cfg == {}
