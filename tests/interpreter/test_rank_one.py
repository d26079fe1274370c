# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``rank1_precondition`` in the interpreter."""

import pytest
import torch

from grng_kernels import rank1_precondition, use_backend
from grng_kernels.rank_one.reference import rank1_precondition as reference
from grng_kernels.rank_one.triton_kernel import CHUNK
from tests.cases import ALL_DTYPES, assert_within_budget, dtype_id


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


SIZES = [1, 17, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sizes", [[n] for n in SIZES] + [SIZES, [0, 5, 0]], ids=str)
def test_equals_the_formula(dtype, sizes):
    scores = [torch.randn(n).to(dtype) for n in sizes]
    grads = [torch.randn(n).to(dtype) + u for n, u in zip(sizes, scores, strict=True)]
    got = rank1_precondition(grads, scores, damping=0.3)
    exact = reference([g.double() for g in grads], [u.double() for u in scores], damping=0.3)
    for result, wanted in zip(got, exact, strict=True):
        assert result.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(result, wanted, rtol=1e-13, atol=1e-13)
        elif dtype == torch.bfloat16:  # the interpreter cuts off where a GPU rounds: one unit
            torch.testing.assert_close(result.double(), wanted, rtol=2**-7, atol=1e-30)
        else:  # rounded once, like the exact result
            assert_within_budget(result, wanted, wanted.to(dtype))


def test_damping_on_the_device_and_two_runs_are_the_same_bits():
    grad, score = torch.randn(CHUNK + 3), torch.randn(CHUNK + 3)
    first = rank1_precondition(grad, score, damping=0.3)
    assert torch.equal(first, rank1_precondition(grad, score, damping=0.3))
    as_tensor = rank1_precondition(grad, score, damping=torch.tensor(0.3, dtype=torch.float64))
    assert torch.equal(first, as_tensor)


def test_nothing_around_the_blocks_is_written():
    buffer = torch.full((300,), 7.0)
    out = buffer[100:200]
    rank1_precondition(torch.randn(100), torch.randn(100), damping=0.3, out=out)
    assert (buffer[:100] == 7).all() and (buffer[200:] == 7).all()


def test_nonfinite_input_gives_nonfinite_output():
    grad, score = torch.randn(50), torch.randn(50)
    grad[3] = float("nan")
    assert rank1_precondition(grad, score, damping=0.3).isnan().all()
