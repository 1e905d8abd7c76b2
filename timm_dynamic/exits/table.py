"""Exit tables: confidence and correctness of a model after each step, and what an exit policy gives on them."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.exit_cfg import ask_stop_rule, check_policy_steps, check_thresholds
from ..utils.files import atomic_write

_FORMAT = 'timm_dynamic.exit_table.1'


@dataclass(frozen=True, repr=False)
class ExitPoint:
    """Accuracy and cost of one exit policy on a table.

    Attributes:
        top1: Accuracy in %.
        top5: Top-5 accuracy in %; None if the table does not have it.
        gmacs: Mean cost of a sample in 10⁹ multiply-adds.
        exit_shares: Share of the samples that stop after each step [T], float64.
        exit_correct: Number of these samples whose prediction is correct [T], int64.
        steps_used: The step after which each sample stops [N] int64, in 1..T.
        policy: The `ExitPolicy`, or the thresholds.
    """
    top1: float
    top5: float | None
    gmacs: float
    exit_shares: torch.Tensor
    exit_correct: torch.Tensor
    steps_used: torch.Tensor
    policy: Any

    def __repr__(self) -> str:
        top5 = '' if self.top5 is None else f'top5={self.top5:.2f}, '
        policy = f'policy={self.policy}'
        if self.thresholds is not None:
            policy = f"thresholds={_numbers(self.thresholds.tolist(), '.5g')}"
        shares = _numbers(self.exit_shares.tolist(), '.3f')
        return f'ExitPoint(top1={self.top1:.2f}, {top5}gmacs={self.gmacs:.4g}, exit_shares={shares}, {policy})'

    @property
    def thresholds(self) -> torch.Tensor | None:
        """The thresholds [T], float32; None for an `ExitPolicy`."""
        return self.policy if isinstance(self.policy, torch.Tensor) else None


class ExitTable:
    """Confidence and correctness of a model after each of its steps, on N samples.

    Accuracy and cost of every exit policy follow from it, without the model. A table does not change.

    Args:
        confidence: Confidence after each step [N, T], kept as float32. A NaN reaches no threshold.
        correct: Whether the prediction after each step is correct [N, T], bool.
        step_macs: Multiply-adds of a sample that stops after step 1..T: T positive integers that do not fall.
        correct_top5: Whether the true class is among the five best after each step [N, T], bool.
        predicted: Predicted class after each step [N, T], int64; for `agreement`.

    Raises:
        ValueError: The table is empty, the shapes do not fit each other, `correct` is not bool, or costs fall.
    """

    def __init__(
            self,
            confidence: Any,
            correct: Any,
            step_macs: Sequence[int],
            correct_top5: Any | None = None,
            predicted: Any | None = None,
    ) -> None:
        self.confidence = torch.as_tensor(confidence).detach().to('cpu', torch.float32, copy=True).contiguous()
        shape = list(self.confidence.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f'An exit table needs confidences [N, T] of at least one sample and one step, got a tensor of shape '
                f'{shape}.')
        self.correct = _as_bool(correct, 'correct', shape)
        self.correct_top5 = None if correct_top5 is None else _as_bool(correct_top5, 'correct_top5', shape)
        self.predicted = None if predicted is None else _as_classes(predicted, shape)
        macs = [float(m) for m in step_macs]
        if len(macs) != shape[1] or any(m != int(m) for m in macs if abs(m) < float('inf')):
            raise ValueError(
                f'Expected {shape[1]} integers for step_macs, one for each column of the confidences, got '
                f'{list(step_macs)}.')
        if not macs[0] > 0 or not all(a <= b < float('inf') for a, b in zip(macs, macs[1:] + macs[-1:])):
            raise ValueError(f'step_macs are costs up to each step: positive and not falling, got {list(step_macs)}.')
        self.step_macs = tuple(int(m) for m in step_macs)

    @property
    def num_samples(self) -> int:
        return len(self.confidence)

    @property
    def num_steps(self) -> int:
        return len(self.step_macs)

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        gmacs = _numbers([macs / 1e9 for macs in self.step_macs], '.4g')
        top1 = _numbers((100 * self.correct.double().mean(dim=0)).tolist(), '.2f')
        return f'ExitTable(num_samples={self.num_samples}, num_steps={self.num_steps}, gmacs={gmacs}, top1={top1})'

    # Evaluating policies

    def steps_used(self, policy: Any, strict: bool = False) -> torch.Tensor:
        """Find the step after which each sample stops: see `evaluate`.

        Returns:
            [N] int64, in 1..T.
        """
        return self._run(policy, strict)[0]

    def evaluate(self, policy: Any, strict: bool = False) -> ExitPoint:
        """Evaluate an exit policy.

        Args:
            policy: T thresholds, as a float tensor or a sequence, or an `ExitPolicy`. With thresholds, a sample stops
                at the first step whose confidence reaches its threshold. The last threshold is ignored: all samples
                stop there.
            strict: A threshold must be exceeded, not only reached, as in winycg/AnchorNet's dynamic_inference.py.

        Raises:
            ValueError: There are not T thresholds, or one is NaN; or `strict` is given with an `ExitPolicy`.
        """
        return self.evaluate_steps(*self._run(policy, strict))

    def anytime(self) -> list[ExitPoint]:
        """Evaluate stopping all samples after step 1, 2, ... T."""
        points = []
        for t in range(self.num_steps):
            thresholds = torch.full((self.num_steps,), float('inf'))
            thresholds[t] = -float('inf')
            points.append(self.evaluate_steps(torch.full((self.num_samples,), t + 1), thresholds))
        return points

    def evaluate_steps(self, steps_used: torch.Tensor, policy: Any) -> ExitPoint:
        """Accuracy and cost if each sample stops after a given step.

        Args:
            steps_used: [N] int64, in 1..T.
            policy: What decided so: for `ExitPoint.policy`.
        """
        counts = torch.bincount(steps_used - 1, minlength=self.num_steps)
        macs = sum(count * m for count, m in zip(counts.tolist(), self.step_macs))
        at = steps_used[:, None] - 1
        correct = self.correct.gather(1, at)
        return ExitPoint(
            top1=_percent(correct),
            top5=None if self.correct_top5 is None else _percent(self.correct_top5.gather(1, at)),
            gmacs=macs / self.num_samples / 1e9,
            exit_shares=counts.double() / self.num_samples,
            exit_correct=torch.bincount(steps_used[correct[:, 0]] - 1, minlength=self.num_steps),
            steps_used=steps_used,
            policy=policy,
        )

    def _run(self, policy: Any, strict: bool) -> tuple[torch.Tensor, Any]:
        if not callable(policy):
            thresholds = check_thresholds(policy, self.num_steps)
            stop = self.confidence > thresholds if strict else self.confidence >= thresholds
            stop[:, -1] = True
            return stop.byte().argmax(dim=1) + 1, thresholds
        if strict:
            raise ValueError(f'strict is an option of thresholds, not of a {type(policy).__name__}.')
        check_policy_steps(policy, self.num_steps)
        return run_policy(policy, self.confidence), policy

    # Parts of a table

    def subset(self, indices: Any) -> 'ExitTable':
        """Table of some of the samples.

        Args:
            indices: Indices, int64, or a mask [N], bool.

        Raises:
            ValueError: No samples are left.
        """
        index = torch.as_tensor(indices)
        index = index if index.dtype == torch.bool else index.long()
        top5 = None if self.correct_top5 is None else self.correct_top5[index]
        predicted = None if self.predicted is None else self.predicted[index]
        return ExitTable(self.confidence[index], self.correct[index], self.step_macs, top5, predicted)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple['ExitTable', 'ExitTable']:
        """Split into a random part and the rest, e.g. to solve on one part and evaluate on the other.

        Args:
            fraction: Share of the samples in the first part.
            seed: The same seed gives the same parts.

        Raises:
            ValueError: One of the parts would be empty.
        """
        first, rest = self.split_indices(fraction, seed)
        return self.subset(first), self.subset(rest)

    def split_indices(self, fraction: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices, int64, of the two parts that `split` makes."""
        size = round(self.num_samples * fraction)
        if not 0 < size < self.num_samples:
            raise ValueError(
                f'A fraction of {fraction:g} of {self.num_samples} samples leaves no samples in one of the parts.')
        order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(seed))
        return order[:size], order[size:]

    def first_steps(self, num: int) -> 'ExitTable':
        """Table of the first steps only.

        Raises:
            ValueError: There are not so many.
        """
        if not 1 <= num <= self.num_steps:
            raise ValueError(f'{num} steps asked for, confidences have shape {list(self.confidence.shape)}.')
        top5 = None if self.correct_top5 is None else self.correct_top5[:, :num]
        predicted = None if self.predicted is None else self.predicted[:, :num]
        return ExitTable(self.confidence[:, :num], self.correct[:, :num], self.step_macs[:num], top5, predicted)

    def agreement(self) -> 'ExitTable':
        """Table in which a prediction is correct if it is that of the last step: it needs no labels.

        Raises:
            ValueError: The table does not have the predicted classes.
        """
        if self.predicted is None:
            raise ValueError('The exit table does not have the predicted classes, which agreement needs.')
        agrees = self.predicted == self.predicted[:, -1:]
        return ExitTable(self.confidence, agrees, self.step_macs, predicted=self.predicted)

    # Files

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors, whole or not at all.

        Raises:
            ValueError: A confidence is NaN, which `load` would refuse.
        """
        check_numbers(self.confidence, path)
        tensors = {
            'confidence': self.confidence,
            'correct': self.correct,
            'step_macs': torch.tensor(self.step_macs, dtype=torch.int64),
        }
        for name in ('correct_top5', 'predicted'):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
        with atomic_write(path) as tmp:
            save_file(tensors, tmp, metadata={'format': _FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> 'ExitTable':
        """Read what `save` wrote. For tables of other formats see `load_exit_table`.

        Raises:
            ValueError: The file is no exit table, is damaged, or has wrong shapes or a confidence that is NaN.
        """
        try:
            columns = _read_safetensors(path)
            check_numbers(columns['confidence'], path)
            return cls(**columns)
        except (ValueError, TypeError) as e:
            raise ValueError(f'{path} cannot be read as an exit table: {e}') from e


def run_policy(policy: Callable[[torch.Tensor], torch.Tensor], confidence: torch.Tensor) -> torch.Tensor:
    """The step [N] int64, in 1..T, after which a stop rule stops each row of confidences [N, T]."""
    steps_used = torch.full((len(confidence),), confidence.shape[1], dtype=torch.int64)
    rows = torch.arange(len(confidence))
    for t in range(1, confidence.shape[1]):
        if not len(rows):
            break
        stop = ask_stop_rule(policy, confidence[rows, :t])
        steps_used[rows[stop]] = t
        rows = rows[~stop]
    return steps_used


def _as_bool(value: Any, name: str, shape: list[int]) -> torch.Tensor:
    values = torch.as_tensor(value).detach()
    if list(values.shape) != shape or values.dtype != torch.bool:
        raise ValueError(
            f'Expected {name} as bool of shape {shape}, like the confidences, got {str(values.dtype)[6:]} of shape '
            f'{list(values.shape)}.')
    return values.to('cpu', copy=True).contiguous()


def _as_classes(value: Any, shape: list[int]) -> torch.Tensor:
    values = torch.as_tensor(value).detach()
    if list(values.shape) != shape or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f'Expected predicted classes as integers of shape {shape}, like the confidences, got '
            f'{str(values.dtype)[6:]} of shape {list(values.shape)}.')
    return values.to('cpu', torch.int64, copy=True).contiguous()


def _numbers(values: Sequence[float], form: str) -> str:
    return f"[{', '.join(format(value, form) for value in values)}]"


def _percent(values: torch.Tensor) -> float:
    return 100 * int(values.sum()) / len(values)


def check_numbers(confidence: torch.Tensor, path: str | Path) -> None:
    """Raise a ValueError if confidences [N, ...] are not floating point, or those of some samples are NaN."""
    if not confidence.is_floating_point():
        raise ValueError(f'Confidences must be floating point, got {str(confidence.dtype)[6:]} ({path}).')
    bad = int(confidence.isnan().any(dim=-1).sum())
    if bad:
        raise ValueError(f'{bad} of {len(confidence)} samples have confidences that are not numbers ({path}).')


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework='pt') as f:
            if (f.metadata() or {}).get('format') != _FORMAT:
                raise ValueError(f'its format is not {_FORMAT}, it holds {sorted(f.keys())[:8]}')
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (f is no dict)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as e:
        raise ValueError(f'truncated, or no exit table ({e})') from e
    missing = {'confidence', 'correct', 'step_macs'} - tensors.keys()
    if missing:
        raise ValueError(f'{sorted(missing)} missing')
    columns: dict[str, Any] = {
        name: tensors.get(name) for name in ('confidence', 'correct', 'correct_top5', 'predicted')}
    return {**columns, 'step_macs': tensors['step_macs'].tolist()}
