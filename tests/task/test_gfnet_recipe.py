import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from parity.test_gfnet import build_checkpoint

from timm_dynamic.launch.build import build_optimizer, resolve_learning_rate
from timm_dynamic.launch.settings import TrainOptions
from timm_dynamic.models.builder import load_checkpoint
from timm_dynamic.task import GlanceFocusTask, StageContext, create_recipe
from timm_dynamic.task.gfnet_recipe import load_encoder
from timm_dynamic.utils import CheckpointError, save_pretrained

PAPER = {  # backbone lr, classifier lr in stages 1 and 3, epochs, weight decay, auxiliary weight, frozen
    'gfnet_resnet50_96': (0.01, 0.1, 0.01, 60, 1e-4, 1, False),
    'gfnet_densenet121_96': (0.01, 0.1, 0.01, 60, 1e-4, 1, False),
    'gfnet_regnety_006_96': (0.02, 0.1, 0.01, 60, 5e-5, 1, False),
    'gfnet_mobilenetv3_large_100_96': (0.005, 0.1, 0.01, 90, 1e-4, 5, True),
    'gfnet_efficientnet_b2_128': (0.005, 0.1, 0.01, 30, 1e-4, 5, True),
}


def options(*argv):
    return TrainOptions(['--data-dir', 'somewhere', *map(str, argv)])


def small(**kwargs):
    return timm.create_model('test_gfnet', **{'num_classes': 5, 'img_size': 48, 'patch_size': 16, **kwargs})


@pytest.mark.parametrize('name', PAPER)
def test_the_papers_settings(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    opts = options('--model', name)
    recipe = create_recipe(opts.base, model=model)
    assert [s.name for s in recipe.stages] == ['warmup', 'policy', 'finetune']
    warmup, policy, finetune = (opts.for_stage(s, num_processes=2) for s in recipe.stages)
    lr, first, last, epochs, weight_decay, aux, frozen = PAPER[name]
    for args, classifier_lr in ((warmup, first), (finetune, last)):
        assert args.batch_size == 128
        assert resolve_learning_rate(args, 256, 'warmup') == pytest.approx(lr)
        assert args.classifier_lr_scale * lr == pytest.approx(classifier_lr)
        assert (args.epochs, args.weight_decay) == (epochs, weight_decay)
        assert (args.aux_weight, args.freeze_global) == (aux, frozen)
        assert (args.opt, args.momentum, args.sched, args.min_lr, args.warmup_epochs) == ('sgd', 0.9, 'cosine', 0, 0)
        assert (args.smoothing, args.color_jitter, args.hflip, args.scale) == (0, 0, 0.5, [0.08, 1.0])
    assert (policy.epochs, policy.opt, policy.opt_betas, policy.sched) == (15, 'adam', [0.9, 0.999], 'none')
    assert resolve_learning_rate(policy, 256, 'policy') == 3e-4
    assert (policy.policy_gamma, policy.policy_epsilon, policy.policy_std, policy.policy_updates) == (0.7, 0.2, 0.1, 1)
    assert (policy.policy_value_coeff, policy.policy_entropy_coeff) == (0.5, 0.01)
    sizes = [224] if 'efficientnet' in name else None
    assert all(args.train_img_sizes == sizes for args in (warmup, policy, finetune))


def test_optimizer_groups():
    recipe = create_recipe(options('--model', 'test_gfnet').base, model=small())
    args = options('--batch-size', 256).for_stage(recipe.stages[0])
    args.lr = resolve_learning_rate(args, 256, 'warmup')
    task = GlanceFocusTask(small(), verbose=False)
    optimizer = build_optimizer(task.trainable_module, args)
    assert type(optimizer).__name__ == 'SGD'
    assert optimizer.defaults['nesterov']
    lrs = {id(p): g['lr'] for g in optimizer.param_groups for p in g['params']}
    decays = {g['weight_decay'] for g in optimizer.param_groups}
    assert decays == {1e-4}  # biases and norms, too
    model = task.module.model
    for part, lr in ((model.global_encoder, 0.01), (model.local_encoder, 0.01), (model.classifier, 0.1)):
        assert [lrs[id(p)] for p in part.parameters()] == pytest.approx([lr] * len(list(part.parameters())))
    assert lrs[id(task.module.heads['local_aux'].weight)] == pytest.approx(0.01)
    assert id(model.policy.actor.weight) not in lrs


@pytest.mark.parametrize('opt_kwargs', [[], ['--layer-decay', '0.5']])
def test_classifier_lr_of_any_model(opt_kwargs):
    model = timm.create_model('test_focusnet')
    args = options('--classifier-lr-scale', 10, '--lr', 0.1, *opt_kwargs).base
    groups = build_optimizer(model, args).param_groups
    lrs = {id(p): g['lr'] for g in groups for p in g['params']}
    assert {lrs[id(p)] for p in model.fc.parameters()} == {1.0}
    assert {lrs[id(p)] for n, p in model.named_parameters() if not n.startswith('fc')} == {0.1}
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))


def test_head_of_step_1_learns_as_the_encoder_whose_head_it_is():
    with torch.device('meta'):
        module = GlanceFocusTask(timm.create_model('gfnet_regnety_006_96'), verbose=False).module
    own = set(module.model.classifier.heads['first'].parameters())
    fast = set(module.classifier_parameters())
    assert len(own) == 2
    assert not own & fast
    assert own | fast == set(module.model.classifier.parameters())


def test_a_size_that_is_given_is_trained_with():
    with torch.device('meta'):
        model = timm.create_model('gfnet_efficientnet_b2_128')
    opts = options('--model', 'gfnet_efficientnet_b2_128', '--img-size', '192')
    assert [opts.for_stage(s).train_img_sizes for s in create_recipe(opts.base, model=model).stages] == [None] * 3


def test_recipe_is_chosen_by_the_model():
    gfnet = small()
    assert create_recipe(options().base).name == 'classification'
    assert create_recipe(options().base, model=gfnet).name == 'gfnet'
    assert create_recipe(options('--recipe', 'end-to-end').base, model=gfnet).name == 'end-to-end'
    assert create_recipe(options('--recipe', 'classification').base, model=gfnet).name == 'classification'
    names = [s.name for s in create_recipe(options('--init-local', 'scratch').base, model=gfnet).stages]
    assert names == ['static', 'warmup', 'policy', 'finetune']
    static = create_recipe(options('--init-local', 'scratch').base, model=gfnet).stages[0]
    assert (static.model, dict(static.model_kwargs)) == ('test_focusnet', {'output_stride': 16})
    args = options('--pretrained', '--model', 'test_gfnet').for_stage(static)
    assert (args.model, args.model_kwargs, args.pretrained, args.img_size) == (
        'test_focusnet', {'output_stride': 16}, False, 48)
    demo = create_recipe(options().base, demo=True, model=gfnet)
    assert [s.name for s in demo.stages] == ['static', 'warmup', 'policy', 'finetune']


@pytest.mark.parametrize('demo', [False, True])
@pytest.mark.parametrize('whole', [['--pretrained'], ['--initial-checkpoint', 'x'], ['--pretrained-path', 'x']])
def test_weights_of_the_whole_model_are_kept(whole, demo):
    """The encoders do not start from the backbone's weights, nor from those of a static net."""
    opts = options('--model', 'test_gfnet', *whole)
    for name in ('gfnet', 'end-to-end'):
        opts.base.recipe = name
        model = small()
        recipe = create_recipe(opts.base, demo=demo, model=model)
        assert [s.name for s in recipe.stages] == (
            ['end-to-end'] if name == 'end-to-end' else ['warmup', 'policy', 'finetune'])
        before = {k: v.clone() for k, v in model.state_dict().items()}
        recipe.stages[0].prepare(model, opts.for_stage(recipe.stages[0]), StageContext())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=f'--init-local cannot be combined with {whole[0]}, which loads the weights'):
        create_recipe(options('--init-local', 'scratch', *whole).base, demo=demo, model=small())


def test_options_of_another_recipe():
    with pytest.raises(ValueError, match=r"'gfnet' trains GFNet models, .*; got --model resnet50"):
        create_recipe(options('--recipe', 'gfnet').base)
    with pytest.raises(ValueError, match=r"--init-from is an option of .*'end-to-end' and 'anchornet', not of 'clas"):
        create_recipe(options('--init-from', 'x').base)
    with pytest.raises(ValueError, match="--focus-plain is an option of the recipe 'focusnet'"):
        create_recipe(options('--focus-plain').base, model=small())
    with pytest.raises(ValueError, match='needs --init-local scratch, which trains the net'):
        create_recipe(options('--init-global', 'scratch').base, model=small())
    for option in ('--init-local', '--init-global'):
        with pytest.raises(ValueError, match=f'{option} cannot be combined with --init-from'):
            create_recipe(options('--init-from', 'x', option, 'resnet18').base, model=small())
    with pytest.raises(ValueError, match="--freeze-global is an option of the recipe 'gfnet', not of 'end-to-end'"):
        create_recipe(options('--recipe', 'end-to-end', '--freeze-global').base, model=small())
    recipe = create_recipe(options().base, model=small())
    args = options('--policy-updates', 2, '--grad-accum-steps', 2).for_stage(recipe.stages[1])
    with pytest.raises(ValueError, match='cannot be combined with --grad-accum-steps 2'):
        recipe.stages[1].create_task(small(), args, StageContext())


@pytest.mark.parametrize('flags', [
    ('--kd-model-name', 'resnet18'), ('--bce-loss',), ('--jsd-loss',), ('--bce-target-thresh', '0.2')])
def test_losses_of_plain_classification_are_refused_elsewhere(flags):
    for name, recipe in (('test_gfnet', 'gfnet'), ('test_gfnet', 'end-to-end'), ('test_anchornet_patch', 'anchornet'),
                         ('test_clcnet', 'clcnet')):
        with torch.device('meta'):
            model = timm.create_model(name)
        with pytest.raises(ValueError, match=f"{flags[0]} is an option of the recipe 'classification' and 'focusnet'"):
            create_recipe(options('--model', name, '--recipe', recipe, *flags).base, model=model)
    with pytest.raises(ValueError, match=f'{flags[0]} has no effect on the focus net'):
        create_recipe(options('--focus-baseline', 'resnet18', *flags).base)
    create_recipe(options('--focus-baseline', 'resnet18', '--focus-plain', *flags).base)


@pytest.mark.parametrize(('flags', 'demo'), [(('--init-local', 'scratch'), False), ((), True)])
def test_backbone_that_cannot_be_trained_by_itself(flags, demo):
    with torch.device('meta'):
        model = timm.create_model('gfnet_mobilenetv3_large_125_128')
    with pytest.raises(ValueError, match=r"'mobilenetv3_large_125' is not a timm model .* with --init-local"):
        create_recipe(options(*flags).base, demo=demo, model=model)
    assert len(create_recipe(options('--init-local', 'FILE').base, demo=demo, model=model).stages) == 3


def test_weights_of_the_whole_net_need_no_static_net():
    demo = create_recipe(options('--init-from', 'x').base, demo=True, model=small())
    assert [s.name for s in demo.stages] == ['warmup', 'policy', 'finetune']


def test_frozen_glance_needs_weights(tmp_path, caplog):
    """One that learns may start from random weights, with a warning."""
    unknown = small(backbone='mnasnet_050', backbone_args={})  # has no pretrained weights
    warmup, *_ = create_recipe(options().base, model=unknown).stages
    with pytest.raises(CheckpointError, match=r'The global encoder is frozen .* no pretrained weights.*--init-global'):
        warmup.prepare(unknown, options('--freeze-global').base, StageContext())
    caplog.clear()
    warmup.prepare(unknown, options().base, StageContext())
    assert 'The global encoder starts from random weights' in caplog.text
    save_pretrained(timm.create_model('test_focusnet', num_classes=5), tmp_path)
    args = options('--freeze-global', '--init-global', tmp_path).base
    warmup.prepare(small(), args, StageContext())


def test_encoder_from_a_file(tmp_path, monkeypatch):
    backbone = timm.create_model('test_focusnet', num_classes=5)
    save_pretrained(backbone, tmp_path)
    torch.save({'state_dict': backbone.state_dict()}, tmp_path / 'file.pth.tar')
    torch.save({'state_dict': backbone.state_dict()}, tmp_path / 'test_focusnet.pth')  # like a model with the tag 'pth'
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path, f'local-dir:{tmp_path}', tmp_path / 'file.pth.tar', 'test_focusnet.pth'):
        model = small()
        classifier = load_encoder(model.local_encoder, source, model)
        assert torch.equal(classifier['weight'], backbone.fc.weight)
        state = model.local_encoder.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items() if not k.startswith('fc.'))
    assert load_encoder(small(num_classes=7).local_encoder, tmp_path, small(num_classes=7)) == {}
    save_pretrained(timm.create_model('test_resnet', num_classes=5), tmp_path / 'other')
    with pytest.raises(CheckpointError, match='test_focusnet'):
        load_encoder(small().local_encoder, tmp_path / 'other', small())
    with pytest.raises(CheckpointError, match=r"weights of 'resnet5O' are not available: .*Did you mean"):
        load_encoder(small().local_encoder, 'resnet5O', small())


@pytest.mark.parametrize(('container', 'prefix', 'head'), [
    ('model_state', '', 'head.fc'),  # pycls
    ('state_dict', 'module.', 'fc'),  # the GFNet authors
])
def test_regnets_with_the_keys_of_pycls(tmp_path, container, prefix, head):
    """The keys and shapes are those of the authors' files."""
    shapes = json.loads((Path(__file__).parents[1] / 'parity/data/gfnet.json').read_text())[
        'gfnet_regnety_006_96']['components']['model_prime_state_dict']['shapes']
    values = {k.removeprefix('module.'): torch.rand(shape) for k, shape in shapes.items()}
    file = {prefix + (f'{head}.{k[3:]}' if k.startswith('fc.') else k): v for k, v in values.items()}
    torch.save({'epoch': 100, container: file}, tmp_path / 'regnety_600m.pyth')
    model = timm.create_model('gfnet_regnety_006_96')
    classifier = load_encoder(model.local_encoder, tmp_path / 'regnety_600m.pyth', model)
    state = model.local_encoder.state_dict()
    assert len(state) == len(values) - 2
    for ours, theirs in {
            'stem.conv.weight': 'stem.conv.weight', 's1.b1.downsample.conv.weight': 's1.b1.proj.weight',
            's1.b1.downsample.bn.running_var': 's1.b1.bn.running_var', 's4.b4.conv1.conv.weight': 's4.b4.f.a.weight',
            's4.b4.conv2.bn.bias': 's4.b4.f.b_bn.bias', 's3.b2.se.fc1.weight': 's3.b2.f.se.f_ex.0.weight',
            's3.b2.se.fc2.bias': 's3.b2.f.se.f_ex.2.bias', 's4.b1.conv3.bn.running_mean': 's4.b1.f.c_bn.running_mean',
    }.items():
        assert torch.equal(state[ours], values[theirs]), ours
    assert torch.equal(classifier['weight'], values['fc.weight'])
    assert torch.equal(classifier['bias'], values['fc.bias'])


@pytest.mark.parametrize('kwargs', [{}, dict(step_classifier='concat')])
def test_what_warm_up_starts_from(tmp_path, kwargs, caplog):
    backbone = timm.create_model('test_focusnet', num_classes=5)
    save_pretrained(backbone, tmp_path)
    opts = options('--init-local', tmp_path)
    recipe = create_recipe(opts.base, model=small())
    model = small(**kwargs)
    heads = recipe.stages[0].prepare(model, opts.for_stage(recipe.stages[0]), StageContext())
    assert torch.equal(model.global_encoder.conv1[0].weight, backbone.conv1[0].weight)
    assert torch.equal(heads['local_aux']['weight'], backbone.fc.weight)
    first = model.classifier.heads['1'].weight if kwargs else heads['global_aux']['weight']
    assert torch.equal(first, backbone.fc.weight)

    unknown = small(backbone='mnasnet_050', backbone_args={}, **kwargs)  # has no pretrained weights
    with caplog.at_level(logging.WARNING):
        opts = options()
        assert recipe.stages[0].prepare(unknown, opts.for_stage(recipe.stages[0]), StageContext()) == {}
    assert 'The local encoder starts from random weights' in caplog.text
    assert '--init-global' in caplog.text


def test_authors_files_of_both_kinds(tmp_path):
    name = 'gfnet_mobilenetv3_large_100_96'
    whole = build_checkpoint(name)
    first = {k: v for k, v in whole.items() if k in ('model_prime_state_dict', 'model_state_dict', 'fc')}
    torch.save(whole, tmp_path / 'whole.pth.tar')
    torch.save(first, tmp_path / 'first.pth.tar')
    model = timm.create_model(name)
    state = load_checkpoint(model, tmp_path / 'whole.pth.tar')
    assert set(state) == {'global_aux', 'local_aux', 'critic'}
    assert torch.equal(model.policy.actor.weight, whole['policy']['actor.0.weight'])

    other = timm.create_model(name)
    policy = other.policy.actor.weight.clone()
    state = load_checkpoint(other, tmp_path / 'first.pth.tar', optional=('policy',))
    assert set(state) == {'global_aux', 'local_aux'}
    assert torch.equal(other.policy.actor.weight, policy)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items() if 'policy' not in k)
    with pytest.raises(CheckpointError, match='holds no policy'):
        load_checkpoint(other, tmp_path / 'first.pth.tar')


def test_our_own_stages_hand_on_their_heads(tmp_path):
    task = GlanceFocusTask(small(), verbose=False)
    save_pretrained(task.module.model, tmp_path, task_state=task.get_task_state())
    state = load_checkpoint(small(), tmp_path)
    expected = task.get_task_state()
    assert {k: set(v) for k, v in state.items()} == {k: set(v) for k, v in expected.items()}
    assert all(torch.equal(v, state[name][k]) for name, head in expected.items() for k, v in head.items())
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).num_classes == 5
