"""Errors that name the way out."""
import sys

import pytest
import timm
import torch
from torch import nn

from timm_dynamic.benchmark import benchmark_main
from timm_dynamic.evaluation.predict import run_prediction
from timm_dynamic.evaluation.validate import run_validation
from timm_dynamic.hub import convert_main, publish_main
from timm_dynamic.launch.options import create_predict_parser, create_train_parser, create_validate_parser
from timm_dynamic.launch.settings import TrainOptions
from timm_dynamic.layers import fuse_conv_bn
from timm_dynamic.task import create_recipe
from timm_dynamic.utils import save_pretrained
from timm_dynamic.visualize import main as visualize_main


@pytest.mark.parametrize('create', [create_train_parser, create_validate_parser, create_predict_parser])
@pytest.mark.parametrize(('argv', 'hint'), [
    (['--model', 'test_gfnet', '--backbone', 'resnet18'], 'argument of test_gfnet: --model-kwargs backbone=...'),
    (['--patch-size=8', '--model', 'vit_tiny_patch16_224'], 'vit_tiny_patch16_224: --model-kwargs patch_size=...'),
    (['--model', 'gfnet_resnet50_96', '--num-stepz', '3'], ''),
    (['--model', 'resnet18', '--backbone', 'resnet18'], ''),
    (['--model', 'resnet18', '--batch-sise', '3'], 'Did you mean --batch-size'),
])
def test_arguments_of_the_model_are_not_options(create, argv, hint, capsys):
    with pytest.raises(SystemExit):
        create().parse_args(argv)
    error = capsys.readouterr().err
    assert hint in error
    assert ('--model-kwargs' in error.rpartition('error: ')[2]) == ('--model-kwargs' in hint)


def test_config_files(tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/args.yaml').write_text('model: test_gfnet\npatch_size: 8\n')
    for path, message in (
            (tmp_path / 'none.yaml', f"--config: there is no file '{tmp_path}/none.yaml'."),
            (tmp_path, f"--config: '{tmp_path}' is a folder, expected a file.\n"),
            (tmp_path / 'run', f"is a folder, expected a file. Use {tmp_path}/run/args.yaml.\n"),
            (tmp_path / 'run/args.yaml', 'It is an argument of test_gfnet: --model-kwargs patch_size=...')):
        with pytest.raises(SystemExit):
            TrainOptions(['--config', str(path)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(('option', 'value', 'near'), [
    ('--opt', 'adamww', 'adamw'), ('--opt', 'lookahead_adma', 'adam'), ('--sched', 'cosin', 'cosine')])
def test_optimizer_and_schedule(option, value, near):
    options = TrainOptions(['--model', 'resnet18', option, value])
    with pytest.raises(ValueError, match=rf'{option} {value}: there is no such name. Did you mean .*\b{near}\b'):
        options.for_stage(create_recipe(options.base).stages[0])
    options = TrainOptions(['--model', 'resnet18', '--opt', 'lookahead_AdamW', '--sched', 'none'])
    assert options.for_stage(create_recipe(options.base).stages[0]).opt == 'lookahead_AdamW'


def test_backbone():
    with pytest.raises(ValueError, match=r"Unknown backbone 'resnet81'\. Did you mean .*resnet18"):
        timm.create_model('gfnet', backbone='resnet81')


@pytest.mark.parametrize('side', [20, 65])
def test_least_image_size(side):
    model = timm.create_model('anchornet_patch', backbone='test_focusnet', patch_size=48, num_steps=5, num_classes=3,
                              img_size=192, device='meta')
    with pytest.raises(ValueError, match='The least size is') as error:
        model.set_input_size(side)
    least = int(str(error.value).rpartition('least size is ')[2].split()[0])
    model.set_input_size(least)
    with pytest.raises(ValueError, match=f'least size is {least} '):
        model.set_input_size(least - 1)


@pytest.mark.parametrize('name', ['test_gfnet', 'test_anchornet_patch', 'test_clcnet'])
def test_images_of_whole_numbers(name):
    model = timm.create_model(name).eval()
    with pytest.raises(ValueError, match=r'Expected normalised images of a floating-point dtype, got torch\.uint8'):
        model(model.example_input(dtype=torch.uint8))


@pytest.mark.parametrize('name', ['test_clcnet', 'test_resnet'])
def test_a_model_with_fused_norms_cannot_be_saved(name, tmp_path):
    model = timm.create_model(name).eval()
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    if name == 'test_clcnet':
        model.for_inference()
    else:
        fuse_conv_bn(model, lambda: model(torch.zeros(1, 3, 64, 64)))
    with pytest.raises(ValueError, match='cannot be saved: its batch norms are fused into its convolutions'):
        save_pretrained(model, tmp_path / 'bad')
    assert not (tmp_path / 'bad').exists()
    save_pretrained(model, tmp_path / 'good', state_dict=whole)  # weights from before
    again = timm.create_model(f'local-dir:{tmp_path / "good"}', pretrained=True)
    assert all(torch.equal(v, whole[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize(('main', 'argv', 'hint'), [
    (convert_main, ['FILE', '--model', 'gfnet_resnet50_96', '--catalogue', 'x'], '--catalog'),
    (publish_main, ['--all', '--dry-runs'], '--dry-run'),
    (benchmark_main, ['exit', '--model', 'test_gfnet', '--results-fil', 'x.csv'], '--results-file'),
    (visualize_main, ['--model', 'test_gfnet', '--demo', '1', '--out', 'x', '--threshold', '0.5'], '--thresholds'),
])
def test_unknown_options_of_every_command(main, argv, hint, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert f'Did you mean {hint}' in capsys.readouterr().err


@pytest.mark.parametrize(('main', 'argv'), [
    (convert_main, ['FILE', '--mod', 'gfnet_resnet50_96']), (publish_main, ['--all', '--dry'])])
def test_abbreviations_are_no_options(main, argv):
    """They would mean something else once there is another option that begins like this."""
    with pytest.raises(SystemExit):
        main(argv)


def test_a_cascade_that_could_not_be_rebuilt(tmp_path):
    def cascade(net):
        return timm.create_model(
            'clcnet', models=[timm.create_model('test_resnet', num_classes=3), net], num_classes=3,
            confidence='max_prob')

    save_pretrained(cascade(timm.create_model('test_efficientnet', num_classes=3)), tmp_path / 'good')
    assert timm.create_model(f'local-dir:{tmp_path / "good"}', pretrained=True).num_classes == 3
    changed = timm.create_model('test_resnet', num_classes=3)
    changed.layer4 = nn.Sequential(changed.layer4, nn.BatchNorm2d(changed.num_features))
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain.num_classes = 3
    for net, label in ((changed, 'ResNet'), (plain, 'Sequential')):
        with pytest.raises(ValueError, match=f'cannot be saved: its member {label} is a module that'):
            save_pretrained(cascade(net), tmp_path / 'bad')
        assert not (tmp_path / 'bad').exists()


@pytest.mark.parametrize('run', [run_validation, run_prediction])
def test_device_modules(run, tmp_path, monkeypatch):
    name = f'module_of_{run.__name__}'
    (tmp_path / f'{name}.py').write_text(
        f'import timm\n\n\n@timm.models.register_model\ndef model_of_{name}(pretrained=False, **kwargs):\n'
        "    return timm.create_model('test_resnet', **kwargs)\n")
    monkeypatch.syspath_prepend(tmp_path)
    weights = tmp_path / 'weights.pth'
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), weights)
    args = ['--model', f'model_of_{name}', '--num-classes', '10', '--checkpoint', str(weights), '--num-samples', '4',
            '--demo-img-size', '48', '--device', 'cpu', '-j', '0']
    more = ['--results-file', str(tmp_path / 'rows.csv')] if run is run_prediction else []
    result = run([*args, *more, '--device-modules', name])
    assert name in sys.modules
    assert (result[0] if isinstance(result, list) else result)['images'] == 4
    with pytest.raises(ValueError, match="--device-modules nonsense: No module named 'nonsense'"):
        run([*args, *more, '--device-modules', 'nonsense'])
