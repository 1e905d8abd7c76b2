from .anchornet import AnchorNetTask
from .clcnet_recipe import NUM_FOLDS, member_sources, member_stage
from .confidence import (
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
    'NUM_FOLDS',
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
    'member_sources',
    'member_stage',
    'score_folds',
]
