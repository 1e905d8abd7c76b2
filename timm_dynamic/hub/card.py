"""Model cards for the Hub, written from a folder's config.json and the model's entry in the catalog."""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.clock import describe_clock
from ..models.builder import DEFAULT_HUB_ORG
from ..utils import atomic_write
from ..utils.export import CONFIG
from ..utils.report import plot_accuracy_over_macs
from .catalog import Entry
from .config import read_config

CARD = 'README.md'
PICTURE = 'curve.png'
_DATASETS = {'imagenet-1k': 'ImageNet-1k'}
_METRICS = {'top1': 'top-1', 'top5': 'top-5'}
_MAX_ROWS = 12  # of the table of budgets; config.json has all

_LOAD = """\
```python
import timm, timm_dynamic  # registers the models
import torch
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)

x = transform(Image.new('RGB', (400, 300))).unsqueeze(0)  # your image
with torch.inference_mode():
    probabilities, classes = model(x).softmax(dim=1).topk(5)
```"""
_STEPS = """

One prediction per step, computed on demand:

```python
with torch.inference_mode():
    for logits, macs in zip(model.forward_steps(x), model.step_macs):
        print(f'{macs / 1e9:.3f} GMACs: class {logits.argmax(dim=1).item()}')
```"""
_BUDGET = """

Early exit with an average budget in GMACs (10⁹ multiply-adds per image):

```python
model.set_budget(gmacs={gmacs:.4g})
with torch.inference_mode():
    logits = model(x)
```"""


def write_card(folder: str | Path, entry: Entry, repo_id: str | None = None) -> None:
    """Write README.md and, if matplotlib is installed and there are curves, a plot of accuracy over multiply-adds.

    Args:
        folder: Folder with config.json.
        entry: What the card needs beyond config.json.
        repo_id: Repository of the card. Default: the entry's.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    curves = _curves_of(config, entry)
    picture = bool(curves) and plot_accuracy_over_macs(folder / PICTURE, curves, title=entry.name)
    if not picture:
        (folder / PICTURE).unlink(missing_ok=True)
    with atomic_write(folder / CARD) as tmp:
        tmp.write_text(render_card(config, entry, repo_id, picture=picture), encoding='utf-8')


def render_card(config: Mapping[str, Any], entry: Entry, repo_id: str | None = None, picture: bool = False) -> str:
    """Text of a card.

    Args:
        config: Content of config.json.
        entry: What the card needs beyond config.json.
        repo_id: Repository of the card. Default: the entry's.
        picture: Whether to show the plot.
    """
    repo_id = repo_id or entry.hub_id
    parts = [
        f'---\n{_metadata(config, entry).to_yaml().strip()}\n---',
        f'# {entry.name}',
        entry.description,
        _facts(config, entry),
        '## Usage',
        _usage(config, entry, repo_id),
        *_results(config, entry, picture),
        '## How it was made',
        entry.recipe,
        _conversion(config, entry),
        '## Limits',
        entry.limits,
        f'Licence: {entry.licence or "none stated"}. {entry.licence_note}'.strip(),
    ]
    if entry.citation:
        parts += ['## Citation', f'```bibtex\n{entry.citation}\n```']
    return '\n\n'.join(part for part in parts if part) + '\n'


def _metadata(config: Mapping[str, Any], entry: Entry) -> ModelCardData:
    dataset = entry.dataset or 'unknown'
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=dataset, dataset_name=_DATASETS.get(dataset, dataset),
            metric_type='accuracy', metric_name=_METRICS[key], metric_value=value)
        for key, value in config.get('metrics', {}).items() if key in _METRICS
    ]
    return ModelCardData(
        license=entry.licence or 'unknown', library_name='timm', pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_dynamic', *(['early-exit'] if 'step_macs' in config else [])],
        datasets=[dataset] if dataset in _DATASETS else None,  # only names that the Hub knows
        model_name=entry.name if results else None, eval_results=results or None)


def _facts(config: Mapping[str, Any], entry: Entry) -> str:
    cfg, macs = config.get('pretrained_cfg', {}), config.get('step_macs')
    facts = [f'* Model: `{config["architecture"]}`' + (f', over {entry.backbone}' if entry.backbone else '')]
    if cfg.get('input_size'):
        facts.append(f'* Images: {" x ".join(map(str, cfg["input_size"]))}, {config["num_classes"]} classes')
    if macs:
        facts.append(f'* Steps: {len(macs)}; cumulative GMACs: {_numbers([m / 1e9 for m in macs])}')
    if entry.paper:
        facts.append(f'* Paper: [{entry.paper["title"]}]({entry.paper["url"]})')
    if entry.repository:
        facts.append(f"* Authors' code: {entry.repository}")
    return '\n'.join(facts)


def _usage(config: Mapping[str, Any], entry: Entry, repo_id: str) -> str:
    # The model's name leads to this repository only if nobody has to set TIMM_DYNAMIC_HUB_ORG.
    name = entry.name if repo_id == f'{DEFAULT_HUB_ORG}/{entry.name}' else f'hf-hub:{repo_id}'
    text = _LOAD.format(name=name)
    if 'step_macs' in config:
        text += _STEPS
    budgets = _exit_cfg_of(config).get('budgets')
    if budgets:
        text += _BUDGET.format(gmacs=_budget_to_show(config, budgets))
    return text


def _budget_to_show(config: Mapping[str, Any], budgets: Sequence[Mapping[str, Any]]) -> float:
    """GMACs of the middle budget, rounded up to the printed digits and kept within the model's range."""
    gmacs = budgets[len(budgets) // 2]['gmacs']
    text = float(f'{gmacs:.4g}')
    text = text if text >= gmacs else float(f'{gmacs * 1.0005:.4g}')
    return min(max(text, config['step_macs'][0] / 1e9 * 1.001), config['step_macs'][-1] / 1e9 * 0.999)


def _results(config: Mapping[str, Any], entry: Entry, picture: bool) -> list[str]:
    parts: list[str] = []

    def add(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            parts.extend((f'{title}:', markdown_table(head, rows)))

    metrics, budgets = config.get('metrics', {}), _budgets_of(config)
    on = f' on {_DATASETS.get(entry.dataset, entry.dataset)}' if entry.dataset else ''
    source = 'as published' if entry.paper else 'as measured'
    if 'top5' in metrics or entry.baseline:
        models = {'this model': metrics, 'frozen baseline': entry.baseline}
        add(f'Accuracy (%){on}, {source}', ('', *_METRICS.values()), [
            (name, *map(m.get, _METRICS)) for name, m in models.items() if m])
    add(f'All images stop after the same step{on}, {source}', ('step', 'GMACs', 'top-1 (%)'), [
        (t + 1, gmacs, top1) for t, (gmacs, top1) in enumerate(_steps_of(config, entry))])
    if budgets:
        shown = budgets if len(budgets) <= _MAX_ROWS else [
            budgets[round(i * (len(budgets) - 1) / (_MAX_ROWS - 1))] for i in range(_MAX_ROWS)]
        more = f' ({len(shown)} of {len(budgets)} shown)' if len(shown) < len(budgets) else ''
        fitted_on, split = budgets[0].get('fitted_on'), budgets[0].get('split')
        how = f'fitted on {fitted_on}, evaluated on {split}' if fitted_on else source
        add(f'Budgets stored in `config.json`{more}{on}, {how}',
            ('GMACs', 'top-1 (%)', 'exits after step 1, 2, ... (%)'), [
                (b['gmacs'], b.get('top1'), _numbers([100 * s for s in b.get('exit_shares') or ()], 3) or None)
                for b in shown])
    clock = _exit_cfg_of(config).get('clock')
    if clock:
        add(describe_clock(clock), ('', 'images per second', 'ms of one image', 'GMACs', 'top-1 (%)'), [
            (row['clock'], row['images_per_s'], row['ms_single'], row.get('gmacs'), row.get('top1'))
            for row in clock['rows']])
    add(f'Operating points{on}, as published', ('GMACs', 'threshold', 'top-1 (%)'), [
        (p['gmacs'], p['threshold'], p['top1']) for p in entry.published])
    if picture:
        parts.append(f'![Top-1 accuracy over multiply-adds]({PICTURE})')
    return ['## Results', *parts] if parts else []


def anytime_of(exit_cfg: Mapping[str, Any], entry: Entry) -> list[float]:
    """Published top-1 (%) after every step; empty if it was not published."""
    top1 = [float(v) for v in exit_cfg.get('origin', {}).get('anytime_classification') or entry.steps]
    return [100 * v for v in top1] if top1 and max(top1) <= 1 else top1


def _exit_cfg_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get('model_args', {}).get('exit_cfg', {})


def _steps_of(config: Mapping[str, Any], entry: Entry) -> list[tuple[float, float]]:
    """(GMACs, top-1 in %) if all images stop after step 1, 2, ...; empty if unknown."""
    top1, macs = anytime_of(_exit_cfg_of(config), entry), config.get('step_macs') or ()
    return [(m / 1e9, v) for m, v in zip(macs, top1)] if len(top1) == len(macs) else []


def _budgets_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Budgets in config.json. Cost and accuracy come from the evaluation, if there was one."""
    return [{**b, **b.get('evaluated', {})} for b in _exit_cfg_of(config).get('budgets', [])]


def _curves_of(config: Mapping[str, Any], entry: Entry) -> dict[str, list[tuple[float, float]]]:
    """Curves of (GMACs, top-1 in %) with more than one point, by label."""
    curves = {
        'stopped after the same step': _steps_of(config, entry),
        'early exit within a budget': sorted(
            (b['gmacs'], b['top1']) for b in _budgets_of(config) if b.get('top1') is not None),
        'as published': sorted((p['gmacs'], p['top1']) for p in entry.published),
    }
    return {label: curve for label, curve in curves.items() if len(curve) > 1}


def _conversion(config: Mapping[str, Any], entry: Entry) -> str:
    made = config.get('conversion')
    if not made:
        return ''
    lines = [f'Converted from the authors\' {"file" if len(made["files"]) == 1 else "files"}:', '']
    links = {f.get('name'): f.get('links', []) for f in entry.files}
    for file in made['files']:
        found = links.get(file['name']) or (entry.files[0].get('links', []) if len(entry.files) == 1 else [])
        where = f' ([link]({found[0]}))' if found else ''
        lines.append(f'* `{file["name"]}`{where}, {file["bytes"]:,} bytes, SHA-256 `{file["sha256"]}`')
    if made['dropped']:
        lines += ['', 'Tensors that inference does not need are left out:', '']
        lines += [f'* {why}: {len(keys)}' for why, keys in made['dropped'].items()]
    return '\n'.join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, without columns that are None in all rows. Text in cells is escaped."""
    columns = [i for i in range(len(head)) if any(row[i] is not None for row in rows)]
    lines = [head, ['---'] * len(head), *([_cell(v) for v in row] for row in rows)]
    return '\n'.join(f'| {" | ".join(line[i] for i in columns)} |' for line in lines)


def escape(text: str) -> str:
    """Text as Markdown shows it literally, on one line and within a cell of a table."""
    text = ' '.join(text.split()).replace('\\', '\\\\').replace('&', '&amp;').replace('<', '&lt;')
    return re.sub(r'([|`\[\]*])', r'\\\1', text)


def _cell(value: Any) -> str:
    return '' if value is None else f'{value:.5g}' if isinstance(value, float) else escape(str(value))


def _numbers(values: Sequence[float], digits: int = 4) -> str:
    return ', '.join(f'{v:.{digits}g}' for v in values)
