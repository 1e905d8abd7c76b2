"""Comparing the confidences and final rules of a cascade by their exit tables."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data import ConfidenceFeatures
from ..exits import ExitTable
from ..exits.cascade_table import cascade_table
from ..exits.measures import auroc, cross_area, curve_area
from ..models.clcnet import FINAL_RULES, CLCNet

Choice = tuple[str, str]  # confidence, final rule


def tables_out_of_fold(
        model: CLCNet,
        features: Sequence[ConfidenceFeatures],
        scores: torch.Tensor,
) -> dict[Choice, ExitTable]:
    """Compute the exit tables of a cascade for every confidence that features contain, and both final rules.

    Args:
        model: The cascade.
        features: Features of each member, of the same images in the same order.
        scores: Out-of-fold scores of the confidence net [T, N].
    """
    correct, tables = torch.stack([f.correct for f in features]), {}
    for kind in ('max_prob', 'margin', 'entropy', 'clcnet'):
        confidence = scores
        if kind != 'clcnet':
            confidence = torch.stack([model.measure(f.probabilities, kind) for f in features])
        step_macs = model.step_macs_of(kind)
        tables.update({(kind, rule): cascade_table(confidence, correct, step_macs, rule) for rule in FINAL_RULES})
    return tables


def compare_confidences(
        calibration: Mapping[Choice, ExitTable],
        evaluation: Mapping[Choice, ExitTable] | None = None,
) -> list[dict[str, Any]]:
    """Compare confidences and final rules.

    Args:
        calibration: Exit tables to fit exits on.
        evaluation: Exit tables to evaluate on. Without them, exits are fitted on each half of the calibration tables
            and evaluated on the other half.

    Returns:
        A row for each table: 'confidence', 'final_rule', 'auroc' (of the first member's confidence) and 'area' (mean
        top-1 over all budgets). With `evaluation` also 'top1' (of all members) and 'calibration_area' (the area on the
        halves of the calibration tables, which is the criterion for choosing one).
    """
    rows = []
    for (kind, rule), fitted in calibration.items():
        table, inner = evaluation[kind, rule] if evaluation else fitted, cross_area(fitted)
        row: dict[str, Any] = {
            'confidence': kind, 'final_rule': rule,
            'auroc': round(auroc(table.confidence[:, 0], table.correct[:, 0]), 4)}
        if evaluation:
            row.update(
                area=round(curve_area(fitted, table), 4), top1=round(table.anytime()[-1].top1, 4),
                calibration_area=round(inner, 4))
        else:
            row['area'] = round(inner, 4)
        rows.append(row)
    return rows


def describe_best(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the confidence and final rule with the largest area, and the area of the paper's choice."""
    best = max(rows, key=lambda row: row['area'])
    text = f"Best by area: {best['confidence']} with the rule {best['final_rule']} ({best['area']:.2f})."
    for row in rows:
        if row is not best and (row['confidence'], row['final_rule']) == ('clcnet', 'most_confident'):
            text += f" The paper's choice, clcnet with most_confident, has {row['area']:.2f}."
    return text
