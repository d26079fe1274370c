# SPDX-License-Identifier: Apache-2.0
"""``--per-class K``: the first K training samples of each class, after the validation samples were taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grng.__main__ import main
from grng.compare.errors import UsageError
from grng.compare.few_shot import first_of_each_class
from grng.tasks import ClassificationData


def data() -> ClassificationData:
    labels = torch.tensor([2, 0, 0, 1, 2, 1, 0, 2])
    inputs = torch.arange(8.0).unsqueeze(1)
    test = torch.full((1, 1), -1.0), torch.tensor([0])
    return ClassificationData(inputs, labels, *test, "made up", {}, inputs + 10, labels)


def test_the_first_of_each_class_in_the_order_of_the_task() -> None:
    kept = first_of_each_class(data(), classes=3, count=2)
    assert kept.train_inputs.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert kept.train_labels.tolist() == [2, 0, 0, 1, 2, 1]
    assert first_of_each_class(data(), 3, 1).train_inputs.flatten().tolist() == [0, 1, 3]
    # What is held out stays as it is.
    assert kept.validation is not None and len(kept.validation[0]) == 8
    assert len(kept.test_labels) == 1


@pytest.mark.parametrize(("classes", "count", "rarest"), [(3, 3, 1), (4, 1, 3)])
def test_too_many_name_the_option(classes: int, count: int, rarest: int) -> None:
    least = {1: 2, 3: 0}[rarest]
    with pytest.raises(
        UsageError, match=f"--per-class must be at most the {least} .* class {rarest}, got {count}"
    ):
        first_of_each_class(data(), classes, count)


def compare(tmp_path: Path, *options: str) -> int:
    common = ("--optimizers", "adamw", "--steps", "2", "--batch-size", "8", "--hidden", "4")
    places = ("--out", str(tmp_path), "--device", "cpu", "--no-progress")
    return main(["compare", "--task", "digits", *common, *places, *options])


def test_comparison_trains_on_so_many(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    assert compare(tmp_path, "--per-class", "3") == 0
    (path,) = tmp_path.glob("*/result.json")
    result = json.loads(path.read_text())
    assert (result["config"]["per_class"], result["config"]["train_limit"]) == (3, None)
    samples = {key: result["data"][f"{key}_samples"] for key in ("train", "validation", "test")}
    assert samples == {"train": 30, "validation": 200, "test": 360}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--per-class", "0"), "--per-class must be at least 1, got 0"),
        (("--per-class", "4", "--train-limit", "9"), "--per-class does not go with --train-limit"),
        (("--per-class", "500"), "--per-class must be at most the "),
        (
            ("--task", "stsb", "--per-class", "2"),
            "--per-class does not apply to task 'stsb': it predicts numbers, not classes",
        ),
        (
            ("--task", "shakespeare-char", "--per-class", "2"),
            "--per-class does not apply to task 'shakespeare-char': it has one label per character",
        ),
        (("--task", "cartpole", "--per-class", "2"), "--per-class does not go with --task cart"),
    ],
)
def test_wrong_use_is_named(
    tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "500" in options:
        pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    # Of options that are given twice the last counts.
    common = ("--task", "digits", "--out", str(tmp_path / "out"), "--no-progress")
    optimizers = () if "cartpole" in options else ("--optimizers", "adamw")
    assert main(["compare", *common, *optimizers, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
