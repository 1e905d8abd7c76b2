from .focusnet import *
from .gfnet import *
