# SPDX-License-Identifier: Apache-2.0
"""``--steps``, and in what part of the steps a reference's final values are reached."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grng.__main__ import main
from grng.compare.config import CompareConfig
from grng.compare.measures import ACCURACY, LOSS
from grng.compare.plan import make_plan
from grng.compare.records import FINISHED, EpochRecord, RunRecord
from grng.compare.schedule import warmup_cosine
from grng.compare.summary import summarise
from grng.compare.trailing import first_step_below, trailing_losses


def make_config(**options: int | None) -> CompareConfig:
    common = ("digits", 2, (0,), 4, None, "cpu", None, 0.0, None)
    return CompareConfig(*common, **options)  # type: ignore[arg-type]


def test_plan_of_steps_ends_within_an_epoch() -> None:
    plan = make_plan(make_config(steps=8, checkpoints=3), samples=10)
    assert (plan.steps, plan.steps_per_pass, plan.checkpoints) == (8, 3, (3, 5, 8))
    batches = [index.tolist() for index, _ in plan.batches(seed=1)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4, 4]
    # The steps of whole epochs are those of a run in epochs.
    in_epochs = make_plan(make_config(), samples=10)
    assert (in_epochs.steps, in_epochs.checkpoints) == (6, (3, 6))
    assert batches[:6] == [index.tolist() for index, _ in in_epochs.batches(seed=1)]
    assert sorted(i for batch in batches[3:6] for i in batch) == list(range(10))
    # Ten evaluations by default, and fewer where there are not so many steps.
    assert make_plan(make_config(steps=100), 10).checkpoints == tuple(range(10, 101, 10))
    assert make_plan(make_config(steps=3), 10).checkpoints == (1, 2, 3)


def compare(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    common = ("--task", "digits", "--hidden", "16", "--device", "cpu", "--threads", "1")
    code = main(["compare", *common, "--out", str(out), *options])
    (folder,) = out.glob("*")
    assert len(list(folder.glob("*.png"))) == 2
    return code, json.loads((folder / "result.json").read_text())


def test_run_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    options = ("--steps", "30", "--checkpoints", "3", "--train-limit", "100", "--batch-size", "25")
    code, result = compare(tmp_path, "--optimizers", "sgd:momentum=0,adamw", *options)
    assert code == 0
    config = result["config"]
    assert (config["mode"], config["steps"], config["epochs"]) == ("steps", 30, None)
    for run in result["runs"]:
        assert len(run["step_loss"]) == 30
        # 4 steps an epoch.
        assert [(e["epoch"], e["step"]) for e in run["epochs"]] == [(3, 10), (5, 20), (8, 30)]
    printed = capsys.readouterr().out
    assert "adamw seed 0  step 20/30  loss " in printed
    assert re.search(r"sgd:momentum=0 ends \S+ points (above|below) adamw; ", printed)


def test_schedule_is_over_the_steps(tmp_path: Path) -> None:
    """The rate that a broken run reports is that of a schedule over five steps."""
    pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    options = (
        "--steps",
        "5",
        "--checkpoints",
        "1",
        "--train-limit",
        "100",
        "--warmup-fraction",
        "0",
    )
    code, result = compare(
        tmp_path, "--optimizers", "adamw:lr=1e30", "--batch-size", "25", *options
    )
    assert code == 1
    divergence = result["runs"][0]["divergence"]
    assert divergence["step"] == 2
    assert divergence["lr"] == pytest.approx(1e30 * warmup_cosine(5, 0.0)(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "5", "--epochs", "2"], "--epochs does not go with --steps"),
        (["--steps", "5", "--stream", "9"], "--steps does not go with --stream"),
        (
            ["--steps", "5", "--checkpoints", "6"],
            "--checkpoints must be at most the 5 steps, got 6",
        ),
        (
            ["--reference", "adamw:lr=1"],
            "--reference must be one of --optimizers or the name of one",
        ),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--task", "digits", "--optimizers", "sgd", *arguments]) == 2
    printed = capsys.readouterr()
    assert f"grng compare: error: {message}" in printed.err
    assert printed.err.count("\n") == 1


def make_run(label: str, losses: list[float], held_out: list[float], *, seed: int = 0) -> RunRecord:
    """A run of equally many steps between its evaluations; held-out accuracy is 1 - loss / 10."""
    every = len(losses) // len(held_out)
    epochs = [
        EpochRecord(i + 1, every * (i + 1), 1.0 * (i + 1), 0.0, loss, 1 - loss / 10)
        for i, loss in enumerate(held_out)
    ]
    seconds = [1.0 / every] * len(losses)
    return RunRecord(
        label, seed, status=FINISHED, epochs=epochs, step_loss=losses, step_seconds=seconds
    )


def test_trailing_loss_is_the_mean_of_fifty_steps() -> None:
    generator = np.random.default_rng(0)
    losses = generator.uniform(1, 2, 120).tolist()
    found = trailing_losses(make_run("a", losses, [1.0]))
    by_hand = [sum(losses[end - 50 : end]) / 50 for end in range(50, 121)]
    np.testing.assert_allclose(found, by_hand, rtol=1e-12)
    (short,) = trailing_losses(make_run("a", losses[:20], [1.0]))
    assert short == pytest.approx(sum(losses[:20]) / 20)
    assert not trailing_losses(RunRecord("a", 0)).size


def test_training_loss_is_reached_by_the_mean_over_seeds() -> None:
    # The mean of 50 steps ending at step t is 200 - (t - 24.5) for the one and 20 higher for the other.
    falling = [200.0 - step for step in range(1, 201)]
    runs = [make_run("a", falling, [1.0]), make_run("a", [x + 20 for x in falling], [1.0], seed=1)]
    # (200 - t + 24.5) + 10 <= 84.5 from t = 150 on.
    assert first_step_below(runs, 84.5) == 150
    assert first_step_below(runs[:1], 84.5) == 140
    assert first_step_below(runs, 84.4999) == 151
    assert first_step_below(runs, 0.0) is None
    assert first_step_below(runs, 1e9) == 50


def test_parts_of_the_reference() -> None:
    slow = [200.0 - step for step in range(1, 201)]
    fast = [200.0 - 2 * step for step in range(1, 201)]
    runs = [
        make_run("adamw:lr=1", slow, [4.0, 3.0, 2.0, 2.0]),
        make_run("adamw:lr=2", slow, [4.0, 3.0, 2.0, 1.0]),
        make_run("ring", fast, [3.0, 0.9, 1.5, 2.0]),
        make_run("sgd", [x + 1 for x in slow], [5.0, 4.0, 3.0, 2.0]),
    ]
    labels = [run.optimizer for run in runs]
    for measure in (ACCURACY, LOSS):
        found = summarise(labels, runs, seeds=1, measure=measure)
        assert found.target is not None
        value = 1.0 if measure is LOSS else 0.9
        assert (found.target.optimizer, found.target.value) == ("adamw:lr=2", value)
        assert (found.target.steps, found.target.train_loss) == (200, 24.5)
        other, baseline, ring, sgd = found.rows
        # Reached by ring at an evaluation, and lost again.
        assert (ring.steps_to_target, ring.part_of_steps_to_target) == (100, 0.5)
        assert (ring.epochs_to_target, ring.seconds_to_target) == (2, 2.0)
        # 200 - 2t + 49 <= 24.5
        assert ring.steps_to_train_loss == 113
        assert ring.part_of_steps_to_train_loss == pytest.approx(113 / 200)
        assert (baseline.part_of_steps_to_target, baseline.part_of_steps_to_train_loss) == (1, 1)
        assert (other.part_of_steps_to_target, other.part_of_steps_to_train_loss) == (None, 1)
        assert (sgd.part_of_steps_to_target, sgd.part_of_steps_to_train_loss) == (None, None)
        assert sgd.final_train_loss == pytest.approx(25.5)
        assert sgd.held_out(measure) == pytest.approx(2.0 if measure is LOSS else 0.8)


def test_reference_is_a_name_or_one_of_the_specs() -> None:
    losses = [200.0 - step for step in range(1, 201)]
    runs = [
        make_run("sgd:lr=1", losses, [3.0, 2.0]),
        make_run("sgd:lr=2", losses, [3.0, 1.0]),
        make_run("ring", losses, [2.0, 1.0]),
    ]
    labels = [run.optimizer for run in runs]
    targets = [
        summarise(labels, runs, seeds=1, reference=reference).target
        for reference in ("sgd", "sgd:lr=1", "adamw")
    ]
    assert [None if t is None else t.optimizer for t in targets] == ["sgd:lr=2", "sgd:lr=1", None]
    found = summarise(labels, runs, seeds=1, reference="sgd:lr=1")
    assert found.rows[2].part_of_steps_to_target == 0.5


def test_values_in_words() -> None:
    assert (ACCURACY.text(0.898), LOSS.text(1.5)) == ("89.80 %", "1.5000")
    assert ACCURACY.gap(0.9052, 0.898) == "0.72 points above"
    assert LOSS.gap(1.4877, 1.5) == "0.0123 below"
