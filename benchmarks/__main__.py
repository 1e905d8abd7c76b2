"""The command line: see `benchmarks`."""
import sys

from timm_dynamic.benchmark import benchmark_main, create_benchmark_parser

from . import confidence, crop, exits, families, guarantee, loader, thresholds, train_step, windows

BENCHMARKS = (exits, families, guarantee, thresholds, crop, confidence, windows, train_step, loader)
parser = create_benchmark_parser(BENCHMARKS, 'python -m benchmarks')

if __name__ == '__main__':
    sys.exit(benchmark_main(parser=parser))
