import math

import pytest
import timm
import torch
from torch import nn

import timm_dynamic  # noqa: F401
from timm_dynamic.exits.clock import clock_policies, describe_machine


class Counting(nn.Module):
    """Notes the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return x


@pytest.fixture(scope='module')
def model():
    return timm.create_model('test_gfnet', num_classes=3).eval()


def test_everything_runs_the_same_number_of_images(model):
    """A row for each; a policy that stops at once runs one step, and all images come through each way."""
    seen = []

    class Never:
        num_steps = 3

        def __call__(self, history):
            seen.append(tuple(history.shape))
            return torch.zeros(len(history), dtype=torch.bool)

    batches = [torch.randn(4, 3, 96, 96), torch.randn(2, 3, 96, 96)]
    static = Counting()
    rows = clock_policies(
        model, batches, {'first': [-math.inf] * 3, 'never': Never()}, {'static': (static, batches)}, repeats=2,
        single_images=5)
    assert [row['clock'] for row in rows] == ['static', 'all steps', 'first', 'never']
    assert all(row['images_per_s'] > 0 and row['ms_single'] > 0 for row in rows)
    assert static.sizes == 3 * [4, 2, 1, 1, 1, 1, 1]  # once before, and twice on the clock
    alone = [shape for shape in seen if shape[0] == 1]
    assert len([shape for shape in alone if shape[1] == 1]) >= 3 * 5


def test_bad_arguments(model):
    with pytest.raises(ValueError, match='There are no batches'):
        clock_policies(model, [], {})
    with pytest.raises(ValueError, match='has no steps to exit after'):
        clock_policies(nn.Linear(1, 1).eval(), [torch.zeros(1, 1)], {})


def test_describe_machine():
    assert 'thread' in describe_machine(torch.device('cpu'))
