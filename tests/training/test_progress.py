"""What is shown while a model trains."""
import argparse
import logging

import pytest
import torch

from timm_dynamic.task import Stage
from timm_dynamic.task.recipe import used_settings
from timm_dynamic.training.progress import Pace, RunningMeans, TrainingLog, format_epoch, log_once


class Clock:
    now = 100.

    def __call__(self):
        return self.now


class Tracker:
    """Records what an Accelerator would give to its trackers."""
    is_main_process = True

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


def test_pace():
    clock = Clock()
    pace = Pace(num_batches=20, images_per_batch=64, epochs=3, later_epochs=4, clock=clock)
    pace.start_epoch(0, 10)  # resumed within the epoch
    clock.now += 10  # the workers start
    pace.advance(11)
    assert pace.seconds_per_batch == 0  # unknown
    clock.now += 6
    pace.advance(14)  # 2 s a batch
    assert pace.images_per_second == 16
    assert pace.left() == (12, 12 + (2 + 4) * 40)
    clock.now += 12
    pace.advance(20)
    clock.now += 5  # validation
    pace.end_epoch()
    assert pace.left_for_run() == 6 * (8 + 40 + 5)
    pace.start_epoch(1, 0)
    clock.now += 9
    pace.advance(1)
    assert pace.left() == (38, 38 + 5 + 5 * 53)  # at the pace of the epoch before
    clock.now += 1
    pace.advance(2)  # 1 s a batch
    assert pace.left() == (18, 18 + 5 + 5 * (8 + 20 + 5))


def test_epoch_line_of_five_steps_fits_a_terminal():
    row = {'train_loss': 1.359, 'lr': 0.0008536, 'lr_min': 0.0004, 'lr_max': 0.001, 'seconds': 1281.2,
           'eval_loss': 0.19, 'eval_top1': 90.62, 'eval_top5': 99.8}
    row |= {f'{what}_step{t}': 90 + t / 8 for what in ('train_ce', 'train_aux', 'train_top1', 'eval_top1')
            for t in range(1, 6)}
    line = format_epoch('finetune: epoch 14 done:', row, ['120 images/s', '1:23:45 left'])
    assert len(line) <= 120
    assert line == (
        'finetune: epoch 14 done: train_loss 1.359, eval_top1 by step 90.12/90.25/90.38/90.5/90.62, '
        '120 images/s, 1:23:45 left')
    few = format_epoch('plain: epoch 3 done:', {'train_loss': 1., 'lr': 0.5, 'eval_top1': 9.}, ['120 images/s'])
    assert few == 'plain: epoch 3 done: train_loss 1, eval_top1 9, 120 images/s, lr 0.5'


def test_a_tag_of_trackers_has_one_meaning_and_steps_rise(caplog):
    clock, tracker = Clock(), Tracker()
    log = TrainingLog('policy', tracker, Pace(2, 8, 1, clock=clock), first_update=40)
    means = RunningMeans()
    for key, value in {'loss': [2.], 'step_top1': [50., 75.], 'count': [1.]}.items():
        means.add(key, torch.tensor(value), 8)
    log.start_epoch(0, 0, 2)
    clock.now += 2
    log.advance(1)
    clock.now += 2
    log.advance(2)
    with caplog.at_level('INFO'):
        log.update('2/2', means, 0.1, 2)
        log.end_batches()
        log.end_epoch({'epoch': 0, 'train_loss': 2., 'lr': 0.05, 'lr_min': 0.02, 'eval_top1': 75.}, 2, 0)
    (first, update), (second, epoch) = tracker.logged
    assert (first, second) == (42, 42)
    assert update == {'policy/loss': 2., 'policy/lr': 0.1, 'policy/images_per_second': 4.}
    assert epoch == {'policy/train_loss': 2., 'policy/lr_min': 0.02, 'policy/eval_top1': 75.}
    assert [record.message for record in caplog.records] == [
        'policy: epoch 0 update 2/2 loss 2, 4 images/s, 0:00 left for the epoch, 0:00 for the run, lr 0.1, '
        'step_top1 50/75',
        'policy: epoch 0 done: train_loss 2, eval_top1 75, 4 images/s, last epoch, lr 0.05, lr_min 0.02']


def test_messages_about_the_same_weights_are_shown_once(caplog):
    logger = logging.getLogger('test.weights')
    for _ in range(2):  # two stages
        with caplog.at_level('INFO'), log_once('test.weights'):
            for name in ('a', 'a', 'b'):
                logger.info('Loading %s', name)
    logger.warning('Loading b')
    assert [record.message for record in caplog.records] == [f'Loading {c}' for c in ('a', 'b', 'a', 'b', 'b')]


@pytest.mark.parametrize(('change', 'shown'), [
    ({}, ['batch_size', 'warmup_epochs', 'warmup_lr', 'momentum', 'sched', 'lr_base']),
    ({'warmup_epochs': 0}, ['batch_size', 'warmup_epochs', 'momentum', 'sched', 'lr_base']),
    ({'opt': 'adamw', 'lr': 0.1}, ['batch_size', 'warmup_epochs', 'warmup_lr', 'sched']),
    ({'sched': 'step'}, ['batch_size', 'warmup_epochs', 'warmup_lr', 'momentum', 'sched', 'decay_epochs', 'lr_base']),
])
def test_settings_without_effect_are_not_shown(change, shown):
    defaults = {'global_batch_size': 64, 'warmup_epochs': 1, 'warmup_lr': 1e-3, 'momentum': 0.9, 'sched': 'cosine',
                'decay_epochs': 30, 'lr_base': 0.1}
    args = argparse.Namespace(**{**defaults, 'batch_size': 32, 'opt': 'sgd', 'lr': None, **change})
    settings = used_settings(Stage('static', None, defaults), args)
    assert list(settings) == shown
    assert settings['batch_size'] == '32'
