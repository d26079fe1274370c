# SPDX-License-Identifier: Apache-2.0
"""What the figures show of each optimizer: curves, style, and a remark where it did not end well."""

from __future__ import annotations

from dataclasses import dataclass

from grng.compare.curves import Curve, held_out_curve, loss_curve, online_curve, shown_runs
from grng.compare.plot_style import Style, assign_styles
from grng.compare.records import DIVERGED, INTERRUPTED
from grng.compare.results import ComparisonResult


@dataclass(frozen=True)
class Series:
    """One optimizer in the figures: training loss (left panel) and held-out accuracy or loss."""

    label: str
    style: Style
    # Of a stream: the online accuracy.
    left: Curve | None
    held_out: Curve | None
    note: str
    is_complete: bool


def collect_series(result: ComparisonResult) -> list[Series]:
    """The optimizers that have at least one run, in the order given.

    Args:
        result: The comparison.

    Returns:
        Curves, styles and remarks.
    """
    # Of several settings of an optimizer only the one that counts: twelve lines say nothing.
    labels = [row.optimizer for row in result.summary().rows if row.is_selected]
    styles = assign_styles(labels)
    in_steps = result.is_stream or result.counts_steps
    found = []
    for label in labels:
        runs = shown_runs([run for run in result.runs if run.optimizer == label])
        if not runs:
            continue
        note = ""
        if runs[0].status == DIVERGED and runs[0].divergence is not None:
            note = f"\n(diverged at step {runs[0].divergence.step:,})"
        elif runs[0].status == INTERRUPTED:
            note = "\n(interrupted)"
        left = online_curve(runs) if result.is_stream else loss_curve(runs, in_steps=in_steps)
        held_out = held_out_curve(runs, result.measure, in_steps=in_steps)
        found.append(Series(label, styles[label], left, held_out, note, not note))
    return found
