"""What tests share."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared'  # reference material that is not part of the repository


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
