# SPDX-License-Identifier: Apache-2.0
"""The one timer: contenders take turns, A/B/A/B, and each keeps the median of its rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]


class Stopwatch(Protocol):
    """Times calls; how depends on the device."""

    def __call__(self, call: Call, repetitions: int) -> float:
        """Return milliseconds per call over consecutive repetitions."""
        ...


class CpuStopwatch:
    """Wall clock around the calls."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args: clock: seconds, monotonic."""
        self._clock = clock

    def __call__(self, call: Call, repetitions: int) -> float:
        """Return milliseconds per call."""
        start = self._clock()
        for _ in range(repetitions):
            call()
        return (self._clock() - start) * 1e3 / repetitions


class CudaStopwatch:
    """CUDA events on the current stream around the calls."""

    def __call__(self, call: Call, repetitions: int) -> float:
        """Return milliseconds per call; waits for the device."""
        first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        for _ in range(repetitions):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / repetitions


class Timing(NamedTuple):
    """Milliseconds per call: quantiles over the rounds, and how many rounds there were."""

    p20: float
    p50: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: Samples per contender.
        min_ms: A sample is as many calls as take this long, at least one.
        warmup_ms: Calls before anything counts, per contender.
        max_s: After this the rounds end, but not before ``min_rounds``.
        min_rounds: See ``max_s``.
    """

    rounds: int = 15
    min_ms: float = 5.0
    warmup_ms: float = 50.0
    max_s: float = 20.0
    min_rounds: int = 5


def quantile(samples: Sequence[float], q: float) -> float:
    """Return the ``q`` quantile, linear between the samples."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _warm_up(call: Call, stopwatch: Stopwatch, effort: Effort, *, alone: bool) -> int:
    """Call until warm; return how many calls make one sample."""
    spent = per_call = stopwatch(call, 1)
    while spent < effort.warmup_ms:
        count = 1 if alone else max(1, math.ceil(effort.min_ms / max(per_call, 1e-4)))
        per_call = stopwatch(call, count)
        spent += per_call * count
    return 1 if alone else max(1, math.ceil(effort.min_ms / max(per_call, 1e-4)))


def interleave(
    calls: Mapping[str, Call],
    stopwatch: Stopwatch,
    effort: Effort,
    *,
    before: Call | None = None,
    repetitions: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time contenders in turns.

    Args:
        calls: What to time, by name; each round times every one of them once.
        stopwatch: Of the device.
        effort: How long.
        before: Called ahead of every sample, not timed, to empty the caches; a sample is then one
            call.
        repetitions: Calls per sample, where a call only has a meaning together with its neighbours.
        clock: Seconds, for ``effort.max_s``.

    Returns:
        Quantiles by name.
    """
    counts = {
        name: repetitions or _warm_up(call, stopwatch, effort, alone=before is not None)
        for name, call in calls.items()
    }
    if repetitions:
        for call in calls.values():
            stopwatch(call, repetitions)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = clock()
    for done in range(effort.rounds):
        if done >= effort.min_rounds and clock() - start > effort.max_s:
            break
        for name, call in calls.items():
            if before is not None:
                before()
            samples[name].append(stopwatch(call, counts[name]))
    return {
        name: Timing(quantile(times, 0.2), quantile(times, 0.5), quantile(times, 0.8), len(times))
        for name, times in samples.items()
    }
