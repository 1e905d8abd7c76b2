"""Training data of a confidence net: sorted probabilities of a classifier, and whether it was right."""
import csv
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.confidence_net import check_probabilities
from ..utils import atomic_write

_FORMAT = 'timm_dynamic.confidence_features.1'


@dataclass
class ConfidenceFeatures:
    """Features of N images.

    Attributes:
        probabilities: Sorted falling [N, n], float32.
        correct: Whether the classifier was right [N], bool.
        names: File names. They may repeat, e.g. those of images in different folders, or of merged features.
    """
    probabilities: torch.Tensor
    correct: torch.Tensor
    names: list[str]

    def __post_init__(self) -> None:
        shape = list(self.probabilities.shape)
        if len(shape) != 2 or list(self.correct.shape) != shape[:1] or len(self.names) != shape[0]:
            raise ValueError(
                f'Expected probabilities [N, classes], correct [N] and N names, got {shape}, '
                f'{list(self.correct.shape)} and {len(self.names)}.')

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_logits(cls, logits: torch.Tensor, target: torch.Tensor, names: Sequence[str]) -> 'ConfidenceFeatures':
        """Make features from a classifier's logits [N, n] and the true classes [N]."""
        probabilities = logits.float().softmax(dim=1).sort(dim=1, descending=True).values
        return cls(probabilities.cpu(), (logits.argmax(dim=1) == target).cpu(), list(names))

    @classmethod
    def merge(cls, features: Sequence['ConfidenceFeatures']) -> 'ConfidenceFeatures':
        """Join features, e.g. of a shallow and a deep classifier.

        Raises:
            ValueError: They have different numbers of classes.
        """
        classes = [f.probabilities.shape[1] for f in features]
        if len(set(classes)) != 1:
            raise ValueError(f'Features of different numbers of classes cannot be merged: {classes}.')
        return cls(
            torch.cat([f.probabilities for f in features]), torch.cat([f.correct for f in features]),
            [name for f in features for name in f.names])

    def save(self, path: str | Path) -> None:
        """Write safetensors, whole or not at all."""
        # Names are JSON in a tensor of bytes: there is no room for millions of them in the header of the file.
        names = torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)
        with atomic_write(path) as tmp:
            save_file({
                'probabilities': self.probabilities.contiguous(), 'correct': self.correct.contiguous(), 'names': names,
            }, tmp, metadata={'format': _FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> 'ConfidenceFeatures':
        """Read what `save` wrote, or a CSV (chosen by the suffix), see `load_csv`.

        Raises:
            ValueError: The file holds no features, or is damaged.
        """
        if Path(path).suffix.lower() == '.csv':
            return cls.load_csv(path)
        try:
            with safe_open(path, framework='pt') as f:
                if (f.metadata() or {}).get('format') != _FORMAT:
                    raise ValueError(f'its format is not {_FORMAT}')
                names = json.loads(bytes(f.get_tensor('names').numpy()))
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise ValueError("'names' is no list of texts")
                features = cls(f.get_tensor('probabilities'), f.get_tensor('correct'), names)
            if features.correct.dtype != torch.bool:
                raise ValueError(f"'correct' is {features.correct.dtype}, not bool")
            check_probabilities(features.probabilities, is_sorted=True)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as e:
            raise ValueError(f"'{path}' cannot be read as confidence features: {e}") from e
        return features

    def save_csv(self, path: str | Path) -> None:
        """Write a CSV as the CLCNet authors' scripts do: UTF-8 with BOM, no header. A row is base name, n
        probabilities (as few digits as read back the same float32), and 0 or 1.
        """
        with atomic_write(path) as tmp, open(tmp, 'w', encoding='utf-8-sig', newline='') as f:
            writer = csv.writer(f)
            for name, row, correct in zip(self.names, self.probabilities.numpy(), self.correct.tolist()):
                writer.writerow([os.path.basename(name), *map(str, row), int(correct)])

    @classmethod
    def load_csv(cls, path: str | Path) -> 'ConfidenceFeatures':
        """Read a CSV as `save_csv` writes it. Rows that are not sorted are sorted.

        Raises:
            ValueError: A row has another length than the first, or no probabilities followed by 0 or 1. The message
                names its line.
        """
        names: list[Any] = []
        rows: list[Any] = []
        with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as f:
            for line, name, values in _parse(f, path):
                if rows and len(values) != len(rows[0]):
                    raise ValueError(
                        f"'{path}', line {line}: {len(values) - 1} probabilities, the first row has "
                        f'{len(rows[0]) - 1}.')
                if len(values) < 2 or values[-1] not in (0, 1):
                    raise ValueError(f"'{path}', line {line}: expected probabilities and then 0 or 1.")
                names.append(name)
                rows.append(values)
        if not rows:
            raise ValueError(f"'{path}' is empty.")
        table = torch.from_numpy(np.stack(rows))
        probabilities = table[:, :-1].sort(dim=1, descending=True).values
        bad = ~(((probabilities.sum(dim=1) - 1).abs() <= 0.01) & (probabilities[:, -1] >= 0))  # true for NaN, too
        if bad.any():
            row = int(bad.int().argmax())
            raise ValueError(
                f"'{path}': the probabilities of '{names[row]}' (image {row + 1}) sum to "
                f'{probabilities[row].sum():.4g}, and the smallest is {probabilities[row, -1]:.4g}.')
        return cls(probabilities, table[:, -1] > 0.5, names)


def _parse(f: io.TextIOBase, path: str | Path) -> Iterator[tuple[int, str, np.ndarray]]:
    """Line number, name and numbers of each row. numpy reads a row about ten times faster than the csv module."""
    for number, line in enumerate(f, 1):
        line = line.rstrip('\r\n')
        if not line.strip():
            continue
        if not line.isascii() and any('\udc80' <= c <= '\udcff' for c in line):
            raise ValueError(f"'{path}', line {number}: this is not UTF-8.")
        if line.startswith('"'):
            name, *fields = next(csv.reader([line]))
            rest = ','.join(fields)
        else:
            name, _, rest = line.partition(',')
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('error')  # numpy only warns if it cannot read everything
                values = np.fromstring(rest, dtype=np.float32, sep=',') if rest else np.empty(0, np.float32)
        except (DeprecationWarning, ValueError) as e:
            raise ValueError(f"'{path}', line {number}: not all fields after the name are numbers.") from e
        yield number, name, values
