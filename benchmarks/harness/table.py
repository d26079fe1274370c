# SPDX-License-Identifier: Apache-2.0
"""Plain text tables: what was measured, and where we lose."""

from __future__ import annotations

from collections.abc import Sequence

from harness.files import text_table
from harness.row import Row


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _times_faster(reference: float | None, ours: float | None) -> str:
    return "-" if not reference or not ours else f"{reference / ours:.1f}"


def _where(row: Row) -> str:
    return f"{row.shape} {row.dtype} {row.state} {row.mode}"


def summary(rows: Sequence[Row]) -> str:
    """Return one line per row of ours, beside its rival; ``x ref``: times faster than the reference."""
    times = {(_where(r), r.provider): r.p50_ms for r in rows}
    reference = {
        _where(r): r.p50_ms for r in rows if r.backend == "reference" and r.role == "yardstick"
    }
    lines = []
    for row in rows:
        if row.role not in ("ours", "variant"):
            continue
        lines.append(
            (
                _where(row),
                row.provider,
                row.backend,
                _ms(row.p50_ms),
                row.rival or "-",
                _ms(times.get((_where(row), row.rival or ""))),
                "-" if row.ratio is None else f"{row.ratio:.2f}",
                _times_faster(reference.get(_where(row)), row.p50_ms),
                _error(row.error),
                _error(row.rival_error),
                "-" if row.roofline_share is None else f"{row.roofline_share:.0%}",
                "*" if row.notes else "",
            )
        )
    header = (
        "shape", "ours", "backend", "ms", "rival", "ms", "ratio", "x ref", "error", "rival's",
        "roofline", "",
    )  # fmt: skip
    notes = "".join(f"\n* {note}" for note in _remarks(rows))
    return text_table(header, lines) + notes


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Return the notes of all rows, each once; of the loads only the highest."""
    loads = [row.foreign_load for row in rows if row.foreign_load is not None]
    notes = {note for row in rows for note in row.notes}
    kept = sorted(n for n in notes if not n.startswith(("foreign load", "faster than memory")))
    if any(n.startswith("foreign load") for n in notes):
        kept.append(f"foreign load up to {max(loads):.0%}: those times are upper bounds")
    return kept[:20]


def losses(rows: Sequence[Row]) -> str:
    """Return every shape on which a rival is faster than what a user of this package gets."""
    lost = [r for r in rows if r.role == "ours" and r.ratio is not None and r.ratio < 1]
    missing = [r for r in rows if r.role == "ours" and r.p50_ms is None]
    lines = [
        f"  {_where(r)}: {r.ratio:.2f}x of {r.rival}"
        for r in sorted(lost, key=lambda r: r.ratio or 0)
    ]
    lines += [f"  {_where(r)}: no time, {'; '.join(r.notes) or 'not measured'}" for r in missing]
    return "where we lose:" + ("\n" + "\n".join(lines) if lines else " nowhere in this run")
