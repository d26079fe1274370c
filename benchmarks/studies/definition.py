# SPDX-License-Identifier: Apache-2.0
"""What a study is made of: its panels, and runs that are planned before the first begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from grng.studies.records import Panel, Value


class Measured(NamedTuple):
    """What a run returns: its points, and the seconds of its training steps."""

    points: list[dict[str, Value]]
    seconds: float = 0.0


@dataclass(frozen=True)
class Planned:
    """A run that may be there already. What it returns must depend on these names and the code alone."""

    series: str
    setting: str
    seed: int
    # Raises ArithmeticError or RuntimeError where its numbers fail: the run is recorded as diverged, as is
    # one that returns numbers that are not finite. DataError and a lack of memory end the study.
    run: Callable[[], Measured]


@dataclass(frozen=True)
class Options:
    """How a study is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    # A few steps of a few settings, to see that it runs.
    is_quick: bool = False
    data_dir: Path | None = None
    report: Callable[[str], None] = field(default=print)


@dataclass(frozen=True)
class Definition:
    """A study.

    Attributes:
        name: Of its folder, ``study-NAME``.
        title: The question.
        subtitle: Model, data, length and seeds.
        panels: Of its figure.
        config: What the runs depend on, for the record; a study with another one is another study.
        plan: Yields its runs in the order in which they are made, seed by seed where times are compared.
    """

    name: str
    title: str
    subtitle: str
    panels: tuple[Panel, ...]
    config: Callable[[Options], dict[str, Any]]
    plan: Callable[[Options], Iterator[Planned]]
