"""The step protocol: a classifier as a sequence of predictions of rising cost, where an image may stop after any.

    state = model.init_state(x)
    for t in range(model.num_steps):
        logits, state = model.step(t, state)

A state is a flat dict of batch-first tensors and all there is: modules keep nothing between steps. So rows can leave
after any step, wait, and join the rows of other batches; and threads can share a model.
"""
import copy
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers.fuse import fuse_conv_bn

_logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]


def num_rows(state: State) -> int:
    """Number of images in a state."""
    return len(next(iter(state.values())))


def select_rows(state: State, rows: torch.Tensor) -> State:
    """Take some images out of a state: by index, int64, or by a mask [n], bool."""
    return {name: value[rows] for name, value in state.items()}


def split_rows(state: State, mask: torch.Tensor) -> tuple[State, State]:
    """Split a state into the images where a mask [n] holds, and the others."""
    return select_rows(state, mask), select_rows(state, ~mask)


def join_rows(states: Sequence[State]) -> State:
    """Join states that stand before the same step."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


class ExitResult(NamedTuple):
    """What early exit gives, in the order of the input."""
    logits: torch.Tensor  # [B, num_classes]
    steps_used: torch.Tensor  # [B] int64, in 1..T
    confidence: torch.Tensor  # [B] at the last step used


# Confidences of the steps so far [n, t] -> who stops after step t, bool [n].
StopRule = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Thresholds:
    values: tuple[float, ...]

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        return history[:, -1] >= self.values[history.shape[1] - 1]


class DynamicNet(nn.Module):
    """Base of the models that may stop early. A family implements `init_state` and `step`.

    Args:
        num_steps: Number of predictions T.
        num_classes: Number of classes.
        in_chans: Number of input channels.
        img_size: Side of the images that costs are counted for.
        exit_cfg: What the model knows about stopping: plain JSON, see the attribute.

    Attributes:
        exit_cfg: Record of what the setters below set: 'exit' (the policy in use), 'budgets' (policies solved for
            budgets), 'num_classes' (which both hold for), and 'origin' (numbers that came with an authors' checkpoint).
            timm records constructor arguments and exports them. This dict, a copy of the argument, is what is
            recorded, so that what is set later is exported, too. JSON has no infinity: of a policy it is kept as 'inf'
            or '-inf'.
    """

    def __init__(
            self,
            num_steps: int,
            num_classes: int,
            in_chans: int = 3,
            img_size: int = 224,
            exit_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = img_size
        self._step_macs: tuple[int, ...] | None = None
        self.exit_policy: StopRule | None = None
        self._compiled_steps: Sequence[Any] | None = None
        self.exit_cfg: dict[str, Any] = {} if exit_cfg is None else copy.deepcopy(_check_mapping(exit_cfg))
        self._model_args: dict[str, Any] = {}
        self._check_exit_cfg()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == '_model_args':  # timm records what the caller gave
            value = {**value, 'exit_cfg': self.exit_cfg}
        super().__setattr__(name, value)

    # The step protocol

    def init_state(self, x: Any) -> State:
        """Make the state before the first step.

        Args:
            x: Images [B, C, S, S]; families of several networks take a tuple with one tensor per network.

        Raises:
            ValueError: The images have a shape that the model cannot take.
        """
        raise NotImplementedError

    def check_square_images(self, x: torch.Tensor, least: int, what: str) -> None:
        """Raise a ValueError unless x is images [B, in_chans, S, S] with S of at least `least`, the size of `what`."""
        if not isinstance(x, torch.Tensor):
            raise ValueError(f'Expected images as a tensor, got {type(x).__name__}.')
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f'Expected images [batch, {self.in_chans}, height, width], got {list(x.shape)}.')
        if x.shape[2] != x.shape[3]:
            raise ValueError(f'{type(self).__name__} takes square images, got {x.shape[2]}x{x.shape[3]}.')
        if x.shape[2] < least:
            raise ValueError(f'Images of {x.shape[2]} pixels are smaller than the {what} of {least}.')

    def step(self, t: int, state: State) -> tuple[torch.Tensor, State]:
        """Run one step.

        Args:
            t: Step, counted from 0.
            state: State of n images before this step. It is not changed.

        Returns:
            Logits [n, num_classes], and the state before the next step.
        """
        raise NotImplementedError

    def confidence(self, logits: torch.Tensor, state: State) -> torch.Tensor:
        """How sure the model is after a step: the largest probability, if a family has nothing better.

        Args:
            logits: Logits of the step [n, num_classes].
            state: State that the step gave back.

        Returns:
            Confidences [n], float32.
        """
        return logits.float().softmax(dim=-1).amax(dim=-1)

    def run_step(self, t: int, state: State) -> tuple[torch.Tensor, torch.Tensor, State]:
        """Run one step, compiled if `compile_steps` was called: logits [n, num_classes], confidence [n], next state."""
        if self._compiled_steps is not None and len(next(iter(state.values()))):
            return self._compiled_steps[t](self, state)
        return _run_step(self, t, state)

    @property
    def has_compiled_steps(self) -> bool:
        """Whether `compile_steps` was called."""
        return self._compiled_steps is not None

    def compile_steps(self, cuda_graphs: bool = False, backend: str = 'inductor', **kwargs: Any) -> None:
        """Compile every step by itself, its confidence included, for batches of constant shape.

        `ExitStream` runs the compiled steps, and pads its last batches, so that each step is compiled once for a batch
        size and image size. `early_exit` and `forward`, whose batches shrink, stay as they are. Compilation is when a
        step is first run. Kernels that are fused round otherwise: expect logits that are close, not equal. A copy of
        the model, or one that was saved whole, is not compiled.

        Args:
            cuda_graphs: Record the kernels of a step as a CUDA graph (mode 'reduce-overhead').
            backend: Of torch.compile. 'eager' and 'aot_eager' help to find out what fails.
            **kwargs: For torch.compile, e.g. `mode` or `options`.
        """
        if cuda_graphs:
            kwargs = {'mode': 'reduce-overhead', **kwargs}
        self._compiled_steps = [
            _compile_step(t, cuda_graphs, dict(backend=backend, dynamic=False, **kwargs))
            for t in range(self.num_steps)]

    def fuse_conv_bn(self) -> int:
        """Fold batch normalisation into convolutions, in place, for faster inference: see `layers.fuse_conv_bn`.

        Returns:
            How many were folded.
        """
        parameter = next(self.parameters())
        x = self.example_input(device=parameter.device, dtype=parameter.dtype)
        return fuse_conv_bn(self, lambda: list(self.forward_steps(x)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_compiled_steps': None}

    def example_input(self, batch_size: int = 1, **dd: Any) -> Any:
        """Make an input of the model's real size, without content, of a device and dtype."""
        return torch.zeros(batch_size, self.in_chans, self.img_size, self.img_size, **dd)

    @property
    def step_macs(self) -> tuple[int, ...]:
        """Multiply-adds of one image that stops after step 1..T, as torch's FlopCounterMode counts them."""
        if self._step_macs is None:
            self._step_macs = _count_step_macs(self)
        return self._step_macs

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the side of the images that costs are counted for, as the argument `img_size` would.

        Raises:
            ValueError: The model cannot take images of this size.
        """
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height != width:
            raise ValueError(f'{type(self).__name__} takes square images, got img_size {height}x{width}.')
        self.img_size, self._step_macs = height, None
        self._traits: dict[str, Any] = {**getattr(self, '_traits', {}), 'img_size': (height, height)}  # timm exports it

    # Running it

    def forward_steps(self, x: Any) -> Iterator[torch.Tensor]:
        """Predict step by step, each step run when its logits [B, num_classes] are asked for."""
        state = self.init_state(x)
        for t in range(self.num_steps):
            logits, state = self.step(t, state)
            yield logits

    def forward_exit(self, x: Any, stop_rule: StopRule) -> ExitResult:
        """Predict with early exit: the batch shrinks after each step to the images that go on.

        Args:
            x: See `init_state`.
            stop_rule: Tells from the confidences of the steps so far [n, t] who stops, bool [n].
        """
        state = self.init_state(x)
        logits, state = self.step(0, state)
        confidence = self.confidence(logits, state)
        steps_used = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
        rows, history = torch.arange(len(logits), device=logits.device), confidence[:, None]
        for t in range(1, self.num_steps):
            going = (~stop_rule(history)).nonzero().squeeze(1)  # the one point where a GPU is waited for
            if not len(going):
                break
            if len(going) < len(rows):
                rows, history, state = rows[going], history[going], select_rows(state, going)
            step_logits, state = self.step(t, state)
            step_confidence = self.confidence(step_logits, state)
            history = torch.cat([history, step_confidence[:, None]], dim=1)
            logits = logits.index_copy(0, rows, step_logits)
            confidence = confidence.index_copy(0, rows, step_confidence)
            steps_used[rows] = t + 1
        return ExitResult(logits, steps_used, confidence)

    def forward_all(self, x: Any) -> dict[str, torch.Tensor]:
        """Run all steps and give all that a training recipe needs of them; families add arguments and entries.

        Returns:
            'logits' [T, B, num_classes].
        """
        return {'logits': torch.stack(list(self.forward_steps(x)))}

    def forward_train(self, x: Any) -> torch.Tensor:
        """Logits [B, num_classes] that depend on every parameter: the mean over the steps."""
        return self.forward_all(x)['logits'].mean(dim=0)

    def forward(self, x: Any, all_steps: bool = False, **kwargs: Any) -> Any:
        """Predict.

        Args:
            x: See `init_state`.
            all_steps: Give the dict of `forward_all`, which takes the further arguments. Training asks for it by this
                way, because only calls of a model itself are seen by what it is wrapped in.
            **kwargs: For `forward_all`.

        Returns:
            Logits [B, num_classes]. In eval mode those of the last step, or of the step at which an image stops if an
            exit policy is set; in train mode the mean over the steps.
        """
        if all_steps:
            return self.forward_all(x, **kwargs)
        if kwargs:
            raise TypeError(f"Only all_steps=True takes further arguments, got {', '.join(kwargs)}.")
        if self.training:
            return self.forward_train(x)
        stop_rule = self.exit_policy
        if stop_rule is not None:
            return self.forward_exit(x, stop_rule).logits
        for logits in self.forward_steps(x):  # noqa: B007
            pass
        return logits

    # When to stop

    def set_exit(self, policy: Any) -> None:
        """Let `forward` exit early in eval mode.

        Args:
            policy: T thresholds, as a float tensor or a sequence, or an `ExitPolicy`. Any other stop rule works, too,
                but is not exported.

        Raises:
            ValueError: The policy does not fit the model.
        """
        self.exit_policy = self.make_stop_rule(policy)
        kept = _to_json(policy)
        if kept is None:
            self.exit_cfg.pop('exit', None)
            _logger.warning(f'{type(policy).__name__} is no registered exit policy: it will not be exported.')
        else:
            self.exit_cfg.update(exit=kept, num_classes=self.num_classes)

    def clear_exit(self) -> None:
        """Let `forward` run all steps."""
        self.exit_policy = None
        self.exit_cfg.pop('exit', None)

    def store_budgets(self, budgets: Iterable[Mapping[str, Any]]) -> None:
        """Keep policies solved for budgets, in place of those kept so far.

        Args:
            budgets: For each its cost 'gmacs', its 'policy' (see `set_exit`), and whatever else is known of it, e.g.
                'top1', as plain JSON.

        Raises:
            ValueError: A policy does not fit the model, a cost is no positive number, or something is no plain JSON.
        """
        kept = []
        for budget in budgets:
            self.make_stop_rule(budget['policy'])
            policy = _to_json(budget['policy'])
            if policy is None:
                raise ValueError(f"{type(budget['policy']).__name__} is no registered exit policy, and cannot be kept.")
            kept.append({**budget, 'gmacs': _check_gmacs(budget['gmacs']), 'policy': policy})
            try:
                json.dumps(kept[-1], allow_nan=False)
            except (TypeError, ValueError) as e:
                raise ValueError(f'What is known of a budget must be plain JSON: {e}.') from e
        self.exit_cfg.update(budgets=sorted(kept, key=lambda b: b['gmacs']), num_classes=self.num_classes)

    def set_budget(self, gmacs: float) -> dict[str, Any]:
        """Exit early such that an image costs about this much on average.

        A policy that was kept for this budget is set as it is. For a budget between two kept ones, thresholds and
        policies that know how (`ValuePolicy`) are interpolated, linearly in cost; of others the cheaper one is set. An
        interpolated policy costs no more than the dearer of its neighbours if all its thresholds lie between theirs and
        rise with the budget, but the budget itself is not guaranteed: solved for a half of AnchorNet's published table
        of ImageNet, it cost 7 % less to 1.4 % more. To meet a budget exactly, solve it and keep it.

        Args:
            gmacs: Budget in 10⁹ multiply-adds per image.

        Returns:
            What is known of the policy, see `store_budgets`; of an interpolated one 'gmacs', 'policy', and the costs
            'between' which it lies.

        Raises:
            ValueError: No budgets were solved for this model, or none as low as this one; or the budget is out of
                the model's range.
        """
        try:
            gmacs = float(gmacs)
        except (TypeError, ValueError) as e:
            raise ValueError(f'A budget is a number of GMACs, got {gmacs!r}.') from e
        budgets = self.exit_cfg.get('budgets')
        if not budgets:
            raise ValueError(
                'No budgets are kept in this model. Solve them with timm_dynamic.exits.solve_thresholds or validate.py '
                'and keep them with model.store_budgets; or set thresholds of your own with model.set_exit.')
        least, most = self.step_macs[0] / 1e9, self.step_macs[-1] / 1e9
        if not least <= gmacs <= most:
            raise ValueError(
                f'A budget of {gmacs:g} GMACs is out of range: the first step costs {least:.6g}, all steps {most:.6g}.')
        num_affordable = sum(b['gmacs'] <= gmacs * (1 + 1e-6) for b in budgets)
        if not num_affordable:
            raise ValueError(
                f"A budget of {gmacs:g} GMACs is below the smallest one kept in this model, {budgets[0]['gmacs']:.6g}.")
        chosen = budgets[num_affordable - 1]
        if num_affordable < len(budgets) and chosen['gmacs'] < gmacs * (1 - 1e-6):
            chosen = _interpolate(chosen, budgets[num_affordable], gmacs) or chosen
        self.set_exit(_from_json(chosen['policy']))
        low, *high = chosen.get('between', [chosen['gmacs']])
        where = f'between those for {low:.4g} and {high[0]:.4g}' if high else f'for {low:.4g}'
        _logger.info(f'Budget {gmacs:g} GMACs: policy {where} GMACs set.')
        return chosen

    def load_exit_cfg(self, exit_cfg: Mapping[str, Any]) -> None:
        """Take over what is known about stopping, e.g. from a checkpoint."""
        _check_mapping(exit_cfg)
        self.exit_cfg.clear()
        self.exit_cfg.update(copy.deepcopy(dict(exit_cfg)))
        self._check_exit_cfg()

    def make_stop_rule(self, policy: Any) -> StopRule:
        """Make of a policy, see `set_exit`, what `forward_exit` takes.

        Raises:
            ValueError: The policy does not fit the model.
        """
        if callable(policy):
            check_policy_steps(policy, self.num_steps)
            return policy
        return _Thresholds(tuple(check_thresholds(policy, self.num_steps).tolist()))

    def _check_exit_cfg(self) -> None:
        """Set the policy that `exit_cfg` names; forget what was solved for other classes or steps."""
        self.exit_policy = None
        self.exit_cfg.update(_finite(self.exit_cfg))  # older files hold Infinity, which is no JSON
        try:
            classes = self.exit_cfg.get('num_classes', self.num_classes)
            if classes != self.num_classes:
                raise ValueError(f'they hold for {classes} classes, the model has {self.num_classes}')
            for budget in self.exit_cfg.get('budgets', ()):
                _check_gmacs(budget['gmacs'])
                self.make_stop_rule(_from_json(budget['policy']))
            if 'exit' in self.exit_cfg:
                self.exit_policy = self.make_stop_rule(_from_json(self.exit_cfg['exit']))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as e:  # files may hold anything
            what = e if isinstance(e, ValueError) else f'they are not as the model keeps them ({type(e).__name__}: {e})'
            self._drop_exits(what)

    def _drop_exits(self, why: Any) -> None:
        """Forget the exit policy and the budgets, with a notice if there are any."""
        if self.exit_cfg.keys() & {'exit', 'budgets'}:
            _logger.warning(f'The exit policy and budgets kept with the model are dropped: {why}')
        for key in ('exit', 'budgets', 'num_classes'):
            self.exit_cfg.pop(key, None)
        self.exit_policy = None

    def _classifier_changed(self) -> None:
        self._step_macs = None
        self._check_exit_cfg()


_exit_policies: dict[str, Any] = {}


def register_exit_policy(cls: Any) -> Any:
    """Class decorator: let models keep policies of this class, by its name.

    Its instances are stop rules with a `state_dict()`, of numbers, texts, tensors and lists of them; the class has a
    `from_state_dict` that makes an instance of it. With `interpolate(other, share)`, which gives a policy of the class
    or None, it also serves budgets between those that are kept.
    """
    _exit_policies[cls.__name__] = cls
    return cls


def _to_json(policy: Any) -> Any:
    """A policy as plain JSON; None of a rule that cannot be kept."""
    if not callable(policy):
        return _finite(torch.as_tensor(_infinite(policy), dtype=torch.float32).detach().tolist())
    name = type(policy).__name__
    if name not in _exit_policies:
        return None
    state = policy.state_dict().items()
    return {'type': name, **{k: _finite(v.tolist() if isinstance(v, torch.Tensor) else v) for k, v in state}}


def _from_json(policy: Any) -> Any:
    policy = _infinite(policy)
    if not isinstance(policy, Mapping):
        return policy
    if policy.get('type') not in _exit_policies:
        raise ValueError(f"there is no exit policy of the type {policy.get('type')!r}")
    return _exit_policies[policy['type']].from_state_dict({k: v for k, v in policy.items() if k != 'type'})


def _finite(value: Any) -> Any:
    """Plain JSON, which has no infinite numbers and no NaN: they become 'inf', '-inf' and 'nan'."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _infinite(value: Any) -> Any:
    """What `_finite` was given."""
    if isinstance(value, Mapping):
        return {k: _infinite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_infinite(v) for v in value]
    return float(value) if isinstance(value, str) and value in ('inf', '-inf', 'nan') else value


def _check_mapping(exit_cfg: Any) -> Any:
    if not isinstance(exit_cfg, Mapping):
        raise ValueError(f'exit_cfg is a dict, see DynamicNet; got {exit_cfg!r:.100}.')
    return exit_cfg


def _check_gmacs(gmacs: Any) -> float:
    if not 0 < float(gmacs) < math.inf:
        raise ValueError(f'A budget costs a positive number of GMACs, got {gmacs!r}.')
    return float(gmacs)


def _interpolate(low: Mapping[str, Any], high: Mapping[str, Any], gmacs: float) -> dict[str, Any] | None:
    """A budget between two kept ones; None if their policies cannot be interpolated."""
    share = (gmacs - low['gmacs']) / (high['gmacs'] - low['gmacs'])
    first, last = _from_json(low['policy']), _from_json(high['policy'])
    if not callable(first) and not callable(last):
        # What lies beyond all confidences means all or none, and says nothing about how far to go.
        (a, b), (c, d) = (budget.get('confidence_range', (0, 1)) for budget in (low, high))
        bounds = min(a, c), max(b, d)
        policy = torch.lerp(torch.tensor(first).clamp(*bounds), torch.tensor(last).clamp(*bounds), share)
    elif type(first) is type(last) and hasattr(first, 'interpolate'):
        policy = first.interpolate(last, share)
    else:
        policy = None
    if policy is None:
        return None
    return {'gmacs': float(gmacs), 'policy': _to_json(policy), 'between': [low['gmacs'], high['gmacs']]}


def check_thresholds(thresholds: Any, num_steps: int) -> torch.Tensor:
    """Thresholds as a float32 tensor [T] on the CPU.

    Raises:
        ValueError: There are not `num_steps` of them, or one that is used is not a number.
    """
    try:
        values = torch.as_tensor(_infinite(thresholds), dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise ValueError(
            f'Expected {num_steps} thresholds or an ExitPolicy, got {type(thresholds).__name__}: {e}') from e
    if values.shape != (num_steps,):
        raise ValueError(f'Expected {num_steps} thresholds, one a step, got a tensor of shape {list(values.shape)}.')
    if values[:-1].isnan().any():
        raise ValueError(f'Thresholds must be numbers, got {values.tolist()}.')
    return values


def check_policy_steps(policy: Any, num_steps: int) -> None:
    """Check that a rule which says for how many steps it is made fits.

    Raises:
        ValueError: It is made for another number of steps.
    """
    steps = getattr(policy, 'num_steps', num_steps)
    if steps != num_steps:
        raise ValueError(f'Expected a policy for {num_steps} steps, got one for {steps}.')


def on_meta(model: Any) -> Any:
    """Copy a model without its data, onto the meta device."""
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device='meta') for b in model.buffers()}
    memo.update({id(p): nn.Parameter(torch.empty_like(p, device='meta'), False) for p in model.parameters()})
    return copy.deepcopy(model, memo)


def _run_step(model: DynamicNet, t: int, state: State) -> tuple[torch.Tensor, torch.Tensor, State]:
    logits, state = model.step(t, state)
    return logits, model.confidence(logits, state), state


def _compile_step(t: int, cuda_graphs: bool, kwargs: dict[str, Any]) -> Callable[..., Any]:
    def run(model: DynamicNet, state: State) -> tuple[torch.Tensor, torch.Tensor, State]:
        return _run_step(model, t, state)

    # torch.compile counts by code object, and after eight shapes runs a function as it is: so each step has its own.
    run.__code__ = run.__code__.replace(co_name=f'step_{t}')
    compiled = torch.compile(run, **kwargs)

    def begin_and_run(model: DynamicNet, state: State) -> tuple[torch.Tensor, torch.Tensor, State]:
        torch.compiler.cudagraph_mark_step_begin()  # what the step before gave has been copied: it may be overwritten
        return compiled(model, state)

    return begin_and_run if cuda_graphs else compiled


@torch.no_grad()
def _count_step_macs(model: DynamicNet) -> tuple[int, ...]:
    meta = on_meta(model).eval()
    macs = []
    with FlopCounterMode(display=False) as counter:
        state = meta.init_state(meta.example_input(device='meta', dtype=next(meta.parameters()).dtype))
        for t in range(meta.num_steps):
            _, state = meta.step(t, state)
            macs.append(counter.get_total_flops() // 2)
    return tuple(macs)
