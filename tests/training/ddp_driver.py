"""Runs train.py under torchrun and writes, after the third update, what the processes hold.

    torchrun --nproc-per-node 2 ddp_driver.py REPORT TRAIN_ARGS...

REPORT becomes JSON: `weights_equal`, `averages_equal`, `data_differ`, `updates`.
"""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import timm_dynamic.training.trainer as trainer_module
from timm_dynamic.training import train_main


def main() -> int:
    report = Path(sys.argv[1])
    seen = []
    forward_backward, update = trainer_module.Trainer._forward_backward, trainer_module.Trainer._update

    def recording_forward_backward(self, input, target, scale):
        seen.append(input.double().sum())
        forward_backward(self, input, target, scale)

    def gathered(value: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(out, value.contiguous())
        return out

    def equal(module) -> bool:
        parts = [gathered(torch.cat([p.detach().flatten() for p in module.parameters()]))]
        return all(torch.equal(part[0], other) for part in parts for other in part[1:])

    def reporting_update(self, module):
        update(self, module)
        if self.updates == 3:
            sums = gathered(torch.stack(seen))
            content = {
                'weights_equal': equal(self.model), 'data_differ': not torch.equal(sums[0], sums[1]),
                'updates': self.updates,
                'averages_equal': equal(self.task.get_trainable_module(ema=True)) if self.task.has_ema() else None,
            }
            if dist.get_rank() == 0:
                report.write_text(json.dumps(content))

    trainer_module.Trainer._forward_backward = recording_forward_backward
    trainer_module.Trainer._update = reporting_update
    return train_main(sys.argv[2:])


if __name__ == '__main__':
    sys.exit(main())
