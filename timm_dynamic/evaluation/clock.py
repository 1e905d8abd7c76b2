"""Clock a trained model on images of its dataset: what its budgets take on the machine at hand."""
import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import unwrap_model

from ..exits.clock import clock_policies, describe_machine
from ..exits.collect import move_images
from ..launch.build import build_eval_loader, eval_views, model_dtype
from ..layers import fuse_conv_bn
from ..models.dynamic_net import DynamicNet
from ..models.exit_cfg import policy_from_json
from .exit_report import Row

_MAX_BATCHES = 8
_MAX_BUDGETS = 4
_SINGLE_IMAGES = 20


def clock_model(
        args: argparse.Namespace,
        model: DynamicNet,
        static: Mapping[str, Any],
        split: str,
        data_config: Mapping[str, Any],
        accelerator: Accelerator,
) -> dict[str, Any]:
    """Measure a model's stored budgets, all its steps, and static networks, all prepared for inference in place.

    Args:
        args: Options of validate.py.
        model: The model, with budgets.
        static: Static networks by name. They are clocked on noise of their own input size.
        split: Split of the images.
        data_config: Preprocessing, see `resolve_data`.
        accelerator: Device and precision. Only one process should call this at a time.

    Returns:
        'rows', see `clock_policies`, with the 'gmacs' and 'top1' of budgets; 'machine', 'torch', 'precision',
        'batch_size', 'images' and 'single_images'.
    """
    device, dtype = accelerator.device, model_dtype(args)
    model = model.to(device=device, dtype=dtype).for_inference()
    loader = build_eval_loader(
        args, split, dict(data_config), model.num_classes, device, views=eval_views(args, model),
        random_samples=_MAX_BATCHES * args.batch_size)
    batches = [move_images(x, device, dtype, torch.channels_last) for x, _ in loader]
    sizes = [len(x[0] if isinstance(x, tuple) else x) for x in batches]
    nets = {}
    for name, net in static.items():
        net = unwrap_model(net).to(device=device, dtype=dtype, memory_format=torch.channels_last).eval()
        shape = net.pretrained_cfg['input_size']
        noise = [torch.randn(n, *shape, device=device, dtype=dtype) for n in sizes]
        noise = [x.to(memory_format=torch.channels_last) for x in noise]
        fuse_conv_bn(net, partial(net, noise[0][:1]))
        nets[name] = net, noise
    stored = model.exit_cfg.get('budgets', [])
    num = min(len(stored), _MAX_BUDGETS)
    budgets = [stored[round(i * (len(stored) - 1) / max(num - 1, 1))] for i in range(num)]
    names = {f"budget {b['gmacs']:.4g} GMACs": b for b in budgets}
    with accelerator.autocast():
        rows: list[Row] = clock_policies(
            model, batches, {name: policy_from_json(b['policy']) for name, b in names.items()}, nets,
            single_images=_SINGLE_IMAGES)
    for row in rows:
        if row['clock'] in names:
            budget = names[row['clock']]
            row.update(gmacs=round(budget['gmacs'], 6), top1=budget.get('evaluated', {}).get('top1'))
    mixed = accelerator.mixed_precision
    return {
        'rows': rows, 'machine': describe_machine(device), 'torch': torch.__version__,
        'precision': f'{mixed}, mixed' if mixed != 'no' else args.model_dtype or 'float32',
        'batch_size': args.batch_size, 'images': sum(sizes), 'single_images': min(sum(sizes), _SINGLE_IMAGES)}


def describe_clock(clock: Mapping[str, Any]) -> str:
    """Where and how a model was clocked, in a sentence."""
    return (f"Clocked on {clock['machine']}, torch {clock['torch']}, {clock['precision']}: {clock['images']} images as "
            f"a stream in batches of {clock['batch_size']}, and {clock['single_images']} one at a time; prepared with "
            'for_inference()')
