# SPDX-License-Identifier: Apache-2.0
"""What is kept of a study; these dataclasses are the schema of ``study.json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grng.compare.errors import UsageError
from grng.compare.records import DIVERGED, FINISHED, INTERRUPTED, RUNNING
from grng.compare.saved import check
from grng.compare.schema import Schema

FILE_NAME = "study.json"
SCHEMA = Schema("grng-study", 1, FILE_NAME)
X_SCALES = ("linear", "log", "category")
Y_SCALES = ("linear", "log", "symlog")
_STATUSES = (RUNNING, FINISHED, INTERRUPTED)
_RUN_STATUSES = (FINISHED, DIVERGED)

Value = float | int | str | None


@dataclass
class Panel:
    """One picture: a measured value against another one, or against what was varied.

    Attributes:
        x: Key of the points; with scale ``"category"`` its values are names.
        y: Key of the points.
        title: Above the panel.
        x_label: With its unit.
        y_label: With its unit.
        x_scale: ``"linear"``, ``"log"`` or ``"category"``.
        y_scale: ``"linear"``, ``"log"`` or ``"symlog"``, for values that may be negative; if none is, it is a
            logarithmic one.
    """

    x: str
    y: str
    title: str
    x_label: str
    y_label: str
    x_scale: str = "linear"
    y_scale: str = "linear"


@dataclass
class StudyRun:
    """One training run, or whatever else is measured once, with one seed.

    Attributes:
        series: What is drawn as one line, for example ``"ring"``.
        setting: What else tells the runs of a series apart, for example ``"rho=0.01"``.
        seed: Of weights and order of the batches.
        status: ``"finished"`` or ``"diverged"``.
        points: What was measured, in order: one for each setting, or many along the way. Those of the other
            seeds at the same place are averaged with them.
        seconds: Of the training steps.
        reason: Why it diverged.
    """

    series: str
    setting: str
    seed: int
    status: str
    points: list[dict[str, Value]]
    seconds: float = 0.0
    reason: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the other runs of its study."""
        return self.series, self.setting, self.seed


@dataclass
class Mean:
    """A value over the seeds."""

    mean: float
    # Of the sample; 0 with one seed.
    deviation: float
    low: float
    high: float
    seeds: int


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, standard deviation and range of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Mean(statistics.fmean(values), deviation, min(values), max(values), len(values))


def finite(value: Value) -> float | None:
    """A value as a number; None where it is none, or not finite."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


@dataclass
class StudyResult:
    """Everything that is known about one study."""

    name: str
    title: str
    subtitle: str
    panels: list[Panel]
    command: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]
    created_utc: str
    status: str = RUNNING
    runs: list[StudyRun] = field(default_factory=list)

    @property
    def series(self) -> list[str]:
        """The names of the series, in the order of their first runs."""
        return list(dict.fromkeys(run.series for run in self.runs))

    def has(self, series: str, setting: str, seed: int) -> bool:
        """Whether this run is there."""
        return any(run.key == (series, setting, seed) for run in self.runs)

    def settings(self, series: str) -> list[str]:
        """The settings of a series, in the order of their first runs."""
        return list(dict.fromkeys(run.setting for run in self.runs if run.series == series))

    def diverged(self, series: str, setting: str) -> int:
        """How many runs diverged."""
        own = (series, setting)
        return sum(run.status == DIVERGED for run in self.runs if (run.series, run.setting) == own)

    def finished_points(self, series: str, setting: str) -> list[list[dict[str, Value]]]:
        """The points of each run that finished."""
        return [
            run.points
            for run in self.runs
            if (run.series, run.setting) == (series, setting) and run.status == FINISHED
        ]

    def means(self, series: str, setting: str, key: str) -> list[Mean]:
        """The values of a key at each place, over the seeds; without those of diverged runs.

        Args:
            series: A series.
            setting: One of its settings.
            key: Of the points; places where no run has a finite value are left out.
        """
        runs = self.finished_points(series, setting)
        found = []
        for place in range(max(map(len, runs), default=0)):
            values = [points[place].get(key) for points in runs if place < len(points)]
            numbers = [number for number in map(finite, values) if number is not None]
            if numbers:
                found.append(mean_of(numbers))
        return found

    def save(self, folder: Path) -> Path:
        """Write ``study.json``; a reader sees the old file or the new one, never a part."""
        content = {
            **{name: getattr(self, name) for name in _HEAD},
            "panels": [asdict(panel) for panel in self.panels],
            "runs": [asdict(run) for run in self.runs],
        }
        return SCHEMA.write(folder, content)


_HEAD = ("name", "title", "subtitle", "created_utc", "status", "command", "config", "environment")


def is_study_result(path: Path) -> bool:
    """Whether a file, or the folder that should hold one, is the result of a study."""
    file = SCHEMA.file(path)
    return file.name == FILE_NAME and file.is_file()


def load(path: Path) -> StudyResult:
    """Read a saved study; unknown keys are ignored.

    Args:
        path: ``study.json``, or the folder that holds it.

    Raises:
        UsageError: No result of this schema version.
    """
    file = SCHEMA.file(path)
    with SCHEMA.reading(file) as content:
        head = {name: content[name] for name in _HEAD}
        known = [f.name for f in fields(Panel)]
        panels = [
            Panel(**{name: panel[name] for name in known if name in panel})
            for panel in content["panels"]
        ]
        names = [f.name for f in fields(StudyRun)]
        runs = [StudyRun(**{name: run[name] for name in names}) for run in content["runs"]]
        result = StudyResult(**head, panels=panels, runs=runs)
    check(file, result, StudyResult)
    _check_content(file, result)
    return result


def _check_content(file: Path, result: StudyResult) -> None:
    if not result.panels:
        raise UsageError(f"{file}: panels must not be empty")
    _check_one_of(file, "status", result.status, _STATUSES)
    for number, panel in enumerate(result.panels):
        _check_one_of(file, f"panels[{number}].x_scale", panel.x_scale, X_SCALES)
        _check_one_of(file, f"panels[{number}].y_scale", panel.y_scale, Y_SCALES)
    named = [panel for panel in result.panels if panel.x_scale == "category"]
    keys = set()
    for number, run in enumerate(result.runs):
        _check_one_of(file, f"runs[{number}].status", run.status, _RUN_STATUSES)
        if run.key in keys:
            raise UsageError(f"{file}: runs[{number}] is there twice: {run.key}")
        keys.add(run.key)
        for place, point in enumerate(run.points):
            where = f"runs[{number}].points[{place}]"
            for key, value in point.items():
                check(file, value, Value, f"{where}.{key}")
            for panel in named:
                if panel.y in point and point.get(panel.x) is None:
                    raise UsageError(f"{file}: {where} must have {panel.x}, the name of a place")


def _check_one_of(file: Path, place: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{file}: {place} must be one of {', '.join(known)}, got {value!r}")
