"""Tables, CSV files and pictures."""
import builtins
import math
from pathlib import Path

import pytest
from PIL import Image

from timm_dynamic.utils.report import (
    check_plot,
    find_same_accuracy,
    fit_line,
    format_block,
    format_duration,
    format_table,
    plot_accuracy_over_macs,
    plot_curve,
    read_rows,
    standard_error,
    write_rows,
)


def test_small_numbers_and_lists(tmp_path):
    rows = [{'point': 'a', 'gmacs': 0.001234, 'thresholds': [0.5, 1 / 3]}, {'point': 'b', 'gmacs': 2.0}]
    text = format_table(rows)
    assert '0.00123  0.5 0.3333' in text
    assert '2.00000' in text
    write_rows(tmp_path / 'r.csv', rows)
    assert read_rows(tmp_path / 'r.csv')[0]['thresholds'] == f'0.5 {1 / 3}'
    odd = format_table([{'zero': 0.0, 'nan': math.nan, 'inf': math.inf}])
    assert odd.splitlines()[-1].split() == ['0.000', 'nan', 'inf']


def test_block_and_line():
    block = format_block({'data': 'one two three four', 'a longer name': '/a/path/that-is-not/broken'}, width=30)
    assert block == (
        'data           one two three\n'
        '               four\n'
        'a longer name  /a/path/that-is-not/broken')
    assert fit_line(['head:', 'first 1', 'too long to fit', 'last 2'], width=22) == 'head: first 1, last 2'
    assert [format_duration(s) for s in (0.4, 59.6, 3600, 45296)] == ['0:00', '1:00', '1:00:00', '12:34:56']


@pytest.mark.parametrize('costs', [(1., 2.), (0.01, 2.)])
def test_picture(tmp_path, costs):
    path = tmp_path / 'new' / 'c.png'
    assert plot_accuracy_over_macs(
        path, {'steps': [(c, 50.) for c in costs]}, {'static': [(1.5, 60.)], 'points': [(1., 2.), (2., 3.)]}, 'It')
    with Image.open(path) as image:
        colours = {image.getpixel((x, y))[:3] for x in range(image.width) for y in range(image.height)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # a line and two kinds of markers
    assert not list(path.parent.glob('.partial*'))


def test_same_accuracy_by_hand():
    curve = [(1., 50.), (2., 70.), (4., 90.), (5., 80.)]
    assert find_same_accuracy(curve, 60.) == 1.5
    assert find_same_accuracy(curve, 85.) == 3.5
    assert find_same_accuracy(curve, 40.) == 1.
    assert find_same_accuracy(curve, 91.) is None
    assert standard_error(90., 900) == pytest.approx(1.)  # sqrt(0.9 · 0.1 / 900) = 0.01
    assert standard_error(100., 10) == 0


def drawn(monkeypatch, draw):
    """Texts of a picture, and the numbers of bands and of error bars."""
    from matplotlib.figure import Figure
    found = []

    def savefig(self, *args, **kwargs):
        for axis in self.axes:
            bars = sum(container.has_yerr for container in axis.containers)
            texts = [axis.get_title(), *(text.get_text() for text in axis.texts)]
            found.append((texts, len(axis.collections) - bars, bars, list(axis.get_xticks())))
        Path(args[0]).touch()

    monkeypatch.setattr(Figure, 'savefig', savefig)
    assert draw()
    return found


def test_static_nets_and_standard_errors(tmp_path, monkeypatch):
    curves, static = {'budgets': [(1., 90.), (3., 92.)]}, {'small': [(2., 80.)], 'net': [(4., 91.)]}
    (texts, bands, bars, _), = drawn(monkeypatch, lambda: plot_accuracy_over_macs(
        tmp_path / 'c.png', curves, {}, 'net on test', static, images=900))
    assert texts == ['net on test (± one standard error of 900 images)', 'same accuracy at 50 % of the cost']
    assert (bands, bars) == (1, 2)
    # Too small to be seen, and no curve reaches the static net.
    static = {'net': [(4., 99.)]}
    (texts, bands, bars, _), = drawn(monkeypatch, lambda: plot_accuracy_over_macs(
        tmp_path / 'c.png', {'budgets': [(1., 10.), (3., 92.)]}, {}, 'net on test', static, images=1_000_000))
    assert (texts, bands, bars) == (['net on test'], 0, 0)


def test_learning_curve_has_a_title_and_whole_epochs(tmp_path, monkeypatch):
    (tmp_path / 'warmup').mkdir()
    rows = [{'epoch': i, 'train_loss': 1., 'eval_top1': 50. + i} for i in range(3)]
    found = drawn(monkeypatch, lambda: plot_curve(tmp_path / 'warmup' / 'curve.png', rows, 'top1'))
    texts, _, _, ticks = found[0]
    assert texts == ['warmup: training loss and validation top1']
    assert all(tick == int(tick) for tick in ticks)


def test_picture_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--curve: expected a file that ends in one of .*png.*, got 'c.xyz'"):
        check_plot('c.xyz', '--curve')
    check_plot('c.PNG', '--curve')
    import_module = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ValueError, match=r'--curve needs matplotlib.*pip install timm-dynamic\[plot\]'):
        check_plot('c.png', '--curve')
    assert not plot_accuracy_over_macs(tmp_path / 'c.png', {'steps': [(1., 2.)]})
