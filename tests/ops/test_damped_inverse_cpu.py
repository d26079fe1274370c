# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel of ``damped_inverse``: panels of every width, threads, and what is shared by them."""

import pytest
import torch

from grng_kernels import Info, backends, damped_inverse, use_backend
from tests.cases import assert_within_budget, inverse64, spd

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].available, reason="the compiled extension is not there"
)


@pytest.fixture(autouse=True)
def on_cpu():
    with use_backend("cpu"):
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def fields_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Around whole panels of 16, 32 and 48 columns, and around where the norm is estimated another way.
ORDERS = (
    1,
    2,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    95,
    96,
    97,
    127,
    128,
    129,
    143,
    144,
    145,
)


@pytest.mark.parametrize("rho", [1e-1, 1e-3])
def test_every_width_of_panel_is_as_exact_as_torch(rho):
    got, ref, base = [], [], []
    for n in (*ORDERS, 192, 256, 257):
        factor = spd(n)
        result = damped_inverse(factor, rho=rho)
        damped = factor.double() + result.damping.double() * torch.eye(n, dtype=torch.float64)
        exact = inverse64(damped)
        scale = exact.abs().max()
        assert result.info.item() == Info.OK
        assert torch.equal(result.inverse, result.inverse.mT)
        got.append((result.inverse.double() / scale).flatten())
        ref.append((exact / scale).flatten())
        plain = torch.cholesky_inverse(torch.linalg.cholesky(damped.float()))
        base.append((plain.double() / scale).flatten())
    columns = [torch.cat(x) for x in (got, ref, base)]
    assert_within_budget(*columns, floor=2.0**-24)


def test_number_of_threads_changes_nothing(threads):
    factors = [spd(n) for n in (400, 16, 300, 65, 33, 200, 7)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        vectors = [torch.zeros(len(f)) for f in factors]
        result = damped_inverse(factors, rho=1e-2, spectral_vector=vectors)
        results.append([*result.inverse, *result.residual, *result.spectral_norm, *vectors])
    assert fields_equal(results[0], results[1])
    assert fields_equal(results[0], results[2])


@pytest.mark.parametrize("others", [(), (5,), (16, 16, 8), (300, 300)], ids=str)
def test_matrix_that_threads_share_is_the_one_alone(threads, others):
    threads(1)
    factor = spd(450)
    alone = damped_inverse(factor, rho=1e-2)
    threads(2)
    together = damped_inverse([spd(n) for n in others] + [factor], rho=1e-2)
    assert torch.equal(together.inverse[-1], alone.inverse)
    assert torch.equal(together.residual[-1], alone.residual)


@pytest.mark.parametrize("n", [16, 50, 130])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_negative_pivot_anywhere_is_found(n, place):
    diagonal = torch.ones(n)
    diagonal[{"first": 0, "middle": n // 2, "last": n - 1}[place]] = -1
    vector = torch.zeros(n)
    result = damped_inverse(torch.diag(diagonal), damping=0.1, spectral_vector=vector)
    assert result.info.item() == Info.NOT_CONVERGED
    assert (result.inverse == 0).all()
    assert (vector == 0).all()


def test_repeated_calls_start_from_clean_memory():
    factor = spd(70)
    first = damped_inverse(factor, rho=1e-2)
    damped_inverse(torch.full((300, 300), torch.nan), rho=1e-2)
    damped_inverse(spd(300) * 1e20, rho=1e-2)
    assert fields_equal(damped_inverse(factor, rho=1e-2), first)


def test_warm_vector_gives_a_better_norm_in_fewer_steps():
    factor = torch.diag(torch.linspace(0.5, 1, 300))
    vector = torch.zeros(300)
    for _ in range(20):
        result = damped_inverse(factor, rho=1e-2, spectral_vector=vector)
    assert result.spectral_norm.item() == pytest.approx(1, rel=0.021)


def test_start_of_any_length_is_survived():
    factor = spd(40)
    exact = torch.linalg.eigvalsh(factor.double())[-1].item()
    for scale in (1e-38, 1e-20, 1e20, 1e38):
        vector = torch.full((40,), scale)
        result = damped_inverse(factor, rho=1e-2, spectral_vector=vector)
        assert result.info.item() == Info.OK
        assert 0.8 * exact < result.spectral_norm.item() < 1.03 * exact


@pytest.mark.parametrize("scale", [2e38, 2.0**127, 1e-39, 1e-44])
def test_ends_of_the_range_have_a_true_residual(scale):
    factor = torch.eye(20) * scale
    result = damped_inverse(factor, rho=1e-2)
    with use_backend("reference"):
        want = damped_inverse(factor, rho=1e-2)
    assert result.info.item() == want.info.item()
    assert torch.allclose(result.inverse, want.inverse, rtol=1e-5)
    if want.info.item() == Info.OK:
        assert result.residual.item() < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("scale", "damping"), [(1e-37, 100.0), (1e-30, 1e9), (1e-39, 1.0)])
def test_damping_far_above_a_fading_factor(backend, scale, damping):
    """A layer that died leaves a factor that fades by its decay until nothing is left."""
    with use_backend(backend):
        result = damped_inverse(torch.eye(20) * scale, damping=damping)
    assert result.info.item() == Info.OK
    assert torch.allclose(result.inverse, torch.eye(20) / damping, rtol=1e-6)


@pytest.mark.parametrize("n", [64, 256])
def test_replaced_leading_eigenvector_is_found(n):
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    values = torch.full((n,), 1e-3, dtype=torch.float64)
    values[0] = 1
    values[1:7] = torch.linspace(0.5, 0.15, 6)
    factor = ((q * values) @ q.mT).float()
    stale = q[:, 1:7].sum(1).float().clone()
    result = damped_inverse(factor, rho=1e-2, spectral_vector=stale / stale.norm())
    assert result.spectral_norm.item() == pytest.approx(1, rel=0.05)


def test_nothing_but_asymmetry():
    factor = torch.tensor([[1e-20, 1.0], [-1.0, 1e-20]])
    result = damped_inverse(factor, damping=0.5)
    assert result.info.item() == Info.ASYMMETRIC
    assert torch.allclose(result.inverse, 2 * torch.eye(2))


def test_nonfinite_input_has_no_residual():
    assert damped_inverse(torch.full((3, 3), torch.inf), rho=1e-2).residual.isnan().item()


def test_vector_counts_as_changed():
    w, vector = torch.randn(20, requires_grad=True), torch.zeros(20)
    y = (w * vector).sum()
    damped_inverse(spd(20), rho=1e-2, spectral_vector=vector)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_rho_beyond_fp32_is_refused_like_elsewhere():
    with pytest.raises(ValueError, match="rho must"):
        damped_inverse(torch.eye(3), rho=1e80)


# ---- small orders, sixteen at a time ----


@pytest.mark.parametrize("n", [1, 3, 8, 16, 17, 30, 32])
@pytest.mark.parametrize("count", [2, 16, 19, 40])
def test_matrix_among_others_is_the_one_alone(n, count):
    factors = torch.stack([spd(n) * 10.0 ** (i % 5 - 2) for i in range(count)])
    # Warm and cold starts beside each other, and a fault.
    vectors = torch.randn(count, n) * (torch.arange(count) % 3 == 1).float()[:, None]
    before = vectors.clone()
    factors[1, 0, 0] = torch.nan
    together = damped_inverse(factors, rho=1e-2, spectral_vector=vectors)
    for i in (0, *range(2, count)):
        vector = before[i].clone()
        alone = damped_inverse(factors[i], rho=1e-2, spectral_vector=vector)
        assert alone.info.item() == Info.OK
        assert fields_equal(alone, [field[i] for field in together])
        assert torch.equal(vector, vectors[i])
    assert together.info[1].item() == Info.NONFINITE_INPUT
    assert torch.equal(vectors[1], before[1])


@pytest.mark.parametrize("with_vectors", [False, True])
def test_list_of_mixed_sizes_is_each_alone(with_vectors):
    factors = [spd(n) for n in (32, 5, 130, 16, 5, 64, 130, 16, 1, 32, 200)]
    vectors = [torch.zeros(len(f)) for f in factors] if with_vectors else None
    result = damped_inverse(factors, rho=1e-2, spectral_vector=vectors)
    for i, f in enumerate(factors):
        vector = torch.zeros(len(f))
        alone = damped_inverse(f, rho=1e-2, spectral_vector=vector)
        assert result.inverse[i].shape == f.shape
        assert fields_equal(alone, [field[i] for field in result])
        if vectors:
            assert torch.equal(vectors[i], vector)


def test_inverses_of_a_list_are_tensors_of_their_own():
    first, second = damped_inverse([spd(8), spd(8)], rho=1e-2).inverse
    before = second.clone()
    version = second._version
    weight = torch.ones(8, 8, requires_grad=True)
    first.mul_(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(second, before)
    assert second._version == version
