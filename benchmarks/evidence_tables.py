# SPDX-License-Identifier: Apache-2.0
"""Tables of ``evidence.py``, from the results that are kept."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path

from evidence import OURS, SHORT, STUDIES
from table_text import markdown, text

from grng.compare.records import FINISHED, RunRecord
from grng.compare.results import ComparisonResult, load
from grng.tune.records import load as load_search

RESULTS = Path(__file__).parent / "results"
NAMES = {
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
    names = [name for name in NAMES if any(labels(task, name) for task in tasks())]
    return [
        (name, kind)
        for name in names
        for kind in (("defaults", "tuned") if name in OURS else ("tuned",))
    ]


def _score(task: str, value: float) -> float:
    return -value if _by_loss(task) else value


def accuracy() -> str:
    """Test accuracy of every optimizer on every task; bold the best mean of those that were searched for."""
    columns = []
    for task in tasks():
        found = {
            row: values(task, labels(task, row[0])[row[1]])
            for row in _rows()
            if row[1] in labels(task, row[0])
        }
        # Defaults beside them would give ours a second chance.
        tuned = [own for (_, kind), own in found.items() if own and kind == "tuned"]
        best = max(_score(task, statistics.fmean(own)) for own in tuned)
        decimals = 3 if _by_loss(task) else 2
        column = {}
        for row, own in found.items():
            is_best = (
                row[1] == "tuned" and bool(own) and _score(task, statistics.fmean(own)) == best
            )
            column[row] = text(own, decimals, is_bold=is_best) if own else "diverged"
        columns.append(column)
    rows = []
    for row in _rows():
        name, kind = row
        title = f"{NAMES[name]}, defaults" if kind == "defaults" else NAMES[name]
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
        f"{NAMES[name]}, defaults" if kind == "defaults" else NAMES[name] for name, kind in names
    ]
    rows = []
    for task in tasks():
        known = [labels(task, name).get(kind) for name, kind in names]
        rows.append([_HEADINGS[task], *("-" if own is None else _part(task, own) for own in known)])
    return markdown(["task", *heads], rows)


def _short_of(task: str, label: str) -> dict[int, list[float]]:
    """Values of a spec by percent of the steps, each with the whole schedule; without what was not run."""
    folder = RESULTS / f"evidence-{task}"
    kept = [percent for percent in SHORT if (folder / f"short-{percent}" / "result.json").is_file()]
    parts = {percent: values(task, label, f"short-{percent}") for percent in kept}
    return {**parts, 100: values(task, label)}


def short() -> str:
    """Test values of shorter runs, each with its whole schedule; bold what reaches AdamW's longest."""
    rows = []
    for task in tasks():
        if not _short_of(task, labels(task, _REFERENCE)["tuned"]).keys() & set(SHORT):
            continue
        decimals = 3 if _by_loss(task) else 2
        target = statistics.fmean(values(task, labels(task, _REFERENCE)["tuned"]))
        lines = [("ring", "defaults"), ("ring", "tuned"), (_REFERENCE, "tuned")]
        for name, kind in lines:
            known = labels(task, name)
            label = known.get(kind)
            # Where the search found nothing better, the defaults are what it found.
            if label is None or (kind == "tuned" and label == known.get("defaults")):
                continue
            cells = []
            by_percent = _short_of(task, label)
            for percent in (*SHORT, 100):
                own = by_percent.get(percent)
                if own is None:
                    cells.append("-")
                    continue
                is_there = bool(own) and _score(task, statistics.fmean(own)) >= _score(task, target)
                cells.append(text(own, decimals, is_bold=is_there) if own else "diverged")
            title = f"{NAMES[name]}, defaults" if kind == "defaults" else NAMES[name]
            rows.append([_HEADINGS[task], title, *cells])
    return markdown(["task", "optimizer", *(f"{p} % of the steps" for p in SHORT), "all"], rows)


def _reached(task: str, label: str) -> int | None:
    """The shortest length, in percent of the steps, whose mean reaches that of AdamW's longest runs."""
    target = _score(task, statistics.fmean(values(task, labels(task, _REFERENCE)["tuned"])))
    for percent, own in _short_of(task, label).items():
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
        known = labels(task, "ring")
        parts = [_reached(task, known[kind]) for kind in ("defaults", "tuned") if kind in known]
        cells = [
            "not reached" if percent is None else f"{ratio * percent / 100:.2f} ({percent} %)"
            for percent in parts
        ]
        rows.append(
            [
                _HEADINGS[task],
                *(f"{step[name]:.1f}" for name in (_REFERENCE, "ring")),
                f"{ratio:.2f}",
                cells[0],
                cells[-1],
            ]
        )
    steps = "(of the steps)"
    head = ["task", "AdamW, ms a step", "RING, ms a step", "ratio"]
    return markdown([*head, f"time {steps}, defaults", f"time {steps}, RING"], rows)


def search() -> str:
    """What the settings that were tried gave: the best, the middle and the worst on validation samples."""
    columns = []
    for task in tasks():
        scale, decimals = (1, 2) if _by_loss(task) else (100, 1)
        column = {}
        for name in NAMES:
            folder = RESULTS / f"evidence-{task}" / f"tune-{name}"
            if not (folder / "tune.json").is_file():
                continue
            found = load_search(folder)
            known = sorted(found.score(t) for t in found.trials if t.value is not None)
            lost = len(found.trials) - len(known)
            if not known:
                column[name] = "all diverged"
                continue
            three = (known[-1], statistics.median_low(known), known[0])
            written = " / ".join(f"{scale * abs(score):.{decimals}f}" for score in three)
            column[name] = f"{written} ({lost} diverged)" if lost else written
        columns.append(column)
    names = [name for name in NAMES if any(name in column for column in columns)]
    rows = [[NAMES[name], *(column.get(name, "-") for column in columns)] for name in names]
    return markdown(["optimizer", *(_HEADINGS[task] for task in tasks())], rows)


TABLES: dict[str, Callable[[], str]] = {
    "evidence-accuracy": accuracy,
    "evidence-speed": speed,
    "evidence-search": search,
    "evidence-short": short,
    "evidence-time": wall_clock,
}
