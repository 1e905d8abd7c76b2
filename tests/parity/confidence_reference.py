"""The authors' confidence net, straightforwardly: their keys, and everything that they compute.

It stands in for their weights, which are no part of this repository, and is what `ConfidenceNet` has to be faster than.
"""
import math

import torch
import torch.nn.functional as F

STEPS, SHARED, OWN, WIDTH, DECISION, MAPPED, KEYS = 3, 2, 2, 16, 8, 100, 10


def make_state_dict(num_inputs: int = 1000, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in the authors' layout: 143 tensors, shared layers under eight names each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=generator) * std

    out: dict[str, torch.Tensor] = {}

    def norm(name, width):
        out.update({
            f'{name}.weight': 1 + normal(width, std=0.2), f'{name}.bias': normal(width, std=0.2),
            f'{name}.running_mean': normal(width, std=0.2), f'{name}.running_var': 1 + torch.rand(
                width, generator=generator), f'{name}.num_batches_tracked': torch.tensor(7)})

    shared = [normal(2 * WIDTH, MAPPED, std=3.0), normal(2 * WIDTH, WIDTH, std=0.5)]
    for block in ('initial_splitter', *(f'feat_transformers.{s}' for s in range(STEPS))):
        for i, weight in enumerate(shared):
            out[f'encoder.{block}.shared.shared_layers.{i}.weight'] = weight.clone()
            out[f'encoder.{block}.shared.glu_layers.{i}.fc.weight'] = weight.clone()
            norm(f'encoder.{block}.shared.glu_layers.{i}.bn.bn', 2 * WIDTH)
        for i in range(OWN):
            out[f'encoder.{block}.specifics.glu_layers.{i}.fc.weight'] = normal(2 * WIDTH, WIDTH, std=0.5)
            norm(f'encoder.{block}.specifics.glu_layers.{i}.bn.bn', 2 * WIDTH)
    for s in range(STEPS):
        out[f'encoder.att_transformers.{s}.fc.weight'] = normal(MAPPED, WIDTH - DECISION)
        norm(f'encoder.att_transformers.{s}.bn.bn', MAPPED)
    for name in ('res_att', 'nor_att'):
        for part, width in (('query', KEYS), ('key', KEYS), ('value', MAPPED)):
            if (name, part) != ('res_att', 'value'):
                out[f'encoder.{name}.{part}.weight'] = normal(width, 1, std=2.0)
                out[f'encoder.{name}.{part}.bias'] = normal(width)
    norm('encoder.initial_bn', num_inputs)
    norm('initial_bn', num_inputs)
    out['final_mapping.weight'] = normal(1, DECISION)
    return {f'tabnet.{k}': v for k, v in out.items()}


def run(state_dict: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [B] of sorted probabilities [B, n], and the mean entropy of the masks."""
    w = {k.removeprefix('tabnet.'): v for k, v in state_dict.items()}
    n = x.shape[1]

    def norm(name, y):
        return F.batch_norm(
            y, *(w[f'{name}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')), training=False)

    def linear(name, y):
        return F.linear(y, w[f'{name}.weight'], w.get(f'{name}.bias'))

    def attend(name, values):
        query, key = (linear(f'encoder.{name}.{part}', x[..., None]) for part in ('query', 'key'))
        return (query @ key.transpose(1, 2) / math.sqrt(MAPPED)).softmax(dim=2) @ values  # [B, n, n] @ [B, n, 100]

    def transform(block, y):
        for i, layer in enumerate(f'{part}.glu_layers.{j}' for part in ('shared', 'specifics') for j in range(2)):
            z = norm(f'encoder.{block}.{layer}.bn.bn', linear(f'encoder.{block}.{layer}.fc', y))
            gated = z[:, :WIDTH] * z[:, WIDTH:].sigmoid()
            y = (y + gated) * math.sqrt(0.5) if i else gated
        return y

    u, centre = torch.linspace(0, 1, MAPPED, dtype=torch.float64), torch.arange(n, dtype=torch.float64)[:, None] / n
    bumps = (-(u - centre).square() / (2 * 0.01 ** 2)).exp().float()
    mapped = attend('res_att', bumps * x[..., None])[:, 0].sort(dim=1, descending=True).values
    attend('nor_att', linear('encoder.nor_att.value', x[..., None]))  # goes nowhere
    source, prior = transform('initial_splitter', mapped), torch.ones_like(mapped)
    total, entropy = torch.zeros(len(x), DECISION), torch.zeros(())
    for s in range(STEPS):
        attention = linear(f'encoder.att_transformers.{s}.fc', source[:, DECISION:])
        mask = project_to_simplex(norm(f'encoder.att_transformers.{s}.bn.bn', attention) * prior)
        entropy = entropy - (mask * (mask + 1e-15).log()).sum(dim=1).mean() / STEPS
        prior = prior * (1.3 - mask)
        source = transform(f'feat_transformers.{s}', mapped)  # not masked
        total = total + source[:, :DECISION].relu()
    return linear('final_mapping', total)[:, 0], entropy


def project_to_simplex(z: torch.Tensor) -> torch.Tensor:
    """By bisection for the shift."""
    low, high = z.amax(dim=1, keepdim=True) - 1, z.amax(dim=1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        too_much = (z - middle).relu().sum(dim=1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (z - low).relu()


def make_probabilities(batch: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Sorted probabilities of many temperatures [batch, classes]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator) * torch.linspace(0.2, 9, batch)[:, None]
    return logits.softmax(dim=1).sort(dim=1, descending=True).values
