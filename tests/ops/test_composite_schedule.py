# SPDX-License-Identifier: Apache-2.0
"""Products that each scheme needs, in exact arithmetic: why the package takes scaled steps of order 2."""

import math
from fractions import Fraction
from pathlib import Path

import pytest

from grng_kernels.damped_inverse.schedule import minimax_step, newton_schulz_schedule

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MILLI, MICRO = Fraction(1, 10**3), Fraction(1, 10**6)


@pytest.fixture(autouse=True)
def _benchmark_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def kappa_of(shift):
    return 1 + 1 / Fraction(shift)


def least_degree(kappa, tolerance):
    """The degree that any residual polynomial needs: 1/T_D((kappa+1)/(kappa-1)) is the least maximum."""
    x = (kappa + 1) / (kappa - 1)
    degree, before, now = 1, Fraction(1), x
    while 1 / now > tolerance:
        degree, before, now = degree + 1, now, 2 * x * now - before
    return degree


def steps_until(error, tolerance, power):
    count = 0
    while error > tolerance:
        error, count = error**power, count + 1
    return count


def scaled_steps(kappa, tolerance):
    error, count = (kappa - 1) / (kappa + 1), 0
    while error > tolerance:
        error, count = error**2 / (2 - error**2), count + 1
    return count


# shift, tolerance, D_min, lower bound, then steps/products: NS2 from I/lmax, NS2 from the best multiple of
# the identity, hyperpower 3, scaled NS2; then the products of the best composite and its orders (algorithm
# notes, F.2).
COUNTS = [
    ("0.316", MILLI, 8, 3, "5/8", "4/6", "3/7", "3/4", 4, (2, 2, 2)),
    ("0.316", MICRO, 14, 4, "6/10", "5/8", "4/10", "4/6", 5, (3, 5)),
    ("0.173", MILLI, 10, 4, "6/10", "5/8", "3/7", "4/6", 4, (2, 5)),
    ("0.173", MICRO, 18, 5, "7/12", "6/10", "4/10", "5/8", 6, (2, 3, 3)),
    ("0.1", MILLI, 13, 4, "7/12", "6/10", "4/10", "4/6", 5, (3, 5)),
    ("0.1", MICRO, 24, 5, "8/14", "7/12", "4/10", "5/8", 6, (5, 5)),
    ("0.0316", MILLI, 22, 5, "8/14", "7/12", "5/13", "5/8", 6, (5, 5)),
    ("0.0316", MICRO, 42, 6, "9/16", "8/14", "5/13", "6/10", 8, (2, 5, 5)),
    ("0.01", MILLI, 39, 6, "10/18", "9/16", "6/16", "6/10", 8, (5, 5, 2)),
    ("0.01", MICRO, 73, 7, "11/20", "10/18", "6/16", "7/12", 9, (3, 5, 5)),
    ("0.001", MILLI, 121, 7, "13/24", "12/22", "8/22", "7/12", 10, (5, 5, 5)),
    ("0.001", MICRO, 230, 8, "14/26", "13/24", "9/25", "8/14", 12, (2, 5, 5, 5)),
]


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: f"{row[0]}-{float(row[1]):.0e}")
def test_products_of_every_scheme(row):
    from composite import best_for, first_error, products, residual_after

    shift, tolerance, degree, bound, *rivals, composite, orders = row
    kappa = kappa_of(shift)
    assert least_degree(kappa, tolerance) == degree
    # m products make polynomials of degree at most 2^m in X; the residual has one degree more.
    assert math.ceil(math.log2(degree - 1)) == bound
    plain = steps_until(1 - 1 / kappa, tolerance, 2)
    start = steps_until(first_error(kappa), tolerance, 2)
    third = steps_until(first_error(kappa), tolerance, 3)
    scaled = scaled_steps(kappa, tolerance)
    counts = [(plain, 2), (start, 2), (third, 3), (scaled, 2)]
    assert [f"{k}/{power * k - 2}" for k, power in counts] == rivals
    assert len(newton_schulz_schedule(float(kappa), float(tolerance)).steps) == scaled
    found = best_for(kappa, tolerance)
    assert products(found.orders) == products(orders) == composite
    assert found.residual <= tolerance and residual_after(kappa, orders) <= tolerance
    assert bound <= composite <= 2 * scaled - 2


# kappa, then the residual of scaled NS2 and of the best composite for 4, 6, 8, 10, 12 products (F.2).
BUDGETS = [
    ("0.1", ["1.4e-2", "9.5e-5", "4.5e-9"], ["4.0e-3", "3.5e-7", "6.1e-14"]),
    ("0.0316", ["1.2e-1", "7.0e-3", "2.4e-5", "2.9e-10"], ["5.8e-2", "2.9e-4", "4.2e-8", "1.2e-19"]),
    ("0.01", ["3.9e-1", "8.2e-2", "3.4e-3", "5.6e-6", "1.6e-11"],
     ["2.7e-1", "1.4e-2", "9.2e-5", "2.9e-11", "4.2e-22"]),
    ("0.001", ["8.8e-1", "6.4e-1", "2.6e-1", "3.5e-2", "6.1e-4"],
     ["8.3e-1", "3.9e-1", "8.5e-2", "7.4e-4", "2.7e-7"]),
]  # fmt: skip


@pytest.mark.parametrize(("shift", "scaled", "composite"), BUDGETS, ids=[b[0] for b in BUDGETS])
def test_residual_within_a_budget(shift, scaled, composite):
    from composite import best_within, residual_after

    for budget, ns2, best in zip((4, 6, 8, 10, 12), scaled, composite, strict=False):
        steps = (2,) * (budget // 2 + 1)
        assert float(residual_after(kappa_of(shift), steps)) == pytest.approx(float(ns2), rel=0.05)
        got = best_within(kappa_of(shift), budget).residual
        assert float(got) == pytest.approx(float(best), rel=0.05)


@pytest.mark.parametrize("orders", [(2,), (2, 2, 2), (3, 5), (5, 2), (2, 5, 5), (3, 3, 2)], ids=str)
@pytest.mark.parametrize("kappa", [Fraction(5), Fraction(101)], ids=str)
def test_best_steps_one_by_one_are_the_best_polynomial_of_their_degree(kappa, orders):
    """T_a(T_b) = T_ab: exactly 1/T_D, reached with alternating signs at D + 1 points."""
    from composite import chebyshev, evaluate, first_error, minimax_factor, residual_after

    want = 1 / evaluate(chebyshev(math.prod(orders)), (kappa + 1) / (kappa - 1))
    assert residual_after(kappa, orders) == want
    error, x = (
        first_error(kappa),
        {value: 2 / (1 + 1 / kappa) for value in (1 / kappa, Fraction(1))},
    )
    for order in orders:
        p, error = minimax_factor(order, error)
        x = {value: at * evaluate(p, value * at) for value, at in x.items()}
    assert error == want
    assert 1 - x[1 / kappa] / kappa == want
    assert abs(1 - x[Fraction(1)]) == want


@pytest.mark.parametrize("error", [Fraction(9, 10), Fraction(1, 2), Fraction(1, 1000)], ids=str)
def test_factor_of_order_two_is_the_step_of_the_package(error):
    from composite import minimax_factor

    (a, b), after = minimax_factor(2, error)
    assert (a, b) == (4 / (2 - error**2), -2 / (2 - error**2))
    assert minimax_step(float(error)) == pytest.approx(
        (float(a), float(b), float(after)), rel=1e-15
    )


@pytest.mark.parametrize(
    "kappa", [Fraction(5, 2), Fraction(11), Fraction(101), Fraction(1001)], ids=str
)
@pytest.mark.parametrize("tolerance", [MILLI, MICRO], ids=["1e-3", "1e-6"])
def test_float_schedule_has_the_exact_residual(kappa, tolerance):
    from composite import residual_after

    schedule = newton_schulz_schedule(float(kappa), float(tolerance))
    exact = residual_after(kappa, (2,) * len(schedule.steps))
    # Each of the steps doubles the relative error of what comes in, and adds one of its own.
    assert schedule.residual == pytest.approx(float(exact), rel=2.0 ** len(schedule.steps) * 1e-15)
