from .class_match import match_classes, model_class_to_idx
from .cluttered_digits import ClutteredDigits
from .confidence_features import ConfidenceFeatures
from .dataset_factory import DEMO_ARGS, DEMO_DATASET, class_to_idx, create_dataset, format_demo_note, read_demo_note
from .folds import FoldMap, fold_names
from .loader import TrainLoader, WorkerInit, create_train_loader, worker_context
from .multi_view import MultiViewLoader, MultiViewTransform, collate_views, create_multi_view_transform
from .prediction_images import BatchKeys, CollateKeys, ImageKey, ImageList, PredictionImages, PredictionStream
from .random_view import RandomView
from .splits import find_split

__all__ = [
    'DEMO_ARGS',
    'DEMO_DATASET',
    'BatchKeys',
    'ClutteredDigits',
    'CollateKeys',
    'ConfidenceFeatures',
    'FoldMap',
    'ImageKey',
    'ImageList',
    'MultiViewLoader',
    'MultiViewTransform',
    'PredictionImages',
    'PredictionStream',
    'RandomView',
    'TrainLoader',
    'WorkerInit',
    'class_to_idx',
    'collate_views',
    'create_dataset',
    'create_multi_view_transform',
    'create_train_loader',
    'find_split',
    'fold_names',
    'format_demo_note',
    'match_classes',
    'model_class_to_idx',
    'read_demo_note',
    'worker_context',
]
