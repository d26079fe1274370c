# SPDX-License-Identifier: Apache-2.0
"""Curves of a comparison as arrays: mean over seeds with the band from lowest to highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grng.compare.measures import Measure
from grng.compare.records import FINISHED, RunRecord

Array = npt.NDArray[np.float64]

# Part of the run that the smoothing looks back on.
_SMOOTHING_FRACTION = 0.015


@dataclass(frozen=True)
class Curve:
    """A quantity against epochs (or steps; samples in a stream) and against training seconds."""

    epochs: Array
    seconds: Array
    mean: Array
    low: Array
    high: Array

    def x(self, axis: str) -> Array:
        """Abscissa: ``"epochs"`` or ``"seconds"``."""
        return self.epochs if axis == "epochs" else self.seconds


def shown_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Finished runs of one optimizer; where none finished, the one that got furthest."""
    finished = [run for run in runs if run.status == FINISHED]
    if finished or not runs:
        return finished
    return [max(runs, key=lambda run: len(run.step_loss))]


def smooth(values: Array, span: int) -> Array:
    """Exponential moving average without the pull towards its start value.

    Args:
        values: ``[n]``.
        span: About how many steps the average looks back.

    Returns:
        ``[n]``.
    """
    decay = 1.0 - 1.0 / span
    averages = np.empty_like(values)
    total = weight = 0.0
    for index, value in enumerate(values):
        total = decay * total + value
        weight = decay * weight + 1.0
        averages[index] = total / weight
    return averages


def _band(epochs: Array, seconds: Sequence[Array], values: Sequence[Array]) -> Curve:
    stacked = np.stack(values)
    return Curve(
        epochs=epochs,
        seconds=np.stack(seconds).mean(axis=0),
        mean=stacked.mean(axis=0),
        low=stacked.min(axis=0),
        high=stacked.max(axis=0),
    )


def loss_curve(runs: Sequence[RunRecord], *, in_steps: bool) -> Curve | None:
    """Smoothed training loss per step; None before the first step.

    Args:
        runs: Runs of one optimizer, of equal length.
        in_steps: Against steps instead of epochs.

    Returns:
        The curve.
    """
    if not runs or not runs[0].step_loss:
        return None
    steps = len(runs[0].step_loss)
    span = max(2, round(steps * _SMOOTHING_FRACTION))
    return _band(
        epochs=np.arange(1, steps + 1) / (1 if in_steps else runs[0].steps_per_epoch),
        seconds=[np.cumsum(run.step_seconds) for run in runs],
        values=[smooth(np.asarray(run.step_loss), span) for run in runs],
    )


def held_out_curve(runs: Sequence[RunRecord], measure: Measure, *, in_steps: bool) -> Curve | None:
    """Held-out accuracy in percent, or loss, at each evaluation; None before the first.

    On the validation samples where there are any, else on the test set.

    Args:
        runs: Runs of one optimizer, of equal length.
        measure: Accuracy or loss.
        in_steps: Against steps (samples in a stream) instead of epochs.

    Returns:
        The curve.
    """
    if not runs or not runs[0].epochs:
        return None
    steps = np.asarray([epoch.step for epoch in runs[0].epochs], dtype=np.float64)
    return _band(
        epochs=steps if in_steps else steps / runs[0].steps_per_epoch,
        seconds=[np.asarray([epoch.train_seconds for epoch in run.epochs]) for run in runs],
        values=[
            measure.scale * np.asarray([measure.of(epoch) for epoch in run.epochs]) for run in runs
        ],
    )


def online_curve(runs: Sequence[RunRecord]) -> Curve | None:
    """Online accuracy of a stream in percent after each sample: the mean over all so far.

    Args:
        runs: Runs of one optimizer, of equal length.

    Returns:
        The curve against samples; None before the first.
    """
    if not runs or not runs[0].step_correct:
        return None
    samples = np.arange(1, len(runs[0].step_correct) + 1, dtype=np.float64)
    return _band(
        epochs=samples,
        seconds=[np.cumsum(run.step_seconds) for run in runs],
        values=[100 * np.cumsum(run.step_correct) / samples for run in runs],
    )
