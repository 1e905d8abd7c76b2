"""The catalog agrees with the registered models."""
import json
import sys

import pytest
import timm
from helpers import ROOT
from timm.models import model_entrypoint

import timm_dynamic  # noqa: F401
from timm_dynamic.hub import find_entry, read_catalog

CATALOG = ROOT / 'timm_dynamic/hub/catalog.json'


@pytest.fixture(scope='module')
def catalog():
    return read_catalog(CATALOG)


def registered() -> dict:
    """Configs of our models that name a repository."""
    modules = {f'timm_dynamic.models.{m}' for m in ('focusnet', 'gfnet', 'anchornet', 'clcnet')}
    out = {}
    for name in timm.list_models(include_tags=True):
        if model_entrypoint(name.split('.')[0]).__module__ in modules:
            cfg = timm.get_pretrained_cfg(name)
            if cfg is not None and cfg.hf_hub_id:
                out[name] = cfg
    for module in modules:
        for default in vars(sys.modules[module])['default_cfgs'].values():
            assert all(c.hf_hub_id is None for t, c in default.cfgs.items() if t == 'untrained')
    return out


def test_catalog_and_default_cfgs_agree(catalog):
    cfgs = registered()
    assert cfgs.keys() == catalog.keys(), 'every tag with weights has an entry in the catalog, and only those'
    for name, cfg in cfgs.items():
        entry = catalog[name]
        assert cfg.hf_hub_id == entry.hub_id
        assert cfg.origin_url == entry.repository, name
        if entry.paper:
            assert cfg.paper_name == entry.paper['title'], name
            ids = (cfg.paper_ids,) if isinstance(cfg.paper_ids, str) else cfg.paper_ids
            assert any(i.partition(':')[2] in entry.paper['url'] for i in ids), name
        if cfg.license:
            assert cfg.license == entry.licence


def test_entries_are_complete(catalog):
    for entry in catalog.values():
        assert entry.description
        assert entry.licence_note
        assert entry.recipe
        assert entry.limits
        if entry.repository:
            assert entry.files
            assert entry.citation.startswith('@')
            assert all(link.startswith('https://') for file in entry.files for link in file['links'])
    licences = {entry.title: entry.licence for entry in catalog.values()}
    assert licences['FocusNet'] is None
    assert licences['AnchorNet-patch'] is None
    assert licences['GFNet'] == 'apache-2.0'
    assert licences['CLCNet'] == 'mit'


def test_the_docs_and_the_catalog_quote_the_same_numbers(catalog):
    page = (ROOT / 'docs/focusnet.md').read_text(encoding='utf-8')
    for name, entry in catalog.items():
        if entry.title == 'FocusNet':
            before, after = ('{top1:.3f} / {top5:.3f}'.format(**m) for m in (entry.baseline, entry.metrics))
            assert f"| `{name.split('.')[0]}` | {before} | {after} |" in page


def test_anchornet_budgets_are_complete(catalog):
    entry = catalog['anchornet_patch_densenet201_95.paper_in1k']
    assert len(entry.budgets) == 34
    assert all(sum(b['exits']) == 50000 and len(b['thresholds']) == 5 for b in entry.budgets)


def test_both_anchornets_have_three_files(catalog):
    for backbone in ('densenet201', 'resnet50'):
        entry = find_entry(catalog, f'anchornet_patch_{backbone}_95')
        assert {file['part']: file['name'] for file in entry.files} == {
            'localizer': 'anchornet.pth', 'resized': f'{backbone}_resized_95_best.pth.tar',
            'patch': f'{backbone}_patch_95_best.pth.tar'}


def test_find_entry(catalog):
    assert find_entry(catalog, 'gfnet_resnet50_96').name == 'gfnet_resnet50_96.paper_in1k'
    assert find_entry(catalog, 'gfnet_resnet50_96.paper_in1k').name == 'gfnet_resnet50_96.paper_in1k'
    with pytest.raises(ValueError, match=r"got 'resnet50'. Available: focusnet_resnet18.paper_in1k,"):
        find_entry(catalog, 'resnet50')


@pytest.mark.parametrize(('change', 'message'), [
    (dict(family='nets'), "has the unknown family 'nets', expected a"),
    (dict(color='red'), 'has unknown fields: color'),
    (dict(name='b.c'), 'b.c appears twice'),
])
def test_bad_catalogs(tmp_path, change, message):
    models = [{'name': 'b.c', 'family': 'a'}, {'name': 'b.d', 'family': 'a', **change}]
    (tmp_path / 'c.json').write_text(json.dumps({'families': {'a': {'title': 'A'}}, 'models': models}))
    with pytest.raises(ValueError, match=message):
        read_catalog(tmp_path / 'c.json')
