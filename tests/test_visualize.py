"""Pictures of where models look."""
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_dynamic  # noqa: F401
from timm_dynamic import visualize as vis
from timm_dynamic.exits import early_exit
from timm_dynamic.utils import save_pretrained
from timm_dynamic.visualize import Look, class_names, draw, look, visualize

NAMES = [f'class {c}' for c in 'abcdefghij']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Tiny models of both families, an AnchorNet alone, a static net; and images."""
    folder = tmp_path_factory.mktemp('visualize')
    torch.manual_seed(0)
    for name in ('test_gfnet', 'test_anchornet_patch', 'anchornet', 'test_resnet'):
        save_pretrained(timm.create_model(name), folder / name, **({'label_names': NAMES} if 'patch' in name else {}))
    rng = np.random.default_rng(0)
    for name in ('one.png', 'sub/two.jpg'):
        (folder / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (110, 130, 3), dtype=np.uint8)).save(folder / 'images' / name)
    (folder / 'images' / 'broken.png').write_bytes(b'no image')
    (folder / 'images' / 'notes.txt').write_text('no image')
    return folder


def load(folder, name):
    return timm.create_model(f'local-dir:{folder / name}', pretrained=True).eval()


@pytest.mark.parametrize('name', ['test_gfnet', 'test_anchornet_patch'])
def test_look_is_what_the_model_does(folder, name):
    model, images = load(folder, name), torch.randn(6, 3, 96, 96)
    with torch.inference_mode():
        steps = torch.stack(list(model.forward_steps(images)))
        coords = model.forward_all(images)['coords']
        confidence = steps.softmax(dim=-1).amax(dim=-1)
        assert [seen.steps_used for seen in look(model, images)] == [3] * 6  # no exits are set
        model.set_exit([confidence[0].median().item() + 1e-6, confidence[1].median().item(), 0.])
        used = early_exit(model, images, model.exit_policy).steps_used.tolist()
    seen = look(model, images)
    assert len(set(used)) > 1
    assert [s.steps_used for s in seen] == used
    assert [s.windows for s in seen] == [[tuple(c) for c in coords[:, i].tolist()] for i in range(6)]
    assert [s.labels for s in seen] == steps.argmax(dim=-1).T.tolist()
    torch.testing.assert_close(torch.tensor([s.confidence for s in seen]), confidence.T, rtol=0, atol=1e-5)
    assert seen[0].gmacs == [macs / 1e9 for macs in model.step_macs]
    assert (seen[0].cam is None) == (name == 'test_gfnet')


def test_a_picture_by_hand():
    """A frame around the window that was seen, none of its colour around the other; heat where the map is high."""
    cam = torch.zeros(5, 5)
    cam[1, 3] = 1
    seen = Look(48, [(0, 40), (44, 8)], [1, 2, 2], [0.4, 0.7, 0.8], [1, 2, 3], steps_used=2, cam=cam, cam_label=2,
                cam_origin=24, cam_stride=12)
    image = torch.zeros(3, 96, 96, dtype=torch.uint8)
    picture = np.asarray(draw(image, seen, NAMES.__getitem__, 'title', target=2)).astype(int)
    scale, left, top = vis._PANEL / 96, vis._GAP, vis._GAP + 26

    def at(row, column, panel=0):
        return picture[round(top + row * scale), round(left + panel * (vis._PANEL + vis._GAP) + column * scale)]

    assert at(24, 40.6).tolist() == [0xff, 0xd6, 0x0a]  # window 1, the left edge
    assert at(60, 8).tolist() == [0xbb] * 3  # window 2 was not visited
    assert (picture != [0x4c, 0xc9, 0xf0]).any(axis=2)[:, :left + vis._PANEL].all()
    heat = [at(24 + 12 * r, 24 + 12 * c, panel=1).sum() for r, c in ((1, 3), (2, 2), (3, 3))]
    assert heat[0] > 2 * max(heat[1:])
    lines = vis._step_lines(seen, 1, 2, NAMES.__getitem__, 2)
    assert [line for line, _ in lines] == ['2: window, 2 GMACs so far', 'class c', '70.0 % sure', 'stopped here']
    states = [vis._step_lines(seen, k, 2, NAMES.__getitem__, 2) for k in (0, 2)]
    assert [(lines[1], lines[3][0]) for lines in states] == [
        (('class b', vis._BAD), 'goes on'), (('class c', vis._FAINT), 'not run')]


def test_names_of_classes(folder):
    assert class_names(load(folder, 'test_anchornet_patch'))(3) == 'class d'
    assert class_names(load(folder, 'test_gfnet'))(3) == '3'
    assert class_names(load(folder, 'anchornet'))(281) == 'tabby'
    assert vis._shorten('a' * 99, vis.ImageFont.load_default(14), 60).endswith('a…')


@pytest.mark.parametrize(('name', 'options'), [
    ('test_gfnet', ['--thresholds', '0.5', '0.5', '0']), ('test_anchornet_patch', ['--img-size', '104']),
    ('anchornet', ['--num-windows', '3'])])
def test_folders_of_images(folder, tmp_path, caplog, name, options):
    written = visualize([
        '--model', f'local-dir:{folder / name}', '--input', str(folder / 'images'), '--out', str(tmp_path), *options])
    assert written == [tmp_path / 'one.png.png', tmp_path / 'sub/two.jpg.png']
    for path in written:
        with Image.open(path) as picture:
            assert picture.width == (1 if name == 'test_gfnet' else 2) * (vis._PANEL + vis._GAP) + 394
            assert len(picture.convert('RGB').getcolors(1 << 20)) > 500
    assert 'broken.png' in caplog.text
    assert sorted(p.name for p in tmp_path.rglob('*') if p.is_file()) == ['one.png.png', 'two.jpg.png']


def test_demo_images(folder, tmp_path):
    written = visualize([
        '--model', f'local-dir:{folder / "test_anchornet_patch"}', '--demo', '3', '-b', '2', '--out', str(tmp_path)])
    assert [p.name for p in written] == ['digit_0.png', 'digit_1.png', 'digit_2.png']


def test_anchornet_alone_chooses_as_the_whole_does(folder):
    """Its windows, from its own map; those that the rule does not allow are left out."""
    whole = timm.create_model(
        'anchornet_patch', backbone='test_resnet', patch_size=95, num_steps=4, img_size=160, exact_original=True).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        located = whole.locate(images)
    for i, seen in enumerate(look(whole.localizer, images, num_windows=3)):
        count = int(located['num_valid'][i])
        assert seen.windows == [tuple(w) for w in located['windows'][i, :count].tolist()]
        torch.testing.assert_close(seen.cam, located['cam'][i])


@pytest.mark.parametrize(('options', 'message'), [
    ('--model {test_resnet} --input {images}', r'\(ResNet\) sees whole images only'),
    ('--model test_gfnet51 --input {images}', "There is no model 'test_gfnet51'. Did you mean test_gfnet"),
    ('--model {test_gfnet} --input nowhere', "--input: there is nothing at 'nowhere'"),
    ('--model {test_gfnet} --input {sub}', r'sub.empty. holds no images \('),
    ('--model {test_gfnet} --input {images}/broken.png', 'none of the files at .*broken.png. can be read'),
    ('--model {test_gfnet}', 'either --input PATH or --demo N'),
    ('--model {test_gfnet} --demo 1 --input x', 'either --input PATH or --demo N'),
    ('--model {test_gfnet} --demo 1 --budget 1 --thresholds 1', 'choose one'),
    ('--model {test_gfnet} --demo 1 --budget 0.01', 'This model has no stored budgets'),
    ('--model {test_gfnet} --demo 1 --thresholds 0.5', r'Expected 3 thresholds, one a step, got .* \[1\]'),
    ('--model {anchornet} --demo 1 --thresholds 0.5', "say when to stop; '.*anchornet' makes one prediction"),
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
    said = capsys.readouterr().err if e.type is SystemExit else str(e.value)
    assert re.search(message, said), said
    assert not (tmp_path / 'out').exists()
    if e.type is not SystemExit:
        assert vis.main([*options.format(**paths).split(), '--out', str(tmp_path / 'out')]) == 1
