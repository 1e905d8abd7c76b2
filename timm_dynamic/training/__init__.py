from .run import main as train_main
from .run import run_training

__all__ = ['run_training', 'train_main']
