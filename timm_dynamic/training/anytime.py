"""Accuracy over cost: a dynamic model is run once, and evaluated at every budget."""
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import ClassificationEvaluator
from timm.utils import unwrap_model
from torch.utils.flop_counter import FlopCounterMode

from ..exits import ExitPoint, ExitTable, collect_exit_table, geometric_thresholds, solve_curve
from ..models.dynamic_net import DynamicNet, on_meta
from .evaluate import progress_bar

_logger = logging.getLogger(__name__)

Row = dict[str, Any]


@torch.no_grad()
def count_macs(model: Any, input_size: Sequence[int]) -> int | None:
    """Count the multiply-adds of one image, with torch's FlopCounterMode.

    Args:
        model: Any model. Of dynamic ones, all steps are counted.
        input_size: Channels, height, width.

    Returns:
        The number; None, with a warning, where the model does not run on one image without content.
    """
    model = unwrap_model(model)
    if isinstance(model, DynamicNet):
        return model.step_macs[-1]
    parameter = next(model.parameters())
    for meta in (True, False):  # a few models have tensors that do not move to meta
        try:
            counted = (on_meta(model) if meta else copy.deepcopy(model)).eval()
            image = torch.zeros(1, *input_size, device='meta' if meta else parameter.device, dtype=parameter.dtype)
            with FlopCounterMode(display=False) as counter:
                counted(image)
            return counter.get_total_flops() // 2
        except (RuntimeError, TypeError, NotImplementedError) as e:
            error = e
    _logger.warning(f'The multiply-adds of {type(model).__name__} cannot be counted: {error}')
    return None


def evaluate_dynamic(
        model: Any,
        loader: Any,
        accelerator: Accelerator,
        create_evaluator: Callable[..., ClassificationEvaluator] = ClassificationEvaluator,
        channels_last: bool = False,
        desc: str = '',
        log_freq: int = 1,
        dtype: torch.dtype | None = None,
        classes: torch.Tensor | None = None,
        on_batch: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
        on_answers: Callable[[torch.Tensor], Any] | None = None,
) -> tuple[dict[str, float], ExitTable]:
    """Evaluate a dynamic model, all steps in one pass, exact to the sample in several processes.

    Args:
        model: A `DynamicNet` in eval mode.
        loader: A timm evaluation loader, of this process's share.
        accelerator: For device, autocast and processes.
        create_evaluator: Makes a timm evaluator.
        channels_last: Memory layout of images.
        desc: For the progress bar.
        log_freq: Batches between updates of the progress bar.
        dtype: Of images (default: as the loader gives them).
        classes: Indices of the classes that count [C'], int64 (default: all); targets are positions among them.
        on_batch: Called with the logits that `forward` would give, and the targets, of every batch.
        on_answers: Called with the classes after each step of every batch [B, T], int64.

    Returns:
        Metrics of what `forward` gives (the last step; with an exit policy set on the model, the step it stops at),
        as `evaluate` gives them, and 'gmacs'; and the table of all steps. The same in every process.

    Raises:
        ValueError: The model is in train mode, or the loader gives nothing.
    """
    batches = _Batches(
        loader, progress_bar(loader, accelerator, desc=desc, leave=False, miniters=log_freq), accelerator.device,
        dtype, channels_last)
    evaluator = create_evaluator(
        device=accelerator.device, max_samples=getattr(batches.sampler, 'num_valid_samples', None))

    def on_output(output: torch.Tensor, answers: torch.Tensor) -> None:
        evaluator.update(output, batches.target)
        if on_answers is not None:
            on_answers(answers)
        if on_batch is not None:
            on_batch(output, batches.target)

    model = unwrap_model(model)
    table = collect_exit_table(_Observed(model, on_output, classes), batches, accelerator)
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    rule = model.exit_policy
    gmacs = model.step_macs[-1] / 1e9 if rule is None else table.evaluate(rule).gmacs
    return {**metrics, 'count': len(table), 'gmacs': gmacs}, table


class _Batches:
    """A loader's batches where and as the model wants them. The target of the last one is kept."""
    target: torch.Tensor

    def __init__(
            self,
            loader: Any,
            source: Any,
            device: torch.device,
            dtype: torch.dtype | None,
            channels_last: bool,
    ) -> None:
        sampler = getattr(getattr(getattr(loader, 'loader', loader), 'batch_sampler', None), 'sampler', None)
        self.sampler = sampler or getattr(loader, 'sampler', None)  # tells how many samples are no padding
        self.source, self.device, self.dtype = source, device, dtype
        self.layout = torch.channels_last if channels_last else torch.preserve_format

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, target in self.source:
            self.target = target.to(self.device)
            yield self._placed(x), self.target

    def _placed(self, x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return tuple(self._placed(view) for view in x)
        return x.to(self.device, self.dtype, memory_format=self.layout)


class _Observed:
    """A dynamic model as `collect_exit_table` runs it. It also hands on what `forward` would give, and all answers."""
    _logits: torch.Tensor
    _output: torch.Tensor
    _answers: list[torch.Tensor]
    _history: torch.Tensor
    _going: torch.Tensor
    _t: int

    def __init__(
            self,
            model: DynamicNet,
            on_output: Callable[[torch.Tensor, torch.Tensor], None],
            classes: torch.Tensor | None,
    ) -> None:
        self._model, self._on_output = model, on_output
        self._classes = None if classes is None else classes.to(next(model.parameters()).device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step(self, t: int, state: Any) -> tuple[torch.Tensor, Any]:
        self._t = t
        self._logits, state = self._model.step(t, state)
        return self._logits if self._classes is None else self._logits[:, self._classes], state

    def confidence(self, logits: torch.Tensor, state: Any) -> torch.Tensor:
        confidence = self._model.confidence(self._logits, state)  # of all classes: the model knows of no others
        if self._t == 0:
            self._output, self._history, self._answers = logits, confidence[:, None], []
            self._going = torch.ones_like(confidence, dtype=torch.bool)
        else:
            self._output = torch.where(self._going[:, None], logits, self._output)
            self._history = torch.cat([self._history, confidence[:, None]], dim=1)
        self._answers.append(logits.argmax(dim=1))
        if self._t == self._model.num_steps - 1:
            self._on_output(self._output, torch.stack(self._answers, dim=1))
        elif self._model.exit_policy is not None:
            self._going = self._going & ~self._model.exit_policy(self._history)
        return confidence


# Rows of tables

def point_row(label: str, point: ExitPoint, **more: Any) -> Row:
    """Write a point as a row of a table.

    Args:
        label: What point it is.
        point: What `ExitTable.evaluate` gave.
        **more: Further entries; 'budget' stands first.
    """
    row: Row = {'point': label}
    if 'budget' in more:
        row['budget'] = round(more.pop('budget'), 6)
    row.update(gmacs=round(point.gmacs, 6), top1=round(point.top1, 4))
    if point.top5 is not None:
        row['top5'] = round(point.top5, 4)
    row.update(images=len(point.steps_used), **more)
    row['exit_shares'] = [round(share, 4) for share in point.exit_shares.tolist()]
    if point.thresholds is not None:
        row['thresholds'] = point.thresholds.tolist()
    return row


def step_rows(table: ExitTable, **more: Any) -> list[Row]:
    """What stopping all images after step 1, 2, ... gives: 'point', 'gmacs' up to that step, 'top1', 'top5', 'images'.

    Args:
        table: What was measured.
        **more: Further entries of every row, e.g. 'split'.
    """
    rows = [point_row(f'step {t}', point, **more) for t, point in enumerate(table.anytime(), 1)]
    return [{k: v for k, v in row.items() if k not in ('exit_shares', 'thresholds')} for row in rows]


def policy_row(table: ExitTable, policy: Any, label: str, strict: bool = False, **more: Any) -> Row:
    """What thresholds or an `ExitPolicy` give on a table, see `ExitTable.evaluate`, as a row."""
    return point_row(label, table.evaluate(policy, strict), **more)


def budget_rows(
        calibration: ExitTable,
        table: ExitTable,
        budgets: Sequence[float] | None = None,
        method: str = 'thresholds',
        num: int = 12,
        **more: Any,
) -> list[Row]:
    """Solve exits for budgets on one table, and judge them on another.

    Args:
        calibration: The table that they are fitted on: of other images than `table`.
        table: The table that they are evaluated on.
        budgets: What an image may cost on average, in 10⁹ multiply-adds. By default `num` ones, evenly spaced.
        method: 'thresholds', or 'value' for policies that look at the confidences of all steps so far.
        num: How many, by default.
        **more: Further entries of every row, e.g. 'split' and 'fitted_on'.

    Returns:
        A row a budget: 'point', 'budget', 'gmacs' (measured on `table`), 'top1', 'top5', 'images', 'exit_shares' and
        'thresholds' [T].

    Raises:
        ValueError: A budget is below the cost of the first step or above that of all.
    """
    return [
        point_row('budget', table.evaluate(point.policy), budget=budget, **more)
        for budget, point in _solve(calibration, budgets, method, num)
    ]


def _solve(
        calibration: ExitTable,
        budgets: Sequence[float] | None,
        method: str,
        num: int,
) -> list[tuple[float, ExitPoint]]:
    """Budgets and what was solved for them; of those that nobody asked for, every one once."""
    points = solve_curve(calibration, budgets, num, method)
    if budgets is not None:
        return list(zip(budgets, points))
    return list({point.gmacs: (point.gmacs, point) for point in points}.values())


def geometric_rows(calibration: ExitTable, table: ExitTable, **more: Any) -> list[Row]:
    """Fit the 39 points of GFNet's paper on one table, and judge them on another."""
    return [
        policy_row(table, geometric_thresholds(calibration, p), f'geometric p={p}', **more) for p in range(1, 40)]


def budgets_to_keep(
        calibration: ExitTable,
        table: ExitTable,
        budgets: Sequence[float] | None = None,
        method: str = 'thresholds',
        num: int = 12,
        **more: Any,
) -> list[Row]:
    """Solve budgets as `budget_rows` does, for `DynamicNet.store_budgets`.

    Returns:
        For each budget 'gmacs', what it costs on the data it was fitted on, its 'policy', 'confidence_range' where
        confidences are not all between 0 and 1, and 'evaluated': a dict of what it gives on `table` and the further
        entries.
    """
    kept = []
    low, high = calibration.confidence.min().item(), calibration.confidence.max().item()
    scale = {'confidence_range': [low, high]} if low < 0 or high > 1 else {}  # to interpolate in
    for _, point in _solve(calibration, budgets, method, num):
        evaluated = point_row('budget', table.evaluate(point.policy), **more)
        evaluated = {k: v for k, v in evaluated.items() if k not in ('point', 'thresholds')}
        kept.append({'gmacs': point.gmacs, 'policy': point.policy, **scale, 'evaluated': evaluated})
    return kept


def budget_curve(
        calibration: ExitTable,
        table: ExitTable,
        method: str = 'thresholds',
        num: int = 48,
) -> list[tuple[float, float]]:
    """Solve a grid of budgets on one table and judge it on another: (GMACs, top-1 in %), by rising cost."""
    points = [table.evaluate(point.policy) for point in solve_curve(calibration, num=num, method=method)]
    return sorted({(point.gmacs, point.top1) for point in points})


def step_curve(table: ExitTable) -> list[tuple[float, float]]:
    """(GMACs, top-1 in %) of stopping all images after step 1, 2, ..."""
    return [(point.gmacs, point.top1) for point in table.anytime()]
