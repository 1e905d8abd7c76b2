"""predict.py: the same answers as validate.py, whatever the images come from and however often it is interrupted."""
import csv
import itertools
import json
import re
import shutil
import signal
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from evaluation.killed_prediction import predict_until
from flag_tables import fresh_accelerate, make_dynamic, make_weights
from forked import Forked, run_forked
from helpers import make_images
from PIL import Image
from timm.data import ImageNetInfo, create_loader

from timm_dynamic.data import CollateKeys, PredictionImages, PredictionStream, create_dataset
from timm_dynamic.data.image_names import image_names
from timm_dynamic.evaluation import predict, predict_main, run_prediction, run_validation
from timm_dynamic.evaluation.prediction_results import create_label_mapper, write_predictions
from timm_dynamic.launch import images
from timm_dynamic.launch.options import REFUSED_PREDICT, create_predict_parser
from timm_dynamic.utils import UserError, save_pretrained

COLUMNS = ['filename', 'index', 'prob', 'steps_used', 'confidence', 'gmacs']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A GFNet, a cascade and a static net, and 15 images of 3 classes as folders and as a tar file."""
    folder = tmp_path_factory.mktemp('predict')
    make_dynamic(folder / 'net', kept=True)
    cascade = timm.create_model('test_clcnet', num_classes=3, img_size=32, confidence='max_prob')
    with torch.no_grad():
        for net in cascade.members:
            net.fc.weight.mul_(30)
    save_pretrained(cascade, folder / 'cascade')
    make_weights(folder / 'static')
    make_images(folder / 'data', {'val': 5}, size=(40, 36))
    with tarfile.open(folder / 'data.tar', 'w') as tar:
        tar.add(folder / 'data' / 'val', arcname='')
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """Runs predict.py in this process, and gives its summary and rows."""
    def run(*options, model='net', data='data', file='p.csv'):
        fresh_accelerate()
        where = ['--data-dir', folder / data] if data else []
        argv = ['--model', f'local-dir:{folder / model}', *where, '--img-size', 32, '-b', 4, '-j', 0, '--device', 'cpu',
                '--results-dir', tmp_path, '--results-file', file, *options]
        summary = run_prediction([str(word) for word in argv])
        return SimpleNamespace(rows=read(tmp_path / file), **summary)
    return run


@pytest.fixture
def says(run, capsys):
    """Runs what must be an error, and gives what it says."""
    def says(*options, **kwargs):
        with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as e:
            run(*options, **kwargs)
        return capsys.readouterr().err if e.type is SystemExit else str(e.value)
    return says


def read(path):
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f)) if path.suffix == '.csv' else json.load(f)


def column(rows, name):
    return [row[name] for row in rows]


def argv(folder, results, *options, data='data/val'):
    return ['--model', f'local-dir:{folder / "net"}', '--data-dir', folder / data, '--img-size', 32, '-b', 4, '-j', 0,
            '--device', 'cpu', '--thresholds', 0.6, 0.6, 0, '--results-file', results, '--shard-size', 4, *options]


# The answers of validate.py

@pytest.mark.parametrize('data', ['data', 'data.tar'])
@pytest.mark.parametrize('early', [True, False])
@pytest.mark.parametrize(('model', 'steps'), [('net', 3), ('cascade', 2)])
def test_rows_equal_validate(run, folder, tmp_path, model, steps, early, data):
    options = []
    if early:  # some of the images stop after the first step: none is as confident as the threshold
        first = sorted(map(float, column(run('--thresholds', *[0] * steps, model=model, data=data).rows, 'confidence')))
        below, above = max(itertools.pairwise(first), key=lambda pair: pair[1] - pair[0])
        options = ['--thresholds', (below + above) / 2, *[0] * (steps - 1)]
    predicted = run(*options, model=model, data=data)
    fresh_accelerate()
    run_validation([
        '--model', f'local-dir:{folder / model}', '--data-dir', str(folder / data), '--img-size', '32', '-b', '5', '-j',
        '0', '--device', 'cpu', *map(str, options), '--save-predictions', str(tmp_path / 'v.csv')])
    rows, answers = predicted.rows, read(tmp_path / 'v.csv')
    assert list(rows[0]) == COLUMNS
    assert len(rows) == predicted.images == 15
    for ours, theirs in (('filename', 'file'), ('index', 'prediction'), ('steps_used', 'steps_used')):
        assert column(rows, ours) == column(answers, theirs)
    confidence = np.array(column(rows, 'confidence'), float)
    assert np.allclose(confidence, np.array(column(answers, 'confidence'), float), atol=1e-6)
    net = timm.create_model(f'local-dir:{folder / model}', pretrained=True)
    net.set_input_size(32)
    steps = np.array(column(rows, 'steps_used'), int)
    assert sorted(set(steps)) == ([1, 2] if early else [net.num_steps])
    assert column(rows, 'gmacs') == [str(net.step_macs[step - 1] / 1e9) for step in steps]
    assert predicted.gmacs == pytest.approx(np.array(column(rows, 'gmacs'), float).mean())
    assert predicted.exit_shares == [round((steps == t).mean(), 4) for t in range(1, net.num_steps + 1)]


def test_static_models_are_one_step(run, folder):
    rows = run('--topk', 3, '--results-format', 'json-split', model='static', file='p.json').rows
    rows = [dict(zip(rows['columns'], row)) for row in rows['data']]
    net = timm.create_model(f'local-dir:{folder / "static"}', pretrained=True).eval()
    config = timm.data.resolve_data_config({'img_size': 32}, model=net)
    loader = create_loader(
        create_dataset('', str(folder / 'data')), batch_size=15, device=torch.device('cpu'), num_workers=0, **config)
    with torch.no_grad():
        prob, index = net(next(iter(loader))[0]).softmax(dim=1).topk(3)
    assert column(rows, 'index') == index.tolist()
    assert torch.allclose(torch.tensor(column(rows, 'prob')), prob, atol=1e-6)
    assert column(rows, 'confidence') == [row[0] for row in column(rows, 'prob')]
    assert set(column(rows, 'steps_used')) == {1}


def test_budget_and_the_policy_of_the_model(run, folder, tmp_path):
    """The stored budget: all images run all steps. A model's own policy is the default."""
    net = timm.create_model(f'local-dir:{folder / "net"}', pretrained=True)
    net.set_input_size(32)
    low, high = (run('--budget', net.step_macs[2] / 1e9), run('--thresholds', 0, 0, 0))
    assert (low.exit_shares, high.exit_shares) == ([0, 0, 1], [1, 0, 0])
    assert high.gmacs == pytest.approx(net.step_macs[0] / 1e9)
    net.set_exit([2., 0., 0.])
    save_pretrained(net, tmp_path / 'own')
    assert run(model=tmp_path / 'own').exit_shares == [0, 1, 0]


# Images

def test_names_and_images_of_any_folder(run, folder, tmp_path):
    """Images beside each other, in folders of any depth, with equal base names: no classes are needed."""
    (tmp_path / 'flat').mkdir()
    names = ['a/1.png', 'a/b/1.png', 'b/1.png', '1.png', '2.png']
    for i, name in enumerate(names):
        (tmp_path / 'flat' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f'data/val/class{i % 3}/00{i}.png', tmp_path / 'flat' / name)
    rows = run('--results-format', 'json', data=tmp_path / 'flat', file='p.json').rows
    assert sorted(rows) == sorted(names)
    originals = {row['filename']: row for row in run().rows}
    for i, name in enumerate(names):
        original = originals[f'class{i % 3}/00{i}.png']
        assert rows[name]['prob'] == pytest.approx(float(original['prob']), abs=1e-6)
    assert column(run('--no-fullname', data=tmp_path / 'flat').rows, 'filename').count('1.png') == 4
    (tmp_path / 'one').mkdir()
    shutil.copy(folder / 'data/val/class0/000.png', tmp_path / 'one')
    assert column(run(data=tmp_path / 'one').rows, 'filename') == ['000.png']


def test_a_list_of_files(run, folder, tmp_path):
    lines = ['class2/004.png', 'class0/000.png', '', f'{folder}/data/val/class1/001.png']
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    rows = run('--file-list', tmp_path / 'list.txt', data='data/val').rows
    assert column(rows, 'filename') == [line for line in lines if line]
    expected = {row['filename']: row['prob'] for row in run().rows}
    assert [float(row['prob']) for row in rows] == pytest.approx(
        [float(expected['/'.join(line.split('/')[-2:])]) for line in lines if line], abs=1e-6)


def test_equal_names_in_two_inner_tars(run, folder, tmp_path):
    with tarfile.open(tmp_path / 'outer.tar', 'w') as outer:
        for c in range(2):
            with tarfile.open(tmp_path / f'n{c}.tar', 'w') as inner:
                inner.add(folder / f'data/val/class{c}/000.png', arcname='000.png')
            outer.add(tmp_path / f'n{c}.tar', arcname=f'n{c}.tar')
    rows = run(data=tmp_path / 'outer.tar').rows
    assert sorted(column(rows, 'filename')) == ['n0.tar/000.png', 'n1.tar/000.png']


@pytest.mark.parametrize('packed', [False, True])
def test_unreadable_images_are_listed(run, folder, tmp_path, caplog, packed):
    """They are not fatal, though every batch but the last has some, and they take no other image's row."""
    data = tmp_path / 'bad'
    shutil.copytree(folder / 'data/val', data)
    bad = [f'class0/00{i}.png' for i in range(5)] + ['class1/004.png']
    for i, name in enumerate(bad):
        content = (data / name).read_bytes()
        (data / name).write_bytes(b'no image' if i % 2 else content[:len(content) // 2])
    if packed:
        with tarfile.open(tmp_path / 'bad.tar', 'w') as tar:
            tar.add(data, arcname='')
        data = tmp_path / 'bad.tar'
    predicted, whole = run(data=data), {row['filename']: row for row in run(file='whole.csv').rows}
    assert (predicted.images, predicted.unreadable) == (9, 6)
    assert column(predicted.rows, 'filename') == [name for name in whole if name not in bad]
    for row in predicted.rows:
        assert float(row['prob']) == pytest.approx(float(whole[row['filename']]['prob']), abs=1e-6)
    listed = read(tmp_path / 'p-unreadable.csv')
    assert column(listed, 'file') == bad
    assert all(re.match(r'\w+Error: [^<]+$', reason) for reason in column(listed, 'reason'))
    assert '6 images cannot be read' in caplog.text
    assert 'class0/000.png: ' in caplog.text
    assert run().unreadable == 0
    assert not (tmp_path / 'p-unreadable.csv').exists()


def test_all_images_unreadable(run, tmp_path):
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / '1.png').write_bytes(b'')
    predicted = run(data=tmp_path / 'bad')
    assert (predicted.images, predicted.unreadable, predicted.gmacs, predicted.rows) == (0, 1, None, [])


class Stream(torch.utils.data.IterableDataset):
    """Like timm's iterable datasets: images and labels come from a reader."""

    def __init__(self, size):
        self.reader = [(Image.new('RGB', (40, 40), (i, 0, 0)), 0) for i in range(size)]

    def __iter__(self):
        return iter(self.reader)


def test_streams_keep_their_order_and_can_be_continued():
    stream = PredictionStream(Stream(7))
    stream.transform = np.array
    keys = [(int(image[0, 0, 0]), *key) for image, key in stream]
    assert keys == [(i, i, None, None) for i in range(7)]
    stream.start = 4
    assert [key.number for _, key in stream] == [4, 5, 6]


def test_an_interrupted_stream(run, tmp_path, monkeypatch):
    """It continues after its finished shards, though its length is not known."""
    def opened(fail_at):
        stream = Stream(14)
        monkeypatch.setattr(images, 'open_dataset', lambda *args, **kwargs: stream)
        stream.reader[fail_at:fail_at + 1] = [None] if fail_at < 14 else []  # cannot be unpacked

    opened(14)
    rows = run('--shard-size', 4, '--dataset', 'x/').rows
    assert column(rows, 'filename') == [f'validation/{i:06d}' for i in range(14)]
    for fail_at, finished in ((9, 1), (13, 2)):  # a batch is read ahead
        opened(fail_at)
        with pytest.raises(TypeError, match='NoneType'):
            run('--shard-size', 4, '--dataset', 'x/', file='q.csv')
        assert len(list((tmp_path / 'q.shards').glob('[0-9]*.json'))) == finished
    opened(14)
    assert run('--shard-size', 4, '--dataset', 'x/', file='q.csv').rows == rows
    monkeypatch.setattr(images, 'open_dataset', lambda *args, **kwargs: Stream(0))
    with pytest.raises(UserError, match="There are no images in 'x/'"):
        run('--dataset', 'x/', file='empty.csv')


def test_keys_of_a_batch_stay_with_it(folder):
    two = PredictionImages(create_dataset('', str(folder / 'data')))
    two.transform, two.indices = np.array, [14, 2]
    batch, keys = CollateKeys(torch.utils.data.default_collate)([two[0], two[1]])
    assert batch.shape == (2, 40, 36, 3)
    assert [key.number for key in keys.to('cpu', non_blocking=True).pin_memory()] == [14, 2]
    assert image_names(two.dataset, 'validation')[14] == 'class2/004.png'


# Results

def test_topk_and_columns(run, folder):
    rows = run('--topk', 2, '--results-separate-col', '--exclude-output', '--filename-col', 'image').rows
    assert list(rows[0]) == ['image', 'index_0', 'index_1', 'steps_used', 'confidence', 'gmacs']
    rows = run('--topk', 9).rows  # no more than there are
    assert sorted(json.loads(rows[0]['index'])) == [0, 1, 2]
    assert sum(json.loads(rows[0]['prob'])) == pytest.approx(1)
    logits = run('--topk', 0, '--output-type', 'logit').rows
    assert list(logits[0]) == ['filename', 'logit', 'steps_used', 'confidence', 'gmacs']
    prob = torch.tensor(json.loads(logits[0]['logit'])).softmax(dim=0).sort(descending=True).values
    assert prob.tolist() == pytest.approx(json.loads(rows[0]['prob']), abs=1e-6)


def test_windows_and_steps(run, tmp_path):
    """--topk 10 and what every window says, in one JSON: the same answers, and what `describe_look` says."""
    torch.manual_seed(0)
    anchornet = timm.create_model('test_anchornet_patch', pretrained=True, num_classes=10)
    save_pretrained(anchornet, tmp_path / 'anchornet')
    options = ['--img-size', 96, '--topk', 10, '--thresholds', 0.5, 0.5, 0]
    plain = run(*options, model=tmp_path / 'anchornet', file='plain.json').rows
    rows = run(*options, '--per-step', model=tmp_path / 'anchornet', file='steps.json').rows
    assert len(rows) == 15
    assert {row['steps_used'] for row in rows.values()} > {1}
    for name, row in rows.items():
        steps = row.pop('steps')
        assert [step['box'] is None for step in steps] == [True, False, False]
        used = steps[row['steps_used'] - 1]
        assert [c['index'] for c in used['prediction']] == [int(i) for i in row['index']]
        assert [c['prob'] for c in used['prediction']] == pytest.approx(row['prob'], abs=1e-5)
        assert all(len(step['own']) == 10 for step in steps)
        assert (row['index'], row['steps_used']) == (plain[name]['index'], plain[name]['steps_used'])
        assert row['prob'] == pytest.approx(plain[name]['prob'], abs=1e-5)


def test_class_names_of_the_model(run, folder, tmp_path):
    net = timm.create_model(f'local-dir:{folder / "net"}', pretrained=True)
    names = ['cat', 'dog, hound', 'eel']
    save_pretrained(net, tmp_path / 'named', label_names=names)
    rows = run('--include-index', model=tmp_path / 'named').rows
    assert list(rows[0]) == ['filename', 'index', 'label', *COLUMNS[2:]]
    assert column(rows, 'label') == [names[int(row['index'])] for row in rows]
    assert 'label' not in run('--label-type', 'none', model=tmp_path / 'named').rows[0]
    rows = run('--topk', 2, '--include-index', model=tmp_path / 'named').rows
    assert json.loads(rows[0]['label']) == [names[i] for i in json.loads(rows[0]['index'])]


def test_class_names_of_imagenet_and_missing_ones(caplog):
    info = ImageNetInfo()
    assert create_label_mapper({}, 1000, 'name')(3) == info.index_to_label_name(3)
    assert create_label_mapper({}, 1000, 'detail')(3) == info.index_to_description(3, detailed=True)
    assert create_label_mapper({'label_names': ['a']}, 1000, 'description')(0) == 'a'
    assert 'has 1000 classes and names for 1' in caplog.text
    assert create_label_mapper({'label_names': ['a']}, 1, 'none') is None
    assert create_label_mapper({}, 7, 'name') is None


ROWS = [{'f': 'a, b', 'x': 1, 'l': ['ä"', 2.5]}, {'f': 'c', 'x': 2, 'l': []}]


@pytest.mark.parametrize('rows', [ROWS, ROWS[:1], []])
def test_formats(tmp_path, rows):
    def written(fmt):
        write_predictions(tmp_path / fmt, fmt, ['f', 'x', 'l'], iter(rows))
        return (tmp_path / fmt).read_text(encoding='utf-8')

    cells = list(csv.reader(written('csv').splitlines()))
    assert cells[0] == ['f', 'x', 'l']
    assert [[a, int(x), json.loads(l)] for a, x, l in cells[1:]] == [list(row.values()) for row in rows]
    assert json.loads(written('json')) == {row['f']: {'x': row['x'], 'l': row['l']} for row in rows}
    assert [json.loads(line) for line in written('json-record').splitlines()] == rows
    assert json.loads(written('json-split')) == {'columns': ['f', 'x', 'l'], 'data': [list(r.values()) for r in rows]}


def test_parquet(run, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    rows = run('--results-format', 'csv', 'parquet', '--topk', 2).rows
    table = parquet.read_table(tmp_path / 'p.parquet').to_pylist()
    assert list(table[0]) == COLUMNS
    assert [row['index'] for row in table] == [json.loads(row['index']) for row in rows]


def test_names_of_result_files(run, folder, tmp_path):
    run('--results-format', 'csv', 'json', file='a.csv')
    assert len(read(tmp_path / 'a.json')) == len(read(tmp_path / 'a.csv')) == 15
    fresh_accelerate()
    run_prediction([str(word) for word in (
        '--model', f'local-dir:{folder / "net"}', '--data-dir', folder / 'data', '--img-size', 32, '-b', 4, '-j', 0,
        '--device', 'cpu', '--results-dir', tmp_path / 'new')])
    assert [path.name for path in (tmp_path / 'new').iterdir()] == [f'{folder.name}_net-32.csv']


# Options

# Of timm's inference.py (1.0.31): name and default.
TIMM = {
    'data_dir': None, 'dataset': '', 'model': 'resnet50', 'workers': 2, 'batch_size': 256,
    'img_size': None, 'in_chans': None, 'input_size': None, 'use_train_size': False, 'crop_pct': None,
    'crop_mode': None, 'mean': None, 'std': None, 'interpolation': '', 'num_classes': None, 'class_map': '',
    'log_freq': 10, 'checkpoint': '', 'pretrained': False, 'test_pool': False, 'channels_last': False,
    'device': 'cuda', 'amp': False, 'amp_dtype': 'float16', 'model_dtype': None, 'model_kwargs': {},
    'torchcompile': None, 'torchcompile_mode': None, 'results_dir': None, 'results_file': None,
    'results_separate_col': False, 'topk': 1, 'filename_col': 'filename', 'index_col': 'index', 'label_col': 'label',
    'output_col': None, 'output_type': 'prob', 'label_type': 'description', 'include_index': False,
    'exclude_output': False, 'no_console_results': False}


def test_options_of_timm():
    """All are there or refused with advice, and have timm's defaults, but for these two."""
    parser = create_predict_parser()
    args = vars(parser.parse_args(['DIR', '-m', 'x', '-b', '3', '-j', '1']))
    assert (args['data'], args['model'], args['batch_size'], args['workers']) == ('DIR', 'x', 3, 1)
    defaults = vars(parser.parse_args([]))
    assert {name: defaults[name] for name in TIMM} == TIMM
    assert (defaults['results_format'], defaults['fullname']) == (None, True)
    assert set(REFUSED_PREDICT) == {'--torchscript', '--fuser', '--aot-autograd', '--num-gpu'}


# Interruptions and processes

@pytest.fixture(scope='module')
def uninterrupted(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp('one') / '7.json'
    assert predict_main([str(word) for word in argv(folder, path)]) == 0
    assert not path.with_name('7.shards').exists()
    return path.read_bytes()


def test_killed_and_continued(folder, uninterrupted, tmp_path):
    """Each finished shard is made once: the last run, of four, makes none."""
    for point in ('half:2', 'shard:2', 'results:1', 'written:1'):
        forked = Forked(predict_until, point, *argv(folder, tmp_path / '7.json'), folder=tmp_path)
        assert forked.wait() == [-signal.SIGKILL], forked.output
        assert len(list((tmp_path / '7.shards').glob('[0-9]*.json'))) == {'half:2': 1, 'shard:2': 2}.get(point, 4)
    forked = run_forked(predict_until, 'shard:1', *argv(folder, tmp_path / '7.json'), folder=tmp_path)
    assert 'Continuing: 4 shards' in forked.output
    assert (tmp_path / '7.json').read_bytes() == uninterrupted
    assert not list(tmp_path.glob('*partial*'))
    assert not (tmp_path / '7.shards').exists()


def test_several_processes(folder, uninterrupted, tmp_path):
    """To the byte what one process gives; also if it continues what one began."""
    began = Forked(predict_until, 'half:2', *argv(folder, tmp_path / '7.json'), folder=tmp_path)
    assert began.wait() == [-signal.SIGKILL], began.output
    forked = run_forked(predict_main, *argv(folder, tmp_path / '7.json'), processes=2, folder=tmp_path)
    assert (tmp_path / '7.json').read_bytes() == uninterrupted
    assert forked.output.count('Results:') == 1


def test_other_options_are_refused_by_name(folder, tmp_path, capsys):
    results, options = tmp_path / 'p.csv', ['--model', f'local-dir:{folder / "net"}']
    forked = Forked(predict_until, 'shard:2', *argv(folder, results), folder=tmp_path)
    assert forked.wait() == [-signal.SIGKILL], forked.output
    for changed, named in (
            (['--thresholds', 0.7, 0.6, 0], '--thresholds, exit policy'), (['-b', 2], '--batch-size'),
            (['--topk', 2], '--topk'),
            (['--data-dir', folder / 'data/val/class0'], '--data-dir, number of images, image names'),
            (['--model', f'local-dir:{folder / "cascade"}', '--thresholds', 0.6, 0],
             '--model, --thresholds, weights, exit policy')):
        fresh_accelerate()
        assert predict_main([str(word) for word in (*argv(folder, results), *options, *changed)]) == 1
        assert f'an unfinished prediction with other {named}. Continue' in capsys.readouterr().err
    fresh_accelerate()  # how results look may change
    assert predict_main([str(word) for word in (*argv(folder, results), '--exclude-output', '-j', 1)]) == 0
    assert list(read(results)[0]) == ['filename', 'index', 'steps_used', 'confidence', 'gmacs']


# Bad input

@pytest.mark.parametrize(('options', 'message'), [
    ('--budget 9', r'--budget 9: out of range for .*net.: the first step costs'),
    ('--budget 0.001 --thresholds 1 1 1', '--budget and --thresholds both set the exits'),
    ('--thresholds 0.5', r'--thresholds 0.5: expected 3 for .*, one per step'),
    ('--topk -1', '--topk: expected a number of classes, or 0 for all, got -1'),
    ('--topk 0 --exclude-output', '--exclude-output leaves nothing of --topk 0'),
    ('--shard-size 0', '--shard-size: expected at least 1, got 0'),
    ('--results-format json json-split', 'json json-split: two of them have the same file extension'),
    ('--results-format json --no-fullname', "several images are called '000.png': use json-record"),
    ('--index-col prob', "Two columns of the results are called 'prob'"),
    ('--file-list nowhere.txt', 'No such file.*nowhere.txt'),
    ('--file-list x --dataset wds/', '--file-list and --dataset wds/ both name the images'),
    ('--data-dir nowhere', "There is no data at 'nowhere'"),
    ('--num-gpu 2', '--num-gpu is not supported. One process uses one GPU'),
    ('--per-step --index-col steps', "Two columns of the results are called 'steps'"),
    ('--test-pool', '--test-pool changes how a static model pools'),
])
def test_bad_input(says, options, message):
    said = says(*options.split())
    assert re.search(message, said), said


def test_exits_of_static_models(says):
    assert '--budget: ' in says('--budget', 1, model='static')
    assert 'makes one prediction and cannot exit early' in says('--thresholds', 1, model='static')
    assert '--per-step: ' in says('--per-step', model='static')
    assert '(CLCNet) does not choose where to look' in says('--per-step', model='cascade')


def test_an_empty_list(says, tmp_path):
    (tmp_path / 'list.txt').write_text('\n')
    assert 'names no images: expected a text file' in says('--file-list', tmp_path / 'list.txt')
    (tmp_path / 'list.txt').write_bytes(b'\xff\xfe\xff')
    assert 'is not a text file' in says('--file-list', tmp_path / 'list.txt')


def test_interruptions_are_one_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, 'run_prediction', interrupted)
    assert predict_main([]) == 1
    assert capsys.readouterr().err.startswith('UserError: Interrupted. The same command continues')


def test_parquet_without_pyarrow(says, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    assert 'needs pyarrow, which is not installed: pip install timm-dynamic[parquet]' in says(
        '--results-format', 'parquet')
