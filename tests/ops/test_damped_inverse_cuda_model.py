# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the CUDA kernel for small damped inverses, its threads run as a loop by the CPU.

The header that the kernel consists of is compiled by g++. What only a GPU shows is not seen here: races, and
the last bit of the approximate reciprocal.
"""

import ctypes
import math
import pathlib
import shutil
import subprocess

import pytest
import torch

from grng_kernels import Info
from grng_kernels.damped_inverse import reference
from grng_kernels.damped_inverse.reference import FLOOR, RESIDUAL_LIMIT
from tests.cases import MATRIX_LAYOUTS, SPECTRA, dtype_id, inverse64, spd

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
SOURCE = pathlib.Path(__file__).with_name("damped_inverse_cuda_model.cpp")
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 47, 63, 64)
spectra = pytest.mark.parametrize("kind", SPECTRA)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A function like the reference, for one ``factor [L, N, N]``."""
    library = tmp_path_factory.mktemp("model") / "model.so"
    # Without contraction: what is one rounding on the device is written as one.
    flags = ["-O1", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-shared", "-fPIC"]
    done = subprocess.run(
        ["g++", *flags, str(SOURCE), "-o", str(library)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = ctypes.CDLL(str(library)).damped_inverse_small_model

    def call(factor, *, rho=None, damping=None, vector=None, order=None):
        length, n, _ = factor.shape
        inverse = torch.full((length, n, n), math.nan)
        numbers = [torch.full((length,), math.nan) for _ in range(3)]
        info = torch.full((length,), -1, dtype=torch.int32)
        vector = torch.zeros(length, n) if vector is None else vector
        pointers = [
            None if t is None else ctypes.c_void_p(t.data_ptr())
            for t in (factor, damping, vector, inverse, *numbers, info)
        ]
        run(
            pointers[0],
            (ctypes.c_int64 * 3)(*factor.stride()),
            DTYPES[factor.dtype],
            n,
            length,
            *pointers[1:],
            ctypes.c_float(math.sqrt(rho or 0)),
            order or (32 if n <= 32 else 64),
        )
        return reference.DampedInverse(inverse, *numbers, info), vector

    return call


def batch(n, kind="random", length=3, dtype=torch.float32):
    return torch.stack([spd(n, kind, dtype=dtype) for _ in range(length)])


def plain(factor, *, rho=None, damping=None, vector=None):
    length, n, _ = factor.shape
    *fields, vector = reference.damped_inverse(
        factor.float(), rho=rho, damping=damping, method="cholesky",
        vector=torch.zeros(length, n) if vector is None else vector,
    )  # fmt: skip
    return reference.DampedInverse(*fields), vector


def damped64(factor, result):
    a = factor.double()
    eye = torch.eye(a.shape[-1], dtype=torch.float64)
    return (a + a.mT) / 2 + result.damping.double()[:, None, None] * eye


def relative(got, want):
    return torch.linalg.norm(got.double() - want) / torch.linalg.norm(want)


@spectra
@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-4, 1e-8])
def test_error_is_at_most_twice_that_of_torch(model, kind, rho):
    for n in SIZES:
        factor = batch(n, kind, length=4)
        got, _ = model(factor, rho=rho)
        m = damped64(factor, got)
        assert got.info.tolist() == [Info.OK] * 4, n
        assert torch.equal(got.inverse, got.inverse.mT)
        lower, status = torch.linalg.cholesky_ex(m.float())
        if status.any():
            continue
        want = inverse64(m)
        allowed = 2 * relative(torch.cholesky_inverse(lower), want)
        # Half a unit of the result; a handful of numbers is no sample, and one may be exact by luck.
        allowed += torch.finfo(torch.float32).eps * (0.5 if n >= 8 else 4) * max(1, rho**-0.5 / 16)
        assert relative(got.inverse, want) <= allowed, n


@spectra
@pytest.mark.parametrize("n", SIZES)
def test_norm_damping_and_vector_are_those_of_the_reference(model, kind, n):
    factor = batch(n, kind)
    vector = torch.randn(3, n)
    vector[0] = 0
    want, want_vector = plain(
        factor, rho=1e-2, vector=vector / vector.norm(dim=1).clamp(min=1)[:, None]
    )
    got, got_vector = model(factor, rho=1e-2, vector=vector.clone())
    # Sixteen products with a vector, in another order.
    torch.testing.assert_close(got.spectral_norm, want.spectral_norm, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.damping, want.damping, rtol=2e-6, atol=0)
    if kind != "zero":
        assert (got_vector * want_vector).sum(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    else:
        assert (got_vector == 0).all()


@pytest.mark.parametrize("n", [5, 16, 17, 32, 33, 64])
def test_residual_is_that_of_the_probes(model, n):
    """Of matrices so ill-conditioned that it is no smaller than the rounding of its own products."""
    factor = batch(n, "cond1e8")
    got, _ = model(factor, rho=1e-8)
    want = reference.measured_residual(damped64(factor, got), got.inverse.double())
    assert want.min() > 1e-5
    assert ((want / 3 < got.residual) & (got.residual < 3 * want)).all()


@pytest.mark.parametrize("n", [3, 17, 32, 33, 64])
@pytest.mark.parametrize("power", [-100, -24, 1, 30, 100])
def test_powers_of_two_pass_through(model, n, power):
    factor = batch(n)
    (one, vector), (scaled, scaled_vector) = (
        model(f, rho=1e-2) for f in (factor, factor * 2.0**power)
    )
    assert torch.equal(scaled.inverse, one.inverse * 2.0**-power)
    assert torch.equal(scaled.damping, one.damping * 2.0**power)
    assert torch.equal(scaled.spectral_norm, one.spectral_norm * 2.0**power)
    assert torch.equal(scaled.residual, one.residual)
    assert torch.equal(scaled_vector, vector)


@pytest.mark.parametrize("n", [1, 17, 64])
def test_zero_matrix_gives_the_identity_over_the_floor(model, n):
    got, vector = model(torch.zeros(2, n, n), rho=1e-2)
    assert got.info.tolist() == [Info.OK] * 2
    assert got.spectral_norm.tolist() == [0, 0]
    torch.testing.assert_close(got.inverse[1], torch.eye(n) / FLOOR, rtol=5e-7, atol=0)
    torch.testing.assert_close(got.damping, torch.full((2,), FLOOR), rtol=5e-7, atol=0)
    assert (vector == 0).all()


def test_a_small_matrix_may_take_the_path_of_the_large_ones(model):
    """The two differ in the order of sums only."""
    factor = batch(24, "clustered")
    one, other = model(factor, rho=1e-2)[0], model(factor, rho=1e-2, order=64)[0]
    torch.testing.assert_close(one.inverse, other.inverse, rtol=1e-4, atol=1e-4)
    assert torch.equal(one.info, other.info)


# ---- layouts and dtypes ----


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("n", [17, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_layout_does_not_matter(model, layout, n, dtype):
    factor = spd(n, dtype=dtype)
    want, _ = model(factor[None].clone(), rho=1e-2)
    got, _ = model(MATRIX_LAYOUTS[layout](factor)[None], rho=1e-2)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
    wide, _ = model(factor.float()[None], rho=1e-2)
    assert torch.equal(got.inverse, wide.inverse)


def test_expanded_and_strided_batch(model):
    factor = spd(9)
    want, _ = model(factor[None].clone(), rho=1e-2)
    for view in (factor.expand(4, 9, 9), torch.stack([factor, factor * torch.nan] * 4)[::2]):
        got, _ = model(view, rho=1e-2)
        assert all(torch.equal(x, want.inverse[0]) for x in got.inverse)


def test_half_precision_of_every_kind(model):
    values = torch.tensor([6e-8, 6.1e-5, 1.0, 65504.0], dtype=torch.float16)
    got, _ = model(torch.diag(values)[None], damping=torch.tensor([2.0**-20]))
    assert got.info.item() == Info.OK
    want = 1 / (values.double() + 2.0**-20)
    torch.testing.assert_close(got.inverse[0].diagonal().double(), want, rtol=2e-7, atol=0)


def test_asymmetry_is_averaged_away(model):
    symmetric, skew = (
        (batch(33, length=1) * 64).round() / 64,
        (torch.randn(1, 33, 33) * 64).round() / 64,
    )
    got, want = (model(f, rho=1e-2)[0] for f in (symmetric + skew - skew.mT, symmetric))
    torch.testing.assert_close(got.inverse, want.inverse, rtol=1e-4, atol=1e-4)


# ---- damping that is given ----


@pytest.mark.parametrize("n", [9, 40])
def test_given_damping(model, n):
    factor, damping = batch(n), torch.tensor([0.25, 0.5, 1.0])
    got, _ = model(factor, damping=damping)
    assert torch.equal(got.damping, damping)
    torch.testing.assert_close(
        got.inverse.double(), inverse64(damped64(factor, got)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("ratio", [1e-30, 1e-10, 1e10, 1e30])
def test_damping_far_from_the_size_of_the_matrix(model, ratio):
    factor = torch.eye(20)[None] * 1e-4
    got, _ = model(factor, damping=torch.tensor([ratio * 1e-4]))
    assert got.info.item() == Info.OK
    want = torch.eye(20, dtype=torch.float64) / (1e-4 * (1 + ratio))
    torch.testing.assert_close(got.inverse[0].double(), want, rtol=5e-7, atol=0)


@pytest.mark.parametrize("n", [20, 40])
@pytest.mark.parametrize(
    ("scale", "damping"), [(1e-37, 100.0), (1e-30, 1e9), (1e-39, 1.0), (0, 1e30)]
)
def test_damping_far_above_a_fading_factor(model, n, scale, damping):
    factor, given = (spd(n) * scale)[None], torch.tensor([damping])
    got, _ = model(factor, damping=given)
    want, _ = plain(factor, damping=given)
    assert got.info.item() == want.info.item() == Info.OK
    torch.testing.assert_close(
        got.inverse[0], torch.eye(n) / damping, rtol=1e-6, atol=1e-6 / damping
    )
    torch.testing.assert_close(got.spectral_norm, want.spectral_norm, rtol=1e-3, atol=0)
    assert torch.equal(got.damping, given)
    assert got.residual.item() < 1e-5


@pytest.mark.parametrize("value", [0.0, -0.25, math.nan, math.inf], ids=str)
def test_bad_damping(model, value):
    got, vector = model(torch.eye(5).expand(3, 5, 5), damping=torch.tensor([0.5, value, 0.5]))
    assert got.info.tolist() == [Info.OK, Info.NONFINITE_INPUT, Info.OK]
    assert got.residual.isnan().tolist() == [False, True, False]
    assert (got.inverse[1] == 0).all()
    assert (vector[1] == 0).all()


# ---- faults ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("n", [17, 64])
def test_one_nonfinite_matrix(model, value, n):
    factor, vector = batch(n), torch.randn(3, n)
    clean, clean_vector = model(factor, rho=1e-2, vector=vector.clone())
    factor[1, 3, n - 1] = value
    got, got_vector = model(factor, rho=1e-2, vector=vector.clone())
    assert got.info.tolist() == [Info.OK, Info.NONFINITE_INPUT, Info.OK]
    assert got.residual.isnan().tolist() == [False, True, False]
    assert (got.inverse[1] == 0).all()
    assert torch.equal(got_vector[1], vector[1])
    for i in (0, 2):
        assert torch.equal(got.inverse[i], clean.inverse[i])
        assert torch.equal(got_vector[i], clean_vector[i])


@pytest.mark.parametrize("n", [3, 32, 50])
def test_indefinite_matrix_is_not_converged(model, n):
    factor = torch.eye(n)[None].clone()
    factor[0, n - 1, n - 1] = -0.5
    vector = torch.ones(1, n)
    got, vector = model(factor, rho=1e-2, vector=vector)
    assert got.info.item() == Info.NOT_CONVERGED
    assert (got.inverse == 0).all()
    assert (vector == 1).all()


def test_inverse_beyond_the_range_is_an_overflow(model):
    got, _ = model(1e-39 * torch.eye(4)[None], damping=torch.tensor([1e-40]))
    assert got.info.item() == Info.OVERFLOW


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-35, 1e-30, 1e30, 1e38])
def test_ends_of_the_range(model, scale):
    for n in (9, 40):
        factor = batch(n) * scale
        got, _ = model(factor, rho=1e-2)
        want, _ = plain(factor, rho=1e-2)
        assert torch.equal(got.info, want.info)
        torch.testing.assert_close(got.inverse, want.inverse, rtol=1e-3, atol=1e-3 / scale)


@spectra
def test_no_wrong_inverse_goes_unflagged(model, kind):
    for n in (5, 32, 64):
        factor = batch(n, kind) - 2e-4 * torch.eye(n)
        got, _ = model(factor, rho=4e-8)
        m = damped64(factor, got)
        eye = torch.eye(n, dtype=torch.float64)
        exact = torch.linalg.matrix_norm(eye - m @ got.inverse.double()) / n**0.5
        assert ((got.info != Info.OK) | (exact <= 2 * RESIDUAL_LIMIT)).all()


# ---- the norm's vector ----


@pytest.mark.parametrize("content", [math.nan, math.inf, 1e-44, 1e-30, 1e30, 3e38], ids=str)
def test_any_vector_is_survived(model, content):
    factor, vector = batch(33, length=1), torch.full((1, 33), content)
    exact = torch.linalg.eigvalsh(factor.double()).max().item()
    for _ in range(8):
        got, vector = model(factor, rho=1e-2, vector=vector)
    assert got.info.item() == Info.OK
    assert vector.norm().item() == pytest.approx(1, rel=1e-5)
    assert 0.97 * exact <= got.spectral_norm.item() <= 1.03 * exact


def test_vector_orthogonal_to_the_new_leading_one_recovers(model):
    vector = torch.tensor([[0.0, 1, 0, 0]])
    for _ in range(4):
        got, vector = model(
            torch.diag(torch.tensor([10.0, 1, 1, 1]))[None], rho=1e-2, vector=vector
        )
    assert got.spectral_norm.item() == pytest.approx(10, rel=0.03)
