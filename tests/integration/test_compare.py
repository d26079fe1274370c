# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare`` end to end on a small data set in the format of Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grng
from grng.__main__ import main
from grng.compare import cli, optimizers, progress, runs, training
from grng.compare.curves import smooth
from grng.compare.errors import UsageError
from grng.compare.optimizers import parse_spec, parse_specs
from grng.compare.plot_style import spread_labels
from grng.compare.records import FINISHED, EpochRecord, RunRecord
from grng.compare.schedule import warmup_cosine
from grng.compare.summary import summarise
from grng.tasks import fashion_mnist_files as files

TRAIN, TEST, BATCH = 400, 100, 64
STEPS_PER_EPOCH = 7


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, dtype=">u4").tobytes()
    return header + array.tobytes()


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten noisy patterns as images; an MLP learns them in a few epochs."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 256, size=(10, 28, 28))
    folder = tmp_path / "data"
    folder.mkdir()
    for images, labels, count in (
        (files.TRAIN_IMAGES, files.TRAIN_LABELS, TRAIN),
        (files.TEST_IMAGES, files.TEST_LABELS, TEST),
    ):
        targets = generator.integers(0, 10, size=count)
        noise = generator.integers(0, 256, size=(count, 28, 28))
        pixels = (patterns[targets] + 4 * noise) // 5
        for name, array in ((images, pixels), (labels, targets)):
            content = idx_bytes(array.astype(np.uint8))
            (folder / name).write_bytes(gzip.compress(content, compresslevel=1))
            checksum = hashlib.sha256(content).hexdigest()
            monkeypatch.setitem(files.FILES, name, files.ExpectedFile(array.shape, checksum))
    return folder


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training on so little data."""
    monkeypatch.setattr(cli, "save_figures", lambda result, folder: [])


def compare(data_dir: Path, *options: str) -> tuple[int, dict[str, Any], Path]:
    """Runs a small comparison; returns the exit code, the parsed JSON and its folder."""
    out = data_dir.parent / "results"
    before = set(out.glob("*"))
    code = main([
        *("compare", "--data-dir", str(data_dir), "--out", str(out), "--device", "cpu"),
        *("--hidden", "16,16", "--batch-size", str(BATCH), "--epochs", "2", *options),
    ])  # fmt: skip
    (folder,) = set(out.glob("*")) - before
    return code, json.loads((folder / "result.json").read_text()), folder


class FakeRing(torch.optim.SGD):
    """Has the face of ``grng.RING`` and checks in which order it is called."""

    def __init__(self, model: torch.nn.Module, lr: float = 0.05, rho: float = 0.01) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.rho, self.has_observed = rho, False

    def observe(self, logits: torch.Tensor, *, likelihood: str) -> None:
        assert likelihood == "categorical"
        assert logits.requires_grad
        assert all(p.grad is None for p in self.param_groups[0]["params"])
        self.has_observed = True
        # An optimizer may draw random numbers; the batches must not depend on it.
        torch.rand(3)

    def step(self, closure: Any = None) -> None:
        assert self.has_observed
        self.has_observed = False
        super().step(closure)

    def diagnostics(self) -> dict[str, Any]:
        return {"damping": torch.tensor([0.5, float("nan")]), "layers": ({"name": "fc"},)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mnist"], "unknown task 'mnist'; valid tasks: fashion-mnist"),
        (
            ["--optimizers", "adam"],
            "unknown optimizer 'adam'; valid optimizers: ring, reng, adamw, sgd",
        ),
        (["--optimizers", "sgd,"], "unknown optimizer ''"),
        (["--optimizers", "adamw:rate=1"], "unknown option 'rate' of 'adamw'; valid options: lr, "),
        (["--optimizers", "adamw:lr"], "option 'lr' must be given as lr=value"),
        (["--optimizers", "adamw:lr=1:lr=2"], "option 'lr' is given twice"),
        (["--optimizers", "adamw:lr=-1"], "'adamw:lr=-1': Invalid learning rate"),
        (["--optimizers", "adamw:lr=fast"], "optimizer 'adamw:lr=fast': "),
        (["--optimizers", "sgd,sgd"], "'sgd' is given twice"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--threads", "999999"], "--threads must be at most"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--train-limit", "0"], "--train-limit must be at least 1, got 0"),
        (["--hidden", "16,x"], "--hidden must be whole numbers like 1,2,3, got '16,x'"),
        (["--hidden", "0"], "--hidden must be at least 1, got 0"),
        (["--seeds", "1,1"], r"--seeds must be different numbers, got \[1, 1\]"),
        (["--seed", "-1"], r"--seeds must be in \[0, 2\*\*63\), got -1"),
        (["--seed", "1", "--seeds", "1,2"], "not allowed with"),
        (["--warmup-fraction", "1"], r"--warmup-fraction must be in \[0, 1\), got 1.0"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last --optimizers wins: the default would need every optimizer to be there.
    assert main(["compare", "--optimizers", "adamw", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match(rf"grng compare: error: .*{message}", printed.err), printed.err
    assert printed.err.count("\n") == 1


def test_unknown_option_of_ring_lists_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grng, "RING", FakeRing, raising=False)
    with pytest.raises(
        UsageError, match=r"unknown option 'eps' of 'ring'; valid options: lr, rho$"
    ):
        parse_spec("ring:eps=1")


def test_spec_values() -> None:
    specs = parse_specs("sgd:lr=1:nesterov=True, adamw:lr=3e-4:betas=(0.8,0.9):fused=none")
    assert [spec.label for spec in specs] == [
        "sgd:lr=1:nesterov=True",
        "adamw:lr=3e-4:betas=(0.8,0.9):fused=none",
    ]
    assert specs[0].options == {"lr": 1, "nesterov": True}
    assert specs[1].options == {"lr": 3e-4, "betas": (0.8, 0.9), "fused": None}


def test_hyperparameters_are_resolved() -> None:
    model = torch.nn.Linear(2, 2)
    spec = parse_spec("adamw:betas=(0.8,0.9)")
    resolved = spec.hyperparameters(spec.build(model))
    assert (resolved["lr"], resolved["betas"], resolved["weight_decay"]) == (1e-3, [0.8, 0.9], 1e-2)


def test_schedule_rises_then_falls_to_zero() -> None:
    factor = warmup_cosine(total_steps=100, warmup_fraction=0.1)
    assert factor(0) == 0.1
    assert factor(9) == factor(10) == 1.0
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == 0.0
    assert warmup_cosine(10, 0.0)(0) == 1.0


def test_comparison_writes_table_json_and_plots(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["ring:refresh_every=20", "adamw", "sgd"]
    code, result, folder = compare(data_dir, "--optimizers", ",".join(names), "--seeds", "0,1")
    assert code == 0
    assert (result["schema_version"], result["status"]) == (1, "finished")
    assert [(run["optimizer"], run["seed"]) for run in result["runs"]] == [
        (name, seed) for seed in (0, 1) for name in names
    ]
    for run in result["runs"]:
        assert run["status"] == "finished"
        assert len(run["step_loss"]) == len(run["step_seconds"]) == 2 * STEPS_PER_EPOCH
        assert [epoch["step"] for epoch in run["epochs"]] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
        assert run["epochs"][-1]["train_seconds"] == pytest.approx(sum(run["step_seconds"]), 1e-4)
        split = run["ms_per_step"]
        assert min(split.values()) > 0
        total = sum(split.values()) * 2 * STEPS_PER_EPOCH / 1e3
        assert total == pytest.approx(sum(run["step_seconds"]), 1e-3)
        assert run["optimizer_state_bytes"] > 0
    for seed in (0, 1):
        same = [run for run in result["runs"] if run["seed"] == seed]
        assert len({run["initial_weights_sha256"] for run in same}) == 1
        assert len({run["batch_order_sha256"] for run in same}) == 1
    assert len({run["initial_weights_sha256"] for run in result["runs"]}) == 2

    assert [row["optimizer"] for row in result["summary"]["rows"]] == names
    assert result["summary"]["target"]["optimizer"] == "adamw"
    hyperparameters = {o["label"]: o["hyperparameters"] for o in result["config"]["optimizers"]}
    assert hyperparameters["adamw"]["lr"] == 1e-3
    assert result["data"]["sha256_decompressed"][files.TRAIN_IMAGES]
    assert set(result["environment"]["versions"]) >= {"python", "torch", "grng", "numpy"}
    text = (folder / "result.json").read_text()
    for private in (str(Path.home()), str(data_dir.parent), str(Path(grng.__path__[0]).parent)):
        assert private not in text
    for name in ("loss_accuracy_steps.png", "loss_accuracy_seconds.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == 3

    printed = capsys.readouterr().out
    assert printed.count("  epoch 2/2  loss ") == len(result["runs"])
    (header,) = (line for line in printed.splitlines() if line.startswith("| optimizer"))
    assert re.search(r"test acc %.*to adamw.*train loss.*fwd bwd opt.*peak RSS MB", header)
    assert len([line for line in printed.splitlines() if line.startswith("| adamw ")]) == 1
    assert "\x1b" not in printed


@pytest.mark.usefixtures("without_figures")
def test_observe_is_called_between_forward_and_backward(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grng, "RING", FakeRing, raising=False)
    code, result, _ = compare(data_dir, "--optimizers", "ring:rho=0.03,sgd:lr=0.05:momentum=0")
    assert code == 0
    ring, sgd = result["runs"]
    # FakeRing is plain SGD: only equal weights, batches and schedules give equal losses.
    assert ring["step_loss"] == sgd["step_loss"]
    assert result["config"]["optimizers"][0]["hyperparameters"] == {"lr": 0.05, "rho": 0.03}


@pytest.mark.usefixtures("without_figures")
def test_same_seed_gives_the_same_losses(data_dir: Path) -> None:
    first, again, other = (
        compare(data_dir, "--optimizers", "adamw", "--no-progress", "--seed", seed)[1]["runs"][0]
        for seed in ("3", "3", "4")
    )
    assert first["step_loss"] == again["step_loss"]
    assert first["epochs"][-1]["test_loss"] == again["epochs"][-1]["test_loss"]
    assert first["step_loss"] != other["step_loss"]


def test_divergence_stops_one_run_and_not_the_others(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result, folder = compare(data_dir, "--optimizers", "adamw:lr=1e30,sgd,adamw")
    assert code == 1
    assert result["status"] == "diverged"
    assert [run["status"] for run in result["runs"]] == ["diverged", "finished", "finished"]
    bad = result["runs"][0]
    # The first step only spoils the weights; its own loss is that of the initial weights.
    assert bad["divergence"]["step"] == 2
    assert bad["divergence"]["last_finite_loss"] == bad["step_loss"][0]
    assert len(bad["step_loss"]) == 1
    assert result["summary"]["target"]["optimizer"] == "adamw"
    assert (folder / "loss_accuracy_steps.png").is_file()
    printed = capsys.readouterr().out
    assert "adamw:lr=1e30 (diverged)" in printed
    assert "adamw:lr=1e30 seed 0 stopped at step 2: training loss" in printed


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("check_every", [1, 3, 50])
def test_divergence_reports_the_exact_step(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, check_every: int
) -> None:
    """Looking at the losses only now and then, as on CUDA, does not change what is reported."""

    class BreaksInStep5(FakeRing):
        steps = 0

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.steps += 1
            if self.steps == 5:
                self.param_groups[0]["params"][0].data.fill_(float("nan"))

    original = training.Trainer.__init__

    def with_check(self: training.Trainer, *args: Any, **options: Any) -> None:
        original(self, *args, **options, check_every=check_every)

    monkeypatch.setattr(training.Trainer, "__init__", with_check)
    monkeypatch.setattr(grng, "RING", BreaksInStep5, raising=False)
    code, result, _ = compare(data_dir, "--optimizers", "ring")
    found = result["runs"][0]["divergence"]
    assert code == 1
    assert (found["step"], len(result["runs"][0]["step_loss"])) == (6, 5)
    assert found["what"] == "training loss nan"
    # 14 steps with 5 percent warm-up have none: the cosine alone, after 5 steps.
    assert found["lr"] == pytest.approx(0.05 * warmup_cosine(14, 0.05)(5))
    assert found["diagnostics"] == {"damping": [0.5, "nan"], "layers": [{"name": "fc"}]}


@pytest.mark.usefixtures("without_figures")
def test_second_order_baselines_take_part(data_dir: Path) -> None:
    specs = [
        "kfac:lr=0.01",
        "kfac:convention=kfac-pytorch:fisher=empirical:refresh_every=5",
        "sophiag:lr=3e-3",
        "sophiah:lr=3e-3:betas=(0.9,0.99)",
    ]
    code, result, _ = compare(data_dir, "--optimizers", ",".join(specs))
    assert code == 0
    assert [run["optimizer"] for run in result["runs"]] == specs
    for run in result["runs"]:
        assert run["status"] == "finished"
        assert run["epochs"][1]["train_loss"] < run["epochs"][0]["train_loss"]
        assert run["ms_per_step"]["optimizer"] > 0


@pytest.mark.usefixtures("without_figures")
def test_numerical_error_of_an_optimizer_counts_as_divergence(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Raises(FakeRing):
        def step(self, closure: Any = None) -> None:
            raise torch.linalg.LinAlgError("factor is singular")

    monkeypatch.setattr(grng, "RING", Raises, raising=False)
    code, result, _ = compare(data_dir, "--optimizers", "ring,sgd")
    assert code == 1
    assert [run["status"] for run in result["runs"]] == ["diverged", "finished"]
    assert result["runs"][0]["divergence"]["what"] == "factor is singular"
    assert result["runs"][0]["divergence"]["step"] == 1


def test_interrupt_keeps_what_is_there(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: progress.LineReporter, record: RunRecord) -> None:
        if record.optimizer == "sgd":
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.LineReporter, "epoch", interrupt)
    code, result, folder = compare(data_dir, "--optimizers", "adamw,sgd,sgd:lr=0.01")
    assert code == 130
    assert result["status"] == "interrupted"
    assert [run["status"] for run in result["runs"]] == ["finished", "interrupted"]
    assert len(result["runs"][1]["epochs"]) == 1
    assert [row["status"] for row in result["summary"]["rows"]] == [
        "finished",
        "interrupted",
        "not run",
    ]
    assert (folder / "loss_accuracy_seconds.png").is_file()
    assert "sgd (interrupted)" in capsys.readouterr().out


@pytest.mark.usefixtures("without_figures")
def test_result_is_valid_after_every_epoch(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def read(self: progress.LineReporter, record: RunRecord) -> None:
        (path,) = (data_dir.parent / "results").glob("*/result.json")
        seen.append([len(run["epochs"]) for run in json.loads(path.read_text())["runs"]])

    monkeypatch.setattr(progress.LineReporter, "epoch", read)
    assert compare(data_dir, "--optimizers", "adamw,sgd")[0] == 0
    assert seen == [[1], [2], [2, 1], [2, 2]]


def test_plot_draws_saved_results_again(
    data_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, _, folder = compare(data_dir, "--optimizers", "sgd", "--train-limit", "70")
    assert re.search(r"\| +n/a \|", capsys.readouterr().out)
    for picture in folder.glob("*.png"):
        picture.unlink()
    assert main(["plot", str(folder / "result.json")]) == 0
    assert len(list(folder.glob("*.png"))) == 2

    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    capsys.readouterr()
    for name, message in (
        ("other.json", "must be a grng-compare result"),
        ("broken.json", "not JSON"),
        ("absent.json", "No such file"),
    ):
        assert main(["plot", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_missing_data_is_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "SOURCES", ())
    options = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--optimizers", "sgd"]
    assert main(["compare", *options]) == 1
    printed = capsys.readouterr()
    assert "apt-get install dataset-fashion-mnist" in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_info_lists_optimizers_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in (*optimizers.OPTIMIZERS, "models: mlp, resnet, vit", torch.__version__):
        assert word in printed


def test_missing_extra_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grng.__main__._EXTRAS", ("rich", "no_such_module_here"))
    assert main(["compare"]) == 2
    assert 'pip install "grng-kernels[compare]"' in capsys.readouterr().err


def test_importing_grng_needs_neither_rich_nor_matplotlib() -> None:
    code = (
        "import sys; import grng, grng.__main__, grng.tasks; "
        "print(sorted({'rich', 'matplotlib'} & set(sys.modules)))"
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_recorded_command_has_no_path_of_this_machine() -> None:
    cleaned = cli.without_paths(["compare", "--out", "/a/b", "--data-dir=~/x", "--epochs", "3"])
    assert cleaned == ["compare", "--out", "<out>", "--data-dir=<data-dir>", "--epochs", "3"]


def test_target_is_the_best_adamw_and_reached_by_the_mean_over_seeds() -> None:
    def run(label: str, seed: int, accuracies: list[float]) -> RunRecord:
        epochs = [
            EpochRecord(i + 1, 10 * (i + 1), 2.0 * (i + 1), 1.0, 1.0, accuracy)
            for i, accuracy in enumerate(accuracies)
        ]
        return RunRecord(label, seed, status=FINISHED, epochs=epochs, step_seconds=[2.0] * 3)

    found = summarise(
        ["ring", "adamw:lr=1", "adamw:lr=2", "sgd"],
        [
            run("ring", 0, [0.7, 0.9, 0.8]),
            run("ring", 1, [0.7, 0.7, 0.9]),
            run("adamw:lr=1", 0, [0.5, 0.6, 0.7]),
            run("adamw:lr=2", 0, [0.5, 0.6, 0.8]),
            run("sgd", 0, [0.5, 0.6, 0.7]),
        ],
        seeds=2,
    )
    assert found.target is not None
    assert (found.target.optimizer, found.target.value) == ("adamw:lr=2", 0.8)
    ring, _, baseline, sgd = found.rows
    assert (ring.epochs_to_target, ring.seconds_to_target) == (2, 4.0)
    assert ring.final_accuracy == pytest.approx(0.85)
    assert ring.final_accuracy_std == pytest.approx(0.05 * 2**0.5)
    assert baseline.epochs_to_target == 3
    assert (sgd.epochs_to_target, sgd.seeds_finished, sgd.final_accuracy_std) == (None, 1, None)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_model_and_steps_are_chosen(data_dir: Path, model: str) -> None:
    out = data_dir.parent / "results"
    options = ("--model", model, "--batch-size", "8", "--train-limit", "20", "--steps", "4")
    places = ("--data-dir", str(data_dir), "--out", str(out), "--device", "cpu")
    assert main(["compare", "--optimizers", "adamw,sgd:lr=1e-3", *options, *places]) == 0
    (path,) = out.glob("*/result.json")
    result = json.loads(path.read_text())
    assert (result["config"]["model_name"], result["config"]["model_options"]) == (model, {})
    assert result["config"]["model_parameters"] > 70_000
    assert [len(run["step_loss"]) for run in result["runs"]] == [4, 4]
    # The third step ends the first epoch with the last four samples.
    assert [e["epoch"] for e in result["runs"][0]["epochs"]] == [1, 1, 1, 2]


def test_model_weights_depend_on_the_seed_only(data_dir: Path) -> None:
    config = cli.CompareConfig("fashion-mnist", 1, (0,), 8, (16,), "cpu", None, 0.0, None)
    cpu = torch.device("cpu")
    sums = [runs.weights_sha256(runs.build_model(config, seed, cpu)) for seed in (1, 2, 1)]
    assert sums[0] == sums[2] != sums[1]


def test_smoothing_is_unbiased_at_the_start() -> None:
    np.testing.assert_allclose(smooth(np.full(20, 2.5), span=5), 2.5)


def test_labels_are_spread_in_order() -> None:
    placed = spread_labels([0.5, 0.1, 0.51, 0.5], gap=0.1)
    assert sorted(range(4), key=placed.__getitem__) == [1, 0, 3, 2]
    ordered = sorted(placed)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 0.1 - 1e-12
