# SPDX-License-Identifier: Apache-2.0
"""Tables of the studies, from the results that are kept."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evidence_tables import NAMES
from table_text import markdown, text

from grng.compare.records import FINISHED
from grng.studies.records import StudyResult, StudyRun, load

RESULTS = Path(__file__).parent / "results"


@functools.cache
def study(name: str) -> StudyResult:
    """A kept study."""
    return load(RESULTS / f"study-{name}")


Pairs = list[tuple[float, float]]


def _interpolated(points: Pairs, at: float) -> float | None:
    """The second value where the first one first has a value, between neighbours; None if it never has."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def _has_finished(runs: Sequence[StudyRun]) -> bool:
    return bool(runs) and all(run.status == FINISHED for run in runs)


def _mean(runs: Sequence[StudyRun], key: str) -> float:
    """Mean over the seeds of what was measured at the end; minus infinity where a run diverged."""
    if not _has_finished(runs):
        return -math.inf
    return statistics.fmean(_number(run, key) for run in runs)


def _number(run: StudyRun, key: str) -> float:
    value = run.points[-1][key]
    assert isinstance(value, (int, float)), f"{key} is a number"
    return float(value)


def _of(found: StudyResult, series: str, setting: str) -> list[StudyRun]:
    return [run for run in found.runs if (run.series, run.setting) == (series, setting)]


def _with_best_rates(found: StudyResult) -> dict[str, list[list[StudyRun]]]:
    """By optimizer, the runs of each length, in rising order; of several rates the best on validation."""
    families: dict[str, list[str]] = {}
    for series in found.series:
        families.setdefault(series.split(":")[0], []).append(series)
    lengths = [f"steps={steps}" for steps in found.config["steps"]]
    return {
        name: [
            max(
                (_of(found, one, length) for one in own), key=lambda runs: _mean(runs, "validation")
            )
            for length in lengths
        ]
        for name, own in families.items()
    }


@dataclass(frozen=True)
class Column:
    """A value at the end of a run; ``scale`` turns what is kept into the unit of the title."""

    key: str
    title: str
    decimals: int = 2
    scale: float = 1.0


def _cell(runs: Sequence[StudyRun], column: Column) -> str:
    """Mean and standard deviation over the seeds."""
    lost = sum(run.status != FINISHED for run in runs)
    if lost:
        return f"{lost} of {len(runs)} diverged"
    return text([column.scale * _number(run, column.key) for run in runs], column.decimals)


def _title(series: str) -> str:
    """RENG, `rho_gr=0.1` of reng:rho_gr=0.1."""
    name, _, options = series.partition(":")
    known = NAMES.get(name, name)
    return f"{known}, `{options.replace(':', ', ')}`" if options else known


def ends(name: str, columns: Sequence[Column], head: Sequence[str] = ("optimizer",)) -> str:
    """What was measured at the end of the runs, a row for each setting.

    Args:
        name: Of the study.
        columns: The values.
        head: Titles of what tells the rows apart: of the series, of the setting, or of both.
    """
    found = study(name)
    rows = []
    for series in found.series:
        for setting in found.settings(series):
            both = (_title(series), setting)
            own = both if len(head) == 2 else (setting or both[0],)
            cells = [_cell(_of(found, series, setting), column) for column in columns]
            rows.append([*own, *cells])
    return markdown([*head, *(column.title for column in columns)], rows)


_KINDS = {
    "corrupted": "corrupted",
    "moved or rotated": "shifted",
    "FGSM": "fgsm",
    "PGD": "pgd",
}


def _values_at(lengths: list[list[StudyRun]], key: str, at: float) -> list[float]:
    """The values of all seeds at a clean accuracy; empty unless all come there."""
    found = []
    for same_seed in zip(*lengths, strict=True):
        if any(run.status != FINISHED for run in same_seed):
            return []
        pairs = [(_number(run, "clean"), _number(run, key)) for run in same_seed]
        value = _interpolated(pairs, at)
        if value is None:
            return []
        found.append(value)
    return found


def robustness(model: str, levels: tuple[float, ...]) -> str:
    """Accuracy on harder images at equal clean accuracy, between the lengths of training.

    Args:
        model: Of the study.
        levels: Clean accuracies, in %.
    """
    by_name = _with_best_rates(study(f"robustness-{model}"))
    rows = []
    for level in levels:
        cells = {
            name: [_values_at(lengths, key, level) for key in _KINDS.values()]
            for name, lengths in by_name.items()
        }
        best = [
            max((statistics.fmean(own[n]) for own in cells.values() if own[n]), default=math.nan)
            for n in range(len(_KINDS))
        ]
        for name, columns in cells.items():
            written = [
                text(own, 2, is_bold=statistics.fmean(own) == top) if own else "-"
                for own, top in zip(columns, best, strict=True)
            ]
            rows.append([f"{level:.1f} %", NAMES[name], *written])
    return markdown(["clean accuracy", "optimizer", *_KINDS], rows)


def label_noise() -> str:
    """Test accuracy after wrong labels: at the length that is best on held-out ones, and at the longest."""
    found = study("label-noise")
    counts, parts = found.config["steps"], found.config["wrong_percent"]
    rows = []
    for name in found.series:
        for kind in ("chosen", "longest"):
            cells = []
            for percent in parts:
                lengths = {n: _of(found, name, f"wrong={percent} steps={n}") for n in counts}
                chosen = max(counts, key=lambda n: _mean(lengths[n], "validation_accuracy"))
                steps = chosen if kind == "chosen" else counts[-1]
                own = [_number(run, f"accuracy_{percent}") for run in lengths[steps]]
                cells.append(f"{text(own, 2)} ({steps})" if kind == "chosen" else text(own, 2))
            title = NAMES[name] if kind == "chosen" else f"{NAMES[name]}, {counts[-1]} steps"
            rows.append([title, *cells])
    return markdown(["optimizer", *(f"{percent} % wrong" for percent in parts)], rows)


def _gradient_norm(model: str) -> str:
    columns = (
        Column("test_accuracy", "test accuracy, %"),
        Column("loss", "training loss", 3),
        Column("mean_gradient_norm", "norm of the gradient, mean along the way", 2),
        Column("gradient_norm", "at the end", 3),
        Column("eigenvalue", "largest eigenvalue", 1),
        Column("trace", "trace of the Hessian", 0),
    )
    return ends(f"gradient-norm-{model}", columns)


def lazy(model: str) -> str:
    """Quality and time of a step against the refresh period, AdamW's step being 1."""
    found = study(f"lazy-{model}")

    def time_of(runs: Sequence[StudyRun]) -> float:
        return statistics.median(_number(run, "ms_per_step") for run in runs)

    adamw = time_of(_of(found, "adamw", ""))
    columns = (Column("test_accuracy", ""), Column("train_loss", "", 3))
    rows = []
    for series in found.series:
        for setting in found.settings(series):
            runs = _of(found, series, setting)
            period = setting.removeprefix("refresh_every=")
            title = f"{_title(series)}, S = {period}" if period else _title(series)
            time = f"{time_of(runs) / adamw:.2f}" if _has_finished(runs) else "-"
            rows.append([title, *(_cell(runs, column) for column in columns), time])
    return markdown(["", "test accuracy, %", "training loss", "time of a step"], rows)


def by_model(name: str, models: dict[str, str]) -> str:
    """Accuracy and training loss of each setting, the models side by side.

    Args:
        name: Of the study.
        models: Series and what they are called.
    """
    found = study(name)
    rows = [
        [
            setting,
            *(_cell(_of(found, series, setting), column) for series in models for column in _END),
        ]
        for setting in found.settings(next(iter(models)))
    ]
    titles = [f"{model}: {column.title}" for model in models.values() for column in _END]
    return markdown(["RING", *titles], rows)


_VALIDATED = Column("validation_accuracy", "held-out accuracy, %")
_END = (Column("test_accuracy", "test accuracy, %"), Column("train_loss", "training loss", 3))

TABLES: dict[str, Callable[[], str]] = {
    "fine-tuning": functools.partial(
        ends,
        "fine-tuning",
        (_END[0], _VALIDATED, _END[1], Column("state_bytes", "state, MB", 1, 1e-6)),
        ("optimizer", "trained"),
    ),
    "gradient-norm-mlp": functools.partial(_gradient_norm, "mlp"),
    "lazy-mlp": functools.partial(lazy, "mlp"),
    "lazy-vit": functools.partial(lazy, "vit"),
    "lora-parts": functools.partial(ends, "lora-parts", (_VALIDATED, *_END), ("optimizer",)),
    "paper-mode": functools.partial(by_model, "paper-mode", {"ring:mlp": "MLP", "ring:vit": "ViT"}),
    "label-noise": label_noise,
    "scratch-rates": functools.partial(ends, "scratch-rates", (_VALIDATED, *_END), ("optimizer",)),
    "robustness-mlp": functools.partial(robustness, "mlp", (88.0, 88.4, 88.7)),
}
