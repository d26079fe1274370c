# SPDX-License-Identifier: Apache-2.0
"""How long a step of R-Kalman may be: by how well the samples before it were predicted."""

import math

import pytest
import torch
from torch import nn

from grng import LoKO, RKalman
from grng.optim import evidence


def linear(classes=4, **options):
    torch.manual_seed(0)
    model = nn.Linear(6, classes, dtype=torch.float64)
    return model, RKalman(model, **options)


def predicted_divergence(q, change):
    return float(0.5 * change @ (torch.diag(q) - torch.outer(q, q)) @ change)


def step(model, optimizer, x, y):
    """Learn one sample; return the divergence that was predicted, exact where the logits are linear."""
    before = model(x)
    optimizer.observe(before, y)
    optimizer.step()
    change = (model(x) - before).detach()[0]
    return predicted_divergence(before.detach().softmax(-1)[0], change)


@pytest.mark.parametrize("classes", [2, 10])
def test_a_sample_counts_by_how_much_better_than_uniform_it_was_predicted(classes):
    uniform, y = torch.zeros(1, classes), torch.tensor([1])
    assert float(evidence.of_predictions(uniform, y)) == pytest.approx(-0.1, abs=1e-12)
    sure = torch.full((1, classes), -50.0)
    sure[0, 1] = 50.0
    assert float(evidence.of_predictions(sure, y)) == pytest.approx(0.9, abs=1e-12)
    assert float(evidence.of_predictions(-sure, y)) == pytest.approx(-1.1, abs=1e-12)
    half = torch.tensor([[0.3, -0.2, *[0.0] * (classes - 2)]])
    loss = -math.log(float(half.double().softmax(-1)[0, 1]))
    expected = 1 - loss / math.log(classes) - 0.1
    assert float(evidence.of_predictions(half, y)) == pytest.approx(expected, rel=1e-12)
    both = evidence.of_predictions(torch.cat([half, sure]), torch.tensor([1, 1]))
    assert float(both) == pytest.approx(expected + 0.9, rel=1e-12)


def test_evidence_is_kept_between_its_bounds():
    number = torch.tensor(2.5, dtype=torch.float64)
    assert float(evidence.grown(number, torch.tensor(0.2))) == pytest.approx(2.7)
    assert float(evidence.grown(number, torch.tensor(9.0))) == 3.0
    assert float(evidence.grown(number, torch.tensor(-9.0))) == 0.0
    some = [number * 0 + e for e in (0.0, 0.05, 1.5, 3.0)]
    limits = [float(evidence.largest_divergence(e, 1)) for e in some]
    assert limits == pytest.approx([0.03, 0.03, 0.5, 1.0])
    limits = [float(evidence.largest_divergence(e, 10)) for e in some]
    assert limits == pytest.approx([0.3, 0.3, 0.5, 1.0])
    assert [float(evidence.largest_divergence(e, 34)) for e in some] == [1.0] * 4


def test_a_batch_may_move_the_model_as_far_as_its_samples_together():
    for samples, limit in ((2, 0.06), (50, 1.0)):
        model, optimizer = linear(sigma0=5000.0, rho=0.0, max_rows=200)
        x, y = torch.randn(samples, 6, dtype=torch.float64), torch.randint(4, (samples,))
        before = model(x).detach()
        optimizer.observe(model(x), y)
        optimizer.step()
        change = model(x).detach() - before
        total = sum(map(predicted_divergence, before.softmax(-1), change))
        assert total == pytest.approx(limit, rel=1e-6)


def test_the_first_step_is_short_and_later_ones_are_as_long_as_the_evidence_allows():
    model, optimizer = linear(sigma0=5000.0)
    x, y = torch.randn(1, 6, dtype=torch.float64), torch.tensor([2])
    assert step(model, optimizer, x, y) == pytest.approx(0.03, rel=1e-6)
    # The same sample again and again: soon it is predicted, and another may move the model more.
    for _ in range(20):
        step(model, optimizer, x, y)
    assert optimizer.diagnostics()["max_kl"] == pytest.approx(1.0)
    other = -3 * x
    limit = optimizer.diagnostics()["max_kl"]
    assert step(model, optimizer, other, torch.tensor([0])) == pytest.approx(limit, rel=1e-6)


def test_what_is_predicted_worse_than_by_chance_shortens_the_steps_again():
    model, optimizer = linear()
    x, y = torch.randn(1, 6, dtype=torch.float64), torch.tensor([2])
    for _ in range(20):
        step(model, optimizer, x, y)
    assert optimizer.diagnostics()["max_kl"] == 1.0
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        noise = torch.randint(4, (1,), generator=generator)
        step(model, optimizer, torch.randn(1, 6, generator=generator).double(), noise)
    assert optimizer.diagnostics()["max_kl"] < 0.2


def test_a_sample_that_was_skipped_is_no_evidence():
    model, optimizer = linear()
    x, y = torch.randn(1, 6, dtype=torch.float64), torch.tensor([2])
    for _ in range(3):
        step(model, optimizer, x, y)
    before = optimizer.diagnostics()["max_kl"]
    assert 0.03 < before < 1.0
    optimizer.observe(model(x * math.nan), y)
    optimizer.step()
    report = optimizer.diagnostics()
    assert (report["skipped"], report["max_kl"]) == (1, before)


def test_evidence_goes_with_the_checkpoint():
    model, optimizer = linear()
    x, y = torch.randn(1, 6, dtype=torch.float64), torch.tensor([2])
    for _ in range(3):
        step(model, optimizer, x, y)
    other, resumed = linear()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.diagnostics()["max_kl"] == optimizer.diagnostics()["max_kl"] > 0.03
    assert step(other, resumed, x, y) == step(model, optimizer, x, y)
    wrong = optimizer.state_dict()
    wrong["state"][0]["evidence"] = torch.zeros(2)
    with pytest.raises(ValueError, match="evidence"):
        resumed.load_state_dict(wrong)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, "at most 0.03 nats of KL divergence; more with evidence"),
        ({"max_kl": 0.2}, "at most 0.2 nats of KL divergence"),
        ({"max_kl": None}, "as long as the filter makes it"),
        ({"noise": 0.1}, "as long as the filter makes it"),
        ({"likelihood": "gaussian"}, "as long as the filter makes it"),
    ],
    ids=str,
)
def test_who_follows_the_evidence(options, limit):
    model, optimizer = linear(**options)
    assert f"Step: {limit}\n" in f"{optimizer.explain()}\n"
    has_evidence = "more" in limit
    if "likelihood" not in options:
        step(model, optimizer, torch.randn(1, 6, dtype=torch.float64), torch.tensor([0]))
        assert ("evidence" in optimizer.state[model.weight]) == has_evidence


def test_loko_does_not_follow_it():
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = LoKO(model, noise="fisher")
    optimizer.observe(model(torch.randn(1, 6)), torch.tensor([1]))
    optimizer.step()
    assert "evidence" not in optimizer.state[model.weight]
    assert "max_kl" not in optimizer.diagnostics()
