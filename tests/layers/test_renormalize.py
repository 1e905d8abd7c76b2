import pytest
import torch

from timm_dynamic.layers import Renormalize


def test_by_hand():
    # pixel 0.6 is (0.6 - 0.5) / 0.5 = 0.2 for one network and (0.6 - 0.4) / 0.25 = 0.8 for the other
    layer = Renormalize([0.5] * 3, [0.5] * 3, [0.4] * 3, [0.25] * 3)
    torch.testing.assert_close(layer(torch.full((2, 3, 4, 4), 0.2)), torch.full((2, 3, 4, 4), 0.8))
    low = layer(torch.full((2, 3, 4, 4), 0.2, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert layer.state_dict() == {}


def test_equal_normalisations_change_nothing():
    layer = Renormalize((0.1, 0.2, 0.3), (1, 1, 1), [0.1, 0.2, 0.3], [1., 1., 1.])
    x = torch.randn(2, 3, 4, 4)
    assert layer.is_identity
    assert layer(x) is x


def test_grey_images_have_the_average_of_the_channels():
    layer = Renormalize([0.1, 0.2, 0.3], [1.] * 3, [0.5], [0.5], in_chans=1)
    assert layer(torch.zeros(1, 1, 1, 1)).item() == pytest.approx((0.2 - 0.5) / 0.5)
