"""timm_dynamic: a timm plugin for image classifiers that spend compute where an image needs it.

Importing it registers its models with timm.
"""
from . import exits, layers, models, utils
from .exits import ExitStream, ExitTable, early_exit
from .models import ConfidenceNet, DynamicNet
from .models.macs import count_macs
from .utils import save_pretrained
from .version import __version__

__all__ = [
    'ConfidenceNet',
    'DynamicNet',
    'ExitStream',
    'ExitTable',
    '__version__',
    'count_macs',
    'early_exit',
    'exits',
    'layers',
    'models',
    'save_pretrained',
    'utils',
]


def __dir__() -> list[str]:
    return __all__  # what completion offers
