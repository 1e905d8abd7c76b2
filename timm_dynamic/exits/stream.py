"""Early exit at full batch size: images wait before each step until there are enough of them.

`early_exit` shrinks a batch as its images stop, so later steps run on small batches. `ExitStream` refills them: images
of many batches that wait for the same step are run together.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.dynamic_net import DynamicNet, ExitResult, State, StopRule, num_rows
from ..models.exit_cfg import Policy, ask_stop_rule
from .collect import check_ready, move_images

_HISTORY = 'confidences so far'  # kept among the states; no name clash, as names of states are identifiers
_PENDING_BATCHES = 64


class StreamResult(ExitResult):
    """`ExitResult` of one input batch, with the `target` that came with it, or None."""
    target: Any = None


class ExitStream:
    """Runs a model with early exit over a stream of batches, every step on full batches of constant shape.

    Each step has a queue. When a queue holds `batch_size` images, the step is run on them; of several full queues, the
    latest step comes first. A batch is read when no queue is full. So with T steps at most T · (batch_size - 1) images
    wait, plus those of the batch just read. On a GPU the next batch is copied meanwhile, and a step waits for the
    device once, for the decision which images stop. Streams and runs may share a model: a run changes only its own
    data. There are no threads.

    Args:
        model: A `DynamicNet` in eval mode.
        policy: T thresholds, as a float tensor or a sequence, or an `ExitPolicy`: see `early_exit`. Default: the exit
            policy that the model has now.
        batch_size: Images that a step is run on.
        max_pending: Images whose results may wait for that of an earlier image. Beyond it, the queue with the oldest
            image is run though it is not full. This bounds memory and delay where few images reach a late step. A
            single batch may hold more. Default: 64 · batch_size.
        pad: Run queues that are not full (at the end, or beyond `max_pending`) at full batch size, with copies whose
            results are dropped. Default: only if the steps are compiled, see `DynamicNet.compile_steps`.

    Raises:
        ValueError: The policy does not fit the model, or there is none; the model is in train mode; or a number is not
            positive.
    """

    def __init__(
            self,
            model: nn.Module,
            policy: Policy | None = None,
            batch_size: int = 64,
            max_pending: int | None = None,
            pad: bool | None = None,
    ) -> None:
        max_pending = _PENDING_BATCHES * batch_size if max_pending is None else max_pending
        if batch_size < 1 or max_pending < 1:
            raise ValueError(f'Expected a positive batch size and max_pending, got {batch_size} and {max_pending}.')
        self.model = check_ready(model)
        self.stop_rule = self.model.make_stop_rule(policy)
        self.batch_size, self.max_pending, self.pad = batch_size, max_pending, pad

    def run(self, batches: Iterable[Any]) -> StreamRun:
        """Predict for all batches.

        Args:
            batches: Gives x as for `early_exit`, or (x, target): any iterable, e.g. a loader of timm. Batches may have
                any size, also 0. If the image size changes, all queues are emptied first. Images are moved to the
                model's device.

        Returns:
            An iterator over the results of `early_exit` for each batch, in the order of the batches, on the model's
            device, each with its batch's unchanged `.target`. If a batch cannot be read, or the model refuses its
            images, the results of all batches before it come first, then the error. If a step fails, the results that
            are complete come first.

        Raises:
            ValueError: The model is in train mode.
        """
        pad = self.model.has_compiled_steps if self.pad is None else self.pad
        return StreamRun(check_ready(self.model), self.stop_rule, self.batch_size, self.max_pending, pad, batches)


class StreamRun(Iterator[StreamResult]):
    """Iterator over the results of `ExitStream.run`.

    Attributes:
        runs: How often each step was run so far [T].
        rows: Number of images each step was run on so far [T].
        peak_queued: Largest number of images that waited at a time.
    """

    def __init__(
            self,
            model: DynamicNet,
            stop_rule: StopRule,
            batch_size: int,
            max_pending: int,
            pad: bool,
            batches: Iterable[Any],
    ) -> None:
        self._model, self.exit_policy, self._pad = model, stop_rule, pad
        self._batch_size, self._max_pending = batch_size, max_pending
        self._device = next(model.parameters()).device
        self._queues = [_Queue(batch_size) for _ in range(model.num_steps)]
        self._signature: Any = None  # shapes and dtypes of the states in the queues
        self._inputs: deque[_Input] = deque()  # not delivered yet
        self._pages: dict[int, _Page] = {}  # results by ticket, batch_size to a page
        self._next_ticket = 0  # images are numbered in the order of the input
        self._whole_pages = 0  # pages, from the first on, whose images have all stopped
        self.runs, self.rows = [0] * model.num_steps, [0] * model.num_steps
        self.peak_queued = 0
        self._results = self._run(batches)

    def __next__(self) -> StreamResult:
        return next(self._results)

    def close(self) -> None:
        """Stop before the end. Waiting images are dropped."""
        self._results.close()

    def _run(self, batches: Iterable[Any]) -> Generator[StreamResult, None, None]:
        source, error = self._read(batches), None
        while True:
            try:
                state, target = next(source)
            except StopIteration:
                break
            except Exception as e:  # results of the batches before come first
                error = e
                break
            signature = {name: (value.shape[1:], value.dtype) for name, value in state.items()}
            if num_rows(state) and signature != self._signature:
                yield from self._drain()
                self._queues, self._signature = [_Queue(self._batch_size) for _ in self._queues], signature
            self._admit(state, target)
            del state  # to free its memory while the next one is read
            yield from self._deliver()
            while (t := self._next_step()) is not None:
                self._step(t)
                yield from self._deliver()
        yield from self._drain()
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame; the cycle would keep queues and a loader's workers alive

    def _read(self, batches: Iterable[Any]) -> Iterator[tuple[State, Any]]:
        pairs = map(_split_batch, batches)
        if self._device.type == 'cuda':
            moved = _copy_ahead(pairs, self._device)
        else:
            moved = ((move_images(x, self._device), target) for x, target in pairs)
        for x, target in moved:
            yield self._model.init_state(x), target

    @torch.no_grad()
    def _admit(self, state: State, target: Any) -> None:
        first, last = self._next_ticket, self._next_ticket + num_rows(state)
        empty = None
        if first == last:
            logits, confidence, _ = self._model.run_step(0, state)
            empty = StreamResult(logits, torch.ones(0, dtype=torch.int64, device=logits.device), confidence)
        else:
            self._queues[0].put(state, torch.arange(first, last))
            self.peak_queued = max(self.peak_queued, sum(map(len, self._queues)))
        self._inputs.append(_Input(first, last, target, empty))
        self._next_ticket = last

    def _next_step(self) -> int | None:
        """The latest step with a full batch; beyond `max_pending`, the one that the oldest image waits for."""
        for t in reversed(range(len(self._queues))):
            if len(self._queues[t]) >= self._batch_size:
                return t
        if len(self._inputs) > 1 and self._next_ticket - self._inputs[0].first > self._max_pending:
            return min(range(len(self._queues)), key=lambda t: self._queues[t].oldest)
        return None

    def _drain(self) -> Iterator[StreamResult]:
        for t, queue in enumerate(self._queues):
            while len(queue):
                self._step(t)
                yield from self._deliver()

    @torch.no_grad()
    def _step(self, t: int) -> None:
        queue = self._queues[t]
        block = queue.pop()
        n, tickets = block.filled, block.tickets[:block.filled]
        state = block.padded() if self._pad else {name: value[:n] for name, value in block.state.items()}
        history = state.pop(_HISTORY, None)
        logits, confidence, state = self._model.run_step(t, state)
        self.runs[t] += 1
        self.rows[t] += n
        if t == len(self._queues) - 1:
            stopping = torch.arange(n)
        else:
            history = confidence[:, None] if history is None else torch.cat([history, confidence[:, None]], dim=1)
            stop = ask_stop_rule(self.exit_policy, history)[:n].cpu()  # the only place that waits for a GPU
            stopping, going = stop.nonzero().squeeze(1), (~stop).nonzero().squeeze(1)
            self._queues[t + 1].put({**state, _HISTORY: history}, tickets[going], going)
        if len(stopping):
            self._store(tickets[stopping], stopping, logits, confidence, t + 1)
        queue.recycle(block)

    def _store(self, tickets: torch.Tensor, rows: torch.Tensor, logits: Any, confidence: Any, step: int) -> None:
        tickets, order = tickets.sort()
        numbers, counts = (tickets // self._batch_size).unique_consecutive(return_counts=True)
        moves = torch.stack([tickets % self._batch_size, rows[order]]).to(self._device, non_blocking=True)
        for number, move in zip(numbers.tolist(), moves.split(counts.tolist(), dim=1)):
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = self._new_page(logits, confidence)
            to, rows = move
            page.logits.index_copy_(0, to, logits.index_select(0, rows))
            page.confidence.index_copy_(0, to, confidence.index_select(0, rows))
            page.steps_used.index_fill_(0, to, step)
        for number, to in zip(numbers.tolist(), (tickets % self._batch_size).split(counts.tolist())):
            self._pages[number].finished[to] = True

    @torch.inference_mode(False)
    def _new_page(self, logits: torch.Tensor, confidence: torch.Tensor) -> _Page:
        return _Page(
            logits.new_empty(self._batch_size, *logits.shape[1:]),
            torch.zeros(self._batch_size, dtype=torch.int64, device=self._device),
            confidence.new_empty(self._batch_size),
            torch.zeros(self._batch_size, dtype=torch.bool))

    def _deliver(self) -> Iterator[StreamResult]:
        """Results of the oldest batches that are complete."""
        size = self._batch_size
        while self._inputs:
            first, last, target, result = self._inputs[0]
            if result is None:
                if not self._all_stopped(last):
                    return
                parts = [tuple(value[max(first - k * size, 0):last - k * size] for value in self._pages[k][:3])
                         for k in range(first // size, (last - 1) // size + 1)]
                # torch.cat copies: the caller may change and keep results, and other batches share the page.
                result = StreamResult(*map(torch.cat, zip(*parts)))
            for k in range(first // size, last // size):
                del self._pages[k]
            self._inputs.popleft()
            result.target = target
            yield result

    def _all_stopped(self, last: int) -> bool:
        """Whether all images before this ticket have stopped."""
        while (page := self._pages.get(self._whole_pages)) is not None and page.finished.all():
            self._whole_pages += 1
        rest = last - self._whole_pages * self._batch_size
        return rest <= 0 or (page is not None and bool(page.finished[:rest].all()))


class _Input(NamedTuple):
    first: int  # ticket
    last: int  # ticket after the last image
    target: Any
    result: StreamResult | None  # result of an empty batch


class _Page(NamedTuple):
    logits: torch.Tensor
    steps_used: torch.Tensor
    confidence: torch.Tensor
    finished: torch.Tensor  # on the CPU


class _Block:
    """Memory for one batch of states."""

    def __init__(self, state: State, tickets: torch.Tensor, filled: int, owned: bool) -> None:
        self.state, self.tickets, self.filled, self.owned = state, tickets, filled, owned

    def padded(self) -> State:
        """All rows; those that are not filled become copies of the first, as they may hold any values."""
        if self.filled < len(self.tickets):
            for value in self.state.values():
                value[self.filled:] = value[:1]
        return dict(self.state)


class _Queue:
    """States that wait for a step, in the order of arrival, stored as the batches that will be run."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.blocks: deque[_Block] = deque()  # all full but the last
        self.spare: list[_Block] = []

    def __len__(self) -> int:
        return (len(self.blocks) - 1) * self.batch_size + self.blocks[-1].filled if self.blocks else 0

    @property
    def oldest(self) -> float:
        """The lowest ticket."""
        return min((int(block.tickets[:block.filled].min()) for block in self.blocks), default=float('inf'))

    def put(self, state: State, tickets: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Append images, or some rows of them. Each is copied once; whole batches are not copied."""
        done = 0
        index = None if rows is None else rows.to(next(iter(state.values())).device, non_blocking=True)
        while done < len(tickets):
            room = self.batch_size - self.blocks[-1].filled if self.blocks else 0
            if not room and index is None and len(tickets) - done >= self.batch_size:
                part = slice(done, done + self.batch_size)
                whole = {name: value[part] for name, value in state.items()}
                self.blocks.append(_Block(whole, tickets[part], self.batch_size, owned=False))
                done += self.batch_size
                continue
            if not room:
                self.blocks.append(self.spare.pop() if self.spare else self._new_block(state))
            block = self.blocks[-1]
            begin, end = block.filled, min(self.batch_size, block.filled + len(tickets) - done)
            part = slice(done, done + end - begin)
            for name, value in state.items():
                to = block.state[name][begin:end]
                if value.ndim == 4 and not value.is_contiguous():  # contiguous rows are copied faster
                    value, to = value.permute(0, 2, 3, 1), to.permute(0, 2, 3, 1)
                if index is None:
                    to.copy_(value[part])
                else:
                    torch.index_select(value, 0, index[part], out=to)
            block.tickets[begin:end] = tickets[part]
            block.filled, done = end, done + end - begin

    def pop(self) -> _Block:
        return self.blocks.popleft()

    def recycle(self, block: _Block) -> None:
        """Reuse the memory of a block that was run. Its results must have been copied."""
        if block.owned:
            block.filled = 0
            self.spare.append(block)

    @torch.inference_mode(False)  # tensors made in inference mode cannot be written to outside of it
    def _new_block(self, state: State) -> _Block:
        def room(value: torch.Tensor) -> torch.Tensor:
            out = value.new_empty(self.batch_size, *value.shape[1:])
            return out if value.ndim != 4 or value.is_contiguous() else out.to(memory_format=torch.channels_last)

        tickets = torch.zeros(self.batch_size, dtype=torch.int64)
        return _Block({name: room(value) for name, value in state.items()}, tickets, 0, owned=True)


def _split_batch(batch: Any) -> tuple[Any, Any]:
    """x and target. Of two tensors, the second is the target if it has fewer dimensions than images."""
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 2:
            x, target = batch
            images = x[0] if isinstance(x, (tuple, list)) else x
            if not isinstance(target, torch.Tensor) or target.ndim < images.ndim:
                return x, target
    return batch, None


def _copy_pinned(x: Any, device: torch.device) -> Any:
    """Copy images to a GPU without waiting for it."""
    if isinstance(x, (tuple, list)):
        return tuple(_copy_pinned(view, device) for view in x)
    pinned = isinstance(x, torch.Tensor) and not x.is_cuda
    return x.pin_memory().to(device, non_blocking=True) if pinned else move_images(x, device)


def _copy_ahead(pairs: Iterable[tuple[Any, Any]], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Copy images to a GPU, those of the next batch while the model runs on the batches before."""
    stream = torch.cuda.Stream(device)
    ready: tuple[Any, Any, Any] | None = None

    def hand_over(x: Any, target: Any, copied: Any) -> tuple[Any, Any]:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for value in x if isinstance(x, tuple) else (x,):
            value.record_stream(current)
        return x, target

    pairs = iter(pairs)
    error = None
    while True:
        try:
            x, target = next(pairs)
            stream.wait_stream(torch.cuda.current_stream(device))  # the source may have made images on the device
            with torch.cuda.stream(stream):
                copies = _copy_pinned(x, device)
        except StopIteration:
            break
        except Exception as e:  # deliver the batch before first
            error = e
            break
        following = copies, target, stream.record_event()
        if ready is not None:
            yield hand_over(*ready)
        ready = following
    if ready is not None:
        yield hand_over(*ready)
    if error is not None:
        try:
            raise error
        finally:
            del error
