# SPDX-License-Identifier: Apache-2.0
"""The study ``fine-tuning``: AdamW's rate is chosen on held-out samples of a seed of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grng.compare.errors import UsageError
from grng.compare.records import EpochRecord, RunRecord
from grng.tasks import ClassificationData

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from studies import fine_tuning  # noqa: E402
from studies.definition import Options  # noqa: E402
from studies.training import Trained  # noqa: E402

# Accuracy and loss on held-out samples; None diverges.
Outcome = tuple[float, float] | None


def data() -> ClassificationData:
    inputs, labels = torch.zeros(4, 3, dtype=torch.int64), torch.tensor([0, 1, 0, 1])
    return ClassificationData(inputs, labels, inputs, labels, "made up", {}, inputs, labels)


def trained_as(monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Outcome]) -> list[Any]:
    """Replaces training; returns the calls as (optimizer, model, rank, seed, test samples)."""
    calls: list[Any] = []

    def train(label: str, config: Any, seed: int, data: ClassificationData) -> Trained:
        calls.append((label, config.model_name, config.lora_rank, seed, len(data.test_labels)))
        outcome = outcomes.get(label, (0.5, 1.0))
        if outcome is None:
            raise ArithmeticError("loss is nan")
        accuracy, loss = outcome
        record = RunRecord(label, seed, step_loss=[2.0, 1.0])
        end = EpochRecord(epoch=1, step=2, train_seconds=0.1, train_loss=1.5)
        end.validation_accuracy, end.validation_loss = accuracy, loss
        end.test_accuracy, end.test_loss = 0.75, 0.7
        record.epochs = [end]
        model = nn.Linear(2, 2)
        return Trained(model, torch.optim.SGD(model.parameters(), lr=0.1), record)

    monkeypatch.setattr(fine_tuning, "train", train)
    monkeypatch.setattr(fine_tuning, "data_of", lambda config, folder: data())
    fine_tuning.tuned.cache_clear()
    return calls


@pytest.mark.parametrize(
    ("outcomes", "best"),
    [
        ({"adamw:lr=3e-3": (0.9, 2.0)}, "3e-3"),
        # The loss decides between equals; a rate that diverges is the worst.
        ({"adamw:lr=1e-2": (0.5, 0.9), "adamw:lr=1e-3": None}, "1e-2"),
    ],
)
def test_rate_is_the_best_on_held_out_samples(
    monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Outcome], best: str
) -> None:
    calls = trained_as(monkeypatch, outcomes)
    found = fine_tuning.tuned("r 4", Options(seeds=(0,)))
    assert found.rate == best
    assert set(found.accuracies) == {"1e-3", "3e-3", "1e-2"}
    # The test set has no part in it, nor have the seeds of the study.
    assert {(seed, test) for *_, seed, test in calls} == {(10, 0)}
    assert {(model, rank) for _, model, rank, _, _ in calls} == {("minilm", 4)}


def test_all_rates_diverging_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = ("1e-4", "3e-4", "1e-3")
    trained_as(monkeypatch, {f"adamw:lr={rate}": None for rate in rates})
    with pytest.raises(ArithmeticError, match="AdamW diverged at 1e-4, 3e-4, 1e-3"):
        fine_tuning.tuned("scratch", Options(seeds=(0,)))


def test_each_seed_is_trained_at_the_rate_that_was_chosen_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = trained_as(monkeypatch, {"adamw:lr=3e-4": (0.9, 0.5)})
    plan = [p for p in fine_tuning.STUDY.plan(Options(seeds=(0, 1))) if p.setting == "full"]
    assert [(p.series, p.seed) for p in plan] == [
        ("ring", 0),
        ("adamw", 0),
        ("ring", 1),
        ("adamw", 1),
    ]
    points = [planned.run().points[0] for planned in plan]
    assert [call[:1] + call[3:] for call in calls] == [
        ("ring", 0, 4),
        *((f"adamw:lr={rate}", 10, 0) for rate in ("1e-4", "3e-4", "1e-3")),
        ("adamw:lr=3e-4", 0, 4),
        ("ring", 1, 4),
        ("adamw:lr=3e-4", 1, 4),
    ]
    assert {call[1] for call in calls} == {"minilm-full"}
    assert points[1]["lr"] == 3e-4
    assert points[1]["tuning_3e-4"] == 90.0
    assert (points[0]["kind"], points[0]["test_accuracy"]) == ("full", 75.0)
    assert "lr" not in points[0]


def test_seed_of_the_tuning_is_refused() -> None:
    with pytest.raises(UsageError, match="--seeds must not have 10"):
        list(fine_tuning.STUDY.plan(Options(seeds=(9, 10))))
