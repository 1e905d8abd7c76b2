"""Whatever the network or the Hub does: success after another try, or a clear error; never a wrong model."""
import json
import os
import re

import pytest
from helpers import ROOT, run_python

FILE = ROOT / 'tests/hub/scenarios.py'
NAMES = re.findall(r'@scenario\ndef (\w+)', FILE.read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    done = run_python(FILE, tmp_path_factory.mktemp('hub'), env={**os.environ, 'PYTHONPATH': str(ROOT)})
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize('name', NAMES)
def test_scenario(outcome, name):
    assert outcome[name] is None, outcome[name]
