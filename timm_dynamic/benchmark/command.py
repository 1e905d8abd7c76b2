"""The command line of benchmark.py and of `python -m benchmarks`: each benchmark is a sub-command and gives a table."""
import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..launch.parser import StrictParser
from ..launch.script import run_script
from ..utils.report import format_table, write_rows
from . import exit

_logger = logging.getLogger(__name__)

# Modules with NAME, HELP, add_arguments(parser) and run(args), which gives the rows of a table.
BENCHMARKS = (exit,)


def create_benchmark_parser(
        benchmarks: Sequence[Any] = BENCHMARKS,
        prog: str = 'benchmark.py',
) -> argparse.ArgumentParser:
    """Parser with a sub-command for each benchmark.

    Args:
        benchmarks: Modules, see `BENCHMARKS`.
        prog: Name of the command.
    """
    prog = sys.argv[0] if sys.argv[0].startswith('timm-dynamic ') else prog
    parser = StrictParser(prog=prog, description='Measure how fast timm_dynamic is.')
    commands = parser.add_subparsers(dest='benchmark', metavar='BENCHMARK', required=True)
    for benchmark in benchmarks:
        p = commands.add_parser(benchmark.NAME, help=benchmark.HELP, description=benchmark.HELP)
        benchmark.add_arguments(p)
        p.add_argument('--results-file', metavar='FILE', help='also write the table, as CSV or JSON by its ending')
        p.add_argument('--json', action='store_true', help='print the table as JSON')
        p.set_defaults(run=benchmark.run)
    return parser


def run_benchmark(
        argv: Sequence[str] | None = None,
        parser: argparse.ArgumentParser | None = None,
) -> list[dict[str, Any]]:
    """Run one benchmark and print its table.

    Args:
        argv: Command line without the script's name (default: this process's).
        parser: Of `create_benchmark_parser` (default: that of benchmark.py).

    Returns:
        The rows of the table.

    Raises:
        ValueError: An argument does not fit.
    """
    args = (parser or create_benchmark_parser()).parse_args(argv)
    file = Path(args.results_file) if args.results_file else None
    if file is not None:  # before anything is measured
        if file.suffix not in ('.csv', '.json') or file.is_dir():
            raise ValueError(f"--results-file: expected a file that ends in .csv or .json, got '{file}'.")
        file.parent.mkdir(parents=True, exist_ok=True)
    rows = args.run(args)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _logger.info('\n' + format_table(rows))
    if file is not None:
        write_rows(file, rows)
    return rows


def benchmark_main(argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> int:
    """Entry point of benchmark.py. Returns the exit status: 0, or 1 for a user error."""
    def script() -> int:
        run_benchmark(argv, parser)
        return 0

    return run_script(script)
