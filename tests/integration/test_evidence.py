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
    # Once more: everything is there.
    before = (folder / "result.json").read_text()
    assert study("digits", "--quick", "--out", str(tmp_path)) == 0
    assert json.loads((folder / "result.json").read_text())["runs"] == json.loads(before)["runs"]


def test_quick_runs_do_not_go_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study("digits", "--quick")
    assert "--quick needs --out" in capsys.readouterr().err


@pytest.mark.parametrize("task", evidence.STUDIES)
def test_options_are_taken(task: str) -> None:
    from grng.__main__ import build_parser
    from grng.compare.cli import config_of

    for is_quick in (False, True):
        options = evidence._options(task, is_quick=is_quick)
        arguments = build_parser().parse_args(["compare", *options])
        config = config_of(arguments)
        assert config.held_out > 0
        assert config.steps == (3 if is_quick else arguments.steps)
