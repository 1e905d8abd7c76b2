from .crop import benchmark_crop
from .exits import benchmark_exits
from .run import main as benchmark_main
from .run import run_benchmark
from .timing import time_interleaved

__all__ = ['benchmark_crop', 'benchmark_exits', 'benchmark_main', 'run_benchmark', 'time_interleaved']
