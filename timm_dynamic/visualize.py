"""Pictures of where a model looks, and of what it thinks after each step.

    python -m timm_dynamic.visualize --model test_gfnet --demo 4 --out pictures
    python -m timm_dynamic.visualize --model anchornet_patch_densenet201_95 --checkpoint FOLDER --input IMAGES --out DIR
    python -m timm_dynamic.visualize --model anchornet --checkpoint anchornet.pth --input photo.jpg --out DIR
"""
import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, get_img_extensions, infer_imagenet_subset, resolve_data_config
from timm.utils import ParseKwargs
from torch.nn import functional as F

from .data import create_dataset
from .exits.table import run_policy
from .launch.script import run_script
from .layers import choose_windows, class_activation_map
from .models.anchornet import AnchorNet
from .models.builder import check_model_name
from .models.dynamic_net import DynamicNet
from .training.patches import to_pixels
from .utils import atomic_write

_logger = logging.getLogger(__name__)

_PANEL, _VIEW, _GAP, _TEXT = 352, 88, 12, 270  # pixels: image and map, thumbnails, between things, width of text
_COLORS = ('#ffd60a', '#4cc9f0', '#ff5d8f', '#80ed99', '#ff9f1c', '#c77dff', '#ffffff', '#00f5d4')
_INK, _FAINT, _GOOD, _BAD = '#222222', '#888888', '#0a7d2c', '#b3261e'
# From low to high values of a map.
_HEAT = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))


@dataclass(frozen=True)
class Look:
    """Where a model looks in one image, and what comes of it.

    Attributes:
        size: Side of the windows, in pixels of the image that the model sees.
        windows: Top row and left column of each, in the order in which they are visited.
        labels: What the model takes the image for after each step: class indices.
        confidence: How sure it is, 0..1.
        gmacs: What the steps cost up to each, in 10⁹ multiply-adds; empty if nothing is known of it.
        steps_used: After how many steps it stopped.
        cam: Class activation map [h, w], if it has one.
        cam_label: The class that the map speaks of.
        cam_origin: Middle of what the map's first position sees, in pixels from the image's edge.
        cam_stride: How far the middles of neighbouring positions lie apart.
        glance: Step 1 is the whole image, scaled down; the windows follow.
    """
    size: int
    windows: list[tuple[int, int]]
    labels: list[int]
    confidence: list[float]
    gmacs: list[float] = field(default_factory=list)
    steps_used: int = 0
    cam: torch.Tensor | None = None
    cam_label: int | None = None
    cam_origin: float = 0.
    cam_stride: float = 1.
    glance: bool = True


@torch.inference_mode()
def look(
        model: Any,
        images: torch.Tensor,
        num_windows: int = 4,
        iou_threshold: float = 0.3,
) -> list[Look]:
    """Find out where a model looks.

    Args:
        model: A GFNet, an AnchorNet-patch, or an AnchorNet alone, in eval mode. Where exits are set on it, they say
            where it stops.
        images: Normalised images [N, C, S, S].
        num_windows: How many windows an AnchorNet alone chooses.
        iou_threshold: How much they may overlap.

    Raises:
        ValueError: The model does not choose where to look, or the images do not fit it.
    """
    if isinstance(model, AnchorNet):
        return _look_alone(model, images, num_windows, iou_threshold)
    out = model.forward_all(images) if isinstance(model, DynamicNet) else {}
    if 'coords' not in out:
        raise ValueError(
            f'{type(model).__name__} does not choose where to look. Expected a GFNet, an AnchorNet-patch or an '
            'AnchorNet.')
    logits = out['logits']
    confidence = torch.stack([model.confidence(step, {}) for step in logits], dim=1)  # [N, T]
    rule = model.exit_policy
    steps_used = [model.num_steps] * len(images) if rule is None else run_policy(rule, confidence).tolist()
    labels = logits.argmax(dim=-1)
    cams, localized = out.get('cam'), out.get('localizer_logits')
    return [Look(
        size=model.patch_size,
        windows=[(row, column) for row, column in out['coords'][:, i].tolist()],
        labels=labels[:, i].tolist(),
        confidence=confidence[i].tolist(),
        gmacs=[macs / 1e9 for macs in model.step_macs],
        steps_used=steps_used[i],
        cam=None if cams is None else cams[i].float().cpu(),
        cam_label=None if localized is None else int(localized[i].argmax()),
        cam_origin=0. if cams is None else (model.localizer_field or model.localizer_stride) / 2,
        cam_stride=1. if cams is None else model.localizer_stride,
    ) for i in range(len(images))]


def _look_alone(model: AnchorNet, images: torch.Tensor, num_windows: int, iou_threshold: float) -> list[Look]:
    features = model.forward_features(images)
    logits = model.forward_head(features)
    if not isinstance(model.fc, torch.nn.Linear):
        raise ValueError('The windows are those of a class: AnchorNet needs its classifier, got num_classes=0.')
    confidence, labels = logits.float().softmax(dim=-1).amax(dim=-1), logits.argmax(dim=-1)
    cam = class_activation_map(features.float(), model.fc.weight.float(), labels)
    rows, columns = (torch.arange(n) * model.stride for n in cam.shape[1:])
    index, found = choose_windows(
        cam.cpu(), (rows, columns), model.receptive_field, num_windows, [iou_threshold] * (num_windows - 1))
    corners = torch.stack([rows[index // cam.shape[2]], columns[index % cam.shape[2]]], dim=2).tolist()
    return [Look(
        size=model.receptive_field,
        windows=[(row, column) for row, column in corners[i][:int(found[i])]],
        labels=[int(labels[i])],
        confidence=[float(confidence[i])],
        cam=cam[i].cpu(),
        cam_label=int(labels[i]),
        cam_origin=model.receptive_field / 2,
        cam_stride=model.stride,
        glance=False,
    ) for i in range(len(images))]


def class_names(model: Any) -> Callable[[int], str]:
    """How to call a model's classes: as its config does, as ImageNet's are called, or by number."""
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return lambda index: str(names[index])
    subset = infer_imagenet_subset(model)
    if subset is None:
        return str
    info = ImageNetInfo(subset)
    return lambda index: info.index_to_description(index).partition(',')[0]


def draw(
        image: torch.Tensor,
        seen: Look,
        name_of: Callable[[int], str] = str,
        title: str = '',
        target: int | None = None,
) -> Image.Image:
    """Draw an image with its windows in visiting order, the activation map, and what each step makes of it.

    Args:
        image: Pixels of the image as the model sees it [3, S, S], uint8.
        seen: What `look` found.
        name_of: Names of classes.
        title: Stands above.
        target: The true class.
    """
    side, stops = image.shape[-1], seen.steps_used or len(seen.labels)
    panels = 1 if seen.cam is None else 2
    first = int(seen.glance)
    num_views = len(seen.windows) + first
    top = _GAP + 26
    width = panels * (_PANEL + _GAP) + _VIEW + _TEXT + 3 * _GAP
    height = top + max(_PANEL + 26 + _GAP, num_views * (_VIEW + _GAP))
    sheet = Image.new('RGB', (width, height), 'white')
    pen = ImageDraw.Draw(sheet)
    small, large = (ImageFont.load_default(size) for size in (14, 17))
    truth = '' if target is None else f'  (true class: {name_of(target)})'
    pen.text((_GAP, _GAP - 2), _shorten(f'{title}{truth}', large, width - 2 * _GAP), _INK, large)

    whole = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    scale = _PANEL / side
    panel = whole.resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
    visited = stops - 1 if seen.glance else len(seen.windows)
    boxes = [(column * scale, row * scale, (column + seen.size) * scale, (row + seen.size) * scale)
             for row, column in seen.windows]
    _draw_boxes(panel, boxes, visited, first, large)
    sheet.paste(panel, (_GAP, top))
    pen.text((_GAP, top + _PANEL + 5), f'windows of {seen.size} in an image of {side}', _FAINT, small)

    if seen.cam is not None:
        heat = Image.blend(
            whole.convert('L').convert('RGB').resize((_PANEL, _PANEL)), _heat_map(seen, side), 0.65)
        _draw_boxes(heat, boxes, visited, first, None)
        left = 2 * _GAP + _PANEL
        sheet.paste(heat, (left, top))
        text = f"activation map of '{name_of(seen.cam_label or 0)}'"
        pen.text((left, top + _PANEL + 5), _shorten(text, small, _PANEL), _FAINT, small)

    left = panels * (_PANEL + _GAP) + 2 * _GAP
    for k in range(num_views):
        y, unused = top + k * (_VIEW + _GAP), seen.glance and k >= stops
        if seen.glance and k == 0:
            view, color = whole.resize((seen.size, seen.size), Image.Resampling.BICUBIC), _FAINT
        else:
            row, column = seen.windows[k - first]
            view = whole.crop((column, row, column + seen.size, row + seen.size))
            color = _COLORS[(k - first) % len(_COLORS)]
        view = view.resize((_VIEW, _VIEW), Image.Resampling.BICUBIC)
        sheet.paste(Image.blend(view, Image.new('RGB', view.size, 'white'), 0.6) if unused else view, (left, y))
        pen.rectangle((left, y, left + _VIEW - 1, y + _VIEW - 1), outline=color, width=3)
        lines = _step_lines(seen, k, stops, name_of, target)
        for i, (line, ink) in enumerate(lines):
            font = large if i == 1 else small
            pen.text((left + _VIEW + _GAP, y + 19 * i), _shorten(line, font, _TEXT - _GAP), ink, font)
    return sheet


def _step_lines(
        seen: Look,
        k: int,
        stops: int,
        name_of: Callable[[int], str],
        target: int | None,
) -> list[tuple[str, str]]:
    """What stands beside a view: lines and their colours."""
    if not seen.glance:
        row, column = seen.windows[k]
        own = [(f"taken for: {name_of(seen.labels[0])}", _INK), (f'{100 * seen.confidence[0]:.1f} % sure', _INK)]
        return [(f'window {k + 1}', _FAINT), (f'row {row}, column {column}', _INK), *(own if k == 0 else [])]
    cost = f', {seen.gmacs[k]:.3g} GMACs so far' if seen.gmacs else ''
    label, unused = seen.labels[k], k >= stops
    ink = _FAINT if unused else _INK if target is None else _GOOD if label == target else _BAD
    state = 'stopped here' if k == stops - 1 else 'not run' if unused else 'goes on'
    if k == len(seen.labels) - 1 and k == stops - 1:
        state = 'last step'
    return [
        (f'{k + 1}: {"whole image" if k == 0 else "window"}{cost}', _FAINT),
        (name_of(label), ink),
        (f'{100 * seen.confidence[k]:.1f} % sure', ink),
        (state, _INK if k == stops - 1 else _FAINT),
    ]


def _draw_boxes(picture: Image.Image, boxes: Sequence[Any], visited: int, first: int, font: Any) -> None:
    """Windows with their numbers; those that were not visited thin and without."""
    pen = ImageDraw.Draw(picture)
    for k in reversed(range(len(boxes))):  # the first one is on top
        x0, y0, x1, y1 = boxes[k]
        color = _COLORS[k % len(_COLORS)]
        if k >= visited:
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline='#bbbbbb', width=1)
            continue
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline='black', width=5)
        pen.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline=color, width=3)
    if font is None:
        return
    places: list[tuple[float, float]] = []
    for k in range(min(visited, len(boxes))):
        x, y = boxes[k][0] + 4, boxes[k][1] + 4
        while any(abs(x - u) < 24 and abs(y - v) < 24 for u, v in places):  # windows may share a corner
            x += 24
        places.append((x, y))
        pen.rectangle((x, y, x + 20, y + 20), fill='black')
        pen.text((x + 10, y + 10), str(k + 1 + first), _COLORS[k % len(_COLORS)], font, anchor='mm')


def _heat_map(seen: Look, side: int) -> Image.Image:
    """The map in colours, each position over the middle of what it sees."""
    assert seen.cam is not None
    cam = seen.cam - seen.cam.amin()
    cam = cam / cam.amax().clamp(min=1e-12)
    pixel = (torch.arange(_PANEL) + 0.5) * side / _PANEL
    y, x = (2 * (pixel - seen.cam_origin) / seen.cam_stride / max(n - 1, 1) - 1 for n in cam.shape)
    grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1)
    smooth = F.grid_sample(cam[None, None], grid[None], align_corners=True, padding_mode='border')[0, 0]
    stops = torch.tensor(_HEAT, dtype=torch.float32)
    at = smooth * (len(stops) - 1)
    below = at.floor().long().clamp(0, len(stops) - 2)
    colors = torch.lerp(stops[below], stops[below + 1], (at - below)[..., None])
    return Image.fromarray(colors.round().clamp(0, 255).byte().numpy())


def _shorten(text: str, font: Any, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}…') > width:
        text = text[:-1]
    return f'{text.rstrip()}…'


def create_parser() -> argparse.ArgumentParser:
    """Parser for python -m timm_dynamic.visualize."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_dynamic.visualize', allow_abbrev=False,
        description='Draw where a GFNet, an AnchorNet-patch or an AnchorNet looks, and what it thinks after each step.')
    add = parser.add_argument
    add('--model', '-m', required=True, metavar='NAME', help="a model with its weights, or 'local-dir:FOLDER'")
    add('--checkpoint', default='', metavar='FILE', help=(
        "weights: a file, a stage's folder, or a folder with the authors' files (default: the pretrained ones)"))
    add('--input', '-i', metavar='PATH', help='an image, or a folder of images, subfolders included')
    add('--demo', type=int, metavar='N', help='draw N images of the embedded demo set instead')
    add('--demo-digit-scale', type=int, nargs=2, default=[24, 36], metavar=('LO', 'HI'), help='(24 36)')
    add('--demo-clutter', type=float, default=0.5, metavar='X', help='(%(default)s)')
    add('--out', '-o', required=True, metavar='DIR', help='folder for the pictures, one PNG per image')
    add('--budget', type=float, metavar='G', help='stop as the exits for this budget do (GMACs per image on average)')
    add('--thresholds', type=float, nargs='+', metavar='T', help='stop where the confidence reaches these, one a step')
    add('--num-windows', type=int, default=4, metavar='N', help='that an AnchorNet alone chooses (%(default)s)')
    add('--iou-threshold', type=float, default=0.3, metavar='X', help='how much these may overlap (%(default)s)')
    add('--num-classes', type=int, metavar='N')
    add('--img-size', type=int, metavar='N', help='side of the images')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='passed to the model')
    add('--batch-size', '-b', type=int, default=16, metavar='N', help='(%(default)s)')
    add('--device', default='cpu', metavar='DEVICE', help='(%(default)s)')
    return parser


def open_model(args: argparse.Namespace) -> Any:
    """Create the model with its weights and exits.

    Raises:
        ValueError: There is no such model, or the exits asked for do not fit it.
        CheckpointError: Its weights are not to be had or do not fit.
    """
    check_model_name(args.model)
    kwargs = dict(args.model_kwargs)
    if args.num_classes is not None:
        kwargs['num_classes'] = args.num_classes
    if args.checkpoint:
        kwargs['pretrained_cfg_overlay'] = {'file': args.checkpoint}
    model: Any = timm.create_model(args.model, pretrained=True, **kwargs)
    if not isinstance(model, (DynamicNet, AnchorNet)):
        raise ValueError(
            f"'{args.model}' ({type(model).__name__}) sees whole images only. Expected a GFNet, an AnchorNet-patch or "
            'an AnchorNet.')
    if isinstance(model, DynamicNet) and args.img_size:
        model.set_input_size(args.img_size)
    if args.budget is not None or args.thresholds:
        if not isinstance(model, DynamicNet):
            raise ValueError(f"--budget and --thresholds say when to stop; '{args.model}' makes one prediction.")
        if args.budget is not None:
            model.set_budget(gmacs=args.budget)
        else:
            model.set_exit(args.thresholds)
    return model.eval().to(args.device)


def find_images(path: str | Path) -> list[tuple[Path, str]]:
    """Image files, by path, and what to call them.

    Raises:
        ValueError: There are none.
    """
    path = Path(path)
    if path.is_file():
        return [(path, path.name)]
    if not path.exists():
        raise ValueError(f"--input: there is nothing at '{path}'.")
    kinds = get_img_extensions(as_set=True)
    files = sorted(p for p in path.rglob('*') if p.suffix.lower() in kinds)
    if not files:
        raise ValueError(f"--input: '{path}' holds no images ({', '.join(sorted(kinds))}).")
    return [(p, p.relative_to(path).as_posix()) for p in files]


def read_images(args: argparse.Namespace, img_size: int) -> Iterator[tuple[Image.Image, str, int | None]]:
    """Images with their names and, of the demo set, their classes. A file that cannot be read is passed over."""
    if args.demo is not None:
        dataset = create_dataset(
            'cluttered_digits', split='test', img_size=img_size, digit_scale=args.demo_digit_scale,
            clutter=args.demo_clutter, num_samples=args.demo)
        for i in range(len(dataset)):
            image, target = dataset[i]
            yield image, f'digit {i}', int(target)
        return
    for path, name in find_images(args.input):
        try:
            with Image.open(path) as image:
                yield image.convert('RGB'), name, None
        except (OSError, UnidentifiedImageError) as e:
            _logger.warning(f"'{path}' cannot be read as an image, and is passed over: {e}")


def visualize(argv: Sequence[str] | None = None) -> list[Path]:
    """Run python -m timm_dynamic.visualize.

    Args:
        argv: Command line without the module's name (default: this process's).

    Returns:
        The pictures that were written.
    """
    parser = create_parser()
    args = parser.parse_args(argv)
    if (args.input is None) == (args.demo is None):
        parser.error('say what to draw: either --input PATH or --demo N.')
    if args.budget is not None and args.thresholds:
        parser.error('--budget and --thresholds both say when to stop: choose one.')
    if args.batch_size < 1 or args.num_windows < 1:
        parser.error(f'expected positive numbers, got --batch-size {args.batch_size}, '
                     f'--num-windows {args.num_windows}.')
    if args.input is not None:
        find_images(args.input)  # before the model is made
    model = open_model(args)
    config = resolve_data_config(
        {'img_size': args.img_size or (model.img_size if isinstance(model, DynamicNet) else None)}, model=model)
    transform: Any = create_transform(**config, is_training=False)
    name_of, written = class_names(model), []
    batch: list[tuple[Image.Image, str, int | None]] = []

    def draw_batch() -> None:
        images = torch.stack([transform(image) for image, *_ in batch]).to(args.device)
        if images.shape[1] != config['input_size'][0]:
            raise ValueError(f"'{args.model}' takes images of {config['input_size'][0]} channels.")
        looks = look(model, images, args.num_windows, args.iou_threshold)
        for pixels, seen, (_, name, target) in zip(to_pixels(images, config).byte(), looks, batch):
            path = Path(args.out) / f"{name.replace(' ', '_')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as tmp:
                draw(pixels, seen, name_of, name, target).save(tmp, 'png')
            written.append(path)
        batch.clear()

    for item in read_images(args, config['input_size'][-1]):
        batch.append(item)
        if len(batch) == args.batch_size:
            draw_batch()
    if batch:
        draw_batch()
    if not written:
        raise ValueError(f"--input: none of the files at '{args.input}' can be read as an image.")
    _logger.info(f'{len(written)} pictures: {args.out}')
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0; 1 for what the user can mend."""
    def script() -> int:
        visualize(argv)
        return 0

    return run_script(script)


if __name__ == '__main__':
    import timm_dynamic  # noqa: F401  registers the models

    sys.exit(main())
