"""The command line that draws where models look."""
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_dynamic  # noqa: F401
from timm_dynamic.data import create_dataset
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


def test_json_and_probabilities(tmp_path):
    """Every number is that of the model: the sums after each step, each window alone, and its box."""
    visualize(['--model', 'test_anchornet_patch', '--demo', '2', '--thresholds', '0', '0', '0', '--json',
               '--probabilities', '--out', str(tmp_path)])
    model = timm.create_model('test_anchornet_patch', pretrained=True).eval()
    dataset = create_dataset('cluttered_digits', split='test', num_samples=2, img_size=96)
    transform = create_transform(**resolve_data_config(model=model))
    with torch.inference_mode():
        out = model.forward_all(torch.stack([transform(dataset[i][0]) for i in range(2)]))

    def check(found, logits):
        probs, classes = logits.softmax(dim=0).sort(descending=True)
        assert [c['index'] for c in found] == classes.tolist()  # the ten best, of ten
        assert [c['prob'] for c in found] == pytest.approx(probs.tolist(), abs=1e-5)
        assert found[0]['label'] == f'class {classes[0]}'

    for i in range(2):
        found = json.loads((tmp_path / f'digit_{i}.json').read_text())
        assert (found['image'], found['steps_used']) == (f'digit {i}', 1)
        assert found['prediction'] == found['steps'][0]['prediction']
        check(found['localizer'], out['localizer_logits'][i])
        assert [step['box'] for step in found['steps']] == [
            None, *([r, c, r + 47, c + 47] for r, c in out['coords'][:, i].tolist())]
        for t, step in enumerate(found['steps']):
            check(step['prediction'], out['logits'][t, i])
            check(step['own'], out['patch_logits'][t - 1, i] if t else out['logits'][0, i])
            assert step['gmacs'] == model.step_macs[t] / 1e9
        with Image.open(tmp_path / f'digit_{i}.prob.png') as picture:
            colors = {color for _, color in picture.convert('RGB').getcolors(1 << 20)}
            assert {(0x7f, 0xb3, 0xd5), (0xdd, 0xdd, 0xdd)} <= colors  # the step that was used, and the others


def test_json_of_an_anchornet_alone(folder, tmp_path):
    visualize(['--model', f"local-dir:{folder / 'anchornet'}", '--input', str(folder / 'images/one.png'), '--json',
               '--num-windows', '2', '--out', str(tmp_path)])
    found = json.loads((tmp_path / 'one.png.json').read_text())
    assert found.keys() == {'image', 'prediction', 'windows'}
    assert len(found['prediction']) == 10
    assert [box[2] - box[0] for box in found['windows']] == [94, 94]


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
