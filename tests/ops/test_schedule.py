# SPDX-License-Identifier: Apache-2.0
"""``newton_schulz_schedule``: the steps follow from the condition number alone, and are the best ones."""

import math

import pytest
import torch

from grng_kernels import damped_inverse
from grng_kernels.damped_inverse.schedule import newton_schulz_schedule
from tests.cases import spd
from tests.properties import given, st


def chebyshev(degree, x):
    """T_degree(x) for x >= 1."""
    return math.cosh(degree * math.acosh(x))


def polynomial(schedule, eigenvalues):
    """What the schedule makes of eigenvalues of B: those of B·X."""
    x = torch.full_like(eigenvalues, schedule.start)
    for a, b in schedule.steps:
        x = x * (a + b * eigenvalues * x)
    return eigenvalues * x


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("rho", [1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-6])
def test_residual_is_one_over_a_chebyshev_polynomial(rho, tolerance):
    kappa = 1 + rho**-0.5
    schedule = newton_schulz_schedule(kappa, tolerance)
    degree = 2 ** len(schedule.steps)
    want = 1 / chebyshev(degree, (kappa + 1) / (kappa - 1))
    assert schedule.residual == pytest.approx(want, rel=1e-7)
    assert schedule.residual <= tolerance


@pytest.mark.parametrize("kappa", [1.5, 4.16, 11, 101, 1001])
def test_residual_bounds_every_spectrum_and_is_reached(kappa):
    schedule = newton_schulz_schedule(kappa, 1e-3)
    eigenvalues = torch.linspace(1 / kappa, 1, 20001, dtype=torch.float64)
    errors = (1 - polynomial(schedule, eigenvalues)).abs()
    assert errors.max().item() <= schedule.residual * (1 + 1e-9)
    assert errors.max().item() >= schedule.residual * 0.999


@pytest.mark.parametrize("kappa", [4.16, 11, 101])
def test_last_step_is_needed(kappa):
    schedule = newton_schulz_schedule(kappa, 1e-3)
    start = (kappa - 1) / (kappa + 1)
    before = 1 / chebyshev(2 ** (len(schedule.steps) - 1), 1 / start)
    assert before > 1e-3


@pytest.mark.parametrize("kappa", [4.16, 11, 101])
def test_no_other_step_of_the_form_does_better(kappa):
    """The first step is the minimax one: moving either coefficient enlarges the error."""
    schedule = newton_schulz_schedule(kappa, 1e-3)
    r = torch.linspace(1 / kappa, 1, 20001, dtype=torch.float64) * schedule.start
    a, b = schedule.steps[0]

    def worst(a, b):
        return (1 - r * (a + b * r)).abs().max().item()

    best = worst(a, b)
    for change in (-1e-3, 1e-3):
        assert worst(a + change, b) > best
        assert worst(a, b + change) > best


# Steps K of the scaled second-order scheme, and products 2·(K - 1), since the first step multiplies a
# multiple of the identity (algorithm notes, F.2).
COUNTS = [
    (0.316, 1e-3, 3), (0.316, 1e-6, 4), (0.173, 1e-3, 4), (0.173, 1e-6, 5), (0.1, 1e-3, 4), (0.1, 1e-6, 5),
    (0.0316, 1e-3, 5), (0.0316, 1e-6, 6), (0.01, 1e-3, 6), (0.01, 1e-6, 7), (0.001, 1e-3, 7),
    (0.001, 1e-6, 8),
]  # fmt: skip


@pytest.mark.parametrize(("shift", "tolerance", "steps"), COUNTS)
def test_number_of_steps(shift, tolerance, steps):
    assert len(newton_schulz_schedule(1 + 1 / shift, tolerance).steps) == steps


# kappa, start, and (a, b, residual after the step), from the table in the algorithm notes, F.2.
TABLE = [
    (4.16, 1.612574, [(2.461913, -1.230956, 0.231), (2.054802, -1.027401, 2.74e-2),
                      (2.000751, -1.000376, 3.76e-4)]),
    (11, 1.833333, [(3.063830, -1.531915, 0.532), (2.329554, -1.164777, 0.165),
                    (2.027525, -1.013763, 1.38e-2), (2.000189, -1.000095, 9.47e-5)]),
    (101, 1.980392, [(3.850481, -1.925241, 0.925), (3.496718, -1.748359, 0.748),
                     (2.777857, -1.388928, 0.389), (2.163642, -1.081821, 8.2e-2),
                     (2.006717, -1.003359, 3.4e-3), (2.000011, -1.000006, 5.6e-6)]),
]  # fmt: skip


@pytest.mark.parametrize(("kappa", "start", "steps"), TABLE, ids=lambda v: str(v)[:5])
def test_coefficients(kappa, start, steps):
    kappa = {4.16: 1 + 10**0.5}.get(kappa, kappa)
    schedule = newton_schulz_schedule(kappa, 1e-3)
    assert schedule.start == pytest.approx(start, abs=1e-6)
    for got, (a, b, residual) in zip(schedule.steps, steps, strict=True):
        assert got == pytest.approx((a, b), abs=2e-6)
        scale = got[0] / 2  # 2/(2 - e²), so that the residual after it is scale - 1
        assert scale - 1 == pytest.approx(residual, rel=5e-2)


def test_condition_number_one_needs_no_step():
    assert newton_schulz_schedule(1.0) == (1.0, (), 0.0)


@given(kappa=st.floats(1, 1e6), tolerance=st.floats(1e-12, 0.5))
def test_any_schedule_reaches_its_tolerance(kappa, tolerance):
    schedule = newton_schulz_schedule(kappa, tolerance)
    assert 0 <= schedule.residual <= tolerance
    assert len(schedule.steps) <= 60
    ends = torch.tensor([1 / kappa, 0.5 * (1 + 1 / kappa), 1.0], dtype=torch.float64)
    assert (1 - polynomial(schedule, ends)).abs().max().item() <= schedule.residual + 1e-9


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.5,), "kappa must be >= 1, got 0.5"),
        ((math.nan,), "kappa must be >= 1, got nan"),
        ((10.0, 0.0), "tolerance must be in (0, 1), got 0.0"),
        ((10.0, 1.0), "tolerance must be in (0, 1), got 1.0"),
        ((10.0, math.nan), "tolerance must be in (0, 1), got nan"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError) as caught:
        newton_schulz_schedule(*arguments)
    assert str(caught.value) == f"newton_schulz_schedule: {text}"


def log_uniform(n):
    """The test matrix of the algorithm notes, F.3: a log-uniform spectrum in [1e-8, 1]."""
    return spd(n, "cond1e8")


def test_symmetrising_the_residual_matrix_is_visibly_worse():
    """R = B·X is never symmetrised: what the package returns is far better than what that would give."""
    rho = 1e-4
    factor = log_uniform(256)
    result = damped_inverse(factor, rho=rho, method="newton_schulz")
    damped = factor + result.damping * torch.eye(256)
    norm = result.spectral_norm + result.damping
    b, eye = damped / norm, torch.eye(256)
    schedule = newton_schulz_schedule(1 + rho**-0.5, 1e-5)

    def residual(symmetrise):
        x = schedule.start * eye
        for p, q in schedule.steps:
            r = b @ x
            if symmetrise:
                r = (r + r.mT) / 2
            x = x @ (p * eye + q * r)
            x = (x + x.mT) / 2
        return ((eye - b @ x).norm() / 16).item()

    assert residual(symmetrise=True) > 100 * result.residual.item()
    assert residual(symmetrise=False) == pytest.approx(result.residual.item(), rel=0.5)
