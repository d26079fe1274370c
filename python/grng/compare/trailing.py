# SPDX-License-Identifier: Apache-2.0
"""Training loss averaged over the last few steps: where it ends, and when another's end is reached."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grng.compare.records import RunRecord

# The loss of a single batch jumps about.
TRAILING_STEPS = 50


def trailing_losses(run: RunRecord) -> npt.NDArray[np.float64]:
    """Mean training loss of the 50 steps that end at each step.

    Args:
        run: A run.

    Returns:
        One mean per step from the 50th on, the last being the final one; for a run of fewer steps,
        the mean of them all. Empty before the first step.
    """
    losses = np.asarray(run.step_loss, dtype=np.float64)
    span = min(TRAILING_STEPS, len(losses))
    if not span:
        return losses
    return np.lib.stride_tricks.sliding_window_view(losses, span).mean(axis=1)


def first_step_below(runs: Sequence[RunRecord], loss: float) -> int | None:
    """When the trailing training loss, as a mean over the seeds, is at most another's final one.

    Args:
        runs: Finished runs of one optimizer, of equal length.
        loss: What is to be reached.

    Returns:
        Steps taken; None if never.
    """
    means = np.stack([trailing_losses(run) for run in runs]).mean(axis=0)
    reached = np.flatnonzero(means <= loss)
    if not reached.size:
        return None
    steps = len(runs[0].step_loss)
    return steps - len(means) + 1 + int(reached[0])


def final_trailing_loss(runs: Sequence[RunRecord]) -> float | None:
    """The same mean at the end of the runs; None without steps."""
    if not all(run.step_loss for run in runs):
        return None
    return float(np.stack([trailing_losses(run) for run in runs]).mean(axis=0)[-1])
