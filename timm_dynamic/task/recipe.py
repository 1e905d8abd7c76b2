"""The recipes of train.py. A recipe is an ordered list of stages.

A stage defines its task, its initial weights and the options it changes. The training loop only needs
`task(input, target) -> {'loss', 'output', ...}`.
"""
import argparse
from collections.abc import Callable
from typing import Any

from timm.models import is_model_in_modules

from ..models.anchornet import AnchorNet, AnchorNetPatch
from ..models.clcnet import CLCNet
from ..models.gfnet import GFNet
from .anchornet import create_anchornet_recipe
from .classification import LOSS_OPTIONS, create_classification_recipe
from .clcnet import create_clcnet_recipe
from .focusnet import architecture_of, create_focusnet_recipe
from .gfnet_recipe import create_end_to_end_recipe, create_gfnet_recipe
from .stage import Recipe, Stage

RECIPES: dict[str, Callable[[argparse.Namespace, bool, Any], Recipe]] = {
    'classification': create_classification_recipe,
    'focusnet': create_focusnet_recipe,
    'gfnet': create_gfnet_recipe,
    'anchornet': create_anchornet_recipe,
    'clcnet': create_clcnet_recipe,
    'end-to-end': create_end_to_end_recipe,
}
# Classes of models that need their own recipe, by the name of their module, which is also the name of the recipe.
FAMILIES: dict[str, type | tuple[type, ...]] = {
    'gfnet': GFNet, 'anchornet': (AnchorNetPatch, AnchorNet), 'clcnet': CLCNet}
# Options that only some recipes read. Their defaults are None, False, '' or []; 0 is a value that was given.
_RECIPES_OF_OPTION = {
    'focus_baseline': ('focusnet',), 'focus_plain': ('focusnet',),
    **dict.fromkeys(('init_global', 'init_local'), ('gfnet', 'end-to-end')),
    'init_from': ('gfnet', 'end-to-end', 'anchornet'),
    'freeze_global': ('gfnet',),
    'init_downstream': ('anchornet',),
    **dict.fromkeys(('init_members', 'feature_split', 'features', 'folds', 'fold_dir', 'confidence'), ('clcnet',)),
    **dict.fromkeys(LOSS_OPTIONS, ('classification', 'focusnet')),
}


def create_recipe(args: argparse.Namespace, demo: bool = False, model: Any = None) -> Recipe:
    """Create the recipe of `--recipe`; else 'focusnet' if a baseline is given; else the recipe of the model's family.

    A model of no family has the recipe 'classification'. Models of a family need `--recipe classification` for that.

    Args:
        args: Options, without the defaults of a recipe.
        demo: Whether the embedded demo set is used.
        model: The model, if its family has recipes.

    Raises:
        ValueError: The recipe does not exist, an option is missing, or an option belongs to another recipe.
    """
    name = args.recipe or ('focusnet' if args.focus_baseline else _recipe_of_family(args, model))
    if name not in RECIPES:
        raise ValueError(f"--recipe: there is no recipe '{name}'. Choose from {', '.join(RECIPES)}.")
    for option, recipes in _RECIPES_OF_OPTION.items():
        value = getattr(args, option)
        if (value or (value == 0 and value is not False)) and name not in recipes:
            raise ValueError(
                f"--{option.replace('_', '-')} is an option of the recipe {' and '.join(map(repr, recipes))}, "
                f"not of '{name}'.")
    return RECIPES[name](args, demo, model)


def _recipe_of_family(args: argparse.Namespace, model: Any) -> str:
    for name, family in FAMILIES.items():
        if isinstance(model, family):
            return name
    # A FocusNet is an instance of its backbone's class: its name tells.
    return 'focusnet' if is_model_in_modules(architecture_of(args, model), ['focusnet']) else 'classification'


# Options without effect: name -> whether a stage uses it.
_USED_IF: dict[str, Callable[[argparse.Namespace], bool]] = {
    'warmup_lr': lambda args: args.warmup_epochs > 0,
    'decay_epochs': lambda args: args.sched == 'step',
    'decay_rate': lambda args: args.sched in ('step', 'multistep', 'plateau'),
    'lr_base': lambda args: not args.lr,
    'lr_base_size': lambda args: not args.lr,
    'momentum': lambda args: 'adam' not in args.opt,
}


def used_settings(stage: Stage, args: argparse.Namespace) -> dict[str, str]:
    """What a recipe sets in a stage, without what has no effect there.

    Args:
        stage: The stage.
        args: Its options from all sources.

    Returns:
        The values in `args`, as text.
    """
    names = ('batch_size' if name == 'global_batch_size' else name for name in stage.defaults)
    return {name: str(getattr(args, name)) for name in names if name not in _USED_IF or _USED_IF[name](args)}
