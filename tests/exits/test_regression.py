import math

import pytest
import torch

from timm_dynamic.exits.regression import logistic_regression


def test_by_hand():
    """The weight w of a constant solves n · sigmoid(w) + w = k: for w = log 3, k = 0.75 n + log 3."""
    ones = torch.ones(100, 1, dtype=torch.float64)
    positive = torch.full((100,), 0.75 + math.log(3) / 100, dtype=torch.float64)
    assert logistic_regression(ones, positive).item() == pytest.approx(math.log(3), abs=1e-6)


def test_rows_that_stand_for_many_samples():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    count = torch.randint(1, 9, (50,), generator=generator)
    rows = basis.repeat_interleave(count, dim=0)
    label = (rows.sum(dim=1) + torch.randn(len(rows), generator=generator) > 0.5).double()
    positive = torch.stack([part.sum() for part in label.split(count.tolist())])
    expected = logistic_regression(rows, label)
    torch.testing.assert_close(logistic_regression(basis, positive, count.double()), expected, rtol=0, atol=1e-6)
    assert expected.min() > 0.3


def test_separable_samples_and_far_outliers():
    basis = torch.tensor([[1., -1e4], [1., -1.], [1., 1.], [1., 1e4]], dtype=torch.float64)
    weight = logistic_regression(basis, torch.tensor([0., 0., 1., 1.], dtype=torch.float64))
    assert weight.isfinite().all()
    assert (basis @ weight).sign().tolist() == [-1, -1, 1, 1]
