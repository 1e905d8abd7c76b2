"""train.py takes the number of classes from the data, and does not validate on the images it trains on."""
import logging

import pytest
import timm
from helpers import make_images

from timm_dynamic.training.run import main as train_main
from timm_dynamic.training.run import run_training
from timm_dynamic.utils import save_pretrained

MODELS = {
    'static': ['--model', 'test_resnet'],
    'focusnet': ['--model', 'test_focusnet', '--focus-baseline', 'scratch', '--focus-plain', '--stage-args',
                 'baseline.epochs=3', 'baseline.lr=0.05'],
    'gfnet': ['--model', 'test_gfnet', '--model-kwargs', 'patch_size=16', '--init-local', 'scratch'],
    'clcnet': ['--model', 'test_clcnet', '--init-members', 'scratch', '--folds', '2'],
}


def args(images, out, *more):
    return [
        '--img-size', '48', '--data-dir', str(images), '--device', 'cpu', '-b', '8', '--epochs', '1', '-j', '0',
        '--output', str(out), '--experiment', 'run', *map(str, more)]


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger='timm_dynamic')
    return caplog


@pytest.mark.parametrize('family', MODELS)
def test_every_stage_has_the_classes_of_the_data(image_folder, tmp_path, log, family):
    run_training(args(image_folder, tmp_path, *MODELS[family]))
    assert log.text.count('3 classes, from the data.') == 1
    folders = [path.parent for path in (tmp_path / 'run').rglob('best/config.json')]
    assert len(folders) == {'static': 1, 'focusnet': 3, 'gfnet': 4, 'clcnet': 3}[family]
    for folder in folders:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert model.num_classes == 3
        assert model.pretrained_cfg['label_names'] == ['class0', 'class1', 'class2']


def test_a_baseline_or_members_of_other_classes(image_folder, tmp_path, capsys):
    """Without --num-classes, these would have been 1000-class models of three classes."""
    save_pretrained(timm.create_model('test_focusnet', num_classes=1000), tmp_path / 'base')
    more = ['--model', 'test_focusnet', '--focus-baseline', tmp_path / 'base']
    assert train_main(args(image_folder, tmp_path, *more)) == 1
    assert 'has 1000 classes, the focus net has 3' in capsys.readouterr().err
    assert train_main(args(image_folder, tmp_path, '--model', 'clcnet', '--model-kwargs',
                           "models=['resnet18','resnet34']", '--init-members', 'pretrained')) == 1
    assert 'have 1000 classes, the cascade has 3' in capsys.readouterr().err


def test_a_number_that_is_not_that_of_the_data(image_folder, tmp_path, log, capsys):
    small = [*MODELS['static'], '--num-classes', '2']
    assert train_main(args(image_folder, tmp_path, *small)) == 1
    assert '--num-classes 2: the data has 3 classes. Give at least 3, or omit it.' in capsys.readouterr().err
    run_training(args(image_folder, tmp_path, *MODELS['static'], '--num-classes', '5'))
    assert log.text.count('--num-classes 5: the data has 3 classes, the others have no images.') == 1
    assert 'may be wrong' not in log.text  # the model knows the names of its first three classes
    model = timm.create_model(f'local-dir:{tmp_path / "run/best"}')
    assert (model.num_classes, model.pretrained_cfg['label_names']) == (5, ['class0', 'class1', 'class2'])


def test_the_demo_set_and_config_files(tmp_path, log):
    (tmp_path / 'args.yaml').write_text('num_classes: null\n')  # timm writes every option
    run_training([
        '--model', 'test_resnet', '--config', str(tmp_path / 'args.yaml'), '--train-num-samples', '16',
        '--val-num-samples', '8', '--img-size', '48', '-b', '8', '-j', '0', '--epochs', '1', '--device', 'cpu',
        '--test-split', 'val', '--output', str(tmp_path), '--experiment', 'run'])
    assert '10 classes, from the data.' in log.text
    assert timm.create_model(f'local-dir:{tmp_path / "run/best"}').num_classes == 10


def test_a_class_that_validation_lacks(tmp_path, log):
    """Without class0, the folder's indices are not those of training."""
    images = make_images(tmp_path / 'images', {'train': 8, 'val': 4})
    for path in (images / 'val/class0').iterdir():
        path.unlink()
    run_training(args(images, tmp_path, *MODELS['static']))
    assert "The 'validation' data has 2 of the model's 3 classes, matched by their names." in log.text


def test_the_same_images_for_training_and_validation(image_folder, tmp_path, log, capsys):
    plain = image_folder / 'val'
    assert train_main(args(plain, tmp_path, *MODELS['static'])) == 1
    assert 'has no splits: training and validation would use the same images' in capsys.readouterr().err
    run_training(args(plain, tmp_path, *MODELS['static'], '--val-split', 'train'))
    assert "Training and validation use the same images: --val-split is 'train'." in log.text


@pytest.mark.parametrize(('kept', 'message'), [
    ('val', "There is no split 'train' at"), ('train', "There is no split 'validation' at")])
def test_a_folder_with_one_split(tmp_path, capsys, kept, message):
    images = make_images(tmp_path / 'images', {kept: 8})
    assert train_main(args(images, tmp_path, *MODELS['static'])) == 1
    assert message in capsys.readouterr().err
