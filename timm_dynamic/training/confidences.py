"""Which confidence and which final rule suit a cascade: compared on what its members say, out of fold where asked."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import natural_key

from ..data import ConfidenceFeatures, FoldMap
from ..exits import ExitTable, cascade_table
from ..exits.collect import interleave, rank_of
from ..exits.measures import auroc, cross_area, curve_area
from ..layers import ConfidenceNet
from ..models.clcnet import CONFIDENCES, FINAL_RULES, CLCNet
from ..task import score_folds

FOLDS_FILE = 'folds.csv'
_NETS = ('.safetensors', '.zip', '.pt', '.pth')


# Nets that have not seen all images

@dataclass
class FoldNets:
    """Confidence nets of a cross-validation.

    Attributes:
        nets: For each fold one that was trained without it.
        folds: Which images are in which fold; None if nobody says: then every image is scored by all nets.
    """
    nets: list[ConfidenceNet]
    folds: FoldMap | None = None

    @classmethod
    def read(cls, nets: Sequence[str], folds: str | None = None) -> 'FoldNets':
        """Read nets, and which images they have not seen.

        Args:
            nets: Files, in the order of the folds; or a folder of them, taken in natural order of their names.
            folds: See `FoldMap.read`; by default that which lies beside the nets in their folder.

        Raises:
            CheckpointError: A file holds no confidence net.
            ValueError: There are no nets, or not as many as folds.
        """
        paths = [Path(path) for path in nets]
        if len(paths) == 1 and paths[0].is_dir():
            folder = paths[0]
            paths = sorted((p for p in folder.iterdir() if p.suffix in _NETS), key=lambda p: natural_key(p.name))
            if folds is None and (folder / FOLDS_FILE).is_file():
                folds = str(folder / FOLDS_FILE)
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"--fold-nets: there is no file or folder '{missing[0]}'.")
        if len(paths) < 2:
            raise ValueError(f'--fold-nets: expected a net for each fold, found {len(paths)} in {" ".join(nets)}.')
        known = FoldMap.read(folds) if folds else None
        if known is not None and known.num_folds != len(paths):
            raise ValueError(f"--fold-nets: {len(paths)} nets were given, but '{folds}' has {known.num_folds} folds.")
        return cls([ConfidenceNet.from_pretrained(path) for path in paths], known)

    def folds_of(self, names: Sequence[str], some: bool = False) -> torch.Tensor:
        """Fold of each image [N] int64; -1 where no net has seen it, or nobody says.

        Args:
            names: File names.
            some: Some must be in a fold.

        Raises:
            ValueError: An image is in several folds, or none in any though some must be.
        """
        if self.folds is None:
            return torch.full((len(names),), -1)
        folds = self.folds.folds_of(names)
        if some and (folds < 0).all():
            raise ValueError(f"None of the {len(names)} images is in a fold: '{names[0]}' is not, for one.")
        return folds

    def note(self, folds: torch.Tensor) -> str:
        """What has to be said of scores of images in such folds."""
        if self.folds is None:
            return ('Not cross-validated: nobody says which images the confidence nets have seen (--fold-dir), so all '
                    f'{len(self.nets)} score every image, and their mean counts.')
        outside = int((folds < 0).sum())
        text = 'Cross-validated: each image is scored by the confidence net that has not seen it'
        return f'{text}; {outside} images are in no fold, theirs is the mean of all nets.' if outside else f'{text}.'


def image_names(dataset: Any, split: str) -> list[str]:
    """File names of all images of a dataset, or numbers where it has none."""
    if hasattr(dataset, 'filenames') and None not in (names := dataset.filenames()):
        return list(names)
    return [f'{split}/{i:06d}' for i in range(len(dataset))]


# What the members say

class MemberRecorder:
    """Notes what the members of a cascade say while it is evaluated, and to what targets.

    Args:
        model: The cascade.
        limit: Number of this process's images that count; the rest is padding.
        accelerator: Processes.
    """

    def __init__(self, model: CLCNet, limit: int | None, accelerator: Accelerator) -> None:
        self.model, self.limit, self.accelerator = model, limit, accelerator
        self._said: list[torch.Tensor] = []
        self._batches: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        self._handles = [net.register_forward_hook(lambda _, __, out: self._said.append(out.float().cpu()))
                         for net in model.members]

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take in the targets of the batch just seen, see `evaluate_dynamic`."""
        self._batches.append(torch.stack(self._said, dim=1))
        self._targets.append(target.cpu())
        self._said = []

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of all members [N, T, C] and targets [N], over all processes, in the order of the dataset."""
        for handle in self._handles:
            handle.remove()
        logits, target = (torch.cat(values)[:self.limit] for values in (self._batches, self._targets))
        if self.accelerator.num_processes > 1:
            join = torch.cat if self.limit is None else interleave
            logits, target = (join(shares) for shares in zip(*gather_object([(logits, target)])))
        return logits, target


class Replayed(NamedTuple):
    """What a cascade with some confidence and final rule does."""
    table: ExitTable
    answers: torch.Tensor  # class after each member [N, T]


@torch.no_grad()
def replay_members(
        model: CLCNet,
        logits: torch.Tensor,
        target: torch.Tensor,
        fold_nets: FoldNets | None = None,
        folds: torch.Tensor | None = None,
        kinds: Sequence[str] = CONFIDENCES,
) -> dict[tuple[str, str], Replayed]:
    """What a cascade does with every confidence that it can have, and both final rules.

    Args:
        model: The cascade.
        logits: Of its members [N, T, C].
        target: [N] int64.
        fold_nets: Confidence nets that score in place of the model's own.
        folds: Of each image, see `FoldNets.folds_of` [N] int64.
        kinds: Confidences that are asked for.

    Returns:
        By confidence and final rule.
    """
    device = next(model.parameters()).device
    kinds = [kind for kind in kinds if kind != 'clcnet' or hasattr(model, 'confidence_net')]
    found: dict[tuple[str, str], list[Any]] = {(kind, rule): [] for kind in kinds for rule in FINAL_RULES}
    step_macs = {kind: model.step_macs_of(kind) for kind in kinds}
    for i, (part, truth) in enumerate(zip(logits.split(1024), target.to(device).split(1024))):
        scores = None
        if fold_nets is not None and folds is not None:
            flat = part.float().softmax(dim=2).sort(dim=2, descending=True).values.flatten(0, 1)
            of = folds[1024 * i:1024 * i + len(part)].repeat_interleave(part.shape[1])
            scores = score_folds(fold_nets.nets, flat, of).unflatten(0, part.shape[:2]).T.to(device)
        said = part.to(device).transpose(0, 1)
        for (kind, rule), parts in found.items():
            done = model.replay(said, kind, rule, scores if kind == 'clcnet' else None)
            rank = torch.stack([rank_of(step, truth) for step in done.logits], dim=1)
            parts.append((done.confidence.T, rank < 1, rank < 5, done.logits.argmax(dim=2).T))
    out = {}
    for key, parts in found.items():
        confidence, correct, top5, answers = (torch.cat(values).cpu() for values in zip(*parts))
        out[key] = Replayed(ExitTable(confidence, correct, step_macs[key[0]], top5), answers)
    return out


def compare_confidences(
        fit: Mapping[tuple[str, str], ExitTable],
        judge: Mapping[tuple[str, str], ExitTable],
) -> list[dict[str, Any]]:
    """Compare confidences and final rules, with exits fitted on other images.

    Args:
        fit: Tables of images to fit on, see `replay_members`.
        judge: Of images to judge on.

    Returns:
        A row for each: 'confidence', 'final_rule', 'auroc' (of the first member's answer being right), 'area' (mean
        top-1 over all budgets), 'top1' (of all members), and 'fit_area': the area on the images to fit on alone, one
        half of them judged with what was fitted on the other. By that one is chosen.
    """
    return [{
        'confidence': kind, 'final_rule': rule,
        'auroc': round(auroc(table.confidence[:, 0], table.correct[:, 0]), 4),
        'area': round(curve_area(fit[kind, rule], table), 4), 'top1': round(table.anytime()[-1].top1, 4),
        'fit_area': round(cross_area(fit[kind, rule]), 4),
    } for (kind, rule), table in judge.items()]


def tables_out_of_fold(
        model: CLCNet,
        features: Sequence[ConfidenceFeatures],
        scores: torch.Tensor,
) -> dict[tuple[str, str], ExitTable]:
    """Exit tables of a cascade with every confidence that features tell, and both final rules.

    Args:
        model: The cascade.
        features: Of each member, of the same images in the same order.
        scores: Of the confidence net, out of fold [T, N].

    Returns:
        By confidence and final rule.
    """
    correct, tables = torch.stack([f.correct for f in features]), {}
    for kind in ('max_prob', 'margin', 'entropy', 'clcnet'):
        confidence = scores
        if kind != 'clcnet':
            confidence = torch.stack([model.measure(f.probabilities, kind) for f in features])
        step_macs = model.step_macs_of(kind)
        tables.update({(kind, rule): cascade_table(confidence, correct, step_macs, rule) for rule in FINAL_RULES})
    return tables


def compare_out_of_fold(tables: Mapping[tuple[str, str], ExitTable]) -> list[dict[str, Any]]:
    """Compare measures of confidence and final rules on the members' features.

    Args:
        tables: See `tables_out_of_fold`.

    Returns:
        A row for each: 'confidence', 'final_rule', 'auroc' (of the first member's answer being right), and 'area'.
    """
    return [{
        'confidence': kind, 'final_rule': rule,
        'auroc': round(auroc(table.confidence[:, 0], table.correct[:, 0]), 4), 'area': round(cross_area(table), 4),
    } for (kind, rule), table in tables.items()]


def advice(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say which measure is the best one, and whether the paper's choice is."""
    best = max(rows, key=lambda row: row['area'])
    text = f"Best by area: {best['confidence']} with the rule {best['final_rule']} ({best['area']:.2f})."
    for row in rows:
        if row is not best and (row['confidence'], row['final_rule']) == ('clcnet', 'most_confident'):
            text += f" The paper's choice, clcnet with most_confident, has {row['area']:.2f}."
    return text
