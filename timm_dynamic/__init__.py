"""timm_dynamic: a timm plugin for image classifiers that spend compute where an image needs it.

Importing it registers its models with timm.
"""
from . import exits as exits  # its policies come with models' configs
from . import models as models
from .models import ConfidenceNet as ConfidenceNet
from .version import __version__ as __version__
