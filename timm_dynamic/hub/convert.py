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

from ..layers.confidence_net import read_confidence_net
from ..models.builder import BUNDLED
from ..models.dynamic_net import DynamicNet
from ..utils import (
    CheckpointError,
    copy_pretrained,
    read_checkpoint,
    read_json,
    save_pretrained,
    sha256_of,
    write_json,
)
from ..utils.export import CONFIG, WEIGHTS
from ..utils.files import partial_name
from .card import anytime_of, write_card
from .catalog import Entry
from .check import check_in_fresh_process, fixed_logits

_SUFFIXES = r'\.(pth|pt|tar|th|bin|safetensors|zip)$'

Source = str | Path | Mapping[str, str | Path]


def convert(source: Source, entry: Entry, folder: str | Path, verify: bool = True) -> dict[str, Any]:
    """Convert authors' files into a folder with model.safetensors, config.json, and a card.

    The files come in as they do for users, see `build_dynamic_model`. Every tensor in them must be in the model, or be
    known to be of no use for inference.

    Args:
        source: A file; a folder or a mapping from part to file where a model is made of several.
        entry: Of the catalog.
        folder: Made if needed.
        verify: Load the folder in a fresh process and compare logits.

    Returns:
        'kept', the number of the files' tensors that are in the model; 'dropped', the names of the others by reason;
        'elsewhere', the number of tensors in the model that are not in the files (members of a cascade); 'difference',
        the largest between logits, if verified.

    Raises:
        CheckpointError: A file cannot be read or does not fit; a tensor is unaccounted for; or the folder does not give
            the logits of the source.
    """
    folder = Path(folder)
    files = _files_of(source)
    given = {k: Path(v) for k, v in source.items()} if isinstance(source, Mapping) else Path(source)
    model: Any = timm.create_model(entry.name, pretrained=True, pretrained_cfg_overlay=dict(file=given)).eval()
    weights = model.state_dict()
    if entry.parts:  # members that are given here come from their own repositories
        weights = {k: v for k, v in weights.items() if k.startswith(entry.parts)}
        files = {part: path for part, path in files.items() if not part or part in entry.parts}
    report = account(dict(_tensors(files)), weights, entry)
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
    """Add to an exported folder what publishing needs beside the weights: costs, metrics, their hash, and a card.

    Args:
        folder: With model.safetensors and config.json.
        entry: Says what the card says.
        repo_id: 'ORG/NAME', for what is in no catalog. Default: the entry's.
        model: The model, if the folder holds only a part of it. Default: what the folder holds.
    """
    folder = Path(folder)
    if model is None:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    config = {**read_json(folder / CONFIG), 'metrics': _metrics_of(model, entry),
              'weights_sha256': sha256_of(folder / WEIGHTS), 'entry': repo_id or entry.name}
    if isinstance(model, DynamicNet):
        config['step_macs'] = list(model.step_macs)
    cfg = config.setdefault('pretrained_cfg', {})
    cfg.update({k: v for k, v in {'license': entry.licence, 'origin_url': entry.repository}.items() if v})
    write_json(folder / CONFIG, config)
    write_card(folder, entry, repo_id)


def stage_bundled(entry: Entry, folder: str | Path) -> Path:
    """Make a folder that can be published of weights that come with the package. Returns its path."""
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
        judged = budget.get('evaluated', {})
        if judged.get('exit_shares', [0])[-1] == 1:  # the whole model, with nothing stopped early
            metrics.update({k: judged[k] for k in ('top1', 'top5') if k in judged and k not in metrics})
    return metrics


def _add_budgets(model: DynamicNet, entry: Entry) -> None:
    """Keep published thresholds with what they cost here."""
    budgets = []
    for point in entry.budgets:
        shares = [count / sum(point['exits']) for count in point['exits']]
        gmacs = sum(share * macs for share, macs in zip(shares, model.step_macs)) / 1e9
        budgets.append({'gmacs': gmacs, 'top1': point['top1'], 'exit_shares': shares, 'policy': point['thresholds']})
    if budgets:
        model.store_budgets(budgets)


def account(
        tensors: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        entry: Entry,
) -> dict[str, Any]:
    """Find every tensor of a source in a model, by content: bit for bit, each as often as it is there.

    Args:
        tensors: Of the source, by path.
        weights: Of the model, or those of its parts that are published.
        entry: Says what may be dropped.

    Returns:
        See `convert`.

    Raises:
        CheckpointError: A tensor is neither in the model nor known to be of no use.
    """
    have = Counter(_digest(v) for v in weights.values())
    reasons = {
        key: next((why for pattern, why in entry.dropped.items() if re.fullmatch(pattern, key)), None)
        for key in tensors}
    dropped: dict[str, list[str]] = {}
    lost = []
    for key in sorted(tensors, key=lambda k: reasons[k] is not None):  # what must be there first
        digest, reason = _digest(tensors[key]), reasons[key]
        if have[digest]:
            have[digest] -= 1
        elif reason:
            dropped.setdefault(reason, []).append(key)
        else:
            lost.append(key)
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors of the source are neither in {entry.name} nor known to be of no use for inference "
            f"(first: {', '.join(lost[:3])}).")
    count = sum(map(len, dropped.values()))
    return {'kept': len(tensors) - count, 'dropped': dropped, 'elsewhere': sum(have.values())}


def _digest(value: torch.Tensor) -> tuple[Any, ...]:
    data = value.detach().cpu().contiguous()
    return data.dtype, tuple(data.shape), hashlib.sha256(data.flatten().view(torch.uint8).numpy().tobytes()).digest()


def _files_of(source: Source) -> dict[str, Path]:
    """Files of a source by part: by their names, where a folder holds several; '' where there is but one."""
    if isinstance(source, Mapping):
        return {part: Path(path) for part, path in source.items()}
    path = Path(source)
    files = [p for p in sorted(path.iterdir()) if re.search(_SUFFIXES, p.name)] if path.is_dir() else [path]
    return {p.name if len(files) > 1 else '': p for p in files}


def _tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in files, by part and path."""
    for part, path in files.items():
        try:
            content = read_checkpoint(path)
        except CheckpointError:
            content = read_confidence_net(path)  # a zip around a checkpoint
        for name, value in _walk(content):
            name = re.sub('^(state_dict|net)/', '', name)
            yield f'{part}/{name}' if part else name, value


def _walk(value: Any, path: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors anywhere in a checkpoint, by path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, f'{path}/{key}' if path else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for i, inner in enumerate(value):
            yield from _walk(inner, f'{path}/{i}' if path else str(i))
