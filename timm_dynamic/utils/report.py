"""Results as tables in the terminal, CSV, JSON and YAML files, and plots."""
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .files import atomic_write, write_json


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as an aligned table. Rows may have different keys; missing values stay empty."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    decimals = {c: _decimals([row.get(c) for row in rows]) for c in columns}
    cells = [[_show(row.get(c), decimals[c]) for c in columns] for row in rows]
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]

    def align(line: Sequence[str]) -> str:
        return '  '.join(v.rjust(w) if n else v.ljust(w) for v, w, n in zip(line, widths, numeric)).rstrip()

    return '\n'.join([align(columns), '  '.join('-' * w for w in widths), *map(align, cells)])


def _decimals(values: Sequence[Any]) -> int:
    """Number of decimals that shows three digits of the smallest value, from 3 to 6."""
    smallest = min((abs(v) for v in values if isinstance(v, float) and v), default=1.)
    return min(max(3, 2 - math.floor(math.log10(smallest))), 6) if smallest < math.inf else 3


def _show(value: Any, decimals: int = 3) -> str:
    if value is None:
        return ''
    if isinstance(value, (list, tuple)):
        return ' '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in value)
    return f'{value:.{decimals}f}' if isinstance(value, float) else str(value)


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], fmt: str | None = None) -> None:
    """Write rows as CSV or JSON, atomically.

    Args:
        path: File to write. Its folder is created.
        rows: Rows, which may have different keys. In CSV, list items are separated by spaces.
        fmt: 'csv' or 'json'. Default: by the file's extension.
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
        writer.writerows({k: _join_items(v) for k, v in row.items()} for row in rows)


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write options as YAML, atomically."""
    with atomic_write(path) as tmp:
        tmp.write_text(yaml.safe_dump(dict(values), default_flow_style=False), encoding='utf-8')


def _join_items(value: Any) -> Any:
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a CSV file of `write_rows`, with numbers as numbers. An empty list if there is no file.

    Raises:
        ValueError: It is not such a file.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        with open(path, newline='', encoding='utf-8') as f:
            rows = list(csv.DictReader(f, strict=True))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError('its rows do not have the same columns')
        return [{k: _number(v) for k, v in row.items()} for row in rows]
    except (csv.Error, ValueError, RecursionError) as e:
        raise ValueError(f"'{path}' cannot be read as a table: {e}") from e


def _number(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text or None
    return value if isinstance(value, (int, float)) else text


def plot_curve(path: str | Path, rows: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Draw training loss and validation metric over epochs.

    Args:
        path: Picture to write, atomically.
        rows: Rows with 'epoch', 'train_loss' and 'eval_' + metric.
        metric: Name of the validation metric.

    Returns:
        False if matplotlib (the extra `plot`) is not installed, else True.
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


Curve = Sequence[tuple[float, float]]


def check_plot(path: str | Path, option: str) -> None:
    """Check early that a plot can be written.

    Args:
        path: File to write.
        option: Option that names the file, for the message.

    Raises:
        ValueError: matplotlib is not installed, or cannot write files with this extension.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError(f'{option} needs matplotlib, which is not installed: pip install timm-dynamic[plot].') from e
    kinds = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip('.').lower() not in kinds:
        raise ValueError(f"{option}: expected a file that ends in one of {', '.join(sorted(kinds))}, got '{path}'.")


def plot_accuracy_over_macs(
        path: str | Path,
        curves: Mapping[str, Curve],
        points: Mapping[str, Curve] | None = None,
        title: str = '',
) -> bool:
    """Draw accuracy over cost.

    Args:
        path: Picture to write, atomically. The extension sets the format.
        curves: Points (GMACs, top-1 in %) that are drawn as lines, by label.
        points: Points (GMACs, top-1 in %) that are drawn as markers, by label, e.g. static models.
        title: Title of the picture.

    Returns:
        False if matplotlib (the extra `plot`) is not installed, else True.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axis = figure.subplots()
    for label, curve in curves.items():
        axis.plot(*zip(*curve), label=label, marker='o' if len(curve) < 16 else '', markersize=4)
    markers = ('s', '^', 'D', 'v', 'P', 'X')
    for i, (label, curve) in enumerate((points or {}).items()):
        axis.plot(
            *zip(*curve), label=label, linestyle='', marker=markers[i % len(markers)],
            markersize=8 if len(curve) == 1 else 3)
    costs = [gmacs for curve in (*curves.values(), *(points or {}).values()) for gmacs, _ in curve]
    if max(costs) > 30 * min(costs):
        axis.set_xscale('log')
    axis.set(xlabel='multiply-adds per image (GMACs)', ylabel='top-1 accuracy (%)', title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, dpi=150)
    return True
