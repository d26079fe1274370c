# SPDX-License-Identifier: Apache-2.0
"""Rows of the final table: means over seeds, and when AdamW's final accuracy is reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from grng.compare.records import DIVERGED, FINISHED, INTERRUPTED, RunRecord, StepSplit

_BASELINE = "adamw"


@dataclass(frozen=True)
class Target:
    """The accuracy to reach: the mean final one of the best AdamW."""

    optimizer: str
    accuracy: float


@dataclass(frozen=True)
class Row:
    """One optimizer; numbers are means over its finished seeds, None where there are none."""

    optimizer: str
    status: str
    seeds_finished: int
    seeds_total: int
    final_accuracy: float | None = None
    final_accuracy_std: float | None = None
    best_accuracy: float | None = None
    best_accuracy_std: float | None = None
    train_seconds: float | None = None
    epochs_to_target: int | None = None
    seconds_to_target: float | None = None
    ms_per_step: StepSplit | None = None
    ms_per_step_total: float | None = None
    peak_memory_bytes: int | None = None
    optimizer_state_bytes: int | None = None


@dataclass(frozen=True)
class Summary:
    """All rows, and the accuracy they are measured against; None without a finished AdamW."""

    target: Target | None
    rows: list[Row]


def mean_curve(runs: Sequence[RunRecord]) -> tuple[list[float], list[float]]:
    """Mean test accuracy and mean training seconds at the end of each epoch.

    Args:
        runs: Finished runs of one optimizer.

    Returns:
        ``(mean accuracies, median seconds)``, one entry per epoch.
    """
    epochs = list(zip(*(run.epochs for run in runs), strict=False))
    accuracies = [statistics.fmean(e.test_accuracy for e in same) for same in epochs]
    # Times: the median, which another process that ran during one of the seeds cannot move.
    seconds = [statistics.median(e.train_seconds for e in same) for same in epochs]
    return accuracies, seconds


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _status(runs: Sequence[RunRecord], finished: int, seeds: int) -> str:
    for status in (DIVERGED, INTERRUPTED):
        if any(run.status == status for run in runs):
            return status
    if finished == seeds:
        return FINISHED
    return "not run" if not runs else "running"


def _row(label: str, runs: Sequence[RunRecord], seeds: int, target: Target | None) -> Row:
    finished = [run for run in runs if run.status == FINISHED]
    status = _status(runs, len(finished), seeds)
    if not finished:
        return Row(label, status, 0, seeds)
    final = [run.final_accuracy for run in finished]
    best = [run.best_accuracy for run in finished]
    accuracies, seconds = mean_curve(finished)
    reached = None
    if target is not None:
        reached = next((i for i, a in enumerate(accuracies) if a >= target.accuracy), None)
    split = StepSplit(
        *(
            round(statistics.median(getattr(run.ms_per_step, part) for run in finished), 5)
            for part in ("forward", "backward", "optimizer")
        )
    )
    peaks = [run.peak_memory_bytes for run in finished if run.peak_memory_bytes is not None]
    return Row(
        optimizer=label,
        status=status,
        seeds_finished=len(finished),
        seeds_total=seeds,
        final_accuracy=statistics.fmean(final),
        final_accuracy_std=_spread(final),
        best_accuracy=statistics.fmean(best),
        best_accuracy_std=_spread(best),
        train_seconds=statistics.median(run.train_seconds for run in finished),
        epochs_to_target=None if reached is None else reached + 1,
        seconds_to_target=None if reached is None else seconds[reached],
        ms_per_step=split,
        ms_per_step_total=split.total,
        peak_memory_bytes=max(peaks, default=None),
        optimizer_state_bytes=max(run.optimizer_state_bytes for run in finished),
    )


def summarise(labels: Sequence[str], runs: Sequence[RunRecord], seeds: int) -> Summary:
    """The table's rows in the order of ``labels``.

    Args:
        labels: Optimizer labels.
        runs: All runs so far; only finished ones enter the means.
        seeds: Number of seeds asked for.

    Returns:
        Rows and target.
    """
    by_label = {label: [run for run in runs if run.optimizer == label] for label in labels}
    candidates = []
    for label, own in by_label.items():
        final = [run.final_accuracy for run in own if run.status == FINISHED]
        if label.split(":")[0] == _BASELINE and final:
            candidates.append(Target(label, statistics.fmean(final)))
    target = max(candidates, key=lambda candidate: candidate.accuracy, default=None)
    return Summary(target, [_row(label, own, seeds, target) for label, own in by_label.items()])
