import json
import math

import pytest
import torch
from exits.tables import table_like

from benchmarks.families import FAMILIES
from timm_dynamic.exits.confidence_scale import ConfidenceScale


def test_map_by_hand():
    scale = ConfidenceScale([0.5, 0.75, 1.0], [0.1, 0.2, 0.8])
    # halfway between the first two knots 0.15; a quarter of the way between the others 0.2 + 0.6 / 4
    values = torch.tensor([[0.5, 0.625], [0.8125, 1.0], [-3, math.inf], [-math.inf, math.nan]])
    expected = torch.tensor([[0.1, 0.15], [0.35, 0.8], [0.1, 0.8], [0.1, 0.]], dtype=torch.float64)
    torch.testing.assert_close(scale(values), expected)
    torch.testing.assert_close(scale(values.half()), expected)
    assert scale(torch.zeros(0, 3)).shape == (0, 3)
    assert ConfidenceScale([0.7], [0.4])(torch.tensor([0.1, 0.7, 2, math.nan])).tolist() == [0.4, 0.4, 0.4, 0]


def test_fit_by_hand():
    """Of two levels of confidence, as many samples each, 1/4 and 3/4 are right: so far apart are their values."""
    confidence = torch.tensor([0.2, 0.9]).repeat_interleave(4000)[:, None]
    correct = (torch.arange(8000) % 4 < torch.tensor([1, 3]).repeat_interleave(4000))[:, None]
    scale = ConfidenceScale.fit(confidence, correct)
    assert scale.confidence.tolist() == confidence[[0, -1], 0].tolist()
    assert scale.scaled.tolist() == pytest.approx([0.25, 0.75], abs=1e-3)


@pytest.mark.parametrize('family', FAMILIES)
def test_rises_with_confidence_and_knots_depend_on_its_order_only(family):
    table = table_like(2000, 3)
    plain = ConfidenceScale.fit(table.confidence, table.correct)
    confidence = FAMILIES[family](table.confidence.double()).float()
    scale = ConfidenceScale.fit(confidence, table.correct)
    levels = confidence.unique()
    values = scale(levels)
    assert (values.diff() > 0).all()
    assert 0 <= values[0] <= values[-1] <= 1
    if len(levels) == len(table.confidence.unique()) and 'each step' not in family:  # the order is the same
        assert scale.scaled.tolist() == plain.scaled.tolist()
        assert torch.equal(scale.confidence.float(), FAMILIES[family](plain.confidence).float())


def test_confidences_near_one_stay_apart():
    """Neighbouring float32 numbers, as many as lie between 1 - 1e-5 and 1, have values of their own."""
    ones = torch.ones(4000, 1).view(torch.int32) - torch.arange(4000, dtype=torch.int32)[:, None] % 170
    confidence = ones.view(torch.float32)
    assert confidence.unique().numel() == 170
    correct = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    values = ConfidenceScale.fit(confidence, correct)(confidence)
    assert values.unique().numel() == 170


@pytest.mark.parametrize('confidence', [
    torch.full((5, 2), math.nan), torch.full((5, 2), math.inf), torch.zeros(1, 1), torch.tensor([[3e38, -3e38]]),
    torch.tensor([[1e-45, 0.]]), torch.tensor([[math.nan, 0.5], [0.6, math.inf]]),
])
@pytest.mark.parametrize('right', [False, True])
def test_degenerate_tables(confidence, right):
    scale = ConfidenceScale.fit(confidence, torch.full(confidence.shape, right))
    values = scale(confidence)
    assert ((values >= 0) & (values <= 1)).all()
    order = confidence[confidence.isfinite()].unique()
    assert (scale(order).diff() > 0).all()


def test_json_and_equality():
    table = table_like(500, 3)
    scale = ConfidenceScale.fit(table.confidence, table.correct)
    again = ConfidenceScale(*json.loads(json.dumps(scale.to_list(), allow_nan=False)))
    assert again == scale
    assert torch.equal(again(table.confidence), scale(table.confidence))
    assert scale != ConfidenceScale([0, 1], [0, 1])


@pytest.mark.parametrize('knots', [
    ([], []), ([0.5], []), (0.5, 0.5), ([[0.5]], [[0.5]]), ([1, 0], [0, 1]), ([0, 0], [0, 1]), ([0, 1], [0.5, 0.5]),
    ([0, 1], [0, 1.1]), ([0, 1], [-0.1, 1]), ([0, math.inf], [0, 1]), ([0, 1], [0, math.nan])])
def test_bad_scales(knots):
    with pytest.raises(ValueError, match='scale'):
        ConfidenceScale(*knots)
