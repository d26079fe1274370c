# SPDX-License-Identifier: Apache-2.0
"""Which of several settings of one optimizer counts: the best on the validation samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def family(label: str) -> str:
    """Name of the optimizer in a label such as ``"adamw:lr=3e-4"``."""
    return label.split(":")[0]


def select(labels: Sequence[str], scores: Mapping[str, float | None]) -> set[str]:
    """One label per optimizer.

    Args:
        labels: All labels in the order given.
        scores: By label, higher for a better mean on the validation samples; None where no run
            finished.

    Returns:
        The best of each optimizer; the first of equals, and the first where none finished.
    """
    best: dict[str, str] = {}
    for label in labels:
        name = family(label)
        found, known = scores[label], scores[best.setdefault(name, label)]
        if found is not None and (known is None or found > known):
            best[name] = label
    return set(best.values())
