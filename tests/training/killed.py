"""train.py in a process that kills itself, with SIGKILL, at a given point.

Points, each the N-th time it is reached (1 by default): `update` (between two batches), `tensors` (half of the state's
tensors on disk), `values` (state written, not yet renamed), `rename` (renamed, pointer not yet set), `export` (weights
of last/ written, config not), `part` (before a part of a cascade's features is written).
"""
import os
import signal
from pathlib import Path

import safetensors.torch

import timm_dynamic.task.clcnet as cascade_module
import timm_dynamic.task.feature_parts as parts_module
import timm_dynamic.training.run_folder as state_module
import timm_dynamic.training.trainer as trainer_module
import timm_dynamic.utils.export as export_module
from timm_dynamic.training import train_main


def train_until(args: list[str]) -> int:
    """Run train.py; the first argument is POINT or POINT:N. It changes modules: only for a process of its own."""
    point, _, number = args[0].partition(':')
    left = int(number or 1)

    def reached(name: str) -> bool:
        nonlocal left
        if name != point:
            return False
        left -= 1
        return left == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    update = trainer_module.Trainer._update

    def killing_update(self, count):
        update(self, count)
        if reached('update'):
            die()

    save_file = safetensors.torch.save_file

    def killing_save_file(tensors, path, *args, **kwargs):
        save_file(tensors, path, *args, **kwargs)
        in_state = Path(path).name == 'tensors.safetensors'
        if in_state and reached('tensors'):
            with open(path, 'rb+') as f:
                f.truncate(Path(path).stat().st_size // 2)
            die()

    fsync_dir = state_module.fsync_dir

    def killing_fsync_dir(folder):
        fsync_dir(folder)
        written = folder.name.startswith('.partial-')
        if reached('values' if written else 'rename'):
            die()

    atomic_write = export_module.atomic_write

    def killing_atomic_write(path):
        if Path(path).name == 'config.json' and Path(path).parent.name == 'last' and reached('export'):
            die()
        return atomic_write(path)

    keep = parts_module.save_file

    def killing_keep(tensors, path, **kwargs):
        if reached('part'):  # before this part: those written so far are kept
            die()
        keep(tensors, path, **kwargs)

    cascade_module._BATCHES_PER_PART = 1
    parts_module.save_file = killing_keep
    trainer_module.Trainer._update = killing_update
    safetensors.torch.save_file = killing_save_file
    state_module.fsync_dir = killing_fsync_dir
    export_module.atomic_write = killing_atomic_write
    return train_main(args[1:])
