"""The command line that draws where models look."""
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_dynamic  # noqa: F401
from timm_dynamic.utils import save_pretrained
from timm_dynamic.visualize import main, visualize


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Tiny models of both families, an AnchorNet alone, a static net; and images."""
    folder = tmp_path_factory.mktemp('visualize')
    torch.manual_seed(0)
    for name in ('test_gfnet', 'test_anchornet_patch', 'anchornet', 'test_resnet'):
        save_pretrained(timm.create_model(name), folder / name)
    rng = np.random.default_rng(0)
    for name in ('one.png', 'sub/two.jpg'):
        (folder / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (110, 130, 3), dtype=np.uint8)).save(folder / 'images' / name)
    (folder / 'images' / 'broken.png').write_bytes(b'no image')
    (folder / 'images' / 'notes.txt').write_text('no image')
    return folder


@pytest.mark.parametrize(('name', 'options'), [
    ('test_gfnet', ['--thresholds', '0.5', '0.5', '0']), ('test_anchornet_patch', ['--img-size', '104']),
    ('anchornet', ['--num-windows', '3'])])
def test_folders_of_images(folder, tmp_path, caplog, name, options):
    written = visualize([
        '--model', f'local-dir:{folder / name}', '--input', str(folder / 'images'), '--out', str(tmp_path), *options])
    assert written == [tmp_path / 'one.png.png', tmp_path / 'sub/two.jpg.png']
    for path in written:
        with Image.open(path) as picture:
            assert picture.width == (1 if name == 'test_gfnet' else 2) * (352 + 12) + 394
            assert len(picture.convert('RGB').getcolors(1 << 20)) > 500
    assert 'broken.png' in caplog.text
    assert sorted(p.name for p in tmp_path.rglob('*') if p.is_file()) == ['one.png.png', 'two.jpg.png']


def test_demo_images(folder, tmp_path):
    written = visualize([
        '--model', f'local-dir:{folder / "test_anchornet_patch"}', '--demo', '3', '-b', '2', '--out', str(tmp_path)])
    assert [p.name for p in written] == ['digit_0.png', 'digit_1.png', 'digit_2.png']


@pytest.mark.parametrize(('options', 'message'), [
    ('--model {test_resnet} --input {images}', r'\(ResNet\) sees whole images only'),
    ('--model test_gfnet51 --input {images}', "There is no model 'test_gfnet51'. Did you mean test_gfnet"),
    ('--model {test_gfnet} --input nowhere', "--input: there is nothing at 'nowhere'"),
    ('--model {test_gfnet} --input {sub}', r'sub.empty. holds no images \('),
    ('--model {test_gfnet} --input {images}/broken.png', 'none of the files at .*broken.png. can be read'),
    ('--model {test_gfnet}', 'give either --input PATH or --demo N'),
    ('--model {test_gfnet} --demo 1 --input x', 'give either --input PATH or --demo N'),
    ('--model {test_gfnet} --demo 1 --budget 1 --thresholds 1', 'choose one'),
    ('--model {test_gfnet} --demo 1 --budget 0.01', 'This model has no stored budgets'),
    ('--model {test_gfnet} --demo 1 --thresholds 0.5', r'Expected 3 thresholds, one a step, got .* \[1\]'),
    ('--model {anchornet} --demo 1 --thresholds 0.5', "are for models with several steps; '.*anchornet' has one"),
    ('--model {anchornet} --demo 1 --num-windows 290', '1 to 289 windows of a 17x17 map, got 290'),
    ('--model {anchornet} --demo 1 --num-windows 0', 'expected positive numbers'),
    ('--model {anchornet} --demo 1 --iou-threshold nan', r'Overlap thresholds are shares in 0..1, got \[nan'),
    ('--model {anchornet} --demo 1 --img-size 90', 'Images of 90x90 pixels hold no window of 95'),
    ('--model {anchornet} --demo 1 --num-classes 0', 'AnchorNet needs its classifier'),
])
def test_mistakes(folder, tmp_path, capsys, options, message):
    (tmp_path / 'sub.empty').mkdir()
    paths = {p.name: f'local-dir:{p}' for p in folder.iterdir()}
    paths.update(images=folder / 'images', sub=tmp_path / 'sub.empty')
    with pytest.raises((SystemExit, ValueError)) as e:
        visualize([*options.format(**paths).split(), '--out', str(tmp_path / 'out')])
    error = capsys.readouterr().err if e.type is SystemExit else str(e.value)
    assert re.search(message, error), error
    assert not (tmp_path / 'out').exists()
    if e.type is not SystemExit:
        assert main([*options.format(**paths).split(), '--out', str(tmp_path / 'out')]) == 1
