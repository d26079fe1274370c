# SPDX-License-Identifier: Apache-2.0
"""``python -m grng tune`` end to end on the digits, and the parts of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from grng.__main__ import main
from grng.compare.errors import UsageError
from grng.compare.optimizers import OPTIMIZERS, parse_spec
from grng.tune import search as search_module
from grng.tune.search import propose
from grng.tune.space import SPACES, Choice, Range, parse_space, space_text

pytest.importorskip("optuna")

RUN = ("--task", "digits", "--steps", "6", "--batch-size", "32", "--hidden", "8", "--no-progress")


TRIAL = {
    **{"number": 0, "optimizer": "adamw", "options": {}, "status": "finished", "values": [0.5]},
    **{"steps": [6], "seconds": 1.0, "divergence": None},
}


def tune(folder: Path, *options: str, optimizer: str = "adamw") -> int:
    given = ("--optimizer", optimizer, "--out", str(folder), "--checkpoints", "2")
    return main(["tune", *RUN, *given, *options])


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tune.json").read_text())
    return found


def trials(folder: Path) -> list[Any]:
    """What the trials were and gave, without their times."""
    return [
        {key: value for key, value in trial.items() if key != "seconds"}
        for trial in content(folder)["trials"]
    ]


def results_of_tests(folder: Path) -> list[Any]:
    """The results of the runs with the test set, the oldest first."""
    files = sorted(folder.glob("test*/result.json"), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_text()) for file in files]


# ---- spaces ----


def test_each_optimizer_has_a_space() -> None:
    assert set(SPACES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", SPACES)
def test_spaces_are_equally_wide_and_around_the_defaults(name: str) -> None:
    from torch import nn

    space = parse_space(name, SPACES[name])
    spec = parse_spec(name)
    defaults = spec.hyperparameters(spec.build(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))))
    ranges = {key: values for key, values in space.items() if isinstance(values, Range)}
    choices = {key: values for key, values in space.items() if isinstance(values, Choice)}
    assert len(ranges) == len(choices) == 1
    for key, values in ranges.items():
        assert values.high / values.low == pytest.approx(1000, rel=0.02)
        assert math.sqrt(values.low * values.high) == pytest.approx(defaults[key], rel=0.02)
    for key, chosen in choices.items():
        assert len(set(chosen.values)) == 3
        assert defaults[key] in chosen


def test_space_is_read_as_it_is_written() -> None:
    space = parse_space("ring", " lr=1e-4..0.1:fisher=sampled|exact:rho=0.001|0.01")
    assert space == {
        "lr": Range(1e-4, 0.1),
        "fisher": Choice(("sampled", "exact")),
        "rho": Choice((0.001, 0.01)),
    }
    assert parse_space("ring", space_text(space)) == space


def test_tuples_are_read_as_they_are_written() -> None:
    space = parse_space("adamw", "betas=(0.9,0.999)|(0.8, 0.99):lr=0.12345678..1")
    assert space == {
        "betas": Choice(((0.9, 0.999), (0.8, 0.99))),
        "lr": Range(0.12345678, 1.0),
    }
    assert parse_space("adamw", space_text(space)) == space


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=1..2", r"unknown option 'speed' of 'adamw'; valid options: lr, "),
        ("lr", r"option 'lr' must be lr=low..high or lr=a\|b\|c"),
        ("lr=1..2:lr=3", "option 'lr' is given twice"),
        ("lr=0..1", r"lr must be a range of numbers 0 < low < high, got '0..1'"),
        ("lr=2..1", r"got '2..1'"),
        ("lr=a..b", r"got 'a..b'"),
        ("lr=1..nan", r"got '1..nan'"),
        ("lr=1..inf", r"got '1..inf'"),
        ("lr=1|", r"no value of lr may be empty, got '1\|'"),
        ("lr=|1", r"no value of lr may be empty, got '\|1'"),
        ("lr=0.1|1e-1", r"value 1e-1 of lr is given twice, in '0.1\|1e-1'"),
    ],
)
def test_wrong_space_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_space("adamw", text)


def test_rounded_numbers_stay_in_their_range() -> None:
    values = Range(0.0012345, 0.0056789)
    assert values.round(0.0012345001) == 0.0012345
    # 0.00568 would be beyond it.
    assert values.round(0.0056788) == 0.0056789
    assert values.round(0.0033333) == 0.00333
    assert all(v in values for v in map(values.round, (0.0012345, 0.0034, 0.0056789)))


# ---- proposals ----

SPACE = {"lr": Range(1e-4, 1e-1), "weight_decay": Choice((0.0, 0.1))}
DEFAULTS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0}


def run_proposals(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A search for lr = 0.03, without decay."""
    past: list[tuple[dict[str, Any], float]] = []
    for _ in range(count):
        found = propose(SPACE, DEFAULTS, seed, past)
        assert found is not None
        loss = abs(math.log10(found["lr"] / 0.03)) + found["weight_decay"]
        past.append((found, -loss))
    return [options for options, _ in past]


def test_first_trial_is_the_defaults() -> None:
    assert propose(SPACE, DEFAULTS, 0, []) == DEFAULTS
    elsewhere = propose(SPACE, {"lr": 1.0, "weight_decay": 0.0}, 0, [])
    assert elsewhere is not None
    assert elsewhere["lr"] in SPACE["lr"]


def test_proposals_depend_on_seed_and_past_alone() -> None:
    assert run_proposals(9) == run_proposals(9)
    assert run_proposals(9)[:6] == run_proposals(6)
    assert run_proposals(3, seed=1)[1:] != run_proposals(3)[1:]


def test_proposals_come_near_the_best() -> None:
    found = [options["lr"] for seed in range(3) for options in run_proposals(24, seed)[-10:]]
    far = sum(abs(math.log10(lr / 0.03)) for lr in found) / len(found)
    # Even draws are 0.94 away on average.
    assert far < 0.65
    assert all(lr in SPACE["lr"] for lr in found)


def test_diverged_trials_are_kept_away_from() -> None:
    past: list[tuple[dict[str, Any], float]] = []
    for _ in range(20):
        found = propose(SPACE, DEFAULTS, 0, past)
        assert found is not None
        past.append((found, -math.inf if found["lr"] > 3e-3 else -found["weight_decay"]))
    late = [options["lr"] for options, _ in past[-8:]]
    assert sum(lr > 3e-3 for lr in late) <= 2


def test_each_setting_is_proposed_once() -> None:
    space = parse_space(
        "adamw", "betas=(0.9,0.99)|(0.8,0.9):weight_decay=0.0|0.1|0.2:amsgrad=True|False"
    )
    past: list[tuple[dict[str, Any], float]] = []
    for _ in range(12):
        found = propose(space, {}, 0, past)
        assert found is not None
        past.append((found, -found["weight_decay"]))
    assert len({tuple(options.values()) for options, _ in past}) == 12
    assert propose(space, {}, 0, past) is None


# ---- the command ----


def test_search_is_written_and_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path, "--budget", "4") == 0
    output = capsys.readouterr().out
    found = content(tmp_path)
    assert found["status"] == "finished"
    assert [trial["number"] for trial in found["trials"]] == [0, 1, 2, 3]
    assert found["trials"][0]["options"] == {"lr": 0.001, "weight_decay": 0.01}
    best = max(found["trials"], key=lambda trial: trial["values"][-1])
    assert found["best"] == {"optimizer": best["optimizer"], "value": best["values"][-1]}
    assert f"best of 4 trials on the validation samples: {best['optimizer']}" in output
    assert found["config"]["space"] == space_text(parse_space("adamw", SPACES["adamw"]))
    assert [len(trial["values"]) for trial in found["trials"]] == [2] * 4
    assert all(trial["steps"] == [3, 6] for trial in found["trials"])
    assert found["environment"]["git"] is None or found["environment"]["git"]["commit"]
    (tmp_path / "tune.png").unlink()
    assert main(["plot", str(tmp_path / "tune.json")]) == 0
    assert (tmp_path / "tune.png").stat().st_size > 10_000


def test_all_results_below_a_folder_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path / "a" / "b", "--budget", "2", "--seeds", "0") == 0
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    assert main(["plot", str(tmp_path)]) == 0
    drawn = {file.name for file in tmp_path.rglob("*.png")}
    assert {"tune.png", "loss_accuracy_steps.png"} <= drawn
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "empty")]) == 2
    assert "no result.json, tune.json or study.json there" in capsys.readouterr().err


def test_interrupted_search_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert tune(whole, "--budget", "5") == 0
    execute, calls = search_module.execute, []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        execute(*arguments)

    monkeypatch.setattr(search_module, "execute", stop)
    assert tune(broken, "--budget", "5") == 130
    assert content(broken)["status"] == "interrupted"
    assert len(trials(broken)) == 2
    assert tune(broken, "--budget", "5") == 0
    assert trials(broken) == trials(whole)
    assert len(calls) == 6
    # A larger budget goes on too.
    assert tune(broken, "--budget", "6") == 0
    assert trials(broken)[:5] == trials(whole)
    assert len(trials(broken)) == 6


def test_budget_below_what_is_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path, "--budget", "3") == 0
    before = (tmp_path / "tune.json").read_bytes()
    assert tune(tmp_path, "--budget", "2") == 2
    assert "--budget must be at least 3, the number of trials in" in capsys.readouterr().err
    assert (tmp_path / "tune.json").read_bytes() == before


def test_search_ends_where_the_space_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert tune(tmp_path, "--budget", "7", "--space", "lr=1e-3|0.1:weight_decay=0.0|0.01") == 0
        assert "the space has no more settings than these 4" in capsys.readouterr().out
        assert content(tmp_path)["status"] == "finished"
        tried = [trial["optimizer"] for trial in content(tmp_path)["trials"]]
        assert len(tried) == len(set(tried)) == 4


def test_search_of_tuples_goes_on(tmp_path: Path) -> None:
    given = ("--space", "betas=(0.9,0.999)|(0.8,0.99)|(0.5,0.9)")
    assert tune(tmp_path, *given, "--budget", "2") == 0
    assert tune(tmp_path, *given, "--budget", "3", "--seeds", "0") == 0
    found = [trial["options"]["betas"] for trial in content(tmp_path)["trials"]]
    # The defaults first.
    assert found[0] == [0.9, 0.999]
    assert sorted(found) == [[0.5, 0.9], [0.8, 0.99], [0.9, 0.999]]


def test_search_of_other_settings_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path, "--budget", "2") == 0
    before = (tmp_path / "tune.json").read_bytes()
    assert tune(tmp_path, "--budget", "3", "--space", "lr=1e-3..1e-2") == 2
    error = capsys.readouterr().err
    assert "setting space was" in error
    assert "is 'lr=0.001..0.01'" in error
    assert tune(tmp_path, "--budget", "3", "--seed", "7") == 2
    assert "setting seeds was [100], is [7]" in capsys.readouterr().err
    assert (tmp_path / "tune.json").read_bytes() == before


def test_diverged_trials_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(tmp_path, "--budget", "3", "--space", "lr=1e30..1e35", optimizer="sgd") == 1
    found = content(tmp_path)
    assert [trial["status"] for trial in found["trials"]] == ["diverged"] * 3
    assert all(trial["divergence"]["step"] >= 1 for trial in found["trials"])
    assert found["best"] is None
    assert "3 of 3 trials diverged" in capsys.readouterr().out
    assert main(["plot", str(tmp_path)]) == 0


def test_test_set_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    execute = search_module.execute

    def watch(*arguments: Any) -> None:
        execute(*arguments)
        _, record, _, data = arguments[:4]
        seen.append((len(data.test_labels), record.epochs[-1].test_accuracy))

    monkeypatch.setattr(search_module, "execute", watch)
    assert tune(tmp_path, "--budget", "2") == 0
    assert seen == [(0, None)] * 2


def test_best_settings_and_defaults_are_run_on_the_test_set(tmp_path: Path) -> None:
    # At the rate of the defaults hardly anything is learned in so few steps.
    given = ("--budget", "2", "--space", "lr=1e-3|0.03", "--seeds", "0,1", "--steps", "30")
    assert tune(tmp_path, *given) == 0
    best = content(tmp_path)["best"]["optimizer"]
    assert best == "adamw:lr=0.03"
    (test,) = results_of_tests(tmp_path)
    labels = [(run["optimizer"], run["seed"]) for run in test["runs"]]
    assert labels == [(best, 0), ("adamw", 0), (best, 1), ("adamw", 1)]
    assert all(run["epochs"][-1]["test_accuracy"] is not None for run in test["runs"])
    # Once more: there is nothing left to do.
    assert tune(tmp_path, *given) == 0
    assert [again["runs"] for again in results_of_tests(tmp_path)] == [test["runs"]]


def test_what_was_tested_before_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--space", "lr=1e-9|1e-3|0.03", "--steps", "30")
    assert tune(tmp_path, *given, "--budget", "2", "--seed", "7", "--seeds", "0") == 0
    first = content(tmp_path)["best"]["optimizer"]
    # Other seeds, and other settings that are the best.
    assert tune(tmp_path, *given, "--budget", "2", "--seed", "7", "--seeds", "1") == 0
    assert tune(tmp_path, *given, "--budget", "3", "--seed", "7", "--seeds", "1") == 0
    best = content(tmp_path)["best"]["optimizer"]
    assert best != first
    found = [
        (one["runs"][0]["optimizer"], one["config"]["seeds"]) for one in results_of_tests(tmp_path)
    ]
    assert found == [(first, [0]), (first, [1]), (best, [1])]
    written = capsys.readouterr().out
    assert all(str(file) in written for file in tmp_path.glob("test*"))


@pytest.mark.parametrize(
    ("space", "labels"),
    [
        # The defaults are the best: they are not run twice.
        ("lr=1e-3|1e-9", ["adamw:lr=0.001"]),
        # The first trial is the best, and not the defaults.
        ("lr=0.02", ["adamw:lr=0.02", "adamw"]),
    ],
)
def test_defaults_are_run_where_they_are_not_the_best(
    space: str, labels: list[str], tmp_path: Path
) -> None:
    assert tune(tmp_path, "--budget", "2", "--space", space, "--seeds", "0", "--steps", "30") == 0
    (test,) = results_of_tests(tmp_path)
    assert [run["optimizer"] for run in test["runs"]] == labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "1"), "--budget must be at least 2, got 1"),
        (("--validation", "0"), "settings are chosen on held-out samples, got 0"),
        (("--space", "lr=1e-3|-1|oops"), "optimizer 'adamw:lr=-1': Invalid learning rate: -1"),
        (
            ("--space", "weight_decay=0.0:lr=1e-3|oops"),
            "optimizer 'adamw:weight_decay=0.0:lr=oops': ",
        ),
        (("--space", "lr=0.1..0.2:eps=-1|1e-8"), "Invalid epsilon value: -1"),
        (("--seeds", "1,100"), "--seeds must be others than that of the search, --seed 100"),
        (("--space", "lr=1"), None),
        (("--optimizer", "adam"), "--optimizer must be one of ring, reng, adamw"),
        (
            ("--task", "cartpole"),
            "--task must be a data set: settings of reinforcement learning are",
        ),
        (("--task", "mnist"), "unknown task 'mnist'"),
    ],
)
def test_wrong_options_are_named(
    options: tuple[str, ...],
    message: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = tune(tmp_path / "new", "--budget", "2", *options)
    if message is None:
        assert code == 0
        return
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("config", {"config": []}),
        ("config.seeds", {"config": {}}),
        ("environment", {"environment": None}),
        ("trials[0].values", {"trials": [{**TRIAL, "values": []}]}),
        ("trials[0].options", {"trials": [TRIAL]}),
        ("trials[0].steps[0]", {"trials": [{**TRIAL, "steps": ["a"]}]}),
    ],
)
def test_damaged_key_is_named(
    key: str, change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path, "--budget", "2") == 0
    (tmp_path / "tune.json").write_text(json.dumps({**content(tmp_path), **change}))
    assert tune(tmp_path, "--budget", "2") == 2
    assert f"tune.json: {key} " in capsys.readouterr().err


def test_damaged_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tune.json").write_text('{"schema": "grng-tune", "schema_version": 1}')
    assert tune(tmp_path, "--budget", "2") == 2
    assert "incomplete result" in capsys.readouterr().err
    (tmp_path / "tune.json").write_text("{")
    assert tune(tmp_path, "--budget", "2") == 2
    assert "not JSON" in capsys.readouterr().err
