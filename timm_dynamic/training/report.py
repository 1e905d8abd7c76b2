"""What a run shows: tables in the terminal, CSV and JSON files, a learning curve."""
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils import atomic_write, write_json


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Align rows of equal or similar keys as a table; missing values stay empty."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [[_show(row.get(c)) for c in columns] for row in rows]
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]

    def align(line: Sequence[str]) -> str:
        return '  '.join(v.rjust(w) if n else v.ljust(w) for v, w, n in zip(line, widths, numeric)).rstrip()

    return '\n'.join([align(columns), '  '.join('-' * w for w in widths), *map(align, cells)])


def _show(value: Any) -> str:
    if value is None:
        return ''
    return f'{value:.3f}' if isinstance(value, float) else str(value)


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], fmt: str | None = None) -> None:
    """Write rows as CSV or JSON, atomically.

    Args:
        path: File to write.
        rows: Rows with equal or similar keys.
        fmt: 'csv' or 'json'; by default by the file's ending.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if (fmt or path.suffix.lstrip('.')) == 'json':
        write_json(path, list(rows))
        return
    columns = list(dict.fromkeys(k for row in rows for k in row))
    with atomic_write(path) as tmp, open(tmp, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote as CSV; numbers become numbers again."""
    path = Path(path)
    if not path.exists():
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(f)]


def _number(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text or None
    return value if isinstance(value, (int, float)) else text


def plot_curve(path: str | Path, rows: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Draw training loss and validation metric over epochs.

    Returns:
        Whether it was drawn: not without matplotlib (the extra `plot`).
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout='constrained')
    left = figure.subplots()
    right = left.twinx()
    for axis, key, color in ((left, 'train_loss', 'tab:blue'), (right, f'eval_{metric}', 'tab:red')):
        points = [(row['epoch'], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points), color=color, marker='.')
        axis.set_ylabel(key.replace('_', ' '), color=color)
        axis.tick_params(axis='y', colors=color)
    left.set_xlabel('epoch')
    left.grid(alpha=0.3)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, dpi=120)
    return True
