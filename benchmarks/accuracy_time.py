"""Accuracy over measured time of a cascade of two real networks: the picture in README.md. Needs ../shared/real.

The time is the CPU time of this process, with one thread. On an idle machine that is the time on the clock, and other
work on the machine does not count. All networks are tuned equally: fused batch norms, channels last.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy_time docs/accuracy_over_time.png

Prints the table of docs/clcnet.md.
"""
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from timm_dynamic.exits import ExitStream, ExitTable, collect_exit_table, early_exit, solve_thresholds
from timm_dynamic.layers import fuse_conv_bn
from timm_dynamic.utils import atomic_write
from timm_dynamic.utils.report import format_table

from .real_cascade import real

SIZES = (160, 224)  # of the members' images
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)  # of the images that go on to the second member
BATCH_SIZE, TIMED_BATCHES, SINGLE_IMAGES, REPEATS = 32, 10, 64, 5


NAMES = ('mobilenetv1_050_160', 'mobilenet_edgetpu_100_224')


def create_cascade(load: Any) -> Any:
    """MobileNetV1 x0.5 at 160, then MobileNet-EdgeTPU at 224; the largest probability, the last member's answer."""
    model: Any = timm.create_model(
        'clcnet', models=['mobilenetv1_100@160', 'mobilenet_edgetpu_100'], confidence='max_prob', final_rule='last')
    for t, name in enumerate(NAMES):
        model.members[t] = load.imagenet_net(name)
    model.eval().fuse_conv_bn()
    return model.to(memory_format=torch.channels_last)


def create_member(load: Any, t: int) -> Any:
    """A member by itself."""
    net = load.imagenet_net(NAMES[t])
    fuse_conv_bn(net, partial(net, torch.zeros(1, 3, SIZES[t], SIZES[t])))
    return net.to(memory_format=torch.channels_last)


def load_views(load: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The images [N, 3, S, S] of each member, and the classes [N]."""
    images, target = load.nips17()
    views = []
    for size in SIZES:
        pixels = [torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))) for image in images]
        view = (torch.stack(pixels).permute(0, 3, 1, 2).float() - 127.5) / 127.5
        views.append(view.contiguous(memory_format=torch.channels_last))
    return views, target


def solve(table: ExitTable, share: float) -> tuple[float, torch.Tensor]:
    """Accuracy if a share of the images go on, cross-fitted on two halves; and thresholds fitted on all images."""
    first, total = table.step_macs
    gmacs = (first + share * (total - first)) / 1e9
    halves = torch.randperm(len(table.correct), generator=torch.Generator().manual_seed(0)).chunk(2)
    tables = [ExitTable(table.confidence[rows], table.correct[rows], table.step_macs) for rows in halves]
    top1 = [b.evaluate(solve_thresholds(a, gmacs=gmacs)).top1 for a, b in (tables, tables[::-1])]
    return sum(top1) / 2, solve_thresholds(table, gmacs=gmacs)


def time_on_cpu(ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU seconds of each function. They are called by turns; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            seconds[name].append(time.process_time() - began)
    return {name: median(values[1:]) for name, values in seconds.items()}


def run_stream(model: Any, thresholds: torch.Tensor, batches: list[Any]) -> None:
    for _ in ExitStream(model, thresholds, BATCH_SIZE).run(batches):
        pass


def run_each(predict: Callable[[Any], Any], batches: list[Any]) -> None:
    for x in batches:
        predict(x)


@torch.no_grad()
def measure() -> list[dict[str, Any]]:
    """Rows with the share of images that go on, the accuracy, and milliseconds per image, as stream and one by one."""
    load = real()
    model, (views, target) = create_cascade(load), load_views(load)
    batches = list(zip(*(view.split(BATCH_SIZE) for view in views)))
    table = collect_exit_table(model, zip(batches, target.split(BATCH_SIZE)))
    singles = list(zip(*(view[:SINGLE_IMAGES].split(1) for view in views)))
    timed = batches[:TIMED_BATCHES]

    rows: list[dict[str, Any]] = []
    ways: dict[str, Callable[[], Any]] = {}
    for t, view in enumerate(views):
        alone = create_member(load, t)
        correct = torch.cat([alone(x).argmax(dim=1) for x in view.split(BATCH_SIZE)]) == target
        rows.append({'point': f'member {t + 1} alone', 'top1': 100 * correct.double().mean().item()})
        ways[f'stream {t}'] = partial(run_each, alone, [x[t] for x in timed])
        ways[f'single {t}'] = partial(run_each, alone, [x[t] for x in singles])
    for k, share in enumerate(SHARES, start=2):
        top1, thresholds = solve(table, share)
        rows.append({'point': f'{100 * share:.0f} % go on', 'top1': top1})
        ways[f'stream {k}'] = partial(run_stream, model, thresholds, timed)
        ways[f'single {k}'] = partial(run_each, partial(early_exit, model, policy=thresholds), singles)
    seconds = time_on_cpu(ways)
    for k, row in enumerate(rows):
        row['ms_stream'] = 1e3 * seconds[f'stream {k}'] / sum(len(x[0]) for x in timed)
        row['ms_single'] = 1e3 * seconds[f'single {k}'] / len(singles)
    return rows


def draw(path: str, rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 3.2), layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    for panel, key, title in zip(panels, ('ms_stream', 'ms_single'), ('stream of batches', 'one image at a time')):
        panel.plot(
            *zip(*[(row[key], row['top1']) for row in rows[2:]]), 'o-', ms=4, label='cascade of both')
        panel.plot(rows[0][key], rows[0]['top1'], 'v', color='black', label='MobileNetV1 x0.5 alone')
        panel.plot(rows[1][key], rows[1]['top1'], 's', color='black', label='MobileNet-EdgeTPU alone')
        panel.set(title=title, xlabel='CPU milliseconds per image, one thread', xlim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('top-1 (%)')
    panels[1].legend(loc='lower right', fontsize='small')
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110)


if __name__ == '__main__':
    rows = measure()
    print(format_table(rows))
    if len(sys.argv) > 1:
        draw(sys.argv[1], rows)
