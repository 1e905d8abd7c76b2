"""Parsing of train.py's options: where a value comes from, and what is refused."""
import pytest
import yaml
from flag_tables import fresh_accelerate

from timm_dynamic.launch.options import (
    REFUSED_TRAIN,
    create_predict_parser,
    create_train_parser,
    create_validate_parser,
)
from timm_dynamic.launch.settings import TrainOptions
from timm_dynamic.task import create_recipe

# What timm's train.py does without options.
TIMM = {
    'model': 'resnet50', 'dataset': '', 'train_split': 'train', 'val_split': 'validation', 'batch_size': 128,
    'validation_batch_size': None, 'grad_accum_steps': 1, 'num_classes': None, 'pretrained': False, 'img_size': None,
    'crop_pct': None, 'interpolation': '', 'channels_last': False, 'device': 'cuda', 'amp': False,
    'amp_dtype': 'float16', 'opt': 'sgd', 'opt_eps': None, 'opt_betas': None, 'momentum': 0.9, 'weight_decay': 2e-5,
    'clip_grad': None, 'clip_mode': 'norm', 'layer_decay': None, 'opt_kwargs': {}, 'sched': 'cosine',
    'sched_on_updates': False, 'lr': None, 'lr_base': 0.1, 'lr_base_size': 256, 'lr_base_scale': '', 'lr_noise': None,
    'lr_noise_pct': 0.67, 'lr_noise_std': 1.0, 'lr_cycle_mul': 1.0, 'lr_cycle_decay': 0.5, 'lr_cycle_limit': 1,
    'lr_k_decay': 1.0, 'warmup_lr': 1e-5, 'min_lr': 0, 'epochs': 300, 'epoch_repeats': 0, 'start_epoch': None,
    'decay_milestones': [90, 180, 270], 'warmup_epochs': 5, 'warmup_prefix': False, 'cooldown_epochs': 0,
    'patience_epochs': 10, 'decay_rate': 0.1, 'no_aug': False, 'train_crop_mode': None, 'scale': [0.08, 1.0],
    'ratio': [3 / 4, 4 / 3], 'hflip': 0.5, 'vflip': 0, 'color_jitter': 0.4, 'color_jitter_prob': None, 'aa': None,
    'aug_repeats': 0, 'aug_splits': 0, 'jsd_loss': False, 'bce_loss': False, 'reprob': 0, 'remode': 'pixel',
    'recount': 1, 'resplit': False, 'mixup': 0, 'cutmix': 0, 'cutmix_minmax': None, 'mixup_prob': 1.0,
    'mixup_switch_prob': 0.5, 'mixup_mode': 'batch', 'mixup_off_epoch': 0, 'smoothing': 0.1,
    'train_interpolation': 'random', 'drop': 0, 'drop_connect': None, 'drop_path': None, 'drop_block': None,
    'bn_momentum': None, 'bn_eps': None, 'sync_bn': False, 'dist_bn': 'reduce', 'split_bn': False, 'model_ema': False,
    'model_ema_force_cpu': False, 'model_ema_decay': 0.9998, 'model_ema_warmup': False, 'seed': 42,
    'worker_seeding': 'all', 'log_interval': 50, 'val_interval': 1, 'checkpoint_interval': 0, 'checkpoint_hist': 10,
    'workers': 4, 'save_images': False, 'pin_mem': False, 'no_prefetcher': False, 'output': '', 'experiment': '',
    'eval_metric': 'top1', 'tta': 0, 'use_multi_epochs_loader': False, 'log_wandb': False, 'kd_model_name': None,
    'kd_distill_type': 'logit', 'kd_loss_type': 'kl', 'kd_temperature': 4.0, 'kd_token_distill_type': 'soft',
}
FOCUS = ['--model', 'focusnet_resnet18', '--focus-baseline', 'resnet18.tv_in1k', '--data-dir', 'IMAGENET']


def resolve(*argv, stage=-1, processes=1, demo=False):
    """Options of a stage."""
    options = TrainOptions([str(a) for a in argv])
    return options.for_stage(create_recipe(options.base, demo).stages[stage], processes)


@pytest.fixture
def config(tmp_path):
    """Writes a file for --config."""
    def write(**values):
        (tmp_path / 'config.yaml').write_text(yaml.safe_dump(values))
        return ['--config', tmp_path / 'config.yaml']
    return write


@pytest.fixture
def says(capsys):
    """Runs something that must be an error of the command line, and gives what it says."""
    def run(function, *args):
        with pytest.raises(SystemExit, match='2'):
            function(*args)
        return capsys.readouterr().err.rpartition('error: ')[2]
    return run


def test_a_plain_model_has_timms_defaults():
    args = vars(resolve('--model', 'resnet18', '--data-dir', 'IMAGENET'))
    assert {k: args[k] for k in TIMM} == {**TIMM, 'model': 'resnet18'}
    assert args == {**vars(create_train_parser().parse_args([])), 'model': 'resnet18', 'data_dir': 'IMAGENET'}


@pytest.mark.parametrize('demo', [False, True])
def test_recipe_defaults_come_with_a_recipe_only(demo):
    plain = vars(resolve('--model', 'focusnet_resnet18', '--recipe', 'classification', demo=demo))
    assert {k: plain[k] for k in TIMM} == {**TIMM, 'model': 'focusnet_resnet18'}
    assert resolve(*FOCUS, demo=demo).epochs != TIMM['epochs']


def test_recipe_of_the_paper():
    args = vars(resolve(*FOCUS))
    expected = dict(
        epochs=90, batch_size=256, opt='momentum', momentum=0.9, lr_base=0.1, lr_base_size=256, weight_decay=1e-4,
        sched='step', decay_epochs=30, decay_rate=0.1, warmup_epochs=0, opt_kwargs={'filter_bias_and_bn': False})
    assert {k: args[k] for k in expected} == expected
    changed = {k for k in TIMM if args[k] != TIMM[k]}
    assert changed == {*expected, 'model', 'color_jitter', 'train_interpolation'} - {
        'momentum', 'lr_base', 'lr_base_size', 'decay_epochs', 'decay_rate'}


def test_precedence(config):
    """timm's default < the recipe's < --config < a flag < --stage-args, which is the most particular."""
    argv = ['--model', 'resnet18']
    assert resolve(*argv).epochs == 300
    argv += ['--focus-baseline', 'resnet18']
    assert resolve(*argv).epochs == 90
    argv += config(epochs=7, momentum=0.5)
    assert (resolve(*argv).epochs, resolve(*argv).momentum) == (7, 0.5)
    argv += ['--epochs', 5]
    assert (resolve(*argv).epochs, resolve(*argv).momentum) == (5, 0.5)
    argv += ['--focus-plain', '--stage-args', 'plain.epochs=3']
    assert [resolve(*argv, stage=i).epochs for i in range(2)] == [3, 5]


@pytest.mark.parametrize(('option', 'value'), [
    ('--epochs', 300), ('--sched', 'cosine'), ('--color-jitter', 0.4), ('--weight-decay', 2e-5), ('-b', 128),
    ('--batch-size', 128), ('--warmup-epochs', 5),
])
def test_a_flag_counts_even_if_it_says_timms_default(config, option, value):
    other = config(epochs=1, sched='tanh', color_jitter=0, weight_decay=0, batch_size=2, warmup_epochs=1)
    args = resolve(*FOCUS, *other, option, value)
    assert getattr(args, {'-b': 'batch_size'}.get(option, option[2:].replace('-', '_'))) == value


def test_a_recipes_batch_size_is_global(config):
    assert resolve(*FOCUS).batch_size == 256
    assert resolve(*FOCUS, processes=4).batch_size == 64
    assert resolve(*FOCUS, '--grad-accum-steps', 2, processes=4).batch_size == 32
    assert resolve(*FOCUS, '-b', 48, processes=4).batch_size == 48
    assert resolve(*FOCUS, *config(batch_size=40), processes=4).batch_size == 40
    assert resolve('--model', 'resnet18', processes=4).batch_size == 128  # timm's are per process
    with pytest.raises(ValueError, match=r'batch size 256 is not divisible by 3 processes x 1 .* Set --batch-size'):
        resolve(*FOCUS, processes=3)


def test_config_knows_every_spelling_and_type(config):
    args = resolve(*config(**{
        'batch-size': 8, 'dr': 0.5, 'recovery_interval': 3, 'j': 1, 'lr': '1e-3', 'min_lr': 0, 'opt_betas': 0.9,
        'wandb_tags': 'mine', 'model_kwargs': {'act_layer': 'gelu'}, 'model_ema': True, 'scale': [0.5, '1'],
        'train_steps_per_epoch': 9, 'experiment': None, 'epochs': '7'}))
    assert (args.batch_size, args.decay_rate, args.checkpoint_interval, args.workers) == (8, 0.5, 3, 1)
    assert (args.lr, args.min_lr, args.opt_betas, args.scale) == (1e-3, 0, [0.9], [0.5, 1.0])
    assert (args.wandb_tags, args.model_kwargs, args.model_ema) == (['mine'], {'act_layer': 'gelu'}, True)
    assert (args.train_batches_per_epoch, args.experiment, args.epochs) == (9, None, 7)


def test_config_in_yaml_as_people_write_it(tmp_path):
    (tmp_path / 'c.yaml').write_text('# mine\nlr: 1e-3\nweight-decay: 5e-2\nmodel: resnet18\n')
    args = resolve('-c', tmp_path / 'c.yaml')
    assert (args.lr, args.weight_decay, args.model) == (0.001, 0.05, 'resnet18')
    (tmp_path / 'c.yaml').write_text('')
    assert resolve('-c', tmp_path / 'c.yaml').epochs == 300


def test_config_takes_the_args_yaml_of_timm(config):
    """It holds all options, those that are refused here at their defaults too."""
    timms = {**TIMM, 'decay_epochs': 90, 'torchscript': False, 'fuser': '', 'naflex_loader': False,
             'naflex_train_seq_lens': [128, 256, 576], 'naflex_max_seq_len': 576, 'naflex_loss_scale': 'linear'}
    args = vars(resolve(*config(**timms)))
    assert {k: args[k] for k in TIMM} == TIMM


def test_config_takes_the_args_yaml_of_a_run(tmp_path, image_folder):
    from timm_dynamic.training import run_training
    argv = ['--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '--data-dir', str(image_folder),
            '-b', '16', '-j', '0', '--epochs', '1', '--device', 'cpu', '--output', str(tmp_path)]
    first = run_training([*argv, '--experiment', 'first'])
    fresh_accelerate()
    args = str(first['folder'] / 'args.yaml')
    second = run_training(['--config', args, '--experiment', 'second'])
    for key in ('train_loss', 'eval_loss', 'lr'):
        assert second['results']['classification'][key] == first['results']['classification'][key]


@pytest.mark.parametrize(('text', 'message'), [
    ('- a\n- b\n', 'must map options to values, found list'),
    ('a: [', 'cannot read'),
    ('epoch: 3\n', "sets 'epoch', which is not an option. Did you mean epochs"),
    ('torchscript: true\n', 'Use --torchcompile'),
    ('naflex-loader: true\n', 'python -m timm_dynamic'),
    ('epochs: many\n', "epochs: expected int, got 'many'"),
    ('epochs: 2.5\n', "epochs: expected int, got '2.5'"),
    ('scale: [0.1, x]\n', "scale: expected float"),
    ('interpolation: random\n', "--interpolation: expected one of '', 'nearest', 'bilinear'"),
    ('clip_mode: both\n', "--clip-mode: expected one of 'norm', 'value', 'agc', got 'both'"),
])
def test_config_with_errors(tmp_path, says, text, message):
    (tmp_path / 'c.yaml').write_text(text)
    assert message in says(resolve, '-c', tmp_path / 'c.yaml')


def test_config_that_is_not_there(says):
    assert "--config: there is no file 'nowhere.yaml'" in says(resolve, '-c', 'nowhere.yaml')


@pytest.mark.parametrize('create', [create_train_parser, create_validate_parser, create_predict_parser])
def test_typos_and_abbreviations_are_explained(create, says):
    parse = create().parse_args
    assert '--batch-sise. Did you mean --batch-size' in says(parse, ['--batch-sise', '3'])
    assert 'Did you mean --channels-last' in says(parse, ['--channel-last'])
    assert 'Did you mean --img-size' in says(parse, ['--img-siz=3'])
    assert 'Did you mean' not in says(parse, ['--zzzzzz'])


@pytest.mark.parametrize(('create', 'common', 'rare', 'most'), [
    (create_train_parser, '--model-kwargs', '--lr-k-decay', 140),
    (create_validate_parser, '--save-budgets', '--strict', 110),
    (create_predict_parser, '--topk', '--shard-size', 100)])
def test_help_shows_the_common_options_and_help_all_every_one(create, common, rare, most, capsys):
    parser = create()
    assert {a.dest for a in parser._actions} >= parser.common
    texts = []
    for option in ('--help', '--help-all', '--help'):
        with pytest.raises(SystemExit, match='0'):
            parser.parse_args([option])
        texts.append(capsys.readouterr().out)
    short, whole, again = texts
    assert short == again
    assert short.count('\n') < most
    assert common in short
    assert rare not in short
    assert common in whole
    assert rare in whole
    shown = {'help', 'help_all', *parser.common}
    hidden = sum(a.help != '==SUPPRESS==' and a.dest not in shown for a in parser._actions)
    assert short.endswith(f'{hidden} more options: --help-all\n')


def test_refused_options_are_not_in_the_help():
    text = create_train_parser().format_help()
    assert not [name for name in REFUSED_TRAIN if f'{name} ' in text]
    assert 'Recipe:' in text


def test_stage_args(says):
    args = [*FOCUS, '--focus-plain', '--stage-args', 'plain.epochs=3', 'plain.lr-base=1e-2', 'focus.scale=[0.5, 1]',
            'focus.model_ema=true']
    plain, focus = (resolve(*args, stage=i) for i in range(2))
    assert (plain.epochs, plain.lr_base, plain.scale, plain.model_ema) == (3, 0.01, [0.08, 1.0], False)
    assert (focus.epochs, focus.lr_base, focus.scale, focus.model_ema) == (90, 0.1, [0.5, 1.0], True)
    for wrong in ('epochs=3', 'plain.epochs', 'plain.epoch=3'):
        message = says(resolve, '--stage-args', wrong)
        assert f"expected STAGE.OPTION=VALUE with an option of train.py, got '{wrong}'" in message


def test_stages_of_a_scratch_baseline():
    """The baseline has another seed: else the plain net would be the very same one."""
    argv = ['--focus-baseline', 'scratch', '--focus-plain', '--seed', 7]
    recipe = create_recipe(TrainOptions([str(a) for a in argv]).base)
    assert [stage.name for stage in recipe.stages] == ['baseline', 'plain', 'focus']
    assert resolve(*argv, stage=0).seed != resolve(*argv, stage=1).seed == resolve(*argv, stage=2).seed == 7
