#!/usr/bin/env python3
"""Measure how fast early exit is. The benchmarks of single parts are in benchmarks/.

    python benchmark.py --help
    python benchmark.py exit --model gfnet_resnet50_96 --channels-last --fuse
    python benchmark.py exit --model local-dir:RUN/best --budget G --data-dir DIR --channels-last --fuse
"""
import sys

from timm_dynamic.benchmark import benchmark_main

if __name__ == '__main__':
    sys.exit(benchmark_main())
