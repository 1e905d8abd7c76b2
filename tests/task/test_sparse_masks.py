import pytest
import torch
from parity.confidence_reference import make_probabilities, make_state_dict, project_to_simplex, run

from timm_dynamic import ConfidenceNet
from timm_dynamic.task.confidence_net import SparseMasks, sparsemax


def test_sparsemax():
    x = torch.tensor([[0.5, 0.2, -1.], [3., 1., 1.]])
    # (0.5, 0.2): shift (0.7 - 1) / 2 = -0.15 gives 0.65 and 0.35; (3, 1, 1): only the first is left
    torch.testing.assert_close(sparsemax(x), torch.tensor([[0.65, 0.35, 0.], [1., 0., 0.]]))
    x = torch.randn(50, 30, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(sparsemax(x), project_to_simplex(x))
    assert torch.autograd.gradcheck(sparsemax, x)


def test_masks_are_those_of_the_straightforward_version():
    # the authors' masks, under our names
    authors = make_state_dict()
    net = ConfidenceNet.from_pretrained(authors)
    masks = SparseMasks(net).eval()
    state = {}
    for key, value in authors.items():
        key = key.removeprefix('tabnet.encoder.')
        if key.startswith('initial_splitter.shared.glu_layers') and '.bn.' in key:
            state[key.replace('initial_splitter.shared.glu_layers', 'splitter.norms').replace('.bn.bn', '')] = value
        elif key.startswith('initial_splitter.specifics') and '.bn.' in key:
            layer = int(key.split('.')[3])
            state[f'splitter.norms.{layer + 2}.{key.rpartition(".")[2]}'] = value
        elif key.startswith('initial_splitter.specifics'):
            state[f'splitter.layers.{key.split(".")[3]}.weight'] = value
        elif key.startswith('att_transformers'):
            _, step, kind, *_, leaf = key.split('.')
            state[f'{"layers" if kind == "fc" else "norms"}.{step}.{leaf}'] = value
    masks.load_state_dict(state)
    x = make_probabilities(32, 60)
    with torch.no_grad():
        entropy = masks(net, *net.forward_steps(x))
        expected = run(authors, x)[1]
    assert expected > 0.1
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-5)


def test_entropy_reaches_the_shared_layers():
    net = ConfidenceNet().train()
    masks = SparseMasks(net).train()
    masks(net, *net.forward_steps(make_probabilities(16, 40))).backward()
    assert net.shared[0].weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in masks.parameters())
    with pytest.raises(ValueError, match='attention_dim of at least 1'):
        SparseMasks(ConfidenceNet(attention_dim=0))
