"""One training step: of a GFNet's first stage, vectorised against a loop over the images; or of a FocusNet."""
import argparse
import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_dynamic.benchmark import get_device, time_each
from timm_dynamic.models.builder import check_model_name
from timm_dynamic.models.dynamic_net import DynamicNet
from timm_dynamic.models.gfnet import GFNet
from timm_dynamic.task import FocusPickingTask, GlanceFocusTask

NAME, HELP = 'train-step', (
    "one training step of a GFNet's first stage, vectorised against a loop over the images; or of a FocusNet, against "
    'plain training and its baseline')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', default='test_gfnet', metavar='NAME', help=(
        'a GFNet, or any network without steps, which is trained as a FocusNet (%(default)s)'))
    parser.add_argument('--batch-size', '-b', type=int, default=64, metavar='N', help='(%(default)s)')
    parser.add_argument('--device', default='cpu', metavar='DEVICE', help='(%(default)s)')
    parser.add_argument('--repeats', type=int, default=10, metavar='N', help='runs of each, by turns (%(default)s)')
    parser.add_argument('--amp-dtype', choices=['float16', 'bfloat16'], help='mixed precision')
    parser.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help=(
        "also time a GFNet's vectorised step compiled; compile all networks of a FocusNet's step"))
    parser.add_argument('--channels-last', action='store_true', help='memory format of the network and the images')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    return benchmark_train_step(
        args.model, args.batch_size, args.device, args.repeats, args.amp_dtype, args.torchcompile, args.channels_last)


def benchmark_train_step(
        model: str = 'test_gfnet',
        batch_size: int = 64,
        device: str = 'cpu',
        repeats: int = 10,
        amp_dtype: str | None = None,
        torchcompile: str | None = None,
        channels_last: bool = False,
) -> list[dict[str, Any]]:
    """Time forward, loss, backward and update.

    A GFNet's first stage: vectorised against a loop, after checking that both have the same gradient. The loop scales
    glances, cuts patches and adds up losses image by image, as a straightforward script would; the networks see whole
    batches in both.

    A FocusNet, which any network without steps may be: its step needs a plain step of the same network and one forward
    pass of the frozen baseline, and is compared with the sum of both. The baseline has the same architecture.

    Returns:
        A row for each: median 'ms' and 'images_per_s'. For a GFNet also the 'speedup' over the loop. For the FocusNet's
        step also the 'overhead' over the two others, as a share of them: the median over the repeats.

    Raises:
        ValueError: There is no such model or device, the model has steps and is no GFNet, or a number is not positive.
        AssertionError: The gradients differ.
    """
    if min(batch_size, repeats) < 1:
        raise ValueError(f'Expected positive numbers, got batch size {batch_size}, {repeats} repeats.')
    torch.manual_seed(0)
    check_model_name(model)
    net: Any = timm.create_model(model)
    if isinstance(net, DynamicNet) and not isinstance(net, GFNet):
        raise ValueError(f"Expected a GFNet or a network without steps, e.g. focusnet_resnet18; got '{model}'.")
    dev, layout = get_device(device), torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(dev, memory_format=layout)
    shape = net.example_input().shape if isinstance(net, GFNet) else (1, *net.pretrained_cfg['input_size'])
    images = torch.randn(batch_size, *shape[1:], device=dev).contiguous(memory_format=layout)
    target = torch.randint(net.num_classes, (batch_size,), device=dev)
    autocast = partial(torch.autocast, dev.type, getattr(torch, amp_dtype or 'bfloat16'), enabled=bool(amp_dtype))
    time_steps = _time_gfnet if isinstance(net, GFNet) else _time_focusnet
    seconds = time_steps(net, images, target, autocast, repeats, torchcompile)
    rows: list[dict[str, Any]] = [{
        'train-step': name, 'model': model, 'batch_size': batch_size, 'device': device, 'amp': amp_dtype or '',
        'ms': 1e3 * median(values), 'images_per_s': batch_size / median(values),
    } for name, values in seconds.items()]
    if isinstance(net, GFNet):
        return [{**row, 'speedup': rows[0]['ms'] / row['ms']} for row in rows]
    overhead = median(focus / (plain + baseline) - 1 for plain, baseline, focus in zip(*seconds.values(), strict=True))
    return [{**row, 'overhead': overhead if row['train-step'] == 'focus step' else None} for row in rows]


def _time_gfnet(
        net: GFNet,
        images: torch.Tensor,
        target: torch.Tensor,
        autocast: Callable[[], Any],
        repeats: int,
        torchcompile: str | None,
) -> dict[str, list[float]]:
    task = GlanceFocusTask(net, verbose=False).to(images.device)
    step = make_step(task.module, autocast)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        'loop': lambda: _loop(task, images, target), 'vectorised': lambda: task(images, target)['loss']}

    task.eval()  # with batch statistics, rounding errors would grow
    gradients = []
    for loss_fn in ways.values():
        torch.manual_seed(0)  # both draw the same positions
        loss = step(loss_fn)
        gradients.append(torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None]))
    with autocast():
        tolerance = 1e-1 if torch.is_autocast_enabled(images.device.type) else 1e-3
    if (gradients[0] - gradients[1]).norm() > tolerance * gradients[0].norm():
        raise AssertionError(f'The vectorised step has another gradient than the loop (loss {loss.item():.6g}).')
    task.train()
    steps: dict[str, Callable[[], Any]] = {name: partial(step, loss_fn) for name, loss_fn in ways.items()}
    if torchcompile:
        compiled = GlanceFocusTask(net, verbose=False).to(images.device).train()
        compiled_step = make_step(compiled.module, autocast)
        compiled.compile(torchcompile)
        steps['vectorised, compiled'] = lambda: compiled_step(lambda: compiled(images, target)['loss'])
    return time_each(steps, repeats, images.device)


def _time_focusnet(
        net: nn.Module,
        images: torch.Tensor,
        target: torch.Tensor,
        autocast: Callable[[], Any],
        repeats: int,
        torchcompile: str | None,
) -> dict[str, list[float]]:
    baseline = copy.deepcopy(net)
    task = FocusPickingTask(net, baseline, device=images.device, verbose=False)
    step = make_step(net, autocast)
    if torchcompile:
        task.compile(torchcompile)
    task.train()
    seen = images.contiguous(memory_format=torch.channels_last)

    def plain() -> torch.Tensor:
        return F.cross_entropy(task.trainable_module(images), target)

    def forward() -> None:
        with torch.inference_mode(), autocast():
            task.baseline(seen)

    return time_each({
        'plain step': lambda: step(plain),
        'baseline forward': forward,
        'focus step': lambda: step(lambda: task(images, target)['loss']),
    }, repeats, images.device)


def make_step(module: nn.Module, autocast: Callable[[], Any]) -> Callable[[Callable[[], torch.Tensor]], torch.Tensor]:
    """Make a function that trains a module: it takes a function that gives the loss, and returns the loss."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0., momentum=0.9)

    def step(loss_fn: Callable[[], torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        with autocast():
            loss = loss_fn()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _loop(task: GlanceFocusTask, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of a first-stage task, image by image."""
    module, net = task.module, task.module.model
    size, free = net.patch_size, images.shape[-1] - net.patch_size
    actions = torch.rand(net.num_steps - 1, len(images), 2, device=images.device)
    loss, memory = torch.zeros((), device=images.device), None
    for t in range(net.num_steps):
        views = []
        for i in range(len(images)):
            if t == 0:
                view = F.interpolate(images[i:i + 1], (size, size), mode=net.glance_mode, align_corners=True)[0]
            else:
                row, column = (int(a * free) for a in actions[t - 1, i].tolist())
                view = images[i, :, row:row + size, column:column + size]
            views.append(view)
        encoder = net.local_encoder if t else net.global_encoder
        feature = encoder.forward_head(encoder.forward_features(torch.stack(views)), pre_logits=True)
        logits, memory = net.classifier(t, feature, memory)
        if t == 0 and module.own_first_head:
            aux = logits
            if net.classifier.head_name(0) == 'first':
                logits = net.classifier.heads['rnn'](net.classifier.drop(memory))
        else:
            aux = module.heads['local_aux' if t else 'global_aux'](feature)
        for i in range(len(images)):
            loss = loss + F.cross_entropy(logits[i:i + 1].float(), target[i:i + 1])
            loss = loss + task.aux_weight * F.cross_entropy(aux[i:i + 1].float(), target[i:i + 1])
    return loss / (net.num_steps * len(images))
