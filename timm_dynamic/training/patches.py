"""Pictures of what a dynamic model looks at."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from ..utils import atomic_write

_SIDE, _GAP, _TEXT = 160, 6, 14  # pixels


@torch.inference_mode()
def draw_patches(
        path: str | Path,
        model: Any,
        images: torch.Tensor,
        targets: torch.Tensor | None = None,
        data_config: Mapping[str, Any] | None = None,
        class_to_idx: Mapping[str, int] | None = None,
) -> bool:
    """Draw for each image where a dynamic model looks and what it thinks after each step.

    A row is an image with its patches marked in the order in which they are seen, the glance, and the patches. Under
    each stand the class that is the most probable after that step, and its probability; green if it is right.

    Args:
        path: PNG to write.
        model: A GFNet or AnchorNet-patch in eval mode. Of models that do not choose where to look nothing is drawn.
        images: Normalised images [N, C, S, S].
        targets: True classes [N].
        data_config: Has the 'mean' and 'std' that the images are normalised with (default: drawn by their range).
        class_to_idx: Names of the classes.

    Returns:
        Whether it was drawn.
    """
    out = model.forward_all(images)
    if 'coords' not in out:
        return False
    names = {i: name for name, i in (class_to_idx or {}).items()}
    pixels = to_pixels(images, data_config)
    probabilities, classes = out['logits'].float().softmax(dim=-1).max(dim=-1)
    scale, size = _SIDE / images.shape[-1], model.patch_size
    sheet = Image.new('RGB', (
        (model.num_steps + 1) * (_SIDE + _GAP) + _GAP, len(images) * (_SIDE + _TEXT + _GAP) + _GAP), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(pixels):
        top = _GAP + i * (_SIDE + _TEXT + _GAP)
        coords = out['coords'][:, i].tolist()
        glance = F.interpolate(image[None].float(), (size, size), mode='area')[0]
        views = [image, glance, *(image[:, r:r + size, c:c + size] for r, c in coords)]
        for k, view in enumerate(views):
            left = _GAP + k * (_SIDE + _GAP)
            picture = Image.fromarray(view.byte().permute(1, 2, 0).cpu().numpy())
            sheet.paste(picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top))
            if k:
                name = names.get(int(classes[k - 1, i]), int(classes[k - 1, i]))
                right = targets is None or classes[k - 1, i] == targets[i]
                text = f'{name} {100 * probabilities[k - 1, i]:.0f} %'
                draw.text((left, top + _SIDE), text, 'green' if right else 'red')
        for k, (row, column) in enumerate(coords):
            x, y = _GAP + column * scale, top + row * scale
            draw.rectangle((x, y, x + size * scale - 1, y + size * scale - 1), outline='yellow', width=2)
            draw.text((x + 4, y + 2), str(k + 2), 'yellow')
        if targets is not None:
            draw.text((_GAP, top + _SIDE), str(names.get(int(targets[i]), int(targets[i]))), 'black')
    with atomic_write(path) as tmp:
        sheet.save(tmp, 'png')
    return True


def to_pixels(images: torch.Tensor, data_config: Mapping[str, Any] | None) -> torch.Tensor:
    """Images [N, 3, S, S] in 0..255."""
    images = images.float()
    if data_config is not None:
        mean, std = (torch.tensor(data_config[k], device=images.device).view(1, -1, 1, 1) for k in ('mean', 'std'))
        images = images * std + mean
    else:
        low, high = images.amin(), images.amax()
        images = (images - low) / (high - low).clamp(min=1e-6)
    images = (255 * images).round().clamp(0, 255)
    return images if images.shape[1] == 3 else images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
