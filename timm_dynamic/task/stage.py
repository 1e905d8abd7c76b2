"""The parts of a recipe: stages, and the context that a stage runs in."""
import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask

from ..utils.signals import StopRequest


def _unavailable(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError('This StageContext has no model builder and no loaders. A stage with `run` needs them.')


@dataclass
class StageContext:
    """What a stage can use in addition to the model and the options.

    Attributes:
        device: Device of the models.
        dtype: Dtype of weights and images; None for float32.
        data_config: Preprocessing of images, as timm resolves it.
        stage_weights: Folder of the exported weights of each stage, by stage name.
        verbose: Whether this process logs.
        resumed: Whether a saved state will be loaded. Then no initial weights are needed.
        demo: Whether the embedded demo set is used.
        folder: Folder for the stage's results.
        accelerator: The `Accelerator`, for processes and autocast.
        stop: True once a signal has asked the run to stop.
        build_model: Creates the model of the options. Accepts arguments of `timm.create_model`.
        open_loader: Called with a model, a split, and image indices or None. Returns a loader with the model's
            preprocessing.
        data_config_of: Called with a model. Returns its preprocessing.
    """
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    dtype: torch.dtype | None = None
    data_config: Mapping[str, Any] = field(default_factory=dict)
    stage_weights: Mapping[str, Path] = field(default_factory=dict)
    verbose: bool = True
    resumed: bool = False
    # Only for stages with `run`:
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
        name: Name in `--stage`, folders and tables.
        create_task: Creates the task from a model, the stage's options and a context. None if `run` is given.
        defaults: Options that differ from timm's. `global_batch_size` is the batch size over all processes and
            accumulation steps.
        starts_from: Earlier stage whose weights are the initial weights; None for a new model.
        prepare: Loads the initial weights into a new model. Returns the initial task state, or None.
        model: Model to train instead of `--model`.
        model_kwargs: Arguments of `model`.
        shown: Whether the final table contains the result.
        label: Name of the result in tables.
        options: Options with fixed values. They override all other sources.
        run: Called with the stage's options and a context, instead of the training loop. Returns the stage's result.
        check: Called with the stage's options before the first stage runs. Raises a ValueError if the stage cannot
            use them.
        seed_offset: Added to `--seed`. Two stages that train the same network need different seeds.
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
    """Stages in order. The model of the last stage is the result of the run.

    Attributes:
        name: Name in `--recipe`.
        stages: Stages in the order in which they run.
        references: Other models in the final table, as label -> model name.
    """
    name: str
    stages: tuple[Stage, ...]
    references: Mapping[str, str] = field(default_factory=dict)
