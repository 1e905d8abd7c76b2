"""The whole way, for a model of every family: the authors' file, a folder, the Hub, a user, and the same offline."""
import json
import os
import runpy

import pytest
import timm
import torch
from helpers import ROOT, run_python
from hub.hub_server import TOKEN, HubServer
from parity.confidence_reference import make_state_dict
from parity.reference import fill
from parity.test_anchornet import RECORD
from parity.test_gfnet import build_checkpoint
from safetensors.torch import save, save_file

from timm_dynamic.hub import convert, fixed_logits, read_catalog
from timm_dynamic.hub.check import TOLERANCE
from timm_dynamic.models.builder import BUNDLED

CATALOG = read_catalog(ROOT / 'hfhub/catalog.json')
ORG = 'mirror-org'  # not the one in the code: TIMM_DYNAMIC_HUB_ORG
MEMBERS = ('mobilenetv3_small_100.lamb_in1k', 'resnet50.a1_in1k')


def _authors_files(folder):
    """The authors' files, with the weights of the reference runs, by the model that is made of them."""
    recipe = json.loads((ROOT / 'tests/parity/data/focusnet.json').read_text())['resnet18']
    with torch.device('meta'):
        template = timm.create_model('resnet18').state_dict()
    focus = {f'module.{k}': v for k, v in fill(template, recipe['salt'], recipe['gains']).items()}
    spec = RECORD['components']['anchornet']
    template = {k: torch.empty(shape, device='meta') for k, shape in spec['shapes'].items()}
    contents = {
        'focusnet_resnet18': {'epoch': 90, 'arch': 'resnet18', 'state_dict': focus},
        'gfnet_regnety_006_96': build_checkpoint('gfnet_regnety_006_96'),
        'anchornet': fill(template, spec['salt'], spec['gains']),
        'clcnet': make_state_dict(1000),
    }
    for name, content in contents.items():
        torch.save(content, folder / f'{name}.pth')
    return {name: folder / f'{name}.pth' for name in contents}


def test_from_the_authors_files_to_users(tmp_path, capsys):
    root, expected, bundled = tmp_path / 'hub', {}, [p.name for p in BUNDLED.iterdir()]
    sources = _authors_files(tmp_path)
    with HubServer() as hub:
        members = {}
        for name in MEMBERS:  # of the cascade: they come from timm's own repositories
            torch.manual_seed(0)
            members[name] = timm.create_model(name.split('.')[0]).state_dict()
            hub.add(f'timm/{name}', {'model.safetensors': save(members[name])})
            torch.save(members[name], tmp_path / name)
        for name, file in sources.items():
            entry = CATALOG[f'{name}.paper_in1k']
            source = file
            if name == 'clcnet':
                source = {'confidence_net': file, **{n.split('.')[0]: tmp_path / n for n in MEMBERS}}
            convert(source, entry, root / entry.name, verify=False)  # as test_the_script has it
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=source))
            expected[name] = fixed_logits(model, 1)

        env = {**hub.environment(tmp_path / 'home'), 'PYTHONPATH': str(ROOT), 'HF_TOKEN': TOKEN,
               'TIMM_DYNAMIC_HUB_ORG': ORG, 'OMP_NUM_THREADS': '1'}
        _check_what_the_script_says_before(root, capsys)
        done = run_python('hfhub/publish.py', '--all', '--root', root, '--i-have-permission', env=env)
        verified = done.stdout.count(': verified: all hashes match, logits differ by ')
        assert verified == len(sources) + len(bundled)
        assert TOKEN not in done.stdout + done.stderr
        assert set(hub.repos) == {f'timm/{n}' for n in MEMBERS} | {
            f'{ORG}/{n}' for n in (*bundled, *(f'{n}.paper_in1k' for n in sources))}

        # a user, who has nothing yet; and the same user on a train
        by_hub_id = f'hf-hub:{ORG}/gfnet_regnety_006_96.paper_in1k'
        by_name = {**expected, by_hub_id: expected['gfnet_regnety_006_96'].clone()}
        save_file(by_name, tmp_path / 'expected.safetensors')
        user = {k: v for k, v in env.items() if k != 'HF_TOKEN'}
        user['HF_HOME'] = str(tmp_path / 'user')
        hub.log.clear()
        for offline in ('0', '1'):
            cards = [ROOT / 'docs/hub.md', *(root / f'{name}.paper_in1k/README.md' for name in sources)]
            got = run_python('tests/hub/load_driver.py', tmp_path / 'expected.safetensors',
                             *(cards if offline == '1' else ()), env={**user, 'HF_HUB_OFFLINE': offline})
            differences = json.loads(got.stdout.strip().splitlines()[-1])
            assert differences.keys() == by_name.keys()
            for name, difference in differences.items():
                assert difference <= TOLERANCE * max(1., by_name[name].abs().max().item()), name
            assert bool(hub.log) == (offline == '0')
            assert hub.count('GET /lfs/') == (len(sources) + len(MEMBERS) if offline == '0' else 0)  # each once
            hub.log.clear()


def _check_what_the_script_says_before(root, capsys):
    """Without any token or request: the tests are offline."""
    script = runpy.run_path(str(ROOT / 'hfhub/publish.py'))['main']
    assert script(['--all', '--root', str(root), '--dry-run']) == 0
    said = capsys.readouterr().out
    assert 'timm-dynamic/focusnet_resnet18.paper_in1k: focusnet_resnet18.paper_in1k may not be published' in said
    assert 'timm-dynamic/focusnet_resnet34.paper_in1k: not converted yet' in said
    lines = said.partition('timm-dynamic/test_gfnet.digits: ')[2].splitlines()
    sizes = [int(line.split()[1].replace(',', '')) for line in lines[1:5]]
    assert lines[0].startswith(f'{sum(sizes):,} bytes from ')
    for name in ('gfnet_regnety_006_96', 'clcnet'):
        folder = root / f'{name}.paper_in1k'
        total = sum(p.stat().st_size for p in folder.iterdir())
        assert f'timm-dynamic/{folder.name}: {total:,} bytes from {folder}\n' in said
        assert f"    {'model.safetensors':<20}{(folder / 'model.safetensors').stat().st_size:>14,}\n" in said

    assert script([str(root / 'anchornet.paper_in1k')]) == 1
    said = capsys.readouterr().err
    assert 'anchornet.paper_in1k may not be published: The authors state no licence' in said
    assert 'add --i-have-permission' in said


@pytest.mark.skipif(os.environ.get('TIMM_DYNAMIC_FULL_TESTS') != '1', reason='large')
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
