import pytest
import timm
import torch
import torchvision
from torch import nn

from timm_dynamic.loss import FocusPickingLoss
from timm_dynamic.task import FocusPickingTask, create_baseline
from timm_dynamic.utils import CheckpointError, save_pretrained


def _model(name='test_focusnet', **kwargs):
    return timm.create_model(name, **{'num_classes': 5, **kwargs})


def test_result_and_gradients():
    model, baseline = _model(), _model()
    task = FocusPickingTask(model, baseline, verbose=False).train()
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    result = task(images, target)
    with torch.no_grad():
        expected = FocusPickingLoss()(result['output'], target, baseline.eval()(images))
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(result['loss'], result['classification'] + result['attention'] + result['negentropy'])
    result['loss'].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in baseline.parameters())


def test_baseline_stays_in_eval_mode_and_unchanged():
    baseline = _model()
    task = FocusPickingTask(_model(), baseline, verbose=False).train()
    before = {k: v.clone() for k, v in baseline.state_dict().items()}
    task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))['loss'].backward()
    assert task.trainable_module.training
    assert not any(m.training for m in baseline.modules())
    assert all(torch.equal(before[k], v) for k, v in baseline.state_dict().items())
    assert not any('baseline' in k for k in task.get_checkpoint_state()['state_dict'])


def test_baseline_sees_images_normalised_its_own_way():
    seen = {}

    class Recorder(nn.Module):
        num_classes, in_chans = 5, 3

        def __init__(self):
            super().__init__()
            self.pretrained_cfg = {'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25), 'input_size': (3, 32, 32)}

        def forward(self, x):
            seen['x'] = x
            return x.new_zeros(len(x), 5)

    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    task = FocusPickingTask(_model(), Recorder(), mean=mean, std=std, verbose=False)
    image = torch.rand(2, 3, 32, 32)
    columns = [torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std)]
    task((image - columns[0]) / columns[1], torch.tensor([0, 1]))
    torch.testing.assert_close(seen['x'], (image - 0.5) / 0.25, rtol=1e-5, atol=1e-5)


def test_another_architecture_and_soft_targets():
    task = FocusPickingTask(_model(), _model('test_efficientnet'), verbose=False)
    soft = torch.full((2, 5), 0.02)
    soft[0, 1] = soft[1, 2] = 0.92
    assert task(torch.randn(2, 3, 64, 64), soft)['loss'].isfinite()


def test_autocast_covers_both(monkeypatch):
    baseline = _model()
    task = FocusPickingTask(_model(), baseline, verbose=False)
    dtypes = []
    baseline.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert dtypes == [torch.bfloat16]
    assert result['loss'].dtype == torch.float32


@pytest.mark.parametrize('form', ['module', 'local-dir', 'folder', 'file'])
def test_sources_of_a_baseline(tmp_path, form):
    source = _model()
    save_pretrained(source, tmp_path / 'm')
    torch.save({'state_dict': {f'module.{k}': v for k, v in source.state_dict().items()}}, tmp_path / 'm.pth.tar')
    given = {'module': source, 'local-dir': f'local-dir:{tmp_path / "m"}', 'folder': tmp_path / 'm',
             'file': tmp_path / 'm.pth.tar'}[form]
    baseline = create_baseline(given, _model())
    assert torch.equal(baseline.fc.weight, source.fc.weight)
    assert not baseline.training
    assert not any(p.requires_grad for p in baseline.parameters())


def test_other_classes_or_channels_are_refused():
    with pytest.raises(ValueError, match=r"'ResNet' has 7 classes, the focus net has 5"):
        create_baseline(_model(num_classes=7), _model())
    with pytest.raises(ValueError, match='1 input channels, the focus net has 3'):
        create_baseline(_model(in_chans=1), _model())


def test_no_such_baseline():
    with pytest.raises(ValueError, match=r"no baseline 'resnet81'.*Did you mean"):
        create_baseline('resnet81', _model())


def test_never_a_random_baseline():
    with pytest.raises(CheckpointError, match='no weights of gfnet'):
        create_baseline('gfnet', _model(num_classes=1000))


def test_the_authors_baseline_of_mobilenetv2(tmp_path):
    """A file as their training script writes it: torchvision's keys, and the state of the optimizer."""
    original = torchvision.models.mobilenet_v2(num_classes=7).eval()
    file = tmp_path / 'baseline_mobilenet_v2_model_best.pth.tar'
    torch.save({
        'epoch': 90, 'arch': 'mobilenet_v2', 'best_acc1': torch.tensor(65.558), 'optimizer': {},
        'state_dict': {f'module.{k}': v for k, v in original.state_dict().items()}}, file)
    task = FocusPickingTask(timm.create_model('focusnet_mobilenetv2_100', num_classes=7), file, verbose=False)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(task.baseline_logits(x), original(x), rtol=0, atol=1e-5)


def test_fixed_size_baseline_names_the_sizes():
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=5, depth=1)
    task = FocusPickingTask(_model(), vit, verbose=False)
    with pytest.raises(ValueError, match=r'images of size \(224, 224\), but training uses \(32, 32\)'):
        task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))


def test_resuming_with_another_baseline_is_an_error():
    baseline = _model()
    state = FocusPickingTask(_model(), baseline, verbose=False).get_task_state()
    FocusPickingTask(_model(), baseline, verbose=False).load_task_state(state)
    with pytest.raises(ValueError, match='The baseline has other weights'):
        FocusPickingTask(_model(), _model(), verbose=False).load_task_state(state)
