"""Cropping patches: one gather against a loop over the images."""
import argparse
from typing import Any

import torch

from timm_dynamic.benchmark import get_device, time_interleaved
from timm_dynamic.layers import crop_patches

NAME, HELP = 'crop', 'crop a batch of patches: one gather against a loop over the images'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--batch-size', '-b', type=int, default=256, metavar='N', help='(%(default)s)')
    parser.add_argument('--img-size', type=int, default=224, metavar='N', help='side of the images (%(default)s)')
    parser.add_argument('--patch-size', type=int, default=96, metavar='N', help='side of the patches (%(default)s)')
    parser.add_argument('--channels-last', action='store_true', help='memory format of the images')
    parser.add_argument('--device', default='cpu', metavar='DEVICE', help='(%(default)s)')
    parser.add_argument('--repeats', type=int, default=20, metavar='N', help='runs of each, by turns (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    return benchmark_crop(
        args.batch_size, args.img_size, args.patch_size, args.device, args.repeats, args.channels_last)


def benchmark_crop(
        batch_size: int = 256,
        img_size: int = 224,
        patch_size: int = 96,
        device: str = 'cpu',
        repeats: int = 20,
        channels_last: bool = False,
) -> list[dict[str, Any]]:
    """Time `crop_patches` against slicing image by image, after checking that both give the same bits.

    Returns:
        A row for each: median 'ms', 'images_per_s', and 'speedup' over the loop.

    Raises:
        ValueError: A number is not positive, the patch is larger than the image, or there is no such device.
        AssertionError: The results differ.
    """
    if min(batch_size, img_size, patch_size, repeats) < 1:
        raise ValueError(
            f'Expected positive numbers, got batch size {batch_size}, image {img_size}, patch {patch_size}, '
            f'{repeats} repeats.')
    if patch_size > img_size:
        raise ValueError(f'A patch of {patch_size} pixels is larger than the image of {img_size}.')
    get_device(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size, generator=generator).to(device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    coords = torch.randint(img_size - patch_size + 1, (batch_size, 2), generator=generator).to(device)
    if not torch.equal(crop_patches(images, coords, patch_size), _loop(images, coords, patch_size)):
        raise AssertionError('The patches of the gather differ from those of the loop.')
    seconds = time_interleaved({
        'loop': lambda: _loop(images, coords, patch_size),
        'vectorised': lambda: crop_patches(images, coords, patch_size),
    }, repeats, device)
    return [{
        'crop': name, 'batch_size': batch_size, 'img_size': img_size, 'patch_size': patch_size, 'device': device,
        'channels_last': channels_last, 'ms': 1e3 * s, 'images_per_s': batch_size / s, 'speedup': seconds['loop'] / s,
    } for name, s in seconds.items()]


def _loop(images: torch.Tensor, coords: torch.Tensor, size: int) -> torch.Tensor:
    return torch.stack([
        image[:, row:row + size, column:column + size] for image, (row, column) in zip(images, coords.tolist())])
