from .confidence_net import ConfidenceNet, SparseMasks
from .fuse import fuse_conv_bn
from .patch_crop import crop_patches, crop_patches_bilinear, get_glance, get_patch_coords
from .patch_policy import PatchPolicy
from .step_classifier import ConcatStepClassifier, RecurrentStepClassifier, StepClassifier
from .window_choice import check_iou_thresholds, choose_windows, class_activation_map

__all__ = [
    'ConcatStepClassifier',
    'ConfidenceNet',
    'PatchPolicy',
    'RecurrentStepClassifier',
    'SparseMasks',
    'StepClassifier',
    'check_iou_thresholds',
    'choose_windows',
    'class_activation_map',
    'crop_patches',
    'crop_patches_bilinear',
    'fuse_conv_bn',
    'get_glance',
    'get_patch_coords',
]
