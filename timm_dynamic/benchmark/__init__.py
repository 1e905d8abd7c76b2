from .confidence import benchmark_confidence
from .crop import benchmark_crop
from .exit import benchmark_exit
from .exits import benchmark_exits
from .loader import benchmark_loader
from .run import main as benchmark_main
from .run import run_benchmark
from .thresholds import benchmark_thresholds
from .timing import time_interleaved
from .train_step import benchmark_train_step
from .windows import benchmark_windows

__all__ = [
    'benchmark_confidence',
    'benchmark_crop',
    'benchmark_exit',
    'benchmark_exits',
    'benchmark_loader',
    'benchmark_main',
    'benchmark_thresholds',
    'benchmark_train_step',
    'benchmark_windows',
    'run_benchmark',
    'time_interleaved',
]
