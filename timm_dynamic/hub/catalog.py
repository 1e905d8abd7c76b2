"""The models published on the Hub: one entry per model and tag, with its origin, licence, results and paper."""
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..models.builder import hub_id

CATALOG = Path(__file__).parent / 'catalog.json'


@dataclass(frozen=True)
class Entry:
    """What a model card needs beyond config.json.

    Attributes:
        name: MODEL.TAG, as registered with timm. It is also the repository's name within the organisation.
        title: Name of the family.
        licence: Identifier as the Hub writes it, e.g. 'apache-2.0'. None if the authors state no licence: publication
            then needs their permission.
        dropped: Tensors in the authors' files that the model does not use: the reason by regular expression. The
            expression matches the path to the tensor, joined by '/'.
        parts: Prefixes of the weights to publish; empty for all. Only the confidence net of a cascade is published.
        steps: Published top-1 (%) after every step.
        budgets: Published thresholds, each with 'top1' (%) and 'exits', the number of images that stopped at each step.
        published: Other published operating points. They are only shown on the card.
    """
    name: str
    title: str = ''
    family: str = ''
    description: str = ''
    backbone: str = ''
    licence: str | None = None
    licence_note: str = ''
    repository: str | None = None
    files: tuple[dict[str, Any], ...] = ()
    dataset: str | None = None
    paper: dict[str, str] | None = None
    citation: str | None = None
    recipe: str = ''
    limits: str = ''
    metrics: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] | None = None
    steps: tuple[float, ...] = ()
    budgets: tuple[dict[str, Any], ...] = ()
    published: tuple[dict[str, float], ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    @property
    def hub_id(self) -> str:
        """Full id of the repository. TIMM_DYNAMIC_HUB_ORG changes the organisation."""
        return hub_id(self.name)


def read_catalog(path: str | Path = CATALOG) -> dict[str, Entry]:
    """Read a catalog. An entry inherits the fields of its family.

    Args:
        path: A JSON file with 'families' and 'models'.

    Returns:
        Entries by name.

    Raises:
        ValueError: A name appears twice, or a family or field is unknown.
    """
    content = json.loads(Path(path).read_text(encoding='utf-8'))
    known = {f.name for f in fields(Entry)}
    out: dict[str, Entry] = {}
    for model in content['models']:
        name, family = model['name'], content['families'].get(model['family'])
        if family is None:
            expected = ', '.join(content['families'])
            raise ValueError(f"{path}: {name} has the unknown family '{model['family']}', expected {expected}.")
        if name in out:
            raise ValueError(f'{path}: {name} appears twice.')
        merged: dict[str, Any] = {**family, **model}
        if merged.keys() - known:
            raise ValueError(f"{path}: {name} has unknown fields: {', '.join(sorted(merged.keys() - known))}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
        out[name] = Entry(**values)
    return out


def find_entry(catalog: Mapping[str, Entry], model: str) -> Entry:
    """Find an entry by its name, or by the name of a model with only one entry.

    Raises:
        ValueError: No entry or several entries match.
    """
    found = [catalog[model]] if model in catalog else [e for n, e in catalog.items() if n.split('.')[0] == model]
    if len(found) != 1:
        names = ', '.join(e.name for e in found) or ', '.join(catalog)
        raise ValueError(f"Expected the name of one model in the catalog, got '{model}'. Available: {names}.")
    return found[0]
