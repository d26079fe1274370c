# SPDX-License-Identifier: Apache-2.0
"""Tasks that are compared by a correlation, and tasks whose labels are numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grng import RING
from grng.compare.evaluation import correlation, evaluate
from grng.compare.measures import ACCURACY, MATTHEWS, PEARSON
from grng.compare.optimizers import OPTIMIZERS, parse_spec
from grng.compare.plot_parts import held_out_names
from grng.compare.protocols import take_step
from grng.compare.records import EpochRecord, RunRecord
from grng.compare.results import ComparisonResult, load
from grng.compare.summary import summarise
from grng.compare.table import verdicts
from grng.rl.compare.results import is_rl_result

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Those of reinforcement learning are of another kind, those of kernels no folders.
OLD = [path.parent for path in sorted(RESULTS.glob("*/result.json")) if not is_rl_result(path)]


def test_correlation_of_numbers_is_pearsons() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, generator=generator)
    # From fp32 values, in fp64.
    expected = np.corrcoef(a.double().numpy(), b.double().numpy())[0, 1]
    assert correlation(a, b) == pytest.approx(expected, rel=1e-12)
    assert correlation(a, -3 * a + 2) == pytest.approx(-1, rel=1e-6)


def test_correlation_of_two_classes_is_matthews() -> None:
    predicted = torch.tensor([1, 1, 1, 0, 0, 1, 0, 1])
    labels = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1])
    tp, tn, fp, fn = 4, 2, 1, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert correlation(predicted, labels) == pytest.approx(expected, rel=1e-12)
    # One class for all says nothing: 0, not NaN.
    assert correlation(torch.ones(8, dtype=torch.int64), labels) == 0.0


class Twice(nn.Module):
    """One weight: the output is the weight times the input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.head.weight, 2.0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(inputs.float())
        return outputs


def test_numbers_have_half_the_squared_error_and_no_accuracy() -> None:
    inputs, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([3.0, 3.0, 7.0])
    found = evaluate(Twice(), inputs, labels, rows=2, has_correlation=True)
    assert found.loss == pytest.approx((1 + 1 + 1) / 6)
    assert found.accuracy is None
    assert found.correlation == pytest.approx(np.corrcoef([2, 4, 8], [3, 3, 7])[0, 1])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_learns_numbers(name: str) -> None:
    """``y = 3 x`` from ``y = 2 x``: what is told of the likelihood reaches each of them."""
    torch.manual_seed(0)
    # What Kalman optimizers were not told of numbers, they would refuse.
    spec = parse_spec(name).for_likelihood("gaussian")
    model = Twice()
    optimizer = spec.build(model)
    inputs = torch.linspace(-1, 1, 16).unsqueeze(1)
    labels = 3 * inputs.squeeze(1)
    losses = []
    for _ in range(8):
        loss, outputs = take_step(
            model,
            optimizer,
            spec.entry.protocol,
            inputs,
            labels,
            lambda: None,
            likelihood="gaussian",
        )
        assert outputs.shape == (16, 1)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(0.5 * float((inputs**2).mean()))
    assert losses[-1] < losses[0]
    assert model.head.weight.item() > 2.0


def test_ring_is_told_that_labels_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Fisher matrix of classes would be zero: a single logit has probability one."""
    told = []
    monkeypatch.setattr(RING, "observe", lambda self, outputs, **given: told.append(given))
    model = Twice()
    inputs, labels = torch.ones(4, 1), torch.ones(4)
    for likelihood in ("gaussian", "categorical"):
        optimizer = RING(model)
        targets = labels if likelihood == "gaussian" else torch.zeros(4, dtype=torch.int64)
        common = (model, optimizer, "observe-backward", inputs, targets, lambda: None)
        take_step(*common, likelihood=likelihood)  # type: ignore[arg-type]
    assert told == [{"likelihood": "gaussian"}, {"likelihood": "categorical"}]


def make_run(label: str, values: list[float], *, has_accuracy: bool) -> RunRecord:
    epochs = [
        EpochRecord(i + 1, i + 1, 1.0, 0.5, validation_loss=1.0, validation_correlation=value)
        for i, value in enumerate(values)
    ]
    epochs[-1].test_loss, epochs[-1].test_correlation = 2.0, values[-1] / 2
    if has_accuracy:
        epochs[-1].test_accuracy = epochs[-1].validation_accuracy = 0.9
    return RunRecord(label, 0, "finished", 1, epochs=epochs, step_loss=[1.0] * len(values))


def test_settings_are_chosen_and_reached_by_the_correlation() -> None:
    runs = [
        make_run("ring", [-0.2, 0.5, 0.6], has_accuracy=False),
        make_run("adamw:lr=1", [0.1, 0.2, 0.4], has_accuracy=False),
        make_run("adamw:lr=2", [0.1, 0.2, 0.3], has_accuracy=False),
    ]
    found = summarise(
        ["ring", "adamw:lr=1", "adamw:lr=2"], runs, seeds=1, measure=PEARSON, reference="adamw"
    )
    ring, best, worse = found.rows
    assert found.target is not None
    assert (found.target.optimizer, found.target.measure) == ("adamw:lr=1", "pearson")
    assert found.target.value == 0.4
    assert (best.is_selected, worse.is_selected) == (True, False)
    assert (ring.steps_to_target, ring.final_correlation) == (2, 0.3)
    assert (ring.held_out(PEARSON), worse.final_correlation) == (0.6, None)
    # There is no accuracy, not one of 0 %.
    assert (ring.final_accuracy, ring.validation_accuracy, ring.best_accuracy) == (None,) * 3
    with_accuracy = summarise(
        ["ring"], [make_run("ring", [0.5], has_accuracy=True)], seeds=1, measure=MATTHEWS
    )
    assert with_accuracy.rows[0].final_accuracy == 0.9
    assert with_accuracy.rows[0].held_out(ACCURACY) == 0.9


def test_words_say_which_correlation() -> None:
    runs = [
        make_run("ring", [0.6], has_accuracy=False),
        make_run("adamw", [0.4], has_accuracy=True),
    ]
    config: dict[str, Any] = {
        "task": "stsb",
        "optimizers": [{"label": "ring"}, {"label": "adamw"}],
        "seeds": [0],
        "measure": "pearson",
        "likelihood": "gaussian",
    }
    data = {"validation_samples": 4, "test_samples": 4, "peak_memory_kind": "peak RSS MB"}
    result = ComparisonResult([], config, {}, data, "", runs=runs)
    assert held_out_names(result) == (
        "Validation Pearson correlation",
        "Pearson correlation, in hundredths",
    )
    assert result.loss_name == "half squared error"
    (line,) = verdicts(result, result.summary())
    assert line.startswith("ring ends 20.00 points above adamw; reached its final 40.00 after ")


@pytest.mark.parametrize("folder", [path.name for path in OLD])
def test_results_without_correlations_load(folder: str) -> None:
    result = load(RESULTS / folder)
    assert result.loss_name == "cross entropy"
    assert any(row.final_loss is not None for row in result.summary().rows)
