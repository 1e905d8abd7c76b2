"""See that a model, loaded in a fresh process, gives the logits that are expected of it.

    python -m timm_dynamic.hub.check MODEL EXPECTED.safetensors [CACHE_DIR]
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from ..models.dynamic_net import DynamicNet
from ..utils import CheckpointError

# Of the largest logit: the same code on the same machine, but threads may add up in another order.
TOLERANCE = 1e-5


@torch.inference_mode()
def fixed_logits(model: Any, num_images: int = 2) -> torch.Tensor:
    """Logits of every step [T, B, num_classes], float32, on images that are always the same."""
    generator = torch.Generator().manual_seed(0)
    size = timm.data.resolve_model_data_config(model)['input_size']
    template = model.example_input(num_images) if isinstance(model, DynamicNet) else torch.empty(num_images, *size)

    def fill(x: Any) -> Any:
        return torch.randn(x.shape, generator=generator) if isinstance(x, torch.Tensor) else tuple(map(fill, x))

    model.eval()
    x = fill(template)
    return torch.stack(list(model.forward_steps(x)) if isinstance(model, DynamicNet) else [model(x)]).float()


def check_in_fresh_process(model: str, expected: torch.Tensor, cache_dir: str | Path | None = None) -> float:
    """Load a model with its weights in a new process, and compare its logits.

    Args:
        model: What `timm.create_model` takes, e.g. 'local-dir:FOLDER'.
        expected: What `fixed_logits` gave.
        cache_dir: Of downloads.

    Returns:
        Largest absolute difference.

    Raises:
        CheckpointError: It does not load, or its logits differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'expected.safetensors'
        save_file({'logits': expected.contiguous()}, file)
        command = [sys.executable, '-m', 'timm_dynamic.hub.check', model, str(file)]
        done = subprocess.run([*command, *([str(cache_dir)] if cache_dir else [])], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]
        raise CheckpointError(f"'{model}' does not load in a fresh process: {reason}")
    difference = float(json.loads(done.stdout.strip().splitlines()[-1])['difference'])
    limit = TOLERANCE * max(1., expected.abs().max().item())
    if not difference <= limit:
        raise CheckpointError(
            f"'{model}' gives other logits in a fresh process: they differ by {difference:.3g}, at most {limit:.3g} "
            'was expected.')
    return difference


def main(argv: list[str]) -> None:
    name, file, *cache_dir = argv
    model = timm.create_model(name, pretrained=True, cache_dir=cache_dir[0] if cache_dir else None)
    expected, found = load_file(file)['logits'], fixed_logits(model)
    if found.shape != expected.shape:
        sys.exit(f'Expected logits {list(expected.shape)}, got {list(found.shape)}.')
    print(json.dumps({'difference': (found - expected).abs().max().item()}))


if __name__ == '__main__':
    import timm_dynamic  # noqa: F401  registers the models

    main(sys.argv[1:])
