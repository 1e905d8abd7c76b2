"""One training step of a GFNet's first stage: vectorised against a loop over the images."""
import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F

from ..models.gfnet import GFNet
from ..task import GlanceFocusTask
from .timing import time_interleaved

NAME, HELP = 'train-step', "one training step of a GFNet's first stage: vectorised against a loop over the images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', default='test_gfnet', metavar='NAME', help='(%(default)s)')
    parser.add_argument('--batch-size', '-b', type=int, default=64, metavar='N', help='(%(default)s)')
    parser.add_argument('--device', default='cpu', metavar='DEVICE', help='(%(default)s)')
    parser.add_argument('--repeats', type=int, default=10, metavar='N', help='runs of each, by turns (%(default)s)')
    parser.add_argument('--amp-dtype', choices=['float16', 'bfloat16'], help='mixed precision')
    parser.add_argument('--torchcompile', action='store_true', help='also time the vectorised step compiled')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    return benchmark_train_step(
        args.model, args.batch_size, args.device, args.repeats, args.amp_dtype, args.torchcompile)


def benchmark_train_step(
        model: str = 'test_gfnet',
        batch_size: int = 64,
        device: str = 'cpu',
        repeats: int = 10,
        amp_dtype: str | None = None,
        torchcompile: bool = False,
) -> list[dict[str, Any]]:
    """Time forward, loss, backward and update, after checking that both ways have the same loss and gradient.

    The loop scales glances, cuts patches and adds up losses image by image, as a straightforward script would; the
    networks see whole batches in both.

    Returns:
        A row for each: median 'ms', 'images_per_s', and 'speedup' over the loop.

    Raises:
        ValueError: The model is no GFNet, or a number is not positive.
        AssertionError: The results differ.
    """
    if min(batch_size, repeats) < 1:
        raise ValueError(f'Expected positive numbers, got batch size {batch_size}, {repeats} repeats.')
    torch.manual_seed(0)
    net: Any = timm.create_model(model)
    if not isinstance(net, GFNet):
        raise ValueError(f"This step is one of GFNets, e.g. --model gfnet_resnet50_96; got '{model}'.")
    task = GlanceFocusTask(net.to(device), verbose=False).to(torch.device(device))
    images = net.example_input(batch_size, device=device).normal_()
    target = torch.randint(net.num_classes, (batch_size,), device=device)
    actions = torch.rand(net.num_steps - 1, batch_size, 2, device=device)
    optimizer = torch.optim.SGD([p for p in task.module.parameters() if p.requires_grad], lr=0., momentum=0.9)

    def step(loss_fn: Callable[[], torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        dtype = getattr(torch, amp_dtype or 'bfloat16')
        with torch.autocast(torch.device(device).type, dtype, enabled=bool(amp_dtype)):
            loss = loss_fn()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def vectorised(module: Any = task.module) -> torch.Tensor:
        out = module(images, actions=actions)
        return task._classification_terms(out, target, task.aux_weight)['loss']

    def loop() -> torch.Tensor:
        return _loop(task, images, target, actions)

    task.eval()  # with batch statistics, rounding errors would grow
    gradients = []
    for loss_fn in (loop, vectorised):
        loss = step(loss_fn)
        gradients.append(torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None]))
    tolerance = 1e-1 if amp_dtype else 1e-3
    if (gradients[0] - gradients[1]).norm() > tolerance * gradients[0].norm():
        raise AssertionError(f'The vectorised step has another gradient than the loop (loss {loss.item():.6g}).')
    task.train()
    steps: dict[str, Callable[[], Any]] = {'loop': lambda: step(loop), 'vectorised': lambda: step(vectorised)}
    if torchcompile:
        compiled = torch.compile(task.module)
        steps['vectorised, compiled'] = lambda: step(lambda: vectorised(compiled))
    seconds = time_interleaved(steps, repeats, device)
    return [{
        'train-step': name, 'model': model, 'batch_size': batch_size, 'device': device, 'amp': amp_dtype or '',
        'ms': 1e3 * s, 'images_per_s': batch_size / s, 'speedup': seconds['loop'] / s,
    } for name, s in seconds.items()]


def _loop(
        task: GlanceFocusTask,
        images: torch.Tensor,
        target: torch.Tensor,
        actions: torch.Tensor,
) -> torch.Tensor:
    module, net = task.module, task.module.model
    size, free = net.patch_size, images.shape[-1] - net.patch_size
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
        _, feature = net._encode(encoder, torch.stack(views))
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
