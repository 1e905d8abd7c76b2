"""The README's Python snippets run."""
import re

import pytest
import timm
import torch
from helpers import ROOT, authors_checkpoint

import timm_dynamic  # noqa: F401

SNIPPETS = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.DOTALL)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with authors' files, in their layouts."""
    folder = tmp_path_factory.mktemp('authors')
    torch.save({'state_dict': timm.create_model('resnet18').state_dict()},
               folder / 'clonalnet_resnet18_model_best.pth.tar')
    gfnet = timm.create_model('gfnet_mobilenetv3_large_100_96').eval()
    torch.save(authors_checkpoint(gfnet, 'mobilenetv3_large_100', steps=3), folder / 'AUTHORS.pth.tar')
    return folder


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda s: s.strip().splitlines()[0][:40])
def test_snippet(snippet, files, monkeypatch):
    monkeypatch.chdir(files)
    exec(compile(snippet, 'README.md', 'exec'), {'timm': timm})
