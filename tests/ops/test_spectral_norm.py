# SPDX-License-Identifier: Apache-2.0
"""``spectral_norm``: an estimate between two bounds that hold, at any scale, warm or cold."""

import pytest
import torch

from grng_kernels import Info, spectral_norm
from tests.cases import ALL_DTYPES, ODD_SIZES, SPECTRA, dtype_id, spd, state_dtype

dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
spectra = pytest.mark.parametrize("kind", SPECTRA)


def norm64(matrix):
    return torch.linalg.eigvalsh(matrix.double().cpu())[-1].clamp(min=0).item()


@dtypes
@spectra
@pytest.mark.parametrize("n", [*ODD_SIZES, 200])
def test_estimate_lies_between_bounds_that_hold(device, n, kind, dtype):
    matrix = spd(n, kind, dtype=dtype, device=device)
    result = spectral_norm(matrix)
    exact = norm64(matrix)
    room = 1 + 8 * n * torch.finfo(dtype).eps
    assert result.info.item() == Info.OK
    assert result.norm.dtype == state_dtype(dtype)
    assert result.lower.item() <= exact * room
    assert exact <= result.upper.item() * room
    assert result.lower <= result.norm <= result.upper
    # Cold: the leading eigenvalues of a random matrix lie close together.
    assert 0.85 * exact <= result.norm.item() <= 1.03 * exact * room


def test_trace_is_the_least_bound_of_rank_one(device):
    matrix = torch.ones(30, 30, device=device)
    assert spectral_norm(matrix).upper.item() == pytest.approx(30.0, rel=1e-6)


@pytest.mark.parametrize("power", [-100, -60, 60, 100])
def test_powers_of_two_pass_through(device, power):
    matrix = spd(65, device=device)
    one, scaled = spectral_norm(matrix), spectral_norm(matrix * 2.0**power)
    for a, b in zip(one[:3], scaled[:3], strict=True):
        assert torch.equal(a * 2.0**power, b)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_1e30_either_way(device, scale):
    matrix = spd(40, device=device) * scale
    assert spectral_norm(matrix).norm.item() == pytest.approx(norm64(matrix), rel=0.03)


def test_warm_vector_sharpens_the_estimate(device):
    matrix = torch.diag(torch.linspace(0.9, 1, 200, device=device))
    vector = torch.zeros(200, device=device)
    first = spectral_norm(matrix, vector=vector).norm.item()
    for _ in range(30):
        last = spectral_norm(matrix, vector=vector).norm.item()
    assert first <= last
    assert vector.norm().item() == pytest.approx(1, rel=1e-5)
    assert (vector[-1] ** 2).item() > 0.5


def test_list_and_batch_are_the_single_form(device):
    matrices = [spd(n, device=device) for n in (5, 9, 5, 1)]
    listed = spectral_norm(matrices)
    batch = spectral_norm(torch.stack([matrices[0], matrices[2]]))
    for i, m in enumerate(matrices):
        assert torch.allclose(listed.norm[i], spectral_norm(m).norm, rtol=1e-6)
    assert torch.allclose(batch.norm, torch.stack([listed.norm[0], listed.norm[2]]), rtol=1e-6)
    assert batch.info.tolist() == [0, 0]


def test_vectors_of_a_list_are_updated(device):
    matrices = [spd(n, device=device) for n in (5, 9)]
    vectors = [torch.zeros(n, device=device) for n in (5, 9)]
    spectral_norm(matrices, vector=vectors)
    for m, v in zip(matrices, vectors, strict=True):
        exact = norm64(m)
        assert (v @ m @ v).item() == pytest.approx(exact, rel=0.03)


def test_nonfinite_matrix_is_reported_and_keeps_its_vector(device):
    batch = torch.stack([spd(6, device=device) for _ in range(3)])
    batch[1, 2, 3] = torch.nan
    vector = torch.zeros(3, 6, device=device)
    result = spectral_norm(batch, vector=vector)
    assert result.info.tolist() == [Info.OK, Info.NONFINITE_INPUT, Info.OK]
    assert vector[1].abs().sum() == 0 and vector[0].abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 4, 4), (3, 0, 0)], ids=str)
def test_empty_input(device, shape):
    result = spectral_norm(torch.zeros(shape, device=device))
    for field in result:
        assert field.shape == shape[:-2]
        assert (field == 0).all()


def test_empty_list():
    assert spectral_norm([]) == ([], [], [], [])


def test_zero_matrix(device):
    assert spectral_norm(torch.zeros(4, 4, device=device)).norm.item() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: ((torch.zeros(3, 4),), {}), ValueError, r"matrix must be square.*\[3, 4\]"),
        (lambda: ((torch.zeros(3, 3, dtype=torch.int32),), {}), TypeError, "int32"),
        (
            lambda: ((torch.zeros(3, 3),), {"vector": torch.zeros(4)}),
            ValueError,
            r"vector must have shape \[3\]",
        ),
        (lambda: (([torch.zeros(3, 3)],), {"vector": []}), ValueError, "same length"),
        (lambda: (("x",), {}), TypeError, "matrix must be a tensor"),
        (
            lambda: ((torch.zeros(3, 3),), {"vector": torch.zeros(1).expand(3)}),
            ValueError,
            "vector",
        ),
    ],
)
def test_error_says_what_is_wrong(arguments, error, message):
    args, kwargs = arguments()
    with pytest.raises(error, match=f"spectral_norm: .*{message}"):
        spectral_norm(*args, **kwargs)
