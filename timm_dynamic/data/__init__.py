from .cluttered_digits import ClutteredDigits
from .confidence_features import ConfidenceFeatures
from .dataset_factory import DEMO_DATASET, class_to_idx, create_dataset
from .loader import TrainLoader, WorkerInit, create_train_loader, worker_context

__all__ = [
    'DEMO_DATASET',
    'ClutteredDigits',
    'ConfidenceFeatures',
    'TrainLoader',
    'WorkerInit',
    'class_to_idx',
    'create_dataset',
    'create_train_loader',
    'worker_context',
]
