"""What was measured of a dynamic model on a set of images, and what every exit policy makes of it."""
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.dynamic_net import check_policy_steps, check_thresholds
from ..utils.files import atomic_write

_FORMAT = 'timm_dynamic.exit_table.1'
# What winycg/AnchorNet's dynamic_inference.py charges for one pass through a net at 95 px, by its name in `setup`.
_ANCHORNET_PASS_MACS = {'densenet201': 790_000_000, 'resnet50': 752_000_000}


@dataclass(frozen=True)
class ExitPoint:
    """What one exit policy gives on a table.

    Attributes:
        top1: Accuracy in %.
        top5: Top-5 accuracy in %; None where the table does not know it.
        gmacs: Mean cost of a sample in 10⁹ multiply-adds.
        exit_shares: Share of the samples that stop after each step [T], float64.
        steps_used: After which step each sample stops [N] int64, in 1..T.
        policy: The `ExitPolicy`, or the thresholds.
    """
    top1: float
    top5: float | None
    gmacs: float
    exit_shares: torch.Tensor
    steps_used: torch.Tensor = field(repr=False)
    policy: Any = field(repr=False)

    @property
    def thresholds(self) -> torch.Tensor | None:
        """The thresholds [T], float32; None if the policy is a richer one."""
        return self.policy if isinstance(self.policy, torch.Tensor) else None


class ExitTable:
    """How sure and how right a model is after each of its steps, on N samples.

    Costs, curves and thresholds of all exit policies follow from it, without the model. A table does not change.

    Args:
        confidence: Confidence after each step [N, T], kept as float32. What is not a number is never confident enough.
        correct: Whether the prediction after each step is right [N, T], bool.
        step_macs: Multiply-adds of a sample that stops after step 1..T, T integers that do not fall.
        correct_top5: Whether the true class is among the five best after each step [N, T], bool.

    Raises:
        ValueError: The table is empty, the shapes do not fit each other, `correct` is not bool, or costs fall.
    """

    def __init__(
            self,
            confidence: Any,
            correct: Any,
            step_macs: Sequence[int],
            correct_top5: Any | None = None,
    ) -> None:
        self.confidence = torch.as_tensor(confidence).detach().to('cpu', torch.float32, copy=True).contiguous()
        shape = list(self.confidence.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f'An exit table needs confidences [N, T] of at least one sample and one step, got a tensor of shape '
                f'{shape}.')
        self.correct = _as_bool(correct, 'correct', shape)
        self.correct_top5 = None if correct_top5 is None else _as_bool(correct_top5, 'correct_top5', shape)
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
        gmacs = ', '.join(f'{m / 1e9:.4g}' for m in self.step_macs)
        return f'ExitTable({self.num_samples} samples, {self.num_steps} steps of {gmacs} GMACs)'

    # What policies give

    def steps_used(self, policy: Any, strict: bool = False) -> torch.Tensor:
        """Find out after which step each sample stops: see `evaluate`.

        Returns:
            [N] int64, in 1..T.
        """
        return self._run(policy, strict)[0]

    def evaluate(self, policy: Any, strict: bool = False) -> ExitPoint:
        """Judge an exit policy.

        Args:
            policy: T thresholds, as a float tensor or a sequence, or an `ExitPolicy`. With thresholds, a sample stops
                at the first step whose confidence reaches its threshold. The last one is ignored: all stop there.
            strict: A threshold must be exceeded, not reached, as in winycg/AnchorNet's dynamic_inference.py.

        Raises:
            ValueError: Not T thresholds, or one is not a number; or `strict` is asked of a policy.
        """
        return self._point(*self._run(policy, strict))

    def anytime(self) -> list[ExitPoint]:
        """Judge stopping all samples after step 1, 2, ... T."""
        points = []
        for t in range(self.num_steps):
            thresholds = torch.full((self.num_steps,), float('inf'))
            thresholds[t] = -float('inf')
            points.append(self._point(torch.full((self.num_samples,), t + 1), thresholds))
        return points

    def _point(self, steps_used: torch.Tensor, policy: Any) -> ExitPoint:
        counts = torch.bincount(steps_used - 1, minlength=self.num_steps)
        macs = sum(count * m for count, m in zip(counts.tolist(), self.step_macs))
        at = steps_used[:, None] - 1
        return ExitPoint(
            top1=_percent(self.correct.gather(1, at)),
            top5=None if self.correct_top5 is None else _percent(self.correct_top5.gather(1, at)),
            gmacs=macs / self.num_samples / 1e9,
            exit_shares=counts.double() / self.num_samples,
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
            raise ValueError(f'strict compares with thresholds; {type(policy).__name__} decides by itself.')
        check_policy_steps(policy, self.num_steps)
        return run_policy(policy, self.confidence), policy

    # Parts

    def subset(self, indices: Any) -> 'ExitTable':
        """Table of some of the samples.

        Args:
            indices: Which: indices, int64, or a mask [N], bool.

        Raises:
            ValueError: None are left.
        """
        index = torch.as_tensor(indices)
        index = index if index.dtype == torch.bool else index.long()
        top5 = None if self.correct_top5 is None else self.correct_top5[index]
        return ExitTable(self.confidence[index], self.correct[index], self.step_macs, top5)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple['ExitTable', 'ExitTable']:
        """Split into a random part and the rest, e.g. to solve on the one and to judge on the other.

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
                f'A fraction of {fraction:g} of {self.num_samples} samples leaves nothing on one side.')
        order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(seed))
        return order[:size], order[size:]

    # Files

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors: the file is whole, or it is not there.

        Raises:
            ValueError: A confidence is not a number: `load` would refuse it.
        """
        _check_numbers(self.confidence, path)
        tensors = {
            'confidence': self.confidence,
            'correct': self.correct,
            'step_macs': torch.tensor(self.step_macs, dtype=torch.int64),
        }
        if self.correct_top5 is not None:
            tensors['correct_top5'] = self.correct_top5
        with atomic_write(path) as tmp:
            save_file(tensors, tmp, metadata={'format': _FORMAT})

    def save_anchornet(self, path: str | Path, setup: str) -> None:
        """Write the table as winycg/AnchorNet's make_table.py does, whole or not at all; costs and top-5 are left out.

        Args:
            path: A .pth file.
            setup: What was run, e.g. 'densenet201_95_[0.3, 0.3, 0.3, 0.3]'.
        """
        _check_numbers(self.confidence, path)
        with atomic_write(path) as tmp:
            torch.save({'setup': setup, 'thresholds': self.confidence, 'predictions': self.correct}, tmp)

    @classmethod
    def load(
            cls,
            path: str | Path,
            step_macs: Sequence[int] | None = None,
            steps: int | None = None,
            anchor_macs: int = 60_000_000,
    ) -> 'ExitTable':
        """Read a table.

        Args:
            path: What `save` wrote, or a table of winycg/AnchorNet (.pth: 'setup' str, 'thresholds' float32 [N, K],
                'predictions' bool [N, K], which are the confidences and `correct`).
            step_macs: Costs, for AnchorNet tables, which have none. By default what the setup's net costs in
                AnchorNet's dynamic_inference.py: step 1 one pass, step t >= 2 `anchor_macs` and t passes.
            steps: Number of columns to read, from the first; by default all.
            anchor_macs: Charge for AnchorNet itself. The released script has 0.06 G; the published list of operating
                points has 0.08 G.

        Raises:
            ValueError: The file is no such table, is truncated, or has wrong shapes or confidences that are not
                numbers; or costs are not given and not known for the setup.
        """
        path = Path(path)
        with open(path, 'rb') as f:
            head = f.read(2)
        try:
            if head == b'PK' or head[:1] == b'\x80':  # torch's zip, and its old pickle
                confidence, correct, macs = _read_anchornet(path, step_macs, steps, anchor_macs)
                top5 = None
            else:
                confidence, correct, macs, top5 = _read_safetensors(path)
                if step_macs is not None:
                    raise ValueError('it has costs of its own: step_macs can be given for AnchorNet tables only')
            if steps is not None and (confidence.ndim != 2 or not 1 <= steps <= confidence.shape[1]):
                raise ValueError(f'{steps} steps asked for, confidences have shape {list(confidence.shape)}')
            _check_numbers(confidence, path)
            shape = list(confidence.shape)
            correct = _as_bool(correct, 'correct', shape)
            top5 = None if top5 is None else _as_bool(top5, 'correct_top5', shape)
            if steps is not None:
                confidence, correct, macs = confidence[:, :steps], correct[:, :steps], macs[:steps]
                top5 = None if top5 is None else top5[:, :steps]
            return cls(confidence, correct, macs, top5)
        except ValueError as e:
            raise ValueError(f'{path} cannot be read as an exit table: {e}') from e


def run_policy(policy: Callable[[torch.Tensor], torch.Tensor], confidence: torch.Tensor) -> torch.Tensor:
    """Find out after which step [N] int64, in 1..T, each row of confidences [N, T] stops under a stop rule."""
    steps_used = torch.full((len(confidence),), confidence.shape[1], dtype=torch.int64)
    rows = torch.arange(len(confidence))
    for t in range(1, confidence.shape[1]):
        if not len(rows):
            break
        stop = policy(confidence[rows, :t])
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


def _percent(values: torch.Tensor) -> float:
    return 100 * int(values.sum()) / len(values)


def _check_numbers(confidence: torch.Tensor, path: Any) -> None:
    bad = int(confidence.isnan().any(dim=-1).sum())
    if bad:
        raise ValueError(f'{bad} of {len(confidence)} samples have confidences that are not numbers ({path}).')


def _read_safetensors(path: Path) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor | None]:
    try:
        with safe_open(path, framework='pt') as f:
            if (f.metadata() or {}).get('format') != _FORMAT:
                raise ValueError(f'its format is not {_FORMAT}, it holds {sorted(f.keys())[:8]}')
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as e:
        raise ValueError(f'truncated, or no exit table at all ({e})') from e
    missing = {'confidence', 'correct', 'step_macs'} - tensors.keys()
    if missing:
        raise ValueError(f'{sorted(missing)} missing')
    return tensors['confidence'], tensors['correct'], tensors['step_macs'].tolist(), tensors.get('correct_top5')


def _read_anchornet(
        path: Path,
        step_macs: Sequence[int] | None,
        steps: int | None,
        anchor_macs: int,
) -> tuple[torch.Tensor, torch.Tensor, Sequence[int]]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # says that it may fail; we say if it does
            values = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as e:
        raise ValueError(f"truncated, or no table of AnchorNet's ({str(e).splitlines()[0]})") from e
    names = {'setup', 'thresholds', 'predictions'}
    if not isinstance(values, dict) or not names <= values.keys():
        found = sorted(map(str, values))[:8] if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"a table of AnchorNet's has {sorted(names)}, found {found}")
    confidence, correct = values['thresholds'], values['predictions']
    if not isinstance(confidence, torch.Tensor) or not isinstance(correct, torch.Tensor):
        raise ValueError("'thresholds' and 'predictions' are not both tensors")
    if step_macs is None:
        net = re.split(r'[_ ]', str(values['setup']))[0]
        if net not in _ANCHORNET_PASS_MACS:
            raise ValueError(
                f"the costs of its setup {values['setup']!r} are not known (known: {sorted(_ANCHORNET_PASS_MACS)}): "
                f'give step_macs, or validate.py the model')
        one_pass = _ANCHORNET_PASS_MACS[net]
        step_macs = [t * one_pass + (anchor_macs if t > 1 else 0) for t in range(1, confidence.shape[-1] + 1)]
    elif steps is None and confidence.ndim == 2 and len(step_macs) != confidence.shape[1]:
        raise ValueError(f'it has {confidence.shape[1]} columns, step_macs has {len(step_macs)}: choose with steps')
    return confidence, correct, step_macs
