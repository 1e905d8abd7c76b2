"""A family's model is trained with the family's recipe, on images and with a baseline that make sense."""
import csv
import logging
import shutil

import pytest
import timm
import torch
from helpers import fit_classifier

from timm_dynamic.evaluation import validate_main
from timm_dynamic.evaluation.metrics import is_better_than_chance
from timm_dynamic.launch.settings import TrainOptions
from timm_dynamic.task import create_recipe
from timm_dynamic.training import run_training, train_main
from timm_dynamic.training.run_folder import CheckpointManager
from timm_dynamic.utils import save_pretrained


def recipe(*argv, demo=False, num_classes=1000):
    """Recipe of a command line, and the options of its last stage."""
    options = TrainOptions([*argv])
    options.set_num_classes(num_classes)
    model = None
    if not argv[1].startswith('focusnet') and 'resnet18' not in argv[1]:
        with torch.device('meta'):
            model = timm.create_model(argv[1])
    made = create_recipe(options.base, demo, model)
    return made, options.for_stage(made.stages[-1])


def run_args(images, out, *more):
    return [
        '--data-dir', str(images), '--img-size', '32', '--device', 'cpu', '-b', '8', '--epochs', '1', '-j', '0',
        '--output', str(out), '--experiment', 'run', *map(str, more)]


@pytest.fixture(scope='module')
def good(image_folder, tmp_path_factory):
    """A baseline that is better than chance."""
    torch.manual_seed(1)
    model = timm.create_model('test_focusnet', num_classes=3)
    fit_classifier(model, image_folder)
    folder = tmp_path_factory.mktemp('good')
    save_pretrained(model, folder)
    return folder


@pytest.mark.parametrize(('name', 'baseline'), [
    ('focusnet_resnet18', 'resnet18.tv_in1k'), ('focusnet_resnet34', 'resnet34.tv_in1k')])
def test_a_focusnet_takes_the_papers_recipe_and_baseline(name, baseline):
    made, args = recipe('--model', name)
    assert (made.name, [s.name for s in made.stages]) == ('focusnet', ['focus'])
    assert made.references == {'baseline (frozen)': baseline}
    assert (args.focus_baseline, args.epochs, args.sched) == (baseline, 90, 'step')
    assert recipe('--model', name, '--focus-baseline', 'x')[1].focus_baseline == 'x'
    assert recipe('--model', name, '--recipe', 'classification')[0].name == 'classification'
    assert recipe('--model', 'resnet18')[0].name == 'classification'


def test_a_focusnet_on_the_demo_set_trains_its_baseline_first():
    made, args = recipe('--model', 'test_focusnet', demo=True, num_classes=10)
    assert [s.name for s in made.stages] == ['baseline', 'focus']
    assert args.focus_baseline == 'scratch'


@pytest.mark.parametrize(('name', 'num_classes', 'named'), [
    ('focusnet_resnet18', 3, 'a baseline with 3 classes, but that of the paper, resnet18.tv_in1k, has 1000. Add'),
    ('focusnet_mobilenetv2_100', 1000, r'--focus-baseline FILE \(the paper.s is baseline_mobilenet_v2_model_best'),
    ('test_focusnet', 3, r'--focus-baseline MODEL \(e\.g\. resnet18\.tv_in1k\)'),
])
def test_without_a_baseline_one_sentence_says_what_to_add(name, num_classes, named):
    with pytest.raises(ValueError, match=f'{named}.*--focus-baseline scratch .*--recipe classification'):
        recipe('--model', name, num_classes=num_classes)


def test_an_exported_focusnet_takes_the_recipe(image_folder, tmp_path, capsys):
    save_pretrained(timm.create_model('test_focusnet', num_classes=3), tmp_path / 'net')
    assert train_main(run_args(image_folder, tmp_path, '--model', f'local-dir:{tmp_path / "net"}')) == 1
    assert 'The recipe focusnet needs a baseline' in capsys.readouterr().err


def test_an_anchornet_alone_takes_the_recipe_of_the_localizer(image_folder, tmp_path):
    made, args = recipe('--model', 'anchornet')
    assert (made.name, [s.name for s in made.stages]) == ('anchornet', ['localizer'])
    assert (args.epochs, args.sched, args.lr_base, args.weight_decay, args.smoothing) == (100, 'step', 0.1, 1e-4, 0.)
    assert recipe('--model', 'anchornet', '--recipe', 'classification')[0].name == 'classification'
    with pytest.raises(ValueError, match='--init-downstream is for the nets'):
        recipe('--model', 'anchornet', '--init-downstream', 'x')
    result = run_training(run_args(image_folder, tmp_path, '--model', 'anchornet', '--img-size', '112'))
    assert list(result['results']) == ['localizer']


def test_the_baselines_accuracy_is_shown_before_training(good, image_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        result = run_training(run_args(image_folder, tmp_path, '--model', 'test_focusnet', '--focus-baseline', good))
    top1 = next(row['top1'] for row in result['table'] if row['model'] == 'baseline (frozen)')
    lines = [r.message for r in caplog.records]
    shown = next(i for i, line in enumerate(lines) if line.startswith('Baseline '))
    assert f'on validation (33 images), before training: top1 {top1:.3f}, top5 100.000' in lines[shown]
    assert shown < next(i for i, line in enumerate(lines) if line.startswith('focus: epoch 0 update'))


def test_a_baseline_no_better_than_chance_stops_the_run(image_folder, tmp_path, capsys):
    model = timm.create_model('test_focusnet', num_classes=3)
    with torch.no_grad():
        model.fc.weight.zero_()  # always the same class
    save_pretrained(model, tmp_path / 'bad')
    more = ['--model', 'test_focusnet', '--focus-baseline', tmp_path / 'bad']
    assert train_main(run_args(image_folder, tmp_path, *more)) == 1
    error = capsys.readouterr().err.strip()
    assert 'classifies 11 of 33 images of validation correctly. With 3 classes this is no better than chance' in error
    assert not (tmp_path / 'run' / 'last').exists()


def test_the_baseline_is_not_checked_without_validation(image_folder, tmp_path, caplog):
    save_pretrained(timm.create_model('test_focusnet', num_classes=3), tmp_path / 'bad')
    more = ['--model', 'test_focusnet', '--focus-baseline', tmp_path / 'bad', '--val-split', '']
    with caplog.at_level(logging.INFO):
        run_training(run_args(image_folder, tmp_path, *more))
    assert 'is not checked: no validation split' in caplog.text


@pytest.mark.parametrize(('correct', 'images', 'num_classes', 'better'), [
    # The mean of 50000 guesses among 1000 classes is 50, their standard deviation 7.
    (50, 50000, 1000, False), (66, 50000, 1000, False), (68, 50000, 1000, True), (34880, 50000, 1000, True),
    # P(X >= 9 of 10) = 11 / 1024 with two classes, P(X = 10) = 1 / 1024.
    (9, 10, 2, False), (10, 10, 2, True), (0, 10, 2, False),
    # Even 6 of 6 happens by chance with a probability of 1 / 64: nothing can be said.
    (6, 6, 2, True), (0, 6, 2, True), (5, 5, 1, True),
])
def test_is_better_than_chance(correct, images, num_classes, better):
    assert is_better_than_chance(correct, images, num_classes) == better


def test_a_baseline_that_is_gone_at_the_end_does_not_cost_the_results(good, image_folder, tmp_path, capsys):
    shutil.copytree(good, tmp_path / 'good')
    args = run_args(image_folder, tmp_path, '--model', 'test_focusnet', '--focus-baseline', tmp_path / 'good')
    run_training(args)
    (tmp_path / 'good' / 'model.safetensors').unlink()
    assert train_main([*args, '--resume', 'auto']) == 1
    lost, kept = csv.DictReader((tmp_path / 'run' / 'results.csv').open())
    assert (lost['model'], lost['top1'], bool(lost['error'])) == ('baseline (frozen)', '', True)
    assert (kept['model'], bool(kept['top1']), kept['error']) == ('focus net', True, '')


@pytest.mark.parametrize('absent', ['resnet81', 'resnet18.tv_in1k', 'local-dir:/nowhere'])
def test_a_compared_model_that_is_not_available_does_not_cost_the_results(good, image_folder, tmp_path, absent, caplog):
    file = tmp_path / 'results.csv'
    more = ['--compare', absent, f'local-dir:{good}', '--results-file', str(file)]
    with caplog.at_level(logging.INFO):
        assert validate_main([
            '--model', f'local-dir:{good}', '--data-dir', str(image_folder), '-j', '0', '--device', 'cpu', *more]) == 1
    first, failed, last = csv.DictReader(file.open())
    assert (failed['model'], failed['top1'], bool(failed['error'])) == (absent, '', True)
    assert first['top1'] == last['top1'] != ''
    assert f'{absent} failed: ' in caplog.text
    assert f"{float(first['top1']):.3f}" in caplog.records[-1].message  # the table


def test_the_log_says_how_a_learning_rate_is_scaled(good, image_folder, tmp_path, caplog):
    more = ['--model', 'test_focusnet', '--focus-baseline', good, '--focus-plain']
    with caplog.at_level(logging.INFO):
        run_training(run_args(image_folder, tmp_path, *more, '--stage-args', 'plain.lr=0.01'))
    line, = [r.message for r in caplog.records if 'scaled' in r.message]  # --lr is not scaled
    assert line == (
        'focus: learning rate 0.003125, scaled (linear) from --lr-base 0.1 for batches of 256 images to batches of 8')


@pytest.mark.parametrize(('name', 'size', 'tiny'), [
    ('gfnet_resnet50_96', 224, 'test_gfnet'), ('gfnet_efficientnet_b3_144', 300, 'test_gfnet'),
    ('anchornet_patch_densenet201_95', 224, 'test_anchornet_patch'), ('anchornet', 224, 'test_anchornet_patch')])
def test_demo_images_have_the_size_that_a_model_is_made_for(name, size, tiny, caplog):
    made, args = recipe('--model', name, demo=True, num_classes=10)
    assert args.img_size == size
    assert {stage.defaults['img_size'] for stage in made.stages} == {size}
    assert f'{name} is large for the demo: its images have {size} pixels' in caplog.text
    assert f'--model {tiny}' in caplog.text


@pytest.mark.parametrize('name', ['test_gfnet', 'test_anchornet_patch'])
def test_demo_images_of_the_tiny_models(name, caplog):
    assert recipe('--model', name, demo=True, num_classes=10)[1].img_size == 96
    assert not caplog.text


@pytest.mark.parametrize('more', [
    ['--model', 'gfnet_resnet50_96', '--img-size', '96'],
    ['--model', 'test_gfnet', '--img-size', '48'],
])
def test_patches_as_large_as_the_image_are_an_error(tmp_path, capsys, more):
    assert train_main([*more, '--device', 'cpu', '--output', str(tmp_path)]) == 1
    assert 'patches must be smaller than images' in capsys.readouterr().err


def test_resume_from_a_training_file_of_the_focusnet_authors(good, image_folder, tmp_path):
    """It has the number of finished epochs, where timm has that of the last epoch."""
    model = timm.create_model('test_focusnet', num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1.5e-4)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    file = tmp_path / 'clonalnet_model_best.pth.tar'
    torch.save({
        'epoch': 2, 'arch': 'resnet18', 'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()},
        'best_acc1': torch.tensor(50.), 'optimizer': optimizer.state_dict()}, file)
    more = ['--model', 'test_focusnet', '--focus-baseline', good, '--epochs', '3', '--resume', file]
    run_training(run_args(image_folder, tmp_path, *more))
    row, = csv.DictReader((tmp_path / 'run' / 'summary.csv').open())
    assert (row['epoch'], float(row['lr'])) == ('2', pytest.approx(0.1 * 8 / 256))  # the rate is that of the schedule
    group, = CheckpointManager(tmp_path / 'run' / 'state').load()['optimizer']['param_groups']
    assert group['weight_decay'] == 1.5e-4  # of the file


@pytest.mark.parametrize(('content', 'named'), [
    ({'model_prime_state_dict': {}, 'model_state_dict': {}, 'epoch': 3}, '--init-from FILE --stage NAME'),
    ({'net': {}, 'epoch': 3, 'optimizer': {}}, '--initial-checkpoint FILE --stage NAME'),
])
def test_training_files_that_cannot_be_continued(image_folder, tmp_path, capsys, content, named):
    torch.save(content, tmp_path / 'authors.pth.tar')
    more = ['--model', 'test_focusnet', '--recipe', 'classification', '--resume', tmp_path / 'authors.pth.tar']
    assert train_main(run_args(image_folder, tmp_path, *more)) == 1
    assert named in capsys.readouterr().err


def test_an_optimizer_that_does_not_fit_is_named(image_folder, tmp_path, capsys):
    model = timm.create_model('test_focusnet', num_classes=3)
    optimizer = torch.optim.SGD([model.fc.weight], lr=0.1)
    torch.save({'epoch': 1, 'state_dict': model.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'x.pth')
    more = ['--model', 'test_focusnet', '--recipe', 'classification', '--resume', tmp_path / 'x.pth']
    assert train_main(run_args(image_folder, tmp_path, *more)) == 1
    assert '--no-resume-opt continues without it' in capsys.readouterr().err
