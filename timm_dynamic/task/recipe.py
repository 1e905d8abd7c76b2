"""Which recipe train.py runs: an ordered list of stages.

A stage names its task, where its weights start, and the options it changes. The training loop knows only
`task(input, target) -> {'loss', 'output', ...}`.
"""
import argparse
from collections.abc import Callable
from typing import Any

from ..models.anchornet import AnchorNetPatch
from ..models.clcnet import CLCNet
from ..models.gfnet import GFNet
from .anchornet import create_anchornet_recipe
from .classification import LOSS_OPTIONS, create_classification_recipe
from .clcnet import create_clcnet_recipe
from .focusnet import create_focusnet_recipe
from .gfnet_recipe import create_end_to_end_recipe, create_gfnet_recipe
from .stage import Recipe

RECIPES: dict[str, Callable[[argparse.Namespace, bool, Any], Recipe]] = {
    'classification': create_classification_recipe,
    'focusnet': create_focusnet_recipe,
    'gfnet': create_gfnet_recipe,
    'anchornet': create_anchornet_recipe,
    'clcnet': create_clcnet_recipe,
    'end-to-end': create_end_to_end_recipe,
}
_FAMILIES: dict[type, str] = {GFNet: 'gfnet', AnchorNetPatch: 'anchornet', CLCNet: 'clcnet'}
# Options that only some recipes know. Their defaults are false, and no number.
_OWN_OPTIONS = {
    'focus_baseline': ('focusnet',), 'focus_plain': ('focusnet',),
    **dict.fromkeys(('init_global', 'init_local', 'init_from'), ('gfnet', 'end-to-end')),
    'freeze_global': ('gfnet',),
    'init_downstream': ('anchornet',),
    **dict.fromkeys(('init_members', 'feature_split', 'features', 'folds', 'fold_dir', 'confidence'), ('clcnet',)),
    **dict.fromkeys(LOSS_OPTIONS, ('classification', 'focusnet')),
}


def create_recipe(args: argparse.Namespace, demo: bool = False, model: Any = None) -> Recipe:
    """Choose the recipe by `--recipe`, else by the other options: a baseline makes it 'focusnet'; else by the model.

    Args:
        args: Options, without any recipe's defaults.
        demo: The embedded demo set is trained on.
        model: The model, if it is of a family that has recipes of its own.

    Raises:
        ValueError: There is no such recipe, or it lacks something.
    """
    own = next((name for family, name in _FAMILIES.items() if isinstance(model, family)), 'classification')
    name = args.recipe or ('focusnet' if args.focus_baseline else own)
    if name not in RECIPES:
        raise ValueError(f"There is no recipe '{name}': choose from {', '.join(RECIPES)}.")
    for option, recipes in _OWN_OPTIONS.items():
        value = getattr(args, option)
        if (value or (value == 0 and value is not False)) and name not in recipes:
            raise ValueError(
                f"--{option.replace('_', '-')} belongs to the recipe {' and '.join(map(repr, recipes))}, "
                f"not to '{name}'.")
    return RECIPES[name](args, demo, model)
