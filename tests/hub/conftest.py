import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.fixture(scope='session', autouse=True)
def scenarios(request, tmp_path_factory):
    """The process of scenarios.py and its folder. It runs while the other tests of this folder run."""
    names = [i.callspec.params['name'] for i in request.session.items if i.name.startswith('test_scenario[')]
    if not names:
        yield None
        return
    folder: Path = tmp_path_factory.mktemp('scenarios')
    with open(folder / 'output.txt', 'w') as output, subprocess.Popen(
            [sys.executable, ROOT / 'tests/hub/scenarios.py', folder, *names], cwd=ROOT, stdout=output,
            stderr=subprocess.STDOUT, env={**os.environ, 'PYTHONPATH': str(ROOT)}) as process:
        yield process, folder
        process.kill()
