"""Turn the result of train.py into a folder that can be published."""
import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from ..utils import copy_pretrained
from ..utils.export import TASK_STATE
from ..version import __version__
from .card import escape, markdown_table
from .catalog import Entry
from .convert import describe

# Options that are not on the card because they do not change the result: paths, logging, hardware.
_HIDDEN = (
    'data', 'data_dir', 'class_map', 'config', 'output', 'experiment', 'resume', 'workers', 'log_interval', 'log_with',
    'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id', 'checkpoint_hist', 'checkpoint_interval', 'pin_mem',
    'device', 'device_modules', 'stage', 'stage_args', 'save_images', 'save_patches', 'push_to_hub', 'hub_private')


def describe_run(
        best: str | Path,
        folder: str | Path,
        repo_id: str,
        recipe: str,
        stages: Mapping[str, argparse.Namespace],
        defaults: Mapping[str, Any],
        results: Sequence[Mapping[str, Any]],
        dataset: str,
) -> None:
    """Write a folder that can be published, with a card about the run.

    Args:
        best: Exported folder with the weights.
        folder: Folder to write; created if needed.
        repo_id: 'ORG/NAME'.
        recipe: Name of the recipe.
        stages: Options of every stage, by name.
        defaults: Default values of the options.
        results: Rows of the final table. The last row is the published model's.
        dataset: Name of the training data on the card.
    """
    copy_pretrained(best, folder)
    dataset = show_option(dataset)
    (Path(folder) / TASK_STATE).unlink(missing_ok=True)
    model = next(iter(stages.values())).model
    last = results[-1] if results else {}
    where = f"on the split '{escape(show_option(last['split']))}' ({last['images']} images)" if last else ''
    parts = [
        f'Trained by `train.py` of timm_dynamic {__version__} (timm {timm.__version__}, torch {torch.__version__}) '
        f'with the recipe `{recipe}`. Options that differ from the defaults:',
        _options(stages, defaults),
    ]
    if results:
        columns = list(dict.fromkeys(k for row in results for k in row))
        parts += [f'Results {where}:', markdown_table(columns, [[row.get(c) for c in columns] for row in results])]
    describe(folder, Entry(
        repo_id.partition('/')[2],
        description=f'{escape(show_option(model))}, trained on {escape(dataset)}.',
        dataset=dataset,
        recipe='\n\n'.join(parts),
        limits=f'Evaluated {where or "on no images"}. It knows only the classes of its training data.',
        licence_note='The training data and the initial weights have their own licences.',
        metrics={k: float(last[k]) for k in ('top1', 'top5') if k in last},
    ), repo_id)


def _options(stages: Mapping[str, argparse.Namespace], defaults: Mapping[str, Any]) -> str:
    names = dict.fromkeys(
        k for args in stages.values() for k, v in vars(args).items()
        if k not in _HIDDEN and (k in ('model', 'epochs', 'seed') or v != defaults.get(k)))
    return markdown_table(('option', *stages), [
        (name, *(show_option(getattr(args, name)) for args in stages.values())) for name in sorted(names)])


def show_option(value: Any) -> str:
    """Text of an option's value. Of paths only the last part: the folders are those of one machine.

    Commands and addresses are not shown: they may have passwords and tokens in them.
    """
    if isinstance(value, (list, tuple)):
        return ' '.join(map(show_option, value))
    if isinstance(value, Mapping):
        return ' '.join(f'{k}={show_option(v)}' for k, v in value.items())
    text = str(value)
    if 'pipe:' in text or '://' in text:
        return '(a command or an address)'
    prefix = 'local-dir:' if text.startswith('local-dir:') else ''
    path = Path(text.removeprefix(prefix))
    return f'{prefix}{path.name}' if prefix or path.is_absolute() or ('/' in text and path.exists()) else text
