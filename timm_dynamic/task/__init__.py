from .focus_picking import FocusPickingTask, create_baseline
from .recipe import RECIPES, Recipe, Stage, StageContext, create_recipe

__all__ = ['RECIPES', 'FocusPickingTask', 'Recipe', 'Stage', 'StageContext', 'create_baseline', 'create_recipe']
