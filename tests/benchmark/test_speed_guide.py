"""The Python snippet of docs/speed.md runs."""
import re

import torch
from helpers import ROOT


def test_snippet():
    snippet, = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/speed.md').read_text(encoding='utf-8'), re.DOTALL)
    names = {}
    exec(compile(snippet, 'speed.md', 'exec'), names)
    assert names['result'].steps_used.shape == (1,)
    assert names['r'].steps_used.shape == (32,)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in names['model'].modules())
