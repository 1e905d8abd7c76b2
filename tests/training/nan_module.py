"""A module for --device-modules: in one process, the output of a network is not a number once in training.

The environment says where: NAN_AT=RANK:CLASS:CALL, the CALL-th output with gradients of a module of this class.
"""
import os
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

RANK, CLASS, CALL = os.environ['NAN_AT'].split(':')
calls = 0


def spoil(module: Any, args: Any, output: Any) -> Any:
    global calls
    if type(module).__name__ != CLASS or not torch.is_grad_enabled():
        return None
    calls += 1
    if calls != int(CALL):
        return None
    return tuple(v * float('nan') for v in output) if isinstance(output, tuple) else output * float('nan')


if os.environ['RANK'] == RANK:
    register_module_forward_hook(spoil)
