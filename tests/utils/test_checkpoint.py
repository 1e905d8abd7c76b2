import argparse
import pickle
import random
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_dynamic.utils import CheckpointError, load_weights, read_checkpoint, read_state_dict


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


@pytest.fixture(scope='module')
def model():
    return timm.create_model('test_resnet', num_classes=6)


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    marker, file = tmp_path / 'executed', tmp_path / 'evil.pth.tar'
    torch.save({'state_dict': {'fc.weight': torch.zeros(1)}, 'args': Evil(marker)}, file)
    with pytest.raises(CheckpointError, match=r'evil.pth.tar.*code to be run.*refused'):
        read_checkpoint(file)
    bare = tmp_path / 'bare.pth'
    bare.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(CheckpointError):
        read_checkpoint(bare)
    assert not marker.exists()


def test_numbers_of_numpy_and_namespaces_are_let_in(tmp_path):
    file = tmp_path / 'a.pth.tar'
    torch.save({'best': np.float64(70.4), 'flops': [np.float32(1.5)], 'rows': np.arange(6.).reshape(2, 3),
                'args': argparse.Namespace(lr=0.1), 'state_dict': {'w': torch.ones(2)}}, file)
    checkpoint = read_checkpoint(file)
    assert checkpoint['best'] == 70.4
    assert checkpoint['rows'].shape == (2, 3)
    assert read_state_dict(file)['w'].tolist() == [1, 1]


@pytest.mark.parametrize('suffix', ['pth.tar', 'safetensors'])
@pytest.mark.parametrize('keep', [0, 10, 0.5, 0.999])
def test_truncated_file(tmp_path, model, suffix, keep):
    file = tmp_path / f'model.{suffix}'
    if suffix == 'safetensors':
        save_file(model.state_dict(), file)
    else:
        torch.save({'state_dict': model.state_dict()}, file)
    size = file.stat().st_size
    with open(file, 'rb+') as f:
        f.truncate(keep if keep > 1 else int(size * keep))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf'model.{suffix}.*bytes\): truncated'):
        load_weights(model, file)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match='No checkpoint at'):
        read_checkpoint(tmp_path / 'nowhere.pth')
    with pytest.raises(CheckpointError, match='holds no weights'):
        read_checkpoint(tmp_path)
    file = tmp_path / 'list.pth'
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match='expected tensors by name, found list'):
        read_state_dict(file)
    text = tmp_path / 'text.pth'
    text.write_text('not a checkpoint')
    with pytest.raises(CheckpointError, match='truncated, or no checkpoint'):
        read_checkpoint(text)


def test_folder(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / 'only.pth')
    assert read_state_dict(tmp_path).keys() == model.state_dict().keys()
    torch.save(model.state_dict(), tmp_path / 'second.pth')
    with pytest.raises(CheckpointError, match=r'several .pth files \(only.pth, second.pth\)'):
        read_state_dict(tmp_path)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    assert read_state_dict(tmp_path).keys() == model.state_dict().keys()


def test_averaged_weights_are_preferred(tmp_path):
    file = tmp_path / 'a.pth'
    torch.save({'state_dict': {'w': torch.zeros(1)}, 'state_dict_ema': {'module.w': torch.ones(1)}}, file)
    assert read_state_dict(file)['w'] == 1
    assert read_state_dict(file, use_ema=False)['w'] == 0


def test_all_or_nothing(model):
    state = {k: v + 1 for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del state['conv1.weight' if 'conv1.weight' in state else next(iter(state))]
    state['extra.weight'] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"1 keys are missing.*1 are unexpected \(first: 'extra.weight'\)"):
        load_weights(model, state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_other_classes_fit_only_if_adapted(model):
    source = timm.create_model('test_resnet', num_classes=9)
    with pytest.raises(CheckpointError, match=r"'fc.weight' \(9, \d+\) instead of \(6, \d+\)"):
        load_weights(model, source.state_dict())
    head = model.fc.weight.clone()
    load_weights(model, source.state_dict(), adapt=True)
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


def test_own_head_is_kept_or_reset(model):
    source = timm.create_model('test_resnet', num_classes=6)
    head = model.fc.weight.clone()
    load_weights(model, source.state_dict(), adapt=True, reset_head=True)
    assert torch.equal(model.fc.weight, head)
    load_weights(model, source.state_dict(), adapt=True)
    assert torch.equal(model.fc.weight, source.fc.weight)


@pytest.mark.parametrize('zipped', [False, True])
def test_flipped_bytes_end_in_one_kind_of_error(tmp_path, zipped):
    file = tmp_path / 'a.pth'
    torch.save({'w': torch.ones(3), 'n': {'v': torch.ones(2, 2)}}, file, _use_new_zipfile_serialization=zipped)
    content, rng = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 3, 10])):
            damaged[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                read_checkpoint(file)
        except CheckpointError:
            refused += 1
    assert refused > 30


def test_keys_that_are_no_names(tmp_path):
    for state in ({0: torch.ones(1)}, {'w': torch.ones(1), 5: torch.ones(1)}):
        torch.save(state, tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match='expected tensors by name, found'):
            read_state_dict(tmp_path / 'a.pth')


@pytest.mark.parametrize(('change', 'found'), [
    (lambda v: v.to(torch.int8), 'cpu strided int8'), (lambda v: v.to(torch.complex64), 'cpu strided complex64'),
    (lambda v: v.to('meta'), 'meta strided float32'), (lambda v: v.to_sparse(), 'cpu sparse_coo float32'),
    (lambda v: v.numpy(), 'ndarray'),
])
def test_numbers_of_another_kind_are_refused(model, change, found):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in state.items()}
    state['fc.weight'] = change(state['fc.weight'])
    with pytest.raises(CheckpointError, match=f"'fc.weight' is {found}, expected a dense tensor of floating point"):
        load_weights(model, {k: v + 1 if k.startswith('conv') else v for k, v in state.items()})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_half_precision_is_taken(model):
    load_weights(model, {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    assert model.fc.weight.dtype == torch.float32


def test_without_classes_the_classifier_is_left_out(model):
    features = timm.create_model('test_resnet', num_classes=0)
    with pytest.raises(CheckpointError, match=r"2 are unexpected \(first: 'fc.weight'\)"):
        load_weights(features, model.state_dict())
    load_weights(features, model.state_dict(), adapt=True)
    assert torch.equal(features.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
