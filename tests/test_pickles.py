"""A pickle instead of a checkpoint executes nothing, wherever a file is read."""
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from timm_dynamic import ConfidenceNet
from timm_dynamic.data import ConfidenceFeatures
from timm_dynamic.evaluation import validate_main
from timm_dynamic.exits import ExitTable
from timm_dynamic.hub import convert_main
from timm_dynamic.training import train_main
from timm_dynamic.training.run_folder import CheckpointManager
from timm_dynamic.utils import CheckpointError, sha256_of


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / 'executed'


@pytest.fixture(params=['torch', 'old torch', 'plain', 'among weights'])
def evil(request, tmp_path, marker):
    """Writes a file that would execute code."""
    def write(name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = {'state_dict': Touch(marker)}
        if request.param == 'among weights':
            content = {'state_dict': timm.create_model('test_focusnet').state_dict(), 'best_acc1': Touch(marker)}
        if request.param == 'plain':
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=request.param != 'old torch')
        return path

    return write


def create(name):
    def door(path):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path))
    return door


def convert(path):
    assert convert_main([str(path), '--model', 'focusnet_resnet18', '--out', f'{path}.out']) == 1
    assert not Path(f'{path}.out').exists()


def parts(path):
    timm.create_model('test_anchornet_patch', pretrained=True, pretrained_cfg_overlay=dict(
        file=dict.fromkeys(('localizer', 'resized', 'patch'), path)))


def folder(path):
    timm.create_model('test_gfnet', pretrained=True, pretrained_cfg_overlay=dict(file=path.parent))


def train(*options):
    def script(path):
        assert train_main(['--model', 'test_focusnet', '--device', 'cpu', '-j', '0', '-b', '8', '--epochs', '1',
                           '--output', f'{path}.run', *options, str(path)]) == 1
    return script


def validate(*options):
    def script(path):
        assert validate_main(['--model', 'test_gfnet', '--device', 'cpu', '-j', '0', *options, str(path)]) == 1
    return script


def state(path):
    """--resume of a run whose state was replaced, its hash too."""
    store = CheckpointManager(path.parent / 'state')
    store.save({'identity': {}, 'weights': torch.ones(2)}, 'epoch-0')
    shutil.copyfile(path, path.parent / 'state' / f'000002-epoch-0.{sha256_of(path)}.pt')
    store.load()


def archive(path):
    """A zip archive like the authors' confidence net."""
    with zipfile.ZipFile(f'{path}.zip', 'w') as out:
        out.writestr('model_params.json', '{}')
        out.writestr('network.pt', path.read_bytes())
    ConfidenceNet.from_pretrained(f'{path}.zip')


DOORS = {
    'convert.py': convert,
    'create_model FocusNet': create('focusnet_resnet18'),
    'create_model GFNet': create('test_gfnet'),
    'create_model CLCNet': create('test_clcnet'),
    'create_model AnchorNet': create('anchornet'),
    'create_model parts': parts,
    'create_model folder': folder,
    'confidence net': ConfidenceNet.from_pretrained,
    'confidence net in a zip': archive,
    'confidence features': ConfidenceFeatures.load,
    'exit table': ExitTable.load,
    '--exit-table': validate('--exit-table'),
    '--checkpoint': validate('--checkpoint'),
    '--resume': train('--resume'),
    '--resume state': state,
    '--initial-checkpoint': train('--initial-checkpoint'),
    '--pretrained-path': train('--pretrained', '--pretrained-path'),
    '--init-from': train('--model', 'test_gfnet', '--stage', 'warmup', '--init-from'),
    '--init-local': train('--model', 'test_gfnet', '--stage', 'warmup', '--init-local'),
    '--focus-baseline': train('--focus-baseline'),
}


@pytest.mark.parametrize('door', DOORS)
def test_nothing_is_executed(door, evil, marker):
    path = evil('given/model.pth')
    try:
        DOORS[door](path)
    except (CheckpointError, ValueError):
        pass
    else:
        assert DOORS[door].__name__ in ('convert', 'script'), 'scripts report errors by their exit status'
    assert not marker.exists()


def test_the_refused_pickle_would_execute(tmp_path, marker):
    path = tmp_path / 'a.pth'
    torch.save(Touch(marker), path)
    torch.load(path, weights_only=False)
    assert marker.exists()
