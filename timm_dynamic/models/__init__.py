from .anchornet import *
from .clcnet import *
from .confidence_net import *
from .focusnet import *
from .gfnet import *
