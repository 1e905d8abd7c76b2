import pytest
import torch

from timm_dynamic.data import FoldMap, fold_names


@pytest.fixture
def folder(tmp_path):
    """The layout of the CLCNet authors: ten folds of one image each, in folders of classes."""
    for k in range(1, 11):
        path = tmp_path / f'folds/split_part_{k}/n0{k % 2}/val_{k}.JPEG'
        path.parent.mkdir(parents=True)
        path.touch()
    (tmp_path / 'folds/split_part_1/.hidden').touch()
    (tmp_path / 'folds/.cache').mkdir()
    (tmp_path / 'folds/.cache/a.txt').touch()
    (tmp_path / 'folds/labels.txt').touch()
    return tmp_path / 'folds'


def test_folders_in_natural_order(folder):
    folds = FoldMap.read(folder)
    assert folds.num_folds == 10
    names = ['n00/val_2.JPEG', 'val_10.JPEG', 'data/val/n01/val_9.JPEG', '/abs/n01/val_1.JPEG', 'n00\\val_4.JPEG']
    assert folds.folds_of(names).tolist() == [1, 9, 8, 0, 3]


def test_only_whole_ends_count(folder):
    names = ['n09/val_1.JPEG', 'l_1.JPEG', '1.JPEG', 'val_1.JPEG/n01', 'n01', '']
    assert FoldMap.read(folder).folds_of(names).tolist() == [-1] * 6


def test_bare_names_match_folders_of_classes():
    folds = FoldMap([['1.jpg'], ['2.jpg', 'sub/3.jpg']])
    assert folds.folds_of(['n01/1.jpg', 'n02/1.jpg', '2.jpg', 'sub/3.jpg', '3.jpg', 'other/3.jpg']).tolist() == [
        0, 0, 1, 1, 1, -1]


def test_names_that_repeat():
    folds = FoldMap([['a/1.jpg', 'a/2.jpg', '9.jpg'], ['b/1.jpg', 'a/2.jpg', 'b/9.jpg']])
    assert folds.folds_of(['a/1.jpg', 'x/b/1.jpg', '9.jpg']).tolist() == [0, 1, 0]  # the same name is nearest
    for name in ('1.jpg', 'a/2.jpg'):
        with pytest.raises(ValueError, match=rf"'{name}' \(and 0 others\) is in several folds"):
            folds.folds_of(['a/1.jpg', name])


def test_saved_and_read(tmp_path):
    names = ['a/1.jpg', 'b/1.jpg', 'c,"d.png', 'Ä.png', 'a/1.jpg']
    of = torch.tensor([2, 0, 1, 0, 2])
    FoldMap(fold_names(names, of)).save(tmp_path / 'folds.csv')
    lines = (tmp_path / 'folds.csv').read_text(encoding='utf-8').splitlines()
    assert lines[:3] == ['file,fold', 'b/1.jpg,1', 'Ä.png,1']
    assert torch.equal(FoldMap.read(tmp_path / 'folds.csv').folds_of(names), of)


@pytest.mark.parametrize(('text', 'message'), [
    ('', 'at least two folds and images in each, got 0'),
    ('file,fold\na,1\n', 'at least two folds and images in each, got 1'),
    ('file,fold\na,1\nb,3\n', 'the highest fold is 3, but only 2 folds have images'),
    ('file,fold\na,1\nb,99999999999\n', 'the highest fold is 99999999999, but only 2'),
    ('file,fold\na,1\nb,0\n', 'line 3 has no file name, or no fold number'),
    ('file,fold\n' + 'x' * 200_000, 'field larger than'),
    ('a,1\nb,2\n', 'line 2 has no file name, or no fold number'),
])
def test_bad_files(tmp_path, text, message):
    (tmp_path / 'folds.csv').write_text(text)
    with pytest.raises(ValueError, match=message):
        FoldMap.read(tmp_path / 'folds.csv')


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match=r"There are no folds at '.*missing': No such file or directory"):
        FoldMap.read(tmp_path / 'missing')
    with pytest.raises(ValueError, match='with one sub-folder of images for each fold'):
        FoldMap.read(tmp_path)
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b/1.jpg').touch()
    with pytest.raises(ValueError, match=r'got 2, empty: \[1\]'):
        FoldMap.read(tmp_path)
