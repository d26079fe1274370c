# SPDX-License-Identifier: Apache-2.0
"""``damped_inverse``: (factor + damping·I)⁻¹ with its damping, norm, measured residual and info."""

import math

import pytest
import torch

from grng_kernels import Info, damped_inverse
from grng_kernels.damped_inverse.reference import FLOOR, RESIDUAL_LIMIT
from tests.cases import (
    ALL_DTYPES,
    MATRIX_LAYOUTS,
    ODD_SIZES,
    SPECTRA,
    STATE_DTYPES,
    assert_within_budget,
    dtype_id,
    far_apart,
    inverse64,
    offset_by_one,
    spd,
    state_dtype,
)
from tests.ops.errors import REFUSED, assert_raises, refused
from tests.properties import given, st

methods = pytest.mark.parametrize("method", ["cholesky", "newton_schulz"])
dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
state_dtypes = pytest.mark.parametrize("dtype", STATE_DTYPES, ids=dtype_id)
spectra = pytest.mark.parametrize("kind", SPECTRA)


def damped64(factor, result):
    """The matrix whose inverse was asked for, in fp64 on the CPU, with the damping that was used."""
    a = factor.double().cpu()
    return (a + a.mT) / 2 + result.damping.double().cpu() * torch.eye(len(a), dtype=torch.float64)


def residual64(factor, result):
    m = damped64(factor, result)
    n = len(m)
    eye = torch.eye(n, dtype=torch.float64)
    return (eye - m @ result.inverse.double().cpu()).norm().item() / n**0.5


def norm64(factor):
    return torch.linalg.eigvalsh(factor.double().cpu()).abs().max().item()


# ---- exact ----


@methods
@state_dtypes
@pytest.mark.parametrize("power", [-100, -24, 1, 30, 100])
def test_powers_of_two_pass_through(device, method, dtype, power):
    factor = spd(65, dtype=dtype, device=device)
    one = damped_inverse(factor, rho=1e-2, method=method)
    scaled = damped_inverse(factor * 2.0**power, rho=1e-2, method=method)
    assert torch.equal(scaled.inverse, one.inverse * 2.0**-power)
    assert torch.equal(scaled.damping, one.damping * 2.0**power)
    assert torch.equal(scaled.spectral_norm, one.spectral_norm * 2.0**power)
    assert torch.equal(scaled.residual, one.residual)
    assert torch.equal(scaled.info, one.info)


@state_dtypes
@pytest.mark.parametrize("power", [-60, 60])
def test_powers_of_two_pass_through_with_absolute_damping(device, dtype, power):
    factor = spd(65, dtype=dtype, device=device)
    one = damped_inverse(factor, damping=0.25)
    scaled = damped_inverse(factor * 2.0**power, damping=0.25 * 2.0**power)
    assert torch.equal(scaled.inverse, one.inverse * 2.0**-power)


@state_dtypes
@pytest.mark.parametrize("n", [1, 5, 64])
def test_zero_matrix_gives_the_identity_over_the_floor(device, dtype, n):
    result = damped_inverse(torch.zeros(n, n, dtype=dtype, device=device), rho=1e-2)
    want = torch.eye(n, dtype=torch.float64) / FLOOR
    assert result.info.item() == Info.OK
    unit = torch.finfo(dtype).eps
    assert (result.inverse.double().cpu() - want).abs().max().item() <= 4 * unit / FLOOR
    assert result.damping.item() == pytest.approx(FLOOR, rel=4 * unit)
    assert result.spectral_norm.item() == 0


@methods
def test_diagonal_matrix_has_the_closed_form(device, method):
    diagonal = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0], device=device)
    result = damped_inverse(torch.diag(diagonal), rho=1e-2, method=method)
    want = torch.diag(1 / (diagonal + result.damping))
    # Newton-Schulz stops at a residual of 1e-5.
    tolerance = 1e-6 if method == "cholesky" else 2e-5
    torch.testing.assert_close(result.inverse, want, rtol=tolerance, atol=tolerance)


@methods
def test_order_one_is_the_scalar_formula(device, method):
    result = damped_inverse(torch.tensor([[3.0]], device=device), rho=1e-2, method=method)
    assert result.spectral_norm.item() == pytest.approx(3.0, rel=1e-6)
    assert result.damping.item() == pytest.approx(0.3, rel=1e-6)
    assert result.inverse.item() == pytest.approx(1 / 3.3, rel=2e-5)


@state_dtypes
def test_given_damping_is_the_damping_used(device, dtype):
    factor = spd(17, dtype=dtype, device=device)
    assert damped_inverse(factor, damping=0.375).damping.item() == 0.375


def test_damping_is_the_root_of_rho_times_the_norm(device):
    result = damped_inverse(spd(65, device=device), rho=0.04)
    assert result.damping.item() == pytest.approx(0.2 * result.spectral_norm.item(), rel=1e-6)


@methods
@spectra
def test_inverse_is_bitwise_symmetric(device, method, kind):
    inverse = damped_inverse(spd(65, kind, device=device), rho=1e-2, method=method).inverse
    assert torch.equal(inverse, inverse.mT)


def test_asymmetry_is_averaged_away(device):
    symmetric = spd(33, device=device)
    skew = torch.randn(33, 33, device=device)
    # Sums of a few multiples of 2^-6 below 2^6: the average is exact.
    symmetric, skew = (symmetric * 64).round() / 64, ((skew - skew.mT) * 64).round() / 64
    got, want = damped_inverse(symmetric + skew, rho=1e-2), damped_inverse(symmetric, rho=1e-2)
    torch.testing.assert_close(got.inverse, want.inverse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.residual, want.residual, rtol=0, atol=1e-6)


# ---- accuracy ----


@dtypes
@spectra
@pytest.mark.parametrize("n", [*ODD_SIZES, 300])
def test_error_is_at_most_twice_that_of_torch(device, dtype, kind, n):
    # Several, because the largest error of one small matrix says more of its luck than of the method.
    factors = [
        spd(n, kind, dtype=dtype, device=device) for _ in range(-(-1000 // n) if n < 200 else 1)
    ]
    results = [damped_inverse(f, rho=1e-2) for f in factors]
    damped = [damped64(f, r) for f, r in zip(factors, results, strict=True)]
    base = [torch.cholesky_inverse(torch.linalg.cholesky(m.to(state_dtype(dtype)))) for m in damped]
    ref = torch.stack([inverse64(m) for m in damped])
    got = torch.stack([r.inverse for r in results])
    assert all(r.info.item() == Info.OK for r in results)
    assert got.dtype == state_dtype(dtype)
    floor = 1e-13 * ref.abs().max().item() if dtype == torch.float64 else None
    if kind == "zero" and floor is None:
        # One number, repeated: no sample, see assert_within_budget.
        floor = 4 * torch.finfo(torch.float32).eps * ref.abs().max().item()
    assert_within_budget(got, ref, torch.stack(base), floor=floor)


@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-3, 1e-4])
@spectra
@pytest.mark.parametrize("n", [17, 129])
def test_newton_schulz_reaches_its_tolerance_or_says_so(device, kind, n, rho):
    factor = spd(n, kind, device=device)
    result = damped_inverse(factor, rho=rho, method="newton_schulz")
    assert result.info.item() == Info.OK, f"residual {result.residual.item():.1e}"
    # 1e-5 is the tolerance of the schedule, 0.2·kappa²·eps/2 the floor of fp32 (algorithm notes, F.3).
    kappa = 1 + rho**-0.5
    assert residual64(factor, result) <= 2e-5 + kappa**2 * 2**-24


@methods
@spectra
@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-4, 1e-8])
def test_no_wrong_inverse_goes_unflagged(device, method, kind, rho):
    for n in (5, 64, 200):
        factor = spd(n, kind, device=device)
        result = damped_inverse(factor, rho=rho, method=method)
        if result.info.item() == Info.OK:
            assert residual64(factor, result) <= 1.5 * RESIDUAL_LIMIT
            assert result.inverse.isfinite().all()


@methods
def test_reported_residual_is_the_measured_one(device, method):
    """Of a matrix so ill-conditioned that the residual is more than the rounding of its own products."""
    factor = spd(129, "cond1e8", device=device)
    result = damped_inverse(factor, rho=1e-8, method=method)
    exact = residual64(factor, result)
    assert exact > 1e-5
    assert exact / 3 < result.residual.item() < 3 * exact


@spectra
@pytest.mark.parametrize("n", [*ODD_SIZES, 300])
def test_spectral_norm_is_at_most_a_few_percent_off(device, kind, n):
    factor = spd(n, kind, device=device)
    ratio_low, ratio_high = 0.97, 1.03
    norm = damped_inverse(factor, rho=1e-2).spectral_norm.item()
    exact = norm64(factor)
    assert ratio_low * exact <= norm <= ratio_high * exact


@given(st.integers(1, 24), st.integers(-30, 30), st.integers(0, 2**16))
def test_newton_schulz_and_cholesky_agree(n, power, seed):
    torch.manual_seed(seed)
    factor = spd(n) * 2.0**power
    results = [damped_inverse(factor, rho=1e-2, method=m) for m in ("newton_schulz", "cholesky")]
    assert [r.info.item() for r in results] == [Info.OK, Info.OK]
    got, want = (r.inverse for r in results)
    assert ((got - want).norm() / want.norm()).item() < 5e-4
    eigenvalues = torch.linalg.eigvalsh(want.double())
    assert eigenvalues.min() > 0


# ---- shapes ----


@pytest.mark.parametrize("shape", [(0, 0), (0, 5, 5), (3, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("how", [{"rho": 1e-2}, {"damping": 0.5}], ids=["rho", "damping"])
def test_empty_input_gives_an_empty_output(device, shape, how):
    result = damped_inverse(torch.empty(shape, device=device), **how)
    assert result.inverse.shape == shape
    for field in result[1:]:
        assert field.shape == shape[:-2]
    assert (result.info == Info.OK).all()


@pytest.mark.parametrize("field", ["damping", "spectral_norm", "residual"])
def test_matrices_of_order_zero_report_no_old_memory(device, field):
    values = getattr(damped_inverse(torch.empty(3, 0, 0, device=device), rho=1e-2), field)
    assert values.isfinite().all()


def test_spectral_vector_of_order_zero(device):
    vector = torch.zeros(0, device=device)
    result = damped_inverse(torch.empty(0, 0, device=device), rho=1e-2, spectral_vector=vector)
    assert result.inverse.shape == (0, 0)


def test_empty_list():
    assert damped_inverse([], rho=1e-2) == ([], [], [], [], [])


@dtypes
def test_shapes_and_dtypes_of_the_result(device, dtype):
    factor = spd(5, dtype=dtype, device=device)
    for given_factor, shape in ((factor, ()), (factor.repeat(3, 1, 1), (3,))):
        result = damped_inverse(given_factor, rho=1e-2)
        assert result.inverse.shape == given_factor.shape
        for field in result[:4]:
            assert (field.dtype, field.device) == (state_dtype(dtype), factor.device)
        for field in result[1:]:
            assert field.shape == shape
        assert result.info.dtype == torch.int32


def assert_fields_equal(got, want):
    for name, g, w in zip(got._fields, got, want, strict=True):
        assert torch.equal(g, w), f"{name}: {g} != {w}"


def assert_same_up_to_rounding(factor, got, want):
    """Batched products sum in another order. Both inverses keep the error budget against fp64."""
    assert got.info.item() == want.info.item() == Info.OK
    eps = torch.finfo(got.inverse.dtype).eps
    torch.testing.assert_close(got.damping, want.damping, rtol=16 * eps, atol=0)
    torch.testing.assert_close(got.spectral_norm, want.spectral_norm, rtol=16 * eps, atol=0)
    assert got.residual.item() <= 2 * want.residual.item() + 16 * eps
    ref = inverse64(damped64(factor, want))
    assert_within_budget(got.inverse, ref, want.inverse, floor=16 * eps * ref.abs().max().item())


@methods
@pytest.mark.parametrize("n", [17, 65, 129])
def test_batch_is_the_single_form(device, method, n):
    factors = torch.stack([spd(n, kind, device=device) for kind in SPECTRA])
    batch = damped_inverse(factors, rho=1e-2, method=method)
    for i, factor in enumerate(factors):
        single = damped_inverse(factor, rho=1e-2, method=method)
        assert_same_up_to_rounding(factor, type(batch)(*[field[i] for field in batch]), single)


@methods
def test_list_is_the_single_form(device, method):
    sizes = [65, 3, 17, 65, 1, 17, 65]
    dtypes = [torch.float32, torch.bfloat16, torch.float64] + [torch.float32] * 4
    factors = [spd(n, dtype=t, device=device) for n, t in zip(sizes, dtypes, strict=True)]
    grouped = damped_inverse(factors, rho=1e-2, method=method)
    for i, factor in enumerate(factors):
        single = damped_inverse(factor, rho=1e-2, method=method)
        item = type(single)(*[field[i] for field in grouped])
        assert_same_up_to_rounding(factor, item, single)


def test_list_may_hold_an_empty_matrix(device):
    factors = [spd(3, device=device), torch.empty(0, 0, device=device), spd(3, device=device)]
    inverses = damped_inverse(factors, rho=1e-2).inverse
    assert [i.shape[0] for i in inverses] == [3, 0, 3]


@pytest.mark.parametrize("form", ["number", "scalar", "vector"])
def test_damping_of_a_batch(device, form):
    factors = torch.stack([spd(9, device=device) for _ in range(3)])
    values = [0.5, 0.5, 0.5] if form != "vector" else [0.25, 0.5, 1.0]
    damping = {
        "number": 0.5,
        "scalar": torch.tensor(0.5, device=device),
        "vector": torch.tensor(values, device=device),
    }[form]
    result = damped_inverse(factors, damping=damping)
    assert result.damping.tolist() == values
    for i, value in enumerate(values):
        single = damped_inverse(factors[i], damping=value)
        assert torch.equal(single.inverse, result.inverse[i])


def test_damping_of_a_list(device):
    factors = [spd(n, device=device) for n in (3, 9, 3)]
    dampings = [torch.tensor(v, device=device) for v in (0.25, 0.5, 1.0)]
    for given_damping, values in ((dampings, (0.25, 0.5, 1.0)), (0.5, (0.5, 0.5, 0.5))):
        result = damped_inverse(factors, damping=given_damping)
        for i, value in enumerate(values):
            assert torch.equal(result.inverse[i], damped_inverse(factors[i], damping=value).inverse)


# ---- layouts ----


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@methods
def test_layout_does_not_matter(device, layout, method):
    factor = spd(65, device=device)
    want = damped_inverse(factor, rho=1e-2, method=method)
    got = damped_inverse(MATRIX_LAYOUTS[layout](factor), rho=1e-2, method=method)
    assert_fields_equal(got, want)


def test_expanded_batch(device):
    factor = spd(17, device=device)
    want = damped_inverse(factor, rho=1e-2)
    got = damped_inverse(factor.expand(4, 17, 17), rho=1e-2)
    for i in range(4):
        assert torch.equal(got.inverse[i], want.inverse)


def test_matrix_of_one_repeated_number(device):
    factor = torch.tensor(0.5, device=device).expand(9, 9)
    result = damped_inverse(factor, rho=1e-2)
    assert result.info.item() == Info.OK
    assert residual64(factor, result) < 1e-5


def test_unaligned_pointer_after_an_aligned_call(device):
    factor = spd(17, device=device)
    want = damped_inverse(factor, rho=1e-2)
    assert_fields_equal(damped_inverse(offset_by_one(factor), rho=1e-2), want)


@methods
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["matrices", "rows", "columns"])
def test_elements_further_apart_than_int32_reaches(device, method, dim, tmp_path):
    factors = torch.stack([spd(2 if dim else 9, device=device) for _ in range(2)])
    want = damped_inverse(factors, rho=1e-2, method=method)
    got = damped_inverse(far_apart(factors, dim, tmp_path), rho=1e-2, method=method)
    assert_fields_equal(got, want)


@methods
def test_more_matrices_than_a_side_of_a_grid(device, method):
    count = 66_000
    scales = torch.arange(1, count + 1, device=device).float()
    factors = scales[:, None, None] * torch.tensor([[2.0, 1], [1, 2]], device=device)
    result = damped_inverse(factors, rho=1e-2, method=method)
    assert (result.info == Info.OK).all()
    # Every matrix is a multiple of the first, and its inverse the same part of that one's.
    want = result.inverse[0] / scales[:, None, None]
    # Newton-Schulz stops at a residual of 1e-5, which rounding moves.
    torch.testing.assert_close(result.inverse, want, rtol=1e-4, atol=0)


def test_a_batch_of_one_is_the_single_form(device):
    factor = spd(17, device=device)
    batch, single = damped_inverse(factor[None], rho=1e-2), damped_inverse(factor, rho=1e-2)
    for got, want in zip(batch, single, strict=True):
        assert torch.equal(got, want[None])


def test_result_shares_no_memory_with_other_results(device):
    factors = [spd(5, device=device) for _ in range(3)]
    inverses = damped_inverse(factors, rho=1e-2).inverse
    kept = inverses[1].clone()
    inverses[0].fill_(math.nan)
    assert torch.equal(inverses[1], kept)


# ---- faults ----


def test_rank_one_of_512(device):
    factor = spd(512, "rank1", device=device)
    result = damped_inverse(factor, rho=1e-2)
    assert result.info.item() == Info.OK
    assert result.residual.item() < 1e-4
    assert residual64(factor, result) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-35, 1e-37])
@methods
def test_tiny_matrix(device, method, scale):
    """Near the floor the damping is absolute, and nothing overflows."""
    factor = spd(17, device=device) * scale
    result = damped_inverse(factor, rho=1e-2, method=method)
    assert result.info.item() == Info.OK
    assert result.damping.item() >= FLOOR * (1 - 1e-6)
    assert residual64(factor, result) < 1e-4


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e30, 1e38])
def test_ends_of_the_range(device, scale):
    result = damped_inverse(spd(9, device=device) * scale, rho=1e-2)
    if result.info.item() == Info.OK:
        for field in result[:4]:
            assert field.isfinite().all()
    else:
        assert result.info.item() == Info.OVERFLOW


def test_inverse_beyond_the_range_is_an_overflow(device):
    factor = 1e-39 * torch.eye(4, device=device)
    result = damped_inverse(factor, damping=1e-40)
    assert result.info.item() == Info.OVERFLOW


@pytest.mark.parametrize("kind", ["clustered", "cond1e8"])
@pytest.mark.parametrize("size", [1e-7, 1e-6])
def test_asymmetric_or_indefinite_by_rounding(device, kind, size):
    factor = spd(129, kind, device=device)
    noise = size * torch.randn(129, 129, device=device)
    result = damped_inverse(factor + noise, rho=1e-4)
    assert result.info.item() == Info.OK
    assert residual64(factor + noise, result) < 1e-3


def test_indefinite_matrix_is_not_converged(device):
    factor = torch.diag(torch.tensor([1.0, 1.0, -0.5], device=device))
    result = damped_inverse(factor, rho=1e-2)
    assert result.info.item() == Info.NOT_CONVERGED


def test_newton_schulz_flags_an_indefinite_matrix(device):
    factor = torch.diag(torch.tensor([1.0, 1.0, -0.5], device=device))
    result = damped_inverse(factor, rho=1e-2, method="newton_schulz")
    assert result.info.item() != Info.OK


@methods
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_one_nonfinite_matrix_of_64(device, method, value):
    factors = torch.stack([spd(17, device=device) for _ in range(64)])
    clean = damped_inverse(factors, rho=1e-2, method=method)
    factors[41, 3, 16] = value
    result = damped_inverse(factors, rho=1e-2, method=method)
    others = torch.arange(64, device=device) != 41
    assert result.info[41].item() == Info.NONFINITE_INPUT
    for name, got, want in zip(result._fields, result, clean, strict=True):
        assert torch.equal(got[others], want[others]), name


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_one_nonfinite_matrix_of_a_list(device, value):
    factors = [spd(n, device=device) for n in (9, 17, 9, 9)]
    clean = damped_inverse(factors, rho=1e-2)
    factors[2] = factors[2].clone()
    factors[2][0, 0] = value
    result = damped_inverse(factors, rho=1e-2)
    assert [i.item() for i in result.info] == [0, 0, Info.NONFINITE_INPUT, 0]
    for i in (0, 1, 3):
        assert torch.equal(result.inverse[i], clean.inverse[i])


@pytest.mark.parametrize("value", [0.0, -0.25, math.nan, math.inf], ids=str)
def test_bad_damping_on_the_device_sets_info(device, value):
    dampings = torch.tensor([0.5, value, 0.5], device=device)
    result = damped_inverse(torch.stack([torch.eye(5, device=device)] * 3), damping=dampings)
    assert [i != Info.OK for i in result.info.tolist()] == [False, True, False]


# ---- the norm's vector ----


def test_vector_is_updated_in_place_to_the_leading_eigenvector(device):
    factor = spd(33, "clustered", device=device)
    factor = factor + 3 * torch.outer(factor[0], factor[0]) / factor[0].square().sum()
    vector = torch.zeros(33, device=device)
    damped_inverse(factor, rho=1e-2, spectral_vector=vector)
    leading = torch.linalg.eigh(factor.double().cpu()).eigenvectors[:, -1]
    assert abs((vector.double().cpu() @ leading).item()) == pytest.approx(1, abs=1e-3)


def test_zero_vector_is_a_cold_start(device):
    factor = spd(65, device=device)
    vector = torch.zeros(65, device=device)
    want = damped_inverse(factor, rho=1e-2)
    assert_fields_equal(damped_inverse(factor, rho=1e-2, spectral_vector=vector), want)
    assert vector.norm().item() == pytest.approx(1, rel=1e-5)


def test_warm_starts_approach_the_norm(device):
    factor, vector = spd(129, device=device), torch.zeros(129, device=device)
    for _ in range(30):
        norm = damped_inverse(factor, rho=1e-2, spectral_vector=vector).spectral_norm.item()
    assert norm64(factor) <= norm <= 1.021 * norm64(factor)


@pytest.mark.parametrize("content", [math.nan, math.inf, 1e-30, 1e30], ids=str)
def test_any_vector_is_survived(device, content):
    factor = spd(33, device=device)
    vector = torch.full((33,), content, device=device)
    for _ in range(8):
        result = damped_inverse(factor, rho=1e-2, spectral_vector=vector)
    assert vector.isfinite().all()
    assert result.info.item() == Info.OK
    assert 0.97 * norm64(factor) <= result.spectral_norm.item() <= 1.03 * norm64(factor)


def test_vector_orthogonal_to_the_new_leading_one_recovers(device):
    vector = torch.zeros(4, device=device)
    vector[1] = 1
    factor = torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0], device=device))
    for _ in range(4):
        norm = damped_inverse(factor, rho=1e-2, spectral_vector=vector).spectral_norm.item()
    assert norm == pytest.approx(10, rel=0.03)


def test_vectors_of_a_list_and_of_a_batch(device):
    factors = [spd(n, device=device) for n in (9, 17, 9)]
    vectors = [torch.zeros(n, device=device) for n in (9, 17, 9)]
    alone = [torch.zeros(n, device=device) for n in (9, 17, 9)]
    damped_inverse(factors, rho=1e-2, spectral_vector=vectors)
    for factor, vector in zip(factors, alone, strict=True):
        damped_inverse(factor, rho=1e-2, spectral_vector=vector)
    assert all(torch.equal(a, b) for a, b in zip(vectors, alone, strict=True))
    batch = torch.zeros(2, 9, device=device)
    damped_inverse(torch.stack([factors[0], factors[2]]), rho=1e-2, spectral_vector=batch)
    assert torch.equal(batch, torch.stack([alone[0], alone[2]]))


def test_strided_vector(device):
    factor = spd(9, device=device)
    buffer = torch.full((18,), 7.0, device=device)
    vector = buffer[::2].zero_()
    damped_inverse(factor, rho=1e-2, spectral_vector=vector)
    assert vector.norm().item() == pytest.approx(1, rel=1e-5)
    assert (buffer[1::2] == 7).all()


def test_strided_batch_of_vectors(device):
    factors = torch.stack([spd(9, device=device)] * 3)
    vectors = torch.zeros(9, 3, device=device).mT
    damped_inverse(factors, rho=1e-2, spectral_vector=vectors)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3, device=device))


# ---- errors ----

A = torch.eye(4)
BIG = torch.zeros(64)
ERRORS = {
    "factor_no_tensor": (
        TypeError, "factor must be a tensor or a list of tensors, got float", {"factor": 1.0},
    ),
    "list_item_no_tensor": (
        TypeError,
        "factor must be a tensor or a list of tensors, got a list with NoneType",
        {"factor": [A, None]},
    ),
    "vector": (
        ValueError,
        "factor must be square, [N, N] or [L, N, N], got shape [4]",
        {"factor": torch.ones(4)},
    ),
    "rectangular": (
        ValueError,
        "factor must be square, [N, N] or [L, N, N], got shape [4, 5]",
        {"factor": torch.ones(4, 5)},
    ),
    "four_dimensions": (
        ValueError,
        "factor must be square, [N, N] or [L, N, N], got shape [1, 1, 4, 4]",
        {"factor": torch.ones(1, 1, 4, 4)},
    ),
    "batch_in_a_list": (
        ValueError,
        "factor[1] must be square, [N, N], got shape [2, 4, 4]",
        {"factor": [A, torch.ones(2, 4, 4)]},
    ),
    "devices": (
        ValueError,
        "all tensors must be on one device, got factor[0] on cpu and factor[1] on meta",
        {"factor": [A, A.to("meta")]},
    ),
    "method": (
        ValueError, "method must be one of auto, cholesky, newton_schulz, got 'lu'", {"method": "lu"},
    ),
    "precision": (
        ValueError, "precision must be one of auto, fp32, got 'tf32'", {"precision": "tf32"},
    ),
    "neither": (
        ValueError, "give rho (relative) or damping (absolute), and not both", {"rho": None},
    ),
    "both": (
        ValueError, "give rho (relative) or damping (absolute), and not both", {"damping": 1.0},
    ),
    "rho_tensor": (
        TypeError,
        "rho must be a number: it decides the schedule, got a tensor",
        {"rho": torch.tensor(0.1)},
    ),
    "rho_zero": (ValueError, "rho must be finite and in (0.0, inf), got 0.0", {"rho": 0.0}),
    "rho_negative": (ValueError, "rho must be finite and in (0.0, inf), got -1", {"rho": -1}),
    "rho_nan": (ValueError, "rho must be finite and in (0.0, inf), got nan", {"rho": math.nan}),
    "rho_text": (TypeError, "rho must be a number, got str", {"rho": "0.1"}),
    "rho_that_rounds_away": (ValueError, "rho must be at least 2.3e-13", {"rho": 1e-14}),
    "damping_zero": (
        ValueError, "damping must be finite and in (0.0, inf), got 0.0", {"rho": None, "damping": 0.0},
    ),
    "damping_nan": (
        ValueError, "damping must be finite and in (0.0, inf), got nan", {"rho": None, "damping": math.nan},
    ),
    "damping_bool": (
        TypeError, "damping must be a number, got bool", {"rho": None, "damping": True},
    ),
    "damping_text": (
        TypeError,
        "damping must be a tensor or a list of tensors, got str",
        {"rho": None, "damping": "1"},
    ),
    "damping_integer_tensor": (
        TypeError,
        "damping must have dtype float32, bfloat16, float16, float64, got int64",
        {"rho": None, "damping": torch.tensor(1)},
    ),
    "damping_shape": (
        ValueError,
        "damping must have shape [] (as factor), got [2]",
        {"rho": None, "damping": torch.ones(2)},
    ),
    "damping_shape_in_a_list": (
        ValueError,
        "damping[1] must have shape [] (as factor), got [1]",
        {"factor": [A, A], "rho": None, "damping": [torch.tensor(1.0), torch.ones(1)]},
    ),
    "damping_length": (
        ValueError,
        "the lists must have the same length, got factor: 2, damping: 1",
        {"factor": [A, A], "rho": None, "damping": [torch.tensor(1.0)]},
    ),
    "damping_device": (
        ValueError,
        "all tensors must be on one device, got factor on cpu and damping on meta",
        {"rho": None, "damping": torch.tensor(1.0, device="meta")},
    ),
    "newton_schulz_without_rho": (
        ValueError,
        "method 'newton_schulz' needs rho, which bounds the condition number",
        {"rho": None, "damping": 1.0, "method": "newton_schulz"},
    ),
    "vector_shape": (
        ValueError,
        "spectral_vector must have shape [4] (as factor), got [5]",
        {"spectral_vector": torch.zeros(5)},
    ),
    "vector_dtype": (
        TypeError,
        "spectral_vector must have dtype float32, bfloat16, float16, float64, got int64",
        {"spectral_vector": torch.zeros(4, dtype=torch.int64)},
    ),
    "vector_device": (
        ValueError,
        "all tensors must be on one device, got factor on cpu and spectral_vector on meta",
        {"spectral_vector": torch.zeros(4, device="meta")},
    ),
    "vector_expanded": (
        ValueError,
        "spectral_vector is written in place and must not overlap itself, got strides [0] for shape [4]",
        {"spectral_vector": torch.zeros(1).expand(4)},
    ),
    "vector_length": (
        ValueError,
        "the lists must have the same length, got factor: 1, spectral_vector: 2",
        {"spectral_vector": [torch.zeros(4), torch.zeros(4)]},
    ),
    "vector_number": (
        TypeError, "spectral_vector must be a tensor or a list of tensors", {"spectral_vector": 1.0},
    ),
    "vector_overlaps": (
        ValueError,
        "overlap in memory, and one is written",
        {"factor": BIG[:16].view(4, 4), "spectral_vector": BIG[4:8]},
    ),
    "same_vector_twice": (
        ValueError,
        "spectral_vector[1] and spectral_vector[0] overlap in memory, and one is written",
        {"factor": [A, A], "spectral_vector": [BIG[:4]] * 2},
    ),
}  # fmt: skip


def call(**changes):
    arguments = {"factor": A, "rho": 1e-2} | changes
    return damped_inverse(arguments.pop("factor"), **arguments)


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong(case):
    exception, text, changes = ERRORS[case]
    assert_raises(exception, text, call, **changes)
    with pytest.raises(exception, match=r"^damped_inverse: "):
        call(**changes)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
def test_refused_dtypes_and_layouts(kind):
    with pytest.raises(
        TypeError, match=r"factor must (have dtype float32, bfloat16, float16, float64|be a dense)"
    ):
        call(factor=refused(kind, 4, 4))


def test_an_earlier_inverse_is_no_argument(device):
    """See docs/why-no-convergence-test.md: starting from one costs more products than it saves."""
    with pytest.raises(TypeError, match="warm_start"):
        damped_inverse(spd(4, device=device), rho=1e-2, warm_start=torch.eye(4, device=device))


@pytest.mark.parametrize("name", ["tf32", "tf32x3", "bf16x3", "fp64"])
def test_precision_that_no_method_implements_is_refused(device, name):
    assert_raises(
        ValueError,
        "damped_inverse: precision must be one of auto, fp32",
        damped_inverse,
        spd(4, device=device),
        rho=1e-2,
        precision=name,
    )


@pytest.mark.parametrize("fault", ["nan", "negative"])
def test_vector_of_a_failed_matrix_stays_as_it_was(device, fault):
    factors = torch.stack([torch.eye(4, device=device)] * 2)
    factors[1] = -factors[1]
    if fault == "nan":
        factors[1, 0, 1] = math.nan
    vectors = torch.randn(2, 4, device=device)
    before = vectors.clone()
    result = damped_inverse(factors, rho=1e-2, spectral_vector=vectors)
    assert [i == Info.OK for i in result.info.tolist()] == [True, False]
    assert torch.equal(vectors[1], before[1])
    assert not torch.equal(vectors[0], before[0])
