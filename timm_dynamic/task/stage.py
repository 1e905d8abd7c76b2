"""What recipes are made of: stages, each a task with the options that it changes."""
import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask


@dataclass
class StageContext:
    """What a task may need beside the model and the options."""
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    dtype: torch.dtype | None = None
    data_config: Mapping[str, Any] = field(default_factory=dict)
    stage_weights: Mapping[str, Path] = field(default_factory=dict)  # exported weights of earlier stages, by stage
    verbose: bool = True
    resumed: bool = False  # a state is loaded: the weights to start from are of no use


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: For `--stage`, folders and tables.
        create_task: Makes the task from a model, the stage's options and a context; None where `runs` says what is
            done.
        defaults: Options that differ from timm's. `global_batch_size` stands for the batch over all processes and
            accumulation steps.
        starts_from: Earlier stage whose weights this one starts from; None for a new model.
        prepare: Gives a new model the weights that it starts from; what it returns is task state to start from.
        model: Model to train in place of `--model`, and `model_kwargs` its arguments.
        shown: Whether the final table compares the result.
        label: What a table calls the result.
        options: Options that belong to the stage, whatever is given.
        runs: What runs in place of the training loop: 'features' or 'confidence' of a cascade.
        num_steps: Number of steps whose accuracy validation reports (default: the model's).
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
    runs: str = ''
    num_steps: int | None = None
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
