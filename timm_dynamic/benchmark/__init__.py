from ..utils.timing import get_device, time_call, time_each, time_interleaved, wait_for
from .command import benchmark_main, create_benchmark_parser, run_benchmark
from .exit import benchmark_exit

__all__ = [
    'benchmark_exit',
    'benchmark_main',
    'create_benchmark_parser',
    'get_device',
    'run_benchmark',
    'time_call',
    'time_each',
    'time_interleaved',
    'wait_for',
]
