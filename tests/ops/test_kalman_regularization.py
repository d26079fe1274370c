# SPDX-License-Identifier: Apache-2.0
"""``kalman_update_`` with gradient regularisation, information of any kind, and several observations."""

import math

import numpy as np
import pytest
import torch

from grng_kernels import Info, kalman_update_, use_backend
from tests.cases import assert_within_budget, spd
from tests.ops.errors import assert_raises

forms = pytest.mark.parametrize("form", ["fdekf", "vdekf"])
signs = pytest.mark.parametrize("regularization", ["gradient", "noise"])
RHO = 0.3


def state(outputs, d, dtype=torch.float64, device="cpu"):
    mean, variance = torch.randn(d, dtype=torch.float64), torch.rand(d, dtype=torch.float64) + 0.1
    jacobian = torch.randn(outputs, d, dtype=torch.float64) / max(d, 1) ** 0.5
    return [t.to(device, dtype) for t in (mean, variance, jacobian)]


def updated(mean, variance, *args, **options):
    mean, variance = mean.clone(), variance.clone()
    info = kalman_update_(mean, variance, *args, **options)
    assert info.item() == Info.OK
    return mean, variance


def information_update(mean, variance, jacobian, score, information, form):
    """The dense information form ``(P⁻¹ + Hᵀ C H)⁻¹`` in numpy fp64, step = that times ``Hᵀ v``."""
    p, h = variance.double().cpu().numpy(), jacobian.double().cpu().numpy()
    precision = np.diag(1 / p) + h.T @ information @ h
    posterior = np.linalg.inv(precision)
    new = np.diag(posterior) if form == "fdekf" else 1 / np.diag(precision)
    return mean.double().cpu().numpy() + posterior @ h.T @ score, new


def classes(outputs):
    q = torch.randn(outputs, dtype=torch.float64).softmax(0)
    error = -q
    error[0] += 1
    return q, error


def assert_equal(got, wanted, tolerance=1e-11):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            a.double().cpu(),
            torch.tensor(np.asarray(b)) if isinstance(b, np.ndarray) else b.cpu(),
            rtol=tolerance,
            atol=tolerance,
        )


# ---- the regularised forms ----


def test_gaussian_step_minimises_the_regularised_objective():
    """By autograd: prior + l + (rho/2)·‖∇l‖² of a linear model, one Newton step, exact for a quadratic."""
    outputs, d = 4, 9
    mean, variance, h = state(outputs, d)
    target, noise = torch.randn(outputs).double(), 0.3 * spd(outputs).double() + torch.eye(outputs)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(noise))

    def objective(theta):
        error = target - h @ theta
        loss = 0.5 * error @ precision @ error
        gradient = torch.func.grad(lambda t: 0.5 * (target - h @ t) @ precision @ (target - h @ t))
        prior = 0.5 * ((theta - mean) ** 2 / variance).sum()
        return prior + loss + RHO / 2 * gradient(theta).square().sum()

    gradient = torch.func.grad(objective)(mean)
    hessian = torch.func.hessian(objective)(mean)
    posterior = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    got = updated(mean, variance, h, target - h @ mean, noise, rho=RHO)
    assert_equal(got, (mean - posterior @ gradient, posterior.diagonal()))


@forms
def test_noise_form_adds_to_the_noise(form):
    mean, variance, h = state(5, 40)
    error, noise = torch.randn(5).double(), 0.2 * spd(5).double() + 0.1 * torch.eye(5)
    got = updated(mean, variance, h, error, noise, rho=RHO, regularization="noise", form=form)
    assert_equal(got, updated(mean, variance, h, error, noise + RHO * h @ h.T, form=form))


@forms
@signs
def test_categorical_against_the_dense_information_form(form, regularization):
    mean, variance, h = state(6, 40)
    q, error = classes(6)
    r, g = (torch.diag(q) - torch.outer(q, q)).numpy(), (h @ h.T).numpy()
    if regularization == "gradient":
        curvature, score = r + RHO * r @ g @ r, (np.eye(6) + RHO * r @ g) @ error.numpy()
    else:
        # Observing the label with noise R + rho·(RH)(RH)ᵀ, through R H, on the range of R.
        inverse = np.linalg.pinv(r + RHO * r @ g @ r)
        curvature, score = r @ inverse @ r, r @ inverse @ error.numpy()
    got = updated(
        mean, variance, h, error, q,
        likelihood="categorical", form=form, rho=RHO, regularization=regularization,
    )  # fmt: skip
    assert_equal(got, information_update(mean, variance, h, score, curvature, form), 1e-9)


@forms
@signs
def test_gaussian_equals_the_information_form(form, regularization):
    """With ``T Tᵀ = R⁻¹`` and ``v = R⁻¹ e`` both likelihoods are one filter, with and without rho."""
    mean, variance, h = state(5, 30)
    error, noise = torch.randn(5).double(), 0.2 * spd(5).double() + 0.1 * torch.eye(5).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(noise))
    root, score = torch.linalg.cholesky(inverse), inverse @ error
    for rho in (0.0, RHO):
        options = {"form": form, "rho": rho, "regularization": regularization}
        wanted = updated(mean, variance, h, error, noise, **options)
        got = updated(mean, variance, h, score, root, likelihood="fisher", **options)
        assert_equal(got, wanted, 1e-10)


def test_gradient_regularisation_shrinks_the_variance_and_noise_does_the_opposite(backend):
    mean, variance, h = state(4, 300, torch.float32, backend.device)
    q, error = (t.to(h) for t in classes(4))
    plain, smaller, larger = (
        updated(
            mean, variance, h, error, q, likelihood="categorical", rho=rho, regularization=sign
        )[1]
        for rho, sign in ((0.0, "gradient"), (5.0, "gradient"), (5.0, "noise"))
    )
    assert (smaller <= plain).all() and (larger >= plain).all()
    assert (smaller < plain).any() and (larger > plain).any()


# ---- the kernels ----


@forms
@signs
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "fisher"])
@pytest.mark.parametrize(
    ("outputs", "d"),
    [(1, 300), (2, 5000), (10, 700), (17, 20000), (40, 400), (70, 300), (130, 400)],
)
def test_kernel_error_is_at_most_twice_that_of_torch(
    backend, form, regularization, likelihood, outputs, d
):
    mean, variance, h = state(outputs, d, torch.float32, backend.device)
    if likelihood == "categorical":
        noise, error = (t.to(h) for t in classes(outputs))
    else:
        error = torch.randn(outputs).to(h)
        noise = (0.2 * spd(outputs) + 0.1 * torch.eye(outputs)).to(h)
        if likelihood == "fisher":
            noise = noise[:, : max(1, outputs - 1)].contiguous()
    options = {"form": form, "likelihood": likelihood, "rho": RHO, "regularization": regularization}
    got = updated(mean, variance, h, error, noise, **options)
    with use_backend("reference"):
        base = updated(mean, variance, h, error, noise, **options)
        exact = updated(*(t.double() for t in (mean, variance, h, error, noise)), **options)
    for a, b, reference in zip(got, base, exact, strict=True):
        assert_within_budget(a, reference, b)


@forms
def test_blocks_with_regularisation_are_one_state(backend, form):
    mean, variance, h = state(3, 50, torch.float32, backend.device)
    q, error = (t.to(h) for t in classes(3))
    options = {"form": form, "likelihood": "categorical", "rho": RHO}
    whole = updated(mean, variance, h, error, q, **options)
    means, variances = ([b.clone() for b in t.split([20, 0, 30])] for t in (mean, variance))
    jacobians = [b.contiguous() for b in h.split([20, 0, 30], dim=1)]
    kalman_update_(means, variances, jacobians, error, q, **options)
    torch.testing.assert_close(torch.cat(means), whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(variances), whole[1], rtol=1e-6, atol=1e-6)


# ---- several observations, diagonal noise ----


@forms
def test_stacked_categorical_observations(backend, form):
    """N softmax observations in one call: their information is block-diagonal."""
    n, c = 3, 4
    mean, variance, h = state(n * c, 60, torch.float64, backend.device)
    pairs = [classes(c) for _ in range(n)]
    q, error = torch.stack([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    blocks = torch.block_diag(*(torch.diag(p) - torch.outer(p, p) for p in q))
    got = updated(
        *(t.float() for t in (mean, variance, h, error.to(h), q.to(h))),
        likelihood="categorical",
        form=form,
    )
    wanted = information_update(mean, variance, h, error.numpy(), blocks.numpy(), form)
    assert_equal(got, wanted, 1e-5)
    with use_backend("reference"):
        exact = updated(
            mean, variance, h, error.to(h), q.to(h), likelihood="categorical", form=form
        )
    assert_equal(exact, wanted)


def test_noise_may_differ_between_outputs(backend):
    mean, variance, h = state(3, 20, torch.float32, backend.device)
    error, noise = torch.randn(3).to(h), torch.tensor([0.1, 1.0, 10.0]).to(h)
    got = updated(mean, variance, h, error, noise)
    for a, b in zip(got, updated(mean, variance, h, error, torch.diag(noise)), strict=True):
        assert torch.equal(a, b)


# ---- faults and errors ----


@signs
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("where", ["mean", "variance", "jacobian", "innovation", "noise"])
def test_nonfinite_input_with_rho_changes_nothing(backend, regularization, likelihood, where):
    mean, variance, h = state(3, 40, torch.float32, backend.device)
    q, error = (t.to(h) for t in classes(3))
    noise = q if likelihood == "categorical" else torch.eye(3).to(h)
    arguments = {
        "mean": mean,
        "variance": variance,
        "jacobian": h,
        "innovation": error,
        "noise": noise,
    }
    arguments[where].view(-1)[0] = math.nan
    before = mean.clone(), variance.clone()
    info = kalman_update_(
        *arguments.values(), likelihood=likelihood, rho=RHO, regularization=regularization
    )
    assert info.item() == Info.NONFINITE_INPUT
    assert torch.equal(mean.nan_to_num(7), before[0].nan_to_num(7))
    assert torch.equal(variance.nan_to_num(7), before[1].nan_to_num(7))


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("rho must be", {"rho": -1.0}),
        ("rho must be", {"rho": math.nan}),
        ("rho must be", {"rho": torch.tensor(0.1)}),
        ("regularization must be one of gradient, noise, got 'both'", {"regularization": "both"}),
        ("noise must be the root [C, k]", {"likelihood": "fisher", "noise": 0.5}),
        (
            "noise must have shape [C, k] with k <= C = 3",
            {"likelihood": "fisher", "noise": torch.ones(3)},
        ),
        ("with k <= C = 3, got [3, 4]", {"likelihood": "fisher", "noise": torch.ones(3, 4)}),
        ("noise must have shape [3]", {"noise": torch.ones(2)}),
        ("noise must have shape [3]", {"likelihood": "categorical", "noise": torch.ones(2, 2)}),
    ],
)
def test_errors(text, changes):
    mean, variance, h = state(3, 5, torch.float32)
    options = {"noise": torch.eye(3)} | changes
    noise = options.pop("noise")
    error = (
        TypeError
        if isinstance(noise, float) or isinstance(changes.get("rho"), torch.Tensor)
        else ValueError
    )
    assert_raises(error, text, kalman_update_, mean, variance, h, torch.ones(3), noise, **options)
