import pytest
import torch

from timm_dynamic import ConfidenceNet
from timm_dynamic.task import ConfidenceTask, fit_confidence_net, fit_folds, make_folds, match_scores, score_folds
from timm_dynamic.task.confidence_net import draw_batches


def make_data(count=600, classes=12, seed=0):
    """Probabilities of a calibrated classifier: it is right as often as it says."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, 1, generator=generator) * 6
    probabilities = (torch.randn(count, classes, generator=generator) * scale).softmax(1).sort(descending=True).values
    return probabilities, torch.rand(count, generator=generator) < probabilities[:, 0]


def test_loss_by_hand():
    probabilities, correct = make_data(8)
    task = ConfidenceTask(ConfidenceNet(), sparsity=0.5)
    out = task.train()(probabilities, correct)
    error = (out['output'] - correct.float()).square().mean()
    torch.testing.assert_close(out['error'], error)
    torch.testing.assert_close(out['loss'], error + 0.5 * out['entropy'])
    assert out['entropy'] > 0
    out['loss'].backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []
    out = task.eval()(probabilities, correct)
    assert out.keys() == {'output', 'error', 'loss'}
    torch.testing.assert_close(out['output'], task.net(probabilities))


def test_wrong_predictions_are_drawn_twice_as_often():
    correct = torch.arange(9000) % 3 > 0  # two thirds right, so that both kinds are drawn equally often
    batches = list(draw_batches(correct, 256, seed=1, epoch=0))
    drawn = torch.cat(batches)
    assert len(drawn) == 9000
    assert [len(b) for b in batches] == [256] * 35 + [40]
    assert (~correct[drawn]).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(drawn, torch.cat(list(draw_batches(correct, 256, seed=1, epoch=0))))
    assert not torch.equal(drawn, torch.cat(list(draw_batches(correct, 256, seed=1, epoch=1))))
    assert [len(b) for b in draw_batches(correct[:257], 256, 0, 0)] == [256]  # one sample has no variance


def test_it_learns_who_is_right():
    probabilities, correct = make_data(2000)
    fit = fit_confidence_net(probabilities[:1500], correct[:1500], epochs=15, patience=6)
    share = correct.float().mean()
    with torch.no_grad():
        error = (fit.net(probabilities[1500:]) - correct[1500:].float()).square().mean()
    assert error < 0.9 * share * (1 - share)  # that of always saying the share
    assert not fit.net.training
    assert fit.val_error == min(h['val_error'] for h in fit.history) == fit.history[fit.best_epoch]['val_error']
    assert len(fit.history) <= 15
    again = fit_confidence_net(probabilities[:1500], correct[:1500], epochs=15, patience=6)
    assert again.history == fit.history
    assert torch.equal(again.net.head.weight, fit.net.head.weight)


@pytest.mark.parametrize('seed', [1, 2])
def test_few_updates_are_judged_fairly(seed):
    probabilities, correct = make_data(1500)
    fit = fit_confidence_net(probabilities, correct, epochs=2, seed=seed)
    # 10 updates: running statistics would still be initial values, and errors of validation above 0.4
    assert fit.history[-1]['val_error'] < 0.25
    assert all(m.momentum == 0.02 for m in fit.net.modules() if isinstance(m, torch.nn.BatchNorm1d))


def test_it_stops_early():
    probabilities, _ = make_data(100)
    correct = torch.arange(100) % 2 > 0  # nothing to be learned
    fit = fit_confidence_net(probabilities, correct, epochs=40, patience=2)
    assert len(fit.history) == fit.best_epoch + 3 < 40


def test_folds():
    assert torch.bincount(make_folds(103, 5)).tolist() == [21, 21, 21, 20, 20]
    probabilities, correct = make_data(120)
    folds = make_folds(120, 3)
    fits = fit_folds(probabilities, correct, folds, epochs=1)
    assert len(fits) == 3
    # what is in fold 0 has no influence on its net
    changed = torch.where(folds[:, None] == 0, probabilities.roll(1, 0), probabilities)
    other = fit_folds(changed, torch.where(folds == 0, ~correct, correct), folds, epochs=1)
    assert torch.equal(other[0].net.head.weight, fits[0].net.head.weight)
    assert not torch.equal(other[1].net.head.weight, fits[1].net.head.weight)
    scores = score_folds([fit.net for fit in fits], probabilities, folds)
    for k, fit in enumerate(fits):
        with torch.no_grad():
            torch.testing.assert_close(scores[folds == k], fit.net(probabilities[folds == k]))


def test_bad_input():
    probabilities, correct = make_data(20)
    with pytest.raises(ValueError, match=r'Expected 2 to 3 \(the number of samples\) folds, got 5'):
        make_folds(3, 5)
    with pytest.raises(ValueError, match=r'got \[20, 12\] and \[19\]'):
        fit_confidence_net(probabilities, correct[1:])
    with pytest.raises(ValueError, match='5 samples are too few'):
        fit_confidence_net(probabilities[:5], correct[:5])
    with pytest.raises(ValueError, match=r'row 0 is not\. Sort them'):
        fit_confidence_net(probabilities.flip(1), correct)
    with pytest.raises(ValueError, match=r'row 3 has a minimum of .* and a sum of 2'):
        fit_confidence_net(torch.where(torch.arange(20)[:, None] == 3, 2 * probabilities, probabilities), correct)
    with pytest.raises(ValueError, match=r'empty folds: \[0\]'):
        fit_folds(probabilities, correct, torch.ones(20, dtype=torch.int64))
    with pytest.raises(ValueError, match='got 2 nets for 3 folds'):
        score_folds([ConfidenceNet()] * 2, probabilities, torch.full((20,), 2))


def test_match_scores():
    """Nets of other scales are brought to one; the order within a fold stays, also that of equal scores."""
    folds = torch.tensor([0, 1, 0, 1, 0, 1])
    scores = torch.tensor([5., -3., 9., -1., 7., -1.])
    reference = torch.tensor([0.9, 0.6, 0.1, 0.5, 0.3, 0.4])
    matched = match_scores(scores, reference, folds)
    torch.testing.assert_close(matched, torch.tensor([0.1, 0.4, 0.9, 0.55, 0.3, 0.55]))
    torch.testing.assert_close(match_scores(reference, reference, folds), reference)
