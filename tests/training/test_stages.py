"""All stages of the recipes of dynamic models: run, killed, resumed, in two processes."""
import csv
import json
import shutil
import signal

import pytest
import timm
import torch
import yaml
from flag_tables import fresh_accelerate
from forked import Forked, run_forked
from helpers import make_images
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from training.killed import train_until
from training.ranks import train_and_report
from training.same_end import check_same_end

from timm_dynamic import ConfidenceNet
from timm_dynamic.data import ConfidenceFeatures, FoldMap, create_dataset
from timm_dynamic.evaluation import run_validation
from timm_dynamic.exits import ExitTable
from timm_dynamic.task import fit_confidence_net, make_folds, match_scores
from timm_dynamic.training import run_training, train_main
from timm_dynamic.training.run_folder import CheckpointManager
from timm_dynamic.utils import read_task_state, save_pretrained

STAGES = ('static', 'warmup', 'policy', 'finetune')


ANCHORNET = ('static', 'localizer', 'resized', 'patch')
CLCNET = ('member1', 'member2', 'features', 'confidence')
MODELS = {
    'gfnet': ['--model', 'test_gfnet', '--img-size', '48', '--model-kwargs', 'patch_size=16',
              '--init-local', 'scratch'],
    'anchornet': ['--model', 'test_anchornet_patch', '--img-size', '80', '--model-kwargs', 'patch_size=32',
                  '--init-downstream', 'scratch'],
    'clcnet': ['--model', 'test_clcnet', '--img-size', '48', '--init-members', 'scratch', '--folds', '2'],
}


def _args(images, out, *more, family='gfnet'):
    return [
        *MODELS[family], '--num-classes', '3', '--data-dir', str(images), '--device', 'cpu', '--batch-size', '8',
        '--epochs', '1', '-j', '0', '--output', str(out), '--experiment', 'run', *map(str, more)]


def _rows(folder):
    return list(csv.DictReader((folder / 'summary.csv').open()))


def test_all_stages(image_folder, tmp_path, caplog):
    with caplog.at_level('INFO'):
        result = run_training(_args(image_folder, tmp_path, '--save-patches', 2, '--policy-updates', 2))
    run = tmp_path / 'run'
    assert list(result['results']) == list(STAGES)
    table = next(r.message for r in caplog.records if r.message.startswith('What the recipe sets'))
    assert all(name in table for name in (*STAGES, 'classifier_lr_scale', '0.0003'))
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert len(lines['momentum'].split()) == 4  # not in 'policy', which uses Adam
    blocks = [r.message for r in caplog.records if r.message.startswith('Stage ')]
    assert [block.splitlines()[0] for block in blocks] == ['Stage static', 'Stage warmup']  # then nothing is new
    images = {split: sum(1 for _ in (image_folder / split).rglob('*.*')) for split in ('train', 'val')}
    first = ' '.join(blocks[0].split())
    for text in (f"data {image_folder}; train: {images['train']} images of 3 classes; validation: "
                 f"{images['val']} images of 3 classes model", 'images of 3x48x48',
                 'GMACs device cpu, 1 process, float32 batch 8 images:',
                 '8 per process x 1 process x 1 accumulation step;',
                 'epochs static 1, warmup 1, policy 1, finetune 1', f'results {run}'):
        assert text in first
    assert [line.split()[0] for line in blocks[1].splitlines()[1:] if line[0] != ' '] == ['model']  # what is different
    assert 'GMACs up to step 1..3' in ' '.join(blocks[1].split())
    assert all(len(line) <= 100 or str(tmp_path.parent) in line for block in blocks for line in block.splitlines())
    loaded = [r.message for r in caplog.records if 'retrained weights' in r.message]
    assert all('state dict' not in message for message in loaded)
    assert any(f"from '{run / 'policy' / 'best'}'" in message for message in loaded)

    steps = {f'{what}_step{t}' for what in ('eval_top1', 'train_top1') for t in (1, 2, 3)}
    for folder in (run / 'warmup', run / 'policy', run):
        assert steps <= _rows(folder)[0].keys()
        assert set(read_task_state(folder / 'best')) == {'global_aux', 'local_aux', 'critic'}
    row, = _rows(run / 'warmup')  # the classifier's rate is ten times the encoders'
    rates = {k: float(row[k]) for k in ('lr', 'lr_min', 'lr_max')}
    assert rates['lr_max'] == pytest.approx(10 * rates['lr_min'])
    assert rates['lr_min'] < rates['lr'] < rates['lr_max']
    row, = _rows(run / 'policy')
    assert 'lr_max' not in row
    assert {'train_reward_patch1', 'train_reward_patch2', 'train_entropy', 'train_approx_kl', 'train_clip_fraction',
            'train_spread'} <= row.keys()
    assert float(row['train_approx_kl']) > 0

    # what one stage learned is where the next begins; the policy stage changes nothing but the policy
    states = {s: timm.create_model(f'local-dir:{run / f / "best"}', pretrained=True).state_dict()
              for s, f in zip(STAGES[1:], ('warmup', 'policy', '.'))}
    changed = {k.split('.')[0] for k, v in states['policy'].items() if not torch.equal(v, states['warmup'][k])}
    assert changed == {'policy'}
    changed = {k.split('.')[0] for k, v in states['finetune'].items() if not torch.equal(v, states['policy'][k])}
    assert changed == {'global_encoder', 'local_encoder', 'classifier'}
    assert torch.equal(read_task_state(run / 'policy' / 'best')['local_aux']['weight'],
                       read_task_state(run / 'warmup' / 'best')['local_aux']['weight'])

    model = timm.create_model(f'local-dir:{run / "best"}', pretrained=True)
    assert (model.img_size, model.patch_size) == (48, 16)  # what costs are counted for
    assert model.step_macs == timm.create_model('test_gfnet', num_classes=3, img_size=48, patch_size=16).step_macs
    with Image.open(run / 'patches.png') as picture:
        assert picture.size == (4 * 166 + 6, 2 * 186 + 26)
    assert [r['model'] for r in result['table']] == ['test_focusnet, whole images', 'test_gfnet']


def test_budgets_are_shown_and_kept(image_folder, tmp_path, caplog):
    with caplog.at_level('INFO'):
        result = run_training(_args(image_folder, tmp_path, '--val-split', 'val', '--test-split', 'train'))
    run = tmp_path / 'run'
    assert "budgets: exits fitted on val (33 images), evaluated on train (72 images)" in caplog.text
    assert (run / 'accuracy_over_macs.png').read_bytes().startswith(b'\x89PNG')
    rows = json.loads((run / 'budgets.json').read_text())
    assert [r['point'] for r in rows[:4]] == ['step 1', 'step 2', 'step 3', 'budget']
    assert all(r['images'] == 72 for r in rows)
    table = {r['model']: r for r in result['table']}
    assert table['test_gfnet']['top1'] == pytest.approx(rows[2]['top1'], abs=1e-3)
    assert table['test_gfnet']['gmacs'] == pytest.approx(rows[2]['gmacs'], abs=1e-6)

    model = timm.create_model(f'local-dir:{run / "best"}', pretrained=True).eval()
    budget = model.step_macs[1] / 1e9
    assert model.set_budget(budget)['gmacs'] <= budget
    assert 'budgets' not in timm.create_model(f'local-dir:{run / "last"}', pretrained=True).exit_cfg


def test_without_a_test_split_budgets_are_cross_fitted(image_folder, tmp_path):
    run_training(_args(image_folder, tmp_path, '--val-split', 'val'))
    rows = json.loads((tmp_path / 'run' / 'budgets.json').read_text())
    budgets = [row for row in rows if row['point'] == 'budget']
    assert {(row['split'], row['fitted_on'], row['images']) for row in budgets} == {
        ('val, cross-fitted in halves', 'all of val', 33)}
    model = timm.create_model(f'local-dir:{tmp_path / "run" / "best"}', pretrained=True).eval()
    assert [b['evaluated']['top1'] for b in model.exit_cfg['budgets']] == [row['top1'] for row in budgets]
    assert model.set_budget(model.step_macs[1] / 1e9)['gmacs'] <= model.step_macs[1] / 1e9


def test_stages_one_by_one(image_folder, tmp_path, capsys):
    args = [a for a in _args(image_folder, tmp_path) if a not in ('--init-local', 'scratch')]
    assert train_main([*args, '--stage', 'policy']) == 1
    assert "Stage 'policy' starts from the weights of stage 'warmup', which are not at" in capsys.readouterr().err
    run_training([*args, '--stage', 'warmup', '--resume', 'auto'])
    run_training([*args, '--stage', 'policy', '--resume', 'auto'])
    result = run_training([*args, '--stage', 'finetune', '--resume', 'auto'])
    assert list(result['results']) == ['warmup', 'policy', 'finetune']

    other = [str(tmp_path / 'other') if a == str(tmp_path) else a for a in args]
    start = str(tmp_path / 'run' / 'policy' / 'best')
    run_training([*other, '--stage', 'finetune', '--init-from', start, '--lr', '1e-12', '--classifier-lr-scale', '1'])
    state = timm.create_model(f'local-dir:{tmp_path / "other" / "run" / "last"}', pretrained=True).state_dict()
    expected = timm.create_model(f'local-dir:{start}', pretrained=True).state_dict()
    for key, value in expected.items():
        if 'running' not in key and 'num_batches' not in key:
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6)


def test_more_epochs_of_a_compiled_stage(image_folder, tmp_path, caplog):
    """A schedule is that of the epochs asked for last."""
    def run(name, epochs):
        args = [a for a in _args(image_folder, tmp_path / name) if a not in ('--init-local', 'scratch')]
        run_training([*args, '--stage', 'warmup', '--epochs', epochs, '--torchcompile', 'eager', '--resume', 'auto'])
        return [float(row['lr']) for row in _rows(tmp_path / name / 'run/warmup')]

    straight = run('straight', '3')
    run('more', '1')
    with caplog.at_level('INFO'):
        resumed = run('more', '3')
    assert resumed == pytest.approx(straight)
    assert min(resumed[1:]) > 0
    assert f"local-dir:{tmp_path / 'more/run/warmup/best'}'" in caplog.text


def test_settings_that_cannot_work_are_found_before_the_first_stage(image_folder, tmp_path, capsys):
    for flags, message in (
            (['--policy-updates', '2', '--grad-accum-steps', '2'], 'cannot be combined with --grad-accum-steps 2'),
            *(([f'--{name}', '0'], f'--{name}: expected at least 1, got 0')
              for name in ('epochs', 'batch-size', 'val-interval', 'log-interval'))):
        assert train_main([*_args(image_folder, tmp_path), *flags]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / 'run' / 'static').exists()
    args = [a for a in _args(image_folder, tmp_path) if a not in ('--init-local', 'scratch')]
    run_training([*args, '--stage', 'warmup', '--mixup', '0.2'])
    run_training([*args, '--stage', 'policy', '--mixup', '0.2', '--resume', 'auto'])  # which does not mix


def test_anchornet(image_folder, tmp_path):
    result = run_training(_args(image_folder, tmp_path, '--save-patches', 2, family='anchornet'))
    run = tmp_path / 'run'
    assert list(result['results']) == list(ANCHORNET)
    states = [timm.create_model(f'local-dir:{run / f / "best"}', pretrained=True).state_dict()
              for f in ('localizer', 'resized', '.')]
    static = timm.create_model(f'local-dir:{run / "static" / "best"}', pretrained=True).state_dict()
    for before, after, part in ((states[0], states[1], 'resized'), (states[1], states[2], 'patch')):
        changed = {k.split('.')[0] for k, v in after.items() if not torch.equal(v, before[k])}
        assert changed == {part}
    # the patch net started from the static one: one epoch at a small learning rate has not moved it far
    assert (states[2]['patch.fc.weight'] - static['fc.weight']).abs().max() < 0.02
    assert (states[1]['patch.fc.weight'] - static['fc.weight']).abs().max() > 0.02
    assert [k for k in _rows(run)[0] if k.startswith('eval_top1_')] == [f'eval_top1_step{t}' for t in (1, 2, 3)]
    with Image.open(run / 'patches.png') as picture:
        assert picture.size == (4 * 166 + 6, 2 * 186 + 26)


def test_clcnet(image_folder, tmp_path, caplog):
    args = _args(image_folder, tmp_path, '--test-split', 'train', '--feature-split', 'val', '--confidence', 'clcnet',
                 family='clcnet')
    with caplog.at_level('INFO'):
        result = run_training(args)
    run = tmp_path / 'run'
    assert list(result['results']) == list(CLCNET)
    assert [(r['model'], r['images']) for r in result['table']] == [
        ('test_focusnet at 24', 72), ('test_focusnet at 48', 72), ('test_clcnet', 72)]
    assert "exits fitted on val, out of fold (33 images), evaluated on train (72 images)" in caplog.text
    assert 'Best by area' in caplog.text
    assert 'exported with clcnet and most_confident.' in caplog.text

    # the cascade has the members that were trained, and the features are what they say of their own views
    model = timm.create_model(f'local-dir:{run / "best"}', pretrained=True).eval()
    names = []
    for i, (net, view) in enumerate(zip(model.members, model.view_configs), 1):
        best = timm.create_model(f'local-dir:{run / f"member{i}" / "best"}', pretrained=True).eval()
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in best.state_dict().items())
        features = ConfidenceFeatures.load(run / f'features/member{i}.safetensors')
        dataset = create_dataset('', root=str(image_folder), split='val')
        dataset.transform = create_transform(**view)
        with torch.inference_mode():
            logits = best(torch.stack([image for image, _ in dataset]))
        target = torch.tensor([target for _, target in dataset])
        expected = ConfidenceFeatures.from_logits(logits, target, dataset.filenames())
        torch.testing.assert_close(features.probabilities, expected.probabilities, rtol=1e-4, atol=1e-5)
        assert torch.equal(features.correct, expected.correct)
        names.append(features.names)
    assert names[0] == names[1] == expected.names
    assert not list((run / 'features').glob('part-*'))

    # exits are fitted with scores of nets that had not seen the image
    table = ExitTable.load(run / 'calibration.safetensors')
    assert len(table) == 33
    nets = [ConfidenceNet.from_pretrained(run / f'folds/fold{k}.safetensors') for k in (1, 2)]
    folds = make_folds(33, 2, seed=42)
    with torch.inference_mode():
        both = torch.cat([
            ConfidenceFeatures.load(run / f'features/member{t}.safetensors').probabilities for t in (1, 2)])
        scores = torch.stack([net(both) for net in nets])[folds.repeat(2), torch.arange(66)]
        own = model.confidence_net(both)
    torch.testing.assert_close(table.confidence[:, 0], match_scores(scores, own, folds.repeat(2))[:33])
    assert model.exit_cfg['budgets'][0]['evaluated']['fitted_on'] == 'val, out of fold'
    assert {'train_loss', 'val_error'} <= _rows(run)[0].keys()

    # nothing is left to do; and the confidence net alone, from the authors' format
    assert run_training([*args, '--resume', 'auto'])['results'] == result['results']
    ConfidenceFeatures.load(run / 'features/member1.safetensors').save_csv(tmp_path / 'a.csv')
    args = [a for a in args if a not in ('--init-members', 'scratch')]
    other = [str(tmp_path / 'other') if a == str(tmp_path) else a for a in args]
    members = ['--init-members', *(str(run / f'member{i}/best') for i in (1, 2))]
    more = run_training([*other, *members, '--features', str(tmp_path / 'a.csv')])
    assert list(more['results']) == ['confidence']
    again = timm.create_model(f'local-dir:{tmp_path / "other" / "run" / "best"}', pretrained=True)
    assert torch.equal(again.members[0].fc.weight, model.members[0].fc.weight)
    assert not torch.equal(again.confidence_net.head.weight, model.confidence_net.head.weight)


def test_features_are_judged_as_what_they_are(image_folder, tmp_path, caplog):
    """Whatever the options say when the confidence net is trained."""
    args = _args(image_folder, tmp_path, *_save_members(tmp_path / 'w'), '--test-split', 'val', family='clcnet')
    with pytest.raises(ValueError, match="no split 'nosuch'"):  # and the run may be begun again
        run_training([*args, '--stage', 'features', '--feature-split', 'nosuch'])
    run_training([*args, '--stage', 'features', '--feature-split', 'train'])
    with caplog.at_level('INFO'):
        run_training([*args, '--stage', 'confidence', '--resume', 'auto'])
    assert "exits fitted on train, out of fold (72 images), evaluated on val (33 images)" in caplog.text


def test_folds_are_for_cascades(image_folder, tmp_path, capsys):
    for option in (['--folds', '0'], ['--folds', '7'], ['--fold-dir', 'x']):
        assert train_main([*_args(image_folder, tmp_path), *option]) == 1
        assert f"{option[0]} is an option of the recipe 'clcnet'" in capsys.readouterr().err


def test_clcnet_whose_members_are_given_whole(image_folder, tmp_path, monkeypatch):
    """On the demo set, too: weights that are given are not trained anew."""
    torch.manual_seed(5)
    model = timm.create_model('test_clcnet', num_classes=3, img_size=48)
    save_pretrained(model, tmp_path / 'whole')
    args = _args(image_folder, tmp_path, '--initial-checkpoint', tmp_path / 'whole/model.safetensors', family='clcnet')
    at = args.index('--init-members')
    del args[at:at + 2]
    result = run_training(args)
    assert list(result['results']) == ['features', 'confidence']
    again = timm.create_model(f'local-dir:{tmp_path / "run/best"}', pretrained=True)
    assert all(torch.equal(v, again.members.state_dict()[k]) for k, v in model.members.state_dict().items())


def test_clcnet_judged_on_its_own_features_is_judged_out_of_fold(image_folder, tmp_path, caplog):
    args = _args(image_folder, tmp_path, '--val-split', 'val', family='clcnet')
    with caplog.at_level('INFO'):
        run_training(args)
    name = 'val, out of fold'
    where = f'fitted on all of {name} (33 images), evaluated on {name}, cross-fitted in halves (33 images)'
    assert where in caplog.text
    table = ExitTable.load(tmp_path / 'run/calibration.safetensors')
    results = list(csv.DictReader((tmp_path / 'run/results.csv').open()))
    assert [r['split'] for r in results] == ['val', 'val', 'val, out of fold']  # the net that is exported has seen val
    assert float(results[-1]['top1']) == pytest.approx(table.anytime()[-1].top1, abs=1e-3)
    again = run_training([*args, '--stage', 'member2', '--resume', 'auto'])['table']  # a member is judged as itself
    assert [(r['split'], r['top1']) for r in again] == [('val', float(results[1]['top1']))]
    rows = list(csv.DictReader((tmp_path / 'run/confidences.csv').open()))
    best = max(rows, key=lambda row: float(row['area']))
    assert best['confidence'] != 'clcnet'  # else the following would hold for the model's own confidence, too
    model = timm.create_model(f'local-dir:{tmp_path / "run/best"}', pretrained=True)
    assert model.exit_cfg['budgets']
    assert (model.confidence_kind, model.final_rule) == (best['confidence'], best['final_rule'])
    assert f"exported with {best['confidence']} and {best['final_rule']}; --confidence overrides." in caplog.text
    model.set_confidence('clcnet', net=ConfidenceNet.from_pretrained(tmp_path / 'run/confidence_net.safetensors'))
    assert model(torch.rand(2, 3, 48, 48)).isfinite().all()


def test_the_final_rule_of_a_cascade_that_is_given_is_kept(image_folder, tmp_path):
    run_training(_args(image_folder, tmp_path, '--model-kwargs', 'final_rule=last', family='clcnet'))
    rows = list(csv.DictReader((tmp_path / 'run/confidences.csv').open()))
    best = max((row for row in rows if row['final_rule'] == 'last'), key=lambda row: float(row['area']))
    model = timm.create_model(f'local-dir:{tmp_path / "run/best"}', pretrained=True)
    assert (model.confidence_kind, model.final_rule) == (best['confidence'], 'last')


def _save_members(folder):
    model = timm.create_model('test_clcnet', num_classes=3, img_size=48)
    for i, net in enumerate(model.members):
        save_pretrained(net, folder / str(i))
    return ['--init-members', str(folder / '0'), str(folder / '1')]


def test_one_network_at_several_sizes(image_folder, tmp_path, monkeypatch):
    """It is trained once, on all of its sizes by turns, and answers at each of them."""
    sizes, forward = [], timm.models.ResNet.forward_features
    monkeypatch.setattr(timm.models.ResNet, 'forward_features', lambda self, x: (
        sizes.append((self.training, x.shape[-1])), forward(self, x))[1])
    result = run_training(_args(
        image_folder, tmp_path, '--model', 'clcnet', '--model-kwargs', 'models=["test_resnet@32","test_resnet@48"]',
        '--epochs', 2, family='clcnet'))
    assert list(result['results']) == ['member1', 'features', 'confidence']
    assert {size for training, size in sizes if training} == {32, 48}
    run = tmp_path / 'run'
    model = timm.create_model(f'local-dir:{run / "best"}', pretrained=True)
    assert (len(model.members), model.num_steps, model.view_sizes) == (1, 2, (32, 48))
    member = timm.create_model(f'local-dir:{run / "member1/best"}', pretrained=True)
    assert all(torch.equal(v, member.state_dict()[k]) for k, v in model.members[0].state_dict().items())
    one, two = (ConfidenceFeatures.load(run / f'features/member{t}.safetensors').probabilities for t in (1, 2))
    assert not torch.allclose(one, two)


def test_given_folds_and_what_validate_makes_of_them(image_folder, tmp_path):
    """Each image is judged by the net that has not seen it: in training, and by validate.py afterwards."""
    for path in (image_folder / 'val').rglob('*.png'):
        link = tmp_path / 'folds' / f'part_{1 + int(path.stem) % 3}' / path.relative_to(image_folder / 'val')
        link.parent.mkdir(parents=True, exist_ok=True)
        link.touch()
    args = _args(
        image_folder, tmp_path, '--fold-dir', tmp_path / 'folds', '--confidence', 'clcnet',
        *_save_members(tmp_path / 'w'), family='clcnet')
    at = args.index('--folds')
    run_training(args[:at] + args[at + 2:])
    run, table = tmp_path / 'run', tmp_path / 'table.safetensors'
    assert FoldMap.read(run / 'folds/folds.csv').folds_of(['class0/002.png', 'class2/004.png']).tolist() == [2, 1]
    fresh_accelerate()
    run_validation([
        '--model', f'local-dir:{run / "best"}', '--data-dir', str(image_folder), '--split', 'val', '--device', 'cpu',
        '-b', '8', '-j', '0', '--fold-nets', str(run / 'folds'), '--save-exit-table', str(table)])
    expected, judged = ExitTable.load(run / 'calibration.safetensors'), ExitTable.load(table)
    assert torch.equal(judged.correct, expected.correct)
    names = create_dataset('', root=image_folder, split='val').filenames()
    folds = FoldMap.read(run / 'folds/folds.csv').folds_of(names)
    for k in range(3):  # exits are fitted on the scale of the net that is exported: the order is the same
        orders = [t.confidence[folds == k].flatten().argsort() for t in (judged, expected)]
        assert torch.equal(*orders)


def test_clcnet_killed_among_its_features_ends_the_same(image_folder, tmp_path):
    args = _args(image_folder, tmp_path, '-vb', 4, '--resume', 'auto', *_save_members(tmp_path / 'w'), family='clcnet')
    run_training([*args, '--experiment', 'reference'])
    args += ['--experiment', 'killed']
    assert Forked(train_until, 'part:4', *args, folder=tmp_path).wait() == [-signal.SIGKILL]
    assert len(list((tmp_path / 'killed/features').glob('part-*'))) == 3
    assert list((tmp_path / 'killed/state').iterdir())  # --resume auto finds the run without its name, too
    shutil.copytree(tmp_path / 'killed', tmp_path / 'other')
    shutil.rmtree(tmp_path / 'other/state')  # a new run
    run_training([*args, '--experiment', 'other', '--mean', '0.9', '0.9', '0.9', '--stage', 'features'])
    one, other = (ConfidenceFeatures.load(tmp_path / name / 'features/member1.safetensors').probabilities
                  for name in ('reference', 'other'))
    assert not torch.isclose(one, other).all(dim=1).any()  # parts of another preparation are not taken over
    run_training(args)
    for file in ('best/model.safetensors', 'calibration.safetensors', 'features/member2.safetensors'):
        reference, killed = (load_file(tmp_path / name / file) for name in ('reference', 'killed'))
        assert reference.keys() == killed.keys()
        assert all(torch.equal(v, killed[k]) for k, v in reference.items()), file


def test_a_confidence_net_from_a_csv_and_folders_of_folds_alone(tmp_path, caplog):
    """Neither weights of members nor images are there. The number of classes is that of the file."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(60, 4, generator=generator).softmax(dim=1).sort(dim=1, descending=True).values
    names = [f'n{i % 3}/{i:02d}.JPEG' for i in range(60)]
    features = ConfidenceFeatures(probabilities, torch.rand(60, generator=generator) < 0.6, names)
    features.save_csv(tmp_path / 'effb4_output.csv')
    for i, name in enumerate(names):
        path = tmp_path / f'splits/split_part_{1 + i % 5}' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    nets = {}
    for run, options in {'run': [], 'small': ['--batch-size', '16']}.items():
        with caplog.at_level('INFO'):
            result = run_training([
                '--model', 'clcnet_tf_efficientnet_b0_b4', '--init-members', 'none', '--device', 'cpu', '--epochs', '2',
                '--features', str(tmp_path / 'effb4_output.csv'), '--fold-dir', str(tmp_path / 'splits'),
                '--output', str(tmp_path), '--experiment', run, *options])
        assert list(result['results']) == ['confidence']
        assert 0 <= result['results']['confidence']['auroc_all_members'] <= 1
        assert not (tmp_path / run / 'best').exists()
        nets[run] = ConfidenceNet.from_pretrained(tmp_path / run / 'confidence_net.safetensors')
    assert 'AUROC of the confidence net, 5-fold cross-validation' in caplog.text
    expected = fit_confidence_net(probabilities, features.correct, epochs=2, batch_size=256, seed=42)  # the paper's
    assert torch.equal(nets['run'].head.weight, expected.net.head.weight)
    assert not torch.equal(nets['small'].head.weight, expected.net.head.weight)
    folds = FoldMap.read(tmp_path / 'run/folds/folds.csv')
    assert folds.folds_of(names).tolist() == [i % 5 for i in range(60)]
    assert len(list((tmp_path / 'run/folds').glob('fold*.safetensors'))) == 5


@pytest.mark.parametrize(('changes', 'message'), [
    (['--init-members', 'none'], 'it needs --features FILE'),
    (['--init-members', 'none', '{w}/0', '--features', '{csv}'], "'none' is for all members"),
    (['--init-members', 'none', '--features', '{csv}', '--confidence', 'margin'],
     '--init-members none exports no cascade. It cannot be combined with --confidence'),
    (['--init-members', 'none', '--features', '{csv}', '--batch-size', '1'], 'batches of at least 2 rows, got 1'),
    (['--init-members', 'missing', '--features', '{csv}'], 'without weights of the members: --init-members none'),
    (['--init-members', 'scratch', 'scratch', 'scratch'], 'expected one source, or 2 (one for each member), got 3'),
    (['--init-members', 'pretrained'], 'have 10 classes, the cascade has 3. Name other weights'),
    (['--init-members', 'missing', '--stage', 'features'], "No checkpoint at 'missing'"),
    (['--fold-dir', 'x'], '--fold-dir cannot be combined with --folds'),
    (['--feature-split', 'nosuch', '--stage', 'features', '--init-members', '{w}/0', '{w}/1'],
     "There is no split 'nosuch'"),
    (['--features', 'typo.csv'], "no file 'typo.csv'"),
    (['--model-kwargs', 'confidence=agreement'], "confidence='agreement', which features cannot"),
    (['--folds', '1'], 'expected at least 2, or 0 for no cross-validation, got 1'),
    (['--folds', '99', '--stage', 'features', 'confidence'], 'Expected 2 to 33 (the number of samples) folds'),
    (['--stage', 'confidence'], "no features at '"),
    (['--stage', 'features'], "Run the stage 'member1' first"),
    (['--features', '{csv}', '--stage', 'confidence'], 'has probabilities of 4 classes, the cascade has 3'),
])
def test_bad_input_for_cascades(image_folder, tmp_path, capsys, changes, message):
    (tmp_path / 'a.csv').write_text('x,0.4,0.3,0.2,0.1,1\ny,0.4,0.3,0.2,0.1,0\n')
    args = _args(image_folder, tmp_path, family='clcnet')
    members = _save_members(tmp_path / 'w')
    if 'confidence' in changes:
        changes = [*changes, *members]
    paths = {'{csv}': tmp_path / 'a.csv', '{w}/0': members[1], '{w}/1': members[2]}
    assert train_main([*args, *(str(paths.get(c, c)) for c in changes)]) == 1
    assert message in capsys.readouterr().err


def test_end_to_end_recipe(image_folder, tmp_path):
    result = run_training(_args(image_folder, tmp_path, '--recipe', 'end-to-end'))
    assert list(result['results']) == ['static', 'end-to-end']
    assert 'eval_top1_step3' in _rows(tmp_path / 'run')[0]


@pytest.mark.parametrize(('family', 'stages'), [
    ('gfnet', STAGES), ('anchornet', ANCHORNET), ('clcnet', (None, 'member1', 'member2', 'confidence'))])
def test_mixed_precision(image_folder, tmp_path, family, stages):
    run_training(_args(image_folder, tmp_path, '--amp', '--amp-dtype', 'bfloat16', family=family))
    for folder in (*stages[1:-1], '.'):
        row, = _rows(tmp_path / 'run' / folder)
        assert 0 < abs(float(row['train_loss'])) < 10


@pytest.mark.parametrize(('family', 'stages', 'kills'), [
    # in each stage in mid-epoch, and while a state is written
    ('gfnet', STAGES, ['update:2', 'update:8', 'half:3', 'update:2', 'renamed:3', 'update:5', 'written:2']),
    ('anchornet', ANCHORNET, ['update:6', 'update:7', 'update:7']),  # once in each stage but the first
])
def test_killed_in_every_stage_ends_bit_identical(image_folder, tmp_path, family, stages, kills):
    options = [
        '--epochs', 2, '--model-ema', '--model-ema-decay', 0.9, '--checkpoint-interval', 2, '--policy-updates', 2,
        '--drop', 0.1, '--batch-size', 24, '--stage-args', 'static.epochs=1', '--resume', 'auto']
    run_training(_args(image_folder, tmp_path / 'reference', *options, family=family))
    args, seen = _args(image_folder, tmp_path / 'killed', *options, family=family), []
    states = CheckpointManager(tmp_path / 'killed/run/state')
    for kill in kills:
        assert Forked(train_until, kill, *args, folder=tmp_path).wait() == [-signal.SIGKILL]
        seen.append(states.load()['identity']['stage'] if states.exists() else None)
    assert set(stages[1:]) <= set(seen), seen
    run_training(args)
    check_same_end(tmp_path / 'reference/run', tmp_path / 'killed/run', (*stages[:-1], '.'))


@pytest.mark.parametrize(('family', 'stages'), [
    ('gfnet', STAGES), ('anchornet', ANCHORNET), ('clcnet', CLCNET[:2])])
def test_two_processes_in_every_stage(tmp_path, family, stages):
    images = make_images(tmp_path / 'images', {'train': 17, 'val': 7})
    args = _args(images, tmp_path, '--batch-size', 4, '--policy-updates', 2, family=family)
    if family == 'clcnet':  # only one process trains the confidence net; all must know what it was trained on
        args += ['--feature-split', 'train', '--test-split', 'val']
    run_forked(train_and_report, tmp_path / 'report.json', *args, processes=2, folder=tmp_path)
    expected = {
        'weights_equal': True, 'weights_learned': True, 'averages_equal': None, 'data_differ': True, 'updates': 3}
    assert json.loads((tmp_path / 'report.json').read_text()) == dict.fromkeys(stages, expected)
    if family == 'clcnet':  # both processes' shares, in the order of the images
        features = ConfidenceFeatures.load(tmp_path / 'run/features/member2.safetensors')
        assert features.names == create_dataset('', root=str(images), split='train').filenames()


@pytest.mark.parametrize(('changes', 'message'), [
    (['--init-from', 'missing'], "No checkpoint at 'missing'"),
    (['--stage', 'finetune', '--init-from', '{first}'], "keys are missing (first: 'policy."),
    (['--init-local', 'resnet18'], "The weights of 'resnet18' are not available"),
    (['--model-kwargs', 'patch_size=64'], 'Images of 48 pixels have no patches of 64'),
    (['--recipe', 'focusnet'], 'needs a baseline'),
    (['--device-modules', 'nonsense'], "--device-modules nonsense: No module named 'nonsense'"),
    (['--torchcompile', 'nonsense'], '--torchcompile nonsense: expected one of'),
    (['--smoothing', '2'], '--smoothing: expected a number from 0 to 1, got 2.0'),
    (['--mean', '0.5', '0.5'], 'expected one value, or one for each channel, got [0.5, 0.5]'),
    (['--opt-kwargs', 'nonsense=3'], '--opt sgd does not accept these --opt-kwargs'),
    (['--class-map', 'missing'], 'Cannot locate specified class map file (missing)'),
    (['--val-split', 'test'], "There is no split 'test' at"),
    (['--dataset', 'torch/nonsense'], "The dataset 'torch/nonsense' cannot be opened: Unknown torchvision dataset"),
])
def test_bad_input(image_folder, tmp_path, capsys, changes, message):
    model = timm.create_model('test_gfnet', num_classes=3, img_size=48, patch_size=16)
    encoders = {'model_prime_state_dict': model.global_encoder, 'model_state_dict': model.local_encoder}
    torch.save({**{k: v.state_dict() for k, v in encoders.items()},
                'fc': {'rnn.weight_ih_l0': model.classifier.rnn.weight_ih}}, tmp_path / 'first.pth.tar')
    torch.save(model.state_dict(), tmp_path / 'whole.pth')
    paths = {'{first}': tmp_path / 'first.pth.tar', '{whole}': tmp_path / 'whole.pth'}
    args = [a for a in _args(image_folder, tmp_path) if a not in ('--init-local', 'scratch')]
    assert train_main([*args, *(str(paths.get(c, c)) for c in changes)]) == 1
    assert message in capsys.readouterr().err


def test_stage_options(image_folder, tmp_path):
    run_training(_args(image_folder, tmp_path, '--stage-args', 'warmup.lr=0.02', 'policy.policy_gamma=0.5'))
    args = {s: yaml.safe_load((tmp_path / 'run' / f / 'stage.yaml').read_text())
            for s, f in zip(STAGES, ('static', 'warmup', 'policy', '.'))}
    assert (args['static']['model'], args['policy']['model']) == ('test_focusnet', 'test_gfnet')
    assert (args['warmup']['lr'], args['policy']['lr']) == (0.02, 3e-4)
    assert [args[s]['policy_gamma'] for s in STAGES[1:]] == [0.7, 0.5, 0.7]

    # the run's args.yaml repeats it, every stage with its own values
    run_training(['--config', str(tmp_path / 'run' / 'args.yaml'), '--experiment', 'again'])
    for stage, folder in zip(STAGES, ('static', 'warmup', 'policy', '.')):
        again = yaml.safe_load((tmp_path / 'again' / folder / 'stage.yaml').read_text())
        assert {k: v for k, v in again.items() if args[stage][k] != v}.keys() == {'config', 'experiment'}
        first, second = (_rows(tmp_path / run / folder)[0] for run in ('run', 'again'))
        assert first['train_loss'] == second['train_loss']
