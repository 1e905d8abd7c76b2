"""Every option of timm's train.py, and of ours, has its effect on a run or is refused with advice.

The table says for each option how its effect shows: `built` looks at what a run has made just before it trains, `ran`
at a whole run, `accelerate` at what reaches Accelerate on a machine with a GPU.
"""
import csv
import json
import math
import os
import sys
import types
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import timm.layers
import torch
from accelerate.utils import LoggerType
from flag_tables import (
    accelerator_kwargs,
    effect,
    fresh_accelerate,
    has,
    make_weights,
    marks,
    named,
    refused,
    spellings,
    timm_options,
)
from forked import run_forked
from helpers import make_images
from timm.layers import DropPath
from torch import nn
from training.ranks import report_batch_norm

from timm_dynamic.data import dataset_factory
from timm_dynamic.evaluation.clock import describe_clock
from timm_dynamic.hub import Entry, render_card
from timm_dynamic.launch import build
from timm_dynamic.launch.options import create_train_parser
from timm_dynamic.training import run as run_module
from timm_dynamic.training import run_training
from timm_dynamic.training.run_folder import CheckpointManager
from timm_dynamic.utils import read_json, save_pretrained
from timm_dynamic.utils.report import read_rows

BASE = {
    '--data-dir': '{data}', '--model': 'test_resnet', '--num-classes': '3', '--img-size': '32', '-b': '4', '-j': '0',
    '--epochs': '1', '--warmup-epochs': '0', '--device': 'cpu', '--output': '{new}', '--experiment': 'run',
}


class _Built(Exception):
    """Ends a run before it trains."""


class Lab:
    """Runs train.py in this process, on 12 images to train on (3 batches of 4) and 9 to validate on.

    What crosses the border to timm's datasets, to torch.compile, Weights & Biases and the disk is noted in `seen`.
    """

    def __init__(self, tmp_path, data, weights, monkeypatch, capsys, caplog):
        self.tmp, self.monkeypatch, self.capsys, self.caplog = tmp_path, monkeypatch, capsys, caplog
        self.paths = {'{data}': data, '{tmp}': tmp_path, '{weights}': weights, '{file}': weights / 'model.safetensors',
                      '{gfnet}': weights / 'gfnet', '{cascade}': weights / 'cascade'}
        self.parser = create_train_parser()
        self.base = dict(BASE)
        self.runs = 0
        caplog.set_level('INFO', 'timm_dynamic')
        self._watch()

    def _watch(self):
        patch = self.monkeypatch.setattr
        create_dataset, fit, save = dataset_factory.create_timm_dataset, run_module.Trainer.fit, CheckpointManager.save

        def watched_create_dataset(name, **kwargs):
            self.seen.opened[kwargs['split']] = kwargs
            remote = name.startswith(('wds/', 'hfds/', 'tfds/'))  # what they need is not installed
            kwargs = {k: kwargs[k] for k in ('root', 'split')} if remote else kwargs
            return create_dataset('' if remote else name, **kwargs)

        def watched_fit(trainer, stop):
            self.seen.trainer = trainer
            if not self.training:
                raise _Built
            self.prepare(trainer)
            return fit(trainer, stop)

        def watched_save(store, state, name):
            self.seen.saves.append(name)
            return save(store, state, name)

        def watched_compile(model, backend='inductor', mode=None):
            self.seen.compiled.append((backend, mode))
            return model

        def init(**kwargs):
            self.seen.wandb.append(kwargs)
            return SimpleNamespace(log=lambda values, **_: self.seen.logged.append(values), finish=lambda: None)

        patch(dataset_factory, 'create_timm_dataset', watched_create_dataset)
        patch(run_module.Trainer, 'fit', watched_fit)
        patch(CheckpointManager, 'save', watched_save)
        patch(torch, 'compile', watched_compile)
        patch(os, 'fsync', lambda fd: None)  # slow, and of no option
        wandb = types.ModuleType('wandb')
        wandb.init, wandb.config = init, SimpleNamespace(update=lambda *args, **kwargs: None)
        self.monkeypatch.setitem(sys.modules, 'wandb', wandb)
        patch('accelerate.tracking._available_trackers', [LoggerType.TENSORBOARD, LoggerType.WANDB])

    def argv(self, *options, drop=()):
        self.runs += 1
        argv = [word for item in self.base.items() if item[0] not in drop for word in item] + [*options]
        for name, path in {**self.paths, '{new}': self.tmp / str(self.runs)}.items():
            argv = [word.replace(name, str(path)) for word in argv]
        return argv

    def _run(self, *options, drop=()):
        self.seen = SimpleNamespace(opened={}, saves=[], compiled=[], wandb=[], logged=[], trainer=None)
        self.caplog.clear()
        fresh_accelerate()
        timm.layers.set_fast_norm(False)
        return run_training(self.argv(*options, drop=drop))

    def built(self, *options, drop=()):
        """The trainer of a run, ready to train."""
        self.training = False
        with pytest.raises(_Built):
            self._run(*options, drop=drop)
        self.seen.trainer.seen = self.seen
        return self.seen.trainer

    def ran(self, *options, drop=(), prepare=lambda trainer: None):
        """A whole run; `prepare` may change its trainer before it trains."""
        self.training, self.prepare = True, prepare
        out = self._run(*options, drop=drop)
        last = self.seen.trainer.stage.name
        return SimpleNamespace(
            **vars(self.seen), folder=out['folder'], table=out['table'], result=out['results'][last], out=out,
            rows=read_rows(out['folder'] / 'summary.csv'), log=self.caplog.text)

    def accelerate(self, *options, drop=()):
        """What reaches Accelerate where there is a GPU."""
        return accelerator_kwargs(self.monkeypatch, self.parser.parse_args(self.argv(*options, drop=drop)))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('data'), {'train': 4, 'val': 3, 'extra': 2})


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = make_weights(tmp_path_factory.mktemp('weights'))
    model = timm.create_model('test_gfnet', num_classes=3, img_size=32, patch_size=16, backbone='test_resnet')
    with torch.no_grad():
        model.local_encoder.conv1[0].weight.fill_(0.125)
    save_pretrained(model, folder / 'gfnet')
    for i, net in enumerate(timm.create_model('test_clcnet', num_classes=3, img_size=32).members):
        nn.init.constant_(net.fc.bias, 0.25)
        save_pretrained(net, folder / f'cascade/{i}')
    names = [f'class{c}/{i:03d}.png' for c in range(3) for i in range(3)]
    (folder / 'cascade/folds.csv').write_text(
        'file,fold\n' + '\n'.join(f'{name},{1 + i % 4}' for i, name in enumerate(names)))
    rows = [f'{i}.png,0.{5 + i % 4},0.{3 - i % 2},0.{2 - i % 4 + i % 2},{i % 2}' for i in range(20)]
    (folder / 'cascade/a.csv').write_text('\n'.join(rows), encoding='utf-8-sig')
    return folder


@pytest.fixture
def lab(tmp_path, data, weights, monkeypatch, capsys, caplog):
    yield Lab(tmp_path, data, weights, monkeypatch, capsys, caplog)
    timm.layers.set_fast_norm(False)


built, ran, accelerate = (partial(effect, start) for start in ('built', 'ran', 'accelerate'))


# What to look at

def batch(trainer, epoch=0):
    trainer.loader.set_epoch(epoch)
    return next(iter(trainer.loader))


def images(trainer):
    """All batches of the first epoch."""
    trainer.loader.set_epoch(0)
    return torch.cat([x for x, _ in trainer.loader])


def mixup(key):
    return lambda trainer: getattr(torch_loader(trainer).collate_fn.collate_fn, key)


def shapes(trainer, epoch=0):
    """Of the batches of an epoch: number of images and size."""
    trainer.loader.set_epoch(epoch)
    return [(len(x), x.shape[-1]) for x, _ in trainer.loader]


def targets_ndim(trainer):
    return batch(trainer)[1].ndim


def unmixed(trainer, epoch=0):
    return bool((batch(trainer, epoch)[1] == 1).any(1).all())


def loss(trainer):
    """Of the first batch: the loss, its terms and what it is made of; see `loss_is`."""
    x, target = batch(trainer)
    result = trainer.task(x, target)
    return SimpleNamespace(trainer=trainer, x=x, target=target, logits=result['output'], **{
        key: value for key, value in result.items() if key != 'output'})


def loss_is(formula):
    """Make an expectation of `loss`: that it is what the formula gives."""
    return lambda seen: seen.loss.item() == pytest.approx(formula(seen).item(), rel=1e-5)


def binary_cross_entropy(seen, smoothing=0.1, **kwargs):
    on = torch.nn.functional.one_hot(seen.target, 3)
    target = on * (1 - smoothing) + smoothing / 3
    return torch.nn.functional.binary_cross_entropy_with_logits(seen.logits, target, **kwargs)


def teacher_divergence(seen, temperature):
    student, teacher = (z.div(temperature).log_softmax(dim=1) for z in (seen.logits, seen.trainer.task.teacher(seen.x)))
    return (teacher.exp() * (teacher - student)).sum(dim=1).mean() * temperature ** 2


def num_images(trainer):
    return len(trainer.loader.dataset)


def num_eval_images(trainer):
    return len(trainer.eval_loader.dataset)


def torch_loader(trainer):
    loader = trainer.loader.loader
    return getattr(loader, 'loader', loader)


def train_transform(trainer):
    return trainer.loader.dataset.dataset.transform


def eval_transform(trainer):
    return trainer.eval_loader.dataset.transform


def group(key):
    return lambda trainer: trainer.raw_optimizer.param_groups[-1][key]


def lr(trainer):
    return trainer.raw_optimizer.param_groups[0]['lr']


def lrs(trainer):
    """Learning rates of the epochs, if nothing gets better."""
    values = []
    for epoch in range(trainer.num_epochs):
        values.append(round(lr(trainer), 4))
        trainer.scheduler.step(epoch + 1, 1.)
    return values


def opened(key, split='train'):
    return lambda trainer: trainer.seen.opened[split][key]


def modules(trainer, name):
    return [m for m in trainer.model.modules() if type(m).__name__ == name]


def dropped_paths(trainer):
    return max([m.drop_prob for m in trainer.model.modules() if isinstance(m, DropPath)], default=0.)


def ema(trainer):
    return trainer.task.get_trainable_module(ema=True)


def cosine(k=1):
    """The schedule of `LONG`."""
    return [round(0.5 + 0.5 * math.cos(math.pi * (t / 8) ** k), 4) for t in range(8)]


def noise(trainer):
    """By how much the rates of the epochs 1 to 7 are off the schedule, as shares of it."""
    return [rate / plain - 1 for rate, plain in zip(lrs(trainer)[1:], cosine()[1:])]


def small(values):
    """Whether all are noise of a per cent at most, with some of it."""
    return 0 < max(map(abs, values)) < 0.011


def color_mode(dataset):
    """In which images are read."""
    transform, dataset.transform = dataset.transform, None
    image, _ = dataset[0]
    dataset.transform = transform
    return image.mode


def erasing(trainer):
    return trainer.loader.loader.random_erasing.random_erasing


def wandb(key):
    return lambda trainer: trainer.seen.wandb[0].get(key)


def augments(text, *value):
    """Make a check: the transform of the training images has `text` in it."""
    return built(train_transform, *value, gives=has(text))


# Checks that take more than a line

def config(lab, flag):
    (lab.tmp / 'c.yaml').write_text('momentum: 0.5\n')
    built(group('momentum'), '{tmp}/c.yaml', gives=0.5)(lab, flag)


def class_map(lab, flag):
    (lab.tmp / 'classes.txt').write_text('class2\nclass1\nclass0\n')
    built(lambda t: (t.loader.class_to_idx['class0'], t.eval_loader.class_to_idx['class0']), '{tmp}/classes.txt',
          gives=(2, 2))(lab, flag)


def interrupted(lab, *options):
    """Start the run {tmp}/kept and stop it after its first epoch."""
    class Killed(Exception):
        pass

    def prepare(trainer):
        def end_epoch(*args):
            trainer.save_state()
            raise Killed
        trainer.log.end_epoch = end_epoch

    with pytest.raises(Killed):
        lab.ran('--output', '{tmp}/kept', *options, prepare=prepare)


def resume(lab, flag):
    lab.base['--epochs'] = '2'
    interrupted(lab)
    with pytest.raises(ValueError, match='--resume auto'):
        lab.built('--output', '{tmp}/kept')
    for value in ('auto', '{tmp}/kept/run'):
        resumed = lab.built('--output', '{tmp}/kept', flag, value)
        assert (resumed.epoch, resumed.updates) == (1, 3)
    assert [row['epoch'] for row in lab.ran('--output', '{tmp}/kept', flag, 'auto').rows] == [0, 1]


def no_resume_opt(lab, flag):
    interrupted(lab)
    built(lambda t: (t.epoch, len(t.raw_optimizer.state)), gives=(1, 0),
          base=['--output', '{tmp}/kept', '--resume', 'auto'])(lab, flag)


def head_init_scale(lab, flag):
    half, whole = (lab.built(*options).model.fc for options in ([flag, '0.5'], []))
    assert torch.equal(half.weight, whole.weight * 0.5)
    assert torch.equal(half.bias, whole.bias * 0.5)


def device(lab, flag):
    accelerate(lambda kwargs: kwargs['cpu'], 'cpu', gives=True, drop=[flag])(lab, flag)
    with pytest.raises(ValueError, match='--device xpu: there is no such device'):
        lab.built(flag, 'xpu')


def amp(lab, flag):
    accelerate(lambda kwargs: kwargs['mixed_precision'], gives='fp16', drop=['--device'])(lab, flag)
    with pytest.raises(ValueError, match='--amp-dtype bfloat16'):
        lab.built(flag)
    seen = []
    lab.ran(flag, '--amp-dtype', 'bfloat16', prepare=lambda trainer: trainer.model.fc.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)))
    assert set(seen) == {torch.bfloat16}


def amp_dtype(lab, flag):
    accelerate(lambda kwargs: kwargs['mixed_precision'], 'bfloat16', gives='bf16', base=['--amp'],
               drop=['--device'])(lab, flag)


def model_dtype(lab, flag):
    def dtypes(trainer):
        return next(trainer.model.parameters()).dtype, batch(trainer)[0].dtype
    built(dtypes, 'bfloat16', gives=(torch.bfloat16, torch.bfloat16))(lab, flag)
    assert len(lab.ran(flag, 'bfloat16').rows) == 1


def synchronize_step(lab, flag):
    def waits(trainer):
        calls = []
        lab.monkeypatch.setattr(torch.accelerator, 'synchronize', lambda *args: calls.append(args))
        trainer.device = torch.device('cuda')
        trainer._update(trainer.task.get_trainable_module())
        return len(calls)
    built(waits, gives=1)(lab, flag)


def device_modules(lab, flag):
    (lab.tmp / 'registers_a_model.py').write_text(
        'import timm\n\n\n@timm.models.register_model\ndef model_of_a_device_module(pretrained=False, **kwargs):\n'
        "    return timm.create_model('test_resnet', **kwargs)\n")
    lab.monkeypatch.syspath_prepend(lab.tmp)
    assert lab.built('--model', 'model_of_a_device_module', flag, 'registers_a_model').model.num_classes == 3
    assert 'registers_a_model' in sys.modules


def clipped(lab, *options):
    """Gradients that an update takes, from a gradient of ones: all but the classifier's, and the classifier's bias'."""
    trainer = lab.built(*options)
    taken = []
    parameters = list(trainer.model.parameters())
    for p in parameters:
        p.grad = torch.ones_like(p)
    lab.monkeypatch.setattr(
        trainer.optimizer, 'step', lambda: taken.extend(p.grad.flatten().clone() for p in parameters))
    trainer._update(trainer.task.get_trainable_module())
    return torch.cat(taken[:-2]), taken[-1]


def clip_grad(lab, flag):
    assert torch.cat(clipped(lab, flag, '0.5')).norm() < 0.5
    assert torch.cat(clipped(lab)).norm() > 0.5


def clip_mode(lab, flag):
    body, bias = clipped(lab, '--clip-grad', '0.5', flag, 'value')
    assert body.max() == bias.max() == 0.5 < body.norm()
    body, bias = clipped(lab, '--clip-grad', '0.01', flag, 'agc')
    assert body.max() < 1
    assert bias.max() == 1  # adaptive clipping leaves the classifier alone
    assert clipped(lab, '--clip-grad', '0.5')[0].norm() <= 0.5


def sched_on_updates(lab, flag):
    def after_an_update(trainer):
        trainer.scheduler.step_update(1)
        return lr(trainer)
    built(after_an_update, gives=pytest.approx(0.75 * 0.1 * 4 / 256))(lab, flag)  # a third of the cosine
    per_update = []
    run = lab.ran(flag, '--lr', '1', '--epochs', '2', prepare=lambda trainer: lab.monkeypatch.setattr(
        trainer.optimizer, 'step', lambda: per_update.append(lr(trainer))))
    assert per_update == sorted(per_update, reverse=True)
    assert len(set(per_update)) == run.trainer.updates == 6


def aug_repeats(lab, flag):
    with pytest.raises(ValueError, match='several processes'):
        lab.built(flag, '3')
    lab.monkeypatch.setattr(torch.distributed, 'get_world_size', lambda *args: 2)
    lab.monkeypatch.setattr(torch.distributed, 'get_rank', lambda *args: 0)
    trainer = lab.built()

    def indices(*options):
        args = lab.parser.parse_args(lab.argv(*DEMO, '--train-num-samples', '512', *options))
        config = build.resolve_data(args, trainer.model)
        loader, _ = build.build_train_loader(args, config, 10, torch.device('cpu'), 0, 2)
        return [i for key in loader.batch_sampler for i in key.indices]

    assert len(indices()) == len(set(indices())) == 256
    assert len(set(indices(flag, '3'))) < 256


def sync_bn(lab, flag):
    def synced(args):
        model = build.place_model(build.build_training_model(args), args, torch.device('cpu'), num_processes=2)
        return any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
    options = (lab.parser.parse_args(lab.argv(*more)) for more in ([flag], []))
    assert list(map(synced, options)) == [True, False]


def batch_norm(lab, *options):
    """Batch norm's statistics in a run of two processes, see `report_batch_norm`."""
    report = lab.tmp / 'report.json'
    run_forked(report_batch_norm, report, *lab.argv('-b', '3', *options), processes=2, folder=lab.tmp)
    return json.loads(report.read_text())


def no_ddp_bb(lab, flag):
    """Before an update every process has the first one's statistics; with the option it keeps its own."""
    default, own = batch_norm(lab), batch_norm(lab, flag)
    assert default['before'] == [default['after'][0]] * 2
    assert own['before'] == own['after']
    for statistics in (default, own):
        assert statistics['after'][0] != statistics['after'][1]


def dist_bn(lab, flag):
    """What the epoch leaves behind: the processes' mean, what the first one has, or to each its own."""
    reduced, broadcast, own = (batch_norm(lab, *value) for value in ([], [flag, 'broadcast'], [flag, '']))
    assert reduced['end'] == [pytest.approx(sum(reduced['last']) / 2, abs=1e-6)] * 2
    assert broadcast['end'] == [broadcast['last'][0]] * 2
    assert own['end'] == own['last']
    for statistics in (reduced, broadcast, own):
        assert statistics['last'][0] != statistics['last'][1]


def seed(lab, flag):
    """It decides over initial weights and images alike, and nothing else does."""
    def drawn(*options):
        trainer = lab.built(*options)
        return torch.cat([trainer.model.conv1[0].weight.flatten(), images(trainer).flatten()])
    seven, again, default, explicit = (drawn(*given) for given in ([flag, '7'], [flag, '7'], [], [flag, '42']))
    assert torch.equal(seven, again)
    assert torch.equal(default, explicit)
    assert not torch.isclose(seven, default).all()


def loss_scales(run_lab, *options):
    """What the losses of batches of 2 and of 4 are multiplied by."""
    scales = {}

    def prepare(trainer):
        task = trainer.task.forward
        sizes, values = [], []

        def forward(input, target):
            result = task(input, target)
            sizes.append(len(input))
            values.append(result['loss'].item())
            return result

        trainer.task.forward = forward
        run_lab.monkeypatch.setattr(trainer.accelerator, 'backward', lambda value, **_: scales.update(
            {sizes[-1]: round(value.item() / values[-1], 3)}))

    run_lab.ran('--train-img-sizes', '24', '32', '--train-batch-sizes', '2', '4', *options, prepare=prepare)
    return scales


def variable_batch_loss_scale(lab, flag):
    assert loss_scales(lab, flag, 'linear') == {2: 0.5, 4: 1.0}
    assert loss_scales(lab, flag, 'sqrt') == {2: 0.707, 4: 1.0}
    assert loss_scales(lab) == {2: 1.0, 4: 1.0}


def kd_loss_type(lab, flag):
    """timm has one type only."""
    assert lab.built('--kd-model-name', 'local-dir:{weights}', flag, 'kl').task.loss_type == 'kl'
    with pytest.raises(SystemExit):
        lab.built(flag, 'mse')


def recipe(lab, flag):
    assert lab.built(flag, 'classification').identity['recipe'] == 'classification'
    with pytest.raises(ValueError, match='needs a baseline: --focus-baseline MODEL'):
        lab.built(flag, 'focusnet')
    with pytest.raises(ValueError, match=r'no recipe .focus.\. Choose from classification, focusnet'):
        lab.built(flag, 'focus')


def local_mark(trainer):
    """Of the local encoder: 0.25 by the weights of `make_weights`, 0.125 by those of a whole GFNet."""
    return round(trainer.model.local_encoder.conv1[0].weight.mean().item(), 6)


def global_mark(trainer):
    return round(trainer.model.global_encoder.conv1[0].weight.mean().item(), 6)


def classifier_lr(trainer):
    return [g['lr'] for g in trainer.raw_optimizer.param_groups for p in g['params'] if p is trainer.model.fc.weight]


def policy_update(name, *value, gives):
    """One of the settings of the policy's task."""
    return built(lambda t: getattr(t.task, name), *value, gives=gives, base=[*GFNET, '--stage', 'policy', *WHOLE])


# The tables

def clocked(run):
    """The table, and what the exported model keeps for its card."""
    if not (run.folder / 'clock.csv').exists():
        return False
    rows = list(csv.DictReader((run.folder / 'clock.csv').open()))
    config = read_json(run.folder / 'best/config.json')
    clock = config['model_args']['exit_cfg']['clock']
    card = render_card({**config, 'step_macs': [1, 2, 3]}, Entry('net'))
    names = [row['clock'] for row in rows]
    assert names == [row['clock'] for row in clock['rows']]
    assert names[0] == 'all steps'
    assert names[1].startswith('budget ')
    assert describe_clock(clock) in card
    return f'| {names[1]} |' in card


GFNET = ['--model', 'test_gfnet', '--model-kwargs', 'patch_size=16', 'backbone=test_resnet', 'backbone_args=None']
ANCHORNET = [
    '--model', 'test_anchornet_patch', '--img-size', '80', '--model-kwargs', 'patch_size=32', 'backbone=test_resnet',
    'backbone_args=None']
WHOLE = ['--init-from', '{gfnet}']
DEMO = ['--dataset', 'cluttered_digits', '--num-classes', '10', '--demo-img-size', '48']
REMOTE = ['--dataset', 'wds/somewhere']
EFFICIENTNET = ['--model', 'test_efficientnet']
TWO = ['--epochs', '2']
LONG = ['--epochs', '8', '--lr', '1']
CYCLES = [*LONG, '--lr-cycle-limit', '3']
STEPS = [*LONG, '--sched', 'step', '--decay-epochs', '3']
NOISE = [*LONG, '--lr-noise', '0']
SIZES = ['--train-img-sizes', '24', '32']
PROGRESSIVE = [*TWO, *SIZES, '--train-size-schedule', 'progressive', '--train-batches-per-epoch', '20']
MIXUP = ['--mixup', '1', '--smoothing', '0']
ERASE = ['--reprob', '1']
EMA = ['--model-ema']
WANDB = ['--log-wandb']
TEACHER = ['--kd-model-name', 'local-dir:{weights}']
FEATURES = [*TEACHER, '--kd-distill-type', 'feature']
DISTILLED = ['--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'embed_dim=48', 'depth=1', 'num_heads=3']
FOCUS = ['--focus-baseline', 'local-dir:{weights}', '--val-split', '']  # it is not trained, and not checked so
NAFLEX = refused('python -m timm_dynamic', 'train.py --naflex-loader')

TRAIN = {
    '-c --config': config,
    'data': built(num_images, '{data}', gives=12, base=DEMO[2:], drop=['--data-dir']),
    '--data-dir': built(num_images, '{data}', gives=12, base=DEMO[2:], drop=['--data-dir']),
    '--dataset': built(lambda t: type(t.loader.dataset.dataset).__name__, 'torch/image_folder', gives='ImageFolder'),
    '--train-split': built(num_images, 'extra', gives=6),
    '--val-split': built(num_eval_images, 'extra', gives=6),
    '--train-num-samples': built(num_images, '20', gives=20, base=DEMO),
    '--val-num-samples': built(num_eval_images, '20', gives=20, base=DEMO),
    '--dataset-download': built(opened('download'), gives=True, base=REMOTE),
    '--class-map': class_map,
    '--input-img-mode': built(
        lambda t: [color_mode(t.loader.dataset.dataset), color_mode(t.eval_loader.dataset)], 'HSV',
        gives=['HSV', 'HSV']),
    '--input-key': built(opened('input_key'), 'jpg', gives='jpg', base=REMOTE),
    '--target-key': built(opened('target_key'), 'cls', gives='cls', base=REMOTE),
    '--dataset-trust-remote-code': built(opened('trust_remote_code'), gives=True, base=REMOTE),
    '--model': built(lambda t: type(t.model).__name__, 'test_efficientnet', gives='EfficientNet'),
    '--pretrained': built(lambda t: marks(t.model), gives=(0.25, 0.25), base=['--model', 'local-dir:{weights}']),
    '--pretrained-path': built(lambda t: [m == 0.25 for m in marks(t.model)], '{file}', gives=[True, False]),
    '--initial-checkpoint': built(lambda t: marks(t.model), '{file}', gives=(0.25, 0.25)),
    '--resume': resume,
    '--no-resume-opt': no_resume_opt,
    '--num-classes': built(lambda t: t.model.num_classes, '5', gives=5),
    '--gp': built(lambda t: t.model.global_pool.pool_type, 'max', gives='max'),
    '--img-size': built(lambda t: batch(t)[0].shape[1:], '48', gives=(3, 48, 48)),
    '--in-chans': built(lambda t: (batch(t)[0].shape[1], t.model.conv1[0].in_channels), '1', gives=(1, 1)),
    '--input-size': built(lambda t: batch(t)[0].shape[1:], '1', '24', '40', gives=(1, 24, 40), drop=['--img-size']),
    '--crop-pct': built(eval_transform, '0.5', gives=has('Resize(size=64')),
    '--mean': built(lambda t: images(t).mean(), '-10', '-10', '-10', gives=lambda mean: mean > 10),
    '--std': built(lambda t: images(t).std(), '10', '10', '10', gives=lambda std: std < 0.1),
    '--interpolation': built(eval_transform, 'nearest', gives=has('interpolation=nearest')),
    '-b --batch-size': built(lambda t: len(batch(t)[0]), '6', gives=6),
    '-vb --validation-batch-size': built(lambda t: len(next(iter(t.eval_loader))[0]), '3', gives=3),
    '--channels-last': built(
        lambda t: t.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last), gives=True),
    '--fuser': refused('--torchcompile'),
    '--grad-accum-steps': ran(lambda r: (r.trainer.updates, r.trainer.args.lr), '3', gives=(1, 0.1 * 12 / 256)),
    '--grad-checkpointing': built(lambda t: t.model.grad_checkpointing, gives=True),
    '--fast-norm': built(lambda t: timm.layers.is_fast_norm(), gives=True),
    '--model-kwargs': built(lambda t: type(t.model.act1).__name__, 'act_layer=gelu', gives='GELU'),
    '--head-init-scale': head_init_scale,
    '--head-init-bias': built(lambda t: t.model.fc.bias.tolist(), '0.5', gives=[0.5] * 3),
    '--torchcompile-mode': built(
        lambda t: t.seen.compiled, 'max-autotune', gives=[('inductor', 'max-autotune')], base=['--torchcompile']),
    '--torchscript': refused('--torchcompile'),
    '--torchcompile': built(lambda t: t.seen.compiled, 'aot_eager', gives=[('aot_eager', None)]),
    '--device': device,
    '--amp': amp,
    '--amp-dtype': amp_dtype,
    '--model-dtype': model_dtype,
    '--no-ddp-bb': no_ddp_bb,
    '--synchronize-step': synchronize_step,
    '--device-modules': device_modules,
    '--opt': built(lambda t: type(t.raw_optimizer).__name__, 'adamw', gives='AdamW'),
    '--opt-eps': built(group('eps'), '0.1', gives=0.1, base=['--opt', 'adamw']),
    '--opt-betas': built(group('betas'), '0.5', '0.6', gives=(0.5, 0.6), base=['--opt', 'adamw']),
    '--momentum': built(group('momentum'), '0.5', gives=0.5),
    '--weight-decay': built(group('weight_decay'), '0.5', gives=0.5),
    '--clip-grad': clip_grad,
    '--clip-mode': clip_mode,
    '--layer-decay': built(lambda t: sorted({g.get('lr_scale', 1) for g in t.raw_optimizer.param_groups}), '0.5',
                           gives=[0.5 ** n for n in (5, 4, 3, 2, 1, 0)]),
    '--layer-decay-min-scale': built(
        lambda t: min(g['lr_scale'] for g in t.raw_optimizer.param_groups), '0.3', gives=0.3,
        base=['--layer-decay', '0.1']),
    '--layer-decay-no-opt-scale': built(
        lambda t: t.model.conv1[0].weight.requires_grad, '0.5', gives=False, base=['--layer-decay', '0.1']),
    '--opt-kwargs': built(group('nesterov'), 'nesterov=False', gives=False),
    '--sched': built(lrs, 'constant', gives=[1] * 8, base=LONG),
    '--sched-on-updates': sched_on_updates,
    '--lr': built(lr, '0.3', gives=0.3),
    '--lr-base': built(lr, '1', gives=4 / 256),
    '--lr-base-size': built(lr, '8', gives=0.05),
    '--lr-base-scale': built(lr, 'sqrt', gives=0.1 * (4 / 256) ** 0.5),
    '--lr-noise': built(noise, '0.5', '1', base=LONG,
                        gives=lambda off: max(map(abs, off[:3])) < 0.001 < 0.01 < max(map(abs, off[3:])) < 0.67),
    '--lr-noise-pct': built(noise, '0.01', gives=small, base=NOISE),
    '--lr-noise-std': built(noise, '0.003', gives=small, base=NOISE),
    '--lr-cycle-mul': built(lambda t: t.num_epochs, '2', gives=8 + 16 + 32, base=CYCLES),
    '--lr-cycle-decay': built(lambda t: lrs(t)[8], '0.1', gives=0.1, base=CYCLES),
    '--lr-cycle-limit': built(lambda t: lrs(t)[8::8], '3', gives=[0.5, 0.25], base=LONG),
    '--lr-k-decay': built(lrs, '2', gives=cosine(2), base=LONG),
    '--warmup-lr': built(lambda t: lrs(t)[0], '0.2', gives=0.2, base=[*LONG, '--warmup-epochs', '2']),
    '--min-lr': built(lambda t: t.scheduler._get_lr(8)[0], '0.2', gives=0.2, base=LONG),
    '--epochs': ran(lambda r: len(r.rows), '2', gives=2),
    '--epoch-repeats': built(opened('repeats'), '3', gives=3, base=REMOTE),
    '--start-epoch': ran(lambda r: [row['epoch'] for row in r.rows], '1', gives=[1], base=TWO),
    '--decay-milestones': built(lrs, '2', '6', gives=[1, .1, .1, .1, .1, .01, .01, .01],
                                base=[*LONG, '--sched', 'multistep']),
    '--decay-epochs': built(lrs, '4', gives=[1, 1, 1, 1, .1, .1, .1, .1], base=STEPS),
    '--warmup-epochs': built(lambda t: lrs(t)[:3], '2', gives=[0, 0.5, pytest.approx(0.8536, 1e-3)], base=LONG),
    '--warmup-prefix': built(lambda t: t.num_epochs, gives=10, base=[*LONG, '--warmup-epochs', '2']),
    '--cooldown-epochs': built(lambda t: lrs(t)[8:], '2', gives=[0, 0], base=LONG),
    '--patience-epochs': built(lambda t: lrs(t)[-1], '2', gives=lambda last: last < 1,
                               base=[*LONG, '--sched', 'plateau']),
    '--decay-rate --dr': built(lrs, '0.5', gives=[1, 1, 1, .5, .5, .5, .25, .25], base=STEPS),
    '--no-aug': built(lambda t: 'Random' in str(train_transform(t)), gives=False),
    '--train-crop-mode': augments('RandomCropOrPad', 'rkrr'),
    '--scale': augments('scale=(0.5, 0.6)', '0.5', '0.6'),
    '--ratio': augments('ratio=(1.0, 3.0)', '1', '3'),
    '--hflip': augments('RandomHorizontalFlip(p=0.9)', '0.9'),
    '--vflip': augments('RandomVerticalFlip(p=0.9)', '0.9'),
    '--color-jitter': augments('brightness=(0.9, 1.1)', '0.1'),
    '--color-jitter-prob': augments('p=0.3', '0.3'),
    '--grayscale-prob': augments('RandomGrayscale(p=0.7)', '0.7'),
    '--gaussian-blur-prob': augments('GaussianBlur', '0.7'),
    '--aa': augments('RandAugment', 'rand-m9-mstd0.5'),
    '--aug-repeats': aug_repeats,
    '--aug-splits': built(lambda t: len(batch(t)[0]), '2', gives=8),
    '--jsd-loss': built(lambda t: getattr(t.task.criterion, 'num_splits', 0), gives=2, base=['--aug-splits', '2']),
    '--bce-loss': built(lambda t: type(t.task.criterion).__name__, gives='BinaryCrossEntropy'),
    '--bce-sum': built(loss, gives=loss_is(lambda s: 3 * binary_cross_entropy(s)), base=['--bce-loss']),
    '--bce-target-thresh': built(
        loss, '0.5', gives=loss_is(lambda s: binary_cross_entropy(s, smoothing=0)), base=['--bce-loss']),
    '--bce-pos-weight': built(
        loss, '2', gives=loss_is(lambda s: binary_cross_entropy(s, pos_weight=torch.tensor(2.))), base=['--bce-loss']),
    '--reprob': built(lambda t: bool((images(t) == 0).flatten(1).any(dim=1).all()), '1', gives=True,
                      base=['--remode', 'const']),
    '--remode': built(lambda t: bool((images(t) == 0).any()), 'const', gives=True, base=ERASE),
    '--recount': built(lambda t: erasing(t).max_count, '3', gives=3, base=ERASE),
    '--resplit': built(lambda t: len(batch(t)[0].flatten(1).eq(0).any(1).nonzero()), gives=2,
                       base=[*ERASE, '--remode', 'const']),
    '--mixup': built(targets_ndim, '0.5', gives=2),
    '--cutmix': built(targets_ndim, '0.5', gives=2),
    '--cutmix-minmax': built(targets_ndim, '0.2', '0.8', gives=2),
    '--mixup-prob': built(unmixed, '0', gives=True, base=MIXUP),
    '--mixup-switch-prob': built(mixup('switch_prob'), '0', gives=0, base=[*MIXUP, '--cutmix', '1']),
    '--mixup-mode': built(mixup('mode'), 'elem', gives='elem', base=MIXUP),
    '--mixup-off-epoch': built(lambda t: (unmixed(t, 0), unmixed(t, 1)), '1', gives=(False, True), base=MIXUP),
    '--smoothing': built(loss, '0.3', gives=loss_is(
        lambda s: torch.nn.functional.cross_entropy(s.logits, s.target, label_smoothing=0.3))),
    '--train-interpolation': augments('interpolation=bicubic)', 'bicubic'),
    '--drop': built(lambda t: t.model.drop_rate, '0.5', gives=0.5),
    '--drop-connect': built(dropped_paths, '0.3', gives=0.3),
    '--drop-path': built(dropped_paths, '0.3', gives=0.3),
    '--drop-block': built(lambda t: len(modules(t, 'DropBlock2d')) > 0, '0.3', gives=True),
    '--bn-momentum': built(lambda t: t.model.bn1.momentum, '0.03', gives=0.03, base=EFFICIENTNET),
    '--bn-eps': built(lambda t: t.model.bn1.eps, '0.03', gives=0.03, base=EFFICIENTNET),
    '--sync-bn': sync_bn,
    '--dist-bn': dist_bn,
    '--split-bn': ran(lambda r: len(modules(r.trainer, 'SplitBatchNorm2d')) > 0, gives=True,
                      base=['--aug-splits', '2']),
    '--model-ema': ran(lambda r: 'eval_ema_top1' in r.rows[-1], gives=True),
    '--model-ema-force-cpu': ran(lambda r: (ema(r.trainer).device, 'eval_ema_top1' in r.rows[-1]),
                                 gives=(torch.device('cpu'), False), base=EMA),
    '--model-ema-decay': built(lambda t: ema(t).get_decay(100), '0.5', gives=0.5, base=EMA),
    '--model-ema-warmup': built(lambda t: ema(t).get_decay(100), gives=lambda decay: 0 < decay < 0.99, base=EMA),
    '--seed': seed,
    '--worker-seeding': built(
        lambda t: torch_loader(t).worker_init_fn.worker_init_fn.keywords['worker_seeding'], 'part', gives='part'),
    '--log-interval': ran(lambda r: r.log.count(' update '), '1', gives=3),
    '--val-interval': ran(lambda r: [row['eval_top1'] is None for row in r.rows], '2', gives=[True, False], base=TWO),
    '--recovery-interval': ran(lambda r: [s for s in r.saves if s.endswith('-0000-0000002')], '2',
                               gives=['classification-0000-0000002']),
    '--checkpoint-hist': ran(lambda r: len(list((r.folder / 'checkpoints').iterdir())), '1', gives=1, base=TWO),
    '-j --workers': built(lambda t: (torch_loader(t).num_workers, t.eval_loader.loader.num_workers), '1', gives=(1, 1)),
    '--save-images': ran(lambda r: len(list(r.folder.glob('train-batch-*.jpg'))), gives=2),
    '--pin-mem': built(lambda t: (torch_loader(t).pin_memory, t.eval_loader.loader.pin_memory), gives=(True, True)),
    '--no-prefetcher': ran(lambda r: type(r.trainer.loader.loader).__name__, gives='DataLoader', base=['--mixup', '1']),
    '--output': ran(lambda r: r.folder.parent.name, '{tmp}/elsewhere', gives='elsewhere'),
    '--experiment': ran(lambda r: r.folder.name, 'mine', gives='mine', drop=['--experiment']),
    '--eval-metric': ran(lambda r: r.result['best'] == min(row['eval_loss'] for row in r.rows), 'loss', gives=True,
                         base=TWO),
    '--tta': built(lambda t: t.evaluate()['count'], '3', gives=3, base=['-vb', '3']),
    '--use-multi-epochs-loader': ran(lambda r: type(torch_loader(r.trainer)).__name__, gives='MultiEpochsDataLoader'),
    '--log-wandb': ran(lambda r: any('classification/eval_top1' in values for values in r.logged), gives=True),
    '--wandb-project': built(wandb('project'), 'digits', gives='digits', base=WANDB),
    '--wandb-tags': built(wandb('tags'), 'a', 'b', gives=['a', 'b'], base=WANDB),
    '--wandb-resume-id': built(lambda t: (wandb('id')(t), wandb('resume')(t)), 'x1', gives=('x1', 'must'), base=WANDB),
    '--train-img-sizes': built(lambda t: {size for _, size in shapes(t)}, '24', '40', gives=lambda s: s <= {24, 40}),
    '--train-batch-sizes': built(lambda t: set(shapes(t)), '2', '6', gives=lambda s: s <= {(2, 24), (6, 32)},
                                 base=SIZES),
    '--train-size-probs': built(lambda t: {size for _, size in shapes(t)}, '0', '1', gives={32}, base=SIZES),
    '--train-size-schedule': built(
        lambda t: [shapes(t, epoch).count((4, 24)) for epoch in (0, 1)], 'progressive', gives=lambda n: n[0] > 2 * n[1],
        base=[*TWO, *SIZES, '--train-batches-per-epoch', '20']),
    '--train-size-schedule-spread': built(lambda t: shapes(t).count((4, 32)), '0', gives=0,
                                          base=[*PROGRESSIVE, '--train-size-random-mix', '0']),
    '--train-size-random-mix': built(lambda t: shapes(t).count((4, 32)), '0', gives=0,
                                     base=[*PROGRESSIVE, '--train-size-schedule-spread', '0']),
    '--train-batches-per-epoch --train-steps-per-epoch': built(lambda t: len(shapes(t)), '7', gives=7),
    '--variable-batch-loss-scale': variable_batch_loss_scale,
    '--naflex-loader': NAFLEX,
    '--naflex-train-seq-lens': NAFLEX,
    '--naflex-max-seq-len': NAFLEX,
    '--naflex-patch-sizes': NAFLEX,
    '--naflex-patch-size-probs': NAFLEX,
    '--naflex-loss-scale': NAFLEX,
    '--naflex-patchify-channels-first': NAFLEX,
    '--kd-model-name': ran(lambda r: {'train_task_loss', 'train_kd_loss'} <= r.rows[-1].keys(), 'local-dir:{weights}',
                           gives=True),
    '--kd-distill-type': ran(lambda r: type(r.trainer.task).__name__, 'feature', gives='FeatureDistillation',
                             base=TEACHER),
    '--kd-loss-type': kd_loss_type,
    '--distill-loss-weight': built(loss, '3', gives=loss_is(lambda s: s.task_loss + 3 * s.kd_loss), base=TEACHER),
    '--task-loss-weight': built(
        loss, '0.3', gives=loss_is(lambda s: 0.3 * s.task_loss + 0.7 * s.kd_loss), base=TEACHER),
    '--kd-temperature': built(
        loss, '1', gives=loss_is(lambda s: s.task_loss + teacher_divergence(s, 1)), base=TEACHER),
    '--kd-student-feature-dim': built(lambda t: t.task.trainable_module.projection, '7', gives=has('in_features=7'),
                                      base=FEATURES),
    '--kd-teacher-feature-dim': built(lambda t: t.task.trainable_module.projection, '7', gives=has('out_features=7'),
                                      base=FEATURES),
    '--kd-token-distill-type': built(lambda t: t.task.distill_type, 'hard', gives='hard',
                                     base=[*DISTILLED, *TEACHER, '--kd-distill-type', 'token']),
}
MEMBERS = ['--init-members', '{cascade}/0', '{cascade}/1']


def read_cascade(result):
    return timm.create_model(f"local-dir:{result['folder'] / 'best'}", pretrained=True)


def member_mark(result):
    return read_cascade(result).members[0].fc.bias.mean().item()


def cascade(probe, *value, gives, base):
    """What a cascade's whole run gives, with the option and without."""
    def check(lab, flag):
        results = []
        for options in ([*base, flag, *value], base):
            lab.training, lab.prepare = True, lambda trainer: None
            results.append(probe(lab._run('--model', 'test_clcnet', *options)))
        assert results[0] == gives != results[1]

    return check


def num_folds(result):
    return len(list((result['folder'] / 'folds').glob('*.safetensors')))


def pushed(repo, *options, private):
    """What is published; tests/hub has it received."""
    def check(lab, flag):
        calls = []
        lab.monkeypatch.setattr(run_module.hub, 'check_login', calls.append)
        lab.monkeypatch.setattr(run_module.hub, 'publish', lambda *args, **kwargs: calls.append((args, kwargs)) or {
            'url': 'https://hub/me/net', 'commit': 'abc'})
        assert flag in options
        run = lab.ran(*options)
        assert calls == [repo, ((run.folder / 'hub', repo), {'private': private})]
        text = (run.folder / 'hub' / 'README.md').read_text()
        assert f"timm.create_model('hf-hub:{repo}', pretrained=True)" in text
        assert str(lab.tmp) not in text
        assert 'https://hub/me/net' in run.log
        calls.clear()
        lab.ran()
        assert not calls

    return check


OURS = {
    '--push-to-hub': pushed('me/net', '--push-to-hub', 'me/net', private=False),
    '--hub-private': pushed('me/net', '--push-to-hub', 'me/net', '--hub-private', private=True),
    '--recipe': recipe,
    '--stage': built(lambda t: t.stage.name, 'focus', gives='focus', base=[*FOCUS, '--focus-plain']),
    '--stage-args': built(lambda t: t.num_epochs, 'classification.epochs=7', gives=7),
    '--focus-baseline': built(
        lambda t: type(t.task).__name__, 'local-dir:{weights}', gives='FocusPickingTask', base=['--val-split', '']),
    '--focus-plain': ran(lambda r: [row['model'] for row in r.table], base=[*FOCUS, '--test-split', 'extra'],
                         gives=['baseline (frozen)', 'plain cross-entropy', 'focus net']),
    '--focus-temperature': built(lambda t: t.task.criterion.temperature, '0.5', gives=0.5, base=FOCUS),
    '--focus-attention-weight': built(
        loss, '3', gives=loss_is(lambda s: s.classification + 3 * s.attention + s.negentropy), base=FOCUS),
    '--focus-negentropy-weight': built(
        loss, '3', gives=loss_is(lambda s: s.classification + s.attention + 3 * s.negentropy), base=FOCUS),
    '--test-split': ran(lambda r: {(row['split'], row['images']) for row in r.table}, 'extra', gives={('extra', 6)}),
    '--demo-digit-scale': built(
        lambda t: list(t.loader.dataset.dataset.digit_scale), '12', '20', gives=[12, 20], base=DEMO),
    '--demo-img-size': built(lambda t: t.loader.dataset.dataset.img_size, '64', gives=64, base=DEMO),
    '--demo-clutter': built(lambda t: t.loader.dataset.dataset.clutter, '0.25', gives=0.25, base=DEMO),
    '--init-local': built(local_mark, '{weights}', gives=0.25, base=GFNET),
    '--init-global': built(global_mark, '{weights}', gives=0.25, base=GFNET),
    '--init-downstream': ran(
        lambda r: round(r.trainer.model.patch.conv1[0].weight.mean().item(), 3), '{weights}', gives=0.25,
        base=[*ANCHORNET, '--lr', '1e-9']),
    '--init-members': cascade(member_mark, '{cascade}/0', '{cascade}/1', gives=0.25,
                              base=['--init-members', 'scratch', '--folds', '0']),
    '--feature-split': cascade(lambda r: r['results']['features']['images'], 'extra', gives=6,
                               base=[*MEMBERS, '--folds', '0']),
    '--features': cascade(lambda r: list(r['results']), '{cascade}/a.csv', gives=['confidence'],
                          base=[*MEMBERS, '--folds', '0']),
    '--folds': cascade(num_folds, '3', gives=3, base=[*MEMBERS, '--folds', '4']),
    '--fold-dir': cascade(num_folds, '{cascade}/folds.csv', gives=4, base=MEMBERS),
    '--confidence': cascade(lambda r: read_cascade(r).confidence_kind, 'max_prob', gives='max_prob',
                            base=[*MEMBERS, '--folds', '0']),
    '--init-from': built(local_mark, '{gfnet}', gives=0.125, base=GFNET),
    '--aux-weight': built(lambda t: t.task.aux_weight, '3', gives=3.0, base=GFNET),
    '--freeze-global': built(lambda t: len(t.task.frozen), gives=1, base=[*GFNET, '--init-from', '{gfnet}']),
    '--no-freeze-global': built(lambda t: len(t.task.frozen), gives=0,
                                base=[*GFNET, '--freeze-global', '--init-from', '{gfnet}']),
    '--classifier-lr-scale': built(classifier_lr, '10', gives=[1.0], base=['--lr', '0.1']),
    '--policy-std': policy_update('std', '0.2', gives=0.2),
    '--policy-gamma': policy_update('gamma', '0.5', gives=0.5),
    '--policy-epsilon': policy_update('epsilon', '0.3', gives=0.3),
    '--policy-value-coeff': policy_update('value_coeff', '1', gives=1.0),
    '--policy-entropy-coeff': policy_update('entropy_coeff', '0.1', gives=0.1),
    '--policy-updates': policy_update('num_updates', '4', gives=4),
    '--clock': ran(clocked, gives=True, base=[*GFNET, *WHOLE]),
    '--save-patches': ran(lambda r: (r.folder / 'patches.png').exists(), '2', gives=True, base=[*GFNET, *WHOLE]),
    '--checkpoint-interval': TRAIN['--recovery-interval'],
    '--log-with': ran(
        lambda r: any(b'classification/eval_top1' in path.read_bytes() for path in r.folder.rglob('events.*')),
        'tensorboard', gives=True),
}


# timm gives up the schedule `plateau` and says so.
@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated:FutureWarning')
@pytest.mark.parametrize(('name', 'flag'), spellings(TRAIN | OURS))
def test_option(lab, name, flag):
    (TRAIN | OURS)[name](lab, flag)


def test_no_option_is_forgotten():
    assert sorted(TRAIN) == sorted(timm_options('train.py'))
    assert {flag for name in TRAIN | OURS for flag in name.split()} == named(create_train_parser())


def test_prefetcher_or_not_images_are_the_same(lab):
    with_it, without = (images(lab.built('--no-aug', *more)) for more in ([], ['--no-prefetcher']))
    assert torch.allclose(with_it, without, atol=1e-5)
