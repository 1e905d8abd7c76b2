"""A user's script that type checkers read: each `type: ignore` is an argument that they must refuse.

mypy reports an ignore that is not needed. The file is not run.
"""
import timm
import torch

import timm_dynamic
from timm_dynamic import DynamicNet, ExitStream, ExitTable, early_exit
from timm_dynamic.exits import solve_thresholds

model = timm.create_model('test_gfnet.digits', pretrained=True).eval()
assert isinstance(model, DynamicNet)
model.set_budget(0.01)
x = torch.rand(4, 3, 64, 64)
print(early_exit(model, x).steps_used)
stream = ExitStream(model)
table = ExitTable(torch.rand(10, 3), torch.rand(10, 3) > 0.5, [1, 2, 3])
thresholds = solve_thresholds(table, 2e-9)

early_exit(model, 'cat.jpg')  # type: ignore[arg-type]
model.set_budget('cheap')  # type: ignore[arg-type]
ExitStream(table)  # type: ignore[arg-type]
solve_thresholds(thresholds, 2e-9)  # type: ignore[arg-type]
timm_dynamic.early_exits(model, x)  # type: ignore[attr-defined]
