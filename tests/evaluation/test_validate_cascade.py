"""validate.py on cascades: every member sees its own view; confidences are compared, and the best one is taken."""
import csv
import json

import pytest
import timm
import torch
from flag_tables import fresh_accelerate
from forked import run_forked
from helpers import make_images
from parity.confidence_reference import make_state_dict
from timm.data import create_transform

from timm_dynamic import ConfidenceNet
from timm_dynamic.data import create_dataset
from timm_dynamic.evaluation import cascade, run_validation, validate_main
from timm_dynamic.exits import ExitTable, early_exit
from timm_dynamic.launch.options import create_validate_parser
from timm_dynamic.utils import CheckpointError, save_pretrained

COUNTS = {'train': 30, 'val': 25}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cascade')
    torch.manual_seed(1)
    model = timm.create_model('test_clcnet', num_classes=3, img_size=32)
    model.set_confidence('clcnet', net=ConfidenceNet.from_pretrained(make_state_dict()))
    with torch.no_grad():
        for net in model.members:
            net.fc.weight.mul_(300)
            net.fc.bias.zero_()
    save_pretrained(model, folder / 'net')
    make_images(folder / 'data', COUNTS)
    model, x, _, _ = views(folder, 'val')
    confidence = early_exit(model, x, [-9e9, 0.]).confidence.sort().values
    model.set_exit([confidence[37:39].mean().item(), 0.])
    save_pretrained(model, folder / 'net')
    return folder


@pytest.fixture
def run(folder):
    def run(*options):
        fresh_accelerate()
        return run_validation(args(folder, *options))
    return run


def args(folder, *options):
    return ['--model', f'local-dir:{folder / "net"}', '--data-dir', str(folder / 'data'), '-b', '16', '-j', '0',
            '--device', 'cpu', *map(str, options)]


def views(folder, split):
    model = timm.create_model(f'local-dir:{folder / "net"}', pretrained=True).eval()
    dataset = create_dataset('', root=str(folder / 'data'), split=split)
    transforms = [create_transform(**view) for view in model.view_configs]
    images = [image for image, _ in dataset]
    x = tuple(torch.stack([transform(image) for image in images]) for transform in transforms)
    return model, x, torch.tensor([target for _, target in dataset]), dataset.filenames()


def test_each_member_sees_its_own_view(folder, run, tmp_path):
    model, x, target, names = views(folder, 'val')
    assert [len(v[0, 0]) for v in x] == [16, 32]
    expected = early_exit(model, x, model.exit_policy)
    assert 0 < (expected.steps_used == 1).sum() < len(target)
    row = run('--save-predictions', tmp_path / 'answers.csv')[0]
    assert row['top1'] == pytest.approx(100 * (expected.logits.argmax(1) == target).double().mean().item(), abs=1e-3)
    rows = list(csv.DictReader((tmp_path / 'answers.csv').open()))
    assert [r['file'] for r in rows] == names
    assert [int(r['target']) for r in rows] == target.tolist()
    assert [int(r['prediction']) for r in rows] == expected.logits.argmax(1).tolist()
    assert [int(r['steps_used']) for r in rows] == expected.steps_used.tolist()
    assert [float(r['confidence']) for r in rows] == pytest.approx(expected.confidence.tolist(), abs=1e-4)
    # one tensor, as timm's own scripts give it, is something else: the small view is made of the large one
    single = early_exit(model, x[1], model.exit_policy)
    assert not torch.allclose(single.confidence, expected.confidence, atol=1e-3)


@pytest.mark.parametrize('rule', ['most_confident', 'last'])
@torch.no_grad()
def test_predictions_name_the_member_that_answers(folder, run, tmp_path, rule):
    model, x, *_ = views(folder, 'val')
    outputs = model.forward_all(x)
    scores = model.replay(outputs['member_logits'], final_rule='last').confidence
    threshold = scores[0].sort().values[37:39].mean().item()
    run('--final-rule', rule, '--thresholds', threshold, 0, '--save-predictions', tmp_path / 'answers.csv')
    rows = list(csv.DictReader((tmp_path / 'answers.csv').open()))
    used = torch.where(scores[0] >= threshold, 1, 2)
    expected = torch.where(scores[1] > scores[0], used, 1) if rule == 'most_confident' else used
    assert [int(row['steps_used']) for row in rows] == used.tolist()
    assert [int(row['member']) for row in rows] == expected.tolist()
    assert torch.equal(expected, used) == (rule == 'last')  # else the column would say nothing new
    own = outputs['member_logits'].argmax(dim=2)
    assert [int(row['prediction']) for row in rows] == own.gather(0, expected[None] - 1)[0].tolist()


@torch.no_grad()
def test_sweep_of_thresholds(folder, run):
    """Each row is what --thresholds gives. The share sent on and the cost belong together."""
    rows = [row for row in run('--threshold-sweep', '--confidence', 'max_prob') if row.get('point') == 'sweep']
    assert [row['threshold'] for row in rows] == [round(0.05 + 0.02 * i, 2) for i in range(49)]
    assert (rows[0]['sent_on'], rows[-1]['sent_on']) == (0, 1)
    costs = timm.create_model(f'local-dir:{folder / "net"}', pretrained=True).step_macs_of('max_prob')
    for row in rows:
        cost = costs[0] + row['sent_on'] * (costs[1] - costs[0])
        assert row['gmacs'] == pytest.approx(cost / 1e9, abs=1e-6)
    middle = next(row for row in rows if 0.2 < row['sent_on'] < 0.8)
    single = run('--thresholds', middle['threshold'], 0, '--confidence', 'max_prob')[-1]
    assert {k: single[k] for k in ('top1', 'gmacs')} == {k: middle[k] for k in ('top1', 'gmacs')}


def test_files_of_parts(folder, run, fold_nets, tmp_path, capsys):
    """The user's members beside a confidence net, or beside nets of a cross-validation."""
    model = timm.create_model(f'local-dir:{folder / "net"}', pretrained=True)
    for i, net in enumerate(model.members):
        torch.save({'state_dict': net.state_dict()}, tmp_path / f'{i}.pth.tar')
    model.confidence_net.save(tmp_path / 'net.safetensors')
    base = ['--model', 'test_clcnet', '--num-classes', 3, '--img-size', 32]
    members = ['--checkpoint', f'0={tmp_path}/0.pth.tar', '--checkpoint', f'1={tmp_path}/1.pth.tar']
    row = run(*base, *members, '--checkpoint', f'confidence_net={tmp_path}/net.safetensors', '--threshold-sweep')
    same = run('--threshold-sweep')
    assert row[-20]['top1'] == same[-20]['top1']
    assert row[0]['checkpoint'].startswith(f'0={tmp_path}/0.pth.tar 1=')
    row, same = (run(*options, *fold_nets[2]) for options in ([*base, *members], ()))
    assert row[0]['top1'] == same[0]['top1']
    with pytest.raises(CheckpointError, match='it has the parts 7; expected confidence_net, names of members'):
        run(*base, '--checkpoint', f'7={tmp_path}/0.pth.tar')
    for second in (f'0={tmp_path}/1.pth.tar', str(tmp_path / '1.pth.tar')):
        with pytest.raises(SystemExit):
            run(*base, *members[:2], '--checkpoint', second)
        assert 'PART=FILE once for each part' in capsys.readouterr().err
    path = str(tmp_path / 'lr=1.pth')  # no part: its name would be a path
    assert create_validate_parser().parse_args(['--checkpoint', path]).checkpoint == path


def test_views_can_be_overridden(run):
    rows = [run(*options)[0] for options in ([], ['--mean', '0.9', '0.9', '0.9'])]
    assert rows[0]['loss'] != rows[1]['loss']


def test_the_best_confidence_is_taken(folder, run, tmp_path):
    rows = run('--confidence', 'all', '--save-budgets', tmp_path / 'out', '--calibrate-split', 'train')
    compared = [r for r in rows if 'area' in r]
    assert len(compared) == 5 * 2
    best = max(compared, key=lambda r: r['calibration_area'])
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert (model.confidence_kind, model.final_rule) == (best['confidence'], best['final_rule'])
    assert model.exit_cfg['budgets']
    for budget in model.exit_cfg['budgets']:
        model.set_budget(budget['gmacs'])  # none of them costs what the model cannot
    members = [r for r in rows if 'member' in r]
    cascade, x, target, _ = views(folder, 'val')
    with torch.inference_mode():
        for row, net, view in zip(members, cascade.members, x):
            assert row['top1'] == pytest.approx(100 * (net(view).argmax(1) == target).double().mean().item(), abs=1e-3)
    # all steps of the rule `last` are the last member
    assert {r['top1'] for r in compared if r['final_rule'] == 'last'} == {members[1]['top1']}
    step = next(r for r in rows if r.get('point') == 'step 2')
    assert rows[0]['top1'] == step['top1'] == best['top1']


@pytest.fixture(scope='module')
def fold_nets(folder):
    """Two nets that score differently, and the folds that they have not seen: most images of 'val', one of 'train'."""
    nets = []
    for k in range(2):
        net = ConfidenceNet.from_pretrained(make_state_dict())
        with torch.no_grad():
            net.head.weight.mul_(1 + k)
        net.save(folder / f'net{k + 1}.safetensors')
        nets.append(net)
    names = views(folder, 'val')[3]
    for i, name in enumerate(names[:-5]):
        path = folder / f'folds/part_{i % 2 + 1}' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folds = torch.tensor([i % 2 for i in range(len(names) - 5)] + [-1] * 5)
    return nets, folds, ['--fold-nets', folder / 'net1.safetensors', folder / 'net2.safetensors']


def expected_scores(model, nets, folds, member_logits):
    p = member_logits.softmax(dim=2).sort(dim=2, descending=True).values
    scores = torch.stack([net(p.flatten(0, 1)).unflatten(0, p.shape[:2]) for net in nets])
    own = scores.gather(0, folds.clamp(min=0).expand(1, *p.shape[:2]))[0]
    return torch.where(folds < 0, scores.mean(dim=0), own)


@torch.no_grad()
def test_each_image_is_scored_by_the_net_that_has_not_seen_it(folder, run, fold_nets, tmp_path, caplog):
    caplog.set_level('INFO', 'timm_dynamic')
    nets, folds, given = fold_nets
    model, x, target, names = views(folder, 'val')
    member_logits = model.forward_all(x)['member_logits']
    scores = expected_scores(model, nets, folds, member_logits)
    assert not torch.allclose(scores, model.forward_all(x)['confidence'], atol=1e-3)
    threshold = scores[0].sort().values[37:39].mean().item()
    rows = run(*given, '--fold-dir', folder / 'folds', '--thresholds', threshold, -9e9,
               '--save-predictions', tmp_path / 'answers.csv', '--save-exit-table', tmp_path / 'table.safetensors')
    assert 'by the confidence net that has not seen it; 5 images are in no fold' in caplog.text
    assert rows[0]['cross_validated'] is False  # not all of them are
    assert 'loss' not in rows[0]
    better = scores[1] > scores[0]
    answers = torch.stack([member_logits[0], torch.where(better[:, None], *member_logits.flip(0))]).argmax(dim=2)
    table = ExitTable.load(tmp_path / 'table.safetensors')
    torch.testing.assert_close(table.confidence, torch.stack([scores[0], scores.amax(dim=0)], dim=1), atol=1e-5, rtol=0)
    assert torch.equal(table.correct, (answers == target).T)
    used = torch.where(scores[0] >= threshold, 1, 2)
    right = answers.gather(0, used[None] - 1)[0] == target
    assert rows[-1]['top1'] == pytest.approx(100 * right.double().mean().item(), abs=1e-3)
    saved = list(csv.DictReader((tmp_path / 'answers.csv').open()))
    assert [r['file'] for r in saved] == names
    assert [int(r['steps_used']) for r in saved] == used.tolist()
    assert [int(r['prediction']) for r in saved] == answers.gather(0, used[None] - 1)[0].tolist()


def test_nets_of_folds_stay_as_they_are(folder, run, fold_nets, monkeypatch):
    """Also the one that a cascade without a net of its own takes over, where its dtype or device is another."""
    seen, score = set(), cascade.score_folds
    monkeypatch.setattr(cascade, 'score_folds', lambda nets, *args: (
        seen.update(next(net.parameters()).dtype for net in nets), score(nets, *args))[1])
    models = [f'local-dir:{folder}/members/0@16', f'local-dir:{folder}/members/1@32']
    for i, net in enumerate(timm.create_model(f'local-dir:{folder / "net"}', pretrained=True).members):
        save_pretrained(net, folder / f'members/{i}')
    row = run('--model', 'clcnet', '--model-kwargs', f'models={models}', '--num-classes', 3, *fold_nets[2],
              '--fold-dir', folder / 'folds', '--model-dtype', 'bfloat16')[0]
    assert seen == {torch.float32}
    assert row['cross_validated'] is False  # five images are in no fold


def test_without_folds_it_is_said_so(folder, run, fold_nets, caplog):
    caplog.set_level('INFO', 'timm_dynamic')
    given = fold_nets[2]
    row = run(*given, '--confidence', 'all', '--calibrate-split', 'half')[0]
    assert row['cross_validated'] is False
    assert 'Not cross-validated: without --fold-dir' in caplog.text
    caplog.clear()
    row = run()[0]
    assert 'not cross-validated' in caplog.text
    assert 'cross_validated' not in row


def test_one_confidence(run):
    shares = {}
    for kind in ('max_prob', 'entropy'):
        rows = run('--confidence', kind, '--final-rule', 'last', '--thresholds', '0.7', '0')
        shares[kind] = rows[-1]['exit_shares']
    assert shares['max_prob'] != shares['entropy']


def test_two_processes(folder, run, tmp_path):
    options = ['--confidence', 'all', '--calibrate-split', 'half', '--results-file', tmp_path / 'two.json',
               '--results-format', 'json']
    run_forked(validate_main, *args(folder, *options), processes=2, folder=tmp_path)
    two = [r for r in json.loads((tmp_path / 'two.json').read_text()) if 'area' in r]
    one = [r for r in run(*options[:4]) if 'area' in r]
    assert two == one


@pytest.mark.parametrize(('options', 'message'), [
    (['--confidence', 'all', '--final-rule', 'last'], 'leave out --final-rule'),
    (['--confidence', 'all', '--calibrate-table', 'x'], 'cannot be combined with --calibrate-table'),
    (['--confidence', 'all', '--stored-results'], 'cannot be combined with --stored-results'),
    (['--confidence', 'all', '--metrics-avg', 'micro'], 'cannot be combined with --metrics-avg'),
    (['--fold-nets', '{net}', 'nowhere'], "no file or folder 'nowhere'"),
    (['--fold-nets', '{net}'], 'expected a net for each fold, found 1'),
    (['--fold-nets', '{net}', '{net}', '{net}', '--fold-dir', '{folds}'], '3 nets were given, but .* has 2 folds'),
    (['--fold-nets', '{net}', '{net}', '--fold-dir', '{other}'], 'None of the 75 images is in a fold'),
    (['--fold-nets', '{net}', '{net}', '--confidence', 'margin'], "confidence is 'margin': ask for"),
    (['--fold-nets', '{net}', '{net}', '--valid-labels', 'x'], '--fold-nets evaluates .* cannot be combined with'),
    (['--fold-nets', '{net}', '{net}', '--calibrate-samples', '5', '--budget', '1'], 'images have no known folds'),
    (['--fold-nets', '{net}', '{net}', '--model', 'test_gfnet'], 'are for cascades'),
    (['--fold-nets', '{net}', '{net}', '--save-budgets', 'x'], 'cannot be combined with --save-budgets'),
    (['--confidence', 'all', '--model', 'test_gfnet'], 'are for cascades'),
])
def test_bad_input(folder, run, fold_nets, tmp_path, options, message):
    for name in ('a/1.png', 'b/2.png'):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    paths = {'net': folder / 'net1.safetensors', 'folds': folder / 'folds', 'other': tmp_path}
    options = [o.format(**paths) for o in options]
    with pytest.raises(ValueError, match=message):
        run(*options)


def test_members_that_are_named_need_no_other_weights(folder, run):
    """Neither the net of another confidence, nor folders of one architecture."""
    for i, net in enumerate(timm.create_model(f'local-dir:{folder / "net"}', pretrained=True).members):
        save_pretrained(net, folder / f'members/{i}')
    models = [f'local-dir:{folder}/members/0@16', f'local-dir:{folder}/members/1@32']
    row = run('--model', 'clcnet', '--model-kwargs', f'models={models}', '--num-classes', 3, '--confidence', 'max_prob')
    same = run('--confidence', 'max_prob')
    assert (row[0]['top1'], row[0]['gmacs']) == (same[0]['top1'], same[0]['gmacs'])


def test_a_confidence_net_is_no_checkpoint_of_members(folder, run, fold_nets):
    with pytest.raises(CheckpointError, match=r'test_focusnet.digits. does not fit'):
        run('--model', 'test_clcnet', '--num-classes', '3', '--checkpoint', folder / 'net1.safetensors')


def test_images_without_colour(folder, run):
    model = timm.create_model('test_clcnet', num_classes=3, img_size=32, in_chans=1)
    model.set_confidence('max_prob')
    save_pretrained(model, folder / 'grey')
    assert run('--model', f'local-dir:{folder / "grey"}')[0]['images'] == 75


def test_a_confidence_is_that_of_the_model_not_of_those_beside(folder, run):
    model = timm.create_model(f'local-dir:{folder / "net"}', pretrained=True)
    model.set_confidence('max_prob')
    save_pretrained(model, folder / 'other')
    rows = run('--confidence', 'clcnet', '--compare', f'local-dir:{folder / "other"}')
    assert [r['images'] for r in rows[:2]] == [75, 75]


def test_folds_without_nets(run, capsys):
    with pytest.raises(SystemExit):
        run('--fold-dir', 'x')
    assert '--fold-dir needs --fold-nets' in capsys.readouterr().err
