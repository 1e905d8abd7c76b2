"""Multiply-adds of any model."""
import timm
import torch
from torch import nn

import timm_dynamic  # noqa: F401
from timm_dynamic.models.macs import count_macs


def test_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 6 * 5, 4))
    net[1].train()
    assert count_macs(net, (3, 6, 5)) == 8 * 27 * 30 + 240 * 4
    assert net[1].training
    assert net[0].weight.device.type == 'cpu'


def test_dynamic_models_have_all_steps():
    model = timm.create_model('test_gfnet', img_size=48, patch_size=16)
    assert count_macs(model, (3, 48, 48)) == model.step_macs[-1]


def test_tensors_that_do_not_move_to_meta():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)
            self.scale = torch.ones(3)  # no buffer

        def forward(self, x):
            return self.linear((x.mean((2, 3)) * self.scale).repeat(1, 2)[:, :4])

    assert count_macs(Net(), (3, 4, 4)) == 8


def test_what_cannot_be_counted(caplog):
    assert count_macs(nn.Linear(4, 2), (3, 4, 5)) is None
    assert 'Linear cannot be counted' in caplog.text
