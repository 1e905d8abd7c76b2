"""Pictures of where a model looks, and of its prediction after each step.

    timm-dynamic visualize --model test_gfnet --demo 4 --out pictures
    timm-dynamic visualize --model anchornet_patch_densenet201_95 --checkpoint FOLDER --input IMAGES --out DIR
    timm-dynamic visualize --model anchornet --checkpoint anchornet.pth --input photo.jpg --out DIR
"""
import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, get_img_extensions, resolve_data_config
from timm.utils import ParseKwargs

from .data import DEMO_DATASET, create_dataset, read_demo_note
from .evaluation.pictures import class_names, draw_image, look, to_pixels
from .evaluation.step_predictions import describe_look, draw_probabilities
from .launch.build import demo_settings
from .launch.parser import StrictParser
from .launch.script import run_script
from .models.anchornet import AnchorNet
from .models.builder import check_model_name
from .models.dynamic_net import DynamicNet
from .utils import atomic_write, write_json

_logger = logging.getLogger(__name__)


def create_parser() -> argparse.ArgumentParser:
    """Parser for timm-dynamic visualize."""
    parser = StrictParser(
        prog='timm-dynamic visualize',
        description='Draw where a GFNet, an AnchorNet-patch or an AnchorNet looks, and its prediction after each step.')
    add = parser.add_argument
    add('--model', '-m', required=True, metavar='NAME', help="a model with its weights, or 'local-dir:FOLDER'")
    add('--checkpoint', default='', metavar='FILE', help=(
        "weights: a file, a stage's folder, or a folder with the authors' files (default: the pretrained ones)"))
    add('--input', '-i', metavar='PATH', help='an image, or a folder of images, subfolders included')
    add('--demo', type=int, metavar='N', help='draw N images of the embedded demo set instead')
    add('--demo-digit-scale', type=int, nargs=2, metavar=('LO', 'HI'), help="(default: the model's, else 24 36)")
    add('--demo-clutter', type=float, metavar='X', help="(default: the model's, else 0.5)")
    add('--out', '-o', required=True, metavar='DIR', help='folder for the pictures, one PNG per image')
    add('--json', action='store_true', help=(
        'also write one JSON per image: ten best classes after each step, and of each window of an AnchorNet-patch'))
    add('--probabilities', action='store_true', help='also draw the probabilities after each step, in NAME.prob.png')
    add('--budget', type=float, metavar='G', help='exit early within this budget (GMACs per image on average)')
    add('--thresholds', type=float, nargs='+', metavar='T', help='exit early at these confidences, one a step')
    add('--num-windows', type=int, default=4, metavar='N', help='windows of an AnchorNet alone (%(default)s)')
    add('--iou-threshold', type=float, default=0.3, metavar='X', help='largest overlap of these (%(default)s)')
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
        CheckpointError: Its weights are not available or do not fit.
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
            raise ValueError(f"--budget and --thresholds are for models with several steps; '{args.model}' has one.")
        if args.budget is not None:
            model.set_budget(gmacs=args.budget)
        else:
            model.set_exit(args.thresholds)
    return model.eval().to(args.device)


def find_images(path: str | Path) -> list[tuple[Path, str]]:
    """Find image files: their paths and names.

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


def read_images(args: argparse.Namespace, **demo_args: Any) -> Iterator[tuple[Image.Image, str, int | None]]:
    """Read images, with their names and, of the demo set, their classes. Files that cannot be read are skipped."""
    if args.demo is not None:
        dataset = create_dataset(
            DEMO_DATASET, split='test', num_samples=args.demo, **{**demo_args, **demo_settings(args)})
        for i in range(len(dataset)):
            image, target = dataset[i]
            yield image, f'digit {i}', int(target)
        return
    for path, name in find_images(args.input):
        try:
            with Image.open(path) as image:
                yield image.convert('RGB'), name, None
        except (OSError, UnidentifiedImageError) as e:
            _logger.warning(f"'{path}' cannot be read as an image and is skipped: {e}")


def visualize(argv: Sequence[str] | None = None) -> list[Path]:
    """Run timm-dynamic visualize.

    Args:
        argv: Command line without the module's name (default: this process's).

    Returns:
        The pictures that were written.
    """
    parser = create_parser()
    args = parser.parse_args(argv)
    if (args.input is None) == (args.demo is None):
        parser.error('give either --input PATH or --demo N.')
    if args.budget is not None and args.thresholds:
        parser.error('--budget and --thresholds exclude each other: choose one.')
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
        for pixels, seen, (_, name, target) in zip(to_pixels(images, config), looks, batch):
            path = Path(args.out) / f"{name.replace(' ', '_')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as tmp:
                draw_image(pixels, seen, name_of, name, target).save(tmp, 'png')
            written.append(path)
            if args.json:
                write_json(path.with_suffix('.json'), {'image': name, **describe_look(seen, name_of)})
            if args.probabilities:
                with atomic_write(path.with_suffix('.prob.png')) as tmp:
                    draw_probabilities(seen, name_of, name).save(tmp, 'png')
        batch.clear()

    demo_args = {'img_size': config['input_size'][-1], **read_demo_note(model.pretrained_cfg.get('notes'))}
    for item in read_images(args, **demo_args):
        batch.append(item)
        if len(batch) == args.batch_size:
            draw_batch()
    if batch:
        draw_batch()
    if not written:
        raise ValueError(f"--input: none of the files at '{args.input}' can be read as an image.")
    _logger.info(f"{len(written)} picture{'s' if len(written) != 1 else ''}: {args.out}")
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, or 1 for a user error."""
    def script() -> int:
        visualize(argv)
        return 0

    return run_script(script)


if __name__ == '__main__':
    import timm_dynamic  # noqa: F401  registers the models

    sys.exit(main())
