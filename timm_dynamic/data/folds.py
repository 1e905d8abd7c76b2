"""Folds of a cross-validation: which images each net was not trained on."""
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timm.utils import natural_key

from ..utils import atomic_write

_SEVERAL = -2


class FoldMap:
    """Fold of each image, by its file name.

    Two names mean the same image if one path is the end of the other: 'val/n01440764/1.jpg', 'n01440764/1.jpg' and
    '1.jpg' mean the same, 'n01443537/1.jpg' means another.

    Args:
        names: For each fold the names of its images.

    Attributes:
        num_folds: Number of folds.

    Raises:
        ValueError: There are fewer than two folds, or one without images.
    """

    def __init__(self, names: Sequence[Sequence[str]]) -> None:
        self.num_folds = len(names)
        empty = [k + 1 for k, fold in enumerate(names) if not fold]
        if len(names) < 2 or empty:
            raise ValueError(f'Expected at least two folds and images in each, got {len(names)}, empty: {empty}.')
        self._names = [list(fold) for fold in names]
        self._whole: dict[str, int] = {}
        self._ends: dict[str, int] = {}  # by the shorter ends of names
        for k, fold in enumerate(names):
            for name in fold:
                whole, *ends = _ends_of(name)
                self._whole[whole] = k if self._whole.get(whole, k) == k else _SEVERAL
                for end in ends:
                    self._ends[end] = k if self._ends.get(end, k) == k else _SEVERAL

    @classmethod
    def read(cls, path: str | Path) -> 'FoldMap':
        """Read what `save` wrote, or a folder with one sub-folder of images for each fold, in natural order.

        Raises:
            ValueError: There is no such folder or file, or it holds no folds.
        """
        path = Path(path)
        try:
            if path.is_file():
                return cls._load(path)
            folders = sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith('.')),
                             key=lambda p: natural_key(p.name))
            found = [[p.relative_to(folder) for p in folder.rglob('*') if p.is_file()] for folder in folders]
            return cls([[p.as_posix() for p in fold if not any(part.startswith('.') for part in p.parts)]
                        for fold in found])
        except OSError as e:
            raise ValueError(f"There are no folds at '{path}': {e.strerror or e}.") from e
        except (ValueError, csv.Error) as e:
            raise ValueError(
                f"'{path}' does not say which images are in which fold ({e}) Expected a folder with one sub-folder of "
                'images for each fold, or a CSV with the columns file and fold.') from e

    @classmethod
    def _load(cls, path: Path) -> 'FoldMap':
        names: dict[int, list[str]] = {}
        with open(path, encoding='utf-8-sig', newline='') as f:
            reader = csv.DictReader(f)
            for row in reader:
                fold = row.get('fold') or ''
                if not row.get('file') or not fold.isdecimal() or int(fold) < 1:
                    raise ValueError(f'line {reader.line_num} has no file name, or no fold number (1, 2, ...).')
                names.setdefault(int(fold), []).append(row['file'])
        if max(names, default=0) > len(names):
            raise ValueError(f'the highest fold is {max(names)}, but only {len(names)} folds have images.')
        return cls([names[k] for k in sorted(names)])

    def save(self, path: str | Path) -> None:
        """Write a CSV with the columns 'file' and 'fold' (counted from 1)."""
        with atomic_write(path) as tmp, open(tmp, 'w', encoding='utf-8', newline='') as f:
            writer = csv.writer(f)
            writer.writerow(['file', 'fold'])
            writer.writerows([name, k + 1] for k, fold in enumerate(self._names) for name in fold)

    def folds_of(self, names: Sequence[str]) -> torch.Tensor:
        """Fold of each name [N] int64, counted from 0; -1 if it is in none.

        Raises:
            ValueError: A name is in several folds, or several images of different folds have this name.
        """
        folds = torch.tensor([self._find(name) for name in names], dtype=torch.int64)
        several = (folds == _SEVERAL).nonzero().flatten().tolist()
        if several:
            raise ValueError(
                f"'{names[several[0]]}' (and {len(several) - 1} others) is in several folds, or images of several "
                'folds have this name. Give longer paths that tell them apart.')
        return folds

    def _find(self, name: str) -> int:
        whole, *ends = _ends_of(name)
        places = ((self._whole, whole), (self._ends, whole), *((self._whole, end) for end in ends))
        return next((table[key] for table, key in places if key in table), -1)


def fold_names(names: Sequence[str], folds: torch.Tensor) -> list[list[str]]:
    """For each fold the names of its images, without repetitions: see `FoldMap`."""
    by_fold: Mapping[int, dict[str, None]] = {k: {} for k in range(int(folds.max()) + 1)}
    for name, fold in zip(names, folds.tolist()):
        by_fold[fold][name] = None
    return [list(fold) for fold in by_fold.values()]


def _ends_of(name: str) -> list[str]:
    """A path and all its shorter ends: 'a/b/c', 'b/c', 'c'."""
    parts = [part for part in name.replace('\\', '/').split('/') if part not in ('', '.')]
    return ['/'.join(parts[i:]) for i in range(len(parts))] or [name]
