import types

from .anchornet import *
from .builder import load_checkpoint as load_checkpoint
from .clcnet import *
from .confidence_net import *
from .dynamic_net import DynamicNet as DynamicNet
from .dynamic_net import ExitResult as ExitResult
from .focusnet import *
from .gfnet import *


def __dir__() -> list[str]:
    public = {name: value for name, value in globals().items() if not name.startswith('_')}
    return [name for name, value in public.items() if not isinstance(value, types.ModuleType)]
