"""How fast early exit is: a static network, all steps, `early_exit` and `ExitStream`."""
import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from timm.utils import ParseKwargs

from ..exits import ExitStream, early_exit
from ..exits.collect import move_images
from ..launch.build import build_model
from ..layers import fuse_conv_bn
from ..models.builder import check_model_name
from ..models.dynamic_net import DynamicNet, State
from ..models.exit_cfg import Policy
from ..models.macs import count_macs
from ..utils.timing import get_device, time_call
from .images import check_effect, num_images_of, predict_options, read_images, rows_of

NAME, HELP = 'exit', 'throughput and latency of a static network, all steps, early_exit and ExitStream'

_SHARES = {2: (0.6, 0.4), 3: (0.5, 0.3, 0.2), 5: (0.5, 0.2, 0.1, 0.1, 0.1)}
_LAYOUTS = {'contiguous': torch.contiguous_format, 'channels last': torch.channels_last}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--model', default='gfnet_resnet50_96', metavar='NAME', help="model, or 'local-dir:FOLDER' (%(default)s)")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    parser.add_argument('--pretrained', action='store_true', help='load the weights; speed does not depend on them')
    parser.add_argument('--static', metavar='NAME', help=(
        "static network to compare with, at the model's image size ('none' for none; default: the model's backbone, or "
        "a cascade's last member)"))
    parser.add_argument('--exit-shares', type=float, nargs='+', metavar='X', help=(
        'share of the images that stops at each step; thresholds are placed accordingly (default: 0.6 0.4 for two '
        'steps, 0.5 0.3 0.2 for three, 0.5 0.2 0.1 0.1 0.1 for five, else equal ones)'))
    parser.add_argument('--budget', type=float, metavar='G', help=(
        'use the exits that the model stores for this average cost (GMACs per image), on real images: those of '
        '--data-dir, else the embedded demo set. The weights are loaded'))
    parser.add_argument('--thresholds', type=float, nargs='+', metavar='T', help=(
        'use these thresholds, one per step, in the same way'))
    parser.add_argument('--data-dir', metavar='DIR', help='images for --budget and --thresholds: a folder or tar file')
    parser.add_argument('--dataset', metavar='TYPE/NAME', help='type and name of the dataset, as in predict.py')
    parser.add_argument(
        '--split', metavar='NAME', help='split of the dataset (default: validation; of the demo set test)')
    parser.add_argument('--batch-size', '-b', type=int, default=64, metavar='N', help='(%(default)s)')
    parser.add_argument('--num-images', type=int, metavar='N', help=(
        'length of the stream (default: 20 batches; with --budget and --thresholds, at most the images there are)'))
    parser.add_argument('--device', default='cpu', metavar='DEVICE', help='(%(default)s)')
    parser.add_argument('--repeats', type=int, default=3, metavar='N', help='runs of each, by turns (%(default)s)')
    parser.add_argument('--channels-last', action='store_true', help='memory format of models and images')
    parser.add_argument('--fuse', action='store_true', help='fuse batch normalisation with convolutions')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--amp-dtype', default='bfloat16', choices=['float16', 'bfloat16'], help='(%(default)s)')
    parser.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help=(
        'compile the static network and each step of ExitStream'))
    parser.add_argument('--cuda-graphs', action='store_true', help='with --torchcompile: mode reduce-overhead')
    parser.add_argument(
        '--latency-images', type=int, default=20, metavar='N', help='at batch size 1, 0 for none (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    return benchmark_exit(
        args.model, args.exit_shares, args.batch_size, args.num_images, args.device, args.repeats, args.static,
        args.model_kwargs, args.pretrained, args.channels_last, args.fuse, args.amp_dtype if args.amp else None,
        args.torchcompile, args.cuda_graphs, args.latency_images, args.budget, args.thresholds, args.data_dir,
        args.dataset, args.split)


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
        torchcompile: str | None = None,
        cuda_graphs: bool = False,
        latency_images: int = 20,
        budget: float | None = None,
        thresholds: Sequence[float] | None = None,
        data_dir: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
) -> list[dict[str, Any]]:
    """Time a static network, all steps, `early_exit` on batches, and `ExitStream`, by turns.

    Efficiency is the sum over the images of the time of each step they needed, over the time that was measured. The
    time of a step per image is measured in the same repeat, at full batch size, by itself, in the faster memory format,
    and compiled where `torchcompile` is set and that is faster. So 1 is what the exit shares allow. The static network
    is timed with the same settings as the model and, if these differ from timm's, also plain: as timm creates it.

    Images are noise, and weights random unless `pretrained`. Thresholds are placed such that the shares come out. With
    `budget` or `thresholds`, the model has its own weights and uses these exits on random images of the dataset, which
    are read before anything is timed.

    The arguments are those of `add_arguments`; `torchcompile` is the backend.

    Returns:
        A row for each way: medians of 'images_per_s', of the ratios 'x_static', 'x_plain' and 'x_all_steps', and of
        'efficiency', which are taken within each repeat; 'gmacs' per image and 'macs_static', the static network's over
        them; 'latency_ms' at batch size 1 (not for ExitStream, which runs a single image at once); 'peak_mb' of memory,
        on a GPU what torch has allocated, else that of the process. Then a row for each step, of a full batch.

    Raises:
        ValueError: There is no such model or device, the model has no steps, the shares do not fit it, a number is not
            positive, `cuda_graphs` is set without `torchcompile`, an argument would have no effect, the model stores no
            such budget, or there are fewer images than requested.
    """
    own = budget is not None or thresholds is not None
    wanted = 20 * batch_size if num_images is None else num_images
    if min(batch_size, wanted, repeats, latency_images + 1) < 1:
        raise ValueError(f'Expected positive numbers, got batch size {batch_size}, {wanted} images, '
                         f'{repeats} repeats, {latency_images} images for latency.')
    check_effect(own, budget, thresholds, exit_shares, {'data-dir': data_dir, 'dataset': dataset, 'split': split})
    if cuda_graphs and not torchcompile:
        raise ValueError('CUDA graphs are made of compiled steps: --cuda-graphs needs --torchcompile.')
    torch.manual_seed(0)
    dev = get_device(device)
    check_model_name(model)
    options = predict_options(model, batch_size, model_kwargs, data_dir, dataset, split) if own else None
    net: Any = build_model(options, pretrained=True) if options else timm.create_model(
        model, pretrained=pretrained, **(model_kwargs or {}))
    if not isinstance(net, DynamicNet):
        raise ValueError(f"'{model}' has no steps to exit after.")
    policy: Any = thresholds
    if budget is not None:
        net.set_budget(budget)
        policy = net.exit_policy
    elif thresholds is not None:
        policy = net.make_stop_rule(thresholds)
    shares = None if own else _check_shares(exit_shares, net.num_steps)
    net.clear_exit()
    layout = _LAYOUTS[_layout_names(channels_last)[0]]
    if options:
        batches = [_with_layout(move_images(x, dev), layout) for x in read_images(options, net, wanted, num_images)]
        pool = batches
    nets = _prepare(
        net.to(dev).eval(), static, pretrained and not own, channels_last, fuse, torchcompile, cuda_graphs)
    if not options:
        pool = [_noise(net, batch_size, dev, layout) for _ in range(min(8, -(-wanted // batch_size)))]
        sizes = [batch_size] * (wanted // batch_size) + [wanted % batch_size] * (wanted % batch_size > 0)
        batches = [rows_of(pool[i % len(pool)], slice(n)) for i, n in enumerate(sizes)]
    autocast = torch.autocast(dev.type, getattr(torch, amp_dtype or 'bfloat16'), enabled=bool(amp_dtype))
    with torch.no_grad(), autocast:
        if shares is not None:
            policy = place_thresholds(nets.dynamic, pool, shares)
        ways = _ways(nets, policy, pool[0], batches)
        steps = _step_ways(nets, pool[:2])
        memory = {name: _peak_memory(way.run, dev) for name, way in ways.items()}  # this also warms up
        for way in steps.values():
            way.run()
        for _ in range(repeats):
            for way in (*steps.values(), *ways.values()):
                way.seconds.append(time_call(way.run, dev, way.calls) / way.num_images)
        latency = _latencies(nets, policy, pool, latency_images, dev)

    fastest = [min((way for (s, _), way in steps.items() if s == t), key=lambda way: median(way.seconds))
               for t in range(net.num_steps)]
    common = {'model': model, 'batch_size': batch_size, 'device': device}
    return [
        *({'exit': name, **common, **_figures(way, ways, fastest, nets), 'latency_ms': latency.get(name),
           'peak_mb': memory[name], 'exit_shares': way.exit_shares()} for name, way in ways.items()),
        *({'exit': f'step {t + 1}, full batch, {way.name}', **common, 'images_per_s': 1 / median(way.seconds),
           'gmacs': macs / 1e9} for t, (way, macs) in enumerate(zip(fastest, _macs_by_step(net))))]


@dataclass
class _Nets:
    """The networks that are timed."""
    dynamic: Any  # steps compiled if asked for
    other_layout: Any  # the same in the other memory format, not compiled
    layout: torch.memory_format
    static: Any = None
    plain_static: Any = None  # as timm creates it, where that differs
    static_name: str = ''
    static_size: tuple[int, int, int] = (0, 0, 0)
    static_macs: int | None = None

    def static_input(self, batch_size: int) -> torch.Tensor:
        device = next(self.dynamic.parameters()).device
        return torch.randn(batch_size, *self.static_size, device=device)


@dataclass
class _Way:
    """A way to predict."""
    name: str
    run: Callable[[], Any]
    num_images: int  # that a call predicts
    calls: int = 1  # that are timed together
    counts: list[int] | None = None  # images that stopped after each step
    seconds: list[float] = field(default_factory=list)  # per image, in each repeat

    def exit_shares(self) -> list[float] | None:
        return None if self.counts is None else [round(n / self.num_images, 4) for n in self.counts]


def _check_shares(shares: Sequence[float] | None, num_steps: int) -> tuple[float, ...]:
    if shares is None:
        return _SHARES.get(num_steps, (1 / num_steps,) * num_steps)
    if len(shares) != num_steps or min(shares) < 0 or not 0 < sum(shares) < float('inf'):
        raise ValueError(f'Expected {num_steps} exit shares, one a step and none below 0, got {list(shares)}.')
    return tuple(share / sum(shares) for share in shares)


def _prepare(
        net: DynamicNet,
        static: str | None,
        pretrained: bool,
        channels_last: bool,
        fuse: bool,
        torchcompile: str | None,
        cuda_graphs: bool,
) -> _Nets:
    """Create the static network, and give both networks the settings."""
    layout, other_layout = (_LAYOUTS[name] for name in _layout_names(channels_last))
    nets = _Nets(net, None, layout)
    _create_static(nets, static, pretrained)
    if nets.static is not None and (fuse or channels_last):
        nets.plain_static = copy.deepcopy(nets.static)
    if fuse:
        net.fuse_conv_bn()
        if nets.static is not None:
            fuse_conv_bn(nets.static, partial(nets.static, nets.static_input(1)))
    nets.other_layout = copy.deepcopy(net).to(memory_format=other_layout)
    net.to(memory_format=layout)
    if nets.static is not None:
        nets.static.to(memory_format=layout)
        nets.static_macs = count_macs(nets.static, nets.static_size)
    if torchcompile:
        net.compile_steps(cuda_graphs, torchcompile)
        mode = 'reduce-overhead' if cuda_graphs else None
        if nets.static is not None:
            nets.static = torch.compile(nets.static, backend=torchcompile, mode=mode, dynamic=False)
    return nets


def _layout_names(channels_last: bool) -> tuple[str, str]:
    """The memory format that was asked for, and the other one."""
    return ('channels last', 'contiguous') if channels_last else ('contiguous', 'channels last')


def _create_static(nets: _Nets, name: str | None, pretrained: bool) -> None:
    net = nets.dynamic
    if name is None:
        backbone = net.specs[-1].model if hasattr(net, 'specs') else getattr(net, 'backbone', None)
        name = backbone.split('@')[0] if isinstance(backbone, str) else 'none'
    if name == 'none':
        return
    check_model_name(name)
    static = timm.create_model(name, pretrained=pretrained, num_classes=net.num_classes, in_chans=net.in_chans)
    size = net.img_size if not hasattr(net, 'view_sizes') else net.view_sizes[-1]
    nets.static, nets.static_name = static.to(next(net.parameters()).device).eval(), name
    nets.static_size = net.in_chans, size, size


def _noise(net: Any, batch_size: int, device: torch.device, layout: torch.memory_format) -> Any:
    x = net.example_input(batch_size, device=device)
    return _with_layout(tuple(v.normal_() for v in x) if isinstance(x, tuple) else x.normal_(), layout)


def _with_layout(x: Any, layout: torch.memory_format) -> Any:
    if isinstance(x, tuple):
        return tuple(v.contiguous(memory_format=layout) for v in x)
    return x.contiguous(memory_format=layout)


def _ways(nets: _Nets, policy: Policy, batch: Any, batches: list[Any]) -> dict[str, _Way]:
    """The ways to predict that are compared, by name."""
    net, batch_size = nets.dynamic, num_images_of(batch)
    num_images = sum(map(num_images_of, batches))
    stream = ExitStream(net, policy, batch_size)
    ways = []
    if nets.static is not None:
        x, name = nets.static_input(batch_size), f'static {nets.static_name}'
        ways.append(_Way(name, partial(nets.static, x.contiguous(memory_format=nets.layout)), batch_size, 2))
        if nets.plain_static is not None:
            ways.append(_Way(f'{name}, plain', partial(nets.plain_static, x), batch_size, 2))
    ways.append(_Way('all steps', lambda: [None for _ in _all_steps(net, batch)], batch_size, 2))
    for name, predict in (
            ('early_exit', lambda: (early_exit(net, x, policy) for x in batches)),
            ('ExitStream', lambda: stream.run(batches))):
        way = _Way(name, lambda: None, num_images)
        way.run = partial(_count_exits, way, predict, net.num_steps)
        ways.append(way)
    return {way.name: way for way in ways}


def _count_exits(way: _Way, predict: Callable[[], Any], num_steps: int) -> None:
    steps_used = torch.cat([result.steps_used for result in predict()])
    way.counts = torch.bincount(steps_used - 1, minlength=num_steps).cpu().tolist()


def _step_ways(nets: _Nets, pool: list[Any]) -> dict[tuple[int, str], _Way]:
    """The steps by themselves, by number and by what is tried to make them fast.

    They take turns on several batches: data that is run twice in a row is in the caches.
    """
    name, other_name = _layout_names(nets.layout == torch.channels_last)
    candidates: list[tuple[str, Any, Callable[..., Any]]] = [
        (name, nets.dynamic, _eager_step), (other_name, nets.other_layout, _eager_step)]
    if nets.dynamic.has_compiled_steps:
        candidates.append(('compiled', nets.dynamic, DynamicNet.run_step))
    ways = {}
    for candidate, net, run_step in candidates:
        layout = nets.layout if net is nets.dynamic else _LAYOUTS[other_name]
        states = [[state for _, state in _all_steps(net, _with_layout(x, layout))] for x in pool]
        for t in range(net.num_steps):
            ways[t, candidate] = _Way(
                candidate, partial(_run_step_on_each, run_step, net, t, states), sum(map(num_images_of, pool)))
    return ways


def _run_step_on_each(run_step: Callable[..., Any], net: DynamicNet, t: int, states: list[list[State]]) -> None:
    for state in states:
        run_step(net, t, state[t])


def _eager_step(net: DynamicNet, t: int, state: State) -> torch.Tensor:
    logits, state = net.step(t, state)
    return net.confidence(logits, state)


def _all_steps(net: DynamicNet, x: Any) -> Iterator[tuple[torch.Tensor, State]]:
    """Confidences after each step, and the states before them."""
    state = net.init_state(x)
    for t in range(net.num_steps):
        before = state
        _, confidence, state = net.run_step(t, state)
        if net.has_compiled_steps:  # with CUDA graphs, the next step overwrites the results of this one
            confidence, state = confidence.clone(), {name: value.clone() for name, value in state.items()}
        yield confidence, before


def place_thresholds(net: DynamicNet, pool: list[Any], shares: Sequence[float]) -> list[float]:
    """Place thresholds such that given shares of the images stop at each step.

    They are quantiles of the confidences of the images that are left, halfway between two of them.

    Args:
        net: The model, in eval mode.
        pool: Batches of images.
        shares: A share per step; their sum is 1.
    """
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


def _macs_by_step(net: DynamicNet) -> list[int]:
    """Multiply-adds of each step alone."""
    return [macs - before for before, macs in zip((0, *net.step_macs), net.step_macs)]


def _figures(way: _Way, ways: dict[str, _Way], steps: list[_Way], nets: _Nets) -> dict[str, Any]:
    """What is shown of a way: speed, ratios, efficiency, multiply-adds."""
    static_name = f'static {nets.static_name}'
    if way.name.startswith('static'):
        efficiency, macs = None, None if nets.static_macs is None else float(nets.static_macs)
    else:
        num_steps = len(steps)
        reached = [sum(way.counts[t:]) / way.num_images if way.counts else 1. for t in range(num_steps)]
        needed = [sum(share * step.seconds[i] for share, step in zip(reached, steps)) for i in range(len(way.seconds))]
        efficiency = _ratio(needed, way.seconds)
        macs = sum(share * macs for share, macs in zip(reached, _macs_by_step(nets.dynamic)))
    return {
        'images_per_s': 1 / median(way.seconds),
        'x_static': _ratio(ways[static_name].seconds, way.seconds) if static_name in ways else None,
        **({} if nets.plain_static is None else {
            'x_plain': _ratio(ways[f'{static_name}, plain'].seconds, way.seconds)}),
        'x_all_steps': _ratio(ways['all steps'].seconds, way.seconds),
        'efficiency': efficiency,
        'gmacs': None if macs is None else macs / 1e9,
        'macs_static': None if macs is None or nets.static_macs is None else nets.static_macs / macs,
    }


def _ratio(seconds: Sequence[float], by: Sequence[float]) -> float:
    return median(a / b for a, b in zip(seconds, by, strict=True))


def _latencies(
        nets: _Nets,
        policy: Policy,
        pool: list[Any],
        num: int,
        device: torch.device,
) -> dict[str, float]:
    """Mean milliseconds per image at batch size 1, over the same images for all."""
    if not num:
        return {}
    size = num_images_of(pool[0])
    images = [rows_of(pool[i // size % len(pool)], slice(i % size, i % size + 1)) for i in range(num)]
    ways: dict[str, Callable[[Any], Any]] = {
        'all steps': lambda x: list(nets.dynamic.forward_steps(x)),
        'early_exit': lambda x: early_exit(nets.dynamic, x, policy)}
    if nets.static is not None:
        one = nets.static_input(1)
        ways[f'static {nets.static_name}'] = lambda x: nets.static(one)
    seconds = dict.fromkeys(ways, 0.)
    for function in ways.values():
        function(images[0])
    for x in images:
        for name, function in ways.items():
            seconds[name] += time_call(partial(function, x), device)
    return {name: 1e3 * total / num for name, total in seconds.items()}


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
