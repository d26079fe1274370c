# SPDX-License-Identifier: Apache-2.0
"""The exact natural gradient of the study ``two-layer`` against Jacobians of autograd."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grng import RING

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from studies import two_layer  # noqa: E402
from studies.definition import Options  # noqa: E402
from studies.relu_network import Network, Start, allowed_stability  # noqa: E402

SAMPLES, FEATURES, WIDTH = 6, 9, 40


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1.0, -1, 1, 1, -1, -1], dtype=torch.float64)
    return inputs / inputs.norm(dim=1, keepdim=True), labels


def jacobian(network: Network, inputs: Tensor) -> Tensor:
    """``[samples, weights]`` by autograd."""

    def outputs(weight: Tensor) -> Tensor:
        return torch.relu(inputs @ weight.T) @ network.signs / math.sqrt(WIDTH)

    found = torch.autograd.functional.jacobian(outputs, network.weight)
    assert isinstance(found, Tensor)
    return found.flatten(1)


@pytest.fixture
def start() -> Start:
    return Start(*problem(), WIDTH, seed=3)


def test_gram_is_that_of_the_jacobian(start: Start) -> None:
    j = jacobian(start.network(), start.inputs)
    torch.testing.assert_close(start.gram, j @ j.T)
    assert start.spectrum[0] > 0
    assert torch.linalg.matrix_norm(j, 2).square().item() == pytest.approx(start.largest)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_step_is_the_damped_natural_gradient(start: Start, damping: float) -> None:
    network = start.network()
    j, before = jacobian(network, start.inputs), network.weight.clone()
    residual = network.residual()
    # By the other form, (J'J + damping)^-1 J'r; of the smallest norm where it is singular.
    fisher = j.T @ j + damping * torch.eye(j.shape[1], dtype=torch.float64)
    direction = torch.linalg.pinv(fisher, hermitian=True, rtol=1e-12) @ (j.T @ residual)
    network.natural_step(0.25, damping)
    expected = before - 0.25 * direction.reshape(before.shape)
    torch.testing.assert_close(network.weight, expected, rtol=1e-7, atol=1e-9)


def test_descent_follows_the_gradient(start: Start) -> None:
    network = start.network()
    j, before, residual = jacobian(network, start.inputs), network.weight, network.residual()
    network.descent_step(0.1)
    expected = before - 0.1 * (j.T @ residual).reshape(before.shape)
    torch.testing.assert_close(network.weight, expected)


def test_change_of_the_jacobian_is_its_spectral_norm(start: Start) -> None:
    network = start.network()
    first = jacobian(network, start.inputs)
    network.natural_step(0.9, 0.0)
    change = torch.linalg.matrix_norm(jacobian(network, start.inputs) - first, 2).item()
    assert change > 0
    expected = 2 * change / math.sqrt(start.smallest)
    assert network.stability() == pytest.approx(expected)


def test_linear_theory_is_what_a_linear_model_does(start: Start) -> None:
    """Residuals of the model that the first Jacobian stands for, step by step."""
    eta, damping = 0.3, 0.2
    j, residual = jacobian(start.network(), start.inputs), start.network().residual()
    damped = j @ j.T + damping * torch.eye(SAMPLES, dtype=torch.float64)
    middle = torch.linalg.pinv(damped, hermitian=True)
    found = []
    for _ in range(4):
        found.append(float(residual @ residual))
        residual = residual - eta * j @ (j.T @ (middle @ residual))
    expected = [start.linear_ratio(eta, damping, step) for step in range(4)]
    assert expected == pytest.approx([value / found[0] for value in found])
    worst = start.bound(eta, damping)
    assert all(expected[step] < worst**step for step in range(1, 4))
    assert start.bound(eta, 0.0) == pytest.approx(1 - eta)


def test_allowed_stability_solves_the_condition_of_the_theorem() -> None:
    for eta in (0.1, 0.3, 0.9):
        c = allowed_stability(eta)
        assert 0 < c < 0.5
        assert (1 - 2 * c) / (1 + c) ** 2 == pytest.approx(eta)


def test_inputs_are_on_the_sphere_and_labels_are_signs() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    inputs, labels = two_layer.samples()
    assert (inputs.shape, inputs.dtype) == ((100, 64), torch.float64)
    torch.testing.assert_close(inputs.norm(dim=1), torch.ones(100, dtype=torch.float64))
    assert set(labels.tolist()) == {1.0, -1.0}
    assert 30 < (labels > 0).sum() < 70


@pytest.mark.parametrize(
    ("series", "factor"), [("bound:theorem", 0.7), ("bound:linearised:rho=0.01", None)]
)
def test_only_the_bound_without_damping_is_called_that_of_the_theorem(
    series: str, factor: float | None
) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    plan = two_layer.STUDY.plan(Options(seeds=(0,), is_quick=True))
    point = next(p for p in plan if p.series == series).run().points[0]
    start = two_layer._start(64, 0)
    damped = 1 - 0.3 * start.smallest / (start.smallest + 0.01 * start.largest)
    assert point["factor"] == pytest.approx(damped if factor is None else factor)


def test_ring_is_run_with_the_damping_that_its_name_says() -> None:
    rings = {p.series for p in two_layer.STUDY.plan(Options()) if p.series.startswith("ring")}
    config = two_layer.STUDY.config(Options())["ring"]
    assert rings == set(config)
    assert {name for name in rings if "bare" in name} == {
        f"ring:bare:rho={rho}" for rho in ("0.0001", "0.001", "0.01")
    }
    for name, given in config.items():
        assert name.endswith(f"rho={given['rho']:g}")
    model = torch.nn.Linear(2, 1)
    assert RING(model).defaults["rho"] == config["ring:rho=0.001"]["rho"], "as shipped"


def test_residual_that_grows_without_end_is_a_divergence() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    size = two_layer._Size((64,), 60, 64)
    with pytest.raises(ArithmeticError, match=r"at step \d+ the squared residual is \S+ times"):
        two_layer._ring(two_layer._bare(1e-5), 64, size, 0)
    with pytest.raises(ArithmeticError, match="nan times the first"):
        two_layer._check(math.nan, 1.0, 3)
