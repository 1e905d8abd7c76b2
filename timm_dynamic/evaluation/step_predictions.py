"""The predictions of every step and of every window: as JSON, and as a plot of probabilities."""
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .pictures import Look, TopClasses, shorten

_BAR, _LINE, _GAP, _HEAD = 220, 22, 12, 48  # in pixels: longest bar with its text, its height, gaps, height of titles
_INK, _FAINT, _USED, _UNUSED = '#222222', '#888888', '#7fb3d5', '#dddddd'


def describe_look(seen: Look, name_of: Callable[[int], str] = str) -> dict[str, Any]:
    """Describe where a model looks in one image and what it predicts, as plain JSON.

    Args:
        seen: What `look` found.
        name_of: Names of classes.

    Returns:
        'prediction', the best classes of the step at which the image stops, the best first, each with 'index', 'label'
        and 'prob'; 'steps_used'; 'steps', each with 'step', 'box', 'confidence', 'prediction' (the result so far),
        'own' (by the logits of this view alone) and 'gmacs' (so far), the last two as far as the model has them; and
        'localizer', the best classes of a localizer. A box is the first row and column and the last row and column of a
        window, in pixels of the image that the model sees; None for the whole image. An AnchorNet alone has 'windows',
        the boxes, and no steps.
    """
    boxes = [[row, column, row + seen.size - 1, column + seen.size - 1] for row, column in seen.windows]
    out: dict[str, Any] = {'prediction': _classes(seen.best[max(seen.steps_used, 1) - 1], name_of)}
    if not seen.glance:
        return {**out, 'windows': boxes}
    out['steps_used'], out['steps'] = seen.steps_used, []
    for t, box in enumerate([None, *boxes]):
        step = {'step': t + 1, 'box': box, 'confidence': seen.confidence[t], 'prediction': _classes(
            seen.best[t], name_of)}
        if seen.own:
            step['own'] = _classes(seen.own[t], name_of)
        if seen.gmacs:
            step['gmacs'] = seen.gmacs[t]
        out['steps'].append(step)
    if seen.localizer:
        out['localizer'] = _classes(seen.localizer, name_of)
    return out


def _classes(best: TopClasses, name_of: Callable[[int], str]) -> list[dict[str, Any]]:
    return [{'index': index, 'label': name_of(index), 'prob': prob} for index, prob in best]


def draw_probabilities(seen: Look, name_of: Callable[[int], str] = str, title: str = '') -> Image.Image:
    """Draw the probabilities of the best classes after each step, side by side. Steps that were not used are grey.

    Args:
        seen: What `look` found.
        name_of: Names of classes.
        title: Written above.
    """
    lines = max(map(len, seen.best))
    sheet = Image.new('RGB', (_GAP + len(seen.best) * (_BAR + _GAP), _HEAD + lines * _LINE + _GAP), 'white')
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pen.text((_GAP, 6), shorten(title, font, sheet.width - 2 * _GAP), _INK, font)
    for t, best in enumerate(seen.best):
        x, used = _GAP + t * (_BAR + _GAP), t < max(seen.steps_used, 1)
        pen.text((x, 26), f'after step {t + 1}', _INK if used else _FAINT, font)
        for i, (index, prob) in enumerate(best):
            y = _HEAD + i * _LINE
            pen.rectangle((x, y, x + prob * _BAR, y + _LINE - 4), _USED if used else _UNUSED)
            percent = f' {100 * prob:.1f} %'
            name = shorten(name_of(index), font, _BAR - font.getlength(percent))
            pen.text((x + 2, y + 2), name + percent, _INK if used else _FAINT, font)
    return sheet
