"""The classes of a folder are matched to those of a model by their names."""
import importlib
import io
import logging
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import SHARED, make_images
from PIL import Image
from timm.data import ImageNetInfo

from timm_dynamic.data import create_dataset, match_classes, model_class_to_idx
from timm_dynamic.evaluation.model_evaluator import ModelEvaluator
from timm_dynamic.evaluation.validate import run_validation
from timm_dynamic.launch.accelerator import create_accelerator
from timm_dynamic.launch.options import create_validate_parser
from timm_dynamic.training.run import run_training
from timm_dynamic.utils import save_pretrained

DIGITS = [str(i) for i in range(10)]
REAL = SHARED / 'real'


def validate(*argv):
    return run_validation([*map(str, argv), '--device', 'cpu', '-j', '0', '-b', '50'])


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A model of ten named classes, and images of nine of them as files."""
    folder = tmp_path_factory.mktemp('digits')
    save_pretrained(timm.create_model('test_focusnet', pretrained=True), folder / 'model', label_names=DIGITS)
    data = create_dataset('cluttered_digits', split='test', img_size=96, num_samples=200)
    for i in range(len(data)):
        image, target = data[i]
        if target:
            path = folder / 'nine' / 'val' / str(int(target))
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f'{i}.png')
    (folder / 'map.txt').write_text('\n'.join(DIGITS))
    return folder


def test_nine_of_ten_classes(digits, caplog):
    caplog.set_level(logging.INFO, logger='timm_dynamic')
    model = f'local-dir:{digits / "model"}'
    args = ['--data-dir', digits / 'nine']
    known = validate('--model', model, *args, '--class-map', digits / 'map.txt')[0]['top1']
    assert 'matched by their names' not in caplog.text
    assert known > 80
    rows = validate('--model', model, *args, '--compare', model)
    assert [row['top1'] for row in rows] == [known, known]
    assert caplog.text.count("data has 9 of the model's 10 classes, matched by their names.") == 2


def test_names_that_do_not_match(digits, tmp_path, caplog):
    shutil.copytree(digits / 'nine', tmp_path / 'data')
    model, val = f'local-dir:{digits / "model"}', tmp_path / 'data/val'
    (val / '5').rename(val / 'five')
    with pytest.raises(ValueError, match="9 classes, and 8 of them are among the model's 10, but not 'five'"):
        validate('--model', model, '--data-dir', tmp_path / 'data')
    for name in ('1', '2', '3', '4', '6', '7', '8', '9'):
        (val / name).rename(val / f'digit {name}')
    validate('--model', model, '--data-dir', tmp_path / 'data')
    assert "data has 9 classes (e.g. 'digit 1'), the model has 10 (e.g. '0')" in caplog.text
    assert '--class-map' in caplog.text


def test_a_model_without_names(tmp_path, caplog):
    make_images(tmp_path, {'val': 2})
    validate('--model', 'test_resnet', '--num-classes', 3, '--checkpoint', save(tmp_path, 3), '--data-dir', tmp_path)
    assert not caplog.text
    validate('--model', 'test_resnet', '--num-classes', 5, '--checkpoint', save(tmp_path, 5), '--data-dir', tmp_path)
    assert "has 3 classes (e.g. 'class0'), the model has 5, whose names are not known" in caplog.text


def save(folder, num_classes):
    torch.save(timm.create_model('test_resnet', num_classes=num_classes).state_dict(), folder / 'weights.pth')
    return folder / 'weights.pth'


@pytest.mark.parametrize(('num_classes', 'subset'), [
    (1000, 'imagenet-1k'), (11821, 'imagenet-12k'), (21841, 'imagenet-22k')])
def test_synsets_of_imagenet(num_classes, subset):
    synsets = ImageNetInfo(subset).label_names()
    names = model_class_to_idx(None, num_classes)
    chosen = sorted(synsets[::7])
    match = match_classes({name: i for i, name in enumerate(chosen)}, names, num_classes, "'val'")
    assert [match(i) for i in range(len(chosen))] == [synsets.index(name) for name in chosen]
    assert match([2, 0]) == [synsets.index(chosen[2]), synsets.index(chosen[0])]
    assert match_classes(dict(names), names, num_classes, "'val'") is None
    assert model_class_to_idx(None, 10) is None


def test_training_on_some_imagenet_classes_keeps_their_indices(tmp_path, caplog):
    """Else a 1000-class model would be trained with other indices than it is validated with."""
    caplog.set_level(logging.INFO, logger='timm_dynamic')
    images = make_images(tmp_path / 'images', {'train': 4, 'val': 2})
    synsets = ImageNetInfo().label_names()
    for split in ('train', 'val'):
        for i, name in enumerate((synsets[7], synsets[340], synsets[999])):
            (images / split / f'class{i}').rename(images / split / name)
    run_training([
        '--model', 'test_resnet', '--num-classes', '1000', '--img-size', '32', '--data-dir', str(images), '--device',
        'cpu', '-b', '4', '-j', '0', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'run'])
    assert "The training data has 3 of the model's 1000 classes, matched by their names." in caplog.text
    assert '--num-classes 1000: the data has 3 classes' in caplog.text
    model = timm.create_model(f'local-dir:{tmp_path / "run/best"}')
    assert model.pretrained_cfg['label_names'] == synsets


@pytest.mark.skipif(not REAL.is_dir(), reason='needs the photographs and weights in ../shared/real')
def test_photographs_in_430_folders_named_by_synset(tmp_path, monkeypatch, caplog):
    """A network with ImageNet weights that were published: its accuracy is that by the known labels."""
    caplog.set_level(logging.INFO, logger='timm_dynamic')
    monkeypatch.syspath_prepend(REAL)
    net = importlib.import_module('load').imagenet_net('mobilenetv1_050_160')
    packed, synsets = np.load(REAL / 'nips17_299.npz'), ImageNetInfo().label_names()
    blob, offsets, labels = packed['blob'], packed['offsets'], packed['labels'].tolist()
    size = ['--img-size', '160', '--crop-pct', '1', '--mean', '0.5', '--std', '0.5', '--interpolation', 'bicubic']
    for i, label in enumerate(labels):
        path = tmp_path / 'val' / synsets[label] / f'{i:04d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob[offsets[i]:offsets[i + 1]].tobytes())
    assert len(list((tmp_path / 'val').iterdir())) == 430
    args = create_validate_parser().parse_args(
        ['--model', 'mobilenetv1_100', '--data-dir', str(tmp_path), *size, '--device', 'cpu', '-b', '100', '-j', '0'])
    args.split = 'validation'
    row = ModelEvaluator(net, 'mobilenetv1_050_160', args, create_accelerator(args)).run().row

    transform = timm.data.create_transform(
        (3, 160, 160), crop_pct=1., mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic')
    correct = 0
    with torch.no_grad():
        for first in range(0, 1000, 100):
            images = [Image.open(io.BytesIO(blob[offsets[i]:offsets[i + 1]].tobytes())).convert('RGB')
                      for i in range(first, first + 100)]
            top1 = net(torch.stack([transform(image) for image in images])).argmax(dim=1).tolist()
            correct += sum(a == b for a, b in zip(top1, labels[first:first + 100]))
    assert row['top1'] == correct / 10
    assert row['top1'] > 60
    assert "has 430 of the model's 1000 classes, matched by their names" in caplog.text
