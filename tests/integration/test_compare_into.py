# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare --into``: an interrupted comparison goes on, and only as it was begun."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from grng.__main__ import main
from grng.compare import cli, environment

RUN = ("--task", "digits", "--steps", "4", "--batch-size", "32", "--hidden", "8", "--no-progress")


def compare(*options: str, specs: str = "adamw,sgd") -> int:
    return main(["compare", *RUN, "--optimizers", specs, "--seeds", "0,1", *options])


def runs(folder: Path) -> list[Any]:
    """What does not depend on the clock."""
    found = json.loads((folder / "result.json").read_text())
    return [
        (run["optimizer"], run["seed"], run["status"], run["step_loss"]) for run in found["runs"]
    ]


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a comparison that was stopped in its third run of four."""
    execute, calls = cli.execute, []

    def stop(spec: Any, record: Any, *arguments: Any) -> None:
        calls.append(record)
        if len(calls) == 3:
            raise KeyboardInterrupt
        execute(spec, record, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cli, "execute", stop)
        assert compare("--out", str(tmp_path / "broken")) == 130
    (folder,) = (tmp_path / "broken").iterdir()
    assert [status for *_, status, _ in runs(folder)] == ["finished"] * 2 + ["interrupted"]
    return folder


def test_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    first = json.loads((folder / "result.json").read_text())
    assert compare("--into", str(folder)) == 0
    assert compare("--out", str(tmp_path / "whole")) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    assert runs(folder) == runs(whole)
    resumed = json.loads((folder / "result.json").read_text())
    # Its first runs were kept, with their times, and so was its command.
    assert resumed["runs"][:2] == first["runs"][:2]
    assert resumed["command"] == first["command"]
    assert resumed["status"] == "finished"


@pytest.mark.parametrize(
    ("options", "specs", "message"),
    [
        (("--checkpoints", "2"), "adamw,sgd", "setting checkpoints was None, is 2"),
        ((), "adamw,sgd:lr=0.3", "setting optimizers was"),
    ],
)
def test_other_settings_are_refused(
    options: tuple[str, ...],
    specs: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    before = (folder / "result.json").read_bytes()
    assert compare("--into", str(folder), *options, specs=specs) == 2
    assert message in capsys.readouterr().err
    assert (folder / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {"torch": "1.0"}}, "environment versions.torch was '1.0'"),
        ({"gpu": "another"}, "environment gpu was 'another', is None"),
    ],
)
def test_other_code_or_machine_is_refused(
    change: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    file = folder / "result.json"
    found = json.loads(file.read_text())
    versions = {**found["environment"]["versions"], **change.get("versions", {})}
    found["environment"] |= {**change, "versions": versions}
    file.write_text(json.dumps(found))
    assert compare("--into", str(folder)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("config", {"config": []}),
        ("config.seeds", {"config": {}}),
        ("environment", {"environment": None}),
    ],
)
def test_damaged_key_is_named(
    key: str,
    change: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compare("--into", str(tmp_path)) == 0
    file = tmp_path / "result.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, **change}))
    assert compare("--into", str(tmp_path)) == 2
    assert f"result.json: {key} must be" in capsys.readouterr().err
    whole["runs"][1]["epochs"] = []
    file.write_text(json.dumps(whole))
    assert compare("--into", str(tmp_path)) == 2
    assert "result.json: runs[1].epochs of a finished run" in capsys.readouterr().err


def test_data_that_was_fetched_is_the_same_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    file = folder / "result.json"
    found = json.loads(file.read_text())
    found["data"]["source"] = "HTTPS download"
    file.write_text(json.dumps(found))
    assert compare("--into", str(folder)) == 0
    found["data"]["train_samples"] += 1
    file.write_text(json.dumps(found))
    assert compare("--into", str(folder)) == 2
    assert "data train_samples was" in capsys.readouterr().err


def test_changes_of_the_code_are_part_of_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    source = tmp_path / "environment.py"
    source.write_text("a = 1\n")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    written = tmp_path / "benchmarks" / "results" / "result.json"
    written.write_text("{}")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    monkeypatch.setattr(environment, "__file__", str(source))
    states = [environment.git_state()]
    # The last is no UTF-8.
    for text in (b"a = 2\n", b"a = 3\n", b"# \xe9\n"):
        source.write_bytes(text)
        states.append(environment.git_state())
    written.write_text("{1}")
    assert environment.git_state() == states[-1]
    clean, *changed = states
    assert clean is not None and not clean["is_dirty"] and "diff_sha256" not in clean
    hashes = [state["diff_sha256"] for state in changed if state is not None]
    assert len(set(hashes)) == 3
    assert all(len(text) == 16 for text in hashes)


def test_versions_of_what_tunes_are_known() -> None:
    assert {"optuna", "pytorch-optimizer"} <= set(environment.versions())


def test_only_one_folder_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--into", str(tmp_path / "a"), "--out", "results") == 2
    assert "--out: not allowed with argument --into" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_folder_without_a_result_gets_one(tmp_path: Path) -> None:
    assert compare("--into", str(tmp_path / "a" / "new")) == 0
    assert len(runs(tmp_path / "a" / "new")) == 4


def test_folder_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert compare("--into", str(tmp_path / "file" / "folder")) == 2
    assert "--into" in capsys.readouterr().err


def test_environments_go_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gymnasium")
    from grng.rl.compare import cli as rl

    options = ["--task", "cartpole", "--steps", "1024"]
    # A tuple among the options, which a file has as a list.
    options += ["--optimizers", "rank1,adamw:betas=(0.9,0.99)"]
    common = ["compare", *options, "--seeds", "0,1", "--no-progress", "--hidden", "8"]
    execute, calls = rl.execute, []

    def stop(method: Any, run: Any, *arguments: Any) -> None:
        calls.append(run)
        if len(calls) == 2:
            raise KeyboardInterrupt
        execute(method, run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "execute", stop)
        assert main([*common, "--out", str(tmp_path / "broken")]) == 130
    (folder,) = (tmp_path / "broken").iterdir()
    assert main([*common, "--into", str(folder)]) == 0
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    values = [
        [(r["method"], r["seed"], r["curve_return"]) for r in json.loads(f.read_text())["runs"]]
        for f in (folder / "result.json", whole / "result.json")
    ]
    assert values[0] == values[1]
    assert main([*common, "--into", str(folder), "--checkpoints", "7"]) == 2
    file = whole / "result.json"
    saved = json.loads(file.read_text())
    for key, change in (
        ("config", {"config": []}),
        ("config.methods", {"config": {"seeds": [0]}}),
        ("environment", {"environment": None}),
        ("runs[0].curve_return", {"runs": [{**saved["runs"][0], "curve_return": None}]}),
    ):
        file.write_text(json.dumps({**saved, **change}))
        capsys.readouterr()
        assert main([*common, "--into", str(whole)]) == 2
        assert f"result.json: {key} must be" in capsys.readouterr().err
