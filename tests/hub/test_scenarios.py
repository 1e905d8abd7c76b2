"""Every family on its way to the Hub and back, and what the network and the Hub can do to it. See scenarios.py."""
import json
import re

import pytest
from helpers import ROOT

NAMES = re.findall(r'@scenario\ndef (\w+)', (ROOT / 'tests/hub/scenarios.py').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def outcome(scenarios):
    """Null or a traceback for each scenario."""
    process, folder = scenarios
    assert process.wait() == 0, (folder / 'output.txt').read_text()
    return json.loads((folder / 'outcome.json').read_text())


@pytest.mark.parametrize('name', NAMES)
def test_scenario(outcome, name):
    assert outcome[name] is None, outcome[name]
