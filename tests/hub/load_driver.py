"""Load models by name in a process of its own, as a user does, and compare their logits.

    python tests/hub/load_driver.py EXPECTED.safetensors [CARD ...]

EXPECTED holds logits of `fixed_logits` by the name given to create_model. Prints a JSON object of differences. Snippets
of the cards are run, with the organisation of TIMM_DYNAMIC_HUB_ORG.
"""
import json
import re
import sys
from pathlib import Path

import timm
from safetensors.torch import load_file

import timm_dynamic  # noqa: F401
from timm_dynamic.hub import fixed_logits
from timm_dynamic.models.builder import HUB_ORG

found = {}
for name, expected in load_file(sys.argv[1]).items():
    model = timm.create_model(name, pretrained=True)
    found[name] = (fixed_logits(model, 1) - expected).abs().max().item()
    if name.startswith('gfnet'):
        assert len(model.exit_cfg['budgets']) == 39
        assert model.set_budget(gmacs=model.step_macs[1] / 1e9)
for card in sys.argv[2:]:
    code: dict = {}
    text = Path(card).read_text(encoding='utf-8').replace('hf-hub:timm-dynamic/', f'hf-hub:{HUB_ORG}/')
    for snippet in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        exec(compile(snippet, card, 'exec'), code)
    assert code['model'].pretrained_cfg['architecture'] in Path(card).read_text(encoding='utf-8')
print(json.dumps(found))
