# SPDX-License-Identifier: Apache-2.0
"""The quick form of the study that tunes every optimizer and tests it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402

ONE = ("digits", "--quick", "--optimizers")


def study(*options: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evidence.py", *options])
        return evidence.main()


def test_every_optimizer_is_searched_and_what_was_found_is_tested(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    assert study("digits", "--quick", "--out", str(tmp_path)) == 0
    folder = tmp_path / "evidence-digits"
    found = json.loads((folder / "result.json").read_text())
    names = {run["optimizer"].split(":")[0] for run in found["runs"]}
    assert names == set(evidence.OPTIMIZERS)
    for name in evidence.OPTIMIZERS:
        search = json.loads((folder / f"tune-{name}" / "tune.json").read_text())
        assert [len(search["trials"]), search["config"]["budget"]] == [2, 2]
    best = {json.loads(p.read_text())["best"]["optimizer"] for p in folder.glob("*/tune.json")}
    assert best <= {run["optimizer"] for run in found["runs"]}
    for percent in evidence.SHORT:
        brief = json.loads((folder / f"short-{percent}" / "result.json").read_text())
        names = {run["optimizer"].split(":")[0] for run in brief["runs"]}
        assert names == {"ring", "adamw"}
    # Once more: everything is there.
    before = (folder / "result.json").read_text()
    assert study("digits", "--quick", "--out", str(tmp_path)) == 0
    assert json.loads((folder / "result.json").read_text())["runs"] == json.loads(before)["runs"]


def test_steps_are_timed(tmp_path: Path) -> None:
    assert study(*ONE, "adamw,ring", "--stage", "time", "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "evidence-digits" / "time" / "result.json").read_text())
    rows = {row["optimizer"]: row["ms_per_step_total"] for row in found["summary"]["rows"]}
    assert set(rows) == {"ring", "adamw"}
    assert min(rows.values()) > 0


def test_one_length_of_the_shorter_runs_can_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (*ONE, "adamw", "--out", str(tmp_path), "--stage")
    assert study(*given, "tune") == 0
    assert study(*given, "short", "--percent", "50") == 0
    folders = sorted(p.name for p in (tmp_path / "evidence-digits").glob("short-*"))
    assert folders == ["short-50"]
    with pytest.raises(SystemExit):
        study(*given, "short", "--percent", "50,51")
    assert "must be of 25, 40, 50, 65, got '50,51'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study(*given, "test", "--percent", "50")
    assert "--percent is of stage short, got --stage test" in capsys.readouterr().err


def test_quick_runs_do_not_go_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study("digits", "--quick")
    assert "--quick needs --out" in capsys.readouterr().err


def test_names_are_checked_before_the_first_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        study(*ONE, "adamw,adam", "--out", str(tmp_path))
    assert caught.value.code == 2
    assert "got 'adam'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert study(*ONE, "adamw, sgd", "--stage", "tune", "--out", str(tmp_path)) == 0
    found = sorted(folder.name for folder in (tmp_path / "evidence-digits").iterdir())
    assert found == ["tune-adamw", "tune-sgd"]


def test_only_complete_searches_are_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (*ONE, "sgd", "--out", str(tmp_path), "--stage")
    assert study(*given, "test") == 2
    assert "tune-sgd: No such file" in capsys.readouterr().err
    assert study(*given, "tune") == 0
    file = tmp_path / "evidence-digits" / "tune-sgd" / "tune.json"
    whole = json.loads(file.read_text())
    for change in ({"status": "interrupted"}, {"trials": whole["trials"][:1]}):
        file.write_text(json.dumps({**whole, **change}))
        with pytest.raises(SystemExit, match="must be finished with 2 trials, got"):
            study(*given, "test")
    assert not (tmp_path / "evidence-digits" / "result.json").exists()


def test_stage_that_has_nothing_to_compare_says_so(tmp_path: Path) -> None:
    given = (*ONE, "sgd", "--out", str(tmp_path), "--stage")
    with pytest.raises(SystemExit, match="stage short is of ring and adamw: --optimizers has neit"):
        study(*given, "short")
    assert study(*given, "tune") == 0
    file = tmp_path / "evidence-digits" / "tune-sgd" / "tune.json"
    whole = json.loads(file.read_text())
    trials = [{**trial, "status": "diverged"} for trial in whole["trials"]]
    file.write_text(json.dumps({**whole, "trials": trials}))
    with pytest.raises(SystemExit, match="nothing to compare: no search found a setting"):
        study(*given, "test")


def test_missing_data_is_not_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*ONE, "sgd", "--out", str(tmp_path), "--stage", "tune")
    monkeypatch.setattr(evidence, "grng", lambda _: 1)
    with pytest.raises(SystemExit) as caught:
        study(*given)
    assert caught.value.code == 1


@pytest.mark.parametrize("task", evidence.STUDIES)
def test_options_are_taken(task: str) -> None:
    from grng.__main__ import build_parser
    from grng.compare.cli import config_of

    steps = {}
    for others in ((), evidence._LOOKS, evidence._QUICK):
        options = evidence._options(task, others)
        assert len(set(options[::2])) == len(options[::2]), "an option is given twice"
        config = config_of(build_parser().parse_args(["compare", *options]))
        assert config.held_out > 0
        steps[others] = config.steps
    assert steps[evidence._QUICK] == 3
    assert steps[evidence._LOOKS] == steps[()]
