"""Convert the authors' files into folders that can be published."""
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from ..models.builder import BUNDLED
from ..models.confidence_net import read_confidence_net
from ..models.dynamic_net import DynamicNet
from ..utils import (
    CheckpointError,
    copy_pretrained,
    read_checkpoint,
    save_pretrained,
    sha256_of,
    write_json,
)
from ..utils.export import CONFIG, WEIGHTS
from ..utils.files import partial_name
from .card import anytime_of, write_card
from .catalog import Entry
from .check import check_in_fresh_process, fixed_logits
from .config import read_config

_SUFFIXES = r'\.(pth|pt|tar|th|bin|safetensors|zip)$'

Source = str | Path | Mapping[str, str | Path]


def convert(source: Source, entry: Entry, folder: str | Path, verify: bool = True) -> dict[str, Any]:
    """Convert the authors' files into a folder with model.safetensors, config.json and a card.

    Files are read as they are for users, see `build_dynamic_model`. Every tensor in them must be in the model or be
    listed in `Entry.dropped`.

    Args:
        source: A file, a folder, or a mapping from part to file.
        entry: Entry of the model in the catalog.
        folder: Folder to write; created if needed.
        verify: Load the folder in a fresh process and compare logits.

    Returns:
        A report. 'kept': number of the files' tensors that are in the model. 'dropped': names of the others, by reason.
        'elsewhere': number of the model's tensors that are not in the files (members of a cascade). 'difference':
        largest difference between logits, if verified.

    Raises:
        CheckpointError: A file cannot be read or does not fit, a tensor is unknown, or the logits of the folder differ
            from those of the source.
    """
    folder = Path(folder)
    files = _files_of(source)
    given = {k: Path(v) for k, v in source.items()} if isinstance(source, Mapping) else Path(source)
    model: Any = timm.create_model(entry.name, pretrained=True, pretrained_cfg_overlay=dict(file=given)).eval()
    weights = model.state_dict()
    if entry.parts:  # the members of a cascade have repositories of their own
        weights = {k: v for k, v in weights.items() if k.startswith(entry.parts)}
        files = {part: path for part, path in files.items() if not part or part in entry.parts}
    report = match_tensors(dict(_tensors(files)), weights, entry)
    expected = fixed_logits(model)
    if isinstance(model, DynamicNet):
        _add_budgets(model, entry)
    conversion = {
        'files': [{'name': p.name, 'bytes': p.stat().st_size, 'sha256': sha256_of(p)} for p in files.values()],
        'dropped': report['dropped'],
    }
    unverified = folder.with_name(partial_name(folder.name))
    try:
        save_pretrained(model, unverified, state_dict=weights, conversion=conversion)
        describe(unverified, entry, model=model)
        if verify:
            report['difference'], = check_in_fresh_process({f'local-dir:{unverified}': expected}).values()
        folder.mkdir(parents=True, exist_ok=True)
        for file in unverified.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(unverified, ignore_errors=True)
    return report


def describe(folder: str | Path, entry: Entry, repo_id: str | None = None, model: Any = None) -> None:
    """Prepare an exported folder for publication: add costs, metrics and the weights' hash to config.json, and a card.

    Args:
        folder: Folder with model.safetensors and config.json.
        entry: What the card needs beyond config.json.
        repo_id: 'ORG/NAME' of a model that is in no catalog. Default: the entry's.
        model: The model, if the folder holds only some of its weights. Default: load it from the folder.
    """
    folder = Path(folder)
    if model is None:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    config = {**read_config(folder / CONFIG), 'metrics': _metrics_of(model, entry),
              'weights_sha256': sha256_of(folder / WEIGHTS), 'entry': repo_id or entry.name}
    if isinstance(model, DynamicNet):
        config['step_macs'] = list(model.step_macs)
    cfg = config.setdefault('pretrained_cfg', {})
    cfg.update({k: v for k, v in {'license': entry.licence, 'origin_url': entry.repository}.items() if v})
    write_json(folder / CONFIG, config)
    write_card(folder, entry, repo_id)


def stage_bundled(entry: Entry, folder: str | Path) -> Path:
    """Copy weights that come with the package to a folder that can be published. Returns its path."""
    folder = Path(folder)
    copy_pretrained(BUNDLED / entry.name, folder)
    describe(folder, entry)
    return folder


def _metrics_of(model: Any, entry: Entry) -> dict[str, float]:
    metrics = dict(entry.metrics)
    if not isinstance(model, DynamicNet):
        return metrics
    anytime = anytime_of(model.exit_cfg, entry)
    if anytime:
        metrics.setdefault('top1', anytime[-1])
    for budget in model.exit_cfg.get('budgets', ()):
        evaluated = budget.get('evaluated', {})
        if evaluated.get('exit_shares', [0])[-1] == 1:  # all images take all steps
            metrics.update({k: evaluated[k] for k in ('top1', 'top5') if k in evaluated and k not in metrics})
    return metrics


def _add_budgets(model: DynamicNet, entry: Entry) -> None:
    """Store the published thresholds as budgets, with their costs in this model."""
    budgets = []
    for point in entry.budgets:
        shares = [count / sum(point['exits']) for count in point['exits']]
        gmacs = sum(share * macs for share, macs in zip(shares, model.step_macs)) / 1e9
        budgets.append({'gmacs': gmacs, 'top1': point['top1'], 'exit_shares': shares, 'policy': point['thresholds']})
    if budgets:
        model.store_budgets(budgets)


def match_tensors(
        tensors: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        entry: Entry,
) -> dict[str, Any]:
    """Find every tensor of a source in a model, by content, bit for bit.

    A tensor of the model matches one tensor of the source: equal tensors must appear equally often.

    Args:
        tensors: Tensors of the source, by path.
        weights: Weights of the model, or of the parts of it that are published.
        entry: Lists tensors that may be dropped.

    Returns:
        'kept', 'dropped' and 'elsewhere', see `convert`.

    Raises:
        CheckpointError: A tensor is neither in the model nor in `Entry.dropped`.
    """
    have = Counter(_digest(v) for v in weights.values())
    reasons = {
        key: next((why for pattern, why in entry.dropped.items() if re.fullmatch(pattern, key)), None)
        for key in tensors}
    dropped: dict[str, list[str]] = {}
    lost = []
    for key in sorted(tensors, key=lambda k: reasons[k] is not None):  # tensors that may not be dropped match first
        digest, reason = _digest(tensors[key]), reasons[key]
        if have[digest]:
            have[digest] -= 1
        elif reason:
            dropped.setdefault(reason, []).append(key)
        else:
            lost.append(key)
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors of the source are neither in {entry.name} nor in the 'dropped' field of its catalog "
            f"entry (first: {', '.join(lost[:3])}).")
    count = sum(map(len, dropped.values()))
    return {'kept': len(tensors) - count, 'dropped': dropped, 'elsewhere': sum(have.values())}


def _digest(value: torch.Tensor) -> tuple[Any, ...]:
    data = value.detach().cpu().contiguous()
    return data.dtype, tuple(data.shape), hashlib.sha256(data.flatten().view(torch.uint8).numpy().tobytes()).digest()


def _files_of(source: Source) -> dict[str, Path]:
    """Files of a source by part. In a folder with several files, parts are file names. A single file is the part ''."""
    if isinstance(source, Mapping):
        return {part: Path(path) for part, path in source.items()}
    path = Path(source)
    files = [p for p in sorted(path.iterdir()) if re.search(_SUFFIXES, p.name)] if path.is_dir() else [path]
    return {p.name if len(files) > 1 else '': p for p in files}


def _tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in files, with their part and path."""
    for part, path in files.items():
        try:
            content = read_checkpoint(path)
        except CheckpointError:
            content = read_confidence_net(path)  # a zip archive with a checkpoint inside
        for name, value in _walk(content):
            name = re.sub('^(state_dict|net)/', '', name)
            yield f'{part}/{name}' if part else name, value


def _walk(value: Any, path: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors anywhere in a checkpoint, with their paths."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, f'{path}/{key}' if path else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for i, inner in enumerate(value):
            yield from _walk(inner, f'{path}/{i}' if path else str(i))
