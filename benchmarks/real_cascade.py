"""Cascades of real networks on real images: which confidence is best? Needs ../shared/real.

    python -m benchmarks.real_cascade [CACHE_FOLDER]

For three random halves: thresholds are fitted on one half and evaluated on the other, as is the confidence net that is
trained here (out of two folds of the first half for its thresholds). Prints the tables of docs/clcnet.md.
"""
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from timm_dynamic import ConfidenceNet
from timm_dynamic.data import ConfidenceFeatures
from timm_dynamic.evaluation.cascade import replay_members
from timm_dynamic.exits import (
    cascade_table,
    solve_thresholds,
)
from timm_dynamic.exits.measures import auroc, curve_area
from timm_dynamic.models.macs import count_macs
from timm_dynamic.task import fit_confidence_net, fit_folds, make_folds, score_folds

SHARED = Path(__file__).parents[2] / 'shared'  # reference material that is not part of the repository
HALVES, FOLDS, SHARES = 3, 2, (0.25, 0.5, 0.75)
FIT: dict[str, Any] = dict(epochs=60, patience=15)


def real() -> Any:
    spec: Any = importlib.util.spec_from_file_location('load', SHARED / 'real/load.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def say(net, batches):
    return torch.cat([net(x).float() for x in batches])


def nips17(load):
    images, target = load.nips17()
    logits, macs = [], []
    for name in ('mobilenetv1_050_160', 'mobilenet_edgetpu_100_224'):
        size = int(name.rpartition('_')[2])
        net = load.imagenet_net(name)
        pixels = [torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))) for image in images]
        x = (torch.stack(pixels).permute(0, 3, 1, 2).float() - 127.5) / 127.5
        logits.append(say(net, x.split(50)))
        macs.append(count_macs(net, (3, size, size)))
    return torch.stack(logits, dim=1), target, macs


def cifar10(load):
    pixels, target = load.cifar10()
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]]).view(2, 1, 3, 1, 1)
    nets = [load.cifar_net(depth) for depth in (20, 56)]
    logits = [say(net, ((b.float() / 255 - mean) / std for b in pixels.split(250))) for net in nets]
    return torch.stack(logits, dim=1), target, [count_macs(net, (3, 32, 32)) for net in nets]


def cascade(macs, classes):
    """Replays answers; its members are never run, only their costs count."""
    model: Any = timm.create_model('test_clcnet', num_classes=classes).eval()
    model._step_macs = (macs[0], sum(macs))
    return model


def compare(logits, target, macs, nets):
    """Rows by confidence and rule: AUROC, area and accuracies of every half."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for seed in range(HALVES):
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
        a, b = order.chunk(2)
        model = cascade(macs, logits.shape[2])
        with_nets = {'trained': None, **nets}
        for label, net in with_nets.items():
            if net is None:
                began = time.process_time()
                features = [ConfidenceFeatures.from_logits(logits[a, t], target[a], [''] * len(a)) for t in (0, 1)]
                merged = ConfidenceFeatures.merge(features)
                folds = make_folds(len(a), FOLDS, seed).repeat(2)
                fits = fit_folds(merged.probabilities, merged.correct, folds, seed=seed, **FIT)
                own = score_folds([fit.net for fit in fits], merged.probabilities, folds).unflatten(0, (2, -1))
                net = fit_confidence_net(merged.probabilities, merged.correct, seed=seed, **FIT).net
                print(f'  trained in {time.process_time() - began:.0f} s of CPU time', file=sys.stderr)
            model.set_confidence('clcnet', net=net)
            model._step_macs = (macs[0], sum(macs))
            fit, evaluated = (
                {k: done.table for k, done in replay_members(model, logits[i], target[i]).items()} for i in (a, b))
            for (kind, rule), table in evaluated.items():
                if kind != 'clcnet' and label != 'trained':
                    continue
                name = f'CLCNet, {label}' if kind == 'clcnet' else kind
                fitted = fit[kind, rule]
                if kind == 'clcnet' and label == 'trained':
                    fitted = cascade_table(own, torch.stack([f.correct for f in features]), model.step_macs, rule)
                row = found.setdefault((name, rule), [])
                tops = [
                    table.evaluate(solve_thresholds(fitted, gmacs=(macs[0] + share * macs[1]) / 1e9))
                    for share in SHARES]
                row.append([
                    auroc(table.confidence[:, 0], table.correct[:, 0]), curve_area(fitted, table),
                    *(v for point in tops for v in (point.top1, point.gmacs))])
    return found


def main():
    cache = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for name, make in (('nips17', nips17), ('cifar10', cifar10)):
        path = cache / f'{name}.pt' if cache else None
        if path and path.exists():
            logits, target, macs = torch.load(path)
        else:
            logits, target, macs = make(real())
            if path:
                torch.save((logits, target, macs), path)
        correct = (logits.argmax(dim=2) == target[:, None]).double().mean(dim=0)
        print(f'\n{name}: {len(target)} images; alone ' + ', '.join(
            f'{100 * h:.2f} % at {m / 1e9:.4f} GMACs' for h, m in zip(correct, macs)))
        nets = {}
        if logits.shape[2] == 1000:
            for path in sorted((SHARED / 'parity/clcnet/official').glob('*.safetensors')):
                nets[f'official {path.stem}'] = ConfidenceNet.from_pretrained(path)
        print('| confidence | final answer | AUROC | area | '
              + ' | '.join(f'top-1 at {100 * s:.0f} % (GMACs)' for s in SHARES) + ' |')
        print('|---|---|---|---|' + '---|' * len(SHARES))
        for (kind, rule), rows in compare(logits, target, macs, nets).items():
            values = torch.tensor(rows, dtype=torch.float64)
            mean, least, most = values.mean(0), values.amin(0), values.amax(0)
            tops = [f'{mean[2 + 2 * i]:.2f} ({mean[3 + 2 * i]:.4f})' for i in range(len(SHARES))]
            print(f'| {kind} | {rule} | {mean[0]:.4f} | {mean[1]:.2f} ({least[1]:.2f} to {most[1]:.2f}) | '
                  + ' | '.join(tops) + ' |')


if __name__ == '__main__':
    main()
