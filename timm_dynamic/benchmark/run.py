"""The command line of benchmark.py."""
import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..launch.script import run_script
from ..utils.report import format_table, write_rows
from . import confidence, crop, exit, exits, loader, thresholds, train_step, windows

_logger = logging.getLogger(__name__)

_BENCHMARKS = (exit, exits, thresholds, crop, confidence, windows, train_step, loader)


def create_benchmark_parser() -> argparse.ArgumentParser:
    """Parser for benchmark.py, with a subcommand for each benchmark."""
    parser = argparse.ArgumentParser(
        prog='benchmark.py', description='Measure what timm_dynamic promises.', allow_abbrev=False)
    commands = parser.add_subparsers(dest='benchmark', metavar='BENCHMARK', required=True)
    for benchmark in _BENCHMARKS:
        p = commands.add_parser(benchmark.NAME, help=benchmark.HELP, description=benchmark.HELP, allow_abbrev=False)
        benchmark.add_arguments(p)
        p.add_argument('--results-file', metavar='FILE', help='write the table as CSV or JSON, too, by its ending')
        p.add_argument('--json', action='store_true', help='print the table as JSON')
        p.set_defaults(run=benchmark.run)
    return parser


def run_benchmark(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run benchmark.py.

    Args:
        argv: Command line without the script's name (default: this process's).

    Returns:
        The rows of the table that was printed.

    Raises:
        ValueError: An argument cannot be worked with.
    """
    args = create_benchmark_parser().parse_args(argv)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of benchmark.py. Returns the exit status: 0; 1 for what the user can mend."""
    def script() -> int:
        run_benchmark(argv)
        return 0

    return run_script(script)
