import math

import pytest
import torch
from torch.nn import functional as F

from timm_dynamic.loss import FocusPickingLoss


def test_terms_by_hand():
    # One sample, two classes, z = (0, 0), b = (ln 3, 0), target 1, no smoothing.
    # softmax(z) = (1/2, 1/2); softmax(b) = (3/4, 1/4); z + softmax(z) - softmax(b) = (-1/4, 1/4).
    # classification: -log softmax((-1/4, 1/4))_1 = log(1 + e^(-1/2)).
    # attention: softmax(b / 2) = (sqrt 3, 1) / (1 + sqrt 3) = (0.634, 0.366): only class 0 is above 1/2. With the
    # target that makes both classes, 1/2 each: -(1/2) (log 1/2 + log 1/2) = log 2.
    # negentropy: 2 * (1/2) log(1/2) = -log 2.
    terms = FocusPickingLoss(smoothing=0).terms(
        torch.zeros(1, 2), torch.tensor([1]), torch.tensor([[math.log(3), 0.]]))
    torch.testing.assert_close(terms.classification, torch.tensor(math.log1p(math.exp(-0.5))))
    torch.testing.assert_close(terms.attention, torch.tensor(math.log(2)))
    torch.testing.assert_close(terms.negentropy, torch.tensor(-math.log(2)))


def test_attention_leaves_out_classes_the_baseline_rules_out():
    # softmax(b / 2) of b = (8, 8, 0, 0) is (0.491, 0.491, 0.009, 0.009): classes 0 and 1 are above 1/4. With target 0:
    # -(log p_0 + log p_1) / 2.
    logits = torch.tensor([[1., 2., 3., 4.]])
    terms = FocusPickingLoss().terms(logits, torch.tensor([0]), torch.tensor([[8., 8., 0., 0.]]))
    log_p = logits.log_softmax(dim=1)[0]
    torch.testing.assert_close(terms.attention, -(log_p[0] + log_p[1]) / 2)


def test_weights_and_their_terms():
    args = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.randn(4, 5)
    c, a, n = FocusPickingLoss().terms(*args)
    torch.testing.assert_close(FocusPickingLoss(attention_weight=2, negentropy_weight=0)(*args), c + 2 * a)
    torch.testing.assert_close(FocusPickingLoss()(*args), c + a + n)


def test_gradient_reaches_logits_only():
    logits, baseline = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    FocusPickingLoss()(logits, torch.tensor([0, 1, 2]), baseline).backward()
    assert logits.grad.abs().sum() > 0
    assert baseline.grad is None


def test_soft_targets_of_one_class_equal_hard_ones():
    logits, baseline, target = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    smoothed = F.one_hot(target, 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(
        FocusPickingLoss()(logits, smoothed, baseline), FocusPickingLoss()(logits, target, baseline))


def test_half_precision_is_widened():
    logits, baseline = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    target = torch.tensor([0, 1, 2, 3])
    loss = FocusPickingLoss()(logits, target, baseline)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, FocusPickingLoss()(logits.float(), target, baseline.float()))


@pytest.mark.parametrize(('shapes', 'message'), [
    (((4, 5), (4,), (4, 6)), r'one shape .*\(4, 5\) and \(4, 6\)'),
    (((4, 5), (3,), (4, 5)), r'targets .*\(3,\)'),
    (((4, 5), (4, 6), (4, 5)), r'targets .*\(4, 6\)'),
])
def test_shapes_that_do_not_belong_together(shapes, message):
    logits, target, baseline = map(torch.zeros, shapes)
    if target.ndim == 1:
        target = target.long()
    with pytest.raises(ValueError, match=message):
        FocusPickingLoss()(logits, target, baseline)


@pytest.mark.parametrize('kwargs', [dict(smoothing=1.0), dict(smoothing=-0.1), dict(temperature=0)])
def test_bad_constants(kwargs):
    with pytest.raises(ValueError, match='must be'):
        FocusPickingLoss(**kwargs)
