from .confidence import benchmark_confidence
from .crop import benchmark_crop
from .exits import benchmark_exits
from .run import main as benchmark_main
from .run import run_benchmark
from .timing import time_interleaved
from .train_step import benchmark_train_step

__all__ = [
    'benchmark_confidence',
    'benchmark_crop',
    'benchmark_exits',
    'benchmark_main',
    'benchmark_train_step',
    'run_benchmark',
    'time_interleaved',
]
