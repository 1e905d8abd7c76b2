"""Load models by name in a process of its own, as a user does, and compare their logits.

    python tests/hub/load_driver.py EXPECTED.safetensors

EXPECTED holds logits of `fixed_logits` by the name given to create_model. Prints a JSON object of differences.
"""
import json
import sys

import timm
from safetensors.torch import load_file

import timm_dynamic  # noqa: F401
from timm_dynamic.hub import fixed_logits

found = {}
for name, expected in load_file(sys.argv[1]).items():
    model = timm.create_model(name, pretrained=True)
    found[name] = (fixed_logits(model, 1) - expected).abs().max().item()
    if name.startswith('gfnet'):
        assert len(model.exit_cfg['budgets']) == 39
        assert model.set_budget(gmacs=model.step_macs[1] / 1e9)
print(json.dumps(found))
