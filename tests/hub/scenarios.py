"""Scenarios between a user and the Hub. test_scenarios.py runs them in one process of their own.

    python tests/hub/scenarios.py FOLDER [SCENARIO ...]

The process exists because huggingface_hub reads HF_ENDPOINT when it is imported: the server must be up before. Writes
FOLDER/outcome.json with null or a traceback for each scenario.
"""
import contextlib
import io
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import ROOT, make_images
from hub.hub_server import TOKEN, HubServer

if __name__ == '__main__':
    SERVER = HubServer().__enter__()
    FOLDER = Path(sys.argv[1])
    for key in [k for k in os.environ if k not in SERVER.environment(FOLDER / 'home')]:
        del os.environ[key]
    os.environ.update(SERVER.environment(FOLDER / 'home'), TIMM_DYNAMIC_HUB_ORG='org')
    _sleep = time.sleep
    time.sleep = lambda seconds: _sleep(min(seconds, 0.01))  # the client waits for seconds between its tries

import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, constants
from parity.confidence_reference import make_state_dict
from parity.reference import fill
from parity.test_anchornet import RECORD
from parity.test_gfnet import build_checkpoint
from safetensors.torch import load_file, save

import timm_dynamic
from timm_dynamic.hub import (
    Entry,
    PublishError,
    check_in_fresh_process,
    convert,
    describe,
    files_to_publish,
    fixed_logits,
    publish,
    publish_main,
    read_catalog,
)
from timm_dynamic.models.builder import BUNDLED
from timm_dynamic.training import train_main
from timm_dynamic.utils import CheckpointError, fetch_weights, save_pretrained

ENTRY = Entry('test_gfnet.mine', description='A net.', recipe='None.', licence='mit', limits='All.')
REPO = 'org/test_gfnet.mine'
CATALOG = read_catalog()
MEMBERS = ('mobilenetv3_small_100.lamb_in1k', 'resnet50.a1_in1k')  # of clcnet; they come from timm's repositories
SCENARIOS = {}


def scenario(fn):
    SCENARIOS[fn.__name__] = fn
    return fn


def make_folder(name: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder = FOLDER / name
    model = timm.create_model('test_gfnet')
    model.store_budgets([{'gmacs': model.step_macs[1] / 1e9, 'policy': [2., 0., 0.]}])
    save_pretrained(model, folder)
    describe(folder, ENTRY)
    return folder


def fresh(seed: int = 0) -> tuple[Path, str]:
    """A folder and its repository; an empty Hub and an empty cache."""
    SERVER.repos.clear()
    SERVER.lfs.clear()
    SERVER.faults.clear()
    SERVER.log.clear()
    SERVER.authorized.clear()
    shutil.rmtree(FOLDER / 'cache', ignore_errors=True)
    os.environ['HF_TOKEN'] = TOKEN
    folder = FOLDER / f'model{seed}'
    return folder if folder.exists() else make_folder(folder.name, seed), REPO


def put(folder: Path, repo: str = REPO, **files: bytes) -> str:
    """Put a folder on the Hub without the client."""
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    return SERVER.add(repo, {**content, **{k.replace('__', '.'): v for k, v in files.items()}})


def load(name: str = f'hf-hub:{REPO}', **kwargs):
    return timm.create_model(name, pretrained=True, cache_dir=FOLDER / 'cache', **kwargs).eval()


@cache
def logits_of(folder: Path) -> torch.Tensor:
    return fixed_logits(timm.create_model(f'local-dir:{folder}', pretrained=True))


def same(model, folder: Path) -> bool:
    return torch.equal(fixed_logits(model), logits_of(folder))


def cached(suffix: str = '') -> list[Path]:
    return list((FOLDER / 'cache').rglob(f'snapshots/*/*{suffix}'))


def files_on_the_hub(branch: str = 'main') -> dict[str, bytes]:
    repo = SERVER.repos[REPO]
    return repo.commits[repo.refs[branch]]


def run_publish(*args: str | Path) -> tuple[int, str, str]:
    """Exit status, output and errors of the command publish."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = publish_main(list(map(str, args)))
    return status, out.getvalue(), err.getvalue()


def authors_files(folder: Path) -> dict[str, Path | dict[str, Path]]:
    """The authors' files of one model per family, with the weights of the reference runs."""
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
    }
    for name, content in contents.items():
        torch.save(content, folder / f'{name}.pth')
    with zipfile.ZipFile(folder / 'net.zip', 'w') as archive:
        archive.writestr('model_params.json', '{}')
        with archive.open('network.pt', 'w') as f:
            torch.save(make_state_dict(1000), f)
    return {
        **{name: folder / f'{name}.pth' for name in contents},
        'clcnet': {'confidence_net': folder / 'net.zip', **{n.split('.')[0]: folder / n for n in MEMBERS}}}


@scenario
def every_family_gets_from_the_authors_files_to_users():
    local, _ = fresh()
    folder = FOLDER / 'authors'
    root = folder / 'hub'
    folder.mkdir()
    for name in MEMBERS:
        torch.manual_seed(0)
        weights = timm.create_model(name.split('.')[0]).state_dict()
        SERVER.add(f'timm/{name}', {'model.safetensors': save(weights)})
        torch.save(weights, folder / name)
    expected, reports = {}, {}
    sources = authors_files(folder)
    for name, source in sources.items():
        entry = CATALOG[f'{name}.paper_in1k']
        reports[name] = convert(source, entry, root / entry.name, verify=False)
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=source))
        expected[name] = fixed_logits(model)

    check_cascade(root / 'clcnet.paper_in1k', reports['clcnet'], sources['clcnet'], expected['clcnet'])
    check_dry_run(root)
    status, out, err = run_publish('--all', '--root', root, '--i-have-permission')
    assert status == 0, err
    bundled = [p.name for p in BUNDLED.iterdir()]
    assert out.count(': verified: all hashes match, logits differ by ') == len(sources) + len(bundled)
    assert TOKEN not in out + err
    assert set(SERVER.repos) == {f'timm/{n}' for n in MEMBERS} | {
        f'org/{n}' for n in (*bundled, *(f'{n}.paper_in1k' for n in sources))}

    # A user with an empty cache and no token. TIMM_DYNAMIC_HUB_ORG leads to 'org', which is not the default.
    shutil.rmtree(constants.HF_HUB_CACHE)
    del os.environ['HF_TOKEN']
    SERVER.log.clear()
    for name, logits in expected.items():
        model = timm.create_model(name, pretrained=True)
        assert torch.equal(fixed_logits(model), logits), name
        if name.startswith('gfnet'):
            assert len(model.exit_cfg['budgets']) == 39
            assert model.set_budget(gmacs=model.step_macs[1] / 1e9)
    assert SERVER.count('GET /lfs/') == len(sources) + len(MEMBERS)  # each file once

    # The same user offline, in a fresh process. The check must find the three wrong models, and only those.
    expected['hf-hub:org/gfnet_regnety_006_96.paper_in1k'] = expected['gfnet_regnety_006_96']
    own = logits_of(local)
    wrong = {f'local-dir:{local}': own + 0.1, f'local-dir:{local}/': own[:, :1], f'local-dir:{FOLDER}/no': own}
    SERVER.log.clear()
    os.environ['HF_HUB_OFFLINE'] = '1'
    try:
        with pytest.raises(CheckpointError) as e:
            check_in_fresh_process({**expected, **wrong})
    finally:
        del os.environ['HF_HUB_OFFLINE']
    assert not SERVER.log
    values, shape, missing = str(e.value).splitlines()
    assert f"The logits of 'local-dir:{local}' differ by 0.1 in a fresh process" in values
    assert f"'local-dir:{local}/' does not load in a fresh process: expected logits [3, 1, 10], got [3, 2, 10]" in shape
    assert f"'local-dir:{FOLDER}/no' does not load in a fresh process: Config file not found" in missing

    for path in (ROOT / 'docs/hub.md', *(root / f'{name}.paper_in1k/README.md' for name in sources)):
        code: dict = {}
        text = path.read_text(encoding='utf-8').replace('hf-hub:timm-dynamic/', 'hf-hub:org/')
        for snippet in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(snippet, path, 'exec'), code)
        assert code['model'].pretrained_cfg['architecture'] in text
    assert SERVER.count('GET /lfs/') == 0


def check_cascade(folder: Path, report: dict, source: dict[str, Path], expected: torch.Tensor) -> None:
    """Only the confidence net is published. It works as a part again."""
    kept = load_file(folder / 'model.safetensors')
    assert all(k.startswith('confidence_net.') for k in kept)
    assert report['kept'] == len(kept)
    assert report['kept'] + sum(map(len, report['dropped'].values())) == 143
    assert [f['name'] for f in json.loads((folder / 'config.json').read_text())['conversion']['files']] == ['net.zip']
    again = timm.create_model(
        'clcnet', pretrained=True, pretrained_cfg_overlay=dict(file={**source, 'confidence_net': folder}))
    assert torch.equal(fixed_logits(again), expected)


def check_dry_run(root: Path) -> None:
    """What publish.py says before anything is sent."""
    SERVER.log.clear()
    status, out, _ = run_publish('--all', '--root', root, '--dry-run')
    assert status == 0
    assert 'org/focusnet_resnet18.paper_in1k: focusnet_resnet18.paper_in1k may not be published' in out
    assert 'org/focusnet_resnet34.paper_in1k: not converted yet' in out
    lines = out.partition('org/test_gfnet.digits: ')[2].splitlines()
    sizes = [int(line.split()[1].replace(',', '')) for line in lines[1:5]]
    assert lines[0].startswith(f'{sum(sizes):,} bytes from ')
    for name in ('gfnet_regnety_006_96', 'clcnet'):
        folder = root / f'{name}.paper_in1k'
        total = sum(p.stat().st_size for p in folder.iterdir())
        assert f'org/{folder.name}: {total:,} bytes from {folder}\n' in out
        assert f"    {'model.safetensors':<20}{(folder / 'model.safetensors').stat().st_size:>14,}\n" in out

    status, _, err = run_publish(root / 'anchornet.paper_in1k')
    assert status == 1
    assert 'anchornet.paper_in1k may not be published: The authors state no licence' in err
    assert 'add --i-have-permission' in err
    assert not SERVER.log


@scenario
def publishing_again_sends_nothing_and_a_changed_card_is_one_small_commit():
    folder, repo = fresh()
    done = publish(folder, repo, verify=False)
    assert sorted(done['uploaded']) == ['README.md', 'config.json', 'model.safetensors']
    there = files_on_the_hub()
    assert all(there[p.name] == p.read_bytes() for p in folder.iterdir())
    assert not SERVER.repos[repo].private
    SERVER.log.clear()
    again = publish(folder, repo, verify=False)
    assert again['uploaded'] == []
    assert again['commit'] == done['commit']
    assert SERVER.uploaded() == 0
    changed = FOLDER / 'changed'
    shutil.copytree(folder, changed)
    (changed / 'README.md').write_text((folder / 'README.md').read_text() + '\nOne more line.\n')
    SERVER.log.clear()
    assert publish(changed, repo, verify=False)['uploaded'] == ['README.md']
    assert 0 < SERVER.uploaded() < 10_000
    title = SERVER.repos[repo].titles[SERVER.repos[repo].refs['main']]
    assert title == f'Publish with timm_dynamic {timm_dynamic.__version__}'
    assert len(SERVER.repos[repo].commits) == 3


@scenario
def the_token_reaches_the_hub_only():
    folder, repo = fresh()
    publish(folder, repo, private=True, verify=False)
    assert SERVER.repos[repo].private
    load()
    assert [r for r, seen in SERVER.authorized.items() if seen == bool(re.search('/lfs/[0-9a-f]{64}', r))] == []
    assert any('PUT /lfs/' in r for r in SERVER.authorized)
    assert any('GET /lfs/' in r for r in SERVER.authorized)


@scenario
def a_branch_is_made_and_loads_as_a_revision():
    first, repo = fresh()
    sha = publish(first, repo, verify=False)['commit']
    second, _ = make_folder('model1', 1), None
    publish(second, repo, revision='v2', verify=False)
    assert same(load(), first)
    assert same(load(f'hf-hub:{repo}@v2'), second)
    assert same(load(f'hf-hub:{repo}@{sha}'), first)
    with pytest.raises(Exception, match='Revision Not Found'):
        load(f'hf-hub:{repo}@v3')


@scenario
def a_cut_upload_is_sent_again():
    folder, repo = fresh()
    SERVER.fail('PUT /lfs/', cut=100_000)
    publish(folder, repo, verify=False)
    assert files_on_the_hub()['model.safetensors'] == (folder / 'model.safetensors').read_bytes()


@scenario
def publishing_repeats_requests_to_busy_servers():
    folder, repo = fresh()
    for request in ('GET /api/whoami', 'POST /api/repos/create', 'POST /api/validate-yaml', 'POST .*/preupload/',
                    'POST .*/objects/batch', 'PUT /lfs/', 'POST .*/verify$', 'POST .*/commit/',
                    f'GET /api/models/{repo}'):
        SERVER.fail(request, status=429, headers={'Retry-After': '0'})
        SERVER.fail(request, status=503)
    publish(folder, repo, verify=False)
    assert not any(f.times for f in SERVER.faults)
    assert len(SERVER.repos[repo].commits) == 2


@scenario
def a_commit_whose_answer_is_lost_is_not_made_twice():
    folder, repo = fresh()
    SERVER.fail('POST .*/commit/', after=True)
    done = publish(folder, repo, verify=False)
    assert len(SERVER.repos[repo].commits) == 2
    assert sorted(done['uploaded']) == ['README.md', 'config.json', 'model.safetensors']
    assert done['commit'] == SERVER.repos[repo].refs['main']


@scenario
def a_conflicting_commit_is_tried_again():
    folder, repo = fresh()
    SERVER.fail('POST .*/commit/', status=412)
    publish(folder, repo, verify=False)
    assert files_on_the_hub()['README.md'] == (folder / 'README.md').read_bytes()


@scenario
def an_interrupted_upload_resumes():
    folder, repo = fresh()
    SERVER.fail('POST .*/commit/', times=99, status=500)
    with pytest.raises(PublishError, match=rf'Could not publish {repo}: .*500'):
        publish(folder, repo, verify=False)
    assert 'model.safetensors' not in files_on_the_hub()
    SERVER.faults.clear()
    SERVER.log.clear()
    publish(folder, repo, verify=False)
    assert SERVER.count('PUT') == 0
    assert files_on_the_hub()['model.safetensors'] == (folder / 'model.safetensors').read_bytes()


@scenario
def an_upload_that_always_fails_ends_in_an_error():
    folder, repo = fresh()
    SERVER.fail('PUT /lfs/', times=999, cut=1000)
    with pytest.raises(PublishError, match='Could not publish org/test_gfnet'):
        publish(folder, repo, verify=False)
    assert list(files_on_the_hub()) == ['.gitattributes']


@scenario
def verification_finds_wrong_files():
    folder, repo = fresh()
    SERVER.fail('GET /lfs/', times=9, spoil=True)
    with pytest.raises(PublishError, match=r'was published, but verification failed: .*SHA-256'):
        publish(folder, repo)
    SERVER.faults.clear()
    SERVER.fail('GET .*/README.md', times=9, spoil=True)
    with pytest.raises(PublishError, match=r"'README\.md' in org/test_gfnet\.mine differs from"):
        publish(folder, repo)


@scenario
def without_a_token_or_with_a_wrong_one_nothing_is_sent():
    folder, repo = fresh()
    del os.environ['HF_TOKEN']
    with pytest.raises(PublishError, match=r'no token .* `hf auth login`'):
        publish(folder, repo)
    assert not SERVER.log
    os.environ['HF_TOKEN'] = 'hf_wrong'
    with pytest.raises(PublishError, match=r'refuses the token \(401\)') as e:
        publish(folder, repo)
    assert 'hf_wrong' not in str(e.value)
    os.environ['HF_TOKEN'] = TOKEN
    SERVER.fail('POST /api/repos/create', status=403)
    with pytest.raises(PublishError, match=rf'Could not create {repo}: the Hub refuses the token \(403\)') as e:
        publish(folder, repo)
    assert TOKEN not in str(e.value)
    assert not SERVER.repos


@scenario
def private_models_are_not_published_to_public_repositories():
    folder, repo = fresh()
    publish(folder, repo, verify=False)
    with pytest.raises(PublishError, match='already exists and is public'):
        publish(folder, repo, private=True, verify=False)


@scenario
def folders_that_do_not_load_are_not_published():
    folder, repo = fresh()
    bad = FOLDER / 'unloadable'
    shutil.copytree(folder, bad)
    config = json.loads((folder / 'config.json').read_text())
    for name, message in ('test_focusnet', 'it does not load: .* does not fit test_focusnet'), ('no', 'Unknown model'):
        (bad / 'config.json').write_text(json.dumps({**config, 'architecture': name, 'model_args': {}}))
        for verify in (True, False):
            with pytest.raises(PublishError, match=message):
                publish(bad, repo, verify=verify)
    assert not SERVER.repos


@scenario
def pickles_are_not_published():
    folder, repo = fresh()
    with pytest.raises(PublishError, match='There is no folder'):
        files_to_publish(FOLDER / 'nothing')
    bad = FOLDER / 'bad'
    shutil.copytree(folder, bad)
    for name in ('pytorch_model.bin', 'sub/optimizer.pth.tar'):
        (bad / name).parent.mkdir(exist_ok=True)
        torch.save({}, bad / name)
        with pytest.raises(PublishError, match=f"{name}' may be a pickle"):
            publish(bad, repo)
        (bad / name).unlink()
    torch.save({}, bad / 'model.safetensors')
    with pytest.raises(PublishError, match='is not a safetensors file'):
        publish(bad, repo)
    shutil.copy(make_folder('other', 3) / 'model.safetensors', bad)
    with pytest.raises(PublishError, match=r'does not have the SHA-256 in config\.json'):
        publish(bad, repo)
    config = (folder / 'config.json').read_text()
    for text in ('{', '[1]', config.replace('{', '{"note": NaN,', 1)):
        (bad / 'config.json').write_text(text)
        with pytest.raises(PublishError, match=r'config\.json. is damaged'):
            publish(bad, repo)
    (bad / 'README.md').unlink()
    with pytest.raises(PublishError, match=r'lacks README\.md'):
        publish(bad, repo)
    assert not SERVER.log


@scenario
def a_cut_download_resumes():
    folder, _ = fresh()
    put(folder)
    SERVER.fail('GET /lfs/', times=2, cut=300_000)
    assert same(load(), folder)
    got = [status for request, status, _ in SERVER.log if status and request.startswith('GET /lfs/')]
    assert got == [200, 206, 206]


@scenario
def loading_repeats_requests_to_busy_servers():
    folder, _ = fresh()
    put(folder)
    for request in ('HEAD .*/config.json', 'HEAD .*/model.safetensors', 'GET /lfs/'):
        SERVER.fail(request, status=429, headers={'Retry-After': '0'})
        SERVER.fail(request, status=503)
    assert same(load(), folder)
    assert not any(f.times for f in SERVER.faults)


@scenario
def persistent_server_errors_end_in_an_error():
    folder, _ = fresh()
    put(folder)
    load()
    shutil.rmtree(FOLDER / 'cache')
    for fault in (dict(status=503), dict(cut=1000)):
        SERVER.faults.clear()
        SERVER.fail('GET /lfs/', times=999, **fault)
        if 'cut' in fault:  # the client continues while bytes arrive
            SERVER.faults[-1].cut = 0
        with pytest.raises(CheckpointError, match='could not be downloaded from the Hugging Face Hub'):
            load()
        assert not cached('.safetensors')
    SERVER.faults.clear()
    assert same(load(), folder)


@scenario
def wrong_bytes_are_downloaded_once_more():
    folder, _ = fresh()
    put(folder)
    SERVER.fail('GET /lfs/', spoil=True)
    assert same(load(), folder)
    assert SERVER.count('GET /lfs/') == 2


@scenario
def bytes_that_stay_wrong_are_neither_loaded_nor_kept():
    folder, _ = fresh()
    put(folder)
    SERVER.fail('GET /lfs/', times=2, spoil=True)
    with pytest.raises(CheckpointError, match=r"'model\.safetensors' .* differed twice from the one in config\.json"):
        load()
    assert not cached('.safetensors')
    assert not [p for p in (FOLDER / 'cache').rglob('blobs/*') if p.stat().st_size > 100_000]
    assert same(load(), folder)


@scenario
def a_damaged_cache_is_repaired():
    folder, _ = fresh()
    put(folder)
    load()
    blob = cached('.safetensors')[0].resolve()
    content = blob.read_bytes()
    for spoiled in (content[:len(content) // 2], b'', content[:-1] + bytes([content[-1] ^ 1])):
        blob.write_bytes(spoiled)
        assert same(load(), folder)
        assert blob.read_bytes() == content
    SERVER.fail('.', times=999, status=500)  # the Hub cannot be reached
    assert same(load(), folder)
    blob.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match='is not in the local cache, and the Hugging Face Hub cannot be reached'):
        load()


@scenario
def a_truncated_config_is_downloaded_again():
    folder, _ = fresh()
    put(folder, repo='org/gfnet_resnet50_96.paper_in1k')
    path = fetch_weights('org/gfnet_resnet50_96.paper_in1k', cache_dir=FOLDER / 'cache')
    config = path.with_name('config.json').resolve()
    config.write_bytes(config.read_bytes()[:100])
    fetch_weights('org/gfnet_resnet50_96.paper_in1k', cache_dir=FOLDER / 'cache')
    assert json.loads(path.with_name('config.json').read_text())['architecture'] == 'test_gfnet'
    config.unlink()
    path.with_name('config.json').unlink()
    SERVER.fail('.*/config.json', times=999, status=500)  # weights alone would lack hash and budgets
    with pytest.raises(CheckpointError, match='cannot be reached'):
        fetch_weights('org/gfnet_resnet50_96.paper_in1k', cache_dir=FOLDER / 'cache')


@scenario
def missing_repositories_and_files_are_named():
    folder, _ = fresh()
    with pytest.raises(CheckpointError, match=r"has no repository 'org/focusnet_resnet18.paper_in1k' \(yet\).*"
                                              r'The authors link their file at https://github.com/XueZ-phd/FocusNet'):
        load('focusnet_resnet18')
    SERVER.add('org/focusnet_resnet18.paper_in1k', {'README.md': b'soon'})
    with pytest.raises(CheckpointError, match=r'has no file model\.safetensors'):
        load('focusnet_resnet18')
    put(folder)
    SERVER.repos[REPO].private = True
    assert same(load(), folder)
    del os.environ['HF_TOKEN']
    shutil.rmtree(FOLDER / 'cache')
    with pytest.raises(Exception, match='401'):  # timm reads config.json first
        load()
    SERVER.repos['org/focusnet_resnet18.paper_in1k'].private = True
    with pytest.raises(CheckpointError, match=r'or it is private and you are not logged in \(`hf auth login`\)'):
        load('focusnet_resnet18')


@scenario
def refusals_of_the_hub_are_explained():
    folder, _ = fresh()
    repo = 'org/gfnet_resnet50_96.paper_in1k'
    sha = put(folder, repo=repo)
    with pytest.raises(CheckpointError, match=rf"'{repo}' on the Hugging Face Hub has no revision 'v3'"):
        fetch_weights(f'{repo}@v3', cache_dir=FOLDER / 'cache')
    for status, code, message in (
            (403, 'GatedRepo', 'is restricted. Request access on its page'), (403, '', r'Hub answers: .*403'),
            (451, '', r'Hub answers: .*451')):
        SERVER.fail('HEAD', times=99, status=status, headers={'X-Error-Code': code})
        with pytest.raises(CheckpointError, match=f'{repo}.*{message}'):
            fetch_weights(repo, cache_dir=FOLDER / 'cache')
        SERVER.faults.clear()
    for config in (b'[1]', b'5', b'[' * 100_000, b'\xff'):
        put(folder, repo=repo, config__json=config)
        with pytest.raises(CheckpointError, match=rf"config\.json of '{repo}' is not a JSON object"):
            fetch_weights(repo, cache_dir=FOLDER / 'cache')
    assert fetch_weights(f'{repo}@{sha}', cache_dir=FOLDER / 'cache').is_file()
    # a moved repository redirects to the new one
    SERVER.repos['org/new'] = SERVER.repos.pop(repo)
    for name in ('config.json', 'model.safetensors'):
        where = {'Location': f'/org/new/resolve/{sha}/{name}'}
        SERVER.fail(f'(HEAD|GET) /{repo}/resolve/.*/{name}', times=99, status=307, headers=where)
    shutil.rmtree(FOLDER / 'cache')
    assert fetch_weights(repo, cache_dir=FOLDER / 'cache').read_bytes() == (folder / 'model.safetensors').read_bytes()


@scenario
def a_full_disk_is_an_error_and_leaves_no_file():
    folder, _ = fresh()
    put(folder)
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r'could not be downloaded from .*: .*File too large'):
            load()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not cached('.safetensors')
    assert same(load(), folder)


@scenario
def features_come_from_the_verified_file():
    fresh()
    folder = FOLDER / 'focus'
    torch.manual_seed(0)
    save_pretrained(timm.create_model('test_focusnet'), folder)
    describe(folder, ENTRY)
    put(folder)
    features = load(features_only=True, out_indices=(2,))
    assert [m.shape for m in features(torch.randn(1, 3, 64, 64))] == [(1, 32, 8, 8)]
    weights = load_file(folder / 'model.safetensors')
    assert torch.equal(features.conv1[0].weight, weights['conv1.0.weight'])
    assert load(num_classes=0)(torch.randn(1, 3, 64, 64)).shape == (1, 96)
    blob = cached('.safetensors')[0].resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b'x')
    assert torch.equal(load(features_only=True).conv1[0].weight, weights['conv1.0.weight'])
    assert SERVER.count('GET /lfs/') == 2


@scenario
def timm_pushes_our_models_and_loads_them():
    fresh()
    model = timm.create_model('test_gfnet', pretrained=True).eval()
    model.set_exit([float('inf'), 0.5, 0.])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # timm passes the card in a way that the client deprecates
        timm.models.push_to_hf_hub(model, REPO)
    config = json.loads(files_on_the_hub()['config.json'], parse_constant=pytest.fail)
    assert config['model_args']['exit_cfg']['exit'] == ['inf', 0.5, 0.]
    again = load()
    x = torch.randn(4, 3, 96, 96)
    assert torch.equal(again(x), model(x))
    assert again.exit_cfg == model.exit_cfg


@scenario
def weights_without_a_hash_load_as_they_are():
    folder, _ = fresh()
    config = json.loads((folder / 'config.json').read_text())
    del config['weights_sha256']
    put(folder, config__json=json.dumps(config).encode())
    assert same(load(), folder)


class _Marker:
    def __reduce__(self):
        return Path.touch, (FOLDER / 'executed',)


@scenario
def a_pickle_on_the_hub_executes_nothing():
    fresh()
    bad = pickle.dumps({'state_dict': _Marker()})
    with contextlib.suppress(OSError):
        (FOLDER / 'executed').unlink()
    pickle.loads(bad)  # the pickle does execute code
    assert (FOLDER / 'executed').exists()
    (FOLDER / 'executed').unlink()
    buffer = io.BytesIO()
    torch.save({'state_dict': _Marker()}, buffer)
    config = (FOLDER / 'model0' / 'config.json').read_bytes()
    for content in (bad, buffer.getvalue()):
        for name in ('model.safetensors', 'pytorch_model.bin'):
            SERVER.repos.clear()
            shutil.rmtree(FOLDER / 'cache', ignore_errors=True)
            plain = json.dumps({k: v for k, v in json.loads(config).items() if k != 'weights_sha256'}).encode()
            SERVER.add(REPO, {name: content, 'config.json': plain})
            with pytest.raises(CheckpointError):
                load()
            with pytest.raises(CheckpointError):
                timm_dynamic.ConfidenceNet.from_pretrained(REPO, cache_dir=FOLDER / 'cache')
    assert not (FOLDER / 'executed').exists()


@scenario
def budgets_other_classes_and_other_channels():
    folder, _ = fresh()
    put(folder)
    model = load()
    assert model.exit_cfg['budgets'][0]['policy'] == [2., 0., 0.]
    assert model.set_budget(gmacs=model.step_macs[1] / 1e9)
    other = load(num_classes=7, in_chans=1)
    assert other(torch.randn(2, 1, 96, 96)).shape == (2, 7)
    assert 'budgets' not in other.exit_cfg
    assert HfApi().endpoint == SERVER.url  # no request goes to another server


def _train(*options: str) -> int:
    images = FOLDER / 'images'
    if not images.exists():
        make_images(images, {'train': 4, 'val': 4})
    return train_main([
        '--model', 'test_focusnet', '--recipe', 'classification', '--num-classes', '3', '--img-size', '32',
        '--data-dir', str(images), '-b', '4',
        '--epochs', '1', '-j', '0', '--device', 'cpu', '--lr', '0.01', '--output', str(FOLDER / 'train'), *options])


@scenario
def train_py_publishes_a_run_with_a_card():
    fresh()
    assert _train('--experiment', 'a', '--push-to-hub', 'me/digits', '--hub-private') == 0
    repo = SERVER.repos['me/digits']
    assert repo.private
    files = repo.commits[repo.refs['main']]
    assert sorted(files) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']
    card, config = files['README.md'].decode(), json.loads(files['config.json'])
    row, = json.loads((FOLDER / 'train/a/results.json').read_text())
    assert config['metrics'] == {'top1': row['top1'], 'top5': row['top5']}
    meta = yaml.safe_load(card.split('---')[1])
    result, = meta['model-index'][0]['results']
    assert [m['value'] for m in result['metrics']] == [row['top1'], row['top5']]
    assert result['dataset']['name'] == 'a folder of images'
    assert meta['license'] == 'unknown'
    assert "timm.create_model('hf-hub:me/digits', pretrained=True)" in card
    assert '| lr | 0.01 |' in card
    assert '| epochs | 1 |' in card
    assert 'the recipe `classification`' in card
    assert str(FOLDER) not in card
    assert same(load('hf-hub:me/digits'), FOLDER / 'train/a/best')


@scenario
def a_failed_upload_of_train_py_can_be_repeated():
    fresh()
    SERVER.fail('POST .*/commit/', times=99, status=500)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert _train('--experiment', 'b', '--push-to-hub', 'me/digits') == 1
    assert 'PublishError: Could not publish me/digits' in errors.getvalue()
    assert f'Publish it with: python hfhub/publish.py {FOLDER}/train/b/hub' in errors.getvalue()
    SERVER.faults.clear()
    folder = FOLDER / 'train/b/hub'
    status, out, _ = run_publish(folder, '--dry-run')
    assert status == 0
    assert out.startswith('me/digits: ')
    assert publish(folder, 'me/digits', verify=False)['uploaded'] == ['model.safetensors', 'config.json', 'README.md']
    assert same(load('hf-hub:me/digits'), FOLDER / 'train/b/best')


@scenario
def train_py_checks_the_login_before_training():
    fresh()
    for repo, token, message in (('me/digits', None, 'log in with `hf auth login`'), ('me/digits', 'hf_wrong', '401'),
                                 ('digits', TOKEN, 'Expected a repository as ORG/NAME'), ('a/b/c', TOKEN, 'a/b/c')):
        os.environ['HF_TOKEN'] = token or ''
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            assert _train('--experiment', 'c', '--push-to-hub', repo) == 1
        assert message in errors.getvalue(), errors.getvalue()
    assert not (FOLDER / 'train/c').exists()


def main() -> None:
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # instead of 10 MB, so that small files have several chunks
    logging.disable(logging.WARNING)
    out = {}
    for name in sys.argv[2:] or SCENARIOS:
        start = time.monotonic()
        try:
            SCENARIOS[name]()
            out[name] = None
        except BaseException:
            out[name] = traceback.format_exc()
        print(f'{name}: {time.monotonic() - start:.1f} s', file=sys.stderr)
    (FOLDER / 'outcome.json').write_text(json.dumps(out))


if __name__ == '__main__':
    main()
