"""The parts of `benchmarks/gpu.sh`: each checks or measures something on a device, and gives rows of a table.

    python -m benchmarks.gpu_parts PART [--device DEVICE] [--quick] FILE

appends the rows to FILE as they come, one JSON object a line. A case that fails is a row, and the next one follows.
"""
import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import is_model_pretrained
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_dynamic.benchmark import benchmark_exit, time_each, wait_for
from timm_dynamic.benchmark.exit import place_thresholds
from timm_dynamic.data import create_dataset, create_train_loader
from timm_dynamic.exits import ExitStream, early_exit
from timm_dynamic.models.dynamic_net import DynamicNet
from timm_dynamic.task import GlanceFocusTask

from .train_step import benchmark_train_step, make_step

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all parts know: where they run, and whether this is a dry run."""
    device: str = 'cuda'
    quick: bool = False

    def choose(self, quick: Any, full: Any) -> Any:
        return quick if self.quick else full


def run_cases(cases: Iterable[tuple[Row, Callable[[], Iterable[Row]]]], settings: Settings) -> Iterator[Row]:
    """Run cases one after the other.

    Args:
        cases: What stands in each row of a case, e.g. its 'model', and what gives the rows.
        settings: See `Settings`.
    """
    for common, run in cases:
        try:
            yield from ({**common, **row} for row in run())
        except Exception as e:
            traceback.print_exc()
            reason = str(e).strip().partition('\n')[0]
            yield {**common, 'result': f'failed: {type(e).__name__}: {reason:.200}'}
        gc.collect()
        if settings.device.startswith('cuda'):
            torch.cuda.empty_cache()


# Parity

def parity(settings: Settings) -> Iterator[Row]:
    """The same weights on the CPU and on the device, without TF32: logits within 1e-4, and the same exits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield {'case': 'machine', 'result': _describe_machine(settings)}
    cases = [(name, 32) for name in ('test_focusnet', 'test_gfnet', 'test_anchornet_patch', 'test_clcnet')]
    large = ('focusnet_resnet18', 'gfnet_resnet50_96', 'gfnet_mobilenetv3_large_100_96',
             'anchornet_patch_densenet201_95', 'clcnet')
    cases += [(name, 16) for name in settings.choose((), large)]
    yield from run_cases(
        (({'model': name}, partial(compare_devices, name, settings, num)) for name, num in cases), settings)


def _describe_machine(settings: Settings) -> str:
    device = 'CPU'
    if settings.device.startswith('cuda'):
        device = f'{torch.cuda.get_device_name(settings.device)}, CUDA {torch.version.cuda}'
    return f'{device}, {os.cpu_count()} cores, torch {torch.__version__}, timm {timm.__version__}'


@torch.no_grad()
def compare_devices(name: str, settings: Settings, num_images: int) -> Iterator[Row]:
    """Compare a model on the CPU with its copy on the device, on noise."""
    torch.manual_seed(0)
    trained = name.startswith('test_') and is_model_pretrained(name)  # these weights come with the package
    model: Any = timm.create_model(name, pretrained=trained)
    x = _noise(model, num_images)
    if not trained:
        settle_norms(model, x)
    model.eval()
    other = copy.deepcopy(model).to(settings.device)
    other_x = _to(x, settings.device)
    case = f'cpu and {settings.device}, {num_images} images'
    if not isinstance(model, DynamicNet):
        yield {'case': f'logits, {case}', **_compare_logits(model(x)[None], other(other_x)[None].cpu())}
        return

    logits, confidence = _run_steps(model, x)
    other_logits, other_confidence = _run_steps(other, other_x)
    same = torch.ones(num_images, dtype=torch.bool)
    for ours, theirs in zip(_windows(model, x), _windows(other, other_x)):
        same &= (ours == theirs).all(dim=1)
    if (~same).sum() > num_images // 16:
        raise AssertionError(f'{int((~same).sum())} of {num_images} images have other windows.')
    yield {
        'case': f'logits, {case}' + ('' if same.all() else f', {int((~same).sum())} with other windows left out'),
        **_compare_logits(logits[:, same], other_logits[:, same])}

    thresholds = place_thresholds(model, [x], [1 / model.num_steps] * model.num_steps)
    expected = early_exit(model, x, thresholds).steps_used
    batches = [_rows(other_x, slice(i, i + 5)) for i in range(0, num_images, 5)]
    tolerance = 1e-6 + 10 * (confidence - other_confidence)[:, same].abs().amax(dim=1)
    near = ((confidence - torch.tensor(thresholds)[:, None]).abs() <= tolerance[:, None])[:-1].any(dim=0) | ~same
    for way, results in (
            ('early_exit', [early_exit(other, other_x, thresholds)]),
            ('ExitStream', ExitStream(other, thresholds, batch_size=8).run(batches))):
        used = torch.cat([result.steps_used for result in results]).cpu()
        wrong, excused = int(((used != expected) & ~near).sum()), int(((used != expected) & near).sum())
        verdict = f'failed: {wrong} images stop elsewhere' if wrong else 'ok'
        yield {'case': f'exits of {way}, {case}',
               'result': verdict + (f', {excused} at a threshold' if excused else '')}


def settle_norms(model: nn.Module, x: Any) -> None:
    """Set the statistics of all batch norms to those of some images, as training would: else logits vanish."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None  # the mean over all calls
            module.reset_running_stats()
    model.train()(x)


def _run_steps(model: DynamicNet, x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, B, C] and confidences [T, B], on the CPU."""
    state, logits, confidence = model.init_state(x), [], []
    for t in range(model.num_steps):
        step_logits, step_confidence, state = model.run_step(t, state)
        logits.append(step_logits.cpu())
        confidence.append(step_confidence.cpu())
    return torch.stack(logits), torch.stack(confidence)


def _windows(model: DynamicNet, x: Any) -> Iterable[torch.Tensor]:
    """Coordinates [B, 2] of the windows of each step, on the CPU; none where the model has no windows."""
    return model.forward_all(x).get('coords', torch.empty(0)).cpu()


def _compare_logits(ours: torch.Tensor, theirs: torch.Tensor) -> Row:
    difference, limit = (ours - theirs).abs().max().item(), 1e-4 * max(1., ours.abs().max().item())
    return {'difference': difference, 'result': 'ok' if difference <= limit else f'failed: more than {limit:.2g}'}


def _noise(model: Any, num: int) -> Any:
    if isinstance(model, DynamicNet):
        x = model.example_input(num)
        return tuple(view.normal_() for view in x) if isinstance(x, tuple) else x.normal_()
    return torch.randn(num, *model.pretrained_cfg['input_size'])


def _to(x: Any, device: str) -> Any:
    return tuple(v.to(device) for v in x) if isinstance(x, tuple) else x.to(device)


def _rows(x: Any, rows: slice) -> Any:
    return tuple(v[rows] for v in x) if isinstance(x, tuple) else x[rows]


# Resuming

def resume(settings: Settings) -> Iterator[Row]:
    """Train a GFNet in three stages: twice with the same seed, and once killed in the third stage and resumed."""
    args = ['--model', 'test_gfnet', '--device', settings.device, '--epochs', '1', '--checkpoint-interval', '1',
            '--train-num-samples', settings.choose('128', '1024'), '--val-num-samples', settings.choose('32', '256'),
            '-b', '32', '-j', settings.choose('0', '2'), '--stage', 'static', 'warmup', 'policy']
    with tempfile.TemporaryDirectory() as work:
        def start(name: str) -> subprocess.Popen:
            return subprocess.Popen(
                [sys.executable, 'train.py', *args, '--output', work, '--experiment', name, '--resume', 'auto'])

        runs = {name: start(name) for name in ('first', 'second', 'killed')}
        killed = False
        while not killed and runs['killed'].poll() is None:
            killed = any(Path(work, 'killed', 'state').glob('policy-*/*.safetensors'))
            time.sleep(0.005)
        runs['killed'].kill()
        runs['killed'].wait()
        if not killed:
            yield {'case': 'killed and resumed', 'result': 'failed: the run ended before it was killed'}
            return
        runs['resumed'] = start('killed')
        for name in ('first', 'second', 'resumed'):
            if status := runs[name].wait():
                yield {'case': f'{name} run', 'result': f'failed: exit status {status}'}
                return
        twice = compare_runs(Path(work, 'first'), Path(work, 'second'))
        again = compare_runs(Path(work, 'first'), Path(work, 'killed'))
        yield {'case': 'the same run twice', **twice}
        if again['difference'] and not twice['difference']:
            again['result'] = f"failed: {again['result']}"
        yield {'case': 'killed in the third stage, and resumed', **again}


def compare_runs(run: Path, other: Path) -> Row:
    """Compare all tensors that two runs have written."""
    files = sorted(path.relative_to(run) for path in run.rglob('*.safetensors'))
    if files != sorted(path.relative_to(other) for path in other.rglob('*.safetensors')):
        raise AssertionError(f"The runs '{run.name}' and '{other.name}' have written other files.")
    count, differ, largest = 0, 0, 0.
    for file in files:
        tensors, others = load_file(run / file), load_file(other / file)
        if tensors.keys() != others.keys():
            raise AssertionError(f"'{file}' holds other tensors in the runs '{run.name}' and '{other.name}'.")
        count += len(tensors)
        for name, tensor in tensors.items():
            difference = (tensor.double() - others[name].double()).abs().max().item() if tensor.numel() else 0.
            differ += difference > 0
            largest = max(largest, difference)
    result = f'{differ} of {count} tensors differ' if differ else f'ok, all {count} tensors are equal'
    return {'difference': largest, 'result': result}


# Speed of inference

_BF16 = dict(amp_dtype='bfloat16', channels_last=True)


def stream(settings: Settings) -> Iterator[Row]:
    """A static network, all steps, `early_exit` and `ExitStream`, eager."""
    cases: list[tuple[str, str, int, dict[str, Any]]] = [
        ('gfnet_resnet50_96', 'float32', 256, {}),
        ('gfnet_resnet50_96', 'float32, channels last', 256, dict(channels_last=True)),
        ('gfnet_resnet50_96', 'bfloat16, channels last', 256, _BF16),
        ('gfnet_resnet50_96', 'bfloat16, channels last, fused', 256, dict(_BF16, fuse=True)),
        ('gfnet_mobilenetv3_large_100_96', 'bfloat16, channels last, fused', 256, dict(_BF16, fuse=True)),
        ('anchornet_patch_densenet201_95', 'bfloat16, channels last, fused', 256, dict(_BF16, fuse=True)),
        ('clcnet', 'bfloat16, channels last, fused', 128, dict(_BF16, fuse=True)),
    ]
    if settings.quick:
        cases = [('test_gfnet', 'float32', 8, {}), ('test_clcnet', 'bfloat16, fused', 8, dict(_BF16, fuse=True))]
    yield from _time_exits(cases, settings)


def _time_exits(cases: Sequence[tuple[str, str, int, dict[str, Any]]], settings: Settings) -> Iterator[Row]:
    def run(model: str, case: str, batch_size: int, options: dict[str, Any]) -> Iterator[Row]:
        rows = benchmark_exit(
            model, batch_size=batch_size, num_images=settings.choose(3, 10) * batch_size, device=settings.device,
            repeats=settings.choose(1, 3), latency_images=0 if 'torchcompile' in options else settings.choose(1, 20),
            **options)
        for row in rows:
            if not row['exit'].startswith('step') and not row['exit'].endswith('plain'):
                kept = ('images_per_s', 'x_static', 'efficiency', 'latency_ms', 'peak_mb')
                yield {'case': f"{row['exit']}: {case}, batch {batch_size}", **{k: row[k] for k in kept}}
        if 'torchcompile' in options:
            torch.compiler.reset()

    return run_cases((({'model': case[0]}, partial(run, *case)) for case in cases), settings)


def copies(settings: Settings) -> Iterator[Row]:
    """Copying batches to the device: ahead on a stream of its own, as `ExitStream` does, and in line before each."""
    name = settings.choose('test_gfnet', 'gfnet_mobilenetv3_large_100_96')
    yield from run_cases([({'model': name}, partial(_time_copies, name, settings))], settings)


@torch.no_grad()
def _time_copies(name: str, settings: Settings) -> Iterator[Row]:
    device, (size, num) = torch.device(settings.device), settings.choose((8, 3), (256, 16))
    net: Any = timm.create_model(name)
    net.eval().to(device, memory_format=torch.channels_last)
    net.fuse_conv_bn()
    pool = [_noise(net, size).contiguous(memory_format=torch.channels_last) for _ in range(min(num, 4))]
    there = [x.to(device) for x in pool]
    pinned = [x.pin_memory() for x in pool] if device.type == 'cuda' else pool
    sources: dict[str, Callable[[int], torch.Tensor]] = {
        'images on the device': lambda i: there[i],
        'copied ahead, pinned memory': lambda i: pinned[i],
        'copied ahead': lambda i: pool[i],
        'copied in line, pinned memory': lambda i: pinned[i].to(device, non_blocking=True),
        'copied in line': lambda i: pool[i].to(device),
    }
    with torch.autocast(device.type, torch.bfloat16):
        engine = ExitStream(net, place_thresholds(net, there[:2], [1 / net.num_steps] * net.num_steps), size)

        def run(source: Callable[[int], torch.Tensor]) -> None:
            deque(engine.run(source(i % len(pool)) for i in range(num)), maxlen=0)

        seconds = time_each(
            {case: partial(run, source) for case, source in sources.items()}, settings.choose(1, 3), device)
    for case, values in seconds.items():
        efficiency = median(a / b for a, b in zip(seconds['images on the device'], values))
        yield {'case': f'ExitStream, {case}, bfloat16, batch {size}', 'images_per_s': num * size / median(values),
               'efficiency': efficiency}


def compiled(settings: Settings) -> Iterator[Row]:
    """Compiled steps of `ExitStream`, with and without CUDA graphs, and compiled steps of training."""
    backend = settings.choose('aot_eager', 'inductor')
    check = partial(check_compiled, 'test_gfnet', backend, settings)
    yield from run_cases([({'model': 'test_gfnet'}, check)], settings)
    fast = dict(_BF16, fuse=True, torchcompile=backend)
    graphs = dict(fast, cuda_graphs=True)
    name, size = settings.choose(('test_gfnet', 8), ('gfnet_mobilenetv3_large_100_96', 256))
    cases = [
        (name, 'bfloat16, channels last, fused, CUDA graphs', size, graphs),
        (name, 'bfloat16, channels last, fused, compiled', size, fast)]
    yield from _time_exits(cases, settings)
    if not settings.quick:
        yield from _time_training([('focusnet_resnet18', 256, 'bfloat16', backend)], settings)
        yield from _time_exits([('gfnet_resnet50_96', cases[0][1], 256, graphs)], settings)
    yield from _time_training([(name, settings.choose(4, 128), 'bfloat16', backend)], settings)


@torch.no_grad()
def check_compiled(name: str, backend: str, settings: Settings) -> Iterator[Row]:
    """Compare `ExitStream` over CUDA graphs, which reuse their memory, with `early_exit`, which is not compiled."""
    torch.backends.cudnn.allow_tf32 = False
    model: Any = timm.create_model(name, pretrained=True)
    model.eval().to(settings.device)
    x = _to(_noise(model, 48), settings.device)
    thresholds = place_thresholds(model, [x], [1 / model.num_steps] * model.num_steps)
    expected = early_exit(model, x, thresholds)
    model.compile_steps(cuda_graphs=True, backend=backend)
    results = list(ExitStream(model, thresholds, batch_size=16).run(x.split(7)))
    logits, used = (torch.cat([getattr(result, key) for result in results]) for key in ('logits', 'steps_used'))
    same = used == expected.steps_used
    row = {'case': 'ExitStream with CUDA graphs and early_exit, 48 images', **_compare_logits(
        expected.logits[same], logits[same])}
    if (~same).sum() > 1:  # one may be at a threshold
        row['result'] = f'failed: {int((~same).sum())} images stop elsewhere'
    yield row
    torch.compiler.reset()


# Speed of training

def train(settings: Settings) -> Iterator[Row]:
    """Training steps of GFNet's first stage and of FocusNet."""
    cases: list[tuple[str, int, str | None, str | None]] = [
        ('gfnet_resnet50_96', 128, None, None), ('gfnet_resnet50_96', 128, 'bfloat16', None),
        ('focusnet_resnet18', 256, None, None), ('focusnet_resnet18', 256, 'bfloat16', None)]
    if settings.quick:
        cases = [('test_gfnet', 4, None, None), ('test_focusnet', 4, 'bfloat16', None)]
    yield from _time_training(cases, settings)


def _time_training(
        cases: Sequence[tuple[str, int, str | None, str | None]],
        settings: Settings,
) -> Iterator[Row]:
    def run(model: str, batch_size: int, amp_dtype: str | None, torchcompile: str | None) -> Iterator[Row]:
        case = f"{amp_dtype or 'float32'}, channels last{', compiled' * bool(torchcompile)}, batch {batch_size}"
        for row in benchmark_train_step(
                model, batch_size, settings.device, settings.choose(1, 5), amp_dtype, torchcompile, channels_last=True):
            kept = {k: row.get(k) for k in ('images_per_s', 'ms', 'speedup', 'overhead')}
            yield {'case': f"train step, {row['train-step']}: {case}", **kept}
        if torchcompile:
            torch.compiler.reset()

    return run_cases((({'model': case[0]}, partial(run, *case)) for case in cases), settings)


def loader(settings: Settings) -> Iterator[Row]:
    """How long a GFNet's training waits for JPEG files: the loader alone, the steps alone, and both."""
    name = settings.choose('test_gfnet', 'gfnet_resnet50_96')
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), *settings.choose((32, 1), (512, 16)))
        cases = [({'model': name}, partial(_time_loader, name, folder, workers, settings))
                 for workers in settings.choose([0], [cores // 2, cores])]
        yield from run_cases(cases, settings)


def _time_loader(name: str, folder: str, workers: int, settings: Settings) -> Iterator[Row]:
    device, size, skip = torch.device(settings.device), settings.choose(4, 256), settings.choose(1, 6)
    net: Any = timm.create_model(name)
    net.to(device, memory_format=torch.channels_last)
    task = GlanceFocusTask(net, verbose=False).to(device).train()
    step = make_step(task.module, partial(torch.autocast, device.type, torch.bfloat16))
    data = create_dataset('', root=folder, split='train', is_training=True)
    batches = create_train_loader(
        data, (3, net.img_size, net.img_size), size, num_workers=workers, device=device, use_prefetcher=True,
        interpolation='bicubic', hflip=0.5, color_jitter=0.4, pin_memory=device.type == 'cuda')

    def train_on(x: torch.Tensor, target: torch.Tensor) -> None:
        x = x.contiguous(memory_format=torch.channels_last)
        step(lambda: task(x, target)['loss'])

    def rate(source: Iterable[Any], work: Callable[..., Any]) -> float:
        """Images per second, after the first batches."""
        source = iter(source)
        for batch in islice(source, skip):
            work(*batch)
        wait_for(device)
        start, num = time.perf_counter(), 0
        for batch in source:
            work(*batch)
            num += 1
        wait_for(device)
        return num * size / (time.perf_counter() - start)

    one = next(iter(batches))
    alone = rate(batches, lambda x, target: None)
    steps = rate([one] * len(batches), train_on)
    both = rate(batches, train_on)
    case = f'bfloat16, batch {size}'
    yield {'case': f'loader alone: {workers} workers', 'images_per_s': alone}
    yield {'case': f'train steps alone: {case}', 'images_per_s': steps}
    yield {'case': f'train steps and loader: {case}, {workers} workers', 'images_per_s': both,
           'wait': max(0., 1 - both / steps)}


def write_jpegs(folder: Path, num: int, links: int, classes: int = 4) -> None:
    """Write JPEG files of 500x375 smooth random pixels as FOLDER/train/CLASS/N.jpg, each under several names."""
    for c in range(classes):
        (folder / 'train' / f'class{c}').mkdir(parents=True)

    def write(i: int) -> None:
        rng = np.random.default_rng(i)
        smooth = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(smooth) + rng.normal(0, 6, (375, 500, 3))
        path = folder / 'train' / f'class{i % classes}' / f'{i:05d}.jpg'
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        for k in range(1, links):
            os.link(path, path.with_name(f'{i:05d}-{k}.jpg'))

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(num)))


PARTS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    'parity': parity, 'resume': resume, 'stream': stream, 'copies': copies, 'train': train, 'loader': loader,
    'compiled': compiled}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.gpu_parts', allow_abbrev=False)
    parser.add_argument('part', choices=PARTS)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('file')
    args = parser.parse_args(argv)
    settings = Settings(args.device, args.quick)
    with open(args.file, 'a', encoding='utf-8') as file:
        for row in run_cases([({}, partial(PARTS[args.part], settings))], settings):
            file.write(json.dumps({k: _round(v) for k, v in row.items()}) + '\n')
            file.flush()
    return 0


def _round(value: Any) -> Any:
    """Four digits, and no fraction of large numbers."""
    if not isinstance(value, float):
        return value
    return round(value) if value >= 100 else float(f'{value:.4g}')


if __name__ == '__main__':
    sys.exit(main())
