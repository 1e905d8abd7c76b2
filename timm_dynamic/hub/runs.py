"""What a run of train.py made, as a folder that can be published."""
import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from ..utils import copy_pretrained
from ..utils.export import TASK_STATE
from ..version import __version__
from .card import markdown_table
from .catalog import Entry
from .convert import describe

# Options of a run that say nothing of its result: where files lie, and how it is watched.
_PRIVATE = (
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
    """Make a folder that can be published of what a run made, with a card that says how.

    Args:
        best: Exported weights.
        folder: Made if needed.
        repo_id: 'ORG/NAME'.
        recipe: Name of the recipe.
        stages: Options of every stage, by name.
        defaults: Options as they are where nobody changes them.
        results: Rows of the final table; the last one is the model's.
        dataset: What the run was trained on, as the card calls it.
    """
    copy_pretrained(best, folder)
    (Path(folder) / TASK_STATE).unlink(missing_ok=True)
    model = next(iter(stages.values())).model
    last = results[-1] if results else {}
    where = f"on the split '{last['split']}' ({last['images']} images)" if last else ''
    parts = [
        f'Trained by `train.py` of timm_dynamic {__version__} (timm {timm.__version__}, torch {torch.__version__}) '
        f'with the recipe `{recipe}`. Options that differ from the defaults:',
        _options(stages, defaults),
    ]
    if results:
        columns = list(dict.fromkeys(k for row in results for k in row))
        parts += [f'What the run compared, {where}:',
                  markdown_table(columns, [[row.get(c) for c in columns] for row in results])]
    describe(folder, Entry(
        repo_id.partition('/')[2],
        description=f'`{_shown(model)}`, trained on {dataset}.',
        dataset=dataset,
        recipe='\n\n'.join(parts),
        limits=f'Judged {where or "on no images"}. It knows the classes of its training data and no other.',
        licence_note='Data, and weights that training started from, have licences of their own.',
        metrics={k: float(last[k]) for k in ('top1', 'top5') if k in last},
    ), repo_id)


def _options(stages: Mapping[str, argparse.Namespace], defaults: Mapping[str, Any]) -> str:
    names = dict.fromkeys(
        k for args in stages.values() for k, v in vars(args).items()
        if k not in _PRIVATE and (k in ('model', 'epochs', 'seed') or v != defaults.get(k)))
    return markdown_table(('option', *stages), [
        (name, *(_shown(getattr(args, name)) for args in stages.values())) for name in sorted(names)])


def _shown(value: Any) -> str:
    """Paths without their folders: they are of one machine."""
    if isinstance(value, (list, tuple)):
        return ' '.join(map(_shown, value))
    if isinstance(value, Mapping):
        return ' '.join(f'{k}={_shown(v)}' for k, v in value.items())
    text = str(value)
    prefix = 'local-dir:' if text.startswith('local-dir:') else ''
    path = Path(text.removeprefix(prefix))
    return f'{prefix}{path.name}' if prefix or path.is_absolute() or ('/' in text and path.exists()) else text
