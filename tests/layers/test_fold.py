import copy

import pytest
import timm
import torch
from torch import nn

import timm_dynamic  # noqa: F401
from timm_dynamic.layers import fold_batch_norm


def shake(model):
    """Statistics and weights that a fold which did nothing, or too much, would get wrong."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize('name', ['test_gfnet', 'test_anchornet_patch', 'test_clcnet'])
def test_families_say_the_same_after_all_steps(name):
    torch.manual_seed(0)
    model = shake(timm.create_model(name))
    folded = copy.deepcopy(model)
    before = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert folded.fold_batch_norm() == before > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(3, 3, model.img_size, model.img_size)
    with torch.no_grad():
        for a, b in zip(model.forward_steps(x), folded.forward_steps(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert folded.step_macs == model.step_macs


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_convnext'])
def test_backbones_of_timm(name):
    model = shake(timm.create_model(name))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(x)
        assert (fold_batch_norm(model, lambda: model(x)) > 0) == (name != 'test_convnext')
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """One convolution before two normalisations, one normalisation after nothing, and one that may be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x):
        x = self.norms[0](x)
        x = self.norms[1](self.conv(x)) + self.norms[2](self.conv(x + 1))
        return self.norms[3](self.last(x))


def test_only_what_belongs_together():
    torch.manual_seed(0)
    model, x = shake(Shared()), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norm(model, lambda: model(x)) == 1
        torch.testing.assert_close(model(x), expected)
    assert [type(m) for m in model.norms] == [nn.BatchNorm2d] * 3 + [nn.Identity]


def test_in_train_mode():
    with pytest.raises(ValueError, match='eval mode'):
        fold_batch_norm(Shared(), lambda: None)
