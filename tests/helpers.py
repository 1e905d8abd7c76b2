"""What tests share."""
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def run_python(*args, processes: int = 1, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run a Python script in the repository's root, by torchrun if there are to be several processes."""
    command = [sys.executable]
    if processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    result = subprocess.run(
        [*command, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False, **kwargs)
    if check and result.returncode:
        raise AssertionError(f'exit status {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}')
    return result
