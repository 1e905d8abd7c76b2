import math

import pytest
import torch

from timm_dynamic.exits import ExitTable, cascade_table
from timm_dynamic.exits.measures import auroc, cross_area, curve_area


def test_auroc_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.8, 0.3, 0.1])
    correct = torch.tensor([True, False, True, True, False])
    # pairs of right and wrong: 0.9 wins both, 0.8 ties one and wins one, 0.3 loses one and wins one
    assert auroc(scores, correct) == (2 + 1.5 + 1) / 6
    assert auroc(-scores, correct) == 1 - (2 + 1.5 + 1) / 6
    assert math.isnan(auroc(scores, torch.ones(5, dtype=torch.bool)))


def test_rules_by_hand():
    confidence = torch.tensor([[0.9, 0.4, 0.5], [0.6, 0.7, 0.5], [0.8, 0.1, 0.6]])
    correct = torch.tensor([[True, False, False], [False, True, True], [False, False, True]])
    last = cascade_table(confidence, correct, (1, 2, 3), 'last')
    assert torch.equal(last.confidence, confidence.T)
    assert torch.equal(last.correct, correct.T)
    best = cascade_table(confidence, correct, (1, 2, 3))
    # an answer replaces the one so far only where it is more confident
    assert torch.equal(best.confidence, torch.tensor([[.9, .9, .9], [.4, .7, .7], [.5, .5, .6]]))
    assert best.correct.tolist() == [[True, True, True], [False, True, True], [False, False, True]]


def test_area():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(4000, generator=generator) < 0.6
    correct = torch.stack([right, torch.ones_like(right)], dim=1)
    noise = torch.rand(4000, generator=generator)

    def area(first):
        return cross_area(ExitTable(torch.stack([first, noise], dim=1), correct, (10 ** 9, 2 * 10 ** 9)))

    # Who is wrong is known: accuracy rises to 100 % over 40 % of the budgets, and stays: 100 - 40 * 0.4 / 2 = 92.
    assert area(right.float() + 0.1 * noise) == pytest.approx(92, abs=0.7)
    # Nothing is known: the straight line from 60 to 100.
    assert area(noise) == pytest.approx(80, abs=1.5)
    table = ExitTable(torch.stack([noise, noise], dim=1), correct[:, :1].expand(-1, 2), (10 ** 9, 2 * 10 ** 9))
    assert curve_area(table, table) == pytest.approx(100 * float(right.float().mean()))
