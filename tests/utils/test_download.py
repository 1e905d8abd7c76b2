"""Downloads without a connection."""
import json
import os
import socket

import pytest
from helpers import run_python

from timm_dynamic.utils import download

OFFLINE = '''
import json, time
waits = []
time.sleep = waits.append  # neither the client nor we wait in this test
import timm, timm_dynamic
from timm_dynamic.launch.build import build_model
from timm_dynamic.launch.settings import TrainOptions
from timm_dynamic.task import create_baseline
from timm_dynamic.task.static import load_encoder
from timm_dynamic.utils import fetch_weights

model = timm.create_model('gfnet_resnet50_96')
found = []
for request in (
        lambda: fetch_weights('org/model'),
        lambda: timm.create_model('focusnet_resnet18', pretrained=True),
        lambda: load_encoder(model.local_encoder, 'resnet50', model),
        lambda: create_baseline('resnet18', timm.create_model('focusnet_resnet18')),
        lambda: build_model(TrainOptions(['--model', 'resnet18']).base, pretrained=True),
):
    waits.clear()
    try:
        request()
    except (RuntimeError, OSError) as e:
        found.append((str(e), sum(waits)))
print(json.dumps(found))
'''


@pytest.fixture
def closed_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    return port


def test_files_of_a_hub_that_is_closed_are_given_up_at_once(closed_port, tmp_path):
    env = {**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{closed_port}', 'HF_HOME': str(tmp_path),
           'HF_HUB_OFFLINE': '0', 'NO_PROXY': '127.0.0.1'}
    found = json.loads(run_python('-c', OFFLINE, env=env).stdout.splitlines()[-1])
    assert len(found) == 5
    for message, seconds in found:
        assert 'the Hugging Face Hub cannot be reached. Try again when online.' in message
        assert seconds <= 1  # the client alone waits 23 s for a file


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(download.hub_constants, 'HF_HUB_OFFLINE', False)


def test_connections(closed_port, no_proxy, monkeypatch):
    def reachable(endpoint):
        monkeypatch.setattr(download.hub_constants, 'ENDPOINT', endpoint)
        return download.can_connect(attempts=1)

    with socket.create_server(('127.0.0.1', 0)) as server:
        is_open = f'http://127.0.0.1:{server.getsockname()[1]}'
        assert reachable(is_open)
        assert not reachable(f'http://127.0.0.1:{closed_port}')
        monkeypatch.setenv('https_proxy', is_open)  # the proxy answers, wherever the Hub is
        assert reachable(f'https://127.0.0.1:{closed_port}')
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        assert not reachable(f'https://127.0.0.1:{closed_port}')
        monkeypatch.setattr(download.hub_constants, 'HF_HUB_OFFLINE', True)
        assert not reachable(is_open)
