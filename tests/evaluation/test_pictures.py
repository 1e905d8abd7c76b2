"""Pictures of where models look."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFont

import timm_dynamic  # noqa: F401
from timm_dynamic.evaluation import pictures
from timm_dynamic.evaluation.pictures import ImagePicker, Look, class_names, draw_image, draw_patches, look, to_pixels
from timm_dynamic.exits import early_exit

NAMES = [f'class {c}' for c in 'abcdefghij']


# Looking

@pytest.mark.parametrize('name', ['test_gfnet', 'test_anchornet_patch'])
def test_look_is_what_the_model_does(name):
    model, images = timm.create_model(name).eval(), torch.randn(6, 3, 96, 96)
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


def test_anchornet_alone_chooses_as_the_whole_does():
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


@pytest.mark.parametrize('name', ['test_resnet', 'test_clcnet'])
def test_models_that_see_whole_images(name, tmp_path):
    model = timm.create_model(name).eval()
    x = model.example_input() if name == 'test_clcnet' else torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r'does not choose where to look\. Expected a GFNet'):
        look(model, x)
    assert draw_patches(tmp_path / 'patches.png', model, x) is False
    assert not list(tmp_path.iterdir())


def test_names_of_classes():
    model = timm.create_model('test_gfnet')
    assert class_names(model)(3) == 'class 3'
    model.pretrained_cfg['label_names'] = NAMES
    assert class_names(model)(3) == 'class d'
    model.pretrained_cfg['label_names'] = list('9876543210')
    assert class_names(model)(3) == 'class 6'
    assert class_names(timm.create_model('test_resnet'))(281) == 'tabby'


def test_picked_images_are_of_different_classes():
    def batch(*labels):
        return torch.arange(len(labels)).view(-1, 1, 1, 1) + 10. * torch.tensor(labels).view(-1, 1, 1, 1), torch.tensor(
            labels)

    picker = ImagePicker(3)
    assert picker.images is None
    picker.add(*batch(4, 4))
    assert picker.targets.tolist() == [4, 4]
    assert picker.images.flatten().tolist() == [40, 41]
    picker.add(*batch(4, 4))  # the ones before stay
    assert picker.images.flatten().tolist() == [40, 41, 40]
    picker.add(*batch(4, 7, 7))
    assert picker.targets.tolist() == [4, 7, 4]
    images, targets = batch(4, 5, 6)
    picker.add(images, targets)
    assert picker.targets.tolist() == [4, 7, 5]
    images.zero_()  # what is kept is a copy
    picker.add(*batch(1, 2, 3))
    assert picker.images.flatten().tolist() == [40, 71, 51]
    assert picker.images.shape == (3, 1, 1, 1)


# Drawing

def test_pixels():
    cfg = {'mean': (0.5, 0.25, 0.), 'std': (0.5, 1., 1.)}
    pixels = to_pixels(torch.tensor([0., 0.25, 2.]).view(1, 3, 1, 1), cfg)
    assert pixels.dtype == torch.uint8
    assert pixels.flatten().tolist() == [128, 128, 255]
    assert to_pixels(torch.tensor([-3., 1., -1.]).view(3, 1, 1, 1), None).flatten().tolist() == [
        0, 0, 0, 255, 255, 255, 128, 128, 128]


def test_one_image_by_hand():
    """A frame around the window that was seen, none of its colour around the other; heat where the map is high."""
    cam = torch.zeros(5, 5)
    cam[1, 3] = 1
    seen = Look(48, [(0, 40), (44, 8)], [1, 2, 2], [0.4, 0.7, 0.8], [1, 2, 3], steps_used=2, cam=cam, cam_label=2,
                cam_origin=24, cam_stride=12)
    image = torch.zeros(3, 96, 96, dtype=torch.uint8)
    picture = np.asarray(draw_image(image, seen, NAMES.__getitem__, 'title', target=2)).astype(int)
    scale, left, top = pictures._PANEL / 96, pictures._GAP, pictures._GAP + 26

    def at(row, column, panel=0):
        return picture[
            round(top + row * scale), round(left + panel * (pictures._PANEL + pictures._GAP) + column * scale)]

    assert at(24, 40.6).tolist() == [0xff, 0xd6, 0x0a]  # window 1, the left edge
    assert at(60, 8).tolist() == [0xbb] * 3  # window 2 was not visited
    assert (picture != [0x4c, 0xc9, 0xf0]).any(axis=2)[:, :left + pictures._PANEL].all()
    heat = [at(24 + 12 * r, 24 + 12 * c, panel=1).sum() for r, c in ((1, 3), (2, 2), (3, 3))]
    assert heat[0] > 2 * max(heat[1:])
    good, bad, faint, ink = pictures._GOOD, pictures._BAD, pictures._FAINT, pictures._INK
    assert [pictures._view_lines(seen, k, NAMES.__getitem__, 2) for k in range(3)] == [
        [('1: whole image, 1 GMACs so far', faint), ('class b, 40.0 %', bad), ('goes on', faint)],
        [('2: window, 2 GMACs so far', faint), ('class c, 70.0 %', good), ('stopped here', ink)],
        [('3: window, 3 GMACs so far', faint), ('class c, 80.0 %', faint), ('not run', faint)]]


def test_text_is_shortened():
    font = ImageFont.load_default(14)
    short = pictures.shorten('a' * 99, font, 60)
    assert short.endswith('a…')
    assert font.getlength(short) <= 60
    assert pictures.shorten('class 2', font, 160) == 'class 2'


def test_sheet(tmp_path, monkeypatch):
    """A row per image; green where the prediction is correct, red where not, views that were not used pale."""
    model = timm.create_model('test_gfnet').eval()
    images = torch.randn(2, 3, 96, 96)
    logits = model.forward_all(images)['logits'].detach()
    targets = logits[:, 0].argmax(dim=-1)[:1].repeat(2)  # correct for image 0 after step 1
    texts = []
    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, 'text', lambda self, xy, text, fill, font, **kwargs: texts.append(
        (text, fill)))
    path = tmp_path / 'patches.png'
    assert draw_patches(path, model, images, targets, None, {'7': 7, 'cat': int(targets[0])}) is True
    with Image.open(path) as sheet:
        assert sheet.size == (4 * 166 + 6, 2 * 186 + 26)
        assert len(sheet.convert('RGB').getcolors(1 << 20)) > 500
    assert [text for text, _ in texts[:4]] == ['image, true class', '1: whole image', '2: window', '3: window']
    captions = [(text, fill) for text, fill in texts if text.endswith('%')]
    assert len(captions) == 6
    for i in range(2):
        for t in range(3):
            label, share = int(logits[t, i].argmax()), 100 * logits[t, i].softmax(dim=0).max().item()
            name = 'cat' if label == targets[0] else f'class {label}'
            ink = pictures._GOOD if label == targets[i] else pictures._BAD
            assert captions[3 * i + t] == (f'{name}, {share:.0f} %', ink)
    texts.clear()
    model.set_exit([0., 0., 0.])
    draw_patches(path, model, images)
    assert [fill for text, fill in texts if text.endswith('%')] == [pictures._INK, *[pictures._FAINT] * 2] * 2
