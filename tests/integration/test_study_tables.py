# SPDX-License-Identifier: Apache-2.0
"""The tables of the studies say what their files say, also where a run diverged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grng.studies.records import Panel, StudyResult, StudyRun

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import study_tables as tables  # noqa: E402
from table_text import cells_of  # noqa: E402

KINDS = ("corrupted", "shifted", "fgsm", "pgd")


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
        return cells_of(tables.robustness("mlp", levels))

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
    assert cells_of(tables.label_noise()) == [
        ["RING", "71.00 ± 1.41 (10)"],
        ["RING, 20 steps", "91.00 ± 1.41"],
    ]


def test_ends_are_means_of_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(setting: str, seed: int, *losses: float, status: str = "finished") -> StudyRun:
        return StudyRun("ring", setting, seed, status, [{"loss": loss} for loss in losses])

    # What counts is the last point of a run.
    runs = [one("a", 0, 9.0, 1.0), one("a", 1, 2.0), one("b", 0, 3.0)]
    runs.append(one("b", 1, status="diverged"))
    monkeypatch.setattr(tables, "study", lambda name: robustness_study(*runs))
    columns = [tables.Column("loss", "loss, in thousandths", 0, 1000)]
    table = tables.ends("any", columns, ("optimizer", "part"))
    assert table.startswith("| optimizer | part | loss, in thousandths |")
    assert cells_of(table) == [["RING", "a", "1500 ± 707"], ["RING", "b", "1 of 2 diverged"]]
    assert [row[0] for row in cells_of(tables.ends("any", columns, ("part",)))] == ["a", "b"]
