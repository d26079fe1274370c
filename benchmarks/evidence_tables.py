# SPDX-License-Identifier: Apache-2.0
"""Tables of ``evidence.py`` and of the studies, from the results that are kept."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from evidence import OURS, SHORT, STUDIES
from table_text import markdown, text

from grng.compare.records import FINISHED, RunRecord
from grng.compare.results import ComparisonResult, load
from grng.studies.records import StudyResult, StudyRun
from grng.studies.records import load as load_study
from grng.tune.records import load as load_search

RESULTS = Path(__file__).parent / "results"
_NAMES = {
    "ring": "RING",
    "reng": "RENG",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "sgd": "SGD",
    "kfac": "KFAC",
    "sophiag": "SophiaG",
}
_HEADINGS = {
    "digits": "digits, MLP",
    "mlp": "Fashion-MNIST, MLP",
    "resnet": "Fashion-MNIST, ResNet",
    "vit": "Fashion-MNIST, ViT",
    "char": "characters, transformer (loss)",
    "authors": "authors, MiniLM + LoRA",
    "plays": "plays, MiniLM + LoRA",
}
_REFERENCE = "adamw"


def tasks() -> list[str]:
    """The tasks whose evidence is there."""
    return [task for task in STUDIES if (RESULTS / f"evidence-{task}" / "result.json").is_file()]


@functools.cache
def result(task: str, part: str = "") -> ComparisonResult:
    """The comparison of a task; ``part`` is "short-65" for that of fewer steps."""
    return load(RESULTS / f"evidence-{task}" / part)


def _by_loss(task: str) -> bool:
    return result(task).measure.name == "loss"


def _value(task: str, run: RunRecord) -> float:
    end = run.epochs[-1]
    found = end.test_loss if _by_loss(task) else end.test_accuracy
    assert found is not None, "the test set is looked at when a run ends"
    return found if _by_loss(task) else 100 * found


def values(task: str, label: str, part: str = "") -> list[float]:
    """Test accuracy in %, or loss, of each seed; empty where a run did not finish."""
    runs = [run for run in result(task, part).runs if run.optimizer == label]
    if any(run.status != FINISHED for run in runs):
        return []
    return [_value(task, run) for run in runs]


def labels(task: str, name: str) -> dict[str, str]:
    """``"tuned"`` and, of ours, ``"defaults"`` with their specs; none that was not compared."""
    own = [label for label in result(task).labels if label.split(":")[0] == name]
    found = {"tuned" if ":" in label else "defaults": label for label in own}
    if name in OURS and "tuned" in found:
        # Where the search found nothing better than the defaults, both are one.
        found.setdefault("defaults", found["tuned"])
    return found


def _rows() -> list[tuple[str, str]]:
    names = [name for name in _NAMES if any(labels(task, name) for task in tasks())]
    return [
        (name, kind)
        for name in names
        for kind in (("defaults", "tuned") if name in OURS else ("tuned",))
    ]


def _score(task: str, value: float) -> float:
    return -value if _by_loss(task) else value


def accuracy() -> str:
    """Test accuracy of every optimizer on every task; bold the best mean."""
    columns = []
    for task in tasks():
        found = {
            row: values(task, labels(task, row[0])[row[1]])
            for row in _rows()
            if row[1] in labels(task, row[0])
        }
        best = max(_score(task, statistics.fmean(own)) for own in found.values() if own)
        decimals = 3 if _by_loss(task) else 2
        column = {}
        for row, own in found.items():
            is_best = bool(own) and _score(task, statistics.fmean(own)) == best
            column[row] = text(own, decimals, is_bold=is_best) if own else "diverged"
        columns.append(column)
    rows = []
    for row in _rows():
        name, kind = row
        title = f"{_NAMES[name]}, defaults" if kind == "defaults" else _NAMES[name]
        rows.append([title, *(column.get(row, "-") for column in columns)])
    links = [
        f"[{_HEADINGS[task]}](benchmarks/results/evidence-{task}/result.json)" for task in tasks()
    ]
    return markdown(["optimizer", *links], rows)


def _part(task: str, label: str) -> str:
    row = next(row for row in result(task).summary().rows if row.optimizer == label)
    parts = (row.part_of_steps_to_target, row.part_of_steps_to_train_loss)
    first, second = ("never" if part is None else f"{part:.2f}" for part in parts)
    return f"{first} ({second})"


def speed() -> str:
    """In what part of the steps AdamW's final values are reached."""
    names = [row for row in _rows() if row[0] != _REFERENCE]
    names = [row for row in names if row[0] in (*OURS, "muon", "soap")]
    heads = [
        f"{_NAMES[name]}, defaults" if kind == "defaults" else _NAMES[name] for name, kind in names
    ]
    rows = []
    for task in tasks():
        known = [labels(task, name).get(kind) for name, kind in names]
        rows.append([_HEADINGS[task], *("-" if own is None else _part(task, own) for own in known)])
    return markdown(["task", *heads], rows)


def _short_of(task: str, label: str) -> list[list[float]]:
    """Values of a spec after each part of the steps, with the whole schedule, and after all of them."""
    parts = [values(task, label, f"short-{percent}") for percent in SHORT]
    return [*parts, values(task, label)]


def short() -> str:
    """Test values of shorter runs, each with its whole schedule; bold what reaches AdamW's longest."""
    rows = []
    for task in tasks():
        if not (RESULTS / f"evidence-{task}" / f"short-{SHORT[-1]}" / "result.json").is_file():
            continue
        decimals = 3 if _by_loss(task) else 2
        target = statistics.fmean(values(task, labels(task, _REFERENCE)["tuned"]))
        lines = [("ring", "defaults"), ("ring", "tuned"), (_REFERENCE, "tuned")]
        for name, kind in lines:
            label = labels(task, name).get(kind)
            if label is None:
                continue
            cells = []
            for own in _short_of(task, label):
                is_there = bool(own) and _score(task, statistics.fmean(own)) >= _score(task, target)
                cells.append(text(own, decimals, is_bold=is_there) if own else "diverged")
            title = f"{_NAMES[name]}, defaults" if kind == "defaults" else _NAMES[name]
            rows.append([_HEADINGS[task], title, *cells])
    return markdown(["task", "optimizer", *(f"{p} % of the steps" for p in SHORT), "all"], rows)


def _reached(task: str, label: str) -> int | None:
    """The shortest length, in percent of the steps, whose mean reaches that of AdamW's longest runs."""
    target = _score(task, statistics.fmean(values(task, labels(task, _REFERENCE)["tuned"])))
    for percent, own in zip((*SHORT, 100), _short_of(task, label), strict=True):
        if own and _score(task, statistics.fmean(own)) >= target:
            return percent
    return None


def wall_clock() -> str:
    """What a step takes, on an idle machine, and with it the time that RING takes to where AdamW ends."""
    rows = []
    for task in tasks():
        if not (RESULTS / f"evidence-{task}" / "time" / "result.json").is_file():
            continue
        runs = result(task, "time").runs
        step = {
            name: statistics.median(r.ms_per_step.total for r in runs if r.optimizer == name)
            for name in ("ring", _REFERENCE)
        }
        ratio = step["ring"] / step[_REFERENCE]
        percent = _reached(task, labels(task, "ring")["defaults"])
        rows.append(
            [
                _HEADINGS[task],
                *(f"{step[name]:.1f}" for name in (_REFERENCE, "ring")),
                f"{ratio:.2f}",
                "not reached" if percent is None else f"{percent} %",
                "-" if percent is None else f"{ratio * percent / 100:.2f}",
            ]
        )
    head = ["task", "AdamW, ms a step", "RING, ms a step", "ratio", "steps needed", "time needed"]
    return markdown(head, rows)


def search() -> str:
    """What the settings that were tried gave: the best, the middle and the worst on validation samples."""
    columns = []
    for task in tasks():
        scale, decimals = (1, 2) if _by_loss(task) else (100, 1)
        column = {}
        for name in _NAMES:
            folder = RESULTS / f"evidence-{task}" / f"tune-{name}"
            if not (folder / "tune.json").is_file():
                continue
            found = load_search(folder)
            known = sorted(found.score(t) for t in found.trials if t.value is not None)
            three = (known[-1], statistics.median_low(known), known[0])
            written = " / ".join(f"{scale * abs(score):.{decimals}f}" for score in three)
            lost = len(found.trials) - len(known)
            column[name] = f"{written} ({lost} diverged)" if lost else written
        columns.append(column)
    names = [name for name in _NAMES if any(name in column for column in columns)]
    rows = [[_NAMES[name], *(column.get(name, "-") for column in columns)] for name in names]
    return markdown(["optimizer", *(_HEADINGS[task] for task in tasks())], rows)


# ---- studies ----


@functools.cache
def study(name: str) -> StudyResult:
    """A kept study."""
    return load_study(RESULTS / f"study-{name}")


def by_setting(
    name: str, columns: dict[str, tuple[str, int]], *, place: int = -1, heading: str = "setting"
) -> str:
    """A row for each series and setting of a study, with the values at one place of its runs.

    Args:
        name: Of the study.
        columns: By heading, the key of the points and how many decimals.
        place: Which point of a run; the last unless said otherwise.
        heading: Of the column with the settings.
    """
    found = study(name)
    rows = []
    for series in found.series:
        for setting in found.settings(series):
            cells = []
            for key, decimals in columns.values():
                means = found.means(series, setting, key)
                cells.append(
                    f"{means[place].mean:.{decimals}f} ± {means[place].deviation:.{decimals}f}"
                    if means
                    else "diverged"
                )
            rows.append([f"`{series}`", setting or "-", *cells])
    return markdown(["optimizer", heading, *columns], rows)


def _interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """The second value where the first one first has a value, between two neighbours.

    Raises:
        ValueError: There are no such neighbours.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    raise ValueError(f"no runs on both sides of {at}: {points}")


Pairs = list[tuple[float, float]]


def _at_equal_accuracy(
    pairs: dict[str, dict[str, list[Pairs]]], kinds: Sequence[str]
) -> tuple[float, list[list[str]]]:
    """Values of each kind where the clean accuracy is that of AdamW's longest runs.

    Args:
        pairs: By optimizer and kind, of each seed the clean accuracy and the value by length of training.
        kinds: Headings, in order.

    Returns:
        The clean accuracy, and the rows.
    """
    at = statistics.fmean(own[-1][0] for own in pairs[_REFERENCE][kinds[0]])
    cells: dict[str, list[list[float]]] = {}
    for series, own in pairs.items():
        cells[series] = [
            [
                # AdamW's own seeds end around their mean, not all above it.
                seed[-1][1] if series == _REFERENCE else _interpolated(seed, at)
                for seed in own[kind]
            ]
            for kind in kinds
        ]
    best = [max(statistics.fmean(own[n]) for own in cells.values()) for n in range(len(kinds))]
    rows = [
        [
            _NAMES[series],
            *(
                text(values, 2, is_bold=statistics.fmean(values) == top)
                for values, top in zip(own_cells, best, strict=True)
            ),
        ]
        for series, own_cells in cells.items()
    ]
    return at, rows


def _number(run: StudyRun, key: str) -> float:
    value = run.points[-1][key]
    assert isinstance(value, (int, float)), f"{key} is a number"
    return float(value)


def _seeds(found: StudyResult) -> list[int]:
    return sorted({run.seed for run in found.runs})


_KINDS = {
    "corrupted": "corrupted",
    "moved or rotated": "shifted",
    "FGSM": "fgsm",
    "PGD": "pgd",
}


def robustness(model: str) -> str:
    """Accuracy on harder images where the clean accuracy is that of AdamW's longest runs."""
    found = study(f"robustness-{model}")

    def pairs(series: str, key: str, seed: int) -> Pairs:
        own = [run for run in found.runs if (run.series, run.seed) == (series, seed)]
        own.sort(key=lambda run: _number(run, "steps"))
        return [(_number(run, "clean"), _number(run, key)) for run in own]

    by_kind = {
        series: {
            kind: [pairs(series, key, seed) for seed in _seeds(found)]
            for kind, key in _KINDS.items()
        }
        for series in found.series
    }
    at, rows = _at_equal_accuracy(by_kind, list(_KINDS))
    return markdown([f"at {at:.2f} % clean", *_KINDS], rows)


def label_noise() -> str:
    """Test accuracy after wrong labels where that after right ones is AdamW's longest runs'."""
    found = study("label-noise")
    counts, parts = found.config["steps"], found.config["wrong_percent"][1:]

    def value(series: str, percent: int, steps: int, seed: int) -> float:
        key = (series, f"wrong={percent} steps={steps}", seed)
        return _number(next(run for run in found.runs if run.key == key), f"accuracy_{percent}")

    by_kind = {
        series: {
            f"{percent} % wrong": [
                [(value(series, 0, n, seed), value(series, percent, n, seed)) for n in counts]
                for seed in _seeds(found)
            ]
            for percent in parts
        }
        for series in found.series
    }
    at, rows = _at_equal_accuracy(by_kind, [f"{percent} % wrong" for percent in parts])
    return markdown([f"at {at:.2f} % with right labels", *by_kind[_REFERENCE]], rows)


TABLES: dict[str, Callable[[], str]] = {
    "evidence-accuracy": accuracy,
    "evidence-speed": speed,
    "evidence-search": search,
    "evidence-short": short,
    "evidence-time": wall_clock,
    "label-noise": label_noise,
    "robustness-mlp": functools.partial(robustness, "mlp"),
}
