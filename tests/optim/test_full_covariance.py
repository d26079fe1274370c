# SPDX-License-Identifier: Apache-2.0
"""The Kalman update with a full covariance: against the diagonal form, textbooks and the batch solution."""

import pytest
import torch
from torch import Tensor

import grng_kernels as kernels
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
