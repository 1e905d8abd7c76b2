from .anchornet import AnchorNetTask
from .confidence_net import (
    ConfidenceFit,
    ConfidenceTask,
    fit_confidence_net,
    fit_folds,
    make_folds,
    match_scores,
    score_folds,
)
from .focusnet import FocusPickingTask, create_baseline
from .gfnet import EndToEndTask, GlanceFocusTask, PatchPolicyTask
from .recipe import RECIPES, create_recipe
from .stage import Recipe, Stage, StageContext

__all__ = [
    'RECIPES',
    'AnchorNetTask',
    'ConfidenceFit',
    'ConfidenceTask',
    'EndToEndTask',
    'FocusPickingTask',
    'GlanceFocusTask',
    'PatchPolicyTask',
    'Recipe',
    'Stage',
    'StageContext',
    'create_baseline',
    'create_recipe',
    'fit_confidence_net',
    'fit_folds',
    'make_folds',
    'match_scores',
    'score_folds',
]
