"""config.json of a folder to publish."""
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..utils import read_json

_TYPES = {
    'architecture': str, 'num_classes': int, 'pretrained_cfg': dict, 'model_args': dict, 'metrics': dict,
    'step_macs': list, 'conversion': dict,
}


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a config.json, and check what a card shows of it: it may come from elsewhere.

    Raises:
        ValueError: It is not JSON, an entry is missing or of another type, or costs do not rise.
    """
    config = read_json(path)
    try:
        _check(config)
    except ValueError as e:
        raise ValueError(f"'{path}': {e}") from e
    return config


def _check(config: Mapping[str, Any]) -> None:
    for key, expected in _TYPES.items():
        if key in config or key in ('architecture', 'num_classes'):
            _expect(config.get(key), expected, key)
    for key, value in config.get('metrics', {}).items():
        _expect_numbers([value], f'metrics.{key}')
    _expect_rising(config.get('step_macs', []), 'step_macs')
    exit_cfg = config.get('model_args', {}).get('exit_cfg', {})
    _expect(exit_cfg, dict, 'exit_cfg')
    budgets = exit_cfg.get('budgets', [])
    _expect(budgets, list, 'exit_cfg.budgets')
    for i, budget in enumerate(budgets):
        name = f'exit_cfg.budgets[{i}]'
        _expect(budget, dict, name)
        _expect(budget.get('evaluated', {}), dict, f'{name}.evaluated')
        shown = {**budget, **budget.get('evaluated', {})}
        _expect_numbers([shown[k] for k in ('top1', 'top5') if k in shown], f'{name}: top1 and top5')
        _expect(shown.get('exit_shares', []), list, f'{name}.exit_shares')
        _expect_numbers(shown.get('exit_shares', []), f'{name}.exit_shares')
    _expect_rising([budget.get('gmacs') for budget in budgets], 'the gmacs of exit_cfg.budgets')


def _expect(value: Any, expected: type, name: str) -> None:
    if not isinstance(value, expected) or isinstance(value, bool):
        raise ValueError(f'{name} must be {expected.__name__}, got {value!r:.60}.')


def _expect_numbers(values: Sequence[Any], name: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f'{name} must be numbers, got {value!r:.60}.')


def _expect_rising(values: Sequence[Any], name: str) -> None:
    _expect_numbers(values, name)
    for low, high in pairwise(values):
        if low > high:
            raise ValueError(f'{name} must rise, got {low:g} before {high:g}.')
