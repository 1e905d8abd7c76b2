import pytest
import torch

from timm_dynamic.layers import choose_windows, class_activation_map

GRID = torch.arange(5) * 4


def greedy(cam, corners, size, num, thresholds, exact):
    """The rule for one image, in plain Python."""
    rows, columns = (c.tolist() for c in corners)
    side = size - 1 if exact else size
    width = cam.shape[1]
    order = sorted(range(cam.numel()), key=lambda i: (-cam.flatten()[i].item(), i))

    def iou(a, b):
        down = max(0, side - abs(rows[a // width] - rows[b // width]))
        across = max(0, side - abs(columns[a % width] - columns[b % width]))
        return down * across / (2 * side * side - down * across)

    chosen = []
    for i in order:
        if len(chosen) == num:
            break
        if (i == 0 and exact) or all(iou(i, j) <= thresholds[len(chosen) - 1] for j in chosen):
            chosen.append(i)
    return chosen


@pytest.mark.parametrize('exact', [True, False])
@pytest.mark.parametrize('thresholds', [(0.3, 0.3, 0.3), (0., 0.1, 0.5), (0.6, 0.2, 0.), (1., 1., 1.)])
def test_it_is_the_greedy_rule(exact, thresholds):
    cams = torch.randn(40, 5, 5)
    cams[20:] = cams[20:].mul(2).round()  # ties
    index, found = choose_windows(cams, (GRID, GRID), 12, 4, thresholds, exact)
    for cam, mine, count in zip(cams, index.tolist(), found.tolist()):
        expected = greedy(cam, (GRID, GRID), 12, 4, thresholds, exact)
        assert mine[:count] == expected
        assert len(set(mine)) == 4  # what fills the rest is not chosen twice


def test_the_rest_is_filled_with_the_best():
    cam = torch.arange(25.).flip(0).reshape(1, 5, 5)  # falling: 0 is the best
    index, found = choose_windows(cam, (GRID, GRID), 100, 3, (0., 0.), exact_original=False)
    assert found.tolist() == [1]  # all windows overlap
    assert index.tolist() == [[0, 1, 2]]


def test_map_by_hand():
    features = torch.tensor([[[[1., 2.]], [[3., 4.]]]])  # [1, 2, 1, 2]
    weight = torch.tensor([[0., 0.], [10., -1.]])
    assert class_activation_map(features, weight, torch.tensor([1])).tolist() == [[[3.5, 8.]]]


def test_bad_input():
    cam = torch.zeros(2, 5, 5)
    with pytest.raises(ValueError, match='Expected to choose 1 to 25 windows of a 5x5 map, got 26'):
        choose_windows(cam, (GRID, GRID), 12, 26, [0.3] * 25)
    with pytest.raises(ValueError, match='4 windows need 3 overlap thresholds, got 2'):
        choose_windows(cam, (GRID, GRID), 12, 4, [0.3, 0.3])
    for bad in (float('nan'), -0.1, 1.1):
        with pytest.raises(ValueError, match=r'Overlap thresholds are shares in 0..1, got \['):
            choose_windows(cam, (GRID, GRID), 12, 3, [0.3, bad])
    assert choose_windows(cam[:0], (GRID, GRID), 12, 4, [0.3] * 3)[0].shape == (0, 4)
