"""Check that models give the expected logits when a fresh process loads them.

    python -m timm_dynamic.hub.check EXPECTED.safetensors [CACHE_DIR]
"""
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from ..models.dynamic_net import DynamicNet
from ..utils import CheckpointError
from ..utils.download import first_line

# Relative to the largest logit. Threads may add numbers in another order, even on the same machine.
TOLERANCE = 1e-5


@torch.inference_mode()
def fixed_logits(model: Any, num_images: int = 2) -> torch.Tensor:
    """Logits of every step [T, B, num_classes], float32, for fixed random images."""
    generator = torch.Generator().manual_seed(0)
    size = timm.data.resolve_model_data_config(model)['input_size']
    template = model.example_input(num_images) if isinstance(model, DynamicNet) else torch.empty(num_images, *size)

    def fill(x: Any) -> Any:
        return torch.randn(x.shape, generator=generator) if isinstance(x, torch.Tensor) else tuple(map(fill, x))

    model.eval()
    x = fill(template)
    return torch.stack(list(model.forward_steps(x)) if isinstance(model, DynamicNet) else [model(x)]).float()


def check_in_fresh_process(
        expected: Mapping[str, torch.Tensor],
        cache_dir: str | Path | None = None,
) -> dict[str, float]:
    """Load models with their weights in a new process and compare their logits.

    Args:
        expected: Results of `fixed_logits` by the name for `timm.create_model`, e.g. 'local-dir:FOLDER'.
        cache_dir: Folder for downloads.

    Returns:
        Largest absolute difference by name.

    Raises:
        CheckpointError: A model does not load, or its logits differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'expected.safetensors'
        save_file({k: v.contiguous().clone() for k, v in expected.items()}, file)
        command = [sys.executable, '-m', 'timm_dynamic.hub.check', str(file), *([str(cache_dir)] if cache_dir else [])]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]
        raise CheckpointError(f'The fresh process that should load {", ".join(expected)} failed: {reason}')
    found = json.loads(done.stdout.strip().splitlines()[-1])
    problems = []
    for model, logits in expected.items():
        limit = TOLERANCE * max(1., logits.abs().max().item())
        if isinstance(found[model], str):
            problems.append(f"'{model}' does not load in a fresh process: {found[model]}")
        elif not found[model] <= limit:
            problems.append(
                f"The logits of '{model}' differ by {found[model]:.3g} in a fresh process (limit {limit:.3g}).")
    if problems:
        raise CheckpointError('\n'.join(problems))
    return {model: float(found[model]) for model in expected}


def _difference(name: str, expected: torch.Tensor, cache_dir: str | None) -> float | str:
    """Largest difference between logits, or why the model cannot be compared."""
    try:
        found = fixed_logits(timm.create_model(name, pretrained=True, cache_dir=cache_dir))
    except Exception as e:
        return first_line(e)
    if found.shape != expected.shape:
        return f'expected logits {list(expected.shape)}, got {list(found.shape)}.'
    return (found - expected).abs().max().item()


def main(argv: list[str]) -> None:
    file, *cache_dir = argv
    print(json.dumps({
        name: _difference(name, expected, cache_dir[0] if cache_dir else None)
        for name, expected in load_file(file).items()}))


if __name__ == '__main__':
    import timm_dynamic  # noqa: F401  registers the models

    main(sys.argv[1:])
