import json
import os
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
import torch
import torchvision
from helpers import run_python
from models.model_tester import ModelTester

import timm_dynamic  # noqa: F401
from timm_dynamic.utils import CheckpointError, save_pretrained

NAMES = ['focusnet_resnet18', 'focusnet_resnet34', 'focusnet_mobilenetv2_100', 'test_focusnet']
TWINS = {name: name.removeprefix('focusnet_') for name in NAMES[:3]}


class TestFocusNet(ModelTester):
    name = 'test_focusnet'
    size = 64


@pytest.mark.parametrize(('name', 'twin'), TWINS.items())
def test_is_the_timm_class_unchanged(name, twin):
    ours, theirs = timm.create_model(name), timm.create_model(twin)
    assert type(ours) is type(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_configs():
    for name in NAMES[:3]:
        cfg = timm.get_pretrained_cfg(f'{name}.paper_in1k')
        assert cfg.hf_hub_id == f'timm-dynamic/{name}.paper_in1k'
        assert (cfg.input_size, cfg.num_classes) == ((3, 224, 224), 1000)
        assert (cfg.interpolation, cfg.crop_pct) == ('bilinear', 0.875)
        assert 'FocusNet' in cfg.paper_name
        assert cfg.origin_url == (
            'https://github.com/XueZ-phd/FocusNet-Classifying-better-by-focusing-on-confusing-classes')
    assert sum(p.numel() for p in timm.create_model('test_focusnet').parameters()) < 1e6


def test_mobilenet_checkpoint_of_the_authors(tmp_path):
    # torchvision's is the original architecture; a real class count of another task, and a numpy number beside
    import numpy as np
    original = torchvision.models.mobilenet_v2(num_classes=12).eval()
    file = tmp_path / 'model_best.pth.tar'
    weights = {f'module.{k}': v for k, v in original.state_dict().items()}
    torch.save({'state_dict': weights, 'best_acc1': np.float64(66.3)}, file)
    overlay = dict(file=file)
    create = partial(timm.create_model, 'focusnet_mobilenetv2_100', pretrained=True, pretrained_cfg_overlay=overlay)
    model = create(num_classes=12).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), original(x), rtol=0, atol=1e-5)
    assert 'file' not in model.pretrained_cfg

    other = create(num_classes=5, in_chans=1)  # adapts as timm does: new classifier, summed first convolution
    assert other(x[:, :1]).shape == (2, 5)
    torch.testing.assert_close(
        other.conv_stem.weight, original.features[0][0].weight.sum(dim=1, keepdim=True))


def test_features_only_with_weights():
    source = timm.create_model('resnet18')
    model = timm.create_model(
        'focusnet_resnet18', features_only=True, pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=source.state_dict()))
    torch.testing.assert_close(model['layer1'][0].conv1.weight, source.layer1[0].conv1.weight)


@pytest.mark.parametrize('name', ['test_focusnet', 'focusnet_mobilenetv2_100'])
def test_features_of_an_exported_model(name, tmp_path):
    model = timm.create_model(name).eval()
    save_pretrained(model, tmp_path / 'm')
    x = torch.randn(1, 3, 64, 64)
    for source in (dict(model_name=f'local-dir:{tmp_path / "m"}'),
                   dict(model_name=name, pretrained_cfg_overlay=dict(file=tmp_path / 'm'))):
        features = timm.create_model(**source, pretrained=True, num_classes=0).eval()
        torch.testing.assert_close(features(x), model.forward_head(model.forward_features(x), pre_logits=True))
        maps = timm.create_model(**source, pretrained=True, features_only=True, out_indices=(1, 3)).eval()(x)
        assert [m.shape[2] for m in maps] == [16, 4]
        again = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
        assert not any(torch.equal(a, b) for a, b in zip(maps, again(x)))
        torch.testing.assert_close(maps[1], model.forward_intermediates(x, indices=[3], intermediates_only=True)[0])


def test_foreign_checkpoint_names_first_keys():
    foreign = timm.create_model('test_efficientnet').state_dict()
    message = r"missing \(first: 'conv1.weight'\).*unexpected \(first: 'conv_stem.weight'\)"
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(
            'focusnet_resnet18', num_classes=10, pretrained=True, pretrained_cfg_overlay=dict(state_dict=foreign))


def test_no_weights_is_an_error():
    with pytest.raises(CheckpointError, match=r'no weights of gfnet.untrained'):
        timm.create_model('gfnet', pretrained=True)


def test_an_export_keeps_the_preprocessing(tmp_path):
    model = timm.create_model('test_focusnet', num_classes=4, in_chans=1).to(memory_format=torch.channels_last).eval()
    save_pretrained(model, tmp_path / 'm', data_config={'mean': (0.5,), 'std': (0.2,), 'input_size': (1, 48, 48)},
                    label_names=['a', 'b', 'c', 'd'])
    assert sorted(p.name for p in (tmp_path / 'm').iterdir()) == ['config.json', 'model.safetensors']
    again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True).eval()
    x = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-6)
    assert tuple(again.pretrained_cfg['input_size']) == (1, 48, 48)
    assert again.pretrained_cfg['mean'] in ((0.5,), [0.5])


@contextmanager
def _serve(status: int):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            if status == 404:
                self.send_header('X-Error-Code', 'RepoNotFound')
            self.send_header('Content-Length', '0')
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    with HTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    """A fresh interpreter that imports the package, and asks a Hub for weights that it does not have."""
    folder = tmp_path_factory.mktemp('fresh')
    script = folder / 'check.py'
    script.write_text('''
import json, sys, timm, warnings
before = {n: timm.models.model_entrypoint(n) for n in timm.list_models()}
packages, modules = {name.partition('.')[0] for name in sys.modules}, set(timm.models.list_modules())
warnings.simplefilter('error')
import timm_dynamic
print(json.dumps({
    'changed': [n for n, f in before.items() if timm.models.model_entrypoint(n) is not f],
    'new': sorted(set(timm.list_models()) - set(before)),
    'imported': sorted({name.partition('.')[0] for name in sys.modules} - packages - sys.stdlib_module_names),
    'lost': sorted(modules - set(timm.models.list_modules()))}))
timm.create_model('focusnet_resnet18', pretrained=True)
''')
    with _serve(404) as endpoint:
        env = {**os.environ, 'HF_HUB_OFFLINE': '0', 'HF_HOME': str(folder), 'HF_ENDPOINT': endpoint}
        return run_python(script, check=False, env=env)


def test_import_registers_and_overwrites_nothing(fresh):
    found = json.loads(fresh.stdout.splitlines()[0])
    assert set(NAMES) <= set(found.pop('new'))
    assert found == {'changed': [], 'imported': ['timm_dynamic'], 'lost': []}


def test_hub_without_the_repository_says_so(fresh):
    error = fresh.stderr.strip().splitlines()[-1]
    assert fresh.returncode == 1
    assert "has no repository 'timm-dynamic/focusnet_resnet18.paper_in1k' (yet)" in error
    assert 'github.com/XueZ-phd/FocusNet' in error
    assert "pretrained_cfg_overlay=dict(file='FILE')" in error


def test_offline_without_cache_says_so(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match='not in the local cache, and the Hugging Face Hub cannot be reached'):
        timm.create_model('focusnet_resnet18', pretrained=True, cache_dir=tmp_path)
