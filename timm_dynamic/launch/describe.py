"""What a script shows before it works: data, model, device and batch."""
import argparse
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from timm.utils import unwrap_model

from ..data import DEMO_DATASET
from ..models.dynamic_net import DynamicNet
from ..models.macs import count_macs
from .build import uses_demo_data


def describe_data(args: argparse.Namespace, loaders: Mapping[str, Any]) -> str:
    """Where the images are from, and the number of images and classes of each split.

    Args:
        args: Options.
        loaders: A loader of this package, with `class_to_idx`, for each split.
    """
    if uses_demo_data(args):
        source = f'embedded demo set {DEMO_DATASET}' + ('' if args.dataset else ' (no data given)')
    else:
        source = ' '.join(filter(None, (args.dataset, args.data_dir or args.data)))
    splits = []
    for split, loader in loaders.items():
        classes = f' of {len(loader.class_to_idx)} classes' if loader.class_to_idx else ''
        try:
            splits.append(f'{split}: {len(loader.dataset)} images{classes}')
        except TypeError:  # an iterable dataset that does not know its size
            splits.append(f'{split}: an unknown number of images{classes}')
    return '; '.join([source, *splits])


def describe_model(name: str, model: Any, data_config: Mapping[str, Any], num_classes: int) -> str:
    """A model's parameters, classes, input size, and multiply-adds; of a dynamic model by step."""
    plain: Any = unwrap_model(model)
    size = 'x'.join(map(str, data_config['input_size']))
    parts = [f'{name}: {sum(p.numel() for p in plain.parameters()) / 1e6:.3g} M parameters',
             f'{num_classes} classes', f'images of {size}']
    if isinstance(plain, DynamicNet):
        parts.append(f"GMACs up to step 1..{plain.num_steps}: {', '.join(_gmacs(macs) for macs in plain.step_macs)}")
    else:
        macs = count_macs(plain, data_config['input_size'])
        parts += [] if macs is None else [f'{_gmacs(macs)} GMACs']
    return ', '.join(parts)


def _gmacs(macs: int) -> str:
    return f'{macs / 1e9:.3g}'


def describe_device(args: argparse.Namespace, accelerator: Accelerator) -> str:
    """Device, number of processes and precision."""
    mixed = accelerator.mixed_precision
    precision = args.model_dtype or ('float32' if mixed == 'no' else f'float32 weights, {mixed} mixed precision')
    device = accelerator.device.type if accelerator.num_processes > 1 else str(accelerator.device)
    return f'{device}, {count(accelerator.num_processes, "process", "processes")}, {precision}'


def describe_training_batch(args: argparse.Namespace, accelerator: Accelerator, updates_per_epoch: int) -> str:
    """Images of an update, and how they are divided among processes and accumulation steps."""
    processes, steps = accelerator.num_processes, accelerator.gradient_accumulation_steps
    return (f'{args.batch_size * processes * steps} images: {args.batch_size} per process x '
            f'{count(processes, "process", "processes")} x {count(steps, "accumulation step", "accumulation steps")}; '
            f'{count(updates_per_epoch, "update", "updates")} per epoch')


def count(number: int, one: str, several: str) -> str:
    """'1 process', '2 processes'."""
    return f'{number} {one if number == 1 else several}'
