"""Early exit on the clock: a static network, all steps, `early_exit` and `ExitStream`."""
import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from timm.utils import ParseKwargs

from ..exits import ExitStream, early_exit
from ..layers import fuse_conv_bn
from ..models.builder import check_model_name
from ..models.dynamic_net import DynamicNet, State
from ..training.anytime import count_macs
from .timing import get_device, wait_for

NAME, HELP = 'exit', 'throughput and latency of a static network, all steps, early_exit and ExitStream'

_SHARES = {2: (0.6, 0.4), 3: (0.5, 0.3, 0.2), 5: (0.5, 0.2, 0.1, 0.1, 0.1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', default='gfnet_resnet50_96', metavar='NAME', help='(%(default)s)')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    parser.add_argument('--pretrained', action='store_true', help="with the model's weights; they do not matter here")
    parser.add_argument('--static', metavar='NAME', help=(
        "static network to compare with, at the model's image size ('none' for none; default: the model's backbone, or "
        "a cascade's last member)"))
    parser.add_argument('--exit-shares', type=float, nargs='+', metavar='X', help=(
        'share of the images that stops at each step; thresholds are placed accordingly (default: 0.6 0.4 for two '
        'steps, 0.5 0.3 0.2 for three, 0.5 0.2 0.1 0.1 0.1 for five, else equal ones)'))
    parser.add_argument('--batch-size', '-b', type=int, default=64, metavar='N', help='(%(default)s)')
    parser.add_argument('--num-images', type=int, metavar='N', help='length of the stream (default: 20 batches)')
    parser.add_argument('--device', default='cpu', metavar='DEVICE', help='(%(default)s)')
    parser.add_argument('--repeats', type=int, default=3, metavar='N', help='runs of each, by turns (%(default)s)')
    parser.add_argument('--channels-last', action='store_true', help='memory format of models and images')
    parser.add_argument('--fuse', action='store_true', help='fuse batch normalisation with convolutions')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--amp-dtype', default='bfloat16', choices=['float16', 'bfloat16'], help='(%(default)s)')
    parser.add_argument('--torchcompile', action='store_true', help='compile the static network and each step')
    parser.add_argument('--cuda-graphs', action='store_true', help='with --torchcompile: mode reduce-overhead')
    parser.add_argument('--latency-images', type=int, default=20, metavar='N', help='at batch size 1 (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    return benchmark_exit(
        args.model, args.exit_shares, args.batch_size, args.num_images, args.device, args.repeats, args.static,
        args.model_kwargs, args.pretrained, args.channels_last, args.fuse, args.amp_dtype if args.amp else None,
        args.torchcompile, args.cuda_graphs, args.latency_images)


def benchmark_exit(
        model: str = 'gfnet_resnet50_96',
        exit_shares: Sequence[float] | None = None,
        batch_size: int = 64,
        num_images: int | None = None,
        device: str = 'cpu',
        repeats: int = 3,
        static: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        channels_last: bool = False,
        fuse: bool = False,
        amp_dtype: str | None = None,
        torchcompile: bool = False,
        cuda_graphs: bool = False,
        latency_images: int = 20,
) -> list[dict[str, Any]]:
    """Time a static network, all steps, `early_exit` on batches, and `ExitStream`, by turns.

    Efficiency is the sum over the images of the time of each step they needed, over the time that was measured. What a
    step takes per image is measured in the same repeat at full batch size, by itself, in the memory format that is
    faster for it, and compiled where `torchcompile` is set and that is faster. So 1 is what the exit shares allow.
    The static network is timed as the model is, and, where that is otherwise, also plain: as timm creates it.

    Images are noise, and weights random unless `pretrained`: thresholds make the shares what they are to be.

    Args: see `add_arguments`.

    Returns:
        A row for each way: medians of 'images_per_s', of the ratios 'x_static', 'x_plain' and 'x_all_steps', and of
        'efficiency', which are taken within each repeat; 'gmacs' per image and the same ratio of them as 'macs_static';
        'latency_ms' at batch size 1 (of ExitStream none: alone, an image is run at once); 'peak_mb' of memory, on a
        GPU what torch has allocated, else that of the process. Then a row for each step, of a full batch.

    Raises:
        ValueError: There is no such model or device, the model has no steps, the shares do not fit it, a number is not
            positive, or `cuda_graphs` is set without `torchcompile`.
    """
    num_images = 20 * batch_size if num_images is None else num_images
    if min(batch_size, num_images, repeats, latency_images) < 1:
        raise ValueError(f'Expected positive numbers, got batch size {batch_size}, {num_images} images, '
                         f'{repeats} repeats, {latency_images} images for latency.')
    if cuda_graphs and not torchcompile:
        raise ValueError('CUDA graphs are made of compiled steps: --cuda-graphs needs --torchcompile.')
    torch.manual_seed(0)
    dev = get_device(device)
    check_model_name(model)
    net: Any = timm.create_model(model, pretrained=pretrained, **(model_kwargs or {}))
    if not isinstance(net, DynamicNet):
        raise ValueError(f"'{model}' has no steps to exit after.")
    shares = _check_shares(exit_shares, net.num_steps)
    net.clear_exit()
    net = net.to(dev).eval()
    rival, rival_name = _create_static(net, static, pretrained, dev)
    created = copy.deepcopy(rival) if fuse or channels_last else None
    if fuse:
        net.fuse_conv_bn()
        if rival is not None:
            fuse_conv_bn(rival, partial(rival, _static_input(net, rival, 1, dev)))
    other = copy.deepcopy(net)  # steps are timed in both memory formats
    layouts = [torch.contiguous_format, torch.channels_last]
    layout, other_layout = layouts[channels_last], layouts[not channels_last]
    net, other = net.to(memory_format=layout), other.to(memory_format=other_layout)
    rival = rival and rival.to(memory_format=layout)
    macs = count_macs(rival, rival.example[1:]) if rival is not None else None
    if torchcompile:
        for m in (net, other):
            m.compile_steps(cuda_graphs)
        rival = rival and torch.compile(rival, mode='reduce-overhead' if cuda_graphs else None, dynamic=False)

    pool = [_noise(net, batch_size, dev, layout) for _ in range(min(8, -(-num_images // batch_size)))]
    sizes = [batch_size] * (num_images // batch_size) + [num_images % batch_size] * (num_images % batch_size > 0)
    batches = [_first(pool[i % len(pool)], n) for i, n in enumerate(sizes)]
    autocast = partial(
        torch.autocast, dev.type, getattr(torch, amp_dtype or 'bfloat16'), enabled=bool(amp_dtype))
    with torch.no_grad(), autocast():
        thresholds = _place_thresholds(net, pool, shares)
        views = [(m, [[state for _, state in _all_steps(m, _with_layout(x, f))] for x in pool[:2]])
                 for m, f in ((net, layout), (other, other_layout))]
        paths: list[list[Callable[[], Any]]] = [
            [partial(_run_each, m.run_step, t, states) for m, states in views] for t in range(net.num_steps)]
        if torchcompile:
            paths = [[*p, partial(_run_each, partial(_eager, net), t, views[0][1])] for t, p in enumerate(paths)]
        unit = batch_size * len(pool[:2])  # by turns: data that is run twice on end is in the caches
        stream = ExitStream(net, thresholds, batch_size)
        used: dict[str, torch.Tensor] = {}

        def keep_used(name: str, results: Any) -> None:
            used[name] = torch.cat([r.steps_used for r in results])

        ways: dict[str, tuple[int, Callable[[], Any]]] = {}
        if rival is not None:
            static_input = _static_input(net, rival, batch_size, dev)
            ways[f'static {rival_name}'] = (batch_size, partial(rival, static_input.contiguous(memory_format=layout)))
        if created is not None:
            ways[f'static {rival_name}, plain'] = (batch_size, partial(created, static_input))
        ways['all steps'] = (batch_size, lambda: [None for _ in _all_steps(net, pool[0])])
        ways['early_exit'] = (
            num_images, lambda: keep_used('early_exit', (early_exit(net, x, thresholds) for x in batches)))
        ways['ExitStream'] = (num_images, lambda: keep_used('ExitStream', stream.run(batches)))
        step_paths = {(t, i): path for t, options in enumerate(paths) for i, path in enumerate(options)}

        memory = {name: _peak_memory(function, dev) for name, (_, function) in ways.items()}  # and warm, too
        for function in step_paths.values():
            function()
        seconds: dict[Any, list[float]] = {key: [] for key in (*ways, *step_paths)}
        for _ in range(repeats):
            for key, path in step_paths.items():
                seconds[key].append(_time(path, dev, 1) / unit)
            for name, (count, function) in ways.items():
                seconds[name].append(_time(function, dev, 1 if count == num_images else 2) / count)
        latency = _latencies(net, rival, rival_name, pool, thresholds, latency_images, dev)

    fastest = [min(range(len(options)), key=lambda i: median(seconds[t, i])) for t, options in enumerate(paths)]
    counts = {name: torch.bincount(u - 1, minlength=net.num_steps).cpu().tolist() for name, u in used.items()}
    rows = []
    for name in ways:
        still = [num_images] * net.num_steps
        if name in counts:
            still = [sum(counts[name][t:]) for t in range(net.num_steps)]
        needed = [sum(n * seconds[t, fastest[t]][r] for t, n in enumerate(still)) / num_images for r in range(repeats)]
        is_static = name.startswith('static')
        gmacs = macs if is_static else sum(
            n * (net.step_macs[t] - (net.step_macs[t - 1] if t else 0)) for t, n in enumerate(still)) / num_images
        rows.append({
            'exit': name, 'model': model, 'batch_size': batch_size, 'device': device,
            'images_per_s': 1 / median(seconds[name]),
            'x_static': _ratio(seconds.get(f'static {rival_name}'), seconds[name]),
            **({} if created is None else {
                'x_plain': _ratio(seconds[f'static {rival_name}, plain'], seconds[name])}),
            'x_all_steps': _ratio(seconds['all steps'], seconds[name]),
            'efficiency': None if is_static else _ratio(needed, seconds[name]),
            'gmacs': None if gmacs is None else gmacs / 1e9,
            'macs_static': None if macs is None or gmacs is None else macs / gmacs,
            'latency_ms': latency.get(name), 'peak_mb': memory[name],
            'exit_shares': [round(n / num_images, 4) for n in counts[name]] if name in counts else None,
        })
    for t, i in enumerate(fastest):
        name = 'eager' if i == 2 else 'channels last' if (i == 0) == channels_last else 'contiguous'
        rows.append({
            'exit': f'step {t + 1}, full batch, {name}', 'model': model, 'batch_size': batch_size, 'device': device,
            'images_per_s': 1 / median(seconds[t, i]),
            'gmacs': (net.step_macs[t] - (net.step_macs[t - 1] if t else 0)) / 1e9})
    return rows


def _check_shares(shares: Sequence[float] | None, num_steps: int) -> tuple[float, ...]:
    if shares is None:
        return _SHARES.get(num_steps, (1 / num_steps,) * num_steps)
    if len(shares) != num_steps or min(shares) < 0 or not 0 < sum(shares) < float('inf'):
        raise ValueError(f'Expected {num_steps} exit shares, one a step and none below 0, got {list(shares)}.')
    return tuple(share / sum(shares) for share in shares)


def _create_static(net: Any, name: str | None, pretrained: bool, device: torch.device) -> tuple[Any, str]:
    if name == 'none':
        return None, ''
    if name is None:
        spec = net.specs[-1].model if hasattr(net, 'specs') else getattr(net, 'backbone', None)
        if not isinstance(spec, str):
            return None, ''
        name = spec.split('@')[0]
    check_model_name(name)
    rival: Any = timm.create_model(name, pretrained=pretrained, num_classes=net.num_classes, in_chans=net.in_chans)
    size = net.img_size if not hasattr(net, 'view_sizes') else net.view_sizes[-1]
    rival.example = (1, net.in_chans, size, size)
    return rival.to(device).eval(), name


def _static_input(net: Any, rival: Any, batch_size: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch_size, *rival.example[1:], device=device)


def _noise(net: Any, batch_size: int, device: torch.device, layout: torch.memory_format) -> Any:
    x = net.example_input(batch_size, device=device)
    return _with_layout(tuple(v.normal_() for v in x) if isinstance(x, tuple) else x.normal_(), layout)


def _with_layout(x: Any, layout: torch.memory_format) -> Any:
    if isinstance(x, tuple):
        return tuple(v.contiguous(memory_format=layout) for v in x)
    return x.contiguous(memory_format=layout)


def _first(x: Any, n: int) -> Any:
    return tuple(v[:n] for v in x) if isinstance(x, tuple) else x[:n]


def _all_steps(net: Any, x: Any) -> Iterator[tuple[torch.Tensor, State]]:
    """Confidences after each step and the states before them."""
    state = net.init_state(x)
    for t in range(net.num_steps):
        before = state
        _, confidence, state = net.run_step(t, state)
        if net.has_compiled_steps:  # with CUDA graphs, the next step overwrites what this one gave
            confidence, state = confidence.clone(), {name: value.clone() for name, value in state.items()}
        yield confidence, before


def _run_each(run_step: Callable[..., Any], t: int, states: list[list[State]]) -> None:
    for state in states:
        run_step(t, state[t])


def _eager(net: Any, t: int, state: State) -> torch.Tensor:
    logits, state = net.step(t, state)
    return net.confidence(logits, state)


def _place_thresholds(net: Any, pool: list[Any], shares: Sequence[float]) -> list[float]:
    """Quantiles of the confidences of the images that are left, halfway between two of them."""
    confidence = torch.cat([torch.stack([c for c, _ in _all_steps(net, x)], dim=1) for x in pool]).cpu()
    left, thresholds = torch.ones(len(confidence), dtype=torch.bool), []
    for t in range(net.num_steps):
        values = confidence[left, t].sort(descending=True).values
        stop = round(shares[t] * len(confidence))
        if t == net.num_steps - 1 or not len(values):
            thresholds.append(0.)
            continue
        upper = values[stop - 1].item() if stop else float('inf')
        lower = values[stop].item() if stop < len(values) else float('-inf')
        thresholds.append((upper + lower) / 2)
        left &= confidence[:, t] < thresholds[-1]
    return thresholds


def _time(function: Callable[[], Any], device: torch.device, times: int) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait_for(device)
    return (time.perf_counter() - start) / times


def _ratio(seconds: Sequence[float] | None, by: Sequence[float]) -> float | None:
    return None if seconds is None else median(a / b for a, b in zip(seconds, by, strict=True))


def _latencies(
        net: Any,
        rival: Any,
        rival_name: str,
        pool: list[Any],
        thresholds: list[float],
        num: int,
        device: torch.device,
) -> dict[str, float]:
    """Mean milliseconds per image at batch size 1, over the same images for all."""
    size = len(_first_tensor(pool[0]))
    images = [_pick(pool[i // size % len(pool)], i % size) for i in range(num)]
    ways: dict[str, Callable[[Any], Any]] = {
        'all steps': lambda x: list(net.forward_steps(x)), 'early_exit': lambda x: early_exit(net, x, thresholds)}
    if rival is not None:
        one = _static_input(net, rival, 1, device)
        ways[f'static {rival_name}'] = lambda x: rival(one)
    seconds = dict.fromkeys(ways, 0.)
    for function in ways.values():
        function(images[0])
    for x in images:
        for name, function in ways.items():
            seconds[name] += _time(partial(function, x), device, 1)
    return {name: 1e3 * total / num for name, total in seconds.items()}


def _first_tensor(x: Any) -> torch.Tensor:
    return x[0] if isinstance(x, tuple) else x


def _pick(x: Any, i: int) -> Any:
    return tuple(v[i:i + 1] for v in x) if isinstance(x, tuple) else x[i:i + 1]


def _peak_memory(function: Callable[[], Any], device: torch.device) -> float | None:
    """MB; on a CPU the resident memory of the process, where Linux tells it."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        Path('/proc/self/clear_refs').write_text('5')
        function()
        line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmHWM'))
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        return None
