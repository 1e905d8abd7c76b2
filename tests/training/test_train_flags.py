"""Every option of timm's train.py, and of ours, has its effect on a run or is refused with advice.

The table says for each option how its effect shows. `built` looks at what a run has made just before it trains, `ran`
at a whole run, `accelerate` at what reaches Accelerate on a machine with a GPU.
"""
import sys
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import timm.layers
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import LoggerType
from flag_tables import (
    effect,
    fresh_accelerate,
    has,
    make_images,
    make_weights,
    marks,
    named,
    refused,
    spellings,
    timm_options,
)

from timm_dynamic.data import dataset_factory
from timm_dynamic.training import accelerator as accelerator_module
from timm_dynamic.training import build, run_training, trainer
from timm_dynamic.training import run as run_module
from timm_dynamic.training.options import create_train_parser
from timm_dynamic.training.report import read_rows
from timm_dynamic.training.state import StateStore

# timm leaves it to the garbage collector to close the images that it has read.
pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')

BASE = {
    '--data-dir': '{data}', '--model': 'test_resnet', '--num-classes': '3', '--img-size': '32', '-b': '4', '-j': '0',
    '--epochs': '2', '--warmup-epochs': '0', '--device': 'cpu', '--output': '{tmp}', '--experiment': 'run',
}


class _Built(Exception):
    """Takes the place of training when only what was built is looked at."""


class Lab:
    """Runs train.py in this process, on 12 images to train on (3 batches of 4) and 9 to validate on."""

    def __init__(self, tmp_path, data, weights, monkeypatch, capsys, caplog):
        self.tmp, self.monkeypatch, self.capsys, self.caplog = tmp_path, monkeypatch, capsys, caplog
        self.parser = create_train_parser()
        self.number = 0
        self.paths = {'{data}': data, '{weights}': weights, '{checkpoint}': weights / 'model.safetensors', '{tmp}': tmp_path}
        caplog.set_level('INFO', 'timm_dynamic')
        self._watch()

    def _watch(self):
        """Note what crosses the border to timm's datasets, torch.compile, Weights & Biases and the disk."""
        patch = self.monkeypatch.setattr
        create_dataset, fit, save = dataset_factory.create_timm_dataset, run_module.Trainer.fit, StateStore.save

        def watched_create_dataset(name, **kwargs):
            self.seen.opened[kwargs['split']] = {'name': name, **kwargs}
            remote = name.startswith(('wds/', 'hfds/', 'tfds/'))  # what they need is not installed
            return create_dataset('' if remote else name, **{**kwargs, 'trust_remote_code': False} if remote else kwargs)

        def watched_fit(t, stop):
            self.seen.trainer = t
            if not self.training:
                raise _Built
            self.prepare(t)
            return fit(t, stop)

        def watched_save(store, state, name):
            self.seen.saves.append(name)
            return save(store, state, name)

        def watched_compile(model, backend='inductor', mode=None):
            self.seen.compiled.append((backend, mode))
            return model

        def init(**kwargs):
            self.seen.wandb.append(kwargs)
            return SimpleNamespace(log=lambda values, **kw: self.seen.logged.append(values), finish=lambda: None)

        patch(dataset_factory, 'create_timm_dataset', watched_create_dataset)
        patch(run_module.Trainer, 'fit', watched_fit)
        patch(StateStore, 'save', watched_save)
        patch(torch, 'compile', watched_compile)
        wandb = types.ModuleType('wandb')
        wandb.init, wandb.config = init, SimpleNamespace(update=lambda *args, **kw: None)
        self.monkeypatch.setitem(sys.modules, 'wandb', wandb)
        patch('accelerate.tracking._available_trackers', [LoggerType.TENSORBOARD, LoggerType.WANDB])

    def argv(self, *options, drop=()):
        base = {k: v for k, v in BASE.items() if k not in drop}
        if not {'--experiment', '--resume', *drop} & {'--experiment', *options} - {'--experiment'} | set(drop):
            pass
        argv = [word for item in base.items() for word in item] + [str(o) for o in options]
        for name, path in self.paths.items():
            argv = [word.replace(name, str(path)) for word in argv]
        return argv
