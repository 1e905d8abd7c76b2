"""train.py and validate.py as products: run, killed, resumed, compared."""
import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from forked import Forked, run_forked
from helpers import ROOT, fit_classifier, make_images, run_python
from safetensors.torch import load_file
from training.killed import train_until
from training.ranks import train_and_report
from training.same_end import check_same_end

from timm_dynamic.__main__ import main as run_with_plugin
from timm_dynamic.evaluation import run_validation, validate_main
from timm_dynamic.training import run_training, train_main
from timm_dynamic.training.run_folder import CheckpointManager
from timm_dynamic.utils import save_pretrained


def _args(image_folder, out, *more):
    """Options of a run: plain classification, unless there is a baseline."""
    recipe = () if {'--focus-baseline', '--recipe'} & {*more} else ('--recipe', 'classification')
    return [
        '--model', 'test_focusnet', '--num-classes', '3', '--img-size', '32', '--data-dir', str(image_folder),
        '--device', 'cpu', '--batch-size', '8', '--epochs', '1', '-j', '0', '--output', str(out),
        '--experiment', 'run', *recipe, *map(str, more)]


LEARNS = '--stage-args', 'baseline.epochs=3', 'baseline.lr=0.05'  # so that a baseline is better than chance


@pytest.fixture(scope='module')
def baseline(tmp_path_factory, image_folder):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('baseline')
    model = timm.create_model('test_focusnet', num_classes=3)
    fit_classifier(model, image_folder)
    save_pretrained(model, folder)
    return folder


def _weights(run: Path) -> bytes:
    return (run / 'last' / 'model.safetensors').read_bytes()


def test_what_a_run_leaves(image_folder, tmp_path, curve):
    result = run_training(_args(image_folder, tmp_path, '--epochs', 2, '--model-ema', '--checkpoint-hist', 1))
    run = tmp_path / 'run'
    assert result['folder'] == run
    assert {p.name for p in run.iterdir()} == {
        '.lock', 'args.yaml', 'best', 'checkpoints', 'curve.png', 'last', 'results.csv', 'results.json', 'stage.yaml',
        'state', 'summary.csv'}
    rows = list(csv.DictReader((run / 'summary.csv').open()))
    assert [r['epoch'] for r in rows] == ['0', '1']
    assert {'train_loss', 'eval_top1', 'eval_ema_top1', 'lr'} <= rows[0].keys()
    assert yaml.safe_load((run / 'args.yaml').read_text())['model'] == 'test_focusnet'
    assert len(list((run / 'checkpoints').iterdir())) == 1
    assert (run / 'curve.png').read_bytes().startswith(b'\x89PNG')

    model = timm.create_model(f'local-dir:{run / "best"}', pretrained=True)
    assert model.num_classes == 3
    assert json.loads((run / 'best' / 'config.json').read_text())['label_names'] == ['class0', 'class1', 'class2']
    # what is exported is what was validated: the moving average
    row, = run_validation(
        ['--model', f'local-dir:{run / "last"}', '--data-dir', str(image_folder), '-j', '0', '--device', 'cpu'])
    assert row['top1'] == pytest.approx(float(rows[-1]['eval_ema_top1']), abs=1e-3)
    assert row['images'] == 33


def test_focusnet_with_a_baseline_of_its_own(image_folder, tmp_path):
    result = run_training(_args(image_folder, tmp_path, '--focus-baseline', 'scratch', '--focus-plain', *LEARNS))
    run = tmp_path / 'run'
    assert [r['model'] for r in result['table']] == ['baseline (frozen)', 'plain cross-entropy', 'focus net']
    assert all(r['images'] == 33 for r in result['table'])
    assert list(result['results']) == ['baseline', 'plain', 'focus']
    for folder in ('best', 'baseline/best', 'plain/best'):
        timm.create_model(f'local-dir:{run / folder}', pretrained=True)
    rows = list(csv.DictReader((run / 'summary.csv').open()))
    assert {'train_classification', 'train_attention', 'train_negentropy'} <= rows[0].keys()
    # plain and focus net begin with the same weights and see the same data; the baseline does not
    seeds = [yaml.safe_load((run / f / 'stage.yaml').read_text())['seed'] for f in ('baseline', 'plain', '.')]
    assert seeds == [43, 42, 42]


def test_stages_one_by_one(image_folder, tmp_path):
    args = _args(image_folder, tmp_path, '--focus-baseline', 'scratch', *LEARNS)
    run_training([*args, '--stage', 'baseline'])
    assert not (tmp_path / 'run' / 'best').exists()
    result = run_training([*args, '--stage', 'focus', '--resume', 'auto'])
    assert list(result['results']) == ['baseline', 'focus']
    with pytest.raises(ValueError, match="no stage 'policy': choose from baseline, focus"):
        run_training([*args, '--stage', 'policy'])


def test_an_experiment_is_not_overwritten(image_folder, tmp_path, capsys):
    assert train_main(_args(image_folder, tmp_path)) == 0
    before = _weights(tmp_path / 'run')
    assert train_main(_args(image_folder, tmp_path, '--seed', 1)) == 1
    assert 'holds a run already: continue it with --resume auto' in capsys.readouterr().err
    assert _weights(tmp_path / 'run') == before


@pytest.mark.parametrize('how', ['auto', 'folder', 'state'])
def test_more_epochs_after_the_end(image_folder, tmp_path, how):
    options = ['--sched', 'constant', '--warmup-epochs', '0']
    run_training(_args(image_folder, tmp_path / 'long', '--epochs', 2, *options))
    run_training(_args(image_folder, tmp_path / 'short', '--epochs', 1, *options))
    run = tmp_path / 'short' / 'run'
    path = {'auto': 'auto', 'folder': run, 'state': max((run / 'state').glob('*-classification-*'))}[how]
    before = _weights(run)
    run_training(_args(image_folder, tmp_path / 'short', '--epochs', 1, *options, '--resume', path))
    assert _weights(run) == before  # finished is finished
    run_training(_args(image_folder, tmp_path / 'short', '--epochs', 2, *options, '--resume', path))
    assert _weights(run) == _weights(tmp_path / 'long' / 'run')


class TestOptionsOnResume:
    """An option given on resume is applied or refused."""

    @pytest.fixture(scope='class')
    @classmethod
    def finished(cls, image_folder, tmp_path_factory):
        folder = tmp_path_factory.mktemp('finished')
        run_training(_args(image_folder, folder))
        return folder

    @pytest.fixture
    def again(self, image_folder, finished, tmp_path):
        """Resume a copy of a run of one epoch with more options."""
        shutil.copytree(finished, tmp_path / 'again')
        return lambda *more: run_training(_args(image_folder, tmp_path / 'again', '--resume', 'auto', *more))

    @pytest.mark.parametrize(('more', 'named'), [
        (['--lr', '0.5'], r'--lr 0\.5 \(the run has None\).*can, with --no-resume-opt'),
        (['--opt', 'adamw'], r"--opt 'adamw' \(the run has 'sgd'\).*can, with --no-resume-opt"),
        (['--seed', '7'], r'--seed 7 \(the run has 42\)\. Leave'),
        (['--smoothing', '0.2', '--epochs', '3'], r'--smoothing 0\.2 \(the run has 0\.1\)'),
        (['--model-kwargs', 'act_layer=silu'], '--model-kwargs'),
        (['--train-split', 'val'], "--train-split 'val'"),
        (['--mixup', '0.5', '--no-resume-opt'], r'--mixup 0\.5'),
    ])
    def test_refused(self, again, tmp_path, more, named):
        before = {p: p.read_bytes() for p in (tmp_path / 'again').rglob('*') if p.is_file()}
        with pytest.raises(ValueError, match=rf'Stage classification of this run began with other options.*{named}'):
            again(*more)
        left = {p: p.read_bytes() for p in (tmp_path / 'again').rglob('*') if p.is_file() and p.name != '.lock'}
        assert left == {p: content for p, content in before.items() if p.name != '.lock'}

    def test_the_same_again_says_that_it_is_finished(self, again, caplog):
        with caplog.at_level('INFO'):
            assert list(again()['results']) == ['classification']
        assert 'Stage classification is finished.' in caplog.text

    def test_fewer_epochs(self, again):
        again('--epochs', 2)
        with pytest.raises(ValueError, match='--epochs 1: 2 epochs of stage classification are trained already'):
            again('--epochs', 1)

    def test_applied(self, again, tmp_path):
        """Another batch size and more epochs; a new rate, with a new optimizer."""
        again('--epochs', 2, '-b', 4, '--workers', 1)
        rows = list(csv.DictReader((tmp_path / 'again' / 'run' / 'summary.csv').open()))
        assert [r['epoch'] for r in rows] == ['0', '1']
        again('--epochs', 3, '--lr', 0.25, '--sched', 'none', '--no-resume-opt')
        rows = list(csv.DictReader((tmp_path / 'again' / 'run' / 'summary.csv').open()))
        assert float(rows[2]['lr']) == 0.25

    def test_an_average_that_is_added_begins_with_the_weights(self, again, tmp_path):
        run = tmp_path / 'again' / 'run'
        before = load_file(run / 'last' / 'model.safetensors')
        again('--epochs', 2, '--model-ema', '--model-ema-decay', 1.0)
        after = load_file(run / 'last' / 'model.safetensors')  # exported: the average, which does not move
        assert all(torch.equal(after[k], v) for k, v in before.items() if v.is_floating_point())

    def test_classes_in_another_order(self, image_folder, finished, tmp_path):
        shutil.copytree(finished, tmp_path / 'again')
        shutil.copytree(image_folder, tmp_path / 'data')
        for split in ('train', 'val'):
            (tmp_path / 'data' / split / 'class0').rename(tmp_path / 'data' / split / 'zebra')
        with pytest.raises(ValueError, match=r"cannot be continued here: it has class 0 'class0' \(here: 'class1'\)"):
            run_training(_args(tmp_path / 'data', tmp_path / 'again', '--epochs', 2, '--resume', 'auto'))

    @pytest.mark.parametrize('resume', [[], ['--resume', 'auto']])
    def test_results_without_a_state_are_not_replaced(self, image_folder, finished, tmp_path, resume):
        shutil.copytree(finished, tmp_path / 'again')
        shutil.rmtree(tmp_path / 'again' / 'run' / 'state')
        before = _weights(tmp_path / 'again' / 'run')
        with pytest.raises(ValueError, match=r"no state to continue from at .*summary.csv' is the result of a run"):
            run_training(_args(image_folder, tmp_path / 'again', *resume))
        assert _weights(tmp_path / 'again' / 'run') == before

    def test_a_damaged_state_falls_back_to_the_one_before(self, image_folder, finished, tmp_path, caplog):
        shutil.copytree(finished, tmp_path / 'again')
        run_training(_args(image_folder, tmp_path / 'again', '--epochs', 2, '--resume', 'auto'))
        run = tmp_path / 'again' / 'run'
        expected = _weights(run)
        newest = max((run / 'state').iterdir())
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        run_training(_args(image_folder, tmp_path / 'again', '--epochs', 2, '--resume', 'auto'))
        assert f"The state '{newest}' is damaged" in caplog.text
        assert _weights(run) == expected

    def test_best_that_was_removed_comes_back(self, again, tmp_path):
        shutil.rmtree(tmp_path / 'again' / 'run' / 'best')
        again('--epochs', 2, '--lr', 1e-9, '--no-resume-opt')
        timm.create_model(f"local-dir:{tmp_path / 'again' / 'run' / 'best'}", pretrained=True)

    def test_foreign_checkpoints_behind_a_link_stay(self, again, tmp_path):
        shared = tmp_path / 'shared'
        for epoch in range(4):
            (shared / f'epoch-{epoch:04d}').mkdir(parents=True)
        run = tmp_path / 'again' / 'run'
        shutil.rmtree(run / 'checkpoints')
        (run / 'checkpoints').symlink_to(shared)
        again('--epochs', 3, '--checkpoint-hist', 1)
        assert {p.name for p in shared.iterdir()} >= {'epoch-0000', 'epoch-0003'}

    @pytest.mark.parametrize(('name', 'content', 'message'), [
        ('args.yaml', '[' * 5000, None),  # only to find the newest run
        ('summary.csv', '\0\xff,,\n"', "summary.csv' cannot be read"),
    ])
    def test_damaged_files_of_the_run(self, again, tmp_path, name, content, message):
        (tmp_path / 'again' / 'run' / name).write_text(content)
        if message is None:
            again('--epochs', 2)
        else:
            with pytest.raises(ValueError, match=message):
                again('--epochs', 2)


@pytest.mark.parametrize('state', [
    [1], {'identity': 3}, {'identity': {}, 'run': [], 'progress': {}}, {'identity': {}, 'run': {}, 'progress': {}}])
def test_a_state_of_something_else(image_folder, tmp_path, state, capsys):
    CheckpointManager(tmp_path / 'run' / 'state').save(state, 'x')
    assert train_main(_args(image_folder, tmp_path, '--resume', 'auto')) == 1
    assert "is not one of a run." in capsys.readouterr().err


def test_a_config_of_thousands_of_levels(image_folder, tmp_path, capsys):
    (tmp_path / 'deep.yaml').write_text('[' * 5000)
    with pytest.raises(SystemExit):
        train_main(_args(image_folder, tmp_path, '--config', tmp_path / 'deep.yaml'))
    assert "--config: cannot read '" in capsys.readouterr().err


def test_resume_auto_finds_the_newest_run_of_the_model(image_folder, tmp_path):
    args = [a for a in _args(image_folder, tmp_path) if a not in ('--experiment', 'run')]
    first = run_training([*args, '--resume', 'auto'])['folder']  # nothing there yet
    other = [a if a != 'test_focusnet' else 'test_resnet' for a in args]
    time.sleep(1.1)  # folders are named by the second
    assert run_training(other)['folder'] != first
    assert run_training([*args, '--resume', 'auto'])['folder'] == first


# At least three inside the writer and three in mid-epoch.
KILLS = [
    'update:2', 'half:1', 'written:2', 'renamed:2', 'update:5', 'export:1', 'half:2', 'update:2', 'renamed:1',
    'written:1']


def test_killed_ten_times_ends_bit_identical(image_folder, baseline, tmp_path):
    options = [
        '--focus-baseline', baseline, '--epochs', 4, '-j', 2, '--hflip', 0.5, '--mixup', 0.4, '--reprob', 0.5,
        '--model-ema', '--model-ema-decay', 0.9, '--grad-accum-steps', 2, '--checkpoint-interval', 3, '--drop', 0.1,
        '--batch-size', 6, '--resume', 'auto']
    run_training(_args(image_folder, tmp_path / 'reference', *options))
    args = _args(image_folder, tmp_path / 'killed', *options)
    killed = [Forked(train_until, kill, *args, folder=tmp_path).wait() for kill in KILLS]
    assert killed == [[-signal.SIGKILL]] * len(KILLS)
    run_training(args)
    check_same_end(tmp_path / 'reference/run', tmp_path / 'killed/run', ['.'])
    assert not [p for p in tmp_path.rglob('*') if p.name.startswith('.partial')]


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_stop_saves_and_resumes_bit_identical(image_folder, tmp_path, signum):
    args = _args(image_folder, tmp_path, '--epochs', 3, '-j', 1, '--log-interval', 1)
    run_training(_args(image_folder, tmp_path / 'reference', '--epochs', 3, '-j', 1))
    forked = Forked(train_main, *args, folder=tmp_path)
    while 'epoch 1 update 3' not in forked.output and forked.processes[0].is_alive():
        time.sleep(0.01)
    forked.send_signal(signum)  # to the loader's workers, too, as a scheduler and Ctrl-C do
    assert forked.wait() == [128 + signum]
    assert f'Stopped by {signum.name}; the state is saved. Continue with --resume auto.' in forked.output
    progress = CheckpointManager(tmp_path / 'run' / 'state').load()['progress']
    assert progress['epoch'] >= 1
    assert progress['batch'] > 0 or progress['epoch'] == 2
    run_training([*args, '--resume', 'auto'])
    assert _weights(tmp_path / 'run') == _weights(tmp_path / 'reference' / 'run')


def test_the_script_itself_killed_from_outside_ends_bit_identical(image_folder, tmp_path):
    args = _args(image_folder, tmp_path, '--epochs', 3, '--log-interval', 1, '--checkpoint-interval', 2)
    run_training(_args(image_folder, tmp_path / 'reference', '--epochs', 3))
    with subprocess.Popen([sys.executable, 'train.py', *args], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if 'epoch 1 update 4' in line:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / 'run/results.csv').exists()
    run_training([*args, '--resume', 'auto'])
    assert _weights(tmp_path / 'run') == _weights(tmp_path / 'reference' / 'run')


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(image_folder, tmp_path, capsys):
    args = _args(image_folder, tmp_path, '--checkpoint-interval', 1, '--lr', 1e30, '--warmup-epochs', 0, '--opt', 'sgd')
    assert train_main(args) == 1
    error = capsys.readouterr().err
    assert 'loss of stage classification is not finite: epoch 0, batch ' in error
    assert 'learning rate was 1e+30' in error
    assert 'class' in error.partition('samples')[2]  # the file of a sample
    assert 'The last good state is kept' in error
    state = CheckpointManager(tmp_path / 'run' / 'state').load()
    assert all(v.isfinite().all() for v in state['totals'][0].values())


def test_two_processes(tmp_path, baseline):
    """Equal weights after three updates on different data; validation to the sample, on an odd number of images."""
    images = make_images(tmp_path / 'images', {'train': 17, 'val': 7})
    args = _args(
        images, tmp_path, '--focus-baseline', baseline, '--batch-size', 4, '--model-ema', '--grad-accum-steps', 2)
    run_forked(train_and_report, tmp_path / 'report.json', *args, processes=2, folder=tmp_path)
    assert json.loads((tmp_path / 'report.json').read_text()) == {'focus': {
        'weights_equal': True, 'weights_learned': True, 'averages_equal': True, 'data_differ': True, 'updates': 3}}

    command = ['--model', f'local-dir:{tmp_path / "run" / "last"}', '--data-dir', str(images), '-b', '4', '-j', '0',
               '--device', 'cpu', '--metrics-avg', 'macro']
    one, = run_validation(command)
    results = '--results-file', tmp_path / 'two.json', '--results-format', 'json'
    run_forked(validate_main, *command, *results, processes=2, folder=tmp_path)
    two, = json.loads((tmp_path / 'two.json').read_text())
    assert one['images'] == two['images'] == 21
    for key in ('top1', 'top5', 'precision', 'recall', 'f1_score'):
        assert one[key] == two[key]
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert float(rows[-1]['eval_ema_top1']) == pytest.approx(one['top1'], abs=1e-3)


def test_resume_in_two_processes_is_exact(tmp_path):
    """The run that is not interrupted is one of torchrun; the other has workers when it is resumed."""
    images = make_images(tmp_path / 'images', {'train': 17, 'val': 7})
    options = ['--batch-size', 4, '--epochs', 2, '--reprob', 0.5, '--checkpoint-interval', 2, '--val-interval', 2]
    run_python('train.py', *_args(images, tmp_path / 'reference', *options), processes=2)
    args = _args(images, tmp_path, *options)
    assert Forked(train_until, 'update:4', *args, processes=2, folder=tmp_path).wait() == [-signal.SIGKILL] * 2
    run_forked(train_main, *args, '-j', 1, '--resume', 'auto', processes=2, folder=tmp_path)
    assert _weights(tmp_path / 'run') == _weights(tmp_path / 'reference' / 'run')
    rows, expected = ([{**row, 'seconds': 0} for row in csv.DictReader((run / 'summary.csv').open())]
                      for run in (tmp_path / 'run', tmp_path / 'reference' / 'run'))
    assert rows == expected  # means over the epoch, too


def test_resume_from_a_checkpoint_of_timm(image_folder, tmp_path):
    from timm.utils import CheckpointSaver
    model = timm.create_model('test_focusnet', num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    saver = CheckpointSaver(
        model, optimizer, args=argparse.Namespace(model='test_focusnet'), checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path))
    saver.save_checkpoint(epoch=3, metric=50.)
    file = next(tmp_path.glob('*.pth.tar'))
    run_training(_args(image_folder, tmp_path, '--epochs', 5, '--resume', file, '--no-resume-opt'))
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert [r['epoch'] for r in rows] == ['4']


def _broken(tmp_path, image_folder):
    file = tmp_path / 'broken.pth.tar'
    torch.save({'state_dict': timm.create_model('test_focusnet', num_classes=3).state_dict()}, file)
    with open(file, 'rb+') as f:
        f.truncate(1000)
    return ['--resume', file]


def _foreign(tmp_path, image_folder):
    file = tmp_path / 'foreign.pth.tar'
    torch.save({'state_dict': timm.create_model('test_efficientnet', num_classes=3).state_dict(), 'epoch': 1}, file)
    return ['--resume', file]


def _other_run(tmp_path, image_folder):
    other = [a if a != 'test_focusnet' else 'test_resnet' for a in _args(image_folder, tmp_path / 'other')]
    run_training(other)
    return ['--resume', tmp_path / 'other' / 'run']


def _file_in_the_way(tmp_path, image_folder):
    (tmp_path / 'file').write_text('')
    return ['--output', tmp_path / 'file']


@pytest.mark.parametrize(('more', 'messages'), [
    (['--model', 'resnet81'], ["no model 'resnet81'", 'Did you mean']),
    (['--focus-baseline', 'resnet81'], ["no baseline 'resnet81'"]),
    (['--recipe', 'focusnet'], ['needs a baseline: --focus-baseline MODEL']),
    (['--recipe', 'nothing'], ["no recipe 'nothing'. Choose from classification, focusnet"]),
    (['--num-classes', '2'], ['--num-classes 2: the data has 3 classes']),
    (['--data-dir', '/nowhere'], ["no data at '/nowhere'"]),
    (['--batch-size', '100'], ['72 images, fewer than one batch (100 x 1 processes)']),
    (['--amp'], ['float16 needs a GPU', '--amp-dtype bfloat16']),
    (['--eval-metric', 'f1'], ['no such metric. Choose from loss, top1, top5']),
    (['--resume', '/nowhere'], ["no state of a run at '/nowhere'"]),
    (_broken, ['broken.pth.tar', 'truncated, or no checkpoint']),
    (_foreign, ["missing (first: 'conv1.0.weight')", "unexpected (first: 'conv_stem.weight')"]),
    (_other_run, ["cannot be continued here: it has model 'test_resnet' (here: 'test_focusnet')"]),
    (_file_in_the_way, ['cannot be written', 'Choose another with --output']),
])
def test_bad_input_is_one_clear_line(image_folder, tmp_path, capsys, more, messages):
    more = more(tmp_path, image_folder) if callable(more) else more
    assert train_main(_args(image_folder, tmp_path, *more)) == 1
    error = capsys.readouterr().err.strip()
    assert '\n' not in error.splitlines()[-1]
    for message in messages:
        assert message in error


def test_baseline_with_other_classes(image_folder, tmp_path, capsys):
    save_pretrained(timm.create_model('test_focusnet', num_classes=7), tmp_path / 'b')
    assert train_main(_args(image_folder, tmp_path, '--focus-baseline', tmp_path / 'b')) == 1
    assert 'has 7 classes, the focus net has 3' in capsys.readouterr().err


def test_a_pickle_with_code_is_refused(image_folder, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'executed'), 'w')

    file = tmp_path / 'evil.pth.tar'
    torch.save({'state_dict': {}, 'x': Evil()}, file)
    for flag in ('--resume', '--initial-checkpoint', '--pretrained-path', '--focus-baseline'):
        assert train_main(_args(image_folder, tmp_path, flag, file)) == 1
        assert 'code to be run' in capsys.readouterr().err
    assert not (tmp_path / 'executed').exists()


def test_folders_that_differ_between_splits(tmp_path, capsys):
    images = make_images(tmp_path / 'images', {'train': 4, 'val': 4})
    (images / 'val' / 'class0').rename(images / 'val' / 'zebra')
    assert train_main(_args(images, tmp_path, '--batch-size', 2)) == 1
    assert "data has 3 classes, and 2 of them are among the model's 3, but not 'zebra'" in capsys.readouterr().err


def test_disk_full_keeps_the_last_state(image_folder, tmp_path, monkeypatch, capsys):
    save, count = torch.save, [0]

    def failing(*args, **kwargs):
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, 'No space left on device')
        save(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', failing)
    args = _args(image_folder, tmp_path, '--checkpoint-interval', 2)
    assert train_main(args) == 1
    assert 'No space left on device' in (error := capsys.readouterr().err)
    assert 'is intact: free some space and continue with --resume auto' in error
    monkeypatch.undo()
    assert CheckpointManager(tmp_path / 'run' / 'state').load()['progress']['batch'] == 4
    assert train_main([*args, '--resume', 'auto']) == 0


def test_processes_that_do_not_see_each_other(image_folder, tmp_path, monkeypatch, capsys):
    import timm_dynamic.launch.accelerator as module

    class Alone(module.Accelerator):
        def __init__(self, **kwargs):
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv('WORLD_SIZE')
                super().__init__(**kwargs)

    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(module, 'Accelerator', Alone)
    assert train_main(_args(image_folder, tmp_path)) == 1
    assert '2 processes were launched, but Accelerate found 1' in capsys.readouterr().err


def test_compare_and_results_file(image_folder, baseline, tmp_path):
    file = tmp_path / 'results.csv'
    rows = run_validation([
        '--model', 'test_focusnet', '--num-classes', '3', '--img-size', '32',
        '--checkpoint', str(baseline / 'model.safetensors'), '--data-dir', str(image_folder), '-j', '0',
        '--device', 'cpu', '--compare', f'local-dir:{baseline}', '--results-file', str(file)])
    assert [r['model'] for r in rows] == ['test_focusnet', f'local-dir:{baseline}']
    assert [r['images'] for r in rows] == [33, 33]
    assert [r['model'] for r in csv.DictReader(file.open())] == [r['model'] for r in rows]


def test_trackers(image_folder, tmp_path):
    run_training(_args(image_folder, tmp_path, '--log-with', 'tensorboard'))
    assert list((tmp_path / 'run').rglob('events.out.tfevents*'))


def test_any_script_runs_with_the_plugin(tmp_path):
    script = tmp_path / 'standin.py'
    script.write_text('''
import sys
import timm
import sibling
print(sys.argv, __name__, len(timm.create_model(sys.argv[2]).state_dict()), sibling.VALUE)
sys.exit(7)
''')
    (tmp_path / 'sibling.py').write_text('VALUE = 5')
    result = run_python('-m', 'timm_dynamic', script, '--model', 'focusnet_resnet18', check=False)
    assert result.returncode == 7
    assert result.stdout.strip() == f"{[str(script), '--model', 'focusnet_resnet18']} __main__ 122 5"


@pytest.mark.parametrize(('argv', 'status', 'message'), [
    (['nope.py'], 1, "timm-dynamic: 'nope.py' is neither a command (train, validate, "),
    (['--help'], 0, 'timm-dynamic SCRIPT ...'),
    ([], 2, 'timm-dynamic SCRIPT ...'),
    (['validate'], 2, 'timm-dynamic validate: error: --model is needed'),
    (['train', '--nonsense'], 2, 'timm-dynamic train: error: '),
    (['predict', '--topk', '-1'], 2, 'timm-dynamic predict: error: --topk'),
    (['convert'], 2, 'usage: timm-dynamic convert'),
    (['publish'], 2, 'usage: timm-dynamic publish'),
    (['benchmark', 'exit', '--steps'], 2, 'usage: timm-dynamic benchmark'),
    (['visualize'], 2, '--model'),
])
def test_commands(monkeypatch, capsys, argv, status, message):
    monkeypatch.setattr(sys, 'argv', ['timm-dynamic', *argv])
    try:
        found = run_with_plugin()
    except SystemExit as e:
        found = e.code
    assert found == status
    assert message in ''.join(capsys.readouterr())
