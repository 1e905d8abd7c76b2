"""Tables, CSV files and pictures."""
import builtins
import math

import pytest
from PIL import Image

from timm_dynamic.utils.report import check_plot, format_table, plot_accuracy_over_macs, read_rows, write_rows


def test_small_numbers_and_lists(tmp_path):
    rows = [{'point': 'a', 'gmacs': 0.001234, 'thresholds': [0.5, 1 / 3]}, {'point': 'b', 'gmacs': 2.0}]
    text = format_table(rows)
    assert '0.00123  0.5 0.3333' in text
    assert '2.00000' in text
    write_rows(tmp_path / 'r.csv', rows)
    assert read_rows(tmp_path / 'r.csv')[0]['thresholds'] == f'0.5 {1 / 3}'
    odd = format_table([{'zero': 0.0, 'nan': math.nan, 'inf': math.inf}])
    assert odd.splitlines()[-1].split() == ['0.000', 'nan', 'inf']


@pytest.mark.parametrize('costs', [(1., 2.), (0.01, 2.)])
def test_picture(tmp_path, costs):
    path = tmp_path / 'new' / 'c.png'
    assert plot_accuracy_over_macs(
        path, {'steps': [(c, 50.) for c in costs]}, {'static': [(1.5, 60.)], 'points': [(1., 2.), (2., 3.)]}, 'It')
    with Image.open(path) as image:
        colours = {image.getpixel((x, y))[:3] for x in range(image.width) for y in range(image.height)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # a line and two kinds of markers
    assert not list(path.parent.glob('.partial*'))


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
