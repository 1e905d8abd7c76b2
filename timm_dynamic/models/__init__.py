from .anchornet import *
from .clcnet import *
from .focusnet import *
from .gfnet import *
