"""Results of predict.py: shards that are written as it runs, the table of all rows, and timm's file formats."""
import argparse
import csv
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from timm.data import CustomDatasetInfo, DatasetInfo, DatasetInfoLabelMapper, ImageNetInfo, infer_imagenet_subset

from ..utils import UserError, atomic_write, clean_partial_files, read_json, write_json
from ..utils.files import remove_tree

_logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
EXTENSIONS = {'csv': '.csv', 'json': '.json', 'json-record': '.json', 'json-split': '.json', 'parquet': '.parquet'}
_REQUEST = 'request.json'


class Shards:
    """Finished parts of a prediction, of consecutive images: one file each, complete or not there.

    Args:
        folder: Folder of the files. With several machines, all must see it.
        request: What the rows depend on, by the name of the option or input, as JSON.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        self.folder = folder
        self.request = json.loads(json.dumps(request, default=str))

    def finished(self) -> set[int]:
        """Numbers of the finished parts.

        Raises:
            UserError: They were made by another request.
        """
        if not (self.folder / _REQUEST).is_file():
            return set()
        before = read_json(self.folder / _REQUEST)
        changed = [name for name in {**before, **self.request} if before.get(name) != self.request.get(name)]
        if changed:
            raise UserError(
                f"'{self.folder}' holds an unfinished prediction with other {', '.join(changed)}. Continue with the "
                'same options, or remove this folder to start anew.')
        return {int(path.stem) for path in self.folder.glob('[0-9]*.json')}

    def start(self) -> None:
        """Create the folder, and remove what a killed process left unfinished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        clean_partial_files(self.folder)
        write_json(self.folder / _REQUEST, self.request)

    def write(self, number: int, rows: Sequence[Any], errors: Sequence[Any]) -> None:
        """Write a part."""
        with atomic_write(self._path(number)) as tmp:
            tmp.write_text(json.dumps({'rows': rows, 'errors': errors}), encoding='utf-8')

    def read(self, number: int) -> dict[str, list[Any]]:
        """Read the rows and errors of a part."""
        return read_json(self._path(number))

    def remove(self) -> None:
        """Remove the folder."""
        remove_tree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f'{number:06d}.json'


class ResultTable:
    """Rows of the results, from the shards: each iteration reads them.

    Args:
        args: Options of predict.py.
        shards: The shards.
        names: Name of each image; those of streams are in the shards.
        config: The model's pretrained_cfg.
        num_classes: Number of classes of the model.
        step_gmacs: Cost of an image that stops after each step [T]; None where it is not known.

    Attributes:
        columns: Names of the columns.
        numbers: Shards to read, in the order of the dataset.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            shards: Shards,
            names: Sequence[str] | None,
            config: Mapping[str, Any],
            num_classes: int,
            step_gmacs: Sequence[Any],
    ) -> None:
        self.args, self.shards, self.names, self.step_gmacs = args, shards, names, step_gmacs
        self.numbers: Sequence[int] = ()
        k = min(args.topk, num_classes)
        self.label_of = create_label_mapper(config, num_classes, args.label_type) if k else None
        index = k and (args.include_index or (self.label_of is None and args.label_type != 'none'))
        parts = [args.index_col] * bool(index) + [args.label_col] * (self.label_of is not None)
        widths = [k] * len(parts)
        if not args.exclude_output:
            parts, widths = [*parts, args.output_col or args.output_type], [*widths, k or num_classes]
        self.with_index, self.separate = bool(index), args.results_separate_col
        named = [
            [f'{part}_{i}' for i in range(width)] if self.separate and width > 1 else [part]
            for part, width in zip(parts, widths)]
        self.columns = [
            args.filename_col, *(name for part in named for name in part), 'steps_used', 'confidence', 'gmacs']
        if args.per_step:
            self.columns.append('steps')
        twice = [name for name, times in Counter(self.columns).items() if times > 1]
        if twice:
            raise ValueError(f"Two columns of the results are called '{twice[0]}'.")

    def __iter__(self) -> Iterator[Row]:
        for number in self.numbers:
            for key, classes, outputs, step, confidence, *steps in self.shards.read(number)['rows']:
                parts = [classes] * self.with_index
                if self.label_of is not None:
                    parts.append([self.label_of(index) for index in classes])
                if not self.args.exclude_output:
                    parts.append(outputs)
                cells: list[Any] = [self._name(*key)]
                for part in parts:
                    cells += part if self.separate or len(part) == 1 else [part]
                cells += [step, confidence, self.step_gmacs[step - 1], *steps]
                yield dict(zip(self.columns, cells))

    def errors(self) -> list[Row]:
        """File and reason of the images that cannot be read."""
        read = (self.shards.read(number)['errors'] for number in self.numbers)
        return [{'file': self._name(*key), 'reason': reason} for errors in read for key, reason in errors]

    def summary(self) -> dict[str, Any]:
        """Number of rows, their mean cost, and the shares of the steps."""
        steps = Counter(row[3] for number in self.numbers for row in self.shards.read(number)['rows'])
        images = sum(steps.values())
        known = images and None not in self.step_gmacs
        return {
            'images': images,
            'gmacs': sum(n * self.step_gmacs[step - 1] for step, n in steps.items()) / images if known else None,
            'exit_shares': [round(steps[t + 1] / max(images, 1), 4) for t in range(len(self.step_gmacs))]}

    def check_unique_names(self) -> None:
        """Raise a ValueError if two images have the same name."""
        names = Counter(self._name(i, None) for i in range(len(self.names or ())))
        twice = [name for name, times in names.items() if times > 1]
        if twice:
            raise ValueError(
                f"--results-format json is an object of rows by name, but several images are called '{twice[0]}': use "
                'json-record.')

    def _name(self, index: int, name: str | None) -> str:
        name = name or (self.names[index] if self.names is not None else f'{self.args.split}/{index:06d}')
        return name if self.args.fullname else Path(name).name


def create_label_mapper(
        config: Mapping[str, Any], num_classes: int, label_type: str,
) -> DatasetInfoLabelMapper | None:
    """Create the names of classes: those of a pretrained_cfg, else timm's of ImageNet; None if there are none."""
    subset = infer_imagenet_subset({'num_classes': num_classes})
    info: DatasetInfo
    if label_type == 'none':
        return None
    if config.get('label_names'):
        info = CustomDatasetInfo(config['label_names'], config.get('label_descriptions'))
    elif subset is not None:
        info = ImageNetInfo(subset)
    else:
        _logger.info('The model has no class names: class indices are written.')
        return None
    mapper = DatasetInfoLabelMapper(info, label_type)
    if mapper.coverage(num_classes).missing:
        _logger.warning(f'The model has {num_classes} classes and names for {mapper.coverage(num_classes).mapped}.')
    return mapper


def check_formats(formats: Sequence[str]) -> None:
    """Check early that results can be written.

    Raises:
        ValueError: Two formats have the same extension, or pyarrow is not installed.
    """
    extensions = [EXTENSIONS[fmt] for fmt in formats]
    if len(set(extensions)) < len(extensions):
        raise ValueError(f"--results-format {' '.join(formats)}: two of them have the same file extension.")
    if 'parquet' in formats:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as e:
            raise ValueError(
                '--results-format parquet needs pyarrow, which is not installed: pip install timm-dynamic[parquet].'
            ) from e


def write_predictions(path: Path, fmt: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows, atomically and without holding all of them in memory.

    Args:
        path: File to write.
        fmt: 'csv' (lists as JSON), 'json' (an object of rows by the first column), 'json-record' (a row per line),
            'json-split' ('columns' and 'data') or 'parquet'.
        columns: Columns of all rows.
        rows: The rows.
    """
    with atomic_write(path) as tmp:
        if fmt == 'parquet':
            _write_parquet(tmp, columns, rows)
            return
        with open(tmp, 'w', newline='', encoding='utf-8') as f:
            if fmt == 'csv':
                writer = csv.writer(f, lineterminator='\n')
                writer.writerow(columns)
                writer.writerows([_json(v) if isinstance(v, list) else v for v in row.values()] for row in rows)
            elif fmt == 'json':
                name = columns[0]
                items = (f'{_json(row[name])}: {_json({k: row[k] for k in columns[1:]})}' for row in rows)
                f.writelines(_joined('{\n', items, '\n}\n'))
            elif fmt == 'json-split':
                items = (_json(list(row.values())) for row in rows)
                f.writelines(_joined(f'{{"columns": {_json(list(columns))}, "data": [\n', items, '\n]}\n'))
            else:
                f.writelines(f'{_json(row)}\n' for row in rows)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _joined(start: str, items: Iterator[str], end: str) -> Iterator[str]:
    yield start
    for i, item in enumerate(items):
        yield item if i == 0 else f',\n{item}'
    yield end


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = iter(rows)
    table = pyarrow.Table.from_pylist(list(islice(rows, 65536)))
    if not len(table):
        table = pyarrow.table({name: [] for name in columns})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        while chunk := list(islice(rows, 65536)):
            writer.write_table(pyarrow.Table.from_pylist(chunk, table.schema))
