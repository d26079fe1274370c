# SPDX-License-Identifier: Apache-2.0
"""``newton_schulz_plan``: a pure function of rho, held to its promise by emulated low-precision products."""

import math
from pathlib import Path

import pytest
import torch

from grng_kernels.damped_inverse import reference
from grng_kernels.damped_inverse.precision import (
    COST,
    KINDS,
    MARGIN,
    ROUNDOFF,
    TOLERANCE,
    cost_of,
    newton_schulz_plan,
    predict,
    residual_noise,
)
from grng_kernels.damped_inverse.schedule import condition_number, newton_schulz_schedule
from tests.properties import given, settings, st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RHOS = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
SPECTRA = ["log-uniform", "two ends", "few small", "rank 1", "power law", "uniform"]


@pytest.fixture(autouse=True, scope="module")
def _benchmark_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def kinds_of(plan):
    return [(step.residual_precision, step.precision) for step in plan.steps]


# ---- the plan itself ----


@pytest.mark.parametrize("rho", RHOS)
def test_low_precision_comes_first_and_corrections_last(rho):
    plan = newton_schulz_plan(rho)
    assert plan is newton_schulz_plan(rho)
    order = [KINDS.index(kind) for kind in kinds_of(plan)]
    assert order == sorted(order)
    assert plan.steps[-1][:3] == (2.0, -1.0, "tf32x3")
    assert plan.start == pytest.approx(2 / (1 + 1 / condition_number(rho, MARGIN)))


def test_the_margin_is_that_of_the_reference():
    assert MARGIN == reference.MARGIN


@pytest.mark.parametrize("rho", RHOS)
def test_it_is_cheaper_than_full_precision_and_hardly_longer(rho):
    plan = newton_schulz_plan(rho)
    full = newton_schulz_schedule(condition_number(rho, MARGIN), TOLERANCE).steps
    assert len(plan.steps) <= len(full) + 1
    assert cost_of(kinds_of(plan)) < cost_of([("tf32x3", "tf32x3")] * len(full))


@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-4])
def test_no_step_could_be_cheaper(rho):
    """A plan with one step of the next lower kind, in order, misses the tolerance or is not cheaper."""
    kinds = kinds_of(newton_schulz_plan(rho))
    for i, kind in enumerate(kinds[1:-1], start=1):
        if kind == kinds[i - 1]:
            continue
        lower = [*kinds[:i], KINDS[KINDS.index(kind) - 1], *kinds[i + 1 :]]
        forward = predict(condition_number(rho, MARGIN), lower)[1]
        assert forward > TOLERANCE or cost_of(lower) >= cost_of(kinds)


@given(st.floats(-12.6, 3))
def test_every_rho_has_a_plan(exponent):
    plan = newton_schulz_plan(10.0**exponent)
    assert 1 <= len(plan.steps) <= 25
    assert all(math.isfinite(step.a) and math.isfinite(step.b) for step in plan.steps)
    assert plan.residual > 0
    # The exact polynomial inverts every eigenvalue of the interval.
    kappa = condition_number(10.0**exponent, MARGIN)
    values = torch.logspace(-math.log10(kappa), 0, 1001, dtype=torch.float64)
    x = torch.full_like(values, plan.start)
    for step in plan.steps:
        x = x * (step.a + step.b * values * x)
    assert (1 - values * x).abs().max().item() <= max(2 * TOLERANCE, 1e-15 * kappa)


@pytest.mark.parametrize("rho", [1e12, 1e300])
def test_damping_beyond_all_eigenvalues_needs_one_step(rho):
    assert len(newton_schulz_plan(rho).steps) == 1


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_a_named_precision_is_the_only_one_and_stops_at_its_rounding(precision):
    plan = newton_schulz_plan(1e-2, precision)
    assert {p for kind in kinds_of(plan) for p in kind} == {precision}
    noise = residual_noise(precision, condition_number(1e-2, MARGIN))
    assert noise <= plan.residual <= 1.5 * noise + TOLERANCE


def test_every_precision_has_a_roundoff_and_a_cost():
    assert {p for kind in KINDS for p in kind} < set(ROUNDOFF) == set(COST)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.0,), "condition_number: rho must be finite and > 0, got 0.0"),
        ((math.nan,), "condition_number: rho must be finite and > 0, got nan"),
        (
            (1e-2, "fp8"),
            "newton_schulz_plan: precision must be one of auto, bf16, tf32, fp32, got 'fp8'",
        ),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError) as caught:
        newton_schulz_plan(*arguments)
    assert str(caught.value) == text


def test_a_margin_below_one_is_refused():
    with pytest.raises(
        ValueError, match=r"^condition_number: margin must be finite and >= 1, got 0.5$"
    ):
        condition_number(1e-2, 0.5)


# ---- the emulation ----


@pytest.mark.parametrize(
    ("name", "bits"), [("bf16", 8), ("tf32", 11), ("fp16", 11), ("tf32 truncated", 11)]
)
def test_rounding_keeps_so_many_bits(name, bits):
    from emulation import ROUND

    x = torch.rand(10000) + 1
    rounded = ROUND[name](x)
    assert torch.equal(ROUND[name](rounded), rounded)
    steps = rounded.double() * 2 ** (bits - 1)
    assert torch.equal(steps, steps.round())
    worst = ((rounded - x).abs().max() * 2**bits).item()
    assert (1.9 if name == "tf32 truncated" else 0.95) < worst <= (2 if "truncated" in name else 1)


def test_rounding_to_nearest_even():
    from emulation import to_tf32

    ulp = 2.0**-10
    x = torch.tensor([1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.49 * ulp, -1 - 1.5 * ulp, 0.0, 2 - ulp / 4])
    want = torch.tensor([1.0, 1 + 2 * ulp, 1.0, -1 - 2 * ulp, 0.0, 2.0])
    assert torch.equal(to_tf32(x), want)


@pytest.mark.parametrize("precision", ["bf16", "tf32", "bf16x3", "tf32x3"])
def test_products_err_as_their_roundoff_says(precision):
    from emulation import product

    a, b = torch.randn(2, 64, 64)
    exact = a.double() @ b.double()
    scale = a.abs().double() @ b.abs().double()
    error = ((product(a, b, precision) - exact).abs() / scale).max().item()
    # Both operands are rounded; sums in fp32 add up to 64 roundoffs of their own.
    assert ROUNDOFF[precision] / 60 < error <= 2.5 * ROUNDOFF[precision] + 16 * ROUNDOFF["fp32"]


# ---- the promise ----


def promise(of, plan, swap=None):
    """The worse of spectral and Frobenius forward error, over what is allowed; and the residual's share.

    Allowed is twice the error of Cholesky in fp32, or kappa·2^-24, its error by theory: on some matrices,
    rank one plus a multiple of the identity above all, it errs ten times less than that.
    """
    from emulation import cholesky, errors, planned

    found, base = errors(of, planned(of, plan, swap)[-1]), errors(of, cholesky(of))
    rho = (of.sigma * MARGIN / (1 - of.sigma)) ** 2
    theory = condition_number(rho, MARGIN) * ROUNDOFF["fp32"]
    pairs = [(found.spectral, base.spectral), (found.frobenius, base.frobenius)]
    share = max(error / max(2 * allowed, theory) for error, allowed in pairs)
    return share, found.residual / plan.residual


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rho", RHOS)
def test_error_is_that_of_cholesky_in_fp32(rho, spectrum):
    from emulation import problem

    forward, residual = promise(problem(spectrum, 128, rho), newton_schulz_plan(rho))
    assert forward <= 1
    assert residual <= 1


@settings(max_examples=15)
@given(
    exponent=st.floats(-6, 0),
    spectrum=st.sampled_from(SPECTRA),
    n=st.integers(16, 96),
    seed=st.integers(0, 2**16),
)
def test_any_rho_and_order(exponent, spectrum, n, seed):
    from emulation import problem

    rho = 10.0**exponent
    # The norm of the matrix may exceed its estimate up to the margin, or fall short of it.
    for margin in (1.0, MARGIN):
        of = problem(spectrum, n, rho, margin=margin, seed=seed)
        forward, residual = promise(of, newton_schulz_plan(rho))
        # Few numbers: the error of Cholesky itself scatters.
        assert forward <= 2
        assert residual <= 1


@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-3])
def test_less_precise_residuals_break_the_promise(rho):
    """The test above can fail: the last residual's precision sets the floor."""
    from emulation import problem

    plan = newton_schulz_plan(rho)
    of = [problem(spectrum, 128, rho) for spectrum in ("log-uniform", "two ends")]
    for coarse in ("bf16x3", "tf32", "bf16"):
        assert max(promise(each, plan, {"tf32x3": coarse})[0] for each in of) > 2


@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-3])
def test_precision_of_the_correction_hardly_matters(rho):
    """Which is why it may stay in TF32 to the end."""
    from emulation import errors, planned, problem

    of, plan = problem("log-uniform", 128, rho), newton_schulz_plan(rho)
    assert kinds_of(plan)[-1] == ("tf32x3", "tf32")
    last = plan.steps[-1]._replace(precision="fp32")
    better = plan._replace(steps=(*plan.steps[:-1], last))
    with_tf32, with_fp32 = (errors(of, planned(of, p)[-1]).frobenius for p in (plan, better))
    assert with_tf32 <= 1.3 * with_fp32


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_noise_of_a_single_precision_stays_below_its_bound(precision, rho, spectrum):
    from emulation import errors, planned, problem

    of, plan = problem(spectrum, 128, rho), newton_schulz_plan(rho, precision)
    assert errors(of, planned(of, plan, kernel=False)[-1]).residual <= plan.residual
