# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare --stream`` end to end on the digits, and how settings are selected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import grng
from grng.__main__ import main
from grng.compare import cli
from grng.compare.config import CompareConfig
from grng.compare.curves import online_curve
from grng.compare.errors import UsageError
from grng.compare.optimizers import expand, parse_specs
from grng.compare.plan import make_plan
from grng.compare.records import FINISHED, EpochRecord, RunRecord
from grng.compare.selection import select
from grng.compare.summary import summarise

pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")


def compare(out: Path, *options: str) -> tuple[int, dict[str, Any], Path]:
    before = set(out.glob("*"))
    common = ("--task", "digits", "--hidden", "16", "--device", "cpu", "--threads", "1")
    code = main(["compare", *common, "--out", str(out), *options])
    (folder,) = set(out.glob("*")) - before
    return code, json.loads((folder / "result.json").read_text()), folder


def stream_config(stream: int, checkpoints: int | None = None) -> CompareConfig:
    return CompareConfig(
        *("digits", 1, (0,), 1, None, "cpu", None, 0.0, None),
        stream=stream,
        checkpoints=checkpoints,
    )


class FakeKalman(torch.optim.Optimizer):
    """Has the face of a Kalman optimizer and no learning rate; takes plain gradient steps."""

    def __init__(self, model: torch.nn.Module, *, sigma0: float = 0.1, rho: float = 0.0) -> None:
        super().__init__(model.parameters(), {"sigma0": sigma0, "rho": rho})
        self.has_observed = False

    def observe(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        assert not self.has_observed
        assert outputs.requires_grad
        assert (outputs.shape, targets.shape) == ((1, 10), (1,))
        parameters = self.param_groups[0]["params"]
        assert all(p.grad is None for p in parameters), "nothing else may go backward"
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        self.gradients = torch.autograd.grad(loss, parameters)
        self.has_observed = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert self.has_observed
        self.has_observed = False
        for parameter, gradient in zip(self.param_groups[0]["params"], self.gradients, strict=True):
            parameter.sub_(gradient, alpha=self.defaults["sigma0"])


def test_stream_of_a_kalman_optimizer_and_rivals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grng, "RKalman", FakeKalman, raising=False)
    specs = "rkalman:sigma0=0.02,sgd:lr=0.02|1e-5:momentum=0,adagrad"
    options = ("--stream", "150", "--checkpoints", "3", "--validation", "50", "--seeds", "0,1")
    code, result, folder = compare(tmp_path, "--optimizers", specs, *options)
    assert code == 0
    for run in result["runs"]:
        assert [epoch["step"] for epoch in run["epochs"]] == [50, 100, 150]
        assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2, 3]
        assert len(run["step_correct"]) == len(run["step_loss"]) == 150
        assert set(run["step_correct"]) <= {0, 1}
        for epoch in run["epochs"]:
            online = sum(run["step_correct"][: epoch["step"]]) / epoch["step"]
            assert epoch["online_accuracy"] == pytest.approx(online)
            assert 0 <= epoch["validation_accuracy"] <= 1
            # The test set is looked at once.
            assert (epoch["test_accuracy"] is not None) == (epoch["step"] == 150)
        assert sum(run["ms_per_step"].values()) > 0
    kalman, sgd = result["runs"][:2]
    # The same steps by another protocol: only equal weights, order and labels give equal losses.
    assert kalman["step_loss"] == pytest.approx(sgd["step_loss"], rel=1e-4)
    assert kalman["step_correct"] == sgd["step_correct"]
    # No backward pass of ours: two marks in a row.
    assert kalman["ms_per_step"]["backward"] < 0.2 * kalman["ms_per_step"]["optimizer"]
    assert len({run["batch_order_sha256"] for run in result["runs"][:4]}) == 1
    assert result["runs"][4]["batch_order_sha256"] != kalman["batch_order_sha256"]

    rows = {row["optimizer"]: row for row in result["summary"]["rows"]}
    best, worse = rows["sgd:lr=0.02:momentum=0"], rows["sgd:lr=1e-5:momentum=0"]
    assert best["validation_accuracy"] > worse["validation_accuracy"]
    assert (best["is_selected"], worse["is_selected"]) == (True, False)
    assert best["final_accuracy"] > 0
    assert worse["final_accuracy"] is None
    config = result["config"]
    assert (config["mode"], config["stream"], config["batch_size"]) == ("stream", 150, 1)
    assert config["schedule"] == "constant learning rate"
    assert result["data"]["validation_samples"] == 50
    assert (folder / "stream_accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == 2

    printed = capsys.readouterr().out
    assert "rkalman:sigma0=0.02 seed 0  sample 50/150  loss " in printed
    (header,) = (line for line in printed.splitlines() if line.startswith("| optimizer"))
    assert re.search(r"online %.*val acc %.*test acc %.*fwd bwd opt", header)
    assert "| sgd:lr=0.02:momentum=0 (best) " in printed
    # Drawn again from the file.
    (folder / "stream_accuracy.png").unlink()
    assert main(["plot", str(folder)]) == 0
    assert (folder / "stream_accuracy.png").is_file()


def test_kalman_optimizers_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(grng, "LoKO", raising=False)
    assert main(["compare", "--task", "digits", "--optimizers", "loko"]) == 2
    assert "optimizer 'loko' is not part of this build of grng" in capsys.readouterr().err


def test_divergence_without_a_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grng, "LoKO", FakeKalman, raising=False)
    monkeypatch.setattr(cli, "save_figures", lambda result, folder: [])
    options = ("--stream", "20", "--validation", "20")
    code, result, _ = compare(tmp_path, "--optimizers", "loko:sigma0=1e30", *options)
    assert code == 1
    assert result["runs"][0]["divergence"]["lr"] is None
    assert "lr none, last finite loss" in capsys.readouterr().out


def test_epochs_with_validation_test_only_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--train-limit", "100", "--epochs", "4", "--batch-size", "25", "--checkpoints", "2")
    code, result, folder = compare(tmp_path, "--optimizers", "adamw:lr=1e-2|1e-6", *options)
    assert code == 0
    for run in result["runs"]:
        assert [(e["epoch"], e["step"]) for e in run["epochs"]] == [(2, 8), (4, 16)]
        assert [e["test_accuracy"] is not None for e in run["epochs"]] == [False, True]
        assert run["step_correct"] == []
    assert result["data"]["train_samples"] == 100
    assert result["summary"]["target"]["optimizer"] == "adamw:lr=1e-2"
    assert (folder / "loss_accuracy_steps.png").is_file()
    printed = capsys.readouterr().out
    assert re.search(r"seed 0  epoch 2/4  loss \S+  val acc ", printed)
    assert "adamw:lr=1e-2 (best)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream", "0"], "--stream must be at least 1, got 0"),
        (["--stream", "2000"], "--stream must be at most the 1237 training samples of 'digits'"),
        (["--stream", "9", "--epochs", "2"], "--epochs does not go with --stream"),
        (["--stream", "9", "--batch-size", "2"], "--batch-size does not go with --stream"),
        (["--stream", "9", "--validation", "0"], "--validation must be at least 1 with --stream"),
        (["--stream", "9", "--checkpoints", "10"], "--checkpoints must be at most the 9 samples"),
        (["--checkpoints", "11"], "--checkpoints must be at most the 10 epochs, got 11"),
        (["--validation", "-1"], "--validation must be at least 0, got -1"),
        (["--schedule", "linear"], "--schedule must be one of cosine, constant, got 'linear'"),
        (
            ["--lora-rank", "4"],
            "--lora-rank does not apply to task 'digits', whose model has --hid",
        ),
        (["--task", "plays", "--hidden", "4"], "--hidden does not apply to model 'minilm' of task"),
        (["--task", "plays", "--lora-rank", "0"], "--lora-rank must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--task", "digits", "--optimizers", "sgd", "--out", str(tmp_path)]
    assert main(["compare", *options, *arguments]) == 2
    printed = capsys.readouterr()
    assert f"grng compare: error: {message}" in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_value_of_alternatives_is_several_specs() -> None:
    assert expand("sgd:lr=0.1|1:momentum=0|0.9") == [
        "sgd:lr=0.1:momentum=0",
        "sgd:lr=0.1:momentum=0.9",
        "sgd:lr=1:momentum=0",
        "sgd:lr=1:momentum=0.9",
    ]
    labels = [spec.label for spec in parse_specs("adamw:lr=1|2:betas=(0.8,0.9), sgd")]
    assert labels == ["adamw:lr=1:betas=(0.8,0.9)", "adamw:lr=2:betas=(0.8,0.9)", "sgd"]
    with pytest.raises(UsageError, match="option 'lr' must be given as lr=value"):
        parse_specs("sgd:lr=1|")
    with pytest.raises(UsageError, match="given twice"):
        parse_specs("sgd:lr=1|1")


def test_selection_takes_the_best_of_each_optimizer_and_the_first_of_equals() -> None:
    found: dict[str, float | None] = {
        "a:x=1": 0.5,
        "a:x=2": 0.7,
        "a:x=3": 0.7,
        "b:x=1": None,
        "b:x=2": 0.1,
        "c:x=1": None,
        "c:x=2": None,
    }
    assert select(list(found), found) == {"a:x=2", "b:x=2", "c:x=1"}


def test_selection_never_looks_at_the_test_set() -> None:
    def run(label: str, validation: float, test: float) -> RunRecord:
        end = EpochRecord(1, 10, 1.0, 1.0, 1.0, test, 1.0, validation, 0.5)
        return RunRecord(label, 0, status=FINISHED, epochs=[end], step_seconds=[1.0])

    found = summarise(
        ["adamw:lr=1", "adamw:lr=2"],
        [run("adamw:lr=1", 0.8, 0.7), run("adamw:lr=2", 0.7, 0.9)],
        seeds=1,
    )
    assert [row.is_selected for row in found.rows] == [True, False]
    assert [row.final_accuracy for row in found.rows] == [0.7, None]
    assert found.target is not None
    assert (found.target.optimizer, found.target.value) == ("adamw:lr=1", 0.8)


def test_plan_of_a_stream_sees_each_sample_once() -> None:
    plan = make_plan(stream_config(40, checkpoints=3), samples=100)
    assert (plan.steps, plan.checkpoints) == (40, (13, 27, 40))
    seen = [int(index) for index, _ in plan.batches(seed=5)]
    assert len(set(seen)) == len(seen) == 40
    assert seen == [int(index) for index, _ in plan.batches(seed=5)]
    assert seen != [int(index) for index, _ in plan.batches(seed=6)]
    # The default of ten evaluations, and fewer where there are not so many samples.
    assert make_plan(stream_config(100), 100).checkpoints == tuple(range(10, 101, 10))
    assert make_plan(stream_config(4), 100).checkpoints == (1, 2, 3, 4)


def test_online_curve_is_the_mean_so_far_over_seeds() -> None:
    runs = [
        RunRecord("a", seed, step_seconds=[1.0] * 4, step_correct=correct)
        for seed, correct in enumerate(([1, 0, 1, 1], [0, 0, 1, 0]))
    ]
    curve = online_curve(runs)
    assert curve is not None
    assert curve.epochs.tolist() == [1, 2, 3, 4]
    assert curve.high.tolist() == pytest.approx([100, 50, 200 / 3, 75])
    assert curve.low.tolist() == pytest.approx([0, 0, 100 / 3, 25])
    assert curve.mean.tolist() == pytest.approx([50, 25, 50, 50])
