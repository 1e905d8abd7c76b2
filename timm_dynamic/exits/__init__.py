from .collect import collect_exit_table
from .engine import early_exit
from .load_table import load_exit_table
from .policy import ExitPolicy, ValuePolicy
from .stream import ExitStream, StreamResult, StreamRun
from .table import ExitPoint, ExitTable
from .thresholds import geometric_thresholds, solve_curve, solve_policy, solve_thresholds

__all__ = [
    'ExitPoint',
    'ExitPolicy',
    'ExitStream',
    'ExitTable',
    'StreamResult',
    'StreamRun',
    'ValuePolicy',
    'collect_exit_table',
    'early_exit',
    'geometric_thresholds',
    'load_exit_table',
    'solve_curve',
    'solve_policy',
    'solve_thresholds',
]
