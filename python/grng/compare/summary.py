# SPDX-License-Identifier: Apache-2.0
"""Rows of the final table: means over seeds, and when AdamW's final accuracy is reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from grng.compare.records import DIVERGED, FINISHED, INTERRUPTED, RunRecord, StepSplit
from grng.compare.selection import family, select

_BASELINE = "adamw"


@dataclass(frozen=True)
class Target:
    """The accuracy to reach: the mean final one of the best AdamW.

    Both on the validation samples where there are any, else on the test set.
    """

    optimizer: str
    accuracy: float


@dataclass(frozen=True)
class Row:
    """One optimizer; numbers are means over its finished seeds, None where there are none.

    Where an optimizer is there with several settings and there are validation samples, only the
    best of them is selected, and only it has a test accuracy.
    """

    optimizer: str
    status: str
    seeds_finished: int
    seeds_total: int
    is_selected: bool = True
    # Accuracy on the test set.
    final_accuracy: float | None = None
    final_accuracy_std: float | None = None
    validation_accuracy: float | None = None
    validation_accuracy_std: float | None = None
    # Of a stream: part of the samples that were predicted before they were learned from.
    online_accuracy: float | None = None
    online_accuracy_std: float | None = None
    # Held out: on the validation samples where there are any, else on the test set.
    best_accuracy: float | None = None
    best_accuracy_std: float | None = None
    train_seconds: float | None = None
    epochs_to_target: int | None = None
    seconds_to_target: float | None = None
    ms_per_step: StepSplit | None = None
    ms_per_step_total: float | None = None
    peak_memory_bytes: int | None = None
    optimizer_state_bytes: int | None = None

    @property
    def held_out_accuracy(self) -> float | None:
        """Final accuracy on the validation samples; on the test set where there are none."""
        found = self.validation_accuracy
        return self.final_accuracy if found is None else found


@dataclass(frozen=True)
class Summary:
    """All rows, and the accuracy they are measured against; None without a finished AdamW."""

    target: Target | None
    rows: list[Row]


def mean_curve(runs: Sequence[RunRecord]) -> tuple[list[float], list[float]]:
    """Mean held-out accuracy and median training seconds at each evaluation.

    Args:
        runs: Finished runs of one optimizer.

    Returns:
        ``(mean accuracies, median seconds)``, one entry per evaluation.
    """
    epochs = list(zip(*(run.epochs for run in runs), strict=False))
    accuracies = [statistics.fmean(e.held_out_accuracy for e in same) for same in epochs]
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


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None unless every value is there."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), _spread(known)


def _row(
    label: str, runs: Sequence[RunRecord], seeds: int, target: Target | None, *, is_selected: bool
) -> Row:
    finished = [run for run in runs if run.status == FINISHED]
    status = _status(runs, len(finished), seeds)
    if not finished:
        return Row(label, status, 0, seeds, is_selected)
    last = [run.epochs[-1] for run in finished]
    test = _mean([run.final_accuracy for run in finished]) if is_selected else (None, None)
    validation = _mean([epoch.validation_accuracy for epoch in last])
    online = _mean([epoch.online_accuracy for epoch in last])
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
        is_selected=is_selected,
        final_accuracy=test[0],
        final_accuracy_std=test[1],
        validation_accuracy=validation[0],
        validation_accuracy_std=validation[1],
        online_accuracy=online[0],
        online_accuracy_std=online[1],
        best_accuracy=statistics.fmean(best),
        best_accuracy_std=_spread(best),
        train_seconds=statistics.median(run.train_seconds for run in finished),
        epochs_to_target=None if reached is None else finished[0].epochs[reached].epoch,
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
    held_out: dict[str, float | None] = {}
    for label, own in by_label.items():
        final = [run.held_out_accuracy for run in own if run.status == FINISHED]
        held_out[label] = statistics.fmean(final) if final else None
    has_validation = any(
        epoch.validation_accuracy is not None for run in runs for epoch in run.epochs
    )
    selected = select(labels, held_out) if has_validation else set(labels)
    candidates = [
        Target(label, accuracy)
        for label, accuracy in held_out.items()
        if family(label) == _BASELINE and accuracy is not None
    ]
    target = max(candidates, key=lambda candidate: candidate.accuracy, default=None)
    rows = [
        _row(label, own, seeds, target, is_selected=label in selected)
        for label, own in by_label.items()
    ]
    return Summary(target, rows)
