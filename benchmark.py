#!/usr/bin/env python3
"""Measure what timm_dynamic promises.

    python benchmark.py --help
    python benchmark.py exit --model gfnet_resnet50_96 --channels-last --fuse
    python benchmark.py thresholds
    python benchmark.py crop --batch-size 256
    python benchmark.py train-step --model focusnet_resnet18 --batch-size 32
    python benchmark.py exits TABLE
"""
import sys

from timm_dynamic.benchmark import benchmark_main

if __name__ == '__main__':
    sys.exit(benchmark_main())
