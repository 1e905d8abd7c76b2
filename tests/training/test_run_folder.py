import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Forked
from training.same_end import equal

from timm_dynamic.training import run_folder
from timm_dynamic.training.run_folder import CheckpointManager, RunLock, StateError
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


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    store = CheckpointManager(tmp_path)
    for state, message in [
            ({'a': {'b': lambda: None}}, "Cannot store 'state.a.b': a function"),
            ({'a': [torch.zeros(1), {1, 2}]}, "Cannot store 'state.a.1': a set"),
            ({'a': {(0, 1): 2}}, r"Cannot store 'state.a': its keys must be strings or integers, got \(0, 1\)"),
    ]:
        with pytest.raises(TypeError, match=message):
            store.save(state, 'one')
    assert not list(tmp_path.iterdir())


def _rate(store):
    return store.load()['optimizer']['param_groups'][0]['lr']


def test_two_states_are_kept(tmp_path):
    store = CheckpointManager(tmp_path)
    (tmp_path / 'notes.txt').write_text('mine')
    for i in range(3):
        store.save(_state(i), f'epoch-{i}')
    store.save(_state(9), 'epoch-2')  # the same point again
    assert _rate(store) == 9
    assert [p.name[:15] for p in sorted(tmp_path.iterdir())] == ['000003-epoch-2.', '000004-epoch-2.', 'notes.txt']


@pytest.mark.parametrize('moment', ['save', 'fsync_dir', 'sha256_of'])
def test_what_a_failing_writer_leaves_is_the_last_state(tmp_path, monkeypatch, moment):
    store = CheckpointManager(tmp_path)
    store.save(_state(1), 'one')

    def fail(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.torch if moment == 'save' else run_folder, moment, fail)
        with pytest.raises(StateError, match=r"No space left on device.*The last good one, '000001-one.*, is intact"):
            store.save(_state(2), 'two')
    assert not list(tmp_path.glob('.partial*'))
    assert _rate(store) == (2 if moment == 'fsync_dir' else 1)  # renamed already
    store.save(_state(3), 'two')
    assert _rate(store) == 3


def test_every_flipped_byte_is_noticed(tmp_path, caplog):
    store = CheckpointManager(tmp_path)
    store.save(_state(1), 'one')
    store.save(_state(2), 'two')
    newest = max(tmp_path.iterdir())
    content = newest.read_bytes()
    for position in torch.randperm(len(content))[:100].tolist():
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        newest.write_bytes(flipped)
        caplog.clear()
        assert _rate(store) == 1
        assert f"The state '{newest}' is damaged" in caplog.text
    newest.write_bytes(content[:-1])
    assert _rate(store) == 1
    newest.write_bytes(content)
    assert _rate(store) == 2


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
    with pytest.raises(StateError, match=r'could not be written to .*The last good one, .000001-small.*, is intact'):
        store.save({'x': torch.zeros(2 ** 20)}, 'large')
    assert store.load()['x'].shape == (10,)
    assert [p.name[:13] for p in (tmp_path / 's').iterdir()] == ['000001-small.']


def test_damaged_and_missing(tmp_path):
    store = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointError, match='no state of a run'):
        store.load()
    store.save(_state(), 'one')
    with open(next(tmp_path.iterdir()), 'rb+') as f:
        f.truncate(20)
    with pytest.raises(CheckpointError, match=r'All states of the run at .* are damaged'):
        store.load()


class TestFolders:
    def test_runs_of_the_same_second(self, tmp_path, monkeypatch):
        class Frozen(run_folder.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 11, 21, 12, 0, 0)

        monkeypatch.setattr(run_folder, 'datetime', Frozen)
        with ThreadPoolExecutor(20) as pool:
            folders = list(pool.map(lambda _: run_folder._new_folder(tmp_path / 'out', 'm'), range(20)))
        assert len(set(folders)) == 20
        assert {p.name for p in folders} >= {'20261121-120000-m', '20261121-120000-m-2', '20261121-120000-m-20'}

    def test_a_run_in_use_is_refused_until_it_is_dead(self, tmp_path):
        forked = Forked(hold_lock, tmp_path / 'run', folder=tmp_path)
        while 'held' not in forked.output and forked.processes[0].is_alive():
            time.sleep(0.01)
        holder = f'process {forked.processes[0].pid} on {socket.gethostname()}'
        with pytest.raises(ValueError, match=f"run' is in use: {holder} is running there"):
            RunLock().acquire(tmp_path / 'run')
        forked.send_signal(signal.SIGKILL)
        assert forked.wait() == [-signal.SIGKILL]
        RunLock().acquire(tmp_path / 'run')  # and leaves it again: a dead run does not keep it

    def test_only_plain_partial_files_are_removed(self, tmp_path):
        run, foreign = tmp_path / 'run', tmp_path / 'foreign'
        for folder in (run / 'state', run / 'stage' / 'best', foreign):
            folder.mkdir(parents=True)
            (folder / '.partial-1').touch()
        (run / 'link').symlink_to(foreign)
        run_folder._clean(run)
        assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('.partial*')] == ['foreign/.partial-1']

    def test_the_newest_run_among_broken_ones(self, tmp_path):
        for name, text in [('1', 'model: m\n'), ('2', 'model: other\n'), ('3', '['), ('4', '[' * 5000), ('5', '- a\n')]:
            CheckpointManager(tmp_path / name / 'state').save({'identity': {'model': 'other'}}, 'one')
            (tmp_path / name / 'args.yaml').write_text(text)
        (tmp_path / '6' / 'state').mkdir(parents=True)
        (tmp_path / '6' / 'args.yaml').write_text('model: m\n')  # it has no state
        CheckpointManager(tmp_path / '7' / 'state').save({'identity': 3}, 'one')
        assert run_folder._newest_run(tmp_path, 'm') == tmp_path / '1'


def hold_lock(args):
    lock = RunLock()
    lock.acquire(Path(args[0]))
    print('held', flush=True)
    time.sleep(600)
