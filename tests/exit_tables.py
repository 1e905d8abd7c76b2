"""Made-up exit tables."""
import torch

from timm_dynamic.exits import ExitTable


def make_table(num=400, seed=0, step_macs=(1_000_000_000, 2_000_000_000, 4_000_000_000), top5=True):
    """A model that is right as often as it is sure, and surer from step to step."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(1, 4)
    confidence = torch.rand(num, 3, generator=generator) ** (1 / steps)
    correct = torch.rand(num, 3, generator=generator) < confidence
    return ExitTable(confidence, correct, step_macs, correct | (confidence > 0.9) if top5 else None)
