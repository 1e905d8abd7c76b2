"""validate.py on dynamic models: what exits are fitted on, what models keep, several processes, bad input."""
import csv
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from flag_tables import fresh_accelerate, make_dynamic, make_weights
from forked import run_forked
from helpers import SHARED, make_images
from timm.data import create_loader
from torchvision.datasets import FakeData

from timm_dynamic.data import create_dataset
from timm_dynamic.data.image_names import image_names
from timm_dynamic.evaluation import run_validation, validate_main
from timm_dynamic.evaluation.calibration import share_images
from timm_dynamic.exits import ExitTable, early_exit
from timm_dynamic.launch.build import build_eval_loader
from timm_dynamic.launch.options import create_validate_parser
from timm_dynamic.utils import save_pretrained


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A GFNet, a static net, and images in odd numbers."""
    folder = tmp_path_factory.mktemp('dynamic')
    make_dynamic(folder / 'net')
    make_weights(folder / 'static')
    make_images(folder / 'data', {'train': 7, 'val': 5, 'test': 3}, size=(32, 32))
    return folder


@pytest.fixture
def run(folder):
    def run(*options, model='net', data='data'):
        fresh_accelerate()
        return run_validation([
            '--model', f'local-dir:{folder / model}', '--data-dir', str(folder / data), '--img-size', '32', '-b', '4',
            '-j', '0', '--device', 'cpu', *map(str, options)])
    return run


@pytest.fixture
def says(run, capsys):
    """Runs what must be an error, and gives what it says."""
    def says(*options, **kwargs):
        with pytest.raises((SystemExit, ValueError)) as e:
            run(*options, **kwargs)
        return capsys.readouterr().err if e.type is SystemExit else str(e.value)
    return says


@pytest.fixture(scope='module')
def net(folder):
    return timm.create_model(f'local-dir:{folder / "net"}', pretrained=True).eval()


def of(rows, point):
    return [row for row in rows if row.get('point') == point]


# What exits are fitted on

@pytest.mark.parametrize(('split', 'fitted_on', 'images'), [
    ('validation', 'train', 15), ('test', 'validation', 9), ('train', 'validation', 21), ('val', 'train', 15)])
def test_exits_are_fitted_on_another_split(run, caplog, split, fitted_on, images):
    caplog.set_level('INFO')
    asked = ['--calibrate-split', 'train'] if fitted_on == 'train' else []
    row, = of(run('--budget', 0.001, '--split', split, *asked), 'budget')
    assert (row['split'], row['fitted_on'], row['images'], row['budget']) == (split, fitted_on, images, 0.001)
    assert f'fitted on {fitted_on} (' in caplog.text
    assert f'evaluated on {split} ({images} images)' in caplog.text
    assert ('may have been trained on' in caplog.text) == (fitted_on == 'train')


@pytest.mark.parametrize(('data', 'split'), [('data', 'validation'), ('data', 'val'), ('data/val', 'validation')])
def test_without_another_split_exits_are_cross_fitted(run, caplog, data, split):
    """Not on the training split, whose images the model has learned. For timm, a folder without splits is any split."""
    caplog.set_level('INFO')
    row, = of(run('--budget', 0.001, '--split', split, data=data), 'budget')
    assert (row['fitted_on'], row['split'], row['images']) == (
        f'all of {split}', f'{split}, cross-fitted in halves', 15)


def test_where_one_policy_is_needed_one_half_is_judged(run, caplog, tmp_path):
    caplog.set_level('INFO')
    row, = of(run('--budget', 0.001, '--save-predictions', tmp_path / 'p.csv'), 'budget')
    assert (row['fitted_on'], row['split'], row['images']) == (
        'a random half of validation', 'the other half of validation', 7)
    assert 'fitted on a random half of validation (8 images), evaluated on the other half' in caplog.text


def test_half_can_be_asked_for(run):
    rows = run('--budget', 0.001, '--calibrate-split', 'half')
    assert of(rows, 'budget')[0]['fitted_on'] == 'a random half of validation'
    assert [row['images'] for row in of(rows, 'step 1')] == [15]  # steps are not fitted


def test_a_folder_without_the_validation_split_is_cross_fitted(run, folder):
    shutil.copytree(folder / 'data', folder / 'two', ignore=shutil.ignore_patterns('val'))
    row, = of(run('--budget', 0.001, '--split', 'test', data='two'), 'budget')
    assert row['fitted_on'] == 'all of test'


def test_splits_of_torchvision_that_are_one():
    """To timm, 'test' and 'validation' of CIFAR are the same images."""
    assert share_images(FakeData(size=3), FakeData(size=3))
    assert not share_images(FakeData(size=3), FakeData(size=4))


def test_the_demo_set(folder, capsys):
    torch.manual_seed(0)
    rows = run_validation([
        '--model', f'local-dir:{folder / "net"}', '--num-classes', '10', '--img-size', '32', '--num-samples', '20',
        '--demo-digit-scale', '10', '12', '--calibrate-samples', '30', '--budget', '0.0015', '--split', 'test',
        '-j', '0', '--device', 'cpu'])
    assert [row['images'] for row in rows] == [20] * 5
    assert rows[-1]['fitted_on'] == 'validation'


def test_random_samples(folder):
    args = create_validate_parser().parse_args([
        '--data-dir', str(folder / 'data'), '--device', 'cpu', '-j', '0', '-b', '4', '--seed', '3'])
    config = dict(input_size=(3, 32, 32), interpolation='bilinear', mean=(0.,) * 3, std=(1.,) * 3, crop_pct=1.,
                  crop_mode='center')

    def names(num, seed=3):
        args.seed = seed
        loader = build_eval_loader(args, 'train', config, 3, torch.device('cpu'), random_samples=num)
        return image_names(loader.dataset, 'train')

    assert len(set(names(11))) == 11
    assert names(11) == names(11) == sorted(names(11))
    assert names(11) != names(11, seed=4)
    assert len(names(50)) == 21


# What is shown

def test_the_row_is_what_forward_gives(run, folder, net, tmp_path):
    """All steps; or, with exits set in the model, these."""
    rows = run('--save-exit-table', tmp_path / 't.st')
    assert rows[0]['gmacs'] == round(net.step_macs[2] / 1e9, 6)
    assert rows[0]['top1'] == of(rows, 'step 3')[0]['top1']
    thresholds = ExitTable.load(tmp_path / 't.st').confidence.median(dim=0).values.tolist()
    changed = timm.create_model(f'local-dir:{folder / "net"}', pretrained=True)
    changed.set_exit(thresholds)
    save_pretrained(changed, folder / 'exits')
    row, *points = run('--stored-thresholds', model='exits')
    given = of(run('--thresholds', *thresholds), 'thresholds')[0]
    assert 0 < given['exit_shares'][0] < 1
    for key in ('top1', 'top5', 'gmacs'):
        assert row[key] == of(points, 'in use')[0][key] == given[key]
    assert [p['gmacs'] for p in points[:3]] == [round(m / 1e9, 6) for m in net.step_macs]


def test_a_row_is_what_running_it_gives(run, folder, net, tmp_path):
    """Thresholds of the table, given to the model itself on the same images."""
    rows = run(
        '--geometric', '--calibrate-split', 'train', '--results-file', tmp_path / 'r.csv', '--save-exit-table',
        tmp_path / 't.st')
    row, = of(rows, 'geometric p=20')
    config = net.pretrained_cfg
    loader = create_loader(
        create_dataset('', root=folder / 'data', split='validation'), (3, 32, 32), 15, use_prefetcher=False,
        crop_pct=config['crop_pct'], interpolation=config['interpolation'], mean=config['mean'], std=config['std'])
    (x, target), = loader
    result = early_exit(net, x, row['thresholds'])
    assert len(result.steps_used.unique()) > 1
    cost = sum(net.step_macs[t - 1] for t in result.steps_used.tolist()) / 15e9
    assert cost == pytest.approx(row['gmacs'], abs=1e-6)
    assert 100 * (result.logits.argmax(1) == target).double().mean().item() == pytest.approx(row['top1'], abs=1e-3)
    # and the file has all of it
    kept = list(csv.DictReader((tmp_path / 'r.csv').open()))
    assert [float(v) for v in kept[4 + 19]['thresholds'].split()] == row['thresholds']
    assert (kept[-1]['fitted_on'], kept[-1]['split'], kept[0]['point']) == ('train', 'validation', '')
    assert len(ExitTable.load(tmp_path / 't.st')) == 15


def test_static_models_stand_beside(run, folder):
    rows = run('--compare', f'local-dir:{folder / "static"}', '--budget', 0.001)
    assert [bool(row['gmacs']) for row in rows[:2]] == [True, True]
    assert {row['model'] for row in rows if 'point' in row} == {f'local-dir:{folder / "net"}'}
    rows = run('--compare', f'local-dir:{folder / "net"}', model='static')  # the other way round
    assert [row.get('point') for row in rows] == [None, None, 'step 1', 'step 2', 'step 3']


def test_several_processes(folder, run, tmp_path):
    """To the byte what one process gives, on an odd number of images."""
    options = ['--budget', '0.001', '0.0013', '--calibrate-split', 'train', '--calibrate-samples', '16', '--geometric',
               '--metrics-avg', 'macro', '--results-format', 'json']
    rows = run(*options, '--results-file', tmp_path / 'one.json', '--save-exit-table', tmp_path / 'one.st')
    assert [row['images'] for row in rows] == [15] * (1 + 3 + 2 + 39)
    run_forked(
        validate_main, '--model', f'local-dir:{folder / "net"}', '--data-dir', folder / 'data', '--img-size', 32,
        '-b', 4, '-j', 0, '--device', 'cpu', *options, '--results-file', tmp_path / 'two.json',
        '--save-exit-table', tmp_path / 'two.st', '--save-budgets', tmp_path / 'kept', processes=2, folder=tmp_path)
    one, two = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('one', 'two'))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert {k: v for k, v in a.items() if k != 'loss'} == {k: v for k, v in b.items() if k != 'loss'}
    assert torch.equal(*(ExitTable.load(tmp_path / f'{name}.st').correct for name in ('one', 'two')))
    assert len(timm.create_model(f'local-dir:{tmp_path / "kept"}', pretrained=True).exit_cfg['budgets']) == 2


# What models keep

def test_stored_fresh_and_stored_results_agree(run, tmp_path):
    """The three ways to evaluate of the original: fit and keep, then read, then run again."""
    kept = run('--budget', 0.001, 0.0013, '--calibrate-split', 'train', '--save-budgets', tmp_path / 'kept')
    fresh = of(kept, 'budget')
    shown = run('--stored-results', model=tmp_path / 'kept')
    again = of(run('--stored-thresholds', model=tmp_path / 'kept'), 'stored')
    assert len(fresh) == len(shown) == len(again) == 2
    for rows in zip(fresh, shown, again):
        for key in ('top1', 'top5', 'gmacs', 'exit_shares', 'thresholds', 'split', 'fitted_on'):
            assert rows[0][key] == rows[1][key] == rows[2][key], key


def test_stored_exits_evaluated_where_they_were_fitted(run, tmp_path, caplog):
    caplog.set_level('INFO')
    run('--budget', 0.001, '--calibrate-split', 'train', '--save-budgets', tmp_path / 'kept')
    for split, noted in (('test', False), ('train', True)):
        caplog.clear()
        run('--stored-thresholds', '--split', split, model=tmp_path / 'kept')
        assert ('Some were fitted on a split train: on the same images' in caplog.text) == noted


def test_policies_can_be_kept(run, tmp_path):
    fresh, = of(run('--budget', 0.0013, '--budget-rule', 'value', '--save-budgets', tmp_path / 'kept'), 'budget')
    again, = of(run('--stored-thresholds', model=tmp_path / 'kept'), 'stored')
    assert 'thresholds' not in again
    assert (again['top1'], again['exit_shares']) == (fresh['top1'], fresh['exit_shares'])
    assert 'thresholds' not in run('--stored-results', model=tmp_path / 'kept')[0]


def authors_checkpoint(model, **other):
    """A file as GFNet's authors publish them, of a model over a ResNet."""
    parts = {}
    for part, encoder in (('model_prime_state_dict', 'global_encoder'), ('model_state_dict', 'local_encoder')):
        parts[part] = {
            f'module.{k.removeprefix(encoder)[1:]}': v for k, v in model.state_dict().items() if k.startswith(encoder)}
    classifier, policy = model.classifier.state_dict(), model.policy.state_dict()
    return {
        'model_name': 'test_resnet', 'patch_size': 32, **parts,
        'fc': {k.replace('heads.rnn', 'fc') + ('_l0' if k.startswith('rnn') else ''): v for k, v in classifier.items()},
        'policy': {
            k.replace('actor', 'actor.0') + ('_l0' if k.startswith('gru') else ''): v for k, v in policy.items()},
        'flops': [1e9, 2e9, 3e9], 'anytime_classification': [60., 70., 75.],
        'dynamic_threshold': torch.tensor([[0.345, 0.35, -1e8], [2., 2., -1e8]]), **other}


AUTHORS = ['backbone=test_resnet', 'patch_size=32', 'num_steps=3', 'policy_hidden=16', 'classifier_hidden=16']


@pytest.fixture(scope='module')
def authors():
    torch.manual_seed(0)
    return timm.create_model(
        'gfnet', num_classes=3, img_size=48, **dict(
            backbone='test_resnet', patch_size=32, num_steps=3, policy_hidden=16, classifier_hidden=16)).eval()


def test_the_authors_numbers(folder, authors, tmp_path):
    results = dict(budgeted_batch_classification=[[1.2e9, 3e9], [66., 75.]])
    torch.save(authors_checkpoint(authors, **results), tmp_path / 'a.pth.tar')
    torch.save(authors_checkpoint(authors), tmp_path / 'b.pth.tar')  # nobody knows what their thresholds cost
    base = ['--model', 'gfnet', '--model-kwargs', *AUTHORS, '--num-classes', '3', '--img-size', '48', '-j', '0',
            '--device', 'cpu', '--data-dir', str(folder / 'data')]
    shown = run_validation([*base, '--checkpoint', str(tmp_path / 'a.pth.tar'), '--stored-results'])
    assert [(r['point'], r['gmacs'], r['top1']) for r in shown] == [
        ('step 1', 1, 60), ('step 2', 2, 70), ('step 3', 3, 75), ('budget', 1.2, 66), ('budget', 3, 75)]
    for name, budget in (('a', [1.2, 3]), ('b', [None, None])):
        fresh_accelerate()
        row, *points = run_validation([*base, '--checkpoint', str(tmp_path / f'{name}.pth.tar'), '--stored-thresholds'])
        stored = of(points, 'stored')
        assert [p.get('budget') for p in stored] == budget
        assert stored[1]['top1'] == row['top1']
        assert stored[1]['gmacs'] == row['gmacs'] == round(authors.step_macs[2] / 1e9, 6)


@pytest.mark.parametrize('stored', [True, False])
def test_what_was_measured_needs_no_data(tmp_path, caplog, stored):
    """Mode 0 of the original, and a table: the demo set's ten classes are not those of the authors' files."""
    torch.manual_seed(0)
    model = timm.create_model(
        'gfnet', backbone='test_resnet', patch_size=32, num_steps=3, policy_hidden=16, classifier_hidden=16)
    costs = dict(model_flops=9e8, policy_flops=4e7, fc_flops=6e7)
    torch.save(authors_checkpoint(model, **costs), tmp_path / 'a.pth.tar')
    table = ExitTable(torch.rand(6, 3), torch.rand(6, 3) > 0.5, model.step_macs)
    table.save(tmp_path / 'table.safetensors')
    fresh_accelerate()
    caplog.set_level('INFO', 'timm_dynamic')
    asked = ['--stored-results'] if stored else ['--exit-table', str(tmp_path / 'table.safetensors')]
    rows = run_validation([
        '--model', 'gfnet', '--model-kwargs', *AUTHORS, '--checkpoint', str(tmp_path / 'a.pth.tar'),
        '--device', 'cpu', *asked])
    assert [row['point'] for row in rows if 'point' in row] == ['step 1', 'step 2', 'step 3']
    # Costs of the parts, counted and as the authors state them
    parts = model.count_part_macs()
    shown = caplog.text.partition('cost of one run of each part:')[2]
    for part, steps, authors in (
            ('glance encoder', '1', 0.9), ('local encoder', '2, 3', 0.9), ('patch policy', '2, 3', 0.04),
            ('classifier', '1, 2, 3', 0.06)):
        line = next(line for line in shown.splitlines() if line.startswith(part))
        name, shown_steps, *numbers = re.split('  +', line)
        assert (name, shown_steps) == (part, steps)
        assert [float(n) for n in numbers] == pytest.approx([max(parts[part]) / 1e9, authors], abs=1e-6)


# Tables of AnchorNet

@pytest.mark.skipif(
    not (SHARED / 'parity/anchornet/official_table.npz').exists(),
    reason='not run: the official AnchorNet table of 50,000 images is not beside the repository (../shared)')
def test_the_published_points_of_anchornet(tmp_path, capsys):
    """Their file, their thresholds; no model, no data."""
    with np.load(SHARED / 'parity/anchornet/official_table.npz') as a:
        table = {'setup': 'densenet201_95_[0.3, 0.3, 0.3, 0.3]', **{
            k: torch.tensor(np.concatenate([a[k], a[f'{k}_column6'][:, None]], axis=1))
            for k in ('thresholds', 'predictions')}}
    torch.save(table, tmp_path / 'official.pth')
    published = json.loads((SHARED / 'parity/anchornet/official_acc_flops.json').read_text())['rows']
    thresholds = [word for row in published for word in ('--thresholds', *map(str, row['thresholds']))]
    options = ['--exit-table', str(tmp_path / 'official.pth'), '--steps', '5', '--strict', *thresholds]
    rows = of(run_validation([*options, '--anchor-gmacs', '0.08']), 'thresholds')
    assert len(rows) == 34
    assert [(round(row['top1'] / 100, 4), round(row['gmacs'], 2)) for row in rows] == [
        (row['acc'], row['gflops']) for row in published]
    assert [row['exit_correct'] for row in rows] == [row['stage_true_num'] for row in published]
    rows = of(run_validation(options), 'thresholds')  # as their script charges: not as the list was made
    assert sum(round(row['gmacs'], 2) == p['gflops'] for row, p in zip(rows, published)) == 21


def test_tables_of_anchornet_can_be_written(run, net, tmp_path):
    rows = run('--save-exit-table', tmp_path / 'own.pth')
    table = torch.load(tmp_path / 'own.pth', weights_only=True)
    assert (table['setup'], table['predictions'].dtype) == ('test_gfnet', torch.bool)
    again = run('--exit-table', tmp_path / 'own.pth')  # the model knows its costs
    assert [row['gmacs'] for row in again[1:]] == [row['gmacs'] for row in rows[1:]]
    with pytest.raises(ValueError, match=r"costs of its setup 'test_gfnet' are not known.*validate.py the model"):
        run_validation(['--exit-table', str(tmp_path / 'own.pth')])


# Bad input

@pytest.mark.parametrize(('options', 'message'), [
    ('--thresholds 0.5 0.5', 'expected 3 for .* one per step .* got 2'),
    ('--thresholds 0.5 nan 1', '--thresholds 0.5 nan 1: expected numbers'),
    ('--budget 0.00001', r'--budget 1e-05: out of range for .* the first step costs {low} GMACs, all 3 steps {high}\.'),
    ('--budget 0.001 7', r'--budget 7: out of range .* the first step costs {low} GMACs, all 3 steps {high}\.'),
    ('--budget nan', '--budget nan: out of range'),
    ('--budget 0.001 --calibrate-split eval', "eval: --split validation evaluates on these images.*'half'"),
    ('--budget 0.001 --calibrate-split nowhere', "There is no split 'nowhere' at .*, which has test, train, val"),
    ('--budget 0.001 --calibrate-samples 0', '--calibrate-samples: expected at least 1, got 0'),
    ('--calibrate-split train', '--calibrate-split says what exits are fitted on: ask for some with --budget'),
    ('--budget 0.001 --calibrate-split train --calibrate-table x', 'choose one'),
    ('--stored-results', '--stored-results: .*net keeps no results'),
    ('--stored-thresholds', '--stored-thresholds: .*net keeps no exits. Fit some with --budget'),
    ('--test-pool', '--test-pool changes how a static model pools'),
    ('--save-budgets x --reparam', '--save-budgets cannot be combined with --reparam'),
    ('--exit-table nowhere', "--exit-table: there is no file 'nowhere'"),
    ('--exit-table {text}', 'text.st cannot be read as an exit table'),
    ('--budget 0.001 --calibrate-table nowhere', "--calibrate-table: there is no file 'nowhere'"),
    ('--exit-table {two}', "two.st' is a table of 2 steps, .*net' has 3"),
    ('--exit-table {dear}', "dear.st' is a table of steps that cost 1, 2, 3 GMACs; those of .*net' cost"),
    ('--budget 0.001 --calibrate-table {two}', "two.st' is a table of 2 steps"),
    ('--exit-table {good} --calibrate-table {good} --geometric', 'good.st and good.st hold the same'),
    ('--exit-table {good} --calibrate-split train', 'runs no model: --calibrate-split has no effect with it'),
    ('--exit-table {good} --save-exit-table x', 'runs no model: --save-exit-table has no effect'),
    ('--strict', '--strict needs --thresholds or --threshold-sweep'),
    ('--save-features=x.txt', 'expected a file that ends in .safetensors or .csv'),
    ('--steps 2', '--steps says how to read a table: give one with --exit-table'),
    ('--exit-table {good} --steps 4', r'4 steps asked for, confidences have shape \[20, 3\]'),
    ('--exit-table {good} --anchor-gmacs nan', '--anchor-gmacs: expected a cost, got nan'),
])
def test_bad_input(says, net, tmp_path, options, message):
    (tmp_path / 'text.st').write_text('no table')
    for name, steps in (('two', (1, 2)), ('dear', (10**9, 2 * 10**9, 3 * 10**9)), ('good', net.step_macs)):
        confidence = torch.rand(20, len(steps))
        ExitTable(confidence, confidence > 0.5, steps).save(tmp_path / f'{name}.st')
    paths = {name: tmp_path / f'{name}.st' for name in ('text', 'two', 'dear', 'good')}
    low, high = (f'{m / 1e9:.10g}' for m in (net.step_macs[0], net.step_macs[-1]))
    said = says(*options.format(**paths).split())
    assert re.search(message.replace('{low}', low).replace('{high}', high), said), said
    assert 'Traceback' not in said


@pytest.mark.parametrize('option', [
    '--anytime', '--budget 1', '--thresholds 0.5', '--geometric', '--stored-results', '--stored-thresholds',
    '--save-exit-table x', '--save-budgets x', '--curve x.png', '--exit-table {good}'])
def test_static_models_are_asked_for_nothing_of_it(says, tmp_path, option):
    ExitTable(torch.rand(3, 1), torch.ones(3, 1, dtype=torch.bool), (1,)).save(tmp_path / 'good.st')
    said = says(*option.format(good=tmp_path / 'good.st').split(), model='static')
    assert said.startswith(f"{option.split()[0]}: 'local-dir:")
    assert 'makes one prediction' in said


def test_one_model_at_a_time(folder, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('test_resnet.r160_in1k\ntest_vit.r160_in1k\n')
    with pytest.raises(ValueError, match='are for one model, found 2: test_resnet'):
        run_validation(['--model', str(names), '--device', 'cpu', '--save-budgets', str(tmp_path / 'x')])


def test_a_table_alone_needs_no_model_but_for_what_models_keep(tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'):
        run_validation(['--exit-table', 'x', '--stored-thresholds'])
    assert 'need --model if --exit-table is given' in capsys.readouterr().err


def test_mistakes_are_one_line(folder, capsys):
    status = validate_main(['--model', f'local-dir:{folder / "net"}', '--device', 'cpu', '--budget', '9'])
    assert status == 1
    assert capsys.readouterr().err.startswith('ValueError: --budget 9: out of range')
