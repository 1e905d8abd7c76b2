"""Runs the parts of `benchmarks/gpu.sh`, each in a process of its own with a time limit, and prints one table.

A part that fails, or is stopped at its limit, is a row of the table. The rows that it gave before are kept.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from timm_dynamic.utils.report import format_table, write_rows

Row = dict[str, Any]

COLUMNS = (
    'part', 'model', 'case', 'images_per_s', 'ms', 'x_static', 'efficiency', 'speedup', 'overhead', 'wait',
    'latency_ms', 'peak_mb', 'difference', 'result')


@dataclass(frozen=True)
class Part:
    """What is run in one process.

    Attributes:
        name: Of the part.
        seconds: Time limit.
        alone: It measures time: nothing else runs beside it.
        command: Appends rows to the file that is its last argument, one JSON object a line.
    """
    name: str
    seconds: float
    alone: bool = True
    command: tuple[str, ...] = (sys.executable, '-m', 'benchmarks.gpu_parts')


# Each part may take its limit, or what is left of the limit of all. The last one compiles, which takes the longest.
PARTS = (
    Part('parity', 90, alone=False),
    Part('resume', 150, alone=False),
    Part('stream', 100),
    Part('copies', 40),
    Part('train', 60),
    Part('loader', 60),
    Part('compiled', 400),
)


def create_parser() -> argparse.ArgumentParser:
    """Parser for gpu.sh."""
    parser = argparse.ArgumentParser(
        prog='benchmarks/gpu.sh', description='Measure and check on a GPU what needs one.', allow_abbrev=False)
    names = [part.name for part in PARTS]
    parser.add_argument('--device', default='cuda', metavar='DEVICE', help='(%(default)s)')
    parser.add_argument('--quick', action='store_true', help=(
        'a dry run: tiny models, few images, and no time limits but --seconds'))
    parser.add_argument('--parts', nargs='+', choices=names, default=names, metavar='PART', help=(
        f'run these only: {", ".join(names)}'))
    parser.add_argument('--out', metavar='DIR', help='for gpu.csv, gpu.json and gpu.log ($OUT, else output/gpu)')
    parser.add_argument(
        '--seconds', type=float, default=520, metavar='S', help='time limit for all parts together (%(default)s)')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 1 if something failed or was stopped."""
    args = create_parser().parse_args(argv)
    out = Path(args.out or os.environ.get('OUT') or 'output/gpu')
    out.mkdir(parents=True, exist_ok=True)
    options = ['--device', args.device, *['--quick'] * args.quick]
    parts = [replace(part, seconds=args.seconds) if args.quick else part for part in PARTS if part.name in args.parts]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the table is printed
    rows = run_parts(parts, options, out, args.seconds)
    return int(any(str(row.get('result', '')).startswith(('failed', 'stopped')) for row in rows))


def run_parts(parts: Sequence[Part], options: Sequence[str], out: Path, seconds: float) -> list[Row]:
    """Run parts, print their table, and write it to gpu.csv and gpu.json.

    Args:
        parts: Those that are not `alone` come first, and run beside each other.
        options: For their commands.
        out: Folder for the results, and for what the parts print: gpu.log.
        seconds: Time limit for all of them.

    Returns:
        The rows of the table.
    """
    end = time.monotonic() + seconds
    running: list[_Running] = []
    rows: list[Row] = []

    def finish() -> None:
        while running:
            rows.extend(running[0].finish())
            running.pop(0)
            _write(rows, out)  # now: this process may be killed

    with tempfile.TemporaryDirectory() as work, open(out / 'gpu.log', 'w', encoding='utf-8') as log:
        try:
            for part in parts:
                if part.alone:
                    finish()
                running.append(_Running(part, options, Path(work), log, min(part.seconds, end - time.monotonic())))
            finish()
        finally:
            for process in running:  # only where this process is stopped
                process.limit = 0
            finish()
            _print(rows)
    return rows


@dataclass
class _Running:
    """A part that was started, unless no time was left."""
    part: Part
    options: Sequence[str]
    work: Path
    log: IO[str]
    limit: float
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.file = self.work / f'{self.part.name}.jsonl'
        self.process: subprocess.Popen | None = None
        if self.limit > 1:
            self.process = subprocess.Popen(
                [*self.part.command, self.part.name, *self.options, str(self.file)],
                stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)

    def finish(self) -> list[Row]:
        """Wait for the end, or bring it about at the limit."""
        result = None
        if self.process is None:
            result = 'stopped: no time was left'
        else:
            try:
                status = self.process.wait(max(self.began + self.limit - time.monotonic(), 0))
                if status:
                    result = f'failed: exit status {status}, see gpu.log'
            except subprocess.TimeoutExpired:
                result = f'stopped after {self.limit:.0f} s'
            finally:
                self._kill()
        rows = self._read()
        if result is not None:
            rows.append({'result': result})
        seconds = time.monotonic() - self.began
        print(f'{self.part.name}: {seconds:.0f} s' + (f', {result}' if result else ''), flush=True)
        return [{'part': self.part.name, **row} for row in rows]

    def _kill(self) -> None:
        """End the process, and those that it started."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> list[Row]:
        rows = []
        for line in self.file.read_text(encoding='utf-8').splitlines() if self.file.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:  # killed while it wrote
                break
        return rows


def _columns(rows: list[Row]) -> list[Row]:
    """Rows with all columns that are used, in their order."""
    used = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    return [{column: row.get(column) for column in used} for row in rows]


def _write(rows: list[Row], out: Path) -> None:
    for file in ('gpu.csv', 'gpu.json'):
        write_rows(out / file, _columns(rows))


def _print(rows: list[Row]) -> None:
    small = [{k: f'{v:.1e}' if k == 'difference' and v else v for k, v in row.items()} for row in _columns(rows)]
    print('\n' + format_table(small), flush=True)


if __name__ == '__main__':
    sys.exit(main())
