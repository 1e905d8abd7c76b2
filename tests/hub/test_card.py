"""Model cards: metadata, text, and snippets that run."""
import argparse
import json
import re
import runpy

import pytest
import timm
from helpers import ROOT
from huggingface_hub import ModelCard

from timm_dynamic.hub import Entry, PublishError, read_catalog, render_card
from timm_dynamic.hub.card import write_card
from timm_dynamic.hub.publish import files_to_publish
from timm_dynamic.hub.runs import describe_run, show_option
from timm_dynamic.models.builder import BUNDLED
from timm_dynamic.utils import save_pretrained

CATALOG = read_catalog()
CARDS = ROOT / 'hfhub/cards'


def snippets(card):
    return re.findall(r'```python\n(.*?)```', card, re.DOTALL)


@pytest.mark.parametrize('name', CATALOG)
def test_every_entry_makes_a_card(name):
    entry = CATALOG[name]
    config = {'architecture': name.split('.')[0], 'num_classes': 1000, 'metrics': entry.metrics,
              'pretrained_cfg': {'input_size': [3, 224, 224]}}
    text = render_card(config, entry)
    data = ModelCard(text).data
    assert data.library_name == 'timm'
    assert data.pipeline_tag == 'image-classification'
    assert data.license == (entry.licence or 'unknown')
    assert data.datasets == (['imagenet-1k'] if entry.dataset == 'imagenet-1k' else None)
    assert {'timm', 'timm_dynamic'} <= set(data.tags)
    results = data.eval_results or []
    assert {r.metric_name: r.metric_value for r in results} == {
        {'top1': 'top-1', 'top5': 'top-5'}[k]: v for k, v in entry.metrics.items()}
    assert all(r.dataset_type == entry.dataset for r in results)
    first = snippets(text)[0]
    assert first.startswith('import timm, timm_dynamic')
    assert f"timm.create_model('{name}', pretrained=True)" in first
    for heading in ('## Usage', '## How it was made', '## Limits'):
        assert f'\n{heading}\n' in text
    if entry.repository:
        assert entry.repository in text
        assert f"[{entry.paper['title']}]({entry.paper['url']})" in text
        assert f'```bibtex\n{entry.citation}\n```' in text
    if entry.licence is None:
        assert 'Licence: none stated. The authors state no licence' in text


def test_a_card_of_another_repository_names_it():
    entry = CATALOG['gfnet_resnet50_96.paper_in1k']
    text = render_card({'architecture': 'gfnet_resnet50_96', 'num_classes': 1000}, entry, 'mirror/net')
    assert "timm.create_model('hf-hub:mirror/net', pretrained=True)" in text


def test_numbers():
    entry = Entry('a.b', dataset='imagenet-1k', paper={'title': 'T', 'url': 'U'}, steps=(70., 75.5),
                  published=({'gmacs': 0.74, 'threshold': 0.19, 'top1': 77.74},), baseline={'top1': 69.1, 'top5': 89.})
    budgets = [{'gmacs': 1.0, 'policy': [0.5, 0.], 'top1': 74.25, 'exit_shares': [0.5, 0.5]},
               {'gmacs': 1.2, 'policy': [0.7, 0.], 'evaluated': {
                   'gmacs': 1.25, 'top1': 75., 'exit_shares': [0.375, 0.625]}}]
    text = render_card({
        'architecture': 'a', 'num_classes': 1000, 'step_macs': [500_000_000, 1_500_000_000], 'metrics': {'top1': 75.5},
        'model_args': {'exit_cfg': {'budgets': budgets}}}, entry, picture=True)
    assert '* Steps: 2; cumulative GMACs: 0.5, 1.5\n' in text
    assert '| 1 | 0.5 | 70 |\n| 2 | 1.5 | 75.5 |' in text
    assert '| 1 | 74.25 | 50, 50 |\n| 1.25 | 75 | 37.5, 62.5 |' in text
    assert '| 0.74 | 0.19 | 77.74 |' in text
    assert '| frozen baseline | 69.1 | 89 |' in text
    assert 'model.set_budget(gmacs=1.2)' in text
    assert '![Top-1 accuracy over multiply-adds](curve.png)' in text
    assert 'early-exit' in ModelCard(text).data.tags


@pytest.mark.parametrize('name', sorted(p.name for p in BUNDLED.iterdir()))
def test_cards_of_the_demo_weights(name):
    """After a change to weights or cards, run hfhub/cards.py."""
    text = (CARDS / name / 'README.md').read_text(encoding='utf-8')
    code = {'timm': timm}
    for snippet in snippets(text):
        exec(compile(snippet, f'{name}/README.md', 'exec'), code)
    assert code['model'].pretrained_cfg['tag'] == 'digits'
    assert 'classes' in code
    assert ('curve.png' in text) == (CARDS / name / 'curve.png').exists()
    assert f'# {name}\n' in text


def test_cards_of_the_demo_weights_are_up_to_date(tmp_path):
    runpy.run_path(str(ROOT / 'hfhub/cards.py'))['write_cards'](tmp_path)
    written = {p.parent.name: p.read_text(encoding='utf-8') for p in tmp_path.rglob('README.md')}
    assert written == {p.parent.name: p.read_text(encoding='utf-8') for p in CARDS.rglob('README.md')}
    assert written.keys() == {p.name for p in BUNDLED.iterdir()}


def test_no_folder_of_the_machine_is_on_a_card(tmp_path):
    value = {'models': [f'local-dir:{tmp_path}/small', 'resnet50'], 'lr': 0.1, 'file': tmp_path / 'a.pth'}
    assert show_option(value) == 'models=local-dir:small resnet50 lr=0.1 file=a.pth'
    assert show_option('hf-hub:org/name') == 'hf-hub:org/name'


class TestWhatIsNotOurs:
    """Values of options and of a config.json may be anything."""

    def card(self, tmp_path, **options):
        folder = tmp_path / 'best'
        save_pretrained(timm.create_model('test_resnet', num_classes=3), folder)
        args = argparse.Namespace(model='test_resnet', **options)
        describe_run(folder, tmp_path / 'hub', 'me/net', 'r', {'static': args}, {}, [
            {'model': 'a|b', 'top1': 50., 'top5': 90., 'split': 'val', 'images': 3}], options.get('dataset', 'x'))
        return (tmp_path / 'hub' / 'README.md').read_text()

    def test_values_are_escaped(self, tmp_path):
        text = self.card(tmp_path, opt='a|b\n## Limits\n<script>`[x](y)')
        assert '| opt | a\\|b ## Limits &lt;script>\\`\\[x\\](y) |' in text
        assert '| a\\|b | 50 |' in text
        assert text.count('\n## Limits\n') == 1

    def test_data_and_commands_are_not_shown(self, tmp_path):
        pipe = "pipe:curl -s -H 'Authorization: Bearer SECRET' https://host/{0..9}.tar"
        text = self.card(
            tmp_path, data_dir='/home/SECRET', data='SECRET', dataset=f'wds/{pipe}', train_split=pipe,
            initial_checkpoint='https://user:SECRET@host/w.pth', model_kwargs={'x': ['s3://SECRET/a']})
        assert 'SECRET' not in text
        assert '| train_split | (a command or an address) |' in text

    @pytest.mark.parametrize(('change', 'message'), [
        ({'model_args': [1]}, r'model_args must be dict, got \[1\]'),
        ({'num_classes': True}, 'num_classes must be int, got True'),
        ({'architecture': None}, 'architecture must be str, got None'),
        ({'metrics': {'top1': '98'}}, "metrics.top1 must be numbers, got '98'"),
        ({'step_macs': [2, 1]}, 'step_macs must rise, got 2 before 1'),
        ({'model_args': {'exit_cfg': {'budgets': {}}}}, 'exit_cfg.budgets must be list'),
        ({'model_args': {'exit_cfg': {'budgets': [{'gmacs': 2}, {'gmacs': 1}]}}}, 'must rise, got 2 before 1'),
        ({'model_args': {'exit_cfg': {'budgets': [{'gmacs': '1'}]}}}, 'must be numbers'),
        ({'model_args': {'exit_cfg': {'budgets': [{'gmacs': 1, 'evaluated': 3}]}}}, 'evaluated must be dict, got 3'),
        ({'model_args': {'exit_cfg': {'budgets': [{'gmacs': 1, 'exit_shares': ['a']}]}}}, 'shares must be numbers'),
    ])
    def test_damaged_configs_are_named(self, tmp_path, change, message):
        config = {'architecture': 'a', 'num_classes': 3, **change}
        (tmp_path / 'config.json').write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"config.json': .*{message}"):
            write_card(tmp_path, Entry('a.b'))

    def test_links_are_not_published(self, tmp_path):
        self.card(tmp_path)
        folder = tmp_path / 'hub'
        assert set(files_to_publish(folder)) >= {'README.md', 'config.json', 'model.safetensors'}
        (folder / 'config.json').rename(tmp_path / 'elsewhere.json')
        (folder / 'config.json').symlink_to(tmp_path / 'elsewhere.json')
        with pytest.raises(PublishError, match=r"config.json' is a symbolic link"):
            files_to_publish(folder)
