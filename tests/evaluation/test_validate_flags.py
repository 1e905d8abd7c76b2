"""Every option of timm's validate.py, and of ours, has its effect on an evaluation or is refused with advice.

`opened` looks at the model and the loader just before the evaluation, `evaluated` also at its results, `accelerate` at
what reaches Accelerate on a machine with a GPU.
"""
import csv
import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import timm.layers
import torch
from flag_tables import (
    accelerator_kwargs,
    effect,
    fresh_accelerate,
    has,
    make_cascade,
    make_dynamic,
    make_weights,
    marks,
    named,
    refused,
    spellings,
    timm_options,
)
from helpers import make_images

from timm_dynamic import ConfidenceNet
from timm_dynamic.data import ConfidenceFeatures, FoldMap, dataset_factory
from timm_dynamic.evaluation import model_evaluator, run_validation, validate
from timm_dynamic.exits import ExitTable, collect
from timm_dynamic.exits.anchornet_table import save_anchornet_table
from timm_dynamic.launch import build
from timm_dynamic.launch.options import create_validate_parser

BASE = {
    '--data-dir': '{data}', '--model': 'local-dir:{weights}', '--img-size': '32', '-b': '4', '-j': '0',
    '--device': 'cpu',
}


class _Opened(Exception):
    """Ends a validation before it evaluates."""


class Lab:
    """Runs validate.py in this process, on 9 images of 3 classes."""

    def __init__(self, tmp_path, paths, monkeypatch, capsys):
        self.tmp, self.monkeypatch, self.capsys = tmp_path, monkeypatch, capsys
        self.paths = {**paths, '{tmp}': tmp_path}
        self.parser = create_validate_parser()
        self._watch()

    def _watch(self):
        patch = self.monkeypatch.setattr
        create_dataset, create_loader = dataset_factory.create_timm_dataset, build.create_loader
        build_model, evaluate, tqdm = validate.build_model, model_evaluator.evaluate, collect.tqdm

        def watched_create_dataset(name, **kwargs):
            self.seen.opened = kwargs
            remote = name.startswith('wds/')  # what it needs is not installed
            kwargs = {k: kwargs[k] for k in ('root', 'split')} if remote else kwargs
            return create_dataset('' if remote else name, **kwargs)

        def watched_create_loader(*args, **kwargs):
            self.seen.loader_kwargs = kwargs
            return create_loader(*args, **{**kwargs, 'tf_preprocessing': False})  # it needs tensorflow

        def watched_build_model(args, **kwargs):
            self.seen.pretrained = kwargs['pretrained']
            return build_model(args, **kwargs)

        def watched_evaluate(model, loader, accelerator, **kwargs):
            self.seen.model, self.seen.loader, self.seen.accelerator = model, loader, accelerator
            self.seen.classes = kwargs['classes']
            if self.stop:
                raise _Opened
            evaluation = evaluate(model, loader, accelerator, **kwargs)
            self.seen.tables.append(evaluation.table)
            return evaluation

        def watched_tqdm(*args, **kwargs):
            self.seen.bar = kwargs
            return tqdm(*args, **kwargs)

        def watched_compile(model, backend='inductor', mode=None):
            self.seen.compiled.append((backend, mode))
            return model

        patch(dataset_factory, 'create_timm_dataset', watched_create_dataset)
        patch(build, 'create_loader', watched_create_loader)
        patch(validate, 'build_model', watched_build_model)
        patch(model_evaluator, 'evaluate', watched_evaluate)
        patch(collect, 'tqdm', watched_tqdm)
        patch(torch, 'compile', watched_compile)

    def argv(self, *options, drop=()):
        argv = [word for item in BASE.items() if item[0] not in drop for word in item] + [*options]
        for name, path in self.paths.items():
            argv = [word.replace(name, str(path)) for word in argv]
        return argv

    def _run(self, *options, drop=()):
        self.seen = SimpleNamespace(compiled=[], tables=[])
        fresh_accelerate()
        timm.layers.set_fast_norm(False)
        return run_validation(self.argv(*options, drop=drop))

    def opened(self, *options, drop=()):
        """Model and loader of a validation that has not begun to evaluate."""
        self.stop = True
        with pytest.raises(_Opened):
            self._run(*options, drop=drop)
        return self.seen

    def evaluated(self, *options, drop=()):
        """A whole validation."""
        self.stop = False
        rows = self._run(*options, drop=drop)
        return SimpleNamespace(rows=rows, **{**rows[0], **vars(self.seen)})

    def accelerate(self, *options, drop=()):
        """What reaches Accelerate where there is a GPU."""
        return accelerator_kwargs(self.monkeypatch, self.parser.parse_args(self.argv(*options, drop=drop)))


def make_folds(folder):
    """Two confidence nets, and which images of three classes they have not seen."""
    folder.mkdir()
    for k in (1, 2):
        ConfidenceNet().save(folder / f'fold{k}.safetensors')
    names = [f'class{c}/{i:03d}.png' for c in range(3) for i in range(3)]
    FoldMap([names[::2], names[1::2]]).save(folder / 'folds.csv')
    return folder


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp('validate')
    weights, other = make_weights(folder / 'weights'), make_weights(folder / 'other', value=0.5)
    return {
        '{data}': make_images(folder / 'data', {'val': 3, 'extra': 2}),
        '{weights}': weights, '{file}': weights / 'model.safetensors', '{other}': other,
        '{dynamic}': make_dynamic(folder / 'dynamic'), '{kept}': make_dynamic(folder / 'kept', kept=True),
        '{cascade}': make_cascade(folder / 'cascade'),
        '{folds}': make_folds(folder / 'folds'), '{net}': folder / 'folds/fold1.safetensors',
    }


@pytest.fixture
def lab(tmp_path, paths, monkeypatch, capsys):
    yield Lab(tmp_path, paths, monkeypatch, capsys)
    timm.layers.set_fast_norm(False)


opened, evaluated, accelerate = (partial(effect, start) for start in ('opened', 'evaluated', 'accelerate'))


# What to look at

def num_images(seen):
    return len(seen.loader.dataset)


def batch(seen):
    return next(iter(seen.loader))[0]


def logits_dtype(seen):
    with seen.accelerator.autocast():
        return seen.model(batch(seen)).dtype


def color_mode(seen):
    """In which images are read."""
    seen.loader.dataset.transform = None
    return seen.loader.dataset[0][0].mode


def transform(seen):
    return seen.loader.dataset.transform


def torch_loader(seen):
    return getattr(seen.loader, 'loader', seen.loader)


def dataset_kwarg(key):
    return lambda seen: seen.opened[key]


# Checks that take more than a line

def class_map(lab, flag):
    (lab.tmp / 'classes.txt').write_text('class2\nclass1\nclass0\n')
    opened(lambda seen: seen.loader.class_to_idx['class0'], '{tmp}/classes.txt', gives=2)(lab, flag)


def pretrained(lab, flag):
    """Only beside --checkpoint does it make a difference, as in timm; without, it is implied."""
    opened(lambda seen: seen.pretrained, gives=True, base=['--checkpoint', '{file}'])(lab, flag)
    assert lab.opened().pretrained


def use_train_size(lab, flag):
    folder = make_weights(lab.tmp / 'bigger')
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg'].update(input_size=[3, 32, 32], test_input_size=[3, 48, 48])
    (folder / 'config.json').write_text(json.dumps(config))
    opened(lambda seen: batch(seen).shape[-1], gives=32, base=['--model', f'local-dir:{folder}'],
           drop=['--img-size'])(lab, flag)


def use_ema(lab, flag):
    plain, averaged = (timm.create_model(f'local-dir:{lab.paths[name]}', pretrained=True).state_dict()
                       for name in ('{weights}', '{other}'))
    torch.save({'state_dict': plain, 'state_dict_ema': averaged}, lab.tmp / 'both.pth.tar')
    opened(lambda seen: marks(seen.model), gives=(0.5, 0.5), base=['--checkpoint', '{tmp}/both.pth.tar'])(lab, flag)


def device(lab, flag):
    accelerate(lambda kwargs: kwargs['cpu'], 'cpu', gives=True, drop=[flag])(lab, flag)
    with pytest.raises(ValueError, match='there is no such device'):
        lab.opened(flag, 'xpu')


def amp(lab, flag):
    accelerate(lambda kwargs: kwargs['mixed_precision'], gives='fp16', drop=['--device'])(lab, flag)
    evaluated(logits_dtype, gives=torch.bfloat16, base=['--amp-dtype', 'bfloat16'])(lab, flag)
    with pytest.raises(ValueError, match='--amp-dtype bfloat16'):
        lab.opened(flag)


def model_dtype(lab, flag):
    def dtypes(seen):
        return next(seen.model.parameters()).dtype
    for more in ([], ['--no-prefetcher']):
        evaluated(dtypes, 'bfloat16', gives=torch.bfloat16, base=more)(lab, flag)


def reparam(lab, flag):
    name = 'repghostnet_050'
    torch.save(timm.create_model(name, num_classes=3).state_dict(), lab.tmp / 'rep.pth')
    opened(lambda seen: sum(isinstance(m, torch.nn.BatchNorm2d) for m in seen.model.modules()), gives=lambda n: n < 60,
           base=['--model', name, '--num-classes', '3', '--checkpoint', '{tmp}/rep.pth'])(lab, flag)


def results_file(lab, flag):
    row, = lab.evaluated(flag, '{tmp}/results.csv').rows
    header, values = (lab.tmp / 'results.csv').read_text().splitlines()
    assert header.startswith('model,top1,top1_err,top5,top5_err,')
    assert values.split(',')[1] == str(row['top1'])


def results_format(lab, flag):
    rows = lab.evaluated('--results-file', '{tmp}/results', flag, 'json').rows
    assert json.loads((lab.tmp / 'results').read_text()) == rows
    lab.evaluated('--results-file', '{tmp}/results')
    assert (lab.tmp / 'results').read_text().startswith('model,')


def real_labels(lab, flag):
    """With every class right for every image, and one image without any label, which does not count."""
    for i, path in enumerate(sorted(make_images(lab.tmp / 'real', {'val': 3}).rglob('*.png')), 1):
        path.rename(path.with_name(f'ILSVRC2012_val_{i:08d}.JPEG'))
    (lab.tmp / 'real.json').write_text(json.dumps([[]] + [[0, 1, 2]] * 8))
    evaluated(lambda seen: seen.top1, '{tmp}/real.json', gives=100, base=['--data-dir', '{tmp}/real'])(lab, flag)
    (lab.tmp / 'wrong.json').write_text(json.dumps([[]] + [[7]] * 8))
    assert lab.evaluated('--data-dir', '{tmp}/real', flag, '{tmp}/wrong.json').top1 == 0


def valid_labels(lab, flag):
    (lab.tmp / 'valid.txt').write_text('3\n4\n0\n')
    base = ['--num-classes', '5']
    evaluated(lambda seen: None if seen.classes is None else seen.classes.tolist(), '{tmp}/valid.txt', gives=[3, 4, 0],
              base=base)(lab, flag)
    (lab.tmp / 'valid.txt').write_text('3\n4\n')
    with pytest.raises(ValueError, match='has 3 classes'):
        lab.opened(*base, flag, '{tmp}/valid.txt')


def device_modules(lab, flag):
    (lab.tmp / 'imported_by_validate.py').write_text('')
    lab.monkeypatch.syspath_prepend(lab.tmp)
    lab.opened(flag, 'imported_by_validate')
    assert sys.modules.pop('imported_by_validate')


def retry(lab, flag):
    evaluate, sizes = model_evaluator.evaluate, []

    def out_of_memory(model, loader, *args, **kwargs):
        sizes.append(loader.loader.batch_size)
        if sizes[-1] > 2:
            raise RuntimeError('CUDA out of memory. Tried to allocate')
        return evaluate(model, loader, *args, **kwargs)

    lab.monkeypatch.setattr(model_evaluator, 'evaluate', out_of_memory)
    assert lab.evaluated(flag).images == 9
    assert sizes == [4, 3, 2]
    with pytest.raises(RuntimeError, match='out of memory'):
        lab.evaluated()


def seed(lab, flag):
    """It decides over the classifier where the weights have none, and over the order of iterable datasets."""
    opened(dataset_kwarg('seed'), '7', gives=7, base=REMOTE)(lab, flag)
    values = ([], [flag, '0'], [flag, '7'], [flag, '7'])
    default, explicit, seven, again = (lab.opened('--num-classes', '5', *v).model.fc.weight for v in values)
    assert torch.equal(default, explicit)
    assert torch.equal(seven, again)
    assert not torch.isclose(default, seven).all()


def dynamic(probe, *value, gives, base=()):
    """The effect on a dynamic model."""
    return evaluated(probe, *value, gives=gives, base=[*DYNAMIC, *base])


def points(seen):
    return [row['point'] for row in seen.rows if 'point' in row]


def last(key):
    return lambda seen: seen.rows[-1].get(key)


def anytime(lab, flag):
    """It is what dynamic models get anyway, and nothing that others can be asked for."""
    for given in ([flag], []):
        assert points(lab.evaluated(*DYNAMIC, *given)) == ['step 1', 'step 2', 'step 3']
    with pytest.raises(ValueError, match=f'{flag}: .* makes one prediction'):
        lab.opened(flag)


def stored_results(lab, flag):
    """Without data, unless something else is asked for, too."""
    row, = lab._run('--model', 'local-dir:{kept}', flag, drop=['--data-dir'])
    assert (row['point'], row['top1'], lab.seen.tables) == ('budget', 77, [])
    seen = lab.evaluated('--model', 'local-dir:{kept}', flag, '--anytime')
    assert points(seen) == ['step 1', 'step 2', 'step 3', 'budget']
    assert points(lab.evaluated('--model', 'local-dir:{kept}')) == ['step 1', 'step 2', 'step 3']


def calibrate_augment(lab, flag):
    """Only the images to fit on are random views, the same in every run and for every number of workers."""
    base = [*DYNAMIC, '--budget', '0.001', '--calibrate-split', 'extra']
    plain = lab.evaluated(*base).tables[-2:]
    views, more = (lab.evaluated(*base, flag, '-j', workers).tables[-2:] for workers in ('0', '2'))
    assert torch.equal(views[0].confidence, plain[0].confidence)
    assert not torch.equal(views[1].confidence, plain[1].confidence)
    assert torch.equal(views[1].confidence, more[1].confidence)
    other = lab.evaluated(*base, flag, '--no-prefetcher').tables[-1]
    torch.testing.assert_close(views[1].confidence, other.confidence)
    with pytest.raises(ValueError, match='needs images to fit on that are not evaluated on'):
        lab.evaluated(*DYNAMIC, '--budget', '0.001', '--calibrate-split', 'half', flag)
    with pytest.raises(ValueError, match='not for cascades'):
        lab.evaluated(*CASCADE, '--budget', '0.001', '--calibrate-split', 'extra', flag)
    with pytest.raises(SystemExit):
        lab.evaluated(*base[:2], flag)


def exit_table(lab, flag):
    lab.evaluated(*DYNAMIC, '--save-exit-table', '{tmp}/t.safetensors')
    seen = lab._run('--thresholds', '0.34', '0.34', '0', flag, '{tmp}/t.safetensors', drop=['--data-dir', '--model'])
    assert lab.seen.tables == []
    again = lab.evaluated(*DYNAMIC, '--thresholds', '0.34', '0.34', '0').rows
    for key in ('top1', 'gmacs', 'exit_shares'):
        assert seen[-1][key] == again[-1][key]


def calibrate_table(lab, flag):
    lab.evaluated(*DYNAMIC, '--split', 'extra', '--save-exit-table', '{tmp}/t.safetensors')
    dynamic(last('fitted_on'), '{tmp}/t.safetensors', gives=has('t.safetensors'), base=['--budget', '0.001'])(lab, flag)
    assert len(lab.evaluated(*DYNAMIC, '--budget', '0.001', flag, '{tmp}/t.safetensors').tables) == 1


def save_exit_table(lab, flag):
    table, = lab.evaluated(*DYNAMIC, flag, '{tmp}/new/t.safetensors').tables
    saved = ExitTable.load(lab.tmp / 'new/t.safetensors')
    assert torch.equal(saved.confidence, table.confidence)
    assert saved.step_macs == table.step_macs


def cross_validated(seen):
    return seen.rows[0].get('cross_validated')


def strict(lab, flag):
    """Confidences that are just the threshold do not stop."""
    ExitTable([[0.5, 0.7], [0.6, 0.7]], torch.ones(2, 2, dtype=torch.bool), [1, 2]).save(lab.tmp / 't.st')
    shares = [lab._run('--exit-table', '{tmp}/t.st', '--thresholds', '0.5', '0', *given,
                       drop=['--data-dir', '--model'])[-1]['exit_shares'] for given in ([], [flag])]
    assert shares == [[1, 0], [0.5, 0.5]]


def steps(lab, flag):
    _anchornet_table(lab)
    rows = lab._run('--exit-table', '{tmp}/t.pth', flag, '2', drop=['--data-dir', '--model'])
    assert [row.get('point') for row in rows] == [None, 'step 1', 'step 2']


def anchor_gmacs(lab, flag):
    _anchornet_table(lab)
    for given, charge in (([], 0.06), ([flag, '0.08'], 0.08)):
        rows = lab._run('--exit-table', '{tmp}/t.pth', *given, drop=['--data-dir', '--model'])
        assert [row['gmacs'] for row in rows[1:]] == pytest.approx([0.79, 1.58 + charge, 2.37 + charge])


def _anchornet_table(lab):
    table = ExitTable([[0.5, 0.7, 0.8]], [[True] * 3], [1, 2, 3])
    save_anchornet_table(table, lab.tmp / 't.pth', 'densenet201_95_[0.3]')


def save_budgets(lab, flag):
    rows = lab.evaluated(*DYNAMIC, flag, '{tmp}/kept', '--budget', '0.001', '0.0015').rows
    model = timm.create_model(f'local-dir:{lab.tmp / "kept"}', pretrained=True)
    source = timm.create_model(f'local-dir:{lab.paths["{dynamic}"]}', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))
    assert [b['evaluated']['top1'] for b in model.exit_cfg['budgets']] == [row['top1'] for row in rows[-2:]]
    assert model.set_budget(gmacs=0.001)['policy'] == pytest.approx(rows[-2]['thresholds'])
    grid = lab.evaluated(*DYNAMIC, flag, '{tmp}/grid').rows  # without --budget
    model = timm.create_model(f'local-dir:{lab.tmp / "grid"}', pretrained=True)
    assert len(model.exit_cfg['budgets']) == points(SimpleNamespace(rows=grid)).count('budget') >= 1


def save_features(lab, flag):
    """Of a static model: the authors' format, and ours."""
    seen = lab.evaluated(flag, '{tmp}/new/f.csv')
    lab.evaluated(flag, '{tmp}/f.safetensors')
    with torch.inference_mode():
        logits = torch.cat([seen.model(x) for x, _ in seen.loader])
    names = [f'class{c}/{i:03d}.png' for c in range(3) for i in range(3)]
    target = torch.arange(3).repeat_interleave(3)
    expected = ConfidenceFeatures.from_logits(logits, target, names)
    assert expected.correct.float().mean().item() == pytest.approx(seen.top1 / 100, abs=1e-6)
    ours, csv_file = ConfidenceFeatures.load(lab.tmp / 'f.safetensors'), ConfidenceFeatures.load(lab.tmp / 'new/f.csv')
    assert ours.names == names
    assert csv_file.names == [name.partition('/')[2] for name in names]
    for features in (ours, csv_file):
        torch.testing.assert_close(features.probabilities, expected.probabilities)
        assert torch.equal(features.correct, expected.correct)
    with pytest.raises(ValueError, match=r'of a cascade.s members are written by train\.py --stage features'):
        lab.opened(*CASCADE, flag, '{tmp}/f.csv')


def save_predictions(lab, flag):
    lab.evaluated(*DYNAMIC, flag, '{tmp}/answers.csv')
    rows = list(csv.DictReader((lab.tmp / 'answers.csv').open()))
    assert [int(row['target']) for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    assert {row['steps_used'] for row in rows} == {'3'}


def curve(lab, flag):
    """With steps, budgets and the static models."""
    drawn = {}
    lab.monkeypatch.setattr(
        validate, 'plot_accuracy_over_macs',
        lambda path, curves, points, title, static, images: drawn.update(
            curves=curves, points=points, title=title, static=static, images=images))
    seen = lab.evaluated(*DYNAMIC, '--geometric', '--compare', 'local-dir:{other}', flag, '{tmp}/c.png')
    name = '/'.join(lab.paths['{dynamic}'].parts[-2:])
    assert list(drawn['curves']) == [f'{name}: steps', f'{name}: budgets, fitted on all']
    assert drawn['title'] == 'evaluated on validation'
    other = '/'.join(lab.paths['{other}'].parts[-2:])
    assert list(drawn['points']) == [f'{name}: geometric']
    assert list(drawn['static']) == [other]
    assert drawn['images'] == 9  # all of them: cross-fitted
    (gmacs, top1), = drawn['static'][other]
    assert (round(gmacs, 6), top1) == (seen.rows[1]['gmacs'], seen.rows[1]['top1'])
    lab.monkeypatch.undo()
    assert run_validation(lab.argv(*DYNAMIC, flag, '{tmp}/c.png'))
    assert (lab.tmp / 'c.png').read_bytes().startswith(b'\x89PNG')


# The tables

DYNAMIC = ['--model', 'local-dir:{dynamic}']
CASCADE = ['--model', 'local-dir:{cascade}']
DEMO = ['--dataset', 'cluttered_digits', '--num-classes', '10', '--demo-img-size', '48']
REMOTE = ['--dataset', 'wds/somewhere']
NAFLEX = refused('python -m timm_dynamic', 'validate.py --naflex-loader')

VALIDATE = {
    'data': opened(num_images, '{data}', gives=9, base=DEMO[2:], drop=['--data-dir']),
    '--data-dir': opened(num_images, '{data}', gives=9, base=DEMO[2:], drop=['--data-dir']),
    '--dataset': opened(lambda seen: type(seen.loader.dataset).__name__, 'torch/image_folder', gives='ImageFolder'),
    '--split': opened(num_images, 'extra', gives=6),
    '--num-samples': opened(num_images, '20', gives=20, base=DEMO),
    '--dataset-download': opened(dataset_kwarg('download'), gives=True, base=REMOTE),
    '--class-map': class_map,
    '--input-key': opened(dataset_kwarg('input_key'), 'jpg', gives='jpg', base=REMOTE),
    '--input-img-mode': opened(color_mode, 'HSV', gives='HSV'),
    '--target-key': opened(dataset_kwarg('target_key'), 'cls', gives='cls', base=REMOTE),
    '--dataset-trust-remote-code': opened(dataset_kwarg('trust_remote_code'), gives=True, base=REMOTE),
    '--model -m': opened(lambda seen: marks(seen.model), 'local-dir:{other}', gives=(0.5, 0.5)),
    '--pretrained': pretrained,
    '-j --workers': opened(lambda seen: torch_loader(seen).num_workers, '1', gives=1),
    '-b --batch-size': opened(lambda seen: len(batch(seen)), '6', gives=6),
    '--img-size': evaluated(lambda seen: batch(seen).shape[1:], '48', gives=(3, 48, 48)),
    '--in-chans': evaluated(lambda seen: batch(seen).shape[1], '1', gives=1),
    '--input-size': evaluated(
        lambda seen: batch(seen).shape[1:], '3', '24', '40', gives=(3, 24, 40), drop=['--img-size']),
    '--use-train-size': use_train_size,
    '--crop-pct': opened(transform, '0.5', gives=has('Resize(size=64')),
    '--crop-mode': opened(transform, 'border', gives=has('CenterCropOrPad')),
    '--crop-border-pixels': evaluated(transform, '4', gives=has('TrimBorder')),
    '--mean': evaluated(lambda seen: batch(seen).mean(), '-10', '-10', '-10', gives=lambda mean: mean > 10),
    '--std': evaluated(lambda seen: batch(seen).std(), '10', '10', '10', gives=lambda std: std < 0.1),
    '--interpolation': opened(transform, 'nearest', gives=has('interpolation=nearest')),
    '--num-classes': opened(lambda seen: seen.model(batch(seen)).shape[1], '5', gives=5),
    '--gp': opened(lambda seen: seen.model.global_pool.pool_type, 'max', gives='max'),
    '--log-freq': evaluated(lambda seen: seen.bar['miniters'], '3', gives=3),
    '--checkpoint': opened(lambda seen: marks(seen.model), '{file}', gives=(0.25, 0.25),
                           base=['--model', 'local-dir:{other}']),
    '--num-gpu': refused('accelerate launch --num_processes'),
    '--test-pool': evaluated(lambda seen: (type(seen.model).__name__, seen.crop_pct), gives=('TestTimePoolHead', 1.0),
                             base=['--img-size', '192']),
    '--no-prefetcher': evaluated(lambda seen: type(seen.loader).__name__, gives='DataLoader'),
    '--pin-mem': opened(lambda seen: torch_loader(seen).pin_memory, gives=True),
    '--channels-last': evaluated(
        lambda seen: seen.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last), gives=True),
    '--device': device,
    '--amp': amp,
    '--amp-dtype': accelerate(lambda kwargs: kwargs['mixed_precision'], 'bfloat16', gives='bf16', base=['--amp'],
                              drop=['--device']),
    '--model-dtype': model_dtype,
    '--tf-preprocessing': opened(lambda seen: seen.loader_kwargs['tf_preprocessing'], gives=True),
    '--use-ema': use_ema,
    '--fuser': refused('--torchcompile'),
    '--fast-norm': opened(lambda seen: timm.layers.is_fast_norm(), gives=True),
    '--reparam': reparam,
    '--model-kwargs': opened(lambda seen: type(seen.model.act1).__name__, 'act_layer=gelu', gives='GELU'),
    '--torchcompile-mode': opened(lambda seen: seen.compiled, 'max-autotune', gives=[('inductor', 'max-autotune')],
                                  base=['--torchcompile']),
    '--torchscript': refused('--torchcompile'),
    '--torchcompile': opened(lambda seen: seen.compiled, 'aot_eager', gives=[('aot_eager', None)]),
    '--aot-autograd': refused('--torchcompile aot_eager'),
    '--results-file': results_file,
    '--results-format': results_format,
    '--real-labels': real_labels,
    '--valid-labels': valid_labels,
    '--retry': retry,
    '--seed': seed,
    '--metrics-avg': evaluated(lambda seen: {'precision', 'recall', 'f1_score'} <= seen.rows[0].keys(), 'macro',
                               gives=True),
    '--naflex-loader': NAFLEX,
    '--naflex-max-seq-len': NAFLEX,
}
OURS = {
    '--demo-digit-scale': opened(
        lambda seen: list(seen.loader.dataset.digit_scale), '12', '20', gives=[12, 20], base=DEMO),
    '--demo-img-size': opened(lambda seen: seen.loader.dataset.img_size, '64', gives=64, base=DEMO),
    '--demo-clutter': opened(lambda seen: seen.loader.dataset.clutter, '0.25', gives=0.25, base=DEMO),
    '--compare': evaluated(lambda seen: [row['model'].rpartition('/')[2] for row in seen.rows], 'local-dir:{other}',
                           gives=['weights', 'other']),
    '--device-modules': device_modules,
    '--anytime': anytime,
    '--budget': dynamic(lambda seen: [row.get('budget') for row in seen.rows][4:], '0.001', '0.0015',
                        gives=[0.001, 0.0015]),
    '--budget-rule': dynamic(lambda seen: 'thresholds' in seen.rows[-1], 'value', gives=False,
                             base=['--budget', '0.0015']),
    '--thresholds': dynamic(lambda seen: (points(seen)[-1], last('exit_shares')(seen)), '2', '0', '0',
                            gives=('thresholds', [0, 1, 0])),
    '--strict': strict,
    '--steps': steps,
    '--anchor-gmacs': anchor_gmacs,
    '--geometric': dynamic(lambda seen: len(points(seen)), gives=3 + 39),
    '--stored-results': stored_results,
    '--stored-thresholds': dynamic(
        lambda seen: [(row['point'], row['exit_shares']) for row in seen.rows if 'exit_shares' in row],
        gives=[('stored', [0, 0, 1])], base=['--model', 'local-dir:{kept}']),
    '--calibrate-split': dynamic(last('fitted_on'), 'extra', gives='extra', base=['--budget', '0.001']),
    '--calibrate-samples': dynamic(lambda seen: len(seen.tables[-1]), '5', gives=5,
                                   base=['--budget', '0.001', '--calibrate-split', 'extra']),
    '--calibrate-augment': calibrate_augment,
    '--exit-table': exit_table,
    '--calibrate-table': calibrate_table,
    '--save-exit-table': save_exit_table,
    '--save-budgets': save_budgets,
    '--curve': curve,
    '--confidence': evaluated(lambda seen: sum('area' in row for row in seen.rows), 'all', gives=10, base=CASCADE),
    '--fold-nets': evaluated(cross_validated, '{folds}', gives=True, base=CASCADE),
    '--fold-dir': evaluated(
        cross_validated, '{folds}/folds.csv', gives=True, base=[*CASCADE, '--fold-nets', '{net}', '{net}']),
    '--final-rule': evaluated(
        lambda seen: seen.model.final_rule, 'last', gives='last', base=[*CASCADE, '--confidence', 'max_prob']),
    '--save-predictions': save_predictions,
    '--save-features': save_features,
    '--threshold-sweep': dynamic(lambda seen: points(seen).count('sweep'), gives=49),
}


@pytest.mark.parametrize(('name', 'flag'), spellings(VALIDATE | OURS))
def test_option(lab, name, flag):
    (VALIDATE | OURS)[name](lab, flag)


def test_no_option_is_forgotten():
    assert sorted(VALIDATE) == sorted(timm_options('validate.py'))
    assert {flag for name in VALIDATE | OURS for flag in name.split()} == named(create_validate_parser())
