# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/paper_tables.py`` on small files: what it needs, what it runs, what it prints."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from benchmarks import paper_tables
from grng.__main__ import build_parser
from grng.tasks import TASKS, hub
from tests.integration import paper_files as small

needs_libraries = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in hub.LIBRARIES),
    reason="needs datasets, transformers, peft and pillow (scripts/setup.sh installs them)",
)


@needs_libraries
def test_quick_table_of_one_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_roberta(tmp_path)
    small.write_texts(tmp_path / "qnli", ("question", "sentence"), [0, 1])
    out = tmp_path / "out"
    command = ["--table", "glue", "--task", "qnli", "--quick", "--device", "cpu"]
    command += ["--data-dir", str(tmp_path), "--out", str(out)]
    assert paper_tables.main(command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["paper-qnli", "paper-qnli-one-by-one"]
    printed = capsys.readouterr().out
    before = printed[: printed.index("paper-qnli:")]
    for words in ("download: 0.5 GB of weights", "GPU memory: 10 GB", "GPU hours", "Estimates"):
        assert words in before
    assert paper_tables.NOTHING_YET in before
    table = [line for line in printed.splitlines() if line.startswith("| ")][-3:]
    names = ["task", "measure", "RING", "RENG", "AdamW", "KFAC", "RKalman", "published"]
    assert [cell.strip() for cell in table[0].split("|")][1:9] == names
    cells = [cell.strip() for cell in table[2].split("|")][1:-1]
    assert (cells[0], cells[7], cells[8]) == ("qnli", "91.5 (RING)", paper_tables.WEAK)
    found = json.loads((out / "paper-qnli-one-by-one" / "result.json").read_text())
    (row,) = found["summary"]["rows"]
    assert (found["config"]["batch_size"], row["seeds_finished"]) == (1, 2)
    mean, spread = 100 * row["final_accuracy"], 100 * row["final_accuracy_std"]
    assert cells[6] == f"{mean:.2f} ± {spread:.2f}"
    # AdamW's best of three rates, and none is left out.
    rows = json.loads((out / "paper-qnli" / "result.json").read_text())["summary"]["rows"]
    (best,) = (r for r in rows if r["optimizer"].startswith("adamw") and r["is_selected"])
    assert cells[4].startswith(f"{100 * best['final_accuracy']:.2f} ± ")
    assert "-" not in cells[2:7]
    # What is there is not run again, and a result of other settings is not taken for this one.
    assert paper_tables.main(command) == 0
    assert table[2] in capsys.readouterr().out
    again = json.loads((out / "paper-qnli-one-by-one" / "result.json").read_text())
    assert again["runs"] == found["runs"]
    whole = [part for part in command if part != "--quick"]
    assert paper_tables.main(whole) == 1  # these data are too few
    assert f"| qnli | accuracy |{' - |' * 5}" in capsys.readouterr().out


def test_missing_data_leaves_the_cell_empty_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_tables, "grng", lambda options: 1)
    out = ["--out", str(tmp_path / "out"), "--quick"]
    assert paper_tables.main(["--table", "images", "--task", "food101", *out]) == 1
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][-1]
    assert last == f"| food101 | accuracy |{' - |' * 5} 86.2 (R-Kalman) | {paper_tables.WEAK} |"


def test_every_task_of_the_papers_is_in_a_table_and_its_commands_are_valid() -> None:
    listed = [task for table in paper_tables.TABLES.values() for task in table]
    roberta_or_vit = [n for n, t in TASKS.items() if set(t.models) & {"roberta", "vit-b16"}]
    assert listed == roberta_or_vit
    for table, studies in paper_tables.TABLES.items():
        for task, study in studies.items():
            # As the description of the task says it.
            assert f" {study.samples:,} train" in TASKS[task].description
            assert paper_tables.hours(table, study) > 0.1
            for is_quick in (False, True):
                for options in paper_tables.commands(task, study, is_quick=is_quick).values():
                    given = build_parser().parse_args(options)
                    assert given.task == task


def test_implausible_figure_is_no_target() -> None:
    study = paper_tables.TABLES["glue"]["mnli"]
    assert "no target" in study.trust and "implausible" in study.trust


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--table images --task sst2", "--task of table images must be one of cifar10, "),
        ("--table glue --quick", "--quick needs --out"),
    ],
)
def test_wrong_arguments(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        paper_tables.main(shlex.split(options))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
