import pytest
import torch
from torch import nn

from timm_dynamic.layers import ConcatStepClassifier, RecurrentStepClassifier


def run(classifier, features):
    memory, logits = None, []
    for t, feature in enumerate(features):
        out, memory = classifier(t, feature, memory)
        logits.append(out)
    return logits, memory


def test_recurrent_is_a_gru_and_a_linear():
    classifier = RecurrentStepClassifier(6, 3, num_steps=4, hidden_size=5)
    features = torch.randn(4, 2, 6)
    logits, memory = run(classifier, features)
    gru = nn.GRU(6, 5)
    gru.load_state_dict({f'{k}_l0': v for k, v in classifier.rnn.state_dict().items()})
    expected = classifier.heads['rnn'](gru(features)[0])
    torch.testing.assert_close(torch.stack(logits), expected)
    assert memory.shape == (2, 5)
    assert list(classifier.heads) == ['rnn']
    assert classifier.num_features == 5


def test_first_head_sees_the_feature_and_the_gru_goes_on():
    plain, own = (RecurrentStepClassifier(6, 3, 3, 5, first_head=first) for first in (False, True))
    own.load_state_dict({**own.state_dict(), **plain.state_dict()})
    features = torch.randn(3, 2, 6)
    ours, theirs = run(own, features)[0], run(plain, features)[0]
    torch.testing.assert_close(ours[0], own.heads['first'](features[0]))
    torch.testing.assert_close(ours[1:], theirs[1:])


def test_concat_has_a_head_a_step_and_none_beyond():
    classifier = ConcatStepClassifier(6, 3, num_steps=3)
    features = torch.randn(3, 2, 6)
    logits, memory = run(classifier, features)
    assert [tuple(h.weight.shape) for h in classifier.heads.values()] == [(3, 6), (3, 12), (3, 18)]
    torch.testing.assert_close(memory, features.transpose(0, 1).flatten(1))
    torch.testing.assert_close(logits[1], classifier.heads['2'](torch.cat([features[0], features[1]], dim=1)))
    assert classifier.num_features == 18


@pytest.mark.parametrize('cls', [RecurrentStepClassifier, ConcatStepClassifier])
def test_reset_empty_batch_and_dropout(cls):
    classifier = cls(6, 3, 2, drop_rate=0.5)
    features = torch.randn(2, 4, 6)
    assert not torch.equal(*(run(classifier, features)[0][-1] for _ in range(2)))
    classifier.eval().reset(7)
    assert torch.equal(*(run(classifier, features)[0][-1] for _ in range(2)))
    assert run(classifier, features)[0][-1].shape == (4, 7)
    assert run(classifier, features[:, :0])[0][-1].shape == (0, 7)
    classifier.reset(0)
    assert run(classifier, features)[0][-1].shape == (4, classifier.num_features)
