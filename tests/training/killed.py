"""train.py in a process that kills itself, with SIGKILL, at a given point.

Points, each the N-th time it is reached (1 by default): `update` (between two batches), `half` (half of a state on
disk), `written` (all of it, not yet renamed), `renamed` (older states not yet dropped), `export` (weights of last/
written, config not), `part` (before a part of a cascade's features is written).
"""
import os
import signal
from pathlib import Path

import torch

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

    save = torch.save

    def killing_save(state, file, *args, **kwargs):
        save(state, file, *args, **kwargs)
        if reached('half'):
            file.truncate(file.tell() // 2)
            die()

    sha256_of = state_module.sha256_of

    def killing_sha256_of(path):
        if path.name.startswith('.partial-') and reached('written'):
            die()
        return sha256_of(path)

    fsync_dir = state_module.fsync_dir

    def killing_fsync_dir(folder):
        fsync_dir(folder)
        if reached('renamed'):
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
    state_module.torch.save = killing_save
    state_module.sha256_of = killing_sha256_of
    state_module.fsync_dir = killing_fsync_dir
    export_module.atomic_write = killing_atomic_write
    return train_main(args[1:])
