# SPDX-License-Identifier: Apache-2.0
"""How busy other processes keep the cores: a timing taken under such load is an upper bound."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

LIMIT = 0.08
ATTEMPTS = 4
# The kernel counts in ticks of 10 ms: over a shorter window the share means nothing.
SHORTEST_WINDOW_S = 0.2

T = TypeVar("T")


class CpuTimes(NamedTuple):
    """Seconds of all cores and of this process, at one moment."""

    busy: float
    total: float
    own: float


def read_times() -> CpuTimes | None:
    """Return the counters, or None where the system has no /proc/stat."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; guest time is part of user.
    ticks = [float(v) for v in first.split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    total, idle = sum(ticks), ticks[3] + ticks[4]
    return CpuTimes((total - idle) / tick, total / tick, time.process_time())


def foreign_share(start: CpuTimes | None, end: CpuTimes | None) -> float | None:
    """Return the share of all cores that others used between two readings, or None if not known."""
    if start is None or end is None:
        return None
    total = end.total - start.total
    if total < SHORTEST_WINDOW_S * (os.cpu_count() or 1):
        return None
    return max(0.0, (end.busy - start.busy) - (end.own - start.own)) / total


def under_watch(
    work: Callable[[], T], *, attempts: int = ATTEMPTS, pause_s: float = 0.5
) -> tuple[T, float | None]:
    """Run ``work`` with the load read before and during it, again while others disturb it.

    Args:
        work: May be run several times; the least disturbed result is kept.
        attempts: At most so many runs.
        pause_s: Wait between two attempts.

    Returns:
        The result, and the foreign share of the cores: the larger of before and during.
    """
    best: tuple[T, float | None] | None = None
    for attempt in range(attempts):
        idle = read_times()
        time.sleep(SHORTEST_WINDOW_S * 1.1)
        start = read_times()
        result = work()
        shares = (foreign_share(idle, start), foreign_share(start, read_times()))
        known = [share for share in shares if share is not None]
        share = max(known) if known else None
        if best is None or (share or 0.0) < (best[1] or 0.0):
            best = (result, share)
        if share is None or share < LIMIT:
            break
        if attempt + 1 < attempts:
            time.sleep(pause_s)
    assert best is not None, "there is at least one attempt"
    return best
