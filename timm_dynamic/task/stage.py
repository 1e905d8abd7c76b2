"""What recipes are made of: stages, each a task with the options that it changes."""
import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask

from ..utils.signals import StopRequest


def _unavailable(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError('This context is not for a stage with a run of its own.')


@dataclass
class StageContext:
    """What a stage may need beside the model and the options.

    Attributes:
        device: Where models run.
        dtype: Dtype of weights and images; None for float32.
        data_config: Preprocessing of images, as timm resolves it.
        stage_weights: Exported weights of all stages, by name.
        verbose: Whether this process logs.
        resumed: A state will be loaded, so that weights to start from are not needed.
        demo: The embedded demo set is used.
        folder: Folder of the stage's results.
        accelerator: Accelerate's, for processes and autocast.
        stop: Whether a signal asks the run to stop.
        build_model: Creates the model that the options describe; takes arguments of `timm.create_model`.
        open_loader: Called with a model, a split, and indices of images or None: their loader, as the model sees them.
        data_config_of: Called with a model: its preprocessing.
    """
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    dtype: torch.dtype | None = None
    data_config: Mapping[str, Any] = field(default_factory=dict)
    stage_weights: Mapping[str, Path] = field(default_factory=dict)
    verbose: bool = True
    resumed: bool = False
    # For stages with a run of their own:
    demo: bool = False
    folder: Path = Path()
    accelerator: Any = None
    stop: StopRequest = field(default_factory=StopRequest)
    build_model: Callable[..., Any] = _unavailable
    open_loader: Callable[..., Any] = _unavailable
    data_config_of: Callable[[Any], dict[str, Any]] = _unavailable


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: For `--stage`, folders and tables.
        create_task: Makes the task from a model, the stage's options and a context; None if `run` is given.
        defaults: Options that differ from timm's. `global_batch_size` stands for the batch over all processes and
            accumulation steps.
        starts_from: Earlier stage whose weights this one starts from; None for a new model.
        prepare: Gives a new model the weights that it starts from; what it returns is task state to start from.
        model: Model to train in place of `--model`, and `model_kwargs` its arguments.
        shown: Whether the final table compares the result.
        label: What a table calls the result.
        options: Options that belong to the stage, whatever is given.
        run: Runs instead of the training loop, with the stage's options and a context; returns the stage's result.
        check: Raises a ValueError for options that the stage cannot work with; asked of all stages before the first.
        seed_offset: Added to `--seed`, so that two stages that train the same net do not make the very same one.
    """
    name: str
    create_task: Callable[[Any, argparse.Namespace, StageContext], TrainingTask] | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    starts_from: str | None = None
    prepare: Callable[[Any, argparse.Namespace, 'StageContext'], Mapping[str, Any] | None] | None = None
    model: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    shown: bool = True
    label: str = ''
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Callable[[argparse.Namespace, StageContext], dict[str, Any]] | None = None
    check: Callable[[argparse.Namespace], None] | None = None
    seed_offset: int = 0


@dataclass(frozen=True)
class Recipe:
    """Stages in order. What the last one makes is the result of the run.

    Attributes:
        name: For `--recipe`.
        stages: In the order in which they run.
        references: Models to show beside the results in the final table, as label -> model name.
    """
    name: str
    stages: tuple[Stage, ...]
    references: Mapping[str, str] = field(default_factory=dict)
