# SPDX-License-Identifier: Apache-2.0
"""The tables of evidence and studies say what their files say, also where a run diverged."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

from grng.studies.records import Panel, StudyResult, StudyRun

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence_tables as tables  # noqa: E402

KINDS = ("corrupted", "shifted", "fgsm", "pgd")


def cells(table: str) -> list[list[str]]:
    """The rows below the head."""
    lines = table.strip().split("\n")[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def kept(task: str) -> dict[str, list[float]]:
    """Test accuracy of each spec, read from the file without the code of the tables."""
    file = tables.RESULTS / f"evidence-{task}" / "result.json"
    found: dict[str, list[float]] = {}
    for run in json.loads(file.read_text())["runs"]:
        value = 100 * run["epochs"][-1]["test_accuracy"]
        found.setdefault(run["optimizer"], []).append(value)
    return found


def test_accuracy_is_that_of_the_files() -> None:
    place = 1 + tables.tasks().index("digits")
    written = {row[0]: row[place].strip("*") for row in cells(tables.accuracy())}
    found = kept("digits")
    adamw = next(own for label, own in found.items() if label.startswith("adamw:"))
    expected = f"{statistics.fmean(adamw):.2f} ± {statistics.stdev(adamw):.2f}"
    assert written["AdamW"] == expected
    ring = found["ring"]
    assert (
        written["RING, defaults"] == f"{statistics.fmean(ring):.2f} ± {statistics.stdev(ring):.2f}"
    )
    assert written["RING"] != written["RING, defaults"]


def test_one_of_those_searched_for_is_bold() -> None:
    rows = cells(tables.accuracy())
    for column in range(1, len(rows[0])):
        bold = [row[0] for row in rows if row[column].startswith("**")]
        assert len(bold) == 1
        assert "defaults" not in bold[0]


def test_search_has_the_best_and_the_worst_trial() -> None:
    file = tables.RESULTS / "evidence-digits" / "tune-adamw" / "tune.json"
    trials = json.loads(file.read_text())["trials"]
    values = sorted(100 * trial["values"][-1] for trial in trials if trial["status"] == "finished")
    place = 1 + tables.tasks().index("digits")
    written = {row[0]: row[place] for row in cells(tables.search())}["AdamW"].split(" / ")
    assert written[0] == f"{values[-1]:.1f}"
    assert written[2] == f"{values[0]:.1f}"


def run(series: str, steps: int, status: str = "finished", **values: float) -> StudyRun:
    points = [{"steps": steps, **values}] if status == "finished" else []
    return StudyRun(series, f"steps={steps}", 0, status, points)


def robustness_study(*runs: StudyRun) -> StudyResult:
    panel = Panel("clean", "pgd", "", "", "")
    return StudyResult(
        "robustness-mlp", "", "", [panel], [], {"steps": [10, 20]}, {}, "", "finished", list(runs)
    )


def robust(clean: float, value: float, validation: float) -> dict[str, float]:
    return {"clean": clean, "validation": validation, **dict.fromkeys(KINDS, value)}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The rows of the table of a study made of these runs."""

    def rows(*runs: StudyRun, levels: tuple[float, ...] = (85.0,)) -> list[list[str]]:
        monkeypatch.setattr(tables, "study", lambda name: robustness_study(*runs))
        return cells(tables.robustness("mlp", levels))

    return rows


def test_equal_accuracy_lies_between_two_lengths(shown) -> None:  # type: ignore[no-untyped-def]
    rows = shown(
        run("ring", 10, **robust(84.0, 60.0, 1.0)),
        run("ring", 20, **robust(88.0, 64.0, 1.0)),
        run("adamw:lr=1", 10, **robust(80.0, 10.0, 1.0)),
        run("adamw:lr=1", 20, **robust(90.0, 20.0, 3.0)),
        # A better rate at 10 steps and a worse one at 20, by validation and not by what is shown.
        run("adamw:lr=2", 10, **robust(80.0, 50.0, 2.0)),
        run("adamw:lr=2", 20, **robust(90.0, 99.0, 2.0)),
    )
    assert rows == [
        ["85.0 %", "RING", *["**61.00**"] * 4],
        ["85.0 %", "AdamW", *["35.00"] * 4],
    ]


def test_what_never_comes_there_or_diverged_has_no_value(shown) -> None:  # type: ignore[no-untyped-def]
    rows = shown(
        run("ring", 10, **robust(84.0, 60.0, 1.0)),
        run("ring", 20, status="diverged"),
        run("adamw", 10, **robust(80.0, 10.0, 1.0)),
        run("adamw", 20, **robust(84.0, 20.0, 1.0)),
    )
    assert [row[2:] for row in rows] == [["-"] * 4] * 2


def test_wrong_labels_are_shown_at_the_chosen_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(steps: int, seed: int, accuracy: float, validation: float) -> StudyRun:
        point = {"steps": steps, "accuracy_20": accuracy, "validation_accuracy": validation}
        return StudyRun("ring", f"wrong=20 steps={steps}", seed, "finished", [dict(point)])

    runs = [one(10, 0, 70.0, 50.0), one(10, 1, 72.0, 52.0), one(20, 0, 90.0, 40.0)]
    runs.append(one(20, 1, 92.0, 42.0))
    result = robustness_study(*runs)
    result.config = {"steps": [10, 20], "wrong_percent": [20]}
    monkeypatch.setattr(tables, "study", lambda name: result)
    assert cells(tables.label_noise()) == [
        ["RING", "71.00 ± 1.41 (10)"],
        ["RING, 20 steps", "91.00 ± 1.41"],
    ]
