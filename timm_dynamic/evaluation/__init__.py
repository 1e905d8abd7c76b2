from .validate import main as validate_main
from .validate import run_validation

__all__ = ['run_validation', 'validate_main']
