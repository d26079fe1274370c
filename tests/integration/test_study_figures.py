# SPDX-License-Identifier: Apache-2.0
"""What the figure of a study draws where values are missing, negative or zero, or runs diverged."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from grng.studies import plots
from grng.studies.records import Panel, StudyResult, StudyRun, Value

Points = list[dict[str, Value]]
KIND = Panel("kind", "loss", "Loss", "", "", x_scale="category")
STEP = Panel("step", "loss", "Loss", "step", "")


def result(panel: Panel, *runs: Points | None) -> StudyResult:
    """A study of one setting; None is a run that diverged."""
    made = [
        StudyRun("ring", "", seed, "finished" if points is not None else "diverged", points or [])
        for seed, points in enumerate(runs)
    ]
    return StudyResult("made-up", "Title", "Subtitle", [panel], [], {}, {}, "", runs=made)


def drawn(
    monkeypatch: pytest.MonkeyPatch, folder: Path, panel: Panel, *runs: Points | None
) -> Figure:
    """The figure, which must be drawn without a warning."""
    figures: list[Figure] = []

    def keep(**options: object) -> Figure:
        figures.append(Figure(**options))  # type: ignore[arg-type]
        return figures[-1]

    monkeypatch.setattr(plots, "Figure", keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plots.save_figure(result(panel, *runs), folder)
    assert path.stat().st_size > 5000
    return figures[-1]


def pairs(panel: Panel, *runs: Points | None) -> list[tuple[float, float, int]]:
    found = plots._pairs(result(panel, *runs), panel, "ring")
    return [(place, mean.mean, mean.seeds) for place, mean in found]


def losses(*values: float | None) -> Points:
    return [{"step": step, "loss": value} for step, value in enumerate(values, start=1)]


def test_setting_is_drawn_though_its_first_run_diverged() -> None:
    named: Points = [{"kind": "a", "loss": 1.0}, {"kind": "b", "loss": 3.0}]
    assert pairs(KIND, None, named) == [(0, 1, 1), (1, 3, 1)]


def test_names_are_kept_apart_and_may_be_missing() -> None:
    first: Points = [{"kind": "a", "loss": 1.0}, {"kind": "b"}]
    second: Points = [{"kind": "b", "loss": 3.0}, {"loss": 4.0}]
    assert pairs(KIND, first, second) == [(0, 1, 1), (1, 3, 1)]


def test_only_places_with_both_values_are_averaged() -> None:
    first = losses(8.0, None, 2.0)
    second: Points = [{"step": 1, "loss": 6.0}, {"step": 2, "loss": 5.0}, {"loss": 4.0}]
    assert pairs(STEP, first, second) == [(1, 7, 2), (2, 5, 1), (3, 2, 1)]
    # In the order of the places, whichever run has them.
    assert [place for place, *_ in pairs(STEP, losses(None, 2.0), losses(3.0, 2.0))] == [1, 2]


@pytest.mark.parametrize(
    ("scale", "values", "expected"),
    [
        ("log", (1.0, 100.0), "log"),
        ("log", (0.0, 0.0), "linear"),
        ("log", (-2.0, -1.0), "linear"),
        ("log", (None, None), "linear"),
        ("symlog", (-3.0, 200.0), "symlog"),
        ("symlog", (0.0, 0.0), "linear"),
        ("symlog", (0.0, 200.0), "symlog"),
        ("symlog", (3.0, 200.0), "log"),
        ("symlog", (1e-3, 200.0), "symlog"),
    ],
)
def test_scale_has_a_place_for_the_values(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    scale: str,
    values: tuple[float | None, ...],
    expected: str,
) -> None:
    panel = Panel("step", "loss", "Loss", "step", "", y_scale=scale)
    figure = drawn(monkeypatch, tmp_path, panel, losses(*values))
    assert figure.axes[0].get_yscale() == expected


@pytest.mark.parametrize(
    ("names", "is_slanted"),
    [(("a", "b"), False), (("no trust\nregion",) * 4, False), (("empirical",) * 6, True)],
)
def test_names_without_room_are_slanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: tuple[str, ...], is_slanted: bool
) -> None:
    points: Points = [{"kind": f"{name}{n}", "loss": 1.0} for n, name in enumerate(names)]
    figure = drawn(monkeypatch, tmp_path, KIND, points)
    assert [bool(label.get_rotation()) for label in figure.axes[0].get_xticklabels()] == [
        is_slanted
    ] * len(names)


def test_places_at_zero_are_drawn_on_a_linear_axis(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    panel = Panel("step", "loss", "Loss", "step", "", x_scale="log")
    figure = drawn(monkeypatch, tmp_path, panel, [{"step": 0, "loss": 1.0}])
    assert figure.axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("panel", [KIND, STEP])
@pytest.mark.parametrize(
    ("others", "expected"),
    [((), "ring\n(1 of 1 diverged)"), (([],), "ring\n(1 of 2 diverged)")],
)
def test_diverged_runs_are_marked(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    panel: Panel,
    others: tuple[Points, ...],
    expected: str,
) -> None:
    figure = drawn(monkeypatch, tmp_path, panel, None, *others)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [expected]


def test_runs_that_finished_are_not_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = drawn(monkeypatch, tmp_path, STEP, losses(1.0))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ring"]
