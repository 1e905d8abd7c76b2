"""train.py in several processes, with reports of what they hold. All of it changes modules: for own processes only."""
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

import timm_dynamic.training.progress as progress_module
import timm_dynamic.training.trainer as trainer_module
from timm_dynamic.training import train_main


def train_and_report(args: list[str]) -> int:
    """Run train.py and report what the processes hold after the third update of each stage.

    The first argument is a file that becomes JSON: by stage `weights_equal`, `weights_learned`, `averages_equal`,
    `data_differ`, `updates`.
    """
    report = Path(args[0])
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
    return train_main(args[1:])


def report_batch_norm(args: list[str]) -> int:
    """Run train.py for an epoch and report the means that batch norm has collected.

    The first argument is a file that becomes JSON: the sums of the first layer's running means, one a process, `after`
    the first batch, `before` the second one, after the `last` one and at the `end` of the epoch.
    """
    layers: list[torch.nn.Module] = []
    seen: list[float] = []
    forward, end_epoch = torch.nn.BatchNorm2d.forward, progress_module.TrainingLog.end_epoch

    def recording_forward(self, x):
        if not self.training or (layers and self is not layers[0]):
            return forward(self, x)
        layers[:] = [self]
        seen.append(self.running_mean.sum().item())
        out = forward(self, x)
        seen.append(self.running_mean.sum().item())
        return out

    def reporting_end_epoch(self, row, *counts):
        end_epoch(self, row, *counts)
        end = layers[0].running_mean.sum().item()
        ranks = gather_object([{'after': seen[1], 'before': seen[2], 'last': seen[-1], 'end': end}])
        if PartialState().is_main_process:
            Path(args[0]).write_text(json.dumps({key: [rank[key] for rank in ranks] for key in ranks[0]}))

    torch.nn.BatchNorm2d.forward = recording_forward
    progress_module.TrainingLog.end_epoch = reporting_end_epoch
    return train_main(args[1:])
