import copy

import pytest
import timm
import torch
from torch import nn

import timm_dynamic  # noqa: F401
from timm_dynamic.layers import fuse_conv_bn


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
    assert folded.fuse_conv_bn() == before > 0
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
        assert (fuse_conv_bn(model, lambda: model(x)) > 0) == (name != 'test_convnext')
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
        assert fuse_conv_bn(model, lambda: model(x)) == 1
        torch.testing.assert_close(model(x), expected)
    assert [type(m) for m in model.norms] == [nn.BatchNorm2d] * 3 + [nn.Identity]


def test_in_inference_mode_for_use_outside_of_it():
    model, x = shake(Shared()), torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        assert fuse_conv_bn(model, lambda: model(torch.ones(2, 3, 4, 4))) == 1
    model(x).sum().backward()


class UsedTwice(nn.Module):
    """A shortcut around the normalisation, a change in place before it, and a subclass that does more."""

    class Clipped(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).clamp(-0.1, 0.1)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList([*(nn.BatchNorm2d(3) for _ in range(3)), self.Clipped(3)])

    def forward(self, x):
        x = self.convs[0](x)
        x = x + self.norms[0](x)
        x = self.norms[1](self.convs[1](x).relu_())
        x = self.norms[2](self.convs[2](x).add_(x))
        return self.norms[3](self.convs[3](x))


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_not_what_is_used_otherwise_too(mode):
    torch.manual_seed(0)
    model, x = shake(UsedTwice()), torch.randn(2, 3, 4, 4)
    with mode():
        expected = model(x)
        assert fuse_conv_bn(model, lambda: model(x)) == 0
        torch.testing.assert_close(model(x), expected)


def test_backbone_with_shortcuts_around_its_first_normalisations():
    model = shake(timm.create_model('coatnet_pico_rw_224', img_size=64, depths=(1, 1, 1, 1)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert fuse_conv_bn(model, lambda: model(x)) > 0
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_groups_and_norms_without_weights():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, affine=False),
        nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = model(x)
        assert fuse_conv_bn(model, lambda: model(x)) == 1
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('part', [False, True])
def test_in_train_mode(part):
    model = Shared()
    if part:
        model.eval().norms[0].train()
    with pytest.raises(ValueError, match='eval mode'):
        fuse_conv_bn(model, lambda: None)
