"""The demo set means the same to train.py, validate.py and the cards."""
import json
from pathlib import Path

import pytest
import timm

from timm_dynamic.data import cluttered_digits
from timm_dynamic.evaluation import run_validation
from timm_dynamic.models.builder import BUNDLED
from timm_dynamic.training import run_training

RUNS = {
    # Without validation, a baseline that is no better than chance is not refused.
    'focusnet': ['--model', 'test_focusnet', '--focus-baseline', 'scratch', '--val-split', ''],
    'gfnet': ['--model', 'test_gfnet'],
    'anchornet': ['--model', 'test_anchornet_patch'],
    'clcnet': ['--model', 'test_clcnet', '--folds', '2'],
}
LAST = {'focusnet': 'focus', 'gfnet': 'finetune', 'anchornet': 'patch', 'clcnet': 'confidence'}


@pytest.fixture
def small_splits(monkeypatch):
    for split, num in (('train', 64), ('val', 60), ('test', 50)):
        monkeypatch.setitem(cluttered_digits._SPLITS, split, (cluttered_digits._SPLITS[split][0], num))


@pytest.mark.parametrize('settings', [[], ['--demo-digit-scale', '40', '60', '--demo-clutter', '0']], ids=['', 'other'])
@pytest.mark.parametrize('family', RUNS)
def test_validate_repeats_the_table_of_train(family, settings, small_splits, tmp_path):
    if settings and family in ('gfnet', 'anchornet'):
        settings = [*settings, '--demo-img-size', '128']
    result = run_training([
        *RUNS[family], *settings, '--device', 'cpu', '-j', '0', '--epochs', '1', '--output', str(tmp_path),
        '--experiment', 'run'])
    for row, folder in zip(result['table'][::-1], ('best', 'member2/best' if family == 'clcnet' else 'static/best')):
        if family == 'focusnet' and folder != 'best':
            folder = 'baseline/best'
        validated, *_ = run_validation([
            '--model', f'local-dir:{tmp_path / "run" / folder}', '--device', 'cpu', '-j', '0'])
        assert row['split'] == 'test'
        names = [k for k in ('loss', 'top1', 'top5', 'images') if k in row]
        assert {k: validated[k] for k in names} == {k: row[k] for k in names}
        assert validated['gmacs'] == row.get('gmacs', validated['gmacs'])
    notes = timm.create_model(f'local-dir:{tmp_path / "run" / "best"}').pretrained_cfg.get('notes')
    if settings:
        assert '"clutter": 0.0, "digit_scale": [40, 60]' in notes[0]
    else:
        assert not notes


def _published(name):
    catalog = json.loads((Path(__file__).parents[2] / 'timm_dynamic/hub/catalog.json').read_text())
    return next(m['metrics'] for m in catalog['models'] if m['name'] == name)


@pytest.mark.parametrize('name', sorted(p.name for p in BUNDLED.iterdir()))
def test_bundled_weights_have_their_published_figures(name):
    metrics = _published(name)
    row, *_ = run_validation(['--model', name, '--pretrained', '--device', 'cpu', '-j', '0', '-b', '100'])
    assert (row['images'], row['top1'], row['top5']) == (2000, metrics['top1'], metrics['top5'])
