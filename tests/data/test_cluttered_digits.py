import hashlib
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from scipy.ndimage import label
from timm.data import create_loader

from timm_dynamic.data import ClutteredDigits, cluttered_digits


def pixels(dataset, index):
    return np.asarray(dataset[index][0]).astype(np.int64)


def without_digit(monkeypatch):
    monkeypatch.setattr(cluttered_digits, '_draw_digit', lambda rng, size, glyph: np.zeros((size, size), np.int16))


def test_sample():
    dataset = ClutteredDigits()
    image, target = dataset[0]
    assert isinstance(image, Image.Image)
    assert image.mode == 'RGB'
    assert image.size == (96, 96)
    assert type(target) is int
    assert dataset.num_classes == len(dataset.class_to_idx) == 10
    assert dataset.class_to_idx['7'] == 7
    assert [len(ClutteredDigits(split)) for split in ('train', 'val', 'test')] == [6000, 1000, 2000]


# A change of these numbers changes the set, and with it every published result.
@pytest.mark.parametrize(('split', 'seed', 'index', 'target', 'box', 'mean'), [
    ('train', 0, 0, 4, (58, 36, 32, 32), (125.68, 109.75, 123.18)),
    ('train', 0, 5999, 6, (17, 20, 29, 29), (93.47, 123.68, 87.18)),
    ('val', 0, 17, 9, (23, 12, 36, 36), (98.65, 117.4, 95.39)),
    ('test', 0, 1234, 3, (62, 57, 34, 34), (93.25, 109.81, 109.8)),
    ('test', 7, 1, 5, (56, 8, 35, 35), (107.79, 126.2, 100.36)),
])
def test_same_for_everyone(split, seed, index, target, box, mean):
    dataset = ClutteredDigits(split, seed=seed)
    assert dataset[index][1] == target
    assert dataset.box(index) == box
    # A mean, as Pillow may come to round otherwise.
    np.testing.assert_allclose(pixels(dataset, index).mean((0, 1)), mean, atol=.2)


def test_order_and_number_do_not_matter():
    few, many = ClutteredDigits(num_samples=30), ClutteredDigits(num_samples=3000)
    later = [pixels(many, i) for i in range(29, -1, -1)][::-1]
    for i in range(30):
        assert np.array_equal(pixels(few, i), later[i])
        assert few[i][1] == many[i][1]
        assert few.box(i) == many.box(i)


def test_in_another_process():
    code = (
        'import hashlib, sys; from timm_dynamic.data import ClutteredDigits; print("sklearn" in sys.modules);'
        'd = ClutteredDigits("test", seed=3);'
        'print(*(hashlib.sha256(d[i][0].tobytes()).hexdigest() for i in (5, 0, 9)))')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    dataset = ClutteredDigits('test', seed=3)
    expected = [hashlib.sha256(dataset[i][0].tobytes()).hexdigest() for i in (5, 0, 9)]
    assert done.stdout.split() == ['False', *expected]  # False: scikit-learn is not needed to import us


def test_seeds_splits_and_samples_differ():
    images = [
        pixels(ClutteredDigits(split, seed=seed), index)
        for split in ('train', 'val') for seed in (0, 1) for index in (0, 1)]
    for i, a in enumerate(images):
        assert all(np.abs(a - b).mean() > 5 for b in images[:i])


def test_global_generators_are_left_alone():
    def states():
        kind, keys, *rest = np.random.get_state()
        return random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state().tolist()

    before = states()
    first = pixels(ClutteredDigits(), 3)
    assert states() == before
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(first, pixels(ClutteredDigits(), 3))


def test_no_digit_is_in_two_splits():
    sources = [cluttered_digits._load_digits(split).source for split in ('train', 'val', 'test')]
    assert [len(s) for s in sources] == [1197, 300, 300]
    assert sorted(np.concatenate(sources)) == list(range(1797))


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize('seed', [0, 5])
def test_targets_are_right_and_all_digits_take_part(split, seed):
    from sklearn.datasets import load_digits
    dataset = ClutteredDigits(split, seed=seed)
    digits = cluttered_digits._load_digits(split)
    assert np.array_equal(load_digits().target[digits.source[dataset._glyph]], dataset.targets)
    uses = np.bincount(dataset._glyph, minlength=len(digits.glyphs))
    assert uses.min() > 0
    for first, last in zip(digits.first, digits.first[1:]):
        assert np.ptp(uses[first:last]) <= 1


@pytest.mark.parametrize('num_samples', [1, 9, 25, 1000])
def test_classes_are_balanced(num_samples):
    dataset = ClutteredDigits(num_samples=num_samples)
    assert np.ptp(np.bincount(dataset.targets, minlength=10)) <= 1
    assert [dataset[i][1] for i in range(min(num_samples, 25))] == dataset.targets[:25].tolist()


def test_box_holds_the_digit_and_nothing_else(monkeypatch):
    monkeypatch.setattr(cluttered_digits, '_draw_ground', lambda rng, side, *_: np.full((side, side, 3), 100, np.uint8))
    dataset = ClutteredDigits(clutter=4, num_samples=200)
    whole = [pixels(dataset, i) for i in range(200)]
    without_digit(monkeypatch)
    for i in range(200):
        row, col, height, width = dataset.box(i)
        assert 24 <= height == width <= 36
        assert row >= 0
        assert col >= 0
        assert max(row, col) + height <= 96
        clutter = pixels(dataset, i)
        assert (clutter[row:row + height, col:col + width] == 100).all()
        digit = (whole[i] != clutter).any(-1)
        assert digit[row:row + height, col:col + width].sum() > .1 * height * width
        digit[row:row + height, col:col + width] = False
        assert not digit.any()


def test_no_piece_is_as_large_as_a_digit():
    pieces = cluttered_digits._load_digits('train').pieces
    extents = []
    for seed in range(50):
        ink = cluttered_digits._draw_pieces(np.random.default_rng(seed), 96, (0, 0, 16, 16), (28, 28), 4., pieces)
        components, number = label(ink, np.ones((3, 3)))
        assert number > 5
        rows, cols = np.nonzero(components)
        of = components[rows, cols]
        for axis in (rows, cols):
            extents += [np.ptp(axis[of == i]) + 1 for i in range(1, number + 1)]
    # 7 / 16 of the digit, and at most a pixel of the piece more on either side.
    assert max(extents) <= 28 * 9 / 16 + 1


def test_checkerboard_averages_out(monkeypatch):
    glyph = cluttered_digits._load_digits('train').glyphs[200]

    def glance(depth):
        monkeypatch.setattr(cluttered_digits, '_SHALLOW', (depth, depth))
        monkeypatch.setattr(cluttered_digits, '_DEEP', (depth, depth))
        ink = cluttered_digits._draw_digit(np.random.default_rng(0), 24, glyph).astype(np.float64)
        return ink, ink.reshape(8, 3, 8, 3).mean((1, 3))

    (plain, plain_glance), (deep, deep_glance) = glance(0.), glance(1.)
    assert np.abs(deep).sum() > .95 * np.abs(plain).sum()  # as much ink
    assert np.abs(deep_glance).sum() < .25 * np.abs(plain_glance).sum()


def test_clutter_has_its_measure(monkeypatch):
    monkeypatch.setattr(cluttered_digits, '_draw_ground', lambda rng, side, *_: np.full((side, side, 3), 100, np.uint8))
    without_digit(monkeypatch)
    inked = [
        np.mean([(pixels(dataset, i) != 100).any(-1).mean() for i in range(40)])
        for dataset in (ClutteredDigits(clutter=clutter) for clutter in (0, .5, 1, 2))]
    assert inked[0] == 0
    assert inked == sorted(inked)
    assert inked[2] > .05


@pytest.mark.parametrize(('img_size', 'digit_scale'), [(16, (8, 16)), (28, (28, 28)), (50, [8, 8]), (225, (16, 64))])
def test_sizes(img_size, digit_scale):
    dataset = ClutteredDigits('val', img_size=img_size, digit_scale=digit_scale, num_samples=40)
    for i in range(40):
        assert dataset[i][0].size == (img_size, img_size)
        row, col, height, width = dataset.box(i)
        assert digit_scale[0] <= height == width <= digit_scale[1]
        assert max(row, col) + height <= img_size


@pytest.mark.parametrize(('name', 'split'), [
    ('train', 'train'), ('training', 'train'), ('val', 'val'), ('valid', 'val'), ('validation', 'val'), ('eval', 'val'),
    ('evaluation', 'val'), ('test', 'test')])
def test_split_names(name, split):
    assert ClutteredDigits(name).split == split


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(split='holdout'), "no split 'holdout': expected one of train, training, validation, val, .*, test"),
    (dict(split=None), 'no split None'),
    (dict(img_size=35), r'img_size=35 is too small for digit_scale=\(24, 36\): expected at least 36'),
    (dict(img_size=96.), 'img_size=96.0: expected a whole number of at least 1'),
    (dict(digit_scale=(7, 28)), r'digit_scale=\(7, 28\): expected .* at least 8 pixels'),
    (dict(digit_scale=(28, 16)), r'digit_scale=\(28, 16\)'),
    (dict(digit_scale=.2), 'digit_scale=0.2'),
    (dict(digit_scale=(16,)), r'digit_scale=\(16,\)'),
    (dict(clutter=-.1), 'clutter=-0.1: expected a number from 0 to 4'),
    (dict(clutter=float('nan')), 'clutter=nan'),
    (dict(clutter='much'), "clutter='much'"),
    (dict(num_samples=0), 'num_samples=0: expected a whole number of at least 1'),
    (dict(num_samples=True), 'num_samples=True'),
    (dict(seed=-1), 'seed=-1: expected a whole number of at least 0'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClutteredDigits(**arguments)


def test_index():
    dataset = ClutteredDigits(num_samples=4)
    assert len(list(dataset)) == 4
    assert np.array_equal(pixels(dataset, -1), pixels(dataset, 3))
    assert np.array_equal(pixels(dataset, np.int64(2)), pixels(dataset, torch.tensor(2)))
    for take in (dataset.__getitem__, dataset.box, dataset.filename):
        for index in (4, -5):
            with pytest.raises(IndexError):
                take(index)


def test_names():
    dataset = ClutteredDigits('validation', num_samples=130)
    target = dataset[123][1]
    assert dataset.filename(123) == f'val/000123_digit{target}'
    assert dataset.filename(123, basename=True) == f'000123_digit{target}'
    assert dataset.filename(123, absolute=True) == f'val/000123_digit{target}'
    assert dataset.filenames() == [dataset.filename(i) for i in range(130)]
    assert len(set(dataset.filenames(basename=True))) == 130


def test_transforms_and_pickle():
    dataset = ClutteredDigits(transform=np.asarray, target_transform=str)
    image, target = pickle.loads(pickle.dumps(dataset))[7]
    plain = ClutteredDigits()[7]
    assert np.array_equal(image, np.asarray(plain[0]))
    assert target == str(plain[1])


def test_timm_loader_with_workers():
    dataset = ClutteredDigits('test', num_samples=22)
    loader = create_loader(
        dataset, (3, 96, 96), batch_size=8, num_workers=2, use_prefetcher=False, persistent_workers=False,
        pin_memory=False, mean=(0., 0., 0.), std=(1., 1., 1.), crop_pct=1.)
    images, targets = (torch.cat(parts) for parts in zip(*loader))
    assert dataset.transform is not None
    plain = ClutteredDigits('test', num_samples=22)
    assert targets.tolist() == plain.targets.tolist()
    for i in range(22):
        assert np.array_equal(images[i].mul(255).round().permute(1, 2, 0).numpy(), pixels(plain, i))


def test_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    cluttered_digits._load_digits.cache_clear()
    with pytest.raises(ImportError, match=r'pip install timm-dynamic\[demo\]'):
        ClutteredDigits()
