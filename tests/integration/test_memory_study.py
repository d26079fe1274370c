# SPDX-License-Identifier: Apache-2.0
"""The study ``memory``: its models, its counts against formulas, and its check against a trained state."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from grng.compare.memory import state_bytes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from studies import memory  # noqa: E402

WIDTH = 24


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_models_have_the_parameters_that_are_said() -> None:
    whole, adapted = memory.build(WIDTH, rank=None), memory.build(WIDTH, rank=3)
    assert trained(whole) == 784 * WIDTH + WIDTH**2 + 10 * WIDTH + 2 * WIDTH + 10
    # Matrices of rank 3 beside two frozen layers, and the head.
    assert trained(adapted) == 3 * (784 + WIDTH) + 3 * (WIDTH + WIDTH) + 10 * WIDTH + 10
    inputs = torch.randn(2, 784)
    assert adapted(inputs).shape == (2, 10)
    # The second matrix is zero at first: what is frozen decides alone.
    frozen = nn.Sequential(
        *(one.frozen if isinstance(one, memory.LowRank) else one for one in adapted)
    )
    torch.testing.assert_close(adapted(inputs), frozen(inputs))


def test_long_sides_of_lora_are_diagonal() -> None:
    """As with PEFT's own layers: without it a factor of order 784 would outweigh everything."""
    assert memory.predicted_bytes("ring", memory.build(256, rank=8)) < 784 * 784 * 4


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", memory.OPTIMIZERS)
def test_counts_are_those_of_a_trained_state(name: str, rank: int | None) -> None:
    model = memory.build(WIDTH, rank)
    predicted = memory.predicted_bytes(name, model)
    found = memory.measured_bytes(name, memory.build(WIDTH, rank))
    assert predicted == pytest.approx(found, rel=0.02)


def test_adamw_is_counted_exactly() -> None:
    model = memory.build(WIDTH, rank=None)
    # Two fp32 moments and a step for each of six tensors.
    assert memory.predicted_bytes("adamw", model) == 8 * trained(model) + 4 * 6
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 784)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 8 * trained(model) + 4 * 6


def test_a_wrong_count_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "predicted_bytes", lambda name, model: 1000)
    with pytest.raises(ArithmeticError, match=r"ring: 1000 bytes predicted, .* measured"):
        memory.check("ring", WIDTH, None)
