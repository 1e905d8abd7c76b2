"""The step protocol: a classifier is a sequence of predictions of rising cost, and an image may stop after any.

    state = model.init_state(x)
    for t in range(model.num_steps):
        logits, state = model.step(t, state)

A state is a flat dict of batch-first tensors. Modules store nothing between steps. So rows can leave after any step,
wait, and join rows of other batches, and threads can share a model.
"""
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers.fuse import fuse_conv_bn
from .exit_cfg import (
    Policy,
    StopRule,
    ask_stop_rule,
    budgets_to_json,
    check_mapping,
    choose_budget,
    make_stop_rule,
    policy_from_json,
    policy_to_json,
    read_exit_cfg,
)

_logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]
Net = TypeVar('Net', bound='DynamicNet')


def num_rows(state: State) -> int:
    """Number of images in a state."""
    return len(next(iter(state.values())))


def select_rows(state: State, rows: torch.Tensor) -> State:
    """Select images of a state by index, int64, or by a mask [n], bool."""
    return {name: value[rows] for name, value in state.items()}


def check_float(x: torch.Tensor) -> None:
    """Raise a ValueError for images of whole numbers, e.g. uint8."""
    if not x.is_floating_point():
        raise ValueError(
            f'Expected normalised images of a floating-point dtype, got {x.dtype}. Divide by 255, subtract the mean '
            'and divide by the std of model.pretrained_cfg, or use timm.data.create_transform.')


def square_side(img_size: int | Sequence[int], name: str) -> int:
    """Side of square images, from an argument like timm's `img_size`.

    Raises:
        ValueError: The images are not square; `name` takes square ones only.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height != width:
        raise ValueError(f'{name} takes square images, got img_size {height}x{width}.')
    return height


class ExitResult(NamedTuple):
    """Result of early exit, in the order of the input."""
    logits: torch.Tensor  # [B, num_classes]
    steps_used: torch.Tensor  # [B] int64, in 1..T
    confidence: torch.Tensor  # [B] at the last step used


class DynamicNet(nn.Module):
    """Base of the models that may stop early. A family implements `init_state` and `step`.

    Args:
        num_steps: Number of predictions T.
        num_classes: Number of classes.
        in_chans: Number of input channels.
        img_size: Side of the images that costs are counted for.
        exit_cfg: What the model knows about stopping, plain JSON: see the attribute.

    Attributes:
        exit_policy: Stop rule in use, or None: then all steps are run. It tells from the confidences of the steps so
            far [n, t] which images stop, bool [n]. `set_exit`, `set_budget` and `clear_exit` set it.
        exit_cfg: What the setters have set, as plain JSON: 'exit' (the policy in use), 'budgets' (policies solved for
            budgets), 'num_classes' (the classes that both are for), and 'origin' (numbers from an authors' checkpoint).
            It is a copy of the argument. timm records and exports it among the constructor arguments.
    """

    def __init__(
            self,
            num_steps: int,
            num_classes: int,
            in_chans: int = 3,
            img_size: int | Sequence[int] = 224,
            exit_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = square_side(img_size, type(self).__name__)
        self._step_macs: tuple[int, ...] | None = None
        self.exit_policy: StopRule | None = None
        self._compiled_steps: Sequence[Any] | None = None
        self.norms_fused = False
        self.exit_cfg: dict[str, Any] = {} if exit_cfg is None else copy.deepcopy(dict(check_mapping(exit_cfg)))
        self._given_args: dict[str, Any] = {}
        self._read_exit_cfg()

    def recorded_args(self) -> dict[str, Any]:
        """Constructor arguments whose values are the model's own. They replace those that the caller gave on export."""
        return {'exit_cfg': self.exit_cfg}

    @property
    def _model_args(self) -> dict[str, Any]:
        return {**self._given_args, **self.recorded_args()}

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:  # timm records the caller's arguments
        self._given_args = {k: v for k, v in args.items() if k not in self.recorded_args()}

    # The step protocol

    def init_state(self, x: Any) -> State:
        """Make the state before the first step.

        Args:
            x: Images [B, C, S, S]. Cascades also take a tuple with one tensor per member.

        Raises:
            ValueError: The model cannot take images of this shape.
        """
        raise NotImplementedError

    def check_img_size(self, side: int) -> None:
        """Raise a ValueError if the model cannot take images of this side in pixels. Families override it."""

    def check_images(self, x: torch.Tensor) -> None:
        """Raise a ValueError unless x is a batch of square images [B, in_chans, S, S] of a size the model can take."""
        if not isinstance(x, torch.Tensor):
            raise ValueError(f'Expected images as a tensor, got {type(x).__name__}.')
        check_float(x)
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f'Expected images [batch, {self.in_chans}, height, width], got {list(x.shape)}.')
        if x.shape[2] != x.shape[3]:
            raise ValueError(f'{type(self).__name__} takes square images, got {x.shape[2]}x{x.shape[3]}.')
        self.check_img_size(x.shape[2])

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
        """Confidence of the model after a step: the largest probability, unless a family has a better measure.

        Args:
            logits: Logits of the step [n, num_classes].
            state: State that the step returned.

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
        """Compile each step with its confidence, for batches of constant shape.

        `ExitStream` runs the compiled steps and pads its last batches, so that each step is compiled once per batch
        size and image size. `early_exit` and `forward` are not compiled, because their batches shrink. A step is
        compiled when it is first run. Fused kernels round differently: logits are close, not equal. Copies and pickles
        of the model are not compiled.

        Args:
            cuda_graphs: Record the kernels of a step as a CUDA graph (mode 'reduce-overhead').
            backend: Backend of torch.compile. 'eager' and 'aot_eager' help to find the cause of errors.
            **kwargs: For torch.compile, e.g. `mode` or `options`.
        """
        if cuda_graphs:
            kwargs = {'mode': 'reduce-overhead', **kwargs}
        # Without isolation, variants of all steps and models count against one limit, beyond which torch runs eagerly.
        kwargs = {'backend': backend, 'dynamic': False, 'isolate_recompiles': True, **kwargs}
        self._compiled_steps = [_compile_step(t, cuda_graphs, kwargs) for t in range(self.num_steps)]

    def fuse_conv_bn(self) -> int:
        """Fuse batch norms into convolutions, in place, for faster inference: see `layers.fuse_conv_bn`.

        A model with fused norms can no longer be trained or saved: `train()` and `save_pretrained` raise an error.

        Returns:
            Number of fused batch norms.
        """
        parameter = next(self.parameters())
        x = self.example_input(device=parameter.device, dtype=parameter.dtype)
        return fuse_conv_bn(self, lambda: list(self.forward_steps(x)))

    def for_inference(self: Net) -> Net:
        """Prepare the model for fast inference, in place: eval mode, fused batch norms, weights in channels last.

        This is the recommended setting on a CPU, for single images and for batches: see docs/speed.md. Images may have
        any memory format. Outputs change by rounding errors only. Calling it again changes nothing. Call it last:
        a model with fused norms cannot be trained, nor load the weights of one that is not fused.

        Returns:
            The model itself.
        """
        self.eval()
        self.fuse_conv_bn()
        return self.to(memory_format=torch.channels_last)

    def train(self: Net, mode: bool = True) -> Net:
        """Set train or eval mode.

        Raises:
            RuntimeError: Train mode is requested, and norms are fused into convolutions.
        """
        if mode and self.norms_fused:
            raise RuntimeError(
                'The batch norms of this model are fused into its convolutions (for_inference, fuse_conv_bn): it '
                'cannot be trained. Create the model again to train it.')
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_compiled_steps': None}

    def example_input(self, batch_size: int = 1, **dd: Any) -> Any:
        """Zeros of the shape of the model's input, with a device and dtype."""
        return torch.zeros(batch_size, self.in_chans, self.img_size, self.img_size, **dd)

    @property
    def step_macs(self) -> tuple[int, ...]:
        """Multiply-adds of one image that stops after step 1..T, counted with torch's FlopCounterMode."""
        if self._step_macs is None:
            self._step_macs = _count_step_macs(self)
        return self._step_macs

    def count_part_macs(self) -> dict[str, tuple[int, ...]]:
        """Count the multiply-adds of each part of the model in step 1..T, 0 where the part is not run.

        Over all parts they add up to what `step_macs` has for each step. Empty if the family does not tell parts apart.
        """
        return {}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the side of the images that costs are counted for, like the argument `img_size`.

        Raises:
            ValueError: The model cannot take images of this size.
        """
        side = square_side(img_size, type(self).__name__)
        self.check_img_size(side)
        self.img_size, self._step_macs = side, None
        self._traits: dict[str, Any] = {**getattr(self, '_traits', {}), 'img_size': (side, side)}  # timm exports it

    # Running the steps

    def forward_steps(self, x: Any) -> Iterator[torch.Tensor]:
        """Logits [B, num_classes] of each step. A step is run when its logits are requested."""
        state = self.init_state(x)
        for t in range(self.num_steps):
            logits, state = self.step(t, state)
            yield logits

    def forward_exit(self, x: Any, stop_rule: StopRule | None = None) -> ExitResult:
        """Predict with early exit: after each step, the batch shrinks to the images that continue.

        Args:
            x: See `init_state`.
            stop_rule: See the attribute `exit_policy`, which is the default.

        Raises:
            RuntimeError: It is traced or exported. The graph would hold the path of the example images, for all images.
            ValueError: The stop rule returns something else than bool [n], or there is none.
        """
        stop_rule = self.make_stop_rule() if stop_rule is None else stop_rule
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError(
                'A traced graph cannot exit early: it would repeat the path of the example images. Call '
                'model.clear_exit() before, for all steps; or export model.step for each step.')
        state = self.init_state(x)
        logits, state = self.step(0, state)
        confidence = self.confidence(logits, state)
        steps_used = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
        rows, history = torch.arange(len(logits), device=logits.device), confidence[:, None]
        for t in range(1, self.num_steps):
            going = (~ask_stop_rule(stop_rule, history)).nonzero().squeeze(1)  # waits for a GPU, once per step
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
        """Run all steps, and return what training recipes need. Families add arguments and entries.

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
            all_steps: Return the dict of `forward_all`. Training calls it through `forward`, because a wrapper (DDP)
                only sees calls of `forward`.
            **kwargs: For `forward_all`.

        Returns:
            Logits [B, num_classes]. In eval mode those of the last step or, if an exit policy is set, of the step after
            which an image stops; in train mode the mean over the steps.
        """
        if all_steps:
            return self.forward_all(x, **kwargs)
        if kwargs:
            raise TypeError(f"Further arguments need all_steps=True, got {', '.join(kwargs)}.")
        if self.training:
            return self.forward_train(x)
        if self.exit_policy is not None:
            return self.forward_exit(x, self.exit_policy).logits
        for logits in self.forward_steps(x):  # noqa: B007
            pass
        return logits

    # When to stop

    def make_stop_rule(self, policy: Policy | None = None) -> StopRule:
        """Turn a policy, see `set_exit`, into the stop rule that `forward_exit` takes. Default: the model's own.

        Raises:
            ValueError: The policy does not fit the model, or the model has none.
        """
        if policy is not None:
            return make_stop_rule(policy, self.num_steps)
        if self.exit_policy is None:
            raise ValueError(
                'The model has no exit policy. Give one, or set one with model.set_budget(gmacs=...) or '
                'model.set_exit(thresholds).')
        return self.exit_policy

    def set_exit(self, policy: Policy) -> None:
        """Let `forward` exit early in eval mode.

        Args:
            policy: T thresholds, as a float tensor or a sequence, or an `ExitPolicy`. Any other stop rule works, too,
                but is not exported.

        Raises:
            ValueError: The policy does not fit the model.
        """
        self.exit_policy = make_stop_rule(policy, self.num_steps)
        stored = policy_to_json(policy)
        if stored is None:
            self.exit_cfg.pop('exit', None)
            _logger.warning(f'{type(policy).__name__} is not a registered exit policy: it will not be exported.')
        else:
            self.exit_cfg.update(exit=stored, num_classes=self.num_classes)

    def clear_exit(self) -> None:
        """Let `forward` run all steps."""
        self.exit_policy = None
        self.exit_cfg.pop('exit', None)

    def store_budgets(self, budgets: Iterable[Mapping[str, Any]]) -> None:
        """Store policies solved for budgets, in place of those stored before.

        Args:
            budgets: For each its cost 'gmacs', its 'policy' (see `set_exit`), and further entries as plain JSON, e.g.
                'top1'.

        Raises:
            ValueError: A policy does not fit the model or cannot be stored, a cost is not a positive number, or another
                entry is not plain JSON.
        """
        self.exit_cfg.update(budgets=budgets_to_json(budgets, self.num_steps), num_classes=self.num_classes)

    def set_budget(self, gmacs: float) -> dict[str, Any]:
        """Exit early such that an image costs about this much on average.

        A policy stored for this budget is used unchanged. For a budget between two stored ones, thresholds and policies
        with an `interpolate` method (`ValuePolicy`) are interpolated linearly in cost; otherwise the cheaper policy is
        used. An interpolated policy costs no more than the more expensive of its neighbours if all its thresholds lie
        between theirs and rise with the budget. The budget itself is not guaranteed: on AnchorNet's published table of
        ImageNet, with 4 to 10 budgets solved on one half, interpolated policies cost from 9.6 % less to 1.5 % more on
        the other half than asked for. To meet a budget exactly, solve for it and store the policy.

        Args:
            gmacs: Budget in 10⁹ multiply-adds per image.

        Returns:
            The budget, see `store_budgets`; if it was interpolated, 'gmacs', 'policy', and 'between', the costs of its
            neighbours.

        Raises:
            ValueError: No budgets are stored, or none as low as this one; or the budget is out of the model's range.
        """
        budget = choose_budget(self.exit_cfg.get('budgets'), gmacs, self.step_macs)
        self.set_exit(policy_from_json(budget['policy']))
        source = ' and '.join(f'{cost:.4g}' for cost in budget.get('between', [budget['gmacs']]))
        _logger.info(f'Budget of {gmacs:g} GMACs: exit policy set, solved for {source} GMACs.')
        return budget

    def load_exit_cfg(self, exit_cfg: Mapping[str, Any]) -> None:
        """Replace `exit_cfg`, e.g. by that of a checkpoint, and set the exit policy that it names.

        Policies for other classes or steps, and damaged ones, are dropped with a warning.

        Raises:
            ValueError: It is not a dict.
        """
        new = copy.deepcopy(dict(check_mapping(exit_cfg)))
        self.exit_cfg.clear()
        self.exit_cfg.update(new)
        self._read_exit_cfg()

    def drop_exits(self, reason: Any) -> None:
        """Remove the exit policy and the budgets. If there are any, a warning says why."""
        if self.exit_cfg.keys() & {'exit', 'budgets'}:
            _logger.warning(f'The exit policy and budgets of the model are dropped: {reason}')
        for key in ('exit', 'budgets', 'num_classes'):
            self.exit_cfg.pop(key, None)
        self.exit_policy = None

    def _read_exit_cfg(self) -> None:
        try:
            self.exit_policy = read_exit_cfg(self.exit_cfg, self.num_steps, self.num_classes)
        except ValueError as e:
            self.drop_exits(e)

    def _classifier_changed(self) -> None:
        """For `reset_classifier`: costs are counted anew, and exits for other classes dropped."""
        self._step_macs = None
        self._read_exit_cfg()


def on_meta(model: Any) -> Any:
    """Copy a model to the meta device, without its data."""
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device='meta') for b in model.buffers()}
    memo.update({id(p): nn.Parameter(torch.empty_like(p, device='meta'), False) for p in model.parameters()})
    return copy.deepcopy(model, memo)


def _run_step(model: DynamicNet, t: int, state: State) -> tuple[torch.Tensor, torch.Tensor, State]:
    logits, state = model.step(t, state)
    return logits, model.confidence(logits, state), state


def _compile_step(t: int, cuda_graphs: bool, kwargs: dict[str, Any]) -> Callable[..., Any]:
    def run(model: DynamicNet, state: State) -> tuple[torch.Tensor, torch.Tensor, State]:
        return _run_step(model, t, state)

    compiled = torch.compile(run, **kwargs)

    def begin_and_run(model: DynamicNet, state: State) -> tuple[torch.Tensor, torch.Tensor, State]:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the step before were copied: overwrite them
        return compiled(model, state)

    return begin_and_run if cuda_graphs else compiled


def count_call(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Call a function, and count its multiply-adds. Returns its result and the number."""
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return result, counter.get_total_flops() // 2


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
