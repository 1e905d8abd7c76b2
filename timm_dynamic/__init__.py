"""timm_dynamic: a timm plugin for image classifiers that spend compute where an image needs it.

Importing it registers its models with timm.
"""
from . import models as models
from .exits import early_exit as early_exit
from .models import ConfidenceNet as ConfidenceNet
from .models.macs import count_macs as count_macs
from .utils import save_pretrained as save_pretrained
from .version import __version__ as __version__
