"""What tests share."""
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from parity.confidence_reference import make_state_dict
from PIL import Image

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared'  # reference material that is not part of the repository
FULL_TESTS = os.environ.get('TIMM_DYNAMIC_FULL_TESTS') == '1'  # also the tests of full-size models that repeat others


def make_images(folder: Path, counts: dict[str, int], classes: int = 3, size: tuple[int, int] = (40, 36)) -> Path:
    """Write random PNGs, tinted by class, as FOLDER/SPLIT/CLASS/N.png."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for c in range(classes):
            path = folder / split / f'class{c}'
            path.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 130, (*size, 3), dtype=np.uint8)
                pixels[..., c % 3] += 90
                Image.fromarray(pixels).save(path / f'{i:03d}.png')
    return folder


def fit_classifier(model: Any, images: Path, split: str = 'train') -> None:
    """Fit the classifier of an untrained timm model to images of `make_images`, so that it is better than chance."""
    size = 32, 32
    paths = sorted((images / split).glob('*/*.png'))
    classes = torch.tensor([int(path.parent.name.removeprefix('class')) for path in paths])
    pixels = [np.array(Image.open(path).resize(size), dtype=np.float32) / 255 for path in paths]
    x = (torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) - 0.45) / 0.225
    with torch.no_grad():
        features = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        mean, scale = features.mean(0), features.std() + 1e-6
        inputs = (features - mean) / scale
        targets = torch.nn.functional.one_hot(classes, model.num_classes).float()
        weight = torch.linalg.solve(inputs.T @ inputs + torch.eye(inputs.shape[1]), inputs.T @ targets).T
        head = model.get_classifier()
        head.weight.copy_(weight / scale * 5)
        head.bias.copy_(-head.weight @ mean)


def run_python(*args, processes: int = 1, check: bool = True, env: Any = None) -> subprocess.CompletedProcess:
    """Run a Python script in the repository's root, by torchrun if there are to be several processes."""
    command = [sys.executable]
    if processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    process = subprocess.Popen(
        [*command, *map(str, args)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**(env or os.environ), 'PYTHONFAULTHANDLER': '1'})
    try:
        stdout, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        for child in reversed(psutil.Process(process.pid).children(recursive=True)):
            child.send_signal(signal.SIGABRT)  # each says where it stood
            time.sleep(0.5)
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f'still running after 300 s\n{stdout[-4000:]}\n{stderr[-12000:]}') from None
    if check and process.returncode:
        raise AssertionError(f'exit status {process.returncode}\n{stdout[-4000:]}\n{stderr[-4000:]}')
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def authors_checkpoint(model, name, steps=5, prefix='module.', **other):
    """What the authors' code would save of a GFNet over a ResNet or MobileNet."""
    weights, parts, classes = model.state_dict(), {}, model.num_classes
    width = model(model.example_input(), all_steps=True)['features'].shape[2]
    for part, encoder in (('model_prime_state_dict', 'global_encoder'), ('model_state_dict', 'local_encoder')):
        parts[part] = {prefix + k.removeprefix(f'{encoder}.'): v for k, v in weights.items() if k.startswith(encoder)}
        head = 'fc' if 'resnet' in name else 'classifier'
        parts[part].update({
            f'{prefix}{head}.weight': torch.randn(classes, width), f'{prefix}{head}.bias': torch.randn(classes)})
    if 'rnn' in model.classifier.heads:
        parts['fc'] = {f'rnn.{k}_l0': v for k, v in model.classifier.rnn.state_dict().items()}
        parts['fc'].update({f'fc.{k}': v for k, v in model.classifier.heads['rnn'].state_dict().items()})
    else:
        parts['fc'] = {}
        for t in range(2, 6):
            shape = classes, t * width
            parts['fc'][f'fc_{t}.weight'], parts['fc'][f'fc_{t}.bias'] = torch.randn(shape), torch.randn(classes)
    parts['policy'] = {
        **{k.replace('actor.', 'actor.0.') + ('_l0' if k.startswith('gru') else ''): v
           for k, v in model.policy.state_dict().items()},
        'critic.0.weight': torch.randn(1, 16), 'critic.0.bias': torch.randn(1)}
    flops = np.cumsum(np.full(steps, 0.5e9))
    return {
        'model_name': name, 'patch_size': model.patch_size, **parts, 'flops': list(flops),
        'anytime_classification': [torch.tensor(60.), 70.], 'dynamic_threshold': torch.rand(39, steps),
        'budgeted_batch_classification': [list(np.linspace(flops[0], flops[-1], 39)), [60.] * 39], **other}


def write_clcnet_zip(path: Path, seed: int = 0) -> None:
    """Write a confidence net as `save_model` of the original CLCNet does."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('model_params.json', json.dumps({'init_params': {'n_d': 8, 'n_a': 8}, 'class_attrs': {}}))
        with archive.open('network.pt', 'w') as f:
            torch.save(make_state_dict(seed=seed), f)
