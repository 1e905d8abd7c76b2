"""Which folder is a split, and that a missing split is an error."""
import shutil
import tarfile

import pytest
from helpers import make_images

from timm_dynamic.data import create_dataset, find_split


@pytest.fixture
def folder(tmp_path):
    """Makes folders, with an image in each."""
    def make(*paths):
        make_images(tmp_path / 'one', {'split': 1}, classes=1)
        for path in paths:
            (tmp_path / 'data' / path).mkdir(parents=True)
            shutil.copy(tmp_path / 'one/split/class0/000.png', tmp_path / 'data' / path / 'a.png')
        return str(tmp_path / 'data')
    return make


@pytest.mark.parametrize(('folders', 'split', 'found'), [
    (['train/a', 'train/b', 'val/a', 'val/b'], 'train', 'train'),
    (['train/a', 'train/b', 'val/a', 'val/b'], 'validation', 'val'),
    (['training/a', 'eval/a'], 'train', 'training'),
    (['training/a', 'eval/a', 'valid/a'], 'valid', 'valid'),
    (['train/a', 'test'], 'test', 'test'),  # images without labels, to predict
    (['train/a', 'holdout/a'], 'holdout', 'holdout'),
    (['train/a', 'train/b', 'raw'], 'train[10%:]', 'train'),
    (['a', 'b'], 'validation', ''),
    (['a', 'b'], 'train', ''),
    (['bus', 'car', 'train'], 'train', ''),  # classes
    (['bus', 'test', 'train'], 'validation', ''),
])
def test_a_split_is_found(folder, folders, split, found):
    root = folder(*folders)
    assert find_split(root, split) == (f'{root}/{found}' if found else root)


@pytest.mark.parametrize(('folders', 'split', 'message'), [
    (['val/a', 'val/b'], 'train', "no split 'train' at '.*', which has val"),
    (['train/a', 'train/b'], 'validation', "no split 'validation' at '.*', which has train"),
    (['train/a', 'train/b'], 'val', "no split 'val' at '.*', which has train"),
    (['train/a', 'val/a'], 'test', "no split 'test' at '.*', which has train, val"),
    (['test/a', 'test/b'], 'train', "no split 'train' at '.*', which has test"),
    (['val/a', 'val/b'], 'nosuch', "no split 'nosuch' at '.*', which has val"),
    (['a', 'b'], 'nosuch', "no split 'nosuch' at '.*', which has no splits"),
    (['a', 'b'], 'test', "no split 'test' at '.*', which has no splits"),
])
def test_a_missing_split_is_an_error(folder, folders, split, message):
    root = folder(*folders)
    for name in ('', 'torch/folder'):
        with pytest.raises(ValueError, match=message):
            create_dataset(name, root=root, split=split)


def test_splits_of_tar_files_and_of_torchvision(folder, tmp_path):
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        tar.add(folder('a', 'b'), arcname='')
    assert len(create_dataset('', root=str(tmp_path / 'data.tar'), split='validation')) == 2
    with pytest.raises(ValueError, match=r"no split 'nosuch' at '.*data.tar', which has no splits"):
        create_dataset('', root=str(tmp_path / 'data.tar'), split='nosuch')
    with pytest.raises(ValueError, match="no split 'nosuch' of torch/cifar10, which has train and test"):
        create_dataset('torch/cifar10', root=str(tmp_path), split='nosuch')


def test_classes_called_like_splits_are_read(folder):
    dataset = create_dataset('', root=folder('bus', 'car', 'train'), split='train')
    assert dataset.reader.class_to_idx == {'bus': 0, 'car': 1, 'train': 2}
