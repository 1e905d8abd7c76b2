"""What is published on the Hub: one entry per model and tag, with its origin, licence, numbers and paper."""
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..models.builder import hub_id


@dataclass(frozen=True)
class Entry:
    """What a card says of a model beside what its config.json says.

    Attributes:
        name: MODEL.TAG, as registered with timm; also the repository's name within the organisation.
        title: Of the family.
        licence: Identifier as the Hub writes it, e.g. 'apache-2.0'. None: the authors state none, which forbids
            publication without their permission.
        dropped: Regular expressions of tensors in the authors' files that the model does without, with the reason.
            A tensor's name is the path to it, joined by '/'.
        parts: Prefixes of the weights to publish, if not all: the confidence net of a cascade.
        steps: Published top-1 (%) after every step.
        budgets: Published thresholds with 'top1' (%) and 'exits', how many images stopped at each step.
        published: Other published operating points, only shown.
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
        """Full id of the repository, in the organisation that is set (TIMM_DYNAMIC_HUB_ORG)."""
        return hub_id(self.name)


def read_catalog(path: str | Path) -> dict[str, Entry]:
    """Read a catalog: what an entry does not say is said by its family.

    Args:
        path: A JSON file with 'families' and 'models'.

    Returns:
        Entries by name.

    Raises:
        ValueError: An entry is there twice, of no family, or says what entries cannot.
    """
    content = json.loads(Path(path).read_text(encoding='utf-8'))
    known = {f.name for f in fields(Entry)}
    out: dict[str, Entry] = {}
    for model in content['models']:
        name, family = model['name'], content['families'].get(model['family'])
        if family is None:
            raise ValueError(f"{path}: {name} is of the family '{model['family']}', which is not there.")
        if name in out:
            raise ValueError(f'{path}: {name} is there twice.')
        merged: dict[str, Any] = {**family, **model}
        if merged.keys() - known:
            raise ValueError(f"{path}: {name} has unknown entries: {', '.join(sorted(merged.keys() - known))}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
        out[name] = Entry(**values)
    return out


def find_entry(catalog: Mapping[str, Entry], model: str) -> Entry:
    """Find an entry by name, or by that of a model that has one entry only.

    Raises:
        ValueError: There is none, or several.
    """
    found = [catalog[model]] if model in catalog else [e for n, e in catalog.items() if n.split('.')[0] == model]
    if len(found) != 1:
        names = ', '.join(e.name for e in found) or ', '.join(catalog)
        raise ValueError(f"Expected one model of the catalog, got '{model}'. There are: {names}.")
    return found[0]
