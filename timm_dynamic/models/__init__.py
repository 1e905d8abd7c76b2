from .focusnet import *
