# SPDX-License-Identifier: Apache-2.0
"""One line of a result file, and the arithmetic between its columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.case import Case, Contender
from harness.load import LIMIT
from harness.timer import Timing


@dataclass(frozen=True)
class Ceilings:
    """What the machine itself reached at the start of the run.

    Attributes:
        copy_gb_s: Copy of a large buffer, read plus written bytes.
        tflop_s: Matrix product, by input dtype.
        foreign_load: Share of the cores that others used meanwhile.
    """

    copy_gb_s: float
    tflop_s: dict[str, float]
    foreign_load: float | None = None

    def floor_ms(self, flops: float, nbytes: float, dtype: str) -> float:
        """Return the least time of a kernel: all its arithmetic or all its traffic at full rate."""
        # Narrow inputs can be widened: where 16-bit products are emulated, fp32 sets the rate.
        rate = max(self.tflop_s.get(dtype, 0.0), self.tflop_s["float32"])
        return max(flops / (rate * 1e12), nbytes / (self.copy_gb_s * 1e9)) * 1e3


@dataclass(frozen=True)
class Row:
    """One contender on one shape in one state and mode; None where nothing was measured."""

    op: str
    provider: str
    backend: str
    role: str
    shape: str
    dims: dict[str, Any]
    dtype: str
    state: str
    mode: str
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    rounds: int
    bytes: float
    flops: float
    gb_s: float | None
    tflop_s: float | None
    floor_ms: float
    roofline_share: float | None
    rival: str | None
    ratio: float | None
    error: float | None
    rival_error: float | None
    foreign_load: float | None
    notes: list[str]


def make_row(
    case: Case,
    contender: Contender,
    ceilings: Ceilings,
    *,
    state: str,
    mode: str,
    timing: Timing | None,
    error: float | None,
    foreign_load: float | None = None,
    notes: Sequence[str] = (),
) -> Row:
    """Return the row of one measurement; the rival's columns are filled in by ``name_rivals``."""
    p50 = timing.p50 if timing else None
    floor = ceilings.floor_ms(case.flops, case.bytes, case.dtype)
    remarks = [*case.notes, *contender.notes, *notes]
    if foreign_load is not None and foreign_load >= LIMIT:
        remarks.append(f"foreign load {foreign_load:.0%}: upper bound")
    if p50 and ceilings.floor_ms(0.0, case.bytes, case.dtype) > p50:
        remarks.append("faster than memory: the inputs stay in a cache")
    elif p50 and floor > p50:
        remarks.append("faster than the arithmetic that is counted, at the measured matrix rate")
    return Row(
        op=case.op,
        provider=contender.name,
        backend=contender.backend,
        role=contender.role,
        shape=case.shape,
        dims=case.dims,
        dtype=case.dtype,
        state=state,
        mode=mode,
        p20_ms=timing.p20 if timing else None,
        p50_ms=p50,
        p80_ms=timing.p80 if timing else None,
        rounds=timing.rounds if timing else 0,
        bytes=case.bytes,
        flops=case.flops,
        gb_s=case.bytes / p50 / 1e6 if p50 else None,
        tflop_s=case.flops / p50 / 1e9 if p50 else None,
        floor_ms=floor,
        roofline_share=floor / p50 if p50 else None,
        rival=None,
        ratio=None,
        error=error,
        rival_error=None,
        foreign_load=foreign_load,
        notes=remarks,
    )


def name_rivals(rows: Sequence[Row]) -> list[Row]:
    """Compare rows of one case, state and mode: ours against the fastest rival that is right.

    Args:
        rows: Of one comparison.

    Returns:
        The rows; those of this package have ``rival``, ``ratio`` (above 1: we are faster) and
        ``rival_error``.
    """
    timed = [row for row in rows if row.role == "rival" and row.p50_ms is not None]
    if not timed:
        return list(rows)
    best = min(timed, key=lambda row: row.p50_ms or 0.0)
    assert best.p50_ms is not None, "only timed rows take part"
    return [
        dataclasses.replace(
            row, rival=best.provider, ratio=best.p50_ms / row.p50_ms, rival_error=best.error
        )
        if row.role in ("ours", "variant") and row.p50_ms
        else row
        for row in rows
    ]
