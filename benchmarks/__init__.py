"""Benchmarks of parts of timm_dynamic, for its developers: run from a checkout, not in the wheel.

    python -m benchmarks --help
    python -m benchmarks crop --batch-size 256

`__main__` lists the sub-commands, a module each. `benchmarks/gpu.sh` runs everything that needs a GPU. The benchmark
that users need, `benchmark.py exit`, is in `timm_dynamic/benchmark/`, and so is what all share: command line, tables,
timing.
"""
