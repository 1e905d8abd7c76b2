import pytest
import torch

from timm_dynamic.layers import PatchPolicy


@pytest.mark.parametrize('encoder', ['linear', 'conv'])
def test_shapes_range_and_memory(encoder):
    policy = PatchPolicy(12, (3, 2), encoder, hidden_size=16, width=8)
    x = torch.randn(5, 12, 3, 2)
    first, hidden = policy(x)
    assert first.shape == (5, 2)
    assert hidden.shape == (5, 16)
    assert first.min() > 0
    assert first.max() < 1
    second, _ = policy(x, hidden)
    assert not torch.equal(first, second)
    # no hidden state is a hidden state of zeros
    torch.testing.assert_close(policy(x, torch.zeros(5, 16))[0], first)
    assert policy(x[:0])[0].shape == (0, 2)
    (first + second).sum().backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_sizes_of_the_paper_and_no_critic():
    def shapes(policy):
        return {k: tuple(v.shape) for k, v in policy.state_dict().items() if v.ndim > 1}
    assert shapes(PatchPolicy(2048, (3, 3), 'linear', device='meta')) == {
        'state_encoder.0.weight': (2048, 18432), 'state_encoder.2.weight': (1024, 2048),
        'gru.weight_ih': (3072, 1024), 'gru.weight_hh': (3072, 1024), 'actor.weight': (2, 1024)}
    assert shapes(PatchPolicy(960, (3, 3), 'conv', device='meta')) == {
        'state_encoder.0.weight': (32, 960, 1, 1), 'state_encoder.3.weight': (256, 288),
        'gru.weight_ih': (768, 256), 'gru.weight_hh': (768, 256), 'actor.weight': (2, 256)}


def test_the_memory_layout_of_the_map_does_not_matter():
    policy = PatchPolicy(6, (4, 4), 'linear', hidden_size=8, width=8)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(policy(x.contiguous(memory_format=torch.channels_last))[0], policy(x)[0])


def test_float32_under_autocast_and_in_low_precision():
    policy = PatchPolicy(6, (4, 4), 'conv', hidden_size=8, width=8)
    x = torch.randn(2, 6, 4, 4)
    expected = policy(x)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        action, hidden = policy(x)
        assert hidden.dtype == torch.float32
        assert torch.equal(action, expected)
    action, hidden = policy.to(torch.bfloat16)(x)
    assert action.dtype == torch.float32
    torch.testing.assert_close(action, expected, rtol=0, atol=0.02)


def test_unknown_encoder():
    with pytest.raises(ValueError, match="'linear' or 'conv', got 'mlp'"):
        PatchPolicy(6, (4, 4), 'mlp')
