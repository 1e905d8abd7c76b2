import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from forked import Forked
from PIL import Image
from timm.data import FastCollateMixup
from torch.utils.data import DataLoader, IterableDataset

from timm_dynamic.data import WorkerInit, create_dataset, create_train_loader, worker_context

ARGS = dict(input_size=(3, 32, 32), batch_size=8, re_prob=0.5, re_mode='pixel', device=torch.device('cpu'))


def _loader(image_folder, workers=0, seed=42, **kwargs):
    dataset = create_dataset('', root=str(image_folder), split='train')
    mixup = FastCollateMixup(mixup_alpha=0.5, num_classes=3)
    return create_train_loader(
        dataset, num_workers=workers, seed=seed, **{**ARGS, 'collate_fn': mixup, **kwargs})


def _epoch(loader, epoch, start=0):
    loader.set_epoch(epoch, start)
    return [(x.clone(), y.clone()) for x, y in loader]


def _same(a, b):
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))


def test_batches_depend_on_seed_and_epoch_only(image_folder):
    first = _epoch(_loader(image_folder), 1)
    assert len(first) == 9
    for workers in (1, 2):
        loader = _loader(image_folder, workers)
        _epoch(loader, 0)  # what came before does not matter
        assert _same(_epoch(loader, 1), first)
    assert not _same(_epoch(_loader(image_folder), 2), first)
    assert not _same(_epoch(_loader(image_folder, seed=43), 1), first)


def test_an_epoch_goes_on_where_it_was_left(image_folder):
    whole = _epoch(_loader(image_folder), 3)
    loader = _loader(image_folder, workers=2)
    assert len(loader) == 9
    assert _same(_epoch(loader, 3, start=5), whole[5:])
    assert len(loader) == 9  # of the whole epoch
    assert _same(_epoch(loader, 4), _epoch(_loader(image_folder), 4))


def test_loader_that_prefetches_across_epochs(image_folder):
    loader = _loader(image_folder, workers=1, use_multi_epochs_loader=True)
    reference = _loader(image_folder)
    assert _same(_epoch(loader, 2, start=7), _epoch(reference, 2)[7:])
    for epoch in (3, 4):
        assert _same(_epoch(loader, epoch), _epoch(reference, epoch))


def test_without_prefetcher(image_folder):
    def batches(workers):
        return _epoch(_loader(image_folder, workers, use_prefetcher=False, collate_fn=None), 1)
    assert _same(batches(0), batches(2))


def test_every_image_once_an_epoch_over_all_processes(image_folder, monkeypatch):
    import torch.distributed as dist
    seen = []
    for rank in range(3):
        monkeypatch.setattr(dist, 'is_available', lambda: True)
        monkeypatch.setattr(dist, 'get_world_size', lambda *a: 3)
        monkeypatch.setattr(dist, 'get_rank', lambda *a, rank=rank: rank)
        loader = _loader(image_folder, rank=rank, world_size=3, batch_size=4)
        loader.set_epoch(1)
        seen += [i for batch in range(len(loader)) for i in loader.indices(1, batch)]
    assert sorted(seen) == list(range(72))


def test_mixup_ends_when_told_in_workers_too(image_folder):
    loader = _loader(image_folder, workers=1, mixup_off_epoch=1)
    for epoch, hard in ((0, False), (1, True)):
        targets = torch.cat([y for _, y in _epoch(loader, epoch)])
        assert bool((targets.max(dim=1).values > 0.9).all()) == hard


def test_unreadable_images_are_skipped_and_counted(tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / 'data')
    for name in ('class0/003.png', 'class2/010.png'):
        file = tmp_path / 'data' / 'train' / name
        file.write_bytes(file.read_bytes()[:60])
    loader = _loader(tmp_path / 'data', workers=2)
    batches = _epoch(loader, 0)
    assert sum(len(x) for x, _ in batches) == 72
    assert loader.skipped == 2


def _png(width, height, ihdr=13):
    """The beginning of a PNG file, with a header of so many bytes."""
    data = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)[:ihdr]
    return (b'\x89PNG\r\n\x1a\n' + struct.pack('>I', ihdr) + data + struct.pack('>I', zlib.crc32(data)) +
            b'\0\0\0\1IDAT')


@pytest.mark.parametrize(('content', 'error'), [
    (_png(20000, 20000), 'DecompressionBombError'),  # a small file that wants 1.2 GB
    (_png(5, 5, ihdr=4), ''),
    (_png(5, 5), ''),
    (b'', 'cannot identify image file'),
    (b'GIF89a' + 40 * b'\xff', ''),
])
def test_whatever_a_decoder_raises_is_the_images_name_in_a_warning(tmp_path, image_folder, content, error, caplog):
    shutil.copytree(image_folder, tmp_path / 'data')
    (tmp_path / 'data' / 'val' / 'class1' / '005.png').write_bytes(content)
    dataset = create_dataset('', root=str(tmp_path / 'data'), split='val')
    images = [dataset[i] for i in range(len(dataset))]
    assert [target for _, target in images] == 11 * [0] + 11 * [1] + 11 * [2]
    assert caplog.text.count('Skipped sample (index 16). ') == 1
    assert f"class1{os.sep}005.png' cannot be read" in caplog.text
    assert error in caplog.text


def test_ten_in_a_row_are_an_error(tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / 'data')
    for file in (tmp_path / 'data' / 'val' / 'class1').iterdir():
        file.write_bytes(_png(20000, 20000))
    dataset = create_dataset('', root=str(tmp_path / 'data'), split='val')
    with pytest.raises(RuntimeError, match=r"10 images in a row cannot be .* 'class1.*png': Decompression"):
        dataset[11]


def _load(args):
    context = worker_context(int(args[0]))
    iterator = iter(DataLoader(
        range(10 ** 9), num_workers=2, worker_init_fn=WorkerInit(None), multiprocessing_context=context))
    if args[0] == '1':
        next(iterator)
    else:  # workers are spawned, and have not begun yet
        threading.Thread(target=next, args=(iterator,)).start()
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
    print('workers', *(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)


@pytest.mark.parametrize('world_size', [1, 2])
def test_workers_end_with_a_killed_process(tmp_path, world_size):
    forked = Forked(_load, world_size, folder=tmp_path)
    while not (found := re.search(r'workers (\d+) (\d+)\n', forked.output)):
        assert forked.processes[0].is_alive(), forked.output
        time.sleep(0.05)
    os.kill(forked.processes[0].pid, signal.SIGKILL)
    assert forked.wait() == [-signal.SIGKILL]
    for pid in map(int, found.groups()):
        for _ in range(200):
            if not _runs(pid):
                break
            time.sleep(0.1)
        assert not _runs(pid)


def _terminate(args):
    iterator = iter(DataLoader(range(10 ** 9), num_workers=2, worker_init_fn=WorkerInit(None)))
    next(iterator)
    workers = multiprocessing.active_children()
    subprocess.run(['kill', '-TERM', *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(1)
    print('alive', [worker.is_alive() for worker in workers], flush=True)
    for worker in workers:
        worker.terminate()
        worker.join(20)
    print('alive', [worker.is_alive() for worker in workers], flush=True)
    os._exit(0)


def test_workers_end_when_their_process_says_so(tmp_path):
    """Not at a scheduler's SIGTERM to all. If they never ended, a process that fails would wait for them for ever."""
    forked = Forked(_terminate, folder=tmp_path)
    assert forked.wait() == [0], forked.output
    assert forked.output.splitlines() == ['alive [True, True]', 'alive [False, False]']


def _runs(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_iterable_datasets_begin_an_epoch_anew():
    class Stream(IterableDataset):
        transform = None
        epoch = None

        def __iter__(self):
            for i in range(16):
                yield self.transform(Image.new('RGB', (40, 40), (i, i, i))), i % 3

        def __len__(self):
            return 16

        def set_epoch(self, epoch):
            self.epoch = epoch

    stream = Stream()
    loader = create_train_loader(stream, num_workers=0, **ARGS)
    assert not loader.resumable
    assert len(_epoch(loader, 5, start=1)) == len(loader) == 2
    assert stream.epoch == 5
    assert loader.indices(5, 0) is None


@pytest.mark.parametrize(('make', 'error', 'message'), [
    (lambda p: None, FileNotFoundError, "no data at '.*nowhere'"),
    (lambda p: (p / 'nowhere' / 'train').mkdir(parents=True), ValueError, "holds no images for the split 'train'"),
    (lambda p: [(p / 'nowhere' / 'train' / 'cat').mkdir(parents=True),
                Image.new('RGB', (8, 8)).save(p / 'nowhere' / 'train' / 'cat' / '0.png')],
     ValueError, r"holds 1 class \('cat'\)"),
])
def test_bad_folders(tmp_path, make, error, message):
    make(tmp_path)
    with pytest.raises(error, match=message):
        create_dataset('', root=str(tmp_path / 'nowhere'), split='train')


def test_unknown_dataset():
    with pytest.raises(ValueError, match='Did you mean cluttered_digits'):
        create_dataset('clutered_digits')
