"""Pictures of where models look: windows, activation maps, and the prediction after each step."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch.nn import functional as F

from ..exits.table import run_policy
from ..layers import choose_windows, class_activation_map
from ..models.anchornet import AnchorNet
from ..models.dynamic_net import DynamicNet
from ..utils import atomic_write

_PANEL, _VIEW, _GAP, _TEXT = 352, 88, 12, 270  # of one image, in pixels: image and map, views, gaps, width of text
_CELL, _CELL_GAP, _CAPTION = 160, 6, 20  # of a sheet, in pixels: image and views, gaps, height of a caption
_COLORS = ('#ffd60a', '#4cc9f0', '#ff5d8f', '#80ed99', '#ff9f1c', '#c77dff', '#ffffff', '#00f5d4')
_INK, _FAINT, _GOOD, _BAD = '#222222', '#888888', '#0a7d2c', '#b3261e'
# From low to high values of a map.
_HEAT = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))


# Looking

# Classes with the largest probabilities: (class index, probability), the best first.
TopClasses = list[tuple[int, float]]
_NUM_BEST = 10


@dataclass(frozen=True)
class Look:
    """Where a model looks in one image, and what it predicts.

    Attributes:
        size: Side of the windows, in pixels of the image that the model sees.
        windows: Top row and left column of each, in the order in which the model sees them.
        labels: Class index predicted after each step.
        confidence: Confidence after each step, 0..1.
        gmacs: Cost up to each step, in 10⁹ multiply-adds; empty if unknown.
        steps_used: Number of steps after which the model stopped; 0 if it has none.
        cam: Class activation map [h, w], if the model has one.
        cam_label: The class of the map.
        cam_origin: Center of the map's first position, in pixels from the image's edge.
        cam_stride: Distance between the centers of neighbouring positions, in pixels.
        best: The ten best classes after each step.
        own: The ten best classes by the logits of each view alone, of models that add up logits.
        localizer: The ten best classes of the localizer, if there is one.
        glance: Step 1 sees the whole image, scaled down; each further step sees a window.
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
    best: list[TopClasses] = field(default_factory=list)
    own: list[TopClasses] = field(default_factory=list)
    localizer: TopClasses = field(default_factory=list)
    glance: bool = True


def look(
        model: Any,
        images: torch.Tensor,
        num_windows: int = 4,
        iou_threshold: float = 0.3,
) -> list[Look]:
    """Find out where a model looks.

    Args:
        model: A GFNet, an AnchorNet-patch, or an AnchorNet alone, in eval mode. It stops where its exit policy says, if
            one is set.
        images: Normalised images [N, C, S, S].
        num_windows: Number of windows for an AnchorNet alone.
        iou_threshold: Largest overlap of these.

    Raises:
        ValueError: The model does not choose where to look, or the images do not fit it.
    """
    with torch.inference_mode():
        if isinstance(model, AnchorNet):
            return _look_alone(model, images, num_windows, iou_threshold)
        looks = _look_by_step(model, images)
    if looks is None:
        raise ValueError(
            f'{type(model).__name__} does not choose where to look. Expected a GFNet, an AnchorNet-patch or an '
            'AnchorNet.')
    return looks


def _look_by_step(model: Any, images: torch.Tensor) -> list[Look] | None:
    """None if the model does not choose where to look."""
    out = model.forward_all(images) if isinstance(model, DynamicNet) else {}
    if 'coords' not in out:
        return None
    logits = out['logits']
    confidence = torch.stack([model.confidence(step, {}) for step in logits], dim=1)  # [N, T]
    rule = model.exit_policy
    steps_used = [model.num_steps] * len(images) if rule is None else run_policy(rule, confidence).tolist()
    labels = logits.argmax(dim=-1)
    cams, localized, patches = out.get('cam'), out.get('localizer_logits'), out.get('patch_logits')
    best = _best_classes(logits.transpose(0, 1))
    own = None if patches is None else _best_classes(torch.cat([logits[:1], patches]).transpose(0, 1))
    localizer = None if localized is None else _best_classes(localized)
    return [Look(
        size=model.patch_size,
        windows=[(row, column) for row, column in out['coords'][:, i].tolist()],
        labels=labels[:, i].tolist(),
        best=best[i],
        confidence=confidence[i].tolist(),
        gmacs=[macs / 1e9 for macs in model.step_macs],
        steps_used=steps_used[i],
        cam=None if cams is None else cams[i].float().cpu(),
        cam_label=None if localized is None else int(localized[i].argmax()),
        cam_origin=0. if cams is None else (model.localizer_field or model.localizer_stride) / 2,
        cam_stride=1. if cams is None else model.localizer_stride,
        own=[] if own is None else own[i],
        localizer=[] if localizer is None else localizer[i],
    ) for i in range(len(images))]


def _best_classes(logits: torch.Tensor) -> list[Any]:
    """`TopClasses` of logits [..., C], as nested lists."""
    if logits.ndim > 1:
        return [_best_classes(part) for part in logits]
    probabilities, classes = logits.float().softmax(dim=0).topk(min(_NUM_BEST, len(logits)))
    return list(zip(classes.tolist(), probabilities.tolist()))


def _look_alone(model: AnchorNet, images: torch.Tensor, num_windows: int, iou_threshold: float) -> list[Look]:
    features = model.forward_features(images)
    logits = model.forward_head(features)
    if not isinstance(model.fc, torch.nn.Linear):
        raise ValueError('The windows are those of a class: AnchorNet needs its classifier, got num_classes=0.')
    confidence, labels = logits.float().softmax(dim=-1).amax(dim=-1), logits.argmax(dim=-1)
    best = _best_classes(logits)
    cam = class_activation_map(features.float(), model.fc.weight.float(), labels)
    rows, columns = (torch.arange(n) * model.stride for n in cam.shape[1:])
    index, found = choose_windows(
        cam.cpu(), (rows, columns), model.receptive_field, num_windows, [iou_threshold] * (num_windows - 1))
    corners = torch.stack([rows[index // cam.shape[2]], columns[index % cam.shape[2]]], dim=2).tolist()
    return [Look(
        size=model.receptive_field,
        windows=[(row, column) for row, column in corners[i][:int(found[i])]],
        labels=[int(labels[i])],
        best=[best[i]],
        confidence=[float(confidence[i])],
        cam=cam[i].cpu(),
        cam_label=int(labels[i]),
        cam_origin=model.receptive_field / 2,
        cam_stride=model.stride,
        glance=False,
    ) for i in range(len(images))]


def class_names(model: Any) -> Callable[[int], str]:
    """Names of a model's classes: those of its config, ImageNet's, or 'class 0', 'class 1', ..."""
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return _named(dict(enumerate(names)))
    subset = infer_imagenet_subset(model)
    if subset is None:
        return _named({})
    info = ImageNetInfo(subset)
    return lambda index: info.index_to_description(index).partition(',')[0]


def _named(names: Mapping[int, Any]) -> Callable[[int], str]:
    """Names by class index. A bare number is written 'class 2', and so is a class without a name."""
    def name_of(index: int) -> str:
        name = str(names.get(index, index))
        return f'class {name}' if name.isdigit() else name

    return name_of


class ImagePicker:
    """Keeps a few images of a loader to draw, of different classes if it has them.

    Args:
        num: Number of images.

    Attributes:
        images: [n, C, S, S] with n <= num, `targets` their classes [n] int64; None before the first batch.
    """
    images: torch.Tensor | None = None
    targets: torch.Tensor | None = None

    def __init__(self, num: int) -> None:
        self.num = num
        self._kept: list[tuple[int, torch.Tensor]] = []  # class and image

    def add(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        """Offer a batch: images [B, C, S, S] and class indices [B]."""
        if len({label for label, _ in self._kept}) == self.num:
            return
        seen: set[int] = set()
        first: list[tuple[int, torch.Tensor]] = []
        again: list[tuple[int, torch.Tensor]] = []  # of classes seen before
        for label, image in [*self._kept, *zip(targets.tolist(), images)]:
            (again if label in seen else first).append((label, image))
            seen.add(label)
        self._kept = [(label, image.clone()) for label, image in [*first, *again][:self.num]]
        self.images = torch.stack([image for _, image in self._kept])
        self.targets = torch.tensor([label for label, _ in self._kept], device=targets.device)


# Drawing

def to_pixels(images: torch.Tensor, data_config: Mapping[str, Any] | None) -> torch.Tensor:
    """Undo the normalisation of images.

    Args:
        images: Normalised images [N, C, S, S].
        data_config: Has the 'mean' and 'std' that they are normalised with; None: their range becomes 0..255.

    Returns:
        [N, 3, S, S] uint8.
    """
    images = images.float()
    if data_config is not None:
        mean, std = (torch.tensor(data_config[k], device=images.device).view(1, -1, 1, 1) for k in ('mean', 'std'))
        images = images * std + mean
    else:
        low, high = images.amin(), images.amax()
        images = (images - low) / (high - low).clamp(min=1e-6)
    images = (255 * images).round().clamp(0, 255)
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return images.byte()


def draw_patches(
        path: str | Path,
        model: Any,
        images: torch.Tensor,
        targets: torch.Tensor | None = None,
        data_config: Mapping[str, Any] | None = None,
        class_to_idx: Mapping[str, int] | None = None,
) -> bool:
    """Write a sheet of where a dynamic model looks and what it predicts after each step, a row per image.

    Args:
        path: PNG to write.
        model: A GFNet or AnchorNet-patch in eval mode. Nothing is drawn for models that do not choose where to look.
        images: Normalised images [N, C, S, S].
        targets: True classes [N].
        data_config: See `to_pixels`.
        class_to_idx: Names of the classes.

    Returns:
        Whether the sheet was written.
    """
    with torch.inference_mode():
        looks = _look_by_step(model, images)
    if looks is None:
        return False
    name_of = _named({i: name for name, i in (class_to_idx or {}).items()})
    sheet = draw_sheet(to_pixels(images, data_config), looks, name_of, None if targets is None else targets.tolist())
    with atomic_write(path) as tmp:
        sheet.save(tmp, 'png')
    return True


def draw_sheet(
        images: Iterable[torch.Tensor],
        looks: Sequence[Look],
        name_of: Callable[[int], str] = str,
        targets: Sequence[int] | None = None,
) -> Image.Image:
    """Draw a row per image: the image with its windows in their order, and what each step sees.

    The prediction after a step is written below its view: green if it is correct, else red.

    Args:
        images: Pixels of the images as the model sees them [3, S, S], uint8.
        looks: What `look` found in them, at least one.
        name_of: Names of classes.
        targets: True classes.
    """
    num_views = max(map(_num_views, looks))
    step, row_height, top = _CELL + _CELL_GAP, _CELL + _CAPTION + _CELL_GAP, _CAPTION + _CELL_GAP
    sheet = Image.new('RGB', ((num_views + 1) * step + _CELL_GAP, len(looks) * row_height + top), 'white')
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    first = 'image' if targets is None else 'image, true class'
    for k, heading in enumerate([first, *(_view_name(looks[0], k) for k in range(num_views))]):
        pen.text((_CELL_GAP + k * step, _CELL_GAP - 2), heading, _FAINT, font)
    for i, (image, seen) in enumerate(zip(images, looks)):
        whole, y, x = _to_image(image), top + i * row_height, _CELL_GAP
        panel = whole.resize((_CELL, _CELL), Image.Resampling.BICUBIC)
        _draw_windows(panel, seen, _CELL / whole.width, font)
        sheet.paste(panel, (x, y))
        if targets is not None:
            pen.text((x, y + _CELL + 2), shorten(name_of(targets[i]), font, _CELL), _INK, font)
        for k in range(_num_views(seen)):
            x = _CELL_GAP + (k + 1) * step
            _paste_view(sheet, whole, seen, k, (x, y), _CELL)
            label = seen.labels[min(k, len(seen.labels) - 1)]
            percent = f', {100 * seen.confidence[min(k, len(seen.labels) - 1)]:.0f} %'
            name = shorten(name_of(label), font, _CELL - font.getlength(percent))
            ink = _ink(label, None if targets is None else targets[i], k >= _stop(seen))
            pen.text((x, y + _CELL + 2), name + percent, ink, font)
    return sheet


def draw_image(
        image: torch.Tensor,
        seen: Look,
        name_of: Callable[[int], str] = str,
        title: str = '',
        target: int | None = None,
) -> Image.Image:
    """Draw one image with its windows in their order, the activation map, and the prediction after each step.

    Args:
        image: Pixels of the image as the model sees it [3, S, S], uint8.
        seen: What `look` found.
        name_of: Names of classes.
        title: Written above.
        target: The true class.
    """
    panels = 1 if seen.cam is None else 2
    num_views = _num_views(seen)
    top = _GAP + 26
    width = panels * (_PANEL + _GAP) + _VIEW + _TEXT + 3 * _GAP
    height = top + max(_PANEL + 26 + _GAP, num_views * (_VIEW + _GAP))
    sheet = Image.new('RGB', (width, height), 'white')
    pen = ImageDraw.Draw(sheet)
    small, large = (ImageFont.load_default(size) for size in (14, 17))
    truth = '' if target is None else f'  (true: {name_of(target)})'
    pen.text((_GAP, _GAP - 2), shorten(f'{title}{truth}', large, width - 2 * _GAP), _INK, large)

    whole = _to_image(image)
    panel = whole.resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
    _draw_windows(panel, seen, _PANEL / whole.width, large)
    sheet.paste(panel, (_GAP, top))
    pen.text((_GAP, top + _PANEL + 5), f'windows of {seen.size} in an image of {whole.width}', _FAINT, small)
    if seen.cam is not None:
        heat = Image.blend(
            whole.convert('L').convert('RGB').resize((_PANEL, _PANEL)), _heat_map(seen, whole.width), 0.65)
        _draw_windows(heat, seen, _PANEL / whole.width, None)
        left = 2 * _GAP + _PANEL
        sheet.paste(heat, (left, top))
        text = f"activation map of '{name_of(seen.cam_label or 0)}'"
        pen.text((left, top + _PANEL + 5), shorten(text, small, _PANEL), _FAINT, small)

    left = panels * (_PANEL + _GAP) + 2 * _GAP
    for k in range(num_views):
        y = top + k * (_VIEW + _GAP)
        _paste_view(sheet, whole, seen, k, (left, y), _VIEW)
        for i, (line, ink) in enumerate(_view_lines(seen, k, name_of, target)):
            font = large if i == 1 else small
            pen.text((left + _VIEW + _GAP, y + 4 + 24 * i), shorten(line, font, _TEXT - _GAP), ink, font)
    return sheet


def _num_views(seen: Look) -> int:
    return len(seen.windows) + seen.glance


def _stop(seen: Look) -> int:
    """Number of views that were used."""
    return (seen.steps_used or len(seen.labels)) if seen.glance else len(seen.windows)


def _view_name(seen: Look, k: int) -> str:
    return f'{k + 1}: {"whole image" if seen.glance and k == 0 else "window"}'


def _ink(label: int, target: int | None, unused: bool = False) -> str:
    return _FAINT if unused else _INK if target is None else _GOOD if label == target else _BAD


def _view_lines(
        seen: Look,
        k: int,
        name_of: Callable[[int], str],
        target: int | None,
) -> list[tuple[str, str]]:
    """The lines beside a view, and their colours."""
    predictions = [f'{name_of(c)}, {100 * p:.1f} %' for c, p in zip(seen.labels, seen.confidence)]
    if not seen.glance:
        row, column = seen.windows[k]
        own = [(predictions[0], _ink(seen.labels[0], target))] if k == 0 else []
        return [(f'{_view_name(seen, k)}, row {row}, column {column}', _FAINT), *own]
    cost = f', {seen.gmacs[k]:.3g} GMACs so far' if seen.gmacs else ''
    stop = _stop(seen)
    state = 'stopped here' if k == stop - 1 else 'not run' if k >= stop else 'goes on'
    if k == len(seen.labels) - 1 and k == stop - 1:
        state = 'last step'
    return [
        (f'{_view_name(seen, k)}{cost}', _FAINT),
        (predictions[k], _ink(seen.labels[k], target, k >= stop)),
        (state, _INK if k == stop - 1 else _FAINT),
    ]


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _paste_view(
        sheet: Image.Image,
        whole: Image.Image,
        seen: Look,
        k: int,
        place: tuple[int, int],
        side: int,
) -> None:
    """Paste what view k shows, framed in the colour of its window; pale if it was not used."""
    if seen.glance and k == 0:
        view, color = whole.resize((seen.size, seen.size), Image.Resampling.BICUBIC), _FAINT
    else:
        row, column = seen.windows[k - seen.glance]
        view = whole.crop((column, row, column + seen.size, row + seen.size))
        color = _COLORS[(k - seen.glance) % len(_COLORS)]
    view = view.resize((side, side), Image.Resampling.BICUBIC)
    if k >= _stop(seen):
        view = Image.blend(view, Image.new('RGB', view.size, 'white'), 0.6)
    ImageDraw.Draw(view).rectangle((0, 0, side - 1, side - 1), outline=color, width=3)
    sheet.paste(view, place)


def _draw_windows(picture: Image.Image, seen: Look, scale: float, font: Any) -> None:
    """Frame the windows, with their numbers if there is a font; those that were not used thin and without."""
    pen = ImageDraw.Draw(picture)
    num_used = _stop(seen) - seen.glance
    corners = [(column * scale, row * scale) for row, column in seen.windows]
    side = seen.size * scale
    for k in reversed(range(len(corners))):  # the first one is on top
        x, y = corners[k]
        if k >= num_used:
            pen.rectangle((x, y, x + side - 1, y + side - 1), outline='#bbbbbb', width=1)
            continue
        pen.rectangle((x, y, x + side - 1, y + side - 1), outline='black', width=5)
        pen.rectangle((x + 1, y + 1, x + side - 2, y + side - 2), outline=_COLORS[k % len(_COLORS)], width=3)
    if font is None:
        return
    places: list[tuple[float, float]] = []
    for k, (x, y) in enumerate(corners[:num_used]):
        x, y = x + 4, y + 4
        while any(abs(x - u) < 24 and abs(y - v) < 24 for u, v in places):  # windows may share a corner
            x += 24
        places.append((x, y))
        pen.rectangle((x, y, x + 20, y + 20), fill='black')
        pen.text((x + 10, y + 10), str(k + 1 + seen.glance), _COLORS[k % len(_COLORS)], font, anchor='mm')


def _heat_map(seen: Look, side: int) -> Image.Image:
    """The map in colours, each position over the center of what it sees."""
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


def shorten(text: str, font: Any, width: float) -> str:
    """Cut a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}…') > width:
        text = text[:-1]
    return f'{text.rstrip()}…'
