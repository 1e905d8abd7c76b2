import numpy as np
import pytest
import torch
from training.same_end import equal

from timm_dynamic.training.run_folder import CheckpointManager, StateError, flatten_state, unflatten_state
from timm_dynamic.utils import CheckpointError


def _state(value=1.0):
    shared = torch.arange(6.)
    return {
        'model': {'a': shared, 'b': shared[:3], 'half': torch.ones(2, dtype=torch.bfloat16)},
        'optimizer': {'state': {0: {'step': torch.tensor(3.), 'buf': torch.randn(3, 2).t()}},
                      'param_groups': [{'lr': value, 'betas': (0.9, 0.99), 'foreach': None, 'params': [0, 1]}]},
        'empty': {}, 'none': None, 'number': np.float64(2.5), 'inf': float('inf'),
    }


def test_round_trip(tmp_path):
    store, state = CheckpointManager(tmp_path / 'state'), _state()
    assert not store.exists()
    store.save(state, 'first')
    assert store.exists()
    assert equal(state, CheckpointManager(tmp_path / 'state').load())


def test_flatten_keeps_key_types_and_names_what_it_cannot_store():
    tensors = {}
    assert unflatten_state(flatten_state({0: 'a', '0': 'b'}, tensors), tensors) == {0: 'a', '0': 'b'}
    with pytest.raises(TypeError, match=r"Cannot store 'a.b': a function"):
        flatten_state({'a': {'b': lambda: None}}, {})


def test_only_the_last_state_is_kept(tmp_path):
    store = CheckpointManager(tmp_path)
    for i in range(3):
        store.save(_state(i), f'epoch-{i}')
    store.save(_state(9), 'epoch-2')  # the same point again
    assert store.load()['optimizer']['param_groups'][0]['lr'] == 9
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize('moment', ['tensors', 'values', 'pointer'])
def test_what_a_failing_writer_leaves_is_the_last_state(tmp_path, monkeypatch, moment):
    import timm_dynamic.training.run_folder as module
    store = CheckpointManager(tmp_path)
    store.save(_state(1), 'one')

    def fail(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        if moment == 'tensors':
            patch.setattr(module.safetensors.torch, 'save_file', fail)
        elif moment == 'values':
            patch.setattr(module.json, 'dumps', fail)
        else:
            patch.setattr(module, 'atomic_write', fail)
        with pytest.raises(StateError, match=r"No space left on device.*last good one, 'one', is intact"):
            store.save(_state(2), 'two')
    assert store.load()['optimizer']['param_groups'][0]['lr'] == 1
    store.save(_state(3), 'two')
    assert store.load()['optimizer']['param_groups'][0]['lr'] == 3


@pytest.fixture
def small_files():
    """The operating system refuses to write files of more than 1 MiB, as if the disk were full."""
    resource = pytest.importorskip('resource', reason='Unix only')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_for_real(tmp_path, small_files):
    store = CheckpointManager(tmp_path / 's')
    store.save({'x': torch.zeros(10)}, 'small')
    with pytest.raises(StateError, match=r"state of the run \(4 MiB\) could not be written.*'small', is intact"):
        store.save({'x': torch.zeros(2 ** 20)}, 'large')
    assert store.load()['x'].shape == (10,)
    assert sorted(p.name for p in (tmp_path / 's').iterdir()) == ['latest', 'small']


def test_damaged_and_missing(tmp_path):
    with pytest.raises(CheckpointError, match='no state of a run'):
        CheckpointManager(tmp_path).load()
    CheckpointManager(tmp_path).save(_state(), 'one')
    with open(tmp_path / 'one' / 'tensors.safetensors', 'rb+') as f:
        f.truncate(20)
    with pytest.raises(CheckpointError, match='incomplete or damaged'):
        CheckpointManager(tmp_path).load()
