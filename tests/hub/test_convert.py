"""Conversion of the authors' files: every tensor is accounted for, and the logits stay the same."""
import hashlib
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from parity.test_gfnet import RECIPES, build_checkpoint

from timm_dynamic.hub import Entry, convert, convert_main, fixed_logits, match_tensors, read_catalog
from timm_dynamic.models.gfnet import checkpoint_filter_fn
from timm_dynamic.utils import CheckpointError

FULL = os.environ.get('TIMM_DYNAMIC_FULL_TESTS') == '1'
CATALOG = read_catalog()


def config_of(folder) -> dict:
    return json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize('name', list(RECIPES) if FULL else ['gfnet_mobilenetv3_large_100_96'])
def test_gfnet(name, tmp_path):
    authors = build_checkpoint(name)
    num_weights = sum(len(authors[part]) for part in ('model_prime_state_dict', 'model_state_dict', 'fc', 'policy'))
    authors.update(epoch=3, optimizer={'state': {0: {'momentum_buffer': torch.randn(3)}}}, best=np.float64(70.))
    file, folder = tmp_path / 'authors.pth.tar', tmp_path / 'out'
    torch.save(authors, file)
    report = convert(file, CATALOG[f'{name}.paper_in1k'], folder, verify=False)

    dropped = report['dropped']
    assert dropped['state of an optimizer'] == ['optimizer/state/0/momentum_buffer']
    assert dropped['numbers, kept in config.json'] == ['dynamic_threshold']
    assert dropped['the critic, used in training only'] == ['policy/critic.0.weight', 'policy/critic.0.bias']
    auxiliary = dropped['auxiliary classifiers, used in training only']
    local = [k for k in auxiliary if k.startswith('model_state_dict/module.')]
    assert len(local) == 2  # that of the global encoder is the head of step 1, where it has one
    recurrent = 'resnet' in name or 'densenet' in name
    assert len(auxiliary) == (4 if recurrent else 2)
    steps = len(RECIPES[name]['macs']['cumulative'])
    unused = dropped.get('classifiers of steps that the model does not take', [])
    assert len(unused) == (0 if recurrent or 'regnet' in name else 2 * (5 - steps))
    assert report['kept'] == num_weights - 2 - len(auxiliary) - len(unused)
    assert report['elsewhere'] == 0

    source = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=file))
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(fixed_logits(again), fixed_logits(source))
    config = config_of(folder)
    assert config['weights_sha256'] == hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    assert config['step_macs'] == list(source.step_macs)
    assert config['metrics'] == {'top1': 60. + steps - 1}
    assert config['pretrained_cfg']['license'] == 'apache-2.0'
    assert config['conversion']['files'][0]['name'] == 'authors.pth.tar'
    assert len(config['model_args']['exit_cfg']['budgets']) == 39
    assert again.exit_cfg == source.exit_cfg
    assert sorted(p.name for p in tmp_path.iterdir()) == ['authors.pth.tar', 'out']
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'curve.png', 'model.safetensors']


def build_by_specification(name, device=None):
    """A checkpoint with the authors' keys and shapes, for variants without a reference run; and the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, device=device)
    state = model.state_dict(keep_vars=True)
    family = re.match('[a-z]+', model.backbone)[0]

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def tensors(module, *shape):
        return {f'{module}.weight': torch.empty(shape, device=device).normal_(),
                f'{module}.bias': torch.empty(shape[0], device=device).normal_()}

    def pycls(key):  # the authors' RegNets
        key = re.sub(r'\.se\.fc([12])\.', lambda m: f'.f.se.f_ex.{2 * int(m[1]) - 2}.', key)
        key = re.sub(r'\.conv([123])\.conv\.', lambda m: f'.f.{"abc"[int(m[1]) - 1]}.', key)
        key = re.sub(r'\.conv([123])\.bn\.', lambda m: f'.f.{"abc"[int(m[1]) - 1]}_bn.', key)
        return key.replace('.downsample.conv.', '.proj.').replace('.downsample.bn.', '.bn.')

    width = model.global_encoder.head_hidden_size
    classifier = 'fc' if family in ('resnet', 'regnety') else 'classifier'
    out = {'model_name': model.backbone, 'patch_size': model.patch_size}
    for key, encoder in (('model_prime_state_dict', 'global_encoder.'), ('model_state_dict', 'local_encoder.')):
        own = part('classifier.heads.first.') or part('classifier.heads.1.')
        heads = {f'{classifier}.{k}': v for k, v in own.items()} if own and encoder[0] == 'g' else \
            tensors(classifier, 1000, width)
        keys = pycls if family == 'regnety' else str
        out[key] = {f'module.{keys(k)}': v for k, v in {**part(encoder), **heads}.items()}
    if hasattr(model.classifier, 'rnn'):
        out['fc'] = {**{f'rnn.{k}_l0': v for k, v in part('classifier.rnn.').items()},
                     **{f'fc.{k}': v for k, v in part('classifier.heads.rnn.').items()}}
    else:
        out['fc'] = {}
        for t in range(2, 6):  # the authors store five, also for steps that the model does not take
            own = {f'fc_{t}.{k}': v for k, v in part(f'classifier.heads.{t}.').items()}
            out['fc'].update(own or tensors(f'fc_{t}', 1000, t * width))
    hidden = state['policy.actor.weight'].shape[1]
    out['policy'] = {**{re.sub(r'^(gru\..*)$', r'\1_l0', k.replace('actor.', 'actor.0.')): v
                        for k, v in part('policy.').items()}, **tensors('critic.0', 1, hidden)}
    return out, model


@pytest.mark.parametrize('name', RECIPES)
def test_the_specification_agrees_with_the_reference_runs(name):
    built, shapes = build_by_specification(name, device='meta')[0], {}
    for part, spec in RECIPES[name]['components'].items():
        shapes = spec.get('shapes') or shapes
        if shapes:  # those of the first encoder hold for both
            assert {k: list(v.shape) for k, v in built[part].items()} == shapes


UNRECORDED = [f'gfnet_{n}' for n in (
    'mobilenetv3_large_125_128', 'densenet121_96', 'densenet201_96', 'regnety_016_96', 'efficientnet_b3_144')]


@pytest.mark.parametrize('name', UNRECORDED if FULL else UNRECORDED[:2])
def test_gfnet_without_a_reference_run(name):
    authors, model = build_by_specification(name, device='meta')
    mapped, weights = checkpoint_filter_fn(authors, model), model.state_dict(keep_vars=True)
    assert mapped.keys() == weights.keys()
    assert all(mapped[k] is v for k, v in weights.items())


def test_the_script(tmp_path, capsys):
    torch.manual_seed(1)
    weights = timm.create_model('resnet18').state_dict()
    momentum = {'state': {0: {'momentum_buffer': torch.randn(64, 3, 7, 7)}}}
    file = tmp_path / 'clonalnet_resnet18_model_best.pth.tar'
    torch.save({'epoch': 90, 'arch': 'resnet18', 'best_acc1': np.float64(70.422), 'optimizer': momentum,
                'state_dict': {f'module.{k}': v for k, v in weights.items()}}, file)
    folder = tmp_path / 'out'
    assert convert_main([str(file), '--model', 'focusnet_resnet18', '--out', str(folder)]) == 0
    out = capsys.readouterr().out
    assert 'focusnet_resnet18.paper_in1k: 122 tensors kept\n' in out
    assert 'left out, state of the optimizer: 1\n    optimizer/state/0/momentum_buffer\n' in out
    assert "Loaded in a fresh process: logits differ from the source's by 0" in out
    assert 'Publishing it needs permission: The authors state no licence' in out
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert config_of(folder)['metrics'] == {'top1': 70.422, 'top5': 89.562}

    assert convert_main([str(file), '--model', 'anchornet', '--out', str(tmp_path / 'no')]) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: ')
    assert 'does not fit anchornet' in err
    assert not (tmp_path / 'no').exists()


def test_an_unknown_tensor_is_an_error(tmp_path):
    entry = replace(CATALOG['focusnet_resnet18.paper_in1k'], name='test_focusnet')
    weights = timm.create_model('test_focusnet').state_dict()
    torch.save({'state_dict': weights, 'extra': {'head': torch.ones(2)}}, tmp_path / 'a.pth.tar')
    with pytest.raises(CheckpointError, match=r'1 tensors of the source are neither in .* \(first: extra/head\)'):
        convert(tmp_path / 'a.pth.tar', entry, tmp_path / 'out', verify=False)
    assert not (tmp_path / 'out').exists()


def test_anchornet_of_three_files(tmp_path):
    model = timm.create_model('test_anchornet_patch').eval()
    nets = {'anchornet.pth': model.localizer, 'a_resized_best.pth.tar': model.resized, 'a_patch_best.pth.tar':
            model.patch}
    source = tmp_path / 'authors'
    source.mkdir()
    for name, net in nets.items():
        state = net.state_dict()
        torch.save(state if name == 'anchornet.pth' else {'net': state, 'optimizer': {'m': torch.ones(4)}},
                   source / name)
    published = CATALOG['anchornet_patch_densenet201_95.paper_in1k']
    point = {'thresholds': [0.5, 0.6, 0.], 'top1': 75., 'exits': [50, 30, 20]}
    entry = replace(published, name='test_anchornet_patch.digits', budgets=(point,), steps=(70., 74., 76.))
    mapping = {part: source / name for part, name in zip(('localizer', 'resized', 'patch'), nets)}
    for folder, given, parts in (tmp_path / 'out', source, nets), (tmp_path / 'again', mapping, mapping):
        report = convert(given, entry, folder, verify=False)
        assert report['kept'] == len(model.state_dict())
        assert {reason: set(keys) for reason, keys in report['dropped'].items()} == {
            'state of the optimizer': {f'{part}/optimizer/m' for part in list(parts)[1:]}}
    assert config_of(tmp_path / 'again')['weights_sha256'] == config_of(tmp_path / 'out')['weights_sha256']
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(fixed_logits(again), fixed_logits(model))
    budget, costs = again.exit_cfg['budgets'][0], model.step_macs
    assert budget['gmacs'] == pytest.approx((0.5 * costs[0] + 0.3 * costs[1] + 0.2 * costs[2]) / 1e9)
    assert budget['exit_shares'] == [0.5, 0.3, 0.2]
    assert len(config_of(tmp_path / 'out')['conversion']['files']) == 3
    assert config_of(tmp_path / 'out')['metrics']['top1'] == 74.87  # of the catalog's entry
    assert '| 50, 30, 20 |' in (tmp_path / 'out/README.md').read_text()


def test_the_localizer_alone(tmp_path):
    from parity.test_anchornet import RECORD
    from parity.reference import fill  # isort: skip
    spec = RECORD['components']['anchornet']
    template = {k: torch.empty(shape, device='meta') for k, shape in spec['shapes'].items()}
    torch.save(fill(template, spec['salt'], spec['gains']), tmp_path / 'anchornet.pth')
    report = convert(tmp_path / 'anchornet.pth', CATALOG['anchornet.paper_in1k'], tmp_path / 'out', verify=False)
    dropped = report['dropped']['the first expansion, which AnchorNet never uses']
    assert {k.rpartition('.')[0] for k in dropped} == {'bneck.0.conv1', 'bneck.0.bn1'}
    assert report['kept'] + len(dropped) == len(template)


def test_only_patterns_of_the_entry_are_dropped():
    entry = Entry('a.b', dropped={r'opt/\d+': 'optimizer'})
    weights = {'w': torch.ones(2), 'v': torch.ones(2)}
    tensors = {'x': torch.ones(2), 'y': torch.ones(2), 'opt/0': torch.ones(2)}
    assert match_tensors(tensors, weights, entry) == {'kept': 2, 'dropped': {'optimizer': ['opt/0']}, 'elsewhere': 0}
    assert match_tensors({'x': torch.ones(2)}, weights, entry) == {'kept': 1, 'dropped': {}, 'elsewhere': 1}
    with pytest.raises(CheckpointError, match='first: z'):  # equal, but there are only two
        match_tensors({**tensors, 'z': torch.ones(2)}, weights, entry)
    with pytest.raises(CheckpointError, match='first: x'):  # other bits
        match_tensors({'x': torch.ones(2) + 1e-7}, weights, entry)


@pytest.mark.skipif(not FULL, reason='large')
def test_the_large_ones_convert(tmp_path):
    from parity.test_anchornet import authors
    parts = authors.__wrapped__()
    files = {part: tmp_path / f'{part}.pth' for part in parts}
    for part, weights in parts.items():
        torch.save(weights if part == 'localizer' else {'net': weights}, files[part])
    report = convert(files, CATALOG['anchornet_patch_densenet201_95.paper_in1k'], tmp_path / 'out')
    assert report['difference'] == 0
    for name in ('focusnet_resnet34', 'focusnet_mobilenetv2_100'):
        torch.save({'state_dict': timm.create_model(name.removeprefix('focusnet_')).state_dict()}, tmp_path / name)
        assert convert(tmp_path / name, CATALOG[f'{name}.paper_in1k'], tmp_path / f'{name}.out')['difference'] == 0
