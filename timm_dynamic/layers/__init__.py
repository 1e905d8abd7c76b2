from .autocast import no_autocast
from .fuse import fuse_conv_bn
from .patch_crop import crop_patches, crop_patches_bilinear, get_glance, get_patch_coords
from .patch_policy import PatchPolicy
from .renormalize import Renormalize
from .restricted_attention import restricted_attention
from .step_classifier import ConcatStepClassifier, RecurrentStepClassifier, StepClassifier
from .tabnet import FeatureTransformer, GhostBatchNorm
from .window_choice import check_iou_thresholds, choose_windows, class_activation_map

__all__ = [
    'ConcatStepClassifier',
    'FeatureTransformer',
    'GhostBatchNorm',
    'PatchPolicy',
    'RecurrentStepClassifier',
    'Renormalize',
    'StepClassifier',
    'check_iou_thresholds',
    'choose_windows',
    'class_activation_map',
    'crop_patches',
    'crop_patches_bilinear',
    'fuse_conv_bn',
    'get_glance',
    'get_patch_coords',
    'no_autocast',
    'restricted_attention',
]
