# SPDX-License-Identifier: Apache-2.0
"""Time of each training step, split into forward, backward and optimizer."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

# Marks of one step: start, after forward, after observe, after backward, after step.
MARKS_PER_STEP = 5


class StepTimer:
    """Collects the marks of each step; reads the clock on the CPU, records events on CUDA.

    CUDA events keep the queue full: no step waits for the device. They are read in ``flush``,
    which does wait.
    """

    def __init__(self, device: torch.device) -> None:
        """Args: device: the device that the steps run on."""
        self._is_cuda = device.type == "cuda"
        self._clock: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Records one of the five marks of a step."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._clock.append(time.perf_counter())

    def flush(self) -> list[tuple[float, float, float]]:
        """Seconds of (forward, backward, optimizer) for each step since the last flush."""
        if self._is_cuda:
            torch.cuda.synchronize()
            intervals = [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._events)]
        else:
            intervals = [b - a for a, b in pairwise(self._clock)]
        self._events.clear()
        self._clock.clear()
        steps = []
        # The fifth interval of each step lies between two steps: fetching the next batch.
        for first in range(0, len(intervals), MARKS_PER_STEP):
            forward, observe, backward, step = intervals[first : first + 4]
            steps.append((forward, backward, observe + step))
        return steps
