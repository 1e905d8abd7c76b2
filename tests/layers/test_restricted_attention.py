import pytest
import torch

from timm_dynamic.layers import restricted_attention


def test_attention_by_hand():
    # Equal logits over two tokens: weights 1/2; token 0 lies at 0, token 1 at 1/2, between points 49 and 50 of 0..99.
    mapped = restricted_attention(torch.tensor([[0.75, 0.25]]), torch.zeros(1, 2))[0]
    assert mapped[0].item() == pytest.approx(0.5 * 0.75)  # the top of the first bump
    assert mapped[1].item() == pytest.approx(0.375 * torch.tensor(-(1 / 0.99) ** 2 / 2).exp().item(), rel=1e-5)
    second = 0.125 * torch.tensor(-(0.5 / 0.99) ** 2 / 2).exp().item()  # half a point to either side
    assert (mapped - second).abs().sort().values[:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert mapped.shape == (100,)
