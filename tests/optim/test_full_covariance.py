# SPDX-License-Identifier: Apache-2.0
"""The Kalman update with a full covariance: against the diagonal form, textbooks and the batch solution."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng import RKalman
from grng.curvature.full_covariance import full_kalman_update_

C, D = 3, 12


def _problem(seed: int = 0, likelihood: str = "gaussian") -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mean, h, e = normal(D), normal(C, D), normal(C)
    root = normal(C, C)
    noise = root @ root.mT + torch.eye(C) if likelihood == "gaussian" else root
    return mean, h, e, noise


def _spd_inverse(a: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(a))


@pytest.mark.parametrize("likelihood", ["gaussian", "fisher"])
@pytest.mark.parametrize(
    ("rho", "regularization"), [(0.0, "gradient"), (0.3, "gradient"), (0.3, "noise")]
)
def test_diagonal_form_is_its_restriction(likelihood: str, rho: float, regularization: str) -> None:
    mean, h, e, noise = _problem(1, likelihood)
    p = torch.rand(D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    diagonal_mean, diagonal = mean.clone(), p.clone()
    kernels.kalman_update_(
        diagonal_mean, diagonal, h, e, noise,
        likelihood=likelihood, rho=rho, regularization=regularization,
    )  # fmt: skip
    covariance = torch.diag(p)
    info = full_kalman_update_(
        mean, covariance, h, e, noise,
        likelihood=likelihood, rho=rho, regularization=regularization,
    )  # fmt: skip
    assert int(info) == 0
    torch.testing.assert_close(mean, diagonal_mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(covariance.diagonal(), diagonal, rtol=1e-8, atol=1e-8)
    assert covariance.sub(torch.diag(covariance.diagonal())).abs().max() > 1e-3


def test_joseph_and_information_form() -> None:
    mean, h, e, noise = _problem(3)
    root = _problem(4)[1]
    covariance = torch.eye(D, dtype=torch.float64) + root.mT @ root
    before, old_mean = covariance.clone(), mean.clone()
    assert int(full_kalman_update_(mean, covariance, h, e, noise, likelihood="gaussian")) == 0
    gain = before @ h.mT @ _spd_inverse(h @ before @ h.mT + noise)
    keep = torch.eye(D, dtype=torch.float64) - gain @ h
    joseph = keep @ before @ keep.mT + gain @ noise @ gain.mT
    information = _spd_inverse(_spd_inverse(before) + h.mT @ _spd_inverse(noise) @ h)
    torch.testing.assert_close(covariance, joseph, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, information, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, old_mean + gain @ e, rtol=1e-9, atol=1e-9)
    assert torch.equal(covariance, covariance.mT)


def test_a_stream_ends_at_the_batch_solution() -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(200, D, generator=g, dtype=torch.float64)
    y = x @ torch.randn(D, generator=g, dtype=torch.float64) + 0.1 * torch.randn(
        200, generator=g, dtype=torch.float64
    )
    mean, covariance = torch.zeros(D, dtype=torch.float64), 4 * torch.eye(D, dtype=torch.float64)
    noise = torch.full((1, 1), 0.01, dtype=torch.float64)
    for row, value in zip(x, y, strict=True):
        innovation = (value - row @ mean).unsqueeze(0)
        full_kalman_update_(mean, covariance, row[None], innovation, noise, likelihood="gaussian")
    precision = x.mT @ x / 0.01 + torch.eye(D, dtype=torch.float64) / 4
    ridge = _spd_inverse(precision) @ (x.mT @ y / 0.01)
    torch.testing.assert_close(mean, ridge, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(covariance, _spd_inverse(precision), rtol=1e-8, atol=1e-10)


def test_stays_positive_over_a_long_stream() -> None:
    g = torch.Generator().manual_seed(6)
    mean, covariance = torch.zeros(D), 1e4 * torch.eye(D, dtype=torch.float64)
    for _ in range(500):
        h = torch.randn(1, D, generator=g) * 10.0 ** torch.randint(-3, 4, (1, 1), generator=g)
        noise = torch.full((1, 1), 1e-4)
        full_kalman_update_(
            mean, covariance, h, torch.randn(1, generator=g), noise, likelihood="gaussian"
        )
        assert bool((covariance.diagonal() > 0).all())
    assert bool(torch.isfinite(mean).all())
    assert float(torch.linalg.eigvalsh(covariance)[0]) > -1e-10 * float(covariance.diagonal().max())


@pytest.mark.parametrize("where", ["jacobian", "innovation", "noise", "mean"])
def test_a_failure_changes_nothing(where: str) -> None:
    mean, h, e, noise = _problem(7)
    {"jacobian": h, "innovation": e, "noise": noise, "mean": mean}[where].view(-1)[0] = float("nan")
    covariance = torch.eye(D, dtype=torch.float64)
    before = mean.clone()
    assert int(full_kalman_update_(mean, covariance, h, e, noise, likelihood="gaussian")) != 0
    assert torch.equal(mean, before) or where == "mean"
    assert torch.equal(covariance, torch.eye(D, dtype=torch.float64))


# ---- in the optimizer ----


def _regression(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g) @ torch.randn(5, 5, generator=g)  # correlated inputs
    y = x @ torch.randn(5, 1, generator=g) + 0.1 * torch.randn(n, 1, generator=g)
    return x, y


def _feed(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> None:
    for i in range(len(x)):
        optimizer.observe(model(x[i : i + 1]), y[i : i + 1])
        optimizer.step()


def _linear(covariance: str, **options: Any) -> tuple[nn.Module, RKalman]:
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    settings: dict[str, Any] = {
        "prior": "global", "sigma0": 2.0, "rho": 0.0, "likelihood": "gaussian", "noise": 0.01,
        "correct_coherence": False, "form": "fdekf",
    }  # fmt: skip
    return model, RKalman(model, covariance=covariance, **settings | options)


def test_first_step_is_that_of_the_diagonal_form_and_the_second_is_not() -> None:
    x, y = _regression(2)
    after = []
    for covariance in ("full", "diagonal"):
        model, optimizer = _linear(covariance)
        weights = []
        for i in range(2):
            _feed(optimizer, model, x[i : i + 1], y[i : i + 1])
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        after.append(weights)
    torch.testing.assert_close(after[0][0], after[1][0], rtol=1e-5, atol=1e-6)
    assert (after[0][1] - after[1][1]).abs().max() > 1e-3


def test_optimizer_ends_at_ridge_regression() -> None:
    x, y = _regression(50)
    model, optimizer = _linear("full")
    start = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    _feed(optimizer, model, x, y)
    z = torch.cat([x, torch.ones(50, 1)], dim=1).double()
    precision = z.mT @ z / 0.01 + torch.eye(6, dtype=torch.float64) / 4
    ridge = start + _spd_inverse(precision) @ (z.mT @ (y[:, 0].double() - z @ start) / 0.01)
    found = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(found, ridge, rtol=1e-4, atol=1e-4)


def test_weights_that_join_late_keep_what_is_known_of_the_others() -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(5, 2, bias=False), nn.Linear(2, 1, bias=False)
    nn.init.zeros_(b.weight)
    model, (x, y) = nn.Sequential(a, b), _regression(40)
    optimizer = RKalman(model, covariance="full", likelihood="gaussian", noise=0.01)
    _feed(optimizer, model, x[:1], y[:1])
    assert optimizer.state[a.weight]["covariance"].shape == (2, 2)
    early = optimizer.state[a.weight]["covariance"].clone()
    optimizer.observe(model(x[1:2]), torch.full((1, 1), float("nan")))
    optimizer.step()  # skipped
    assert torch.equal(optimizer.state[a.weight]["covariance"], early)
    _feed(optimizer, model, x[2:], y[2:])
    covariance = optimizer.state[a.weight]["covariance"]
    assert covariance.shape == (12, 12) and float(torch.linalg.eigvalsh(covariance)[0]) > -1e-12
    torch.testing.assert_close(
        covariance.diagonal()[:10].float(), optimizer.state[a.weight]["variance"].flatten()
    )


def test_forgetting_keeps_correlations() -> None:
    x, y = _regression(30)
    model, optimizer = _linear("full", forgetting=0.9, process_noise=1e-3)
    _feed(optimizer, model, x, y)
    covariance = optimizer.state[model.weight]["covariance"]
    assert torch.equal(covariance, covariance.mT)
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0
    remembering = _linear("full")
    _feed(remembering[1], remembering[0], x, y)
    kept = remembering[1].state[remembering[0].weight]["covariance"]
    assert bool((covariance.diagonal() > kept.diagonal()).all())


def test_checkpoint_resumes_bitwise() -> None:
    x, y = _regression(20)
    model, optimizer = _linear("full")
    _feed(optimizer, model, x[:10], y[:10])
    other, resumed = _linear("full")
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _feed(optimizer, model, x[10:], y[10:])
    _feed(resumed, other, x[10:], y[10:])
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_too_many_weights_and_unknown_covariance() -> None:
    with pytest.raises(ValueError, match="at most 4096 weights to train, got 4160"):
        RKalman(nn.Linear(64, 64), covariance="full")
    with pytest.raises(ValueError, match="covariance must be one of diagonal, full"):
        RKalman(nn.Linear(4, 4), covariance="dense")


def test_weights_that_are_frozen_leave_and_may_come_back() -> None:
    x, y = _regression(30)
    model, optimizer = _linear("full")
    _feed(optimizer, model, x[:10], y[:10])
    model.bias.requires_grad_(False)
    fixed = model.bias.detach().clone()
    _feed(optimizer, model, x[10:20], y[10:20])
    assert optimizer.state[model.weight]["covariance"].shape == (5, 5)
    assert torch.equal(model.bias, fixed)
    model.bias.requires_grad_(True)
    _feed(optimizer, model, x[20:], y[20:])
    assert optimizer.state[model.weight]["covariance"].shape == (6, 6)
    assert not torch.equal(model.bias, fixed) and optimizer.diagnostics()["skipped"] == 0


def test_variances_of_another_filter_are_taken_over() -> None:
    x, y = _regression(30)
    model, optimizer = _linear("full")
    _feed(optimizer, model, x[:10], y[:10])
    for covariance in ("diagonal", "full"):
        saved = optimizer.state_dict()
        before = optimizer.state[model.weight]["variance"].clone()
        _, optimizer = _linear(covariance)
        optimizer = type(optimizer)(
            model, covariance=covariance, likelihood="gaussian", noise=0.01, rho=0.0,
            correct_coherence=False,
        )  # fmt: skip
        optimizer.load_state_dict(saved)
        _feed(optimizer, model, x[10:15], y[10:15])
        # Information only grows.
        assert bool((optimizer.state[model.weight]["variance"] <= before * (1 + 1e-5)).all())


def test_zero_variance_and_forgetting_stay_finite() -> None:
    x, y = _regression(10)
    model, optimizer = _linear("full", forgetting=0.9, process_noise=1e-4)
    _feed(optimizer, model, x[:2], y[:2])
    optimizer.state[model.bias]["variance"].zero_()
    _feed(optimizer, model, x[2:], y[2:])
    covariance = optimizer.state[model.weight]["covariance"]
    assert bool(torch.isfinite(covariance).all()) and optimizer.diagnostics()["skipped"] == 0


def test_a_group_that_makes_too_many_is_refused_whole() -> None:
    optimizer = RKalman(nn.Linear(40, 40), covariance="full")
    with pytest.raises(ValueError, match="at most 4096 weights to train, got 4241"):
        optimizer.add_param_group({"params": [*nn.Linear(50, 51).parameters()]})
    assert len(optimizer.param_groups) == 1
