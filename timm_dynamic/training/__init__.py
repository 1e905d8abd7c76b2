from .run import main as train_main
from .run import run_training
from .validation import main as validate_main
from .validation import run_validation

__all__ = ['run_training', 'run_validation', 'train_main', 'validate_main']
