# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``damped_inverse`` for small matrices in Triton's interpreter, on CPU tensors."""

import math

import pytest
import torch

from grng_kernels import Info, _table, damped_inverse, use_backend
from grng_kernels.damped_inverse import reference, triton_small
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.spectral_norm import spectral_norm
from grng_kernels.damped_inverse.triton_small import launch, supports
from tests.cases import MATRIX_LAYOUTS, SPECTRA, guarded, inverse64, spd

METHODS = ("cholesky", "newton_schulz")
methods = pytest.mark.parametrize("method", METHODS)
SENTINEL = -7
# Matrices of each spectrum whose errors are added up.
DRAWS = 2


@pytest.fixture(autouse=True)
def tables():
    """Tables of this test alone: memory of an earlier one may have come back at the same addresses."""
    _table.clear()


@pytest.fixture
def programs(monkeypatch):
    """The number of programs of every launch."""
    counts, kernel = [], triton_small._small_inverse_kernel

    class Counted:
        def __getitem__(self, grid):
            counts.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(triton_small, "_small_inverse_kernel", Counted())
    return counts


def entry(factor, *, damping=None, vector=None):
    """An entry whose results are NaN and a sentinel until they are written."""
    factor = factor if factor.dim() == 3 else factor.unsqueeze(0)
    count, n = factor.shape[:2]
    return Entry(
        factor,
        None if damping is None else torch.tensor(damping).expand(count).contiguous(),
        torch.zeros(count, n) if vector is None else vector.clone(),
        torch.full((count, n, n), math.nan),
        *(torch.full((count,), math.nan) for _ in range(3)),
        torch.full((count,), SENTINEL, dtype=torch.int32),
    )


def run(*factors, rho=1e-2, method="cholesky", **given):
    entries = [entry(f, **given) for f in factors]
    launch(entries, rho=None if "damping" in given else rho, method=method)
    return entries


def relative(x, want):
    return ((x.double() - want).norm() / want.norm()).item()


def compare(e, *, rho=1e-2, method="cholesky", vector=None, floor=1e-5):
    """Compare one entry with the reference in fp64, and return our error and that of PyTorch in fp32."""
    wide = e.factor.double()
    given = None if e.damping is None else e.damping.double()
    start = torch.zeros(e.vector.shape) if vector is None else vector
    _, damping, norm, residual, info, new = reference.damped_inverse(
        wide,
        rho=None if given is not None else rho,
        damping=given,
        method=method,
        vector=start.double(),
    )
    assert e.info.tolist() == info.tolist() == [Info.OK] * len(info)
    # The estimate of the norm stops before it converges: near its start rounding has some weight.
    torch.testing.assert_close(e.spectral_norm.double(), norm, rtol=2e-4, atol=1e-37)
    torch.testing.assert_close(e.used_damping.double(), damping, rtol=2e-4, atol=1e-37)
    torch.testing.assert_close(e.vector.double(), new, rtol=0, atol=2e-3)
    assert torch.equal(e.inverse, e.inverse.mT)
    assert (e.residual >= 0).all()
    if method == "newton_schulz":
        assert (e.residual <= residual + floor).all()
    eye = torch.eye(wide.shape[-1])
    errors = []
    for a, x, used in zip(e.factor.float(), e.inverse, e.used_damping, strict=True):
        want = torch.linalg.inv((a.double() + a.double().mT) / 2 + used.double() * eye.double())
        base = torch.cholesky_inverse(torch.linalg.cholesky_ex((a + a.mT) / 2 + used * eye).L)
        errors.append((relative(x, want), relative(base, want)))
    return errors


# ---- accuracy ----


@methods
@pytest.mark.parametrize("n", [16, 31, 64])
def test_errs_at_most_twice_as_much_as_torch(n, method):
    """Over all spectra and several draws together, for each ``rho``: rank one alone flatters PyTorch."""
    kinds = [kind for kind in SPECTRA if kind != "zero"]
    for rho in (1e-1, 1e-2, 1e-6 if method == "cholesky" else 1e-4):
        [e] = run(torch.stack([spd(n, k) for k in kinds * DRAWS]), rho=rho, method=method)
        # Rounding alone leaves up to kappa²·2^-24: more than what else may be left where kappa is 101.
        floor = max(1e-5, (1 + rho**-0.5) ** 2 * 2**-24)
        errors = compare(e, rho=rho, method=method, floor=floor)
        ours, theirs = (sum(column) for column in zip(*errors, strict=True))
        assert ours <= 2 * theirs, (rho, errors)


@pytest.mark.parametrize("n", [100, 128])
def test_the_largest_orders(n):
    [e] = run(spd(n))
    for ours, theirs in compare(e):
        assert ours <= 2 * theirs
    assert e.residual.item() <= 2e-6


@pytest.mark.parametrize("n", [16, 17, 64])
def test_newton_schulz_reaches_its_tolerance(n):
    [e] = run(torch.stack([spd(n, kind) for kind in SPECTRA[:3]]), method="newton_schulz")
    for error, _ in compare(e, method="newton_schulz"):
        assert error <= 1e-6
    assert (e.residual <= 4e-6).all()


def test_one_kernel_serves_every_rho():
    for rho in (0.5, 1e-3, 1e-5):
        [e] = run(spd(20), rho=rho, method="newton_schulz")
        compare(e, rho=rho, method="newton_schulz")


def test_damping_that_adds_little_is_still_right():
    """Condition 1e4 inside of one block: inverting its pivots together would lose all digits."""
    v = torch.ones(40)
    [e] = run(v[:, None] * v[None, :], rho=1e-8)
    [(ours, theirs)] = compare(e, rho=1e-8)
    assert ours <= max(4 * theirs, 5e-4)


# ---- lists ----


def test_mixed_orders_and_dtypes_take_two_launches(programs):
    sizes = (1, 3, 16, 17, 33, 66)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    factors = [spd(n).to(dtypes[i % 3]) for i, n in enumerate(sizes)]
    entries = run(*factors)
    assert programs == [5, 1]
    for e in entries:
        compare(e)


def test_neighbours_do_not_matter():
    alone, other = spd(17), spd(20)
    bad = other.clone()
    bad[3, 4] = math.nan
    [first] = run(alone)
    second = run(bad, alone, other)
    assert [e.info.item() for e in second] == [Info.NONFINITE_INPUT, Info.OK, Info.OK]
    for x, y in zip(first[3:], second[1][3:], strict=True):
        assert torch.equal(x, y)
    assert not second[0].vector.any()


@methods
def test_memory_around_the_results_is_not_written(method):
    n = 18
    e = entry(spd(n))
    names = ("vector", "inverse", "used_damping", "spectral_norm", "residual")
    views = {name: guarded(getattr(e, name)) for name in names}
    e = e._replace(**{name: view for name, (view, _) in views.items()})
    launch([e], rho=1e-2, method=method)
    compare(e, method=method)
    for _, check in views.values():
        check()


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layout_does_not_matter(layout, dtype):
    a = spd(18).to(dtype)
    [want] = run(a.contiguous())
    [got] = run(MATRIX_LAYOUTS[layout](a).unsqueeze(0))
    for x, y in zip(want[3:], got[3:], strict=True):
        assert torch.equal(x, y)


def test_asymmetry_is_averaged_away():
    a = spd(18)
    skew = torch.randn(18, 18) / 8
    [want], [got] = run(a), run(a + skew - skew.mT)
    torch.testing.assert_close(got.inverse, want.inverse, rtol=1e-4, atol=1e-5)


# ---- scales ----


@methods
@pytest.mark.parametrize("power", [-100, 100])
def test_powers_of_two_pass_through(method, power):
    a = spd(18)
    [want], [got] = run(a, method=method), run(a * 2.0**power, method=method)
    assert torch.equal(got.inverse, want.inverse * 2.0**-power)
    assert torch.equal(got.used_damping, want.used_damping * 2.0**power)
    assert torch.equal(got.spectral_norm, want.spectral_norm * 2.0**power)
    assert torch.equal(got.residual, want.residual)
    assert got.info.item() == Info.OK


@methods
def test_zero_matrix(method):
    e, small = run(torch.zeros(20, 20), torch.zeros(1, 1), method=method)
    for x in (e, small):
        assert x.info.item() == Info.OK
        torch.testing.assert_close(x.inverse[0], torch.eye(x.inverse.shape[-1]) * 1e36)
        assert x.used_damping.item() == pytest.approx(1e-36, rel=1e-6)
        assert x.spectral_norm.item() == 0


def test_numbers_below_the_normal_range():
    [e] = run(torch.full((1, 1), 1e-40))
    assert e.info.item() == Info.OK
    assert e.inverse.item() == pytest.approx(1e36, rel=1e-3)


def test_overflow():
    [e] = run(1e-39 * torch.eye(3), damping=1e-39)
    assert e.info.item() == Info.OVERFLOW


# ---- faults ----


@methods
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_input(method, value):
    a = spd(18)
    a[17, 2] = value
    before = torch.randn(1, 18)
    [e] = run(a, method=method, vector=before)
    assert e.info.item() == Info.NONFINITE_INPUT
    assert e.residual.isnan().item()
    assert torch.equal(e.vector, before)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_damping_on_the_device_is_checked(damping):
    [e] = run(spd(3), damping=damping)
    assert e.info.item() == Info.NONFINITE_INPUT
    assert e.residual.isnan().item()


def test_matrix_that_is_not_positive_definite():
    a = spd(18)
    a[17, 17] = -5.0
    before = torch.randn(1, 18)
    [e] = run(a, damping=1e-2, vector=before)
    assert e.info.item() == Info.NOT_CONVERGED
    assert torch.equal(e.vector, before)


def test_given_damping():
    [e] = run(torch.stack([spd(18), 3 * spd(18)]), damping=0.25)
    for ours, theirs in compare(e):
        assert ours <= max(2 * theirs, 3e-7)


@pytest.mark.parametrize("n", [20, 66])
@pytest.mark.parametrize(("scale", "damping"), [(1e-37, 100.0), (1e-39, 1.0), (0, 1e30)])
def test_damping_far_above_a_fading_factor(n, scale, damping):
    """A layer that died leaves a factor that fades by its decay until nothing is left."""
    [e] = run(spd(n) * scale, damping=damping)
    assert e.info.item() == Info.OK
    torch.testing.assert_close(e.inverse[0], torch.eye(n) / damping, rtol=1e-6, atol=1e-6 / damping)
    assert e.used_damping.item() == pytest.approx(damping, rel=1e-6)
    assert e.residual.item() < 1e-5


# ---- the norm ----


@pytest.mark.parametrize("n", [20, 66])
def test_the_trace_bounds_the_norm(n):
    """Rounding may leave a matrix indefinite, and then the trace is the least bound of all."""
    factor = spd(n, "rank1")
    factor.fill_diagonal_(0)
    [e] = run(factor, damping=2.0)
    want, _ = spectral_norm(factor[None])
    assert want.item() < 0.01 < torch.linalg.eigvalsh(factor)[-1].item()
    torch.testing.assert_close(e.spectral_norm, want, rtol=1e-6, atol=1e-12)


def test_a_given_vector_is_used_and_updated():
    a = spd(18)
    start = torch.randn(1, 18)
    [e] = run(a, vector=start)
    compare(e, vector=start)
    [again] = run(a, vector=e.vector)
    compare(again, vector=e.vector)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_vector_counts_as_none(bad):
    a = spd(18)
    start = torch.randn(1, 18)
    start[0, 5] = bad
    [want], [got] = run(a), run(a, vector=start)
    assert torch.equal(got.vector, want.vector)
    assert torch.equal(got.inverse, want.inverse)


def test_supports():
    assert supports(1)
    assert supports(128)
    assert not supports(129)
    assert not supports(0)
    assert supports(64, "newton_schulz")
    assert not supports(65, "newton_schulz")


# ---- through the public function ----


@pytest.mark.parametrize("method", ["auto", "newton_schulz"])
def test_public_function_sends_each_matrix_to_its_kernel(method):
    factors = [spd(n) for n in (3, 33, 130)]
    with use_backend("triton"):
        result = damped_inverse(factors, rho=1e-2, method=method)
    for factor, x, d, info in zip(
        factors, result.inverse, result.damping, result.info, strict=True
    ):
        n = len(factor)
        exact = inverse64(factor.double() + d.double() * torch.eye(n, dtype=torch.float64))
        assert info.item() == 0
        assert ((x.double() - exact).norm() / exact.norm()).item() < 2e-5
