"""When to stop: exit tables, the solvers that make an exit policy of one, and early exit that runs it."""
from ..models.dynamic_net import ExitResult
from ..models.exit_cfg import register_exit_policy
from .cascade_table import cascade_table
from .collect import collect_exit_table
from .engine import early_exit
from .geometric import geometric_thresholds
from .guarantee import GuaranteedPolicy, Promise, solve_guaranteed
from .load_table import load_exit_table
from .policy import ExitPolicy, ValuePolicy
from .stream import ExitStream, StreamResult, StreamRun
from .table import ExitPoint, ExitTable
from .thresholds import solve_curve, solve_policy, solve_thresholds

__all__ = [
    'ExitPoint',
    'ExitPolicy',
    'ExitResult',
    'ExitStream',
    'ExitTable',
    'GuaranteedPolicy',
    'Promise',
    'StreamResult',
    'StreamRun',
    'ValuePolicy',
    'cascade_table',
    'collect_exit_table',
    'early_exit',
    'geometric_thresholds',
    'load_exit_table',
    'register_exit_policy',
    'solve_curve',
    'solve_guaranteed',
    'solve_policy',
    'solve_thresholds',
]


def __dir__() -> list[str]:
    return __all__
