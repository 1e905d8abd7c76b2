"""Runs train.py under torchrun and writes, after the third update of each stage, what the processes hold.

    torchrun --nproc-per-node 2 ddp_driver.py REPORT TRAIN_ARGS...

REPORT becomes JSON: by stage `weights_equal`, `weights_learned`, `averages_equal`, `data_differ`, `updates`.
"""
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import timm_dynamic.training.trainer as trainer_module
from timm_dynamic.training import train_main


def main() -> int:
    report = Path(sys.argv[1])
    content: dict[str, Any] = {}
    seen: list[torch.Tensor] = []
    before: dict[int, torch.Tensor] = {}
    forward_backward, update = trainer_module.Trainer._forward_backward, trainer_module.Trainer._update

    def recording_forward_backward(self, input, target, scale):
        if self.updates == 0 and not before:
            before.update((id(p), p.detach().clone()) for p in self.task.get_trainable_module().parameters())
        seen.append(input.double().sum())
        forward_backward(self, input, target, scale)

    def gathered(value: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(out, value.contiguous())
        return out

    def equal(module) -> bool:
        first, *others = gathered(torch.cat([p.detach().flatten() for p in module.parameters()]))
        return all(torch.equal(first, other) for other in others)

    def reporting_update(self, module):
        update(self, module)
        if self.updates == 3:
            sums = gathered(torch.stack(seen))
            module = self.task.get_trainable_module()
            learning = [p for p in module.parameters() if p.requires_grad]
            content[self.stage.name] = {
                'weights_equal': equal(module), 'data_differ': not torch.equal(sums[0], sums[1]),
                'weights_learned': all(not torch.equal(p, before[id(p)]) for p in learning),
                'updates': self.updates,
                'averages_equal': equal(self.task.get_trainable_module(ema=True)) if self.task.has_ema() else None,
            }
            seen.clear()
            before.clear()
            if dist.get_rank() == 0:
                report.write_text(json.dumps(content))

    trainer_module.Trainer._forward_backward = recording_forward_backward
    trainer_module.Trainer._update = reporting_update
    return train_main(sys.argv[2:])


if __name__ == '__main__':
    sys.exit(main())
