"""Results as tables in the terminal, CSV, JSON and YAML files, and plots."""
import csv
import json
import math
import textwrap
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


def format_block(rows: Mapping[str, str], width: int = 100) -> str:
    """Format named texts as two aligned columns. Long texts are wrapped.

    Args:
        rows: Texts by name.
        width: Number of columns. A longer word, e.g. a path, is not broken.
    """
    left = max(map(len, rows)) + 2
    lines = []
    for name, text in rows.items():
        lines.append(textwrap.fill(
            text, width, initial_indent=name.ljust(left), subsequent_indent=' ' * left, break_long_words=False,
            break_on_hyphens=False))
    return '\n'.join(lines)


def fit_line(parts: Sequence[str], width: int = 120) -> str:
    """Join texts with ', ' into one line: the first one, and of the others as many as fit, the first ones first."""
    line = parts[0]
    for part in parts[1:]:
        joined = f"{line}{' ' if line.endswith(':') else ', '}{part}"
        line = joined if len(joined) <= width else line
    return line


def format_duration(seconds: float) -> str:
    """'0:07', '12:34', '1:23:45'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


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
        from matplotlib.ticker import MaxNLocator
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
    left.set(xlabel='epoch', title=f"{Path(path).absolute().parent.name}: training loss and validation {metric}")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
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


def find_same_accuracy(curve: Curve, top1: float) -> float | None:
    """Find the least cost at which a curve reaches an accuracy, between its points on straight lines.

    Args:
        curve: Points (GMACs, top-1 in %) by rising cost.
        top1: Accuracy in %.

    Returns:
        GMACs; None if the curve does not reach it.
    """
    before = None
    for gmacs, reached in curve:
        if reached >= top1:
            if before is None:
                return gmacs
            share = (top1 - before[1]) / (reached - before[1])
            return before[0] + share * (gmacs - before[0])
        before = gmacs, reached
    return None


def standard_error(top1: float, images: int) -> float:
    """Standard error of an accuracy in %, of independent images."""
    share = min(max(top1 / 100, 0.), 1.)
    return 100 * math.sqrt(share * (1 - share) / images)


def plot_accuracy_over_macs(
        path: str | Path,
        curves: Mapping[str, Curve],
        points: Mapping[str, Curve] | None = None,
        title: str = '',
        static: Mapping[str, Curve] | None = None,
        images: int | None = None,
) -> bool:
    """Draw accuracy over cost.

    Args:
        path: Picture to write, atomically. The extension sets the format.
        curves: Points (GMACs, top-1 in %) that are drawn as lines, by label.
        points: Points (GMACs, top-1 in %) that are drawn as markers, by label.
        title: Title of the picture.
        static: One point each of static nets and of a cascade's members. A dotted line marks the cost at which a curve
            has the accuracy of the best of them, if that is cheaper.
        images: Number of images. If one standard error is visible in the range of the picture, it is drawn.

    Returns:
        False if matplotlib (the extra `plot`) is not installed, else True.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    points, static = points or {}, static or {}
    every = [point for curve in (*curves.values(), *points.values(), *static.values()) for point in curve]
    costs, accuracies = zip(*every)
    errors = {top1: standard_error(top1, images) for top1 in accuracies} if images else {}
    if errors and max(errors.values()) < 0.02 * (max(accuracies) - min(accuracies)):
        errors = {}
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axis = figure.subplots()
    for label, curve in curves.items():
        line, = axis.plot(*zip(*curve), label=label, marker='o' if len(curve) < 16 else '', markersize=4)
        if errors:
            axis.fill_between(
                [gmacs for gmacs, _ in curve], [top1 - errors[top1] for _, top1 in curve],
                [top1 + errors[top1] for _, top1 in curve], color=line.get_color(), alpha=0.15, linewidth=0)
    markers = ('s', '^', 'D', 'v', 'P', 'X')
    for i, (label, curve) in enumerate({**points, **static}.items()):
        at, top1s = zip(*curve)
        size = 3 if len(curve) > 1 else 5 if errors else 8
        axis.errorbar(
            at, top1s, yerr=[errors[top1] for _, top1 in curve] if errors and len(curve) == 1 else None, label=label,
            linestyle='', marker=markers[i % len(markers)], markersize=size, capsize=5)
    if static:
        _mark_same_accuracy(axis, curves, max((curve[0] for curve in static.values()), key=lambda point: point[1]))
    if max(costs) > 30 * min(costs):
        axis.set_xscale('log')
    if errors:
        title = f'{title} (± one standard error of {images} images)'.strip()
    axis.set(xlabel='multiply-adds per image (GMACs)', ylabel='top-1 accuracy (%)', title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, dpi=150)
    return True


def _mark_same_accuracy(axis: Any, curves: Mapping[str, Curve], point: tuple[float, float]) -> None:
    """Draw a dotted line from a point to the cheapest curve of the same accuracy, with the share of the cost."""
    gmacs, top1 = point
    costs = (find_same_accuracy(curve, top1) for curve in curves.values())
    found = [cost for cost in costs if cost is not None and cost < gmacs]
    if not found:
        return
    axis.plot([min(found), gmacs], [top1, top1], linestyle=':', color='#555555', linewidth=1.2, zorder=1)
    axis.annotate(
        f'same accuracy at {100 * min(found) / gmacs:.0f} % of the cost', ((min(found) + gmacs) / 2, top1),
        xytext=(0, -4), textcoords='offset points', ha='center', va='top', fontsize='small', color='#555555')
