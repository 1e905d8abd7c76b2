"""Model cards: what the Hub shows of a folder, made of its config.json and its entry in the catalog."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..models.builder import DEFAULT_HUB_ORG
from ..utils import atomic_write
from ..utils.export import CONFIG
from .catalog import Entry

CARD = 'README.md'
PICTURE = 'curve.png'
_DATASETS = {'imagenet-1k': 'ImageNet-1k'}
_MAX_ROWS = 12  # of budgets: more are in config.json


def write_card(folder: str | Path, entry: Entry, repo_id: str | None = None) -> str:
    """Write README.md and, where matplotlib is installed and there is something to draw, the picture of the curve.

    Args:
        folder: With config.json.
        entry: What config.json does not say.
        repo_id: Repository that the card is for. Default: the entry's.

    Returns:
        The text.
    """
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    picture = _draw(folder / PICTURE, config, entry)
    text = render_card(config, entry, repo_id, picture=picture)
    with atomic_write(folder / CARD) as tmp:
        tmp.write_text(text, encoding='utf-8')
    return text


def render_card(config: Mapping[str, Any], entry: Entry, repo_id: str | None = None, picture: bool = False) -> str:
    """Text of a card.

    Args:
        config: Content of config.json.
        entry: What config.json does not say.
        repo_id: Repository that the card is for. Default: the entry's.
        picture: Whether there is a picture of the curve.
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
    dataset = entry.dataset
    names = {'top1': ('accuracy', 'top-1'), 'top5': ('accuracy', 'top-5')}
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=dataset or 'unknown',
            dataset_name=_DATASETS.get(dataset or '', dataset or 'unknown'), metric_type=names[key][0],
            metric_name=names[key][1], metric_value=value)
        for key, value in config.get('metrics', {}).items() if key in names
    ]
    judged: dict[str, Any] = dict(model_name=entry.name, eval_results=results) if results else {}
    return ModelCardData(
        license=entry.licence or 'unknown', library_name='timm', pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_dynamic', *(['early-exit'] if 'step_macs' in config else [])],
        datasets=[dataset] if dataset in _DATASETS else None,  # the Hub's own names only
        **judged)


def _facts(config: Mapping[str, Any], entry: Entry) -> str:
    cfg, macs = config.get('pretrained_cfg', {}), config.get('step_macs')
    facts = [f'* Model: `{config["architecture"]}`' + (f', over {entry.backbone}' if entry.backbone else '')]
    if cfg.get('input_size'):
        facts.append(f'* Images: {" x ".join(map(str, cfg["input_size"]))}, {config["num_classes"]} classes')
    if macs:
        facts.append(f'* Steps: {len(macs)}; GMACs to stop after each: {_numbers([m / 1e9 for m in macs])}')
    if entry.paper:
        facts.append(f'* Paper: [{entry.paper["title"]}]({entry.paper["url"]})')
    if entry.repository:
        facts.append(f"* Authors' code: {entry.repository}")
    return '\n'.join(facts)


def _usage(config: Mapping[str, Any], entry: Entry, repo_id: str) -> str:
    # By name where the name leads here for everybody.
    name = entry.name if repo_id == f'{DEFAULT_HUB_ORG}/{entry.name}' else f'hf-hub:{repo_id}'
    text = f"""\
```python
import timm, timm_dynamic  # registers the models
import torch
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)

x = transform(Image.new('RGB', (400, 300))).unsqueeze(0)  # put an image of yours here
with torch.inference_mode():
    probabilities, classes = model(x).softmax(dim=1).topk(5)
```"""
    if 'step_macs' not in config:
        return text
    budgets = config.get('model_args', {}).get('exit_cfg', {}).get('budgets')
    text += """

One prediction a step, each computed when it is asked for:

```python
with torch.inference_mode():
    for logits, macs in zip(model.forward_steps(x), model.step_macs):
        print(f'{macs / 1e9:.3f} GMACs: class {logits.argmax(dim=1).item()}')
```"""
    if budgets:
        text += f"""

Early exit within a budget, in 10⁹ multiply-adds per image on average:

```python
model.set_budget(gmacs={_budget_to_show(config, budgets):.4g})
with torch.inference_mode():
    logits = model(x)
```"""
    return text


def _budget_to_show(config: Mapping[str, Any], budgets: Sequence[Mapping[str, Any]]) -> float:
    """The middle one, rounded up to what is written, and within the model's range."""
    gmacs = budgets[len(budgets) // 2]['gmacs']
    text = float(f'{gmacs:.4g}')
    text = text if text >= gmacs else float(f'{gmacs * 1.0005:.4g}')
    return min(max(text, config['step_macs'][0] / 1e9 * 1.001), config['step_macs'][-1] / 1e9 * 0.999)


def _results(config: Mapping[str, Any], entry: Entry, picture: bool) -> list[str]:
    parts = []
    metrics = config.get('metrics', {})
    on = f' on {_DATASETS.get(entry.dataset or "", entry.dataset)}' if entry.dataset else ''
    source = 'as published' if entry.paper else 'as measured'
    if 'top5' in metrics or entry.baseline:
        rows = [('this model', metrics), *([('its frozen baseline', entry.baseline)] if entry.baseline else [])]
        parts.append(f'Accuracy (%){on}, {source}:')
        parts.append(table(('', 'top-1', 'top-5'), [(n, m.get('top1'), m.get('top5')) for n, m in rows]))
    steps = steps_of(config, entry)
    if steps:
        parts.append(f'All images stopped after the same step{on}, {source}:')
        parts.append(table(('step', 'GMACs', 'top-1 (%)'), [
            (t + 1, gmacs, top1) for t, (gmacs, top1) in enumerate(steps)]))
    budgets = budgets_of(config)
    if budgets:
        shown = budgets if len(budgets) <= _MAX_ROWS else [
            budgets[round(i * (len(budgets) - 1) / (_MAX_ROWS - 1))] for i in range(_MAX_ROWS)]
        more = f' ({len(shown)} of {len(budgets)}; `config.json` has all)' if len(shown) < len(budgets) else ''
        fitted, judged = budgets[0].get('fitted_on'), budgets[0].get('split')
        how = f'fitted on {fitted}, judged on {judged}' if fitted else source
        parts.append(f'Budgets that come with the model{more}{on}, {how}:')
        shares = any(b.get('exit_shares') for b in shown)
        parts.append(table(
            ('GMACs', 'top-1 (%)', *(['exits after step 1, 2, ... (%)'] if shares else [])),
            [(b['gmacs'], b.get('top1'),
              *([_numbers([100 * s for s in b.get('exit_shares') or ()], 3)] if shares else [])) for b in shown]))
    if entry.published:
        parts.append(f'Operating points{on}, as published:')
        parts.append(table(
            ('GMACs', 'threshold', 'top-1 (%)'), [(p['gmacs'], p['threshold'], p['top1']) for p in entry.published]))
    if picture:
        parts.append(f'![Top-1 accuracy over multiply-adds]({PICTURE})')
    return ['## Results', *parts] if parts else []


def steps_of(config: Mapping[str, Any], entry: Entry) -> list[tuple[float, float]]:
    """(GMACs, top-1 in %) of stopping all images after step 1, 2, ..., if it is known."""
    top1 = anytime_of(config.get('model_args', {}).get('exit_cfg', {}), entry)
    macs = config.get('step_macs') or ()
    return [(m / 1e9, v) for m, v in zip(macs, top1)] if len(top1) == len(macs) else []


def anytime_of(exit_cfg: Mapping[str, Any], entry: Entry) -> list[float]:
    """Top-1 (%) after every step, as published; empty if it was not."""
    top1 = [float(v) for v in exit_cfg.get('origin', {}).get('anytime_classification') or entry.steps]
    return [100 * v for v in top1] if top1 and max(top1) <= 1 else top1


def budgets_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Budgets kept in a config.json: cost and accuracy are those judged, where they were."""
    kept = config.get('model_args', {}).get('exit_cfg', {}).get('budgets', [])
    return [{**b, **b.get('evaluated', {})} for b in kept]


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
        lines += ['', 'Tensors that inference does without are left out:', '']
        lines += [f'* {why}: {len(keys)}' for why, keys in made['dropped'].items()]
    return '\n'.join(lines)


def _draw(path: Path, config: Mapping[str, Any], entry: Entry) -> bool:
    from ..utils.report import plot_accuracy_over_macs  # what draws everywhere else

    curves = {}
    steps, budgets = steps_of(config, entry), [b for b in budgets_of(config) if b.get('top1') is not None]
    if len(steps) > 1:
        curves['stopped after the same step'] = steps
    if len(budgets) > 1:
        curves['early exit within a budget'] = sorted((b['gmacs'], b['top1']) for b in budgets)
    if len(entry.published) > 1:
        curves['as published'] = sorted((p['gmacs'], p['top1']) for p in entry.published)
    drawn = bool(curves) and plot_accuracy_over_macs(path, curves, title=entry.name)
    if not drawn:
        path.unlink(missing_ok=True)
    return drawn


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [head, ['---'] * len(head), *[[_cell(v) for v in row] for row in rows]]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cell(value: Any) -> str:
    return '' if value is None else f'{value:.5g}' if isinstance(value, float) else str(value)


def _numbers(values: Sequence[float], digits: int = 4) -> str:
    return ', '.join(f'{v:.{digits}g}' for v in values)
