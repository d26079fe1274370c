# SPDX-License-Identifier: Apache-2.0
"""Rows of the final table: means over seeds, and when the reference's final values are reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grng.compare.measures import ACCURACY, LOSS, Measure, MeasureName
from grng.compare.records import DIVERGED, FINISHED, INTERRUPTED, RunRecord, StepSplit
from grng.compare.selection import family, select
from grng.compare.trailing import final_trailing_loss, first_step_below

DEFAULT_REFERENCE = "adamw"


@dataclass(frozen=True)
class Target:
    """What is to be reached: final means of the reference, of its best setting if there are several.

    The value is held-out accuracy, loss or correlation: on the validation samples where there are
    any, else on the test set.
    """

    optimizer: str
    measure: MeasureName
    value: float
    # Of the whole run; parts of the steps are parts of these.
    steps: int
    # Mean of the last 50 steps.
    train_loss: float | None


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
    # On the test set.
    final_accuracy: float | None = None
    final_accuracy_std: float | None = None
    final_loss: float | None = None
    final_loss_std: float | None = None
    validation_accuracy: float | None = None
    validation_accuracy_std: float | None = None
    validation_loss: float | None = None
    validation_loss_std: float | None = None
    final_correlation: float | None = None
    final_correlation_std: float | None = None
    validation_correlation: float | None = None
    validation_correlation_std: float | None = None
    # Of a stream: part of the samples that were predicted before they were learned from.
    online_accuracy: float | None = None
    online_accuracy_std: float | None = None
    # Held out: on the validation samples where there are any, else on the test set.
    best_accuracy: float | None = None
    best_accuracy_std: float | None = None
    train_seconds: float | None = None
    # Mean training loss of the last 50 steps.
    final_train_loss: float | None = None
    # When the target's held-out value is reached, at an evaluation; None if never.
    epochs_to_target: int | None = None
    steps_to_target: int | None = None
    part_of_steps_to_target: float | None = None
    seconds_to_target: float | None = None
    # When its training loss is.
    steps_to_train_loss: int | None = None
    part_of_steps_to_train_loss: float | None = None
    ms_per_step: StepSplit | None = None
    ms_per_step_total: float | None = None
    peak_memory_bytes: int | None = None
    optimizer_state_bytes: int | None = None

    def held_out(self, measure: Measure) -> float | None:
        """Final value on the validation samples; on the test set where there are none."""
        if measure is ACCURACY:
            validation, test = self.validation_accuracy, self.final_accuracy
        elif measure is LOSS:
            validation, test = self.validation_loss, self.final_loss
        else:
            validation, test = self.validation_correlation, self.final_correlation
        return test if validation is None else validation


@dataclass(frozen=True)
class Summary:
    """All rows, and what they are measured against; None without a finished run of the reference."""

    target: Target | None
    rows: list[Row]


def mean_curve(runs: Sequence[RunRecord], measure: Measure) -> tuple[list[float], list[float]]:
    """Mean held-out value and median training seconds at each evaluation.

    Args:
        runs: Finished runs of one optimizer.
        measure: Which value.

    Returns:
        ``(mean values, median seconds)``, one entry per evaluation.
    """
    epochs = list(zip(*(run.epochs for run in runs), strict=False))
    values = [statistics.fmean(measure.of(e) for e in same) for same in epochs]
    # Times: the median, which another process that ran during one of the seeds cannot move.
    seconds = [statistics.median(e.train_seconds for e in same) for same in epochs]
    return values, seconds


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


def _progress(
    finished: Sequence[RunRecord], target: Target | None, measure: Measure
) -> dict[str, Any]:
    """The fields of a row that say when the target is reached."""
    if target is None:
        return {}
    found: dict[str, Any] = {}
    values, seconds = mean_curve(finished, measure)
    wanted = measure.score(target.value)
    reached = next((i for i, v in enumerate(values) if measure.score(v) >= wanted), None)
    if reached is not None:
        at = finished[0].epochs[reached]
        found |= {"epochs_to_target": at.epoch, "steps_to_target": at.step}
        found["part_of_steps_to_target"] = at.step / target.steps
        found["seconds_to_target"] = seconds[reached]
    if target.train_loss is not None:
        step = first_step_below(finished, target.train_loss)
        if step is not None:
            found["steps_to_train_loss"] = step
            found["part_of_steps_to_train_loss"] = step / target.steps
    return found


def _row(
    label: str,
    runs: Sequence[RunRecord],
    seeds: int,
    target: Target | None,
    measure: Measure,
    *,
    is_selected: bool,
) -> Row:
    finished = [run for run in runs if run.status == FINISHED]
    status = _status(runs, len(finished), seeds)
    if not finished:
        return Row(label, status, 0, seeds, is_selected)
    last = [run.epochs[-1] for run in finished]
    shown = last if is_selected else []
    test = _mean([epoch.test_accuracy for epoch in shown])
    test_loss = _mean([epoch.test_loss for epoch in shown])
    test_correlation = _mean([epoch.test_correlation for epoch in shown])
    validation = _mean([epoch.validation_accuracy for epoch in last])
    validation_loss = _mean([epoch.validation_loss for epoch in last])
    validation_correlation = _mean([epoch.validation_correlation for epoch in last])
    online = _mean([epoch.online_accuracy for epoch in last])
    best = _mean([run.best_accuracy for run in finished])
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
        final_loss=test_loss[0],
        final_loss_std=test_loss[1],
        validation_accuracy=validation[0],
        validation_accuracy_std=validation[1],
        validation_loss=validation_loss[0],
        validation_loss_std=validation_loss[1],
        final_correlation=test_correlation[0],
        final_correlation_std=test_correlation[1],
        validation_correlation=validation_correlation[0],
        validation_correlation_std=validation_correlation[1],
        online_accuracy=online[0],
        online_accuracy_std=online[1],
        best_accuracy=best[0],
        best_accuracy_std=best[1],
        train_seconds=statistics.median(run.train_seconds for run in finished),
        final_train_loss=final_trailing_loss(finished),
        ms_per_step=split,
        ms_per_step_total=split.total,
        peak_memory_bytes=max(peaks, default=None),
        optimizer_state_bytes=max(run.optimizer_state_bytes for run in finished),
        **_progress(finished, target, measure),
    )


def _target(
    by_label: Mapping[str, Sequence[RunRecord]], reference: str, measure: Measure
) -> Target | None:
    """Final values of the best setting of the reference."""
    candidates = []
    for label, own in by_label.items():
        finished = [run for run in own if run.status == FINISHED]
        if reference in (label, family(label)) and finished:
            value = mean_curve(finished, measure)[0][-1]
            steps, train_loss = finished[0].epochs[-1].step, final_trailing_loss(finished)
            candidates.append(Target(label, measure.name, value, steps, train_loss))
    return max(candidates, key=lambda found: measure.score(found.value), default=None)


def summarise(
    labels: Sequence[str],
    runs: Sequence[RunRecord],
    seeds: int,
    *,
    measure: Measure = ACCURACY,
    reference: str = DEFAULT_REFERENCE,
) -> Summary:
    """The table's rows in the order of ``labels``.

    Args:
        labels: Optimizer labels.
        runs: All runs so far; only finished ones enter the means.
        seeds: Number of seeds asked for.
        measure: What settings are chosen by, and what is to be reached.
        reference: Whose final values are to be reached: a label, or the name of an optimizer, which
            stands for the best of its settings.

    Returns:
        Rows and target.
    """
    by_label = {label: [run for run in runs if run.optimizer == label] for label in labels}
    scores: dict[str, float | None] = {}
    for label, own in by_label.items():
        final = [measure.of(run.epochs[-1]) for run in own if run.status == FINISHED]
        scores[label] = measure.score(statistics.fmean(final)) if final else None
    has_validation = any(epoch.validation_loss is not None for run in runs for epoch in run.epochs)
    selected = select(labels, scores) if has_validation else set(labels)
    target = _target(by_label, reference, measure)
    rows = [
        _row(label, own, seeds, target, measure, is_selected=label in selected)
        for label, own in by_label.items()
    ]
    return Summary(target, rows)
