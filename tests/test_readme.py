"""The README's Python snippets run."""
import re

import pytest
import timm
import torch
from helpers import ROOT

SNIPPETS = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.DOTALL)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda s: s.strip().splitlines()[0][:40])
def test_snippet(snippet, tmp_path, monkeypatch):
    # the authors' file, in their layout
    weights = timm.create_model('resnet18').state_dict()
    torch.save({'state_dict': weights}, tmp_path / 'clonalnet_resnet18_model_best.pth.tar')
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, 'README.md', 'exec'), {'timm': timm})
