"""Which images exits are fitted on, and which they are evaluated on: never the same."""
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torchvision.datasets import VisionDataset

from ..data.splits import TRAIN_SPLITS, VALIDATION_SPLITS
from ..exits import ExitPoint, ExitTable

_logger = logging.getLogger(__name__)

HALF = 'half'
CROSS = 'cross'


@dataclass(frozen=True)
class Calibration:
    """Two exit tables of different images.

    Attributes:
        calibration: The table that exits are fitted on.
        evaluation: The table that they are evaluated on.
        fitted_on: Name of the images of the first.
        evaluated_on: Name of the images of the second.
        note: A warning to show with the results.
        rows: Which images of the split the evaluation table has, int64; None for all.
        halves: Of cross-fitting, the images of both halves, int64. Both tables are the whole one then.
    """
    calibration: ExitTable
    evaluation: ExitTable
    fitted_on: str
    evaluated_on: str
    note: str = ''
    rows: torch.Tensor | None = None
    halves: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of_tables(
            cls,
            calibration: ExitTable,
            evaluation: ExitTable,
            fitted_on: str,
            evaluated_on: str,
    ) -> 'Calibration':
        """Fit on one table, evaluate on another.

        Raises:
            ValueError: They hold the same images.
        """
        same = torch.equal(calibration.confidence, evaluation.confidence)
        if same and torch.equal(calibration.correct, evaluation.correct):
            raise ValueError(
                f'Exits must be fitted on other images than they are evaluated on: {fitted_on} and {evaluated_on} '
                'hold the same.')
        note = ''
        if fitted_on in TRAIN_SPLITS:
            note = (f'\nThe model may have been trained on {fitted_on}: exits fitted there may cost more, and give '
                    'less, on new images.')
        return cls(calibration, evaluation, fitted_on, evaluated_on, note)

    @classmethod
    def in_halves(cls, table: ExitTable, name: str, seed: int) -> 'Calibration':
        """Fit on a random half of a table, evaluate on the other half."""
        first, second = table.split_indices(0.5, seed)
        return cls(
            table.subset(first), table.subset(second), f'a random half of {name}', f'the other half of {name}',
            rows=second.sort().values)

    @classmethod
    def cross_fitted(cls, table: ExitTable, name: str, seed: int) -> 'Calibration':
        """Fit on all images of a table. Evaluate each random half of it with what was fitted on the other half."""
        return cls(
            table, table, f'all of {name}', f'{name}, cross-fitted in halves', halves=table.split_indices(0.5, seed))

    @cached_property
    def _folds(self) -> list[tuple[ExitTable, ExitTable, torch.Tensor]]:
        """Of cross-fitting: table to fit on, table to evaluate on, and the images of the latter.

        The solvers keep what they fitted for each table, so the tables are made once.
        """
        assert self.halves is not None
        return [
            (self.calibration.subset(fit), self.evaluation.subset(images), images)
            for fit, images in (self.halves, self.halves[::-1])]

    def evaluate(self, policies: Sequence[Any], refit: Callable[[ExitTable], Sequence[Any]]) -> list[ExitPoint]:
        """Evaluate policies on images that they were not fitted on.

        Args:
            policies: Policies fitted on `calibration`.
            refit: Fits the same policies on another table, for cross-fitting.

        Returns:
            A point for each of `policies`. With cross-fitting, its accuracy and cost are those of two other policies,
            each fitted on one half and evaluated on the other.
        """
        if self.halves is None:
            return [self.evaluation.evaluate(policy) for policy in policies]
        steps = torch.zeros(len(policies), len(self.evaluation), dtype=torch.int64)
        for table, held_out, images in self._folds:
            for row, policy in zip(steps, refit(table)):
                row[images] = held_out.steps_used(policy)
        return [self.evaluation.evaluate_steps(row, policy) for row, policy in zip(steps, policies)]


def same_split(a: str, b: str) -> bool:
    """Whether two names mean the same split to timm."""
    return a == b or any(a in names and b in names for names in (TRAIN_SPLITS, VALIDATION_SPLITS))


def open_calibration_loader(
        split: str,
        asked: str | None,
        candidates: Sequence[str],
        evaluated: Any,
        open_loader: Callable[[str], Any],
) -> tuple[str, Any]:
    """Find images to fit on that are not evaluated on.

    Args:
        split: Split that is evaluated on.
        asked: Split that `--calibrate-split` names, or 'half' or 'cross'.
        candidates: Otherwise these, the best first; 'half' and 'cross' among them use the evaluated images.
        evaluated: Loader of the images to evaluate on.
        open_loader: Makes a loader of a split.

    Returns:
        Name of the split and its loader; 'half' or 'cross' and None if exits are fitted on a half of the evaluated
        images, or by cross-fitting; '' and None if there are no images to fit on.

    Raises:
        ValueError: `asked` names the images to evaluate on, or does not exist.
    """
    if asked and same_split(asked, split):
        raise ValueError(
            f"--calibrate-split {asked}: --split {split} evaluates on these images. Name another split to fit on, or "
            f"'{HALF}' to fit on a random half of it and evaluate on the other half, or '{CROSS}' for both ways round.")
    for name in [asked] if asked else [s for s in candidates if not same_split(s, split)]:
        if name in (HALF, CROSS):
            return name, None
        try:
            loader = open_loader(name)
        except (ValueError, FileNotFoundError, RuntimeError) as e:
            if asked:
                raise
            _logger.info(f"There is no split '{name}' to fit on: {e}")
            continue
        if not share_images(evaluated.dataset, loader.dataset):
            return name, loader
        if asked:
            raise ValueError(
                f"--calibrate-split {asked}: its images are among those that --split {split} evaluates on. Is there a "
                f"split '{asked}'? '{HALF}' fits on a random half and evaluates on the other half.")
    return '', None


def share_images(a: Any, b: Any) -> bool:
    """Whether two datasets share images, as far as their file names tell."""
    a, b = (getattr(dataset, 'dataset', dataset) for dataset in (a, b))  # of a Subset
    samples = [getattr(getattr(dataset, 'reader', None), 'samples', None) for dataset in (a, b)]
    if None not in samples:
        names = [set(dataset.filenames(absolute=True)) for dataset in (a, b)]
        return not names[0].isdisjoint(names[1])
    # torchvision's datasets show their root and split; to timm, 'test' and 'validation' are one split of some of them.
    return isinstance(a, VisionDataset) and repr(a) == repr(b)
