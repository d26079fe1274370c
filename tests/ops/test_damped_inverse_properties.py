# SPDX-License-Identifier: Apache-2.0
"""``damped_inverse`` on whatever matrices hypothesis thinks of, and faults that must not go unflagged."""

import math

import pytest
import torch

from grng_kernels import Info, damped_inverse
from grng_kernels.damped_inverse.reference import FLOOR, MARGIN, RESIDUAL_LIMIT
from tests.cases import inverse64, spd, state_dtype
from tests.properties import given, settings, st

methods = pytest.mark.parametrize("method", ["cholesky", "newton_schulz"])

# Orders around the widths of vectors and tiles, and others.
ORDERS = st.one_of(st.sampled_from([1, 2, 3, 8, 16, 17, 31, 32, 33, 64, 65]), st.integers(1, 80))
RHOS = st.floats(-6, 0).map(lambda exponent: 10.0**exponent)
# Exponents of the eigenvalues: few distinct ones make clusters, many a decaying spectrum.
EXPONENTS = st.lists(st.floats(-9, 0), min_size=1, max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])


class Matrix:
    """A PSD matrix with eigenvalues ``2^power·10^exponents``, repeated to its order; some are zero."""

    def __init__(self, n, exponents, zeros, power, seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        values = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)
        values = values[torch.arange(n) % len(values)]
        values[:zeros] = 0
        q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        a = (q * values) @ q.mT
        if dtype == torch.bfloat16:
            # Rounding moves eigenvalues by up to 2^-9·√n of the norm: more than a small damping adds.
            a = a + 0.02 * values.max() * torch.eye(n, dtype=torch.float64)
        self.factor = ((a + a.mT) / 2 * 2.0**power).to(dtype)
        self.text = f"n={n} exponents={exponents} zeros={zeros} power={power} seed={seed} {dtype}"

    def __repr__(self):
        return self.text


MATRICES = st.builds(
    Matrix,
    n=ORDERS,
    exponents=EXPONENTS,
    zeros=st.integers(0, 40),
    power=st.sampled_from([-60, -7, 0, 5, 60]),
    seed=st.integers(0, 2**16),
    dtype=DTYPES,
)


def damped64(factor, result):
    a = factor.double()
    return (a + a.mT) / 2 + result.damping.double() * torch.eye(len(a), dtype=torch.float64)


def check(factor, result, rho, method):
    """What holds for every PSD matrix and every rho >= 1e-6."""
    dtype, n = state_dtype(factor.dtype), len(factor)
    x, unit = result.inverse.double(), torch.finfo(dtype).eps / 2
    assert result.inverse.dtype == dtype
    assert result.info.item() == Info.OK
    assert torch.equal(result.inverse, result.inverse.mT)
    norm = torch.linalg.eigvalsh(factor.double()).abs().max().item()
    # The schedule is safe as long as the norm does not exceed its estimate by more than the margin.
    assert norm <= MARGIN * result.spectral_norm.item() * (1 + 1e-6)
    assert result.spectral_norm.item() <= 1.03 * norm * (1 + 1e-6)
    damping = result.damping.item()
    assert damping == pytest.approx(
        max(math.sqrt(rho) * result.spectral_norm.item(), FLOOR), rel=1e-5
    )
    m = damped64(factor, result)
    exact = inverse64(m)
    scale = torch.linalg.matrix_norm(exact).item()
    error = ((x - exact).norm() / scale).item()
    base = torch.cholesky_inverse(torch.linalg.cholesky(m.to(dtype))).double()
    allowed = 2 * ((base - exact).norm() / scale).item()
    kappa = 1 + MARGIN / math.sqrt(rho)
    # The forward error that a backward stable inverse promises; and what the schedule was asked for.
    allowed = max(allowed, 4 * unit, kappa * unit)
    if method == "newton_schulz":
        allowed += 2e-5
    assert error <= allowed
    residual = ((torch.eye(n, dtype=torch.float64) - m @ x).norm() / n**0.5).item()
    assert residual <= RESIDUAL_LIMIT
    # A residual in fp32 cannot be measured below the rounding of its own products.
    assert residual <= 4 * result.residual.item() + 8 * kappa * unit
    values = torch.linalg.eigvalsh(x)
    slack = allowed * scale
    assert values.min().item() > 0 or values.min().item() >= -slack
    assert values.max().item() <= 1 / torch.linalg.eigvalsh(m).min().item() + slack


@methods
@settings(max_examples=20)
@given(matrix=MATRICES, rho=RHOS)
def test_one_matrix(method, matrix, rho):
    check(matrix.factor, damped_inverse(matrix.factor, rho=rho, method=method), rho, method)


@methods
@settings(max_examples=8)
@given(matrices=st.lists(MATRICES, min_size=2, max_size=7), rho=RHOS)
def test_list_of_mixed_sizes_and_dtypes(method, matrices, rho):
    factors = [m.factor for m in matrices]
    result = damped_inverse(factors, rho=rho, method=method)
    for i, factor in enumerate(factors):
        check(factor, type(result)(*(field[i] for field in result)), rho, method)


@methods
@settings(max_examples=8)
@given(
    matrices=st.lists(MATRICES, min_size=1, max_size=4),
    bad=st.integers(0, 3),
    fault=st.sampled_from([math.nan, math.inf, -math.inf]),
    rho=RHOS,
)
def test_a_fault_stays_where_it_is(method, matrices, bad, fault, rho):
    factors = [m.factor for m in matrices]
    want = damped_inverse(factors, rho=rho, method=method)
    broken = torch.eye(factors[bad % len(factors)].shape[0])
    broken[-1, 0] = fault
    got = damped_inverse([broken, *factors], rho=rho, method=method)
    assert got.info[0].item() == Info.NONFINITE_INPUT
    for i, factor in enumerate(factors):
        item = type(got)(*(field[i + 1] for field in got))
        assert item.info.item() == want.info[i].item() == Info.OK
        check(factor, item, rho, method)


@methods
@settings(max_examples=20)
@given(matrix=MATRICES, rho=RHOS, power=st.integers(-40, 40))
def test_powers_of_two_pass_through_any_matrix(method, matrix, rho, power):
    factor = matrix.factor.to(state_dtype(matrix.factor.dtype))
    one = damped_inverse(factor, rho=rho, method=method)
    # Where nothing is near either end of the range, and no floor adds to the damping.
    scaled = damped_inverse(factor * 2.0**power, rho=rho, method=method)
    smallest = factor[factor != 0].abs().min().item() if factor.any() else 1.0
    if (
        smallest * 2.0 ** min(power, 0) > 1e-37
        and one.damping.item() * 2.0 ** min(power, 0) > 1e-30
    ):
        assert torch.equal(scaled.inverse, one.inverse * 2.0**-power)
        assert torch.equal(scaled.residual, one.residual)


@methods
@settings(max_examples=20)
@given(n=st.integers(2, 33), rho=RHOS, depth=st.floats(1.01, 50), seed=st.integers(0, 2**16))
def test_an_indefinite_matrix_is_flagged(method, n, rho, depth, seed):
    """One eigenvalue below minus the damping: the damped matrix is not positive definite."""
    matrix = Matrix(n, [0.0], 0, 0, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(n, generator=generator, dtype=torch.float64)
    v = v / v.norm()
    low = min(depth * 1.05 * math.sqrt(rho), 0.9)
    if low <= 1.03 * math.sqrt(rho):
        return
    factor = matrix.factor - (1 + low) * torch.outer(v, v)
    result = damped_inverse(factor, rho=rho, method=method)
    if result.info.item() == Info.OK:
        m = damped64(factor, result)
        residual = (torch.eye(n, dtype=torch.float64) - m @ result.inverse).norm() / n**0.5
        assert residual.item() <= 1.5 * RESIDUAL_LIMIT
        assert method == "newton_schulz"  # Cholesky always fails


# ---- rows 28 to 33 of the reliability table, for both methods ----


@methods
def test_rank_one_of_512(device, method):
    factor = spd(512, "rank1", device=device)
    result = damped_inverse(factor, rho=1e-2, method=method)
    m = damped64(factor.cpu(), result)
    eye = torch.eye(512, dtype=torch.float64)
    assert result.info.item() == Info.OK
    assert result.inverse.isfinite().all()
    assert ((eye - m @ result.inverse.double().cpu()).norm() / 512**0.5).item() < 2e-5
    assert result.residual.item() < 2e-5


@methods
@pytest.mark.parametrize("n", [1, 5, 64])
def test_zero_matrix_is_the_identity_over_the_floor_by_either_method(device, method, n):
    result = damped_inverse(torch.zeros(n, n, device=device), rho=1e-2, method=method)
    assert result.info.item() == Info.OK
    want = torch.eye(n) / FLOOR
    assert (result.inverse.cpu() - want).abs().max().item() <= 2e-5 / FLOOR


def test_zero_matrix_with_a_damping_of_its_own(device):
    result = damped_inverse(torch.zeros(3, 5, 5, device=device), damping=0.25)
    assert (result.info == Info.OK).all()
    torch.testing.assert_close(
        result.inverse.cpu(), 4 * torch.eye(5).expand(3, 5, 5), rtol=1e-6, atol=0
    )


@methods
@pytest.mark.parametrize("kind", ["clustered", "cond1e8"])
@pytest.mark.parametrize("size", [1e-7, 1e-6])
def test_asymmetric_or_indefinite_by_rounding_by_either_method(device, method, kind, size):
    factor = spd(129, kind, device=device)
    factor = factor + size * torch.randn(129, 129, device=device)
    assert torch.linalg.eigvalsh((factor + factor.mT).double().cpu() / 2)[0].item() < 0 or (
        kind == "clustered"
    )
    result = damped_inverse(factor, rho=1e-4, method=method)
    m, eye = damped64(factor.cpu(), result), torch.eye(129, dtype=torch.float64)
    assert result.info.item() == Info.OK
    assert ((eye - m @ result.inverse.double().cpu()).norm() / 129**0.5).item() < 1e-3


@methods
def test_asymmetry_is_averaged_away_by_either_method(device, method):
    symmetric, skew = spd(33, device=device), torch.randn(33, 33, device=device)
    # Sums of a few multiples of 2^-6 below 2^6: the average is exact.
    symmetric, skew = (symmetric * 64).round() / 64, ((skew - skew.mT) * 64).round() / 64
    got, want = (damped_inverse(f, rho=1e-2, method=method) for f in (symmetric + skew, symmetric))
    torch.testing.assert_close(got.inverse, want.inverse, rtol=1e-4, atol=1e-4)


@methods
def test_condition_beyond_fp32_is_solved_or_flagged(device, method):
    """rho so small that fp32 cannot hold the answer: never an unflagged wrong inverse."""
    for seed in range(5):
        torch.manual_seed(seed)
        factor = spd(64, "cond1e8", device=device)
        result = damped_inverse(factor, rho=2.5e-13, method=method)
        m, eye = damped64(factor.cpu(), result), torch.eye(64, dtype=torch.float64)
        residual = ((eye - m @ result.inverse.double().cpu()).norm() / 8).item()
        if result.info.item() == Info.OK:
            assert residual <= 2 * RESIDUAL_LIMIT, seed


@pytest.mark.parametrize("damping", [1e-30, 1e-12, 1e-9])
def test_absolute_damping_that_rounds_away_is_harmless_or_flagged(device, damping):
    """Whether it does is known on the device only, so no error can be raised: info says it."""
    factor = spd(64, "rank1", device=device)
    result = damped_inverse(factor, damping=damping)
    m, eye = damped64(factor.cpu(), result), torch.eye(64, dtype=torch.float64)
    residual = ((eye - m @ result.inverse.double().cpu()).norm() / 8).item()
    assert result.info.item() != Info.OK or residual <= 2 * RESIDUAL_LIMIT


@pytest.mark.parametrize("damping", [-1.0, -math.inf, math.inf, -0.0])
def test_damping_that_is_no_damping_is_refused(damping):
    with pytest.raises(
        ValueError, match=r"^damped_inverse: damping must be finite and in \(0.0, inf\)"
    ):
        damped_inverse(torch.eye(3), damping=damping)


def test_least_rho_is_accepted_and_less_is_not():
    least = (4 * torch.finfo(torch.float32).eps) ** 2
    assert damped_inverse(torch.eye(3), rho=least * 1.001).info.item() == Info.OK
    with pytest.raises(ValueError, match=r"rho must be at least 2\.3e-13"):
        damped_inverse(torch.eye(3), rho=least * 0.999)
