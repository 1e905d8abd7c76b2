"""docs/migration.md: its commands in small form, on files in the formats of the four original repositories.

Names of keys, files and options are those of the originals. The weights are random, of small networks.
"""
import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from accelerate.state import AcceleratorState, GradientState
from helpers import ROOT, authors_checkpoint, make_images, write_clcnet_zip
from snippets import Command, blocks_of, commands_of, script_and_args
from timm.data import create_dataset, create_transform, resolve_data_config

from timm_dynamic import visualize
from timm_dynamic.evaluation import predict_main, validate_main
from timm_dynamic.models.anchornet import AnchorNet
from timm_dynamic.training import train_main
from timm_dynamic.utils import load_weights, save_pretrained

PAGE = ROOT / 'docs/migration.md'
MAINS = {'train': train_main, 'validate': validate_main, 'predict': predict_main, 'visualize': visualize.main}
CLASSES = 3
SETTINGS = {
    'train': '--epochs 1 --batch-size 12 --workers 0 --device cpu --no-aug --min-lr 0',
    'validate': f'--num-classes {CLASSES} --batch-size 12 --workers 0 --device cpu',
    'predict': f'--num-classes {CLASSES} --batch-size 12 --workers 0 --device cpu',
    'visualize': f'--num-classes {CLASSES}',
}

# All options of the originals' scripts.
OPTIONS = {
    'FocusNet': {
        'clonalnet_main.py, main.py': (
            '--paradigm --data -a --arch -j --workers --epochs --start-epoch -b --batch-size --lr --learning-rate '
            '--momentum --wd --weight-decay -p --print-freq --resume -e --evaluate -ebc --pretrained --world-size '
            '--rank --dist-url --dist-backend --seed --gpu --multiprocessing-distributed'),
    },
    'GFNet': {
        'inference.py': '--data_url --checkpoint_path --eval_mode',
        'train.py': (
            '--data_url --work_dirs --train_stage --model_arch --patch_size --T --print_freq --model_prime_path '
            '--model_path --checkpoint_path --resume'),
    },
    'AnchorNet': {
        'train_anchornet.py, train_downnet_resized.py, train_downnet_patch.py': (
            '--data --dataset --arch --init-lr --lr-type --milestones --epochs --batch-size --patch-size '
            '--iou-threshold --stride --topk --num-workers --gpu --manual_seed --resume -r --evaluate -e '
            '--pretrained-anchornet --pretrained-downnet --checkpoint-dir'),
        'make_table.py': '--iou-thresholds --resized-pretrained --patch-pretrained --save-dir',
        'dynamic_inference.py': '--table-file --checkpoint-dir --arch all_predefined_thresholds',
        'visualize.py': '--iou-threshold --topk --save-dir',
        'predict.py': 'input_image output_format iou_thresholds Final-probs-plot Json Predictions-plot CAM-plot',
    },
    'CLCNet': {
        'generate_data_for_CLCNet.py': '--data-path --output --model --num_classes --model-weight --batch-size',
        'merge.py': '--path_of_csv1 --path_of_csv2 --output_path',
        'train-imagenet-5-fold-cv.py, train-custom-data.py': (
            '--imagenet-split --cls-output --weight-save --max-epochs --patience --batch-size --virtual-batch-size '
            '--batch_size --virtual_batch_size'),
        'eval-imagenet-5-fold-cv.py, eval-custom-data.py': (
            '--imagenet-split --weight-save --log --batch-size --shallow-model --shallow-model-FLOPs --deep-model '
            '--deep-model-FLOPs --threshold-searching --threshold --performance-result --custom-data --weight '
            '--shallow-model-weight --deep-model-weight --num_classes --output'),
    },
}


def section(family: str) -> str:
    text = PAGE.read_text(encoding='utf-8')
    return re.search(rf'^## {family}\n(.*?)(?=^## |\Z)', text, re.DOTALL | re.MULTILINE)[1]


def commands(family: str) -> list[Command]:
    """Commands in the section of a family."""
    start = PAGE.read_text(encoding='utf-8').index(section(family))
    first = PAGE.read_text(encoding='utf-8')[:start].count('\n') + 1
    last = first + section(family).count('\n')
    return [
        command for block in blocks_of(PAGE) if block.language == 'sh' and first <= block.line <= last
        for command in commands_of(block)]


@pytest.mark.parametrize('family', OPTIONS)
def test_every_script_and_option_is_named(family):
    text = section(family)
    names = set(re.findall(r'[\w.-]+', text))
    for scripts, options in OPTIONS[family].items():
        for name in (*scripts.split(', '), *options.split()):
            assert name in names, f'{scripts}: {name}'


def join_model_kwargs(words: list[str]) -> list[str]:
    """Give --model-kwargs once: the parser takes the last."""
    rest, arguments, inside = [], [], False
    for word in words:
        inside = word == '--model-kwargs' or (inside and not word.startswith('-'))
        if word != '--model-kwargs':
            (arguments if inside else rest).append(word)
    return [*rest, '--model-kwargs', *arguments] if arguments else rest


def run_all(family: str, small: dict[str, str], caplog: pytest.LogCaptureFixture, more: str = '') -> dict[str, str]:
    """Run all commands of a section in order.

    Args:
        family: Name of the section.
        small: Words of commands and what stands for them here: small networks, fewer images.
        caplog: The fixture.
        more: Further options of train.py and validate.py.

    Returns:
        What each command printed, by its text.
    """
    printed = {}
    for command in commands(family):
        script, words = script_and_args(command.words)
        words = shlex.split(' '.join(small.get(word, shlex.quote(word)) for word in words))
        settings = f"{SETTINGS[script]} {more if script in ('train', 'validate') else ''}".split()
        words = join_model_kwargs([*settings, *words])
        caplog.clear()
        status = MAINS[script](words)
        assert status == 0, f'{command.text}\n{caplog.text[-3000:]}'
        printed[command.text] = caplog.text
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return printed


def cells(text: str, column: str) -> list[str]:
    """The cells of a column in all printed tables that have it."""
    found: list[str] = []
    span: tuple[int, int] | None = None
    before = ''
    for line in text.splitlines():
        if re.fullmatch(r'-+(  -+)*', line):
            spans = {before[slice(*m.span())].strip(): m.span() for m in re.finditer('-+', line)}
            span = spans.get(column)
        elif not line.strip() or re.match(r'[A-Z]+ {2,}timm', line):  # the end of the table; the next message
            span = None
        elif span:
            found.append(line[slice(*span)].strip())
        before = line
    return found


def fit_head(model: torch.nn.Module, head: torch.nn.Linear, folder: Path) -> None:
    """Fit the classifier of a random network to images by least squares, so that it is better than chance."""
    data = create_dataset('', str(folder))
    config = resolve_data_config(dict(img_size=64, interpolation='bilinear'), model=model)
    transform: Any = create_transform(**config)
    images = torch.stack([transform(image) for image, _ in data])
    target = torch.eye(CLASSES)[[target for _, target in data]]
    inputs: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics are those of the images
    with torch.inference_mode():
        model.train()(images)
        inputs.clear()
        model.eval()(images)
    hook.remove()
    features = inputs[0].clone()
    mean = features.mean(dim=0)
    weight = torch.linalg.lstsq(features - mean, 10 * target - 5, driver='gelsd').solution.T
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ mean)


def test_focusnet(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level('INFO')
    make_images(tmp_path / 'ILSVRC2012', {'train': 6, 'valid': 6}, classes=CLASSES, size=(64, 64))
    small = {'focusnet_resnet34': 'focusnet_resnet18'}  # the same names of keys, half of the bytes
    for arch in ('resnet18', 'mobilenet_v2'):
        net = getattr(torchvision.models, arch)(num_classes=CLASSES)
        fit_head(net, net.fc if arch == 'resnet18' else net.classifier[1], tmp_path / 'ILSVRC2012/valid')
        file = {'epoch': 90, 'arch': arch, 'best_acc1': torch.tensor(70.4)}
        torch.save({**file, 'state_dict': net.state_dict()}, f'clonalnet_{arch}_model_best.pth.tar')
        torch.save({**file, 'state_dict': {f'module.{k}': v for k, v in net.state_dict().items()}},
                   f'baseline_{arch}_model_best.pth.tar')
    optimizer = torch.optim.SGD(torchvision.models.resnet18(num_classes=CLASSES).parameters(), 0.1, momentum=0.9)
    torch.save({**file, 'epoch': 1, 'arch': 'resnet18', 'optimizer': optimizer.state_dict(),
                'state_dict': torch.load('clonalnet_resnet18_model_best.pth.tar')['state_dict']},
               'clonalnet_resnet18_checkpoint.pth.tar')
    small['clonalnet_resnet18_checkpoint.pth.tar'] = 'clonalnet_resnet18_checkpoint.pth.tar --epochs 2'
    baseline = timm.create_model('resnet18', num_classes=CLASSES)
    load_weights(baseline, 'baseline_resnet18_model_best.pth.tar')
    save_pretrained(baseline, tmp_path / 'resnet18')
    small |= dict.fromkeys(('resnet18.tv_in1k', 'resnet34.tv_in1k'), 'local-dir:resnet18')
    printed = run_all('FocusNet', small, caplog, more='--img-size 64')
    for file, text in ((word, text) for command, text in printed.items() for word in command.split()
                       if 'validate.py' in command and word.endswith('.pth.tar')):
        assert cells(text, 'checkpoint')[0] == file
        assert float(cells(text, 'top1')[0]) > 90
    compared = next(text for command, text in printed.items() if '--compare' in command)
    assert cells(compared, 'model') == ['focusnet_resnet18', 'local-dir:resnet18']
    assert len(list((tmp_path / 'output/train').glob('*/best/model.safetensors'))) == 4
    assert len(list((tmp_path / 'output/train').glob('*/baseline/best/model.safetensors'))) == 1


def test_gfnet(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level('INFO')
    make_images(tmp_path / 'IMAGENET', {'train': 6, 'val': 4}, classes=CLASSES, size=(96, 96))
    arguments = dict(backbone='test_resnet', patch_size=64, classifier_hidden=24, policy_hidden=16)
    model = timm.create_model('gfnet', num_classes=CLASSES, **arguments).eval()
    small = {'gfnet_resnet50_96': 'gfnet --model-kwargs ' + ' '.join(f'{k}={v}' for k, v in arguments.items())}
    published = authors_checkpoint(
        model, 'test_resnet', anytime_classification=[60., 70., 72., 73., 74.], model_flops=4.9e8, policy_flops=1e7,
        fc_flops=1e6)
    torch.save(published, 'GFNET.pth.tar')
    for encoder, name in (('model_prime_state_dict', 'GLOBAL.pth'), ('model_state_dict', 'LOCAL.pth')):
        torch.save({k.removeprefix('module.'): v for k, v in published[encoder].items()}, name)
    saved = authors_checkpoint(model, 'test_resnet', prefix='')
    for stage in (1, 2, 3):  # what train.py saves
        folder = tmp_path / f'GF-resnet50_patch-size-96_T5_train-stage{stage}'
        folder.mkdir()
        torch.save({
            'epoch': 60, 'acc': 70., 'best_acc': 70.,
            **{k: saved[k] for k in ('model_state_dict', 'model_prime_state_dict', 'fc')},
            'optimizer': None, 'ppo_optimizer': None, 'policy': saved['policy'] if stage > 1 else None,
        }, folder / 'model_best.pth.tar')
    printed = run_all('GFNet', small, caplog)
    stored, given, fitted, *trained, _ = printed.values()
    assert 'nothing was run' in stored
    assert cells(stored, 'gmacs')[:5] == ['0.500', '1.000', '1.500', '2.000', '2.500']
    assert cells(stored, 'point') == [f'step {t}' for t in range(1, 6)] + ['budget'] * 39
    assert [float(x) for x in cells(stored, 'authors_gmacs')] == [0.49, 0.49, 0.01, 0.001]
    assert cells(given, 'point')[5:] == ['stored'] * 39
    assert cells(fitted, 'point')[5:] == [f'geometric p={p}' for p in range(1, 40)]
    for stage, text in zip(('warmup', 'policy', 'finetune'), trained):
        assert f'Stage {stage}\n' in text
    assert "weights of test_resnet from 'GLOBAL.pth'" in trained[0]
    assert "weights of gfnet from 'GF-resnet50_patch-size-96_T5_train-stage1/model_best.pth.tar'" in trained[1]
    assert "weights of gfnet from 'GF-resnet50_patch-size-96_T5_train-stage2/model_best.pth.tar'" in trained[2]
    for folder in ('gfnet_1/warmup', 'gfnet_2/policy', 'gfnet_3'):
        assert (tmp_path / 'runs' / folder / 'best/model.safetensors').is_file()
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 12


def as_authors_name_it(localizer: AnchorNet) -> dict[str, torch.Tensor]:
    """Weights of an AnchorNet under the original's names, with the two layers that it never uses."""
    block = {'expand.0': 'conv1', 'expand.1': 'bn1', 'depthwise.0': 'conv2', 'depthwise.1': 'bn2', 'se.fc1': 'se.se1',
             'se.fc2': 'se.se2', 'project.0': 'conv3', 'project.1': 'bn3'}
    other = {'stem.0': 'conv1', 'stem.1': 'bn1', 'conv_head': 'exp_conv', 'fc': 'fc'}
    weights = {}
    for key, value in localizer.state_dict().items():
        module, _, leaf = key.rpartition('.')
        match = re.fullmatch(r'blocks\.(\d+)\.(.+)', module)
        name = f'bneck.{match[1]}.{block[match[2]]}' if match else other[module]
        weights[f'{name}.{leaf}'] = value
    weights['bneck.0.conv1.weight'] = torch.randn(16, 16, 1, 1)
    weights.update({f'bneck.0.bn1.{k}': v for k, v in torch.nn.BatchNorm2d(16).state_dict().items()})
    return weights


def test_anchornet(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level('INFO')
    make_images(tmp_path / 'IMAGENET', {'train': 4, 'val': 3}, classes=CLASSES, size=(96, 96))
    model = timm.create_model('anchornet_patch', backbone='test_resnet', patch_size=95, num_classes=CLASSES)
    localizer = as_authors_name_it(model.localizer)
    assert len(localizer) == 164
    torch.save(localizer, 'anchornet.pth')
    torch.save(model.resized.state_dict(), 'densenet201.pth')
    (tmp_path / 'FOLDER').mkdir()
    (tmp_path / 'FOLDER/anchornet.pth').symlink_to(tmp_path / 'anchornet.pth')
    for part in ('resized', 'patch'):
        torch.save({'net': model.get_submodule(part).state_dict(), 'acc': 0.7, 'epoch': 29, 'optimizer': {'state': {}}},
                   tmp_path / f'FOLDER/densenet201_{part}_95_best.pth.tar')
    (tmp_path / 'AUTHORS').mkdir()
    for file in ('anchornet.pth', 'densenet201_resized_95_best.pth.tar'):
        (tmp_path / 'AUTHORS' / file).symlink_to((tmp_path / 'FOLDER' / file).resolve())
    (tmp_path / 'photo.jpg').symlink_to(next((tmp_path / 'IMAGENET/val').rglob('*.png')))
    table = {'setup': 'densenet201_95_[0.3, 0.3, 0.3, 0.3]', 'thresholds': torch.rand(40, 6),
             'predictions': torch.rand(40, 6) > 0.5}
    torch.save(table, 'densenet201_95_0.3_0.pth')
    small = {'anchornet_patch_densenet201_95': 'anchornet_patch --model-kwargs backbone=test_resnet patch_size=95'}
    printed = run_all('AnchorNet', small, caplog)
    made = torch.load('tables/densenet201_95_0.pth', weights_only=True)
    assert made.keys() == table.keys()
    assert made['thresholds'].shape == made['predictions'].shape == (9, 5)
    points = next(text for command, text in printed.items() if '--exit-table' in command)
    for column, expected in (  # as dynamic_inference.py computes them
            ('top1', [100 * table['predictions'][:, t].double().mean() for t in range(5)]),
            ('gmacs', [0.79 * (t + 1) + 0.06 * (t > 0) for t in range(5)])):
        assert cells(points, column)[5:10] == [f'{value:.3f}' for value in expected]
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 9
    assert sorted(path.name for path in (tmp_path / 'photo').iterdir()) == [
        'photo.jpg.json', 'photo.jpg.png', 'photo.jpg.prob.png']


def test_clcnet(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level('INFO')
    make_images(tmp_path / 'IMAGENET', {'val': 10}, classes=CLASSES, size=(64, 64))
    images = sorted((tmp_path / 'IMAGENET/val').rglob('*.png'))
    for i, image in enumerate(images):  # ImageNet's names do not repeat
        images[i] = image.rename(image.with_name(f'ILSVRC2012_val_{i:08d}.png'))
        part = tmp_path / f'imagenet_splits_5/split_part_{i % 5 + 1}' / image.parent.name
        part.mkdir(parents=True, exist_ok=True)
        (part / images[i].name).symlink_to(images[i])
    (tmp_path / 'DATA').symlink_to(tmp_path / 'IMAGENET')
    (tmp_path / 'WEIGHTS').mkdir()
    for k in range(1, 6):
        write_clcnet_zip(tmp_path / f'WEIGHTS/CLCNet_imagenet_split_{k}(MSE_0.10{k}).zip', seed=k)
    members = []
    for name in ('test_resnet', 'test_efficientnet'):
        save_pretrained(timm.create_model(name, num_classes=CLASSES), tmp_path / name)
        members.append(f'local-dir:{name}')
    torch.save(timm.create_model('test_resnet', num_classes=CLASSES).state_dict(), 'SHALLOW.pth')
    torch.save(timm.create_model('test_efficientnet', num_classes=CLASSES).state_dict(), 'DEEP.pth')
    write_clcnet_zip(tmp_path / 'CLCNET.zip')
    cascade = f"clcnet --model-kwargs 'models={json.dumps(members)}'"
    small = dict.fromkeys(('clcnet_tf_efficientnet_b0_b4', 'clcnet_tf_efficientnet_b4_b7'), cascade)
    small['tf_efficientnet_b4'] = members[1]
    small.update({'200': '2', '1000': str(CLASSES)})
    run_all('CLCNet', small, caplog)
    rows = [line.split(',') for line in Path('cls_model_feature.csv').read_text(encoding='utf-8-sig').splitlines()]
    assert sorted(row[0] for row in rows) == sorted(image.name for image in images)
    assert all(len(row) == 1 + CLASSES + 1 and row[-1] in '01' for row in rows)
    assert len(list((tmp_path / 'runs/folds/folds').glob('*.safetensors'))) == 5
    assert (tmp_path / 'runs/custom/confidence_net.safetensors').is_file()
    with open('performance-result.csv') as f:
        swept = [row for row in csv.DictReader(f) if row.get('threshold')]
    assert [float(row['threshold']) for row in swept] == pytest.approx(np.linspace(0.05, 1.01, 49))
    assert {'top1', 'gmacs'} <= swept[0].keys()
    with open('custom-data-result.csv') as f:
        answers = list(csv.DictReader(f))
    assert len(answers) == len(images)
    assert {'file', 'prediction', 'target'} <= answers[0].keys()
