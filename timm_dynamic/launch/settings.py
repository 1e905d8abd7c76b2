"""The sources of an option's value, in rising priority: timm, recipe, --config, command line, --stage-args."""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from timm.optim import list_optimizers

from ..task import Stage
from ..utils import did_you_mean
from .options import REFUSED_TRAIN, create_train_parser, create_validate_parser
from .parser import hint_model_argument

# Of timm, whose factory has no list of them.
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly', 'constant', 'wsd', 'rsqrt', 'none')


class TrainOptions:
    """The options of a training run, by source.

    Args:
        argv: Command line without the script's name (default: that of this process).

    Attributes:
        parser: The parser.
        given: Options of the command line.
        config: Options of `--config`.
        defaults: timm's defaults of all options.
        base: All options without the defaults of a recipe and without `--stage-args`.
        for_one_stage: Options of `--stage-args`, by stage.

    Raises:
        SystemExit: The command line or the config file is wrong, as in argparse.
    """

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        self.parser = create_train_parser()
        self.given = given_options(self.parser, argv)
        if self.given.get('data') is None:
            self.given.pop('data', None)
        self.defaults = vars(self.parser.parse_args([]))
        self.config = read_config(self.parser, self.given['config']) if self.given.get('config') else {}
        self.base = argparse.Namespace(**{**self.defaults, **self.config, **self.given})
        self.for_one_stage: dict[str, dict[str, Any]] = {}
        for text in self.base.stage_args:
            self._add_stage_arg(text)

    def set_num_classes(self, num_classes: int) -> None:
        """Set the number of classes where no source does, e.g. from the data."""
        for source in (self.config, self.given):
            if source.get('num_classes', 0) is None:  # timm's args.yaml contains every option
                del source['num_classes']
        self.defaults['num_classes'] = num_classes
        self.base = argparse.Namespace(**{**self.defaults, **self.config, **self.given})

    def _add_stage_arg(self, text: str) -> None:
        path, equals, value = text.partition('=')
        stage, dot, option = path.partition('.')
        option = option.replace('-', '_')
        if not (equals and dot and option in self.defaults):
            self.parser.error(f"--stage-args: expected STAGE.OPTION=VALUE with an option of train.py, got '{text}'.")
        self.for_one_stage.setdefault(stage, {})[option] = typed_value(self.parser, option, yaml.safe_load(value))

    def as_config(self) -> dict[str, Any]:
        """Options to repeat the run with `--config`: those that were given, without the defaults of the recipe."""
        given = {k: v for k, v in {**self.config, **self.given}.items() if k != 'config'}
        if not Path(self.base.resume).is_file():  # keep only a checkpoint of timm: the rest resumes this run itself
            given.pop('resume', None)
        return given

    def for_stage(self, stage: Stage, num_processes: int = 1) -> argparse.Namespace:
        """Resolve the options of a stage from all sources.

        Args:
            stage: The stage.
            num_processes: Number of processes that share the recipe's batch size.

        Raises:
            ValueError: An option is out of range, or the recipe's batch size is not divisible by the processes.
        """
        recipe = dict(stage.defaults)
        global_batch = recipe.pop('global_batch_size', None)
        given = {**self.config, **self.given, **self.for_one_stage.get(stage.name, {})}
        if 'opt_kwargs' in given:  # added to those of the recipe
            given['opt_kwargs'] = {**recipe.get('opt_kwargs', {}), **given['opt_kwargs']}
        args = argparse.Namespace(**{**self.defaults, **recipe, **given})
        for name in ('epochs', 'batch_size', 'val_interval', 'log_interval'):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}.")
        _check_name('--opt', args.opt, args.opt.lower().removeprefix('lookahead_'), list(map(str, list_optimizers())))
        _check_name('--sched', args.sched, args.sched, _SCHEDULES)
        if not 0 <= args.smoothing <= 1:
            raise ValueError(f'--smoothing: expected a number from 0 to 1, got {args.smoothing}.')
        for key, value in stage.options.items():
            setattr(args, key, value)
        if stage.model is not None:
            args.model, args.model_kwargs = stage.model, dict(stage.model_kwargs)
            args.pretrained, args.pretrained_path, args.initial_checkpoint = False, None, ''
        if global_batch and 'batch_size' not in given:
            parts = num_processes * max(1, args.grad_accum_steps)
            if global_batch % parts:
                raise ValueError(
                    f"The recipe's batch size {global_batch} is not divisible by {num_processes} processes x "
                    f'{args.grad_accum_steps} accumulation steps. Set --batch-size (per process).')
            args.batch_size = global_batch // parts
        args.grad_accum_steps = max(1, args.grad_accum_steps)
        val_batch = args.validation_batch_size or args.batch_size
        if args.tta > 1 and val_batch % args.tta:
            raise ValueError(
                f'--tta {args.tta} averages neighbouring images: expected batches of a multiple, got {val_batch}.')
        if 'seed' not in self.for_one_stage.get(stage.name, {}):
            args.seed += stage.seed_offset
        return args


def _check_name(option: str, given: str, name: str, known: Sequence[str]) -> None:
    """Raise a ValueError with the closest names for a value that is not known."""
    if name not in known:
        raise ValueError(f"{option} {given}: there is no such name.{did_you_mean(name, known)}")


def validation_options(args: argparse.Namespace, split: str, **given: Any) -> argparse.Namespace:
    """Convert options of train.py to options of validate.py.

    Args:
        args: Options of a stage of train.py.
        split: Split to evaluate on.
        **given: Further options of validate.py.
    """
    defaults = vars(create_validate_parser().parse_args([]))
    # These mean something else in each script. And the layout is left out: validate.py shall give the same digits.
    not_shared = ('confidence', 'fold_dir', 'torchcompile', 'torchcompile_mode', 'channels_last')
    shared = {k: v for k, v in vars(args).items() if k in defaults and k not in not_shared}
    batch_size = args.validation_batch_size or args.batch_size
    return argparse.Namespace(**{
        **defaults, **shared, 'split': split, 'num_samples': args.val_num_samples, 'batch_size': batch_size, **given})


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Parse `argv` and return only the options that it contains."""
    args = parser.parse_args(argv)
    marker = object()
    blank = argparse.Namespace(**{a.dest: marker for a in parser._actions if a.dest != argparse.SUPPRESS})
    given = parser.parse_args(argv, namespace=blank)
    return {k: getattr(args, k) for k, v in vars(given).items() if v is not marker and k in vars(args)}


def read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Read a YAML file of options, e.g. the args.yaml of a run.

    Raises:
        SystemExit: The file does not exist, is not a mapping, or names an unknown or unsupported option.
    """
    if Path(path).is_dir():
        inside = Path(path) / 'args.yaml'
        parser.error(f"--config: '{path}' is a folder, expected a file.{f' Use {inside}.' if inside.is_file() else ''}")
    if not Path(path).exists():
        parser.error(f"--config: there is no file '{path}'.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        parser.error(f"--config: cannot read '{path}': {e}")
    if not isinstance(values, dict):
        parser.error(f"--config: '{path}' must map options to values, found {type(values).__name__}.")
    values = {str(k).replace('-', '_'): v for k, v in values.items()}
    known = {a.dest for a in parser._actions}
    aliases = {s.lstrip('-').replace('-', '_'): a.dest for a in parser._actions for s in a.option_strings}
    refused = {name.lstrip('-').replace('-', '_') for name in REFUSED_TRAIN}
    # timm's args.yaml contains every option. An unsupported option that is off is ignored.
    off = {k for k in refused if k.startswith('naflex') and not values.get('naflex_loader')}
    off |= {k for k in refused if values.get(k) in (None, False, '', [], ())}
    values = {aliases.get(k, k): v for k, v in values.items() if k not in off}
    for key in values:
        if key in refused:
            parser.error(f"--config: {key}: {REFUSED_TRAIN['--' + key.replace('_', '-')]}")
        if key not in known:
            hint = hint_model_argument(key, str(values.get('model') or '')) or did_you_mean(key, known)
            parser.error(f"--config: '{path}' sets '{key}', which is not an option.{hint}")
    return {k: typed_value(parser, k, v) for k, v in values.items()}


def typed_value(parser: argparse.ArgumentParser, name: str, value: Any) -> Any:
    """Convert a YAML value to the type of its option. E.g. YAML reads 1e-3 as text.

    Raises:
        SystemExit: The value has another type, or is not one of the option's choices.
    """
    action = next(a for a in parser._actions if a.dest == name)
    if value is None:
        return None
    many = isinstance(value, list) or action.nargs in ('+', 3)
    values = value if isinstance(value, list) else [value]
    for v in values:
        if action.choices is not None and v not in action.choices:
            parser.error(
                f"--{name.replace('_', '-')}: expected one of {', '.join(map(repr, action.choices))}, got '{v}'.")
    if action.type in (int, float):
        try:
            values = [action.type(str(v)) for v in values]
        except ValueError:
            parser.error(f"--{name.replace('_', '-')}: expected {action.type.__name__}, got '{value}'.")
    return values if many else values[0]
