from .predict import main as predict_main
from .predict import run_prediction
from .validate import main as validate_main
from .validate import run_validation

__all__ = ['predict_main', 'run_prediction', 'run_validation', 'validate_main']
