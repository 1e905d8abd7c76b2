"""Exit tables to test with."""
import torch

from timm_dynamic.exits import ExitTable


def table_like(num, steps, seed=0, classes=10, sharpness=1):
    """Something like a real table: logits that get better with every step. All logits are multiplied by `sharpness`."""
    generator = torch.Generator().manual_seed(seed)
    hard = torch.rand(num, 1, 1, generator=generator) * 3
    noise = torch.randn(num, steps, classes, generator=generator).cumsum(dim=1)
    truth = torch.zeros(classes)
    truth[0] = 1
    logits = 1.2 * hard * truth * torch.arange(1, steps + 1)[:, None] + noise
    confidence = (sharpness * logits).softmax(-1).amax(-1)
    return ExitTable(confidence, logits.argmax(-1) == 0, [10**9 * (t + 1) for t in range(steps)])
