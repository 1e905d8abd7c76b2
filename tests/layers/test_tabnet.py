import pytest
import torch

from timm_dynamic.layers import GhostBatchNorm


def test_ghost_batch_norm():
    # Four samples in two parts of two: each part is normalised by itself, to -1 and 1.
    norm = GhostBatchNorm(1, virtual_batch_size=2, momentum=0.5)
    x = torch.tensor([[0.], [2.], [10.], [14.]])
    torch.testing.assert_close(norm(x).flatten(), torch.tensor([-1., 1., -1., 1.]), rtol=0, atol=1e-4)
    # running mean: 0 -> (0 + 1) / 2 -> (0.5 + 12) / 2
    assert norm.running_mean.item() == pytest.approx(6.25)
    assert norm.eval()(x[:1]).item() == pytest.approx(-6.25 / (norm.running_var.item() + 1e-5) ** 0.5)


def test_no_part_is_of_one_sample():
    norm = GhostBatchNorm(3, virtual_batch_size=128)
    assert norm(torch.randn(129, 3)).shape == (129, 3)
    assert norm.num_batches_tracked == 2
