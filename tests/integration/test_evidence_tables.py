# SPDX-License-Identifier: Apache-2.0
"""The tables of evidence say what their files say."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence_tables as tables  # noqa: E402
from table_text import cells_of  # noqa: E402


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
    written = {row[0]: row[place].strip("*") for row in cells_of(tables.accuracy())}
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
    rows = cells_of(tables.accuracy())
    for column in range(1, len(rows[0])):
        bold = [row[0] for row in rows if row[column].startswith("**")]
        assert len(bold) == 1
        assert "defaults" not in bold[0]


def test_search_has_the_best_and_the_worst_trial() -> None:
    file = tables.RESULTS / "evidence-digits" / "tune-adamw" / "tune.json"
    trials = json.loads(file.read_text())["trials"]
    values = sorted(100 * trial["values"][-1] for trial in trials if trial["status"] == "finished")
    place = 1 + tables.tasks().index("digits")
    written = {row[0]: row[place] for row in cells_of(tables.search())}["AdamW"].split(" / ")
    assert written[0] == f"{values[-1]:.1f}"
    assert written[2] == f"{values[0]:.1f}"
