"""Evaluate a cascade from its members' logits: they run once, then any confidence and final rule is replayed."""
import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import natural_key

from ..data import FoldMap
from ..data.image_names import image_names
from ..exits import ExitTable
from ..exits.collect import rank_of
from ..models import ConfidenceNet
from ..models.clcnet import CONFIDENCES, FINAL_RULES, CLCNet
from ..task import score_folds
from ..task.clcnet import FOLDS_FILE
from ..task.compare_confidences import Choice, compare_confidences, describe_best
from .calibration import Calibration
from .exit_report import Report, short_name

_logger = logging.getLogger(__name__)

_NETS = ('.safetensors', '.zip', '.pt', '.pth')
# Options that need the cascade's own answers, not those replayed from its members'.
_NOT_REPLAYED = (
    'calibrate_table', 'valid_labels', 'real_labels', 'metrics_avg', 'stored_results', 'stored_thresholds')


# Nets of a cross-validation

@dataclass
class FoldNets:
    """Confidence nets of a cross-validation.

    Attributes:
        nets: For each fold one that was trained without it.
        folds: Which images are in which fold; None if that is not known: then all nets score every image.
    """
    nets: list[ConfidenceNet]
    folds: FoldMap | None = None

    @classmethod
    def read(cls, nets: Sequence[str], folds: str | None = None) -> 'FoldNets':
        """Read nets, and which images they have not seen.

        Args:
            nets: Files, in the order of the folds; or a folder of them, in natural order of their names.
            folds: See `FoldMap.read`; by default the file in the nets' folder.

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
        """Fold of each image [N] int64; -1 if all nets were trained on it, or if its fold is not known.

        Args:
            names: File names.
            some: At least one image must be in a fold.

        Raises:
            ValueError: An image is in several folds, or none in any though some must be.
        """
        if self.folds is None:
            return torch.full((len(names),), -1)
        folds = self.folds.folds_of(names)
        if some and (folds < 0).all():
            raise ValueError(f"None of the {len(names)} images is in a fold, for instance '{names[0]}'.")
        return folds

    def note(self, folds: torch.Tensor) -> str:
        """How images in such folds are scored, in a sentence."""
        if self.folds is None:
            return ('Not cross-validated: without --fold-dir it is not known which images the confidence nets have '
                    f'seen. Every image is scored by all {len(self.nets)} nets, and their mean counts.')
        outside = int((folds < 0).sum())
        text = 'Cross-validated: each image is scored by the confidence net that has not seen it'
        return f'{text}; {outside} images are in no fold, their score is the mean of all nets.' if outside else \
            f'{text}.'


# Options

def check_cascade_options(args: argparse.Namespace, name: str, model: Any) -> None:
    """Raise a ValueError if options about cascades contradict each other, or the model is not a cascade."""
    if (args.confidence or args.final_rule or args.fold_nets) and not isinstance(model, CLCNet):
        raise ValueError(f"--confidence, --final-rule and --fold-nets are for cascades; '{name}' is not one.")
    asked = '--confidence all' if args.confidence == 'all' else '--fold-nets' if args.fold_nets else ''
    given_too = [f"--{name.replace('_', '-')}" for name in _NOT_REPLAYED if asked and getattr(args, name)]
    if given_too:
        raise ValueError(
            f"{asked} evaluates the members' answers and their labels: it cannot be combined with "
            f"{' and '.join(given_too)}.")
    if args.confidence == 'all' and args.final_rule:
        raise ValueError('--confidence all also chooses the final rule: leave out --final-rule.')
    if args.save_features and isinstance(model, CLCNet):
        raise ValueError(
            "--save-features writes the features of one classifier. Those of a cascade's members are written by "
            'train.py --stage features.')
    if not args.fold_nets:
        return
    if model.confidence_kind != 'clcnet' and args.confidence != 'all':
        raise ValueError(
            f"--fold-nets are confidence nets, the cascade's confidence is '{model.confidence_kind}': ask for "
            '--confidence clcnet or all.')
    if args.save_budgets:
        raise ValueError(
            "--fold-nets cannot be combined with --save-budgets: budgets kept in a model are for the model's own net. "
            'train.py solves them out of fold; or fit them on images that this net has not seen.')
    if args.calibrate_samples:
        raise ValueError('--fold-nets cannot be combined with --calibrate-samples, whose images have no known folds.')


# What the members say

def answering_members(table: ExitTable, steps: torch.Tensor, final_rule: str) -> torch.Tensor:
    """Number of the member whose prediction is the answer of a cascade [N] int64, from 1.

    Args:
        table: Exit table of the cascade.
        steps: Number of members that were run [N] int64.
        final_rule: Final rule. With 'most_confident', an answer is only replaced by one of higher confidence.
    """
    if final_rule == 'last':
        return steps
    final = table.confidence.gather(1, steps[:, None] - 1)
    return (table.confidence == final).int().argmax(dim=1) + 1


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
) -> dict[Choice, Replayed]:
    """What a cascade does with every confidence that it can have, and both final rules.

    Args:
        model: The cascade.
        logits: Of its members [N, T, C].
        target: [N] int64.
        fold_nets: Confidence nets that score instead of the model's own.
        folds: Fold of each image [N] int64, see `FoldNets.folds_of`.
        kinds: Confidences that are asked for.

    Returns:
        By confidence and final rule.
    """
    device = next(model.parameters()).device
    kinds = [kind for kind in kinds if kind != 'clcnet' or hasattr(model, 'confidence_net')]
    found: dict[Choice, list[Any]] = {(kind, rule): [] for kind in kinds for rule in FINAL_RULES}
    step_macs = {kind: model.step_macs_of(kind) for kind in kinds}
    for i, (part, truth) in enumerate(zip(logits.split(1024), target.to(device).split(1024))):
        scores = None
        if fold_nets is not None and folds is not None:
            flat = part.float().softmax(dim=2).sort(dim=2, descending=True).values.flatten(0, 1)
            part_folds = folds[1024 * i:1024 * i + len(part)].repeat_interleave(part.shape[1])
            scores = score_folds(fold_nets.nets, flat, part_folds).unflatten(0, part.shape[:2]).T.to(device)
        member_logits = part.to(device).transpose(0, 1)
        for (kind, rule), parts in found.items():
            done = model.replay(member_logits, kind, rule, scores if kind == 'clcnet' else None)
            rank = rank_of(done.logits, truth).T
            parts.append((done.confidence.T, rank < 1, rank < 5, done.logits.argmax(dim=2).T))
    out = {}
    for key, parts in found.items():
        confidence, correct, top5, answers = (torch.cat(values).cpu() for values in zip(*parts))
        out[key] = Replayed(ExitTable(confidence, correct, step_macs[key[0]], top5), answers)
    return out


class MemberAnswers(NamedTuple):
    """What the members of a cascade say of the images of a split."""
    split: str
    logits: torch.Tensor  # [N, T, C]
    target: torch.Tensor  # [N]
    folds: torch.Tensor | None  # [N]


class CascadeReplay:
    """Evaluates a cascade with the nets of a cross-validation, or with every confidence and final rule.

    Args:
        model: The cascade.
        fold_nets: Nets of a cross-validation.
        compare: Compare all confidences, and take the one that is best on the images to fit on.
    """

    def __init__(self, model: CLCNet, fold_nets: FoldNets | None, compare: bool) -> None:
        self.model, self.fold_nets, self.compare = model, fold_nets, compare
        self._folds: dict[str, torch.Tensor] = {}

    def predict(self, x: Any) -> dict[str, torch.Tensor]:
        """See `predict_steps`; 'member_logits' [T, B, C] are among the outputs."""
        return self.model.forward_all(x)

    def add_split(self, split: str, dataset: Any, some: bool = False) -> None:
        """Look up the folds of a split's images, before anything is run.

        Args:
            split: Name of the split.
            dataset: Its images.
            some: At least one image must be in a fold.

        Raises:
            ValueError: The dataset can only be iterated; or see `FoldNets.folds_of`.
        """
        if self.fold_nets is None:
            return
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise ValueError('--fold-nets needs images that can be counted; this dataset can only be iterated.')
        self._folds[split] = self.fold_nets.folds_of(image_names(dataset, split), some)

    def answers(self, split: str, logits: torch.Tensor, target: torch.Tensor) -> MemberAnswers:
        """Put together what was recorded of a split: member logits [N, T, C] and targets [N]."""
        return MemberAnswers(split, logits, target, self._folds.get(split))

    def finish(
            self,
            report: Report,
            name: str,
            evaluation: MemberAnswers,
            calibration: MemberAnswers | None,
            seed: int = 0,
    ) -> tuple[Replayed, Calibration | None]:
        """Replay the members' answers; with `compare`, choose the confidence and set it on the model.

        Args:
            report: Gets each member alone, and the comparison.
            name: Name of the model.
            evaluation: The members' logits for the images to evaluate on.
            calibration: Their logits for the images to fit on, if there are any.
            seed: Seed of the random halves, if exits are fitted on a half of the images.

        Returns:
            Table and answers of the cascade; and the tables to fit and evaluate budgets on, if they are known here.
        """
        evaluated = self._replay(name, evaluation)
        fitted = None if calibration is None else self._replay(name, calibration)
        self._report_members(report, name, evaluation)
        key = self.model.confidence_kind, self.model.final_rule
        tables = {k: replayed.table for k, replayed in evaluated.items()}
        if not self.compare and fitted is None:
            return evaluated[key], None
        if fitted is not None and calibration is not None:
            pairs = {k: Calibration.of_tables(fitted[k].table, table, calibration.split, evaluation.split)
                     for k, table in tables.items()}
        else:
            pairs = {k: Calibration.in_halves(table, evaluation.split, seed) for k, table in tables.items()}
        if self.compare:
            key = self._choose(report, name, pairs)
            self.model.set_confidence(*key)
        return evaluated[key], pairs[key]

    def _replay(self, name: str, answers: MemberAnswers) -> dict[Choice, Replayed]:
        if self.fold_nets is not None and answers.folds is not None:
            _logger.info(f'{short_name(name)} on {answers.split}: {self.fold_nets.note(answers.folds)}')
        kinds = CONFIDENCES if self.compare else (self.model.confidence_kind,)
        return replay_members(self.model, answers.logits, answers.target, self.fold_nets, answers.folds, kinds)

    def _report_members(self, report: Report, name: str, answers: MemberAnswers) -> None:
        model, macs = self.model, self.model.step_macs_of('max_prob')
        correct = (answers.logits.argmax(dim=2) == answers.target[:, None]).float().mean(dim=0)
        rows = [{
            'member': spec.label, 'img_size': size, 'gmacs': round((b - a) / 1e9, 6),
            'top1': round(100 * float(correct[t]), 4),
        } for t, (spec, size, a, b) in enumerate(zip(model.specs, model.view_sizes, (0, *macs), macs))]
        report.add(name, f'{short_name(name)} on {answers.split}, each member alone:', rows)

    def _choose(self, report: Report, name: str, pairs: Mapping[Choice, Calibration]) -> Choice:
        first = next(iter(pairs.values()))
        rows = compare_confidences(
            {k: p.calibration for k, p in pairs.items()}, {k: p.evaluation for k, p in pairs.items()})
        best = max(rows, key=lambda row: row['calibration_area'])
        report.add(
            name, f'{short_name(name)}, confidences (fitted on {first.fitted_on}, evaluated on {first.evaluated_on}; '
            f'area: mean top-1 over all budgets):\n{describe_best(rows)} Used, as the best on {first.fitted_on} alone: '
            f"{best['confidence']}, {best['final_rule']}.", rows)
        return best['confidence'], best['final_rule']
