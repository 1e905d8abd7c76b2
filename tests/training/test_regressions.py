"""Bugs that were found by reading and by trying, each by what a user saw of it."""
import csv
import json
import re

import pytest
import timm
import torch
from evaluation.streams import validate_stream
from flag_tables import fresh_accelerate, make_cascade, make_dynamic, make_weights
from forked import run_forked
from helpers import make_images
from timm.data import create_loader

from timm_dynamic.data import create_dataset
from timm_dynamic.evaluation import run_validation
from timm_dynamic.exits import ExitTable, early_exit
from timm_dynamic.training import run_training, train_main
from timm_dynamic.training.run_folder import CheckpointManager
from timm_dynamic.training.trainer import Trainer
from timm_dynamic.utils import save_pretrained


def train_args(images, out, *more):
    """Train a GFNet of three steps for one epoch, as one stage."""
    return [
        '--model', 'test_gfnet', '--img-size', '32', '--model-kwargs', 'patch_size=16', '--recipe', 'classification',
        '--num-classes', '3', '--data-dir', str(images), '--device', 'cpu', '--batch-size', '8', '--epochs', '1',
        '-j', '0', '--output', str(out), '--experiment', 'run', *map(str, more)]


def load_images(folder, model):
    """All 33 images of the validation split as a model of 32 pixels sees them, and their classes."""
    config = model.pretrained_cfg
    loader = create_loader(
        create_dataset('', root=folder, split='val'), (3, 32, 32), 33, use_prefetcher=False,
        **{key: config[key] for key in ('crop_pct', 'interpolation', 'mean', 'std')})
    return next(iter(loader))


# Exits are fitted on other images than they are evaluated on

@pytest.mark.parametrize(('folder', 'train_split', 'fit_split', 'split'), [
    ('.', 'train', 'val', 'validation'),  # two names of one split
    ('val', 'val', 'validation', 'train'),  # a folder without splits is all that there is to train and validate on
])
def test_train_does_not_fit_exits_on_the_images_it_evaluates_on(
        image_folder, tmp_path, folder, train_split, fit_split, split,
):
    run_training(train_args(
        image_folder / folder, tmp_path, '--train-split', train_split, '--val-split', fit_split, '--test-split', split))
    rows = json.loads((tmp_path / 'run/budgets.json').read_text())
    assert [(row['point'], row['images']) for row in rows[:3]] == [(f'step {t}', 33) for t in (1, 2, 3)]
    assert not any(row.get('fitted_on') == fit_split for row in rows)  # a half of them would do


def test_train_does_not_evaluate_a_confidence_net_on_the_images_it_has_seen(image_folder, tmp_path):
    """As above, where the two splits are one folder."""
    model = timm.create_model('test_clcnet', num_classes=3, img_size=48)
    for i, net in enumerate(model.members):
        save_pretrained(net, tmp_path / str(i))
    result = run_training([
        '--model', 'test_clcnet', '--img-size', '48', '--folds', '2', '--init-members', str(tmp_path / '0'),
        str(tmp_path / '1'), '--num-classes', '3', '--data-dir', str(image_folder / 'val'), '--device', 'cpu',
        '--batch-size', '8', '--epochs', '1', '-j', '0', '--output', str(tmp_path), '--experiment', 'run',
        '--feature-split', 'validation', '--test-split', 'train'])
    assert result['table'][-1]['split'] == 'train, out of fold'
    budgets = [row for row in json.loads((tmp_path / 'run/budgets.json').read_text()) if row['point'] == 'budget']
    assert budgets
    assert {(row['fitted_on'], row['split'], row['images']) for row in budgets} == {
        ('all of train, out of fold', 'train, out of fold, cross-fitted in halves', 33)}


# A loss that is not finite in one of two processes

@pytest.mark.parametrize(('recipe', 'spoiled', 'message'), [
    # the loss of the third batch
    (['--recipe', 'classification'], '1:GFNet:3', 'The loss of stage classification is not finite: epoch 0, batch 2'),
    # the second of two updates on the second batch, whose first loss was finite
    (['--recipe', 'gfnet', '--stage', 'policy', '--init-from', '{start}', '--policy-updates', '2'], '1:PatchPolicy:7',
     'The loss of stage policy is not finite: epoch 0, batch 1')])
def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_spoils_no_state(tmp_path, recipe, spoiled, message):
    images = make_images(tmp_path / 'images', {'train': 12, 'val': 2})
    save_pretrained(timm.create_model('test_gfnet', num_classes=3, img_size=32, patch_size=16), tmp_path / 'start')
    args = train_args(
        images, tmp_path, '--batch-size', 4, '--checkpoint-interval', 1, '--device-modules', 'training.nan_module')
    recipe = [word.replace('{start}', str(tmp_path / 'start')) for word in recipe]
    result = run_forked(
        train_main, *args, *recipe, processes=2, folder=tmp_path, check=False, env={'NAN_AT': spoiled})
    assert all(p.exitcode for p in result.processes)
    assert result.output.count(f'NonFiniteLoss: {message}, process 1') == 2, result.output  # both processes say so
    state = CheckpointManager(tmp_path / 'run/state').load()
    assert state['progress']['batch'] == int(message[-1])  # what was saved before it
    assert all(value.isfinite().all() for value in state['model']['state_dict'].values())


# Datasets that can only be iterated

def test_metrics_of_uneven_shares_count_every_image_once(image_folder, tmp_path):
    """In two processes what one process gives: nothing is added to make the shares of a stream even."""
    weights = make_weights(tmp_path / 'weights')
    args = ['--model', f'local-dir:{weights}', '--data-dir', str(image_folder), '--img-size', '32', '-b', '4',
            '-j', '0', '--device', 'cpu', '--metrics-avg', 'macro']
    one, = run_validation(args)
    file = tmp_path / 'two.json'
    run_forked(
        validate_stream, *args, '--dataset', 'wds/stream', '--results-file', file, '--results-format', 'json',
        processes=2, folder=tmp_path)
    two, = json.loads(file.read_text())
    keys = 'images', 'top1', 'precision', 'recall', 'f1_score'
    assert [two[key] for key in keys] == [one[key] for key in keys]


# Checkpoints

def test_validate_reads_the_three_files_of_an_anchornet_as_one_model(image_folder, tmp_path):
    kwargs = dict(num_classes=3, img_size=80, patch_size=32)
    model = timm.create_model('test_anchornet_patch', **kwargs)
    save_pretrained(model, tmp_path / 'whole')
    (tmp_path / 'parts').mkdir()
    for part, file in (('localizer', 'anchornet.pth'), ('resized', 'r18_resized.pth.tar'), ('patch', 'r18_patch.pth')):
        torch.save({'state_dict': getattr(model, part).state_dict()}, tmp_path / 'parts' / file)
    args = ['--data-dir', str(image_folder), '--img-size', '80', '-b', '8', '-j', '0', '--device', 'cpu']
    whole, *_ = run_validation(['--model', f"local-dir:{tmp_path / 'whole'}", *args])
    fresh_accelerate()
    row, *points = run_validation([
        '--model', 'test_anchornet_patch', '--num-classes', '3', '--model-kwargs', 'patch_size=32',
        '--checkpoint', str(tmp_path / 'parts'), *args])
    assert [point['point'] for point in points] == ['step 1', 'step 2', 'step 3']
    assert {key: row[key] for key in ('top1', 'loss', 'images')} == {
        key: whole[key] for key in ('top1', 'loss', 'images')}
    assert row['checkpoint'] == str(tmp_path / 'parts')


# Options of train.py

def test_tta_averages_the_logits_of_every_step(image_folder, tmp_path):
    args = train_args(image_folder, tmp_path, '--tta', 3, '-vb', 6, '--epochs', 2, '--opt', 'adamw', '--lr', 0.003)
    result = run_training(args)['results']['classification']
    model = timm.create_model(f"local-dir:{tmp_path / 'run/last'}", pretrained=True).eval()
    x, target = load_images(image_folder, model)
    with torch.no_grad():
        logits = torch.stack(list(model.forward_steps(x))).unflatten(1, (11, 3)).mean(dim=2)
    top1 = (100 * (logits.argmax(dim=2) == target[::3]).double().mean(dim=1)).tolist()
    assert [result[f'eval_top1_step{t}'] for t in (1, 2, 3)] == pytest.approx(top1)
    assert result['eval_top1'] == pytest.approx(top1[2])


STEPS = ', top1_step1, top1_step2, top1_step3'


@pytest.mark.parametrize(('more', 'metric', 'choices'), [
    ([], 'f1', f'loss, top1, top5{STEPS}'),
    ([], 'top1_step4', f'loss, top1, top5{STEPS}'),
    (['--model', 'test_resnet', '--model-kwargs'], 'top1_step1', 'loss, top1, top5'),
    # the first stage trains the backbone on whole images
    (['--recipe', 'gfnet', '--init-local', 'scratch'], 'top1_step3', 'loss, top1, top5'),
    # the first stage trains the localizer, which makes one prediction
    (['--recipe', 'anchornet', '--model', 'test_anchornet_patch', '--img-size', '80', '--model-kwargs', 'patch_size=32',
      '--init-downstream', 'resnet18'], 'top1_step3', 'loss, top1, top5'),
])
def test_a_metric_that_there_is_not_is_refused_before_training(
        image_folder, tmp_path, capsys, more, metric, choices):
    assert train_main(train_args(image_folder, tmp_path, *more, '--eval-metric', metric)) == 1
    error = capsys.readouterr().err
    assert f'--eval-metric {metric}' in error
    assert f'Choose from {choices}.' in error
    assert not list((tmp_path / 'run').rglob('stage.yaml'))  # written when a stage begins


def test_a_step_can_be_what_best_means(image_folder, tmp_path):
    result = run_training(train_args(image_folder, tmp_path, '--eval-metric', 'top1_step2'))['results']
    assert result['classification']['best'] == result['classification']['eval_top1_step2']


@pytest.mark.parametrize(('classes', 'learns'), [
    (3, {'model.local_encoder', 'model.classifier', 'heads.global_aux', 'heads.local_aux'}),
    (10, {'model.local_encoder', 'model.classifier', 'heads.local_aux'}),  # the glance's classifier belongs to it
])
def test_the_log_does_not_name_what_is_frozen_among_what_learns(image_folder, tmp_path, caplog, classes, learns):
    model = timm.create_model('test_gfnet', num_classes=classes, img_size=32, patch_size=16)
    save_pretrained(model, tmp_path / 'start')
    with caplog.at_level('INFO'):
        run_training(train_args(
            image_folder, tmp_path, '--recipe', 'gfnet', '--stage', 'warmup', '--init-from', tmp_path / 'start',
            '--freeze-global', '--num-classes', classes))
    count, names = re.search(r'GlanceFocusTask: ([0-9.]+) M parameters are trained: ([^\n]+)\.', caplog.text).groups()
    assert set(names.split(', ')) == learns
    parts = [model.local_encoder, model.classifier]
    assert float(count) == round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 2)  # heads: 0.000


@pytest.mark.parametrize('workers', [0, 1])
def test_validation_with_random_patches_is_the_same_every_time(image_folder, tmp_path, monkeypatch, workers):
    """So a resumed run has the same figures. A loader's workers took a random number the first time in a process."""
    save_pretrained(
        timm.create_model('test_gfnet', num_classes=3, img_size=32, patch_size=16), tmp_path / 'start')
    results = []

    def fit(trainer, stop):
        results.extend(trainer.evaluate() for _ in range(2))
        raise InterruptedError

    monkeypatch.setattr(Trainer, 'fit', fit)
    with pytest.raises(InterruptedError):
        run_training(train_args(
            image_folder, tmp_path, '--recipe', 'gfnet', '--stage', 'warmup', '--init-from', tmp_path / 'start',
            '--validation-batch-size', 7, '-j', workers))
    assert results[0] == results[1]


# Answers of validate.py

def answers(path):
    rows = list(csv.DictReader(path.open()))
    return rows, [int(row['steps_used']) for row in rows], [int(row['prediction']) for row in rows]


@pytest.mark.parametrize(('family', 'options'), [
    ('dynamic', ['--thresholds', '{median}', '0.36', '0']),
    ('dynamic', ['--thresholds', '{median}', '0.36', '0', '--strict']),
    ('dynamic', ['--budget', '{budget}']),
    ('dynamic', ['--budget', '{budget}', '--calibrate-split', 'half']),
    ('dynamic', ['--budget', '{budget}', '--budget-rule', 'value']),
    ('cascade', ['--confidence', 'all', '--budget', '{budget}', '--calibrate-split', 'half']),
])
def test_saved_predictions_are_those_of_the_exits_asked_for(image_folder, tmp_path, family, options):
    """The file has the images that the row of the table is about, each with its step."""
    folder = {'dynamic': make_dynamic, 'cascade': make_cascade}[family](tmp_path / family)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    args = ['--model', f'local-dir:{folder}', '--data-dir', str(image_folder), '--img-size', '32', '-b', '8', '-j', '0',
            '--device', 'cpu']
    run_validation([*args, '--save-exit-table', str(tmp_path / 'table.safetensors')])
    fresh_accelerate()
    table = ExitTable.load(tmp_path / 'table.safetensors')
    median = table.confidence[:, 0].median().item()  # of an odd number: the confidence of an image
    options = [o.format(median=repr(median), budget=sum(model.step_macs) / model.num_steps / 1e9) for o in options]
    row = run_validation([*args, *options, '--save-predictions', str(tmp_path / 'answers.csv')])[-1]
    rows, steps, predictions = answers(tmp_path / 'answers.csv')
    assert len(rows) == row['images']
    assert [round(steps.count(t) / len(steps), 4) for t in range(1, model.num_steps + 1)] == row['exit_shares']
    correct = sum(prediction == int(r['target']) for prediction, r in zip(predictions, rows))
    assert round(100 * correct / len(rows), 4) == row['top1']
    files = create_dataset('', root=image_folder, split='val').filenames()
    assert [r['file'] for r in rows] == [f for f in files if f in {r['file'] for r in rows}]  # in their order


def test_saved_predictions_are_what_running_the_model_gives(image_folder, tmp_path):
    folder = make_dynamic(tmp_path / 'net')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x, _ = load_images(image_folder, model)
    thresholds = [early_exit(model, x, [0., 0., 0.]).confidence.sort().values[15:17].mean().item(), 9., 0.]
    expected = early_exit(model, x, thresholds)
    assert expected.steps_used.unique().tolist() == [1, 3]
    run_validation([
        '--model', f'local-dir:{folder}', '--data-dir', str(image_folder), '--img-size', '32', '-b', '8', '-j', '0',
        '--device', 'cpu', '--thresholds', *map(str, thresholds), '--save-predictions', str(tmp_path / 'answers.csv')])
    _, steps, predictions = answers(tmp_path / 'answers.csv')
    assert steps == expected.steps_used.tolist()
    assert predictions == expected.logits.argmax(dim=1).tolist()


@pytest.mark.parametrize('options', [
    ['--thresholds', '0.5', '0.5', '0', '--thresholds', '0.4', '0.4', '0'],
    ['--thresholds', '0.5', '0.5', '0', '--budget', '0.001'],
    ['--geometric'], ['--stored-thresholds'], ['--save-budgets', 'x']])
def test_saved_predictions_are_of_one_choice_of_exits(image_folder, tmp_path, capsys, options):
    with pytest.raises(SystemExit):
        run_validation(['--model', 'test_gfnet', '--save-predictions', str(tmp_path / 'answers.csv'), *options])
    assert '--save-predictions writes one prediction per image' in capsys.readouterr().err
