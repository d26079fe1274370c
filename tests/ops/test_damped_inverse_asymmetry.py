# SPDX-License-Identifier: Apache-2.0
"""``damped_inverse``: asymmetry beyond rounding is reported, and rounding never is."""

import pytest
import torch

from grng_kernels import Info, backends, damped_inverse, use_backend
from tests.cases import ALL_DTYPES, dtype_id, offset_by_one, spd

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].available, reason="the compiled extension is not there"
)
dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)


@pytest.fixture(autouse=True, params=["reference", "auto"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def limit(dtype):
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def skewed(n, dtype, share, at):
    """A matrix whose largest entry is 1 and that is asymmetric in one pair, by ``share``."""
    factor = torch.eye(n, dtype=torch.float64)
    row, column = at
    factor[row, column] = share / 2
    factor[column, row] = -share / 2
    return factor.to(dtype)


@dtypes
@pytest.mark.parametrize(
    ("n", "at"),
    [(2, (0, 1)), (16, (15, 0)), (17, (16, 3)), (33, (2, 32)), (33, (20, 18)), (130, (129, 64))],
)
def test_is_reported_above_the_limit_and_only_there(dtype, n, at):
    codes = [
        damped_inverse(skewed(n, dtype, share * limit(dtype), at), rho=1e-2).info.item()
        for share in (0.9, 1.1)
    ]
    assert codes == [Info.OK, Info.ASYMMETRIC]


@pytest.mark.parametrize("n", [5, 64, 300])
@pytest.mark.parametrize("how", [{"rho": 1e-2}, {"damping": 0.5}], ids=["rho", "damping"])
def test_the_state_is_kept_and_the_mean_is_inverted(n, how):
    symmetric = spd(n)
    factor = symmetric.clone()
    factor[0, 1] += symmetric.abs().max() / 64
    factor[1, 0] -= symmetric.abs().max() / 64
    vector = torch.randn(n)
    before = vector.clone()
    got = damped_inverse(factor, spectral_vector=vector, **how)
    want = damped_inverse(symmetric, spectral_vector=before.clone(), **how)
    assert got.info.item() == Info.ASYMMETRIC
    assert torch.equal(vector, before)
    torch.testing.assert_close(got.inverse, want.inverse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [8, 40])
def test_the_others_of_the_call_are_bitwise_unaffected(n):
    factors = torch.stack([spd(n) for _ in range(40)])
    clean = damped_inverse(factors, rho=1e-2)
    factors[7] = factors[7].triu() * 3
    faulty = damped_inverse(factors, rho=1e-2)
    assert faulty.info.nonzero().flatten().tolist() == [7]
    assert faulty.info[7].item() == Info.ASYMMETRIC
    others = [i for i in range(40) if i != 7]
    for got, want in zip(faulty, clean, strict=True):
        assert torch.equal(got[others], want[others])


def test_comes_before_what_follows_from_it_and_after_bad_numbers():
    indefinite = torch.tensor([[1.0, 0.0], [3.0, -9.0]])
    assert damped_inverse(indefinite, rho=1e-2).info.item() == Info.ASYMMETRIC
    indefinite[0, 0] = torch.nan
    assert damped_inverse(indefinite, rho=1e-2).info.item() == Info.NONFINITE_INPUT


@pytest.mark.parametrize("power", [-100, 100, 126])
def test_scale_decides_nothing(power):
    factor = spd(20)
    factor /= factor.abs().max()
    wrong = factor.clone()
    wrong[3, 4] += 0.01
    assert damped_inverse(factor * 2.0**power, rho=1e-2).info.item() == Info.OK
    assert damped_inverse(wrong * 2.0**power, rho=1e-2).info.item() == Info.ASYMMETRIC


def test_difference_beyond_the_range_is_found():
    factor = torch.tensor([[3e38, 3e38], [-3e38, 3e38]])
    assert damped_inverse(factor, rho=1e-2).info.item() == Info.ASYMMETRIC


def test_last_digits_of_subnormal_numbers_are_no_asymmetry():
    factor = torch.full((3, 3), 1e-44).tril()
    assert damped_inverse(factor, rho=1e-2).info.item() == Info.OK


@dtypes
@pytest.mark.parametrize("rows", [1, 100, 20_000])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_products_of_any_order_of_summation_are_symmetric_enough(dtype, rows, mean):
    x = torch.randn(rows, 33, dtype=torch.float64).add_(mean).to(dtype)
    total = torch.float64 if dtype == torch.float64 else torch.float32
    order = torch.randperm(rows)
    # The lower triangle summed in another order than the upper one.
    upper = (x.to(total).T @ x.to(total)).triu()
    lower = (x[order].to(total).T @ x[order].to(total)).tril(-1)
    factor = ((upper + lower) / rows).to(dtype)
    assert damped_inverse(factor, rho=1e-2).info.item() == Info.OK
    assert damped_inverse((x.T @ x) / rows, rho=1e-2).info.item() == Info.OK


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_moving_average_kept_in_the_dtype_stays_symmetric_enough(dtype, decay):
    factor = torch.zeros(17, 17, dtype=dtype)
    for _ in range(300):
        x = torch.randn(64, 17).to(dtype)
        product = (x.float().T @ x.float()) / 64
        product += 2**-20 * torch.randn_like(product)
        factor = (decay * factor + (1 - decay) * product.to(dtype)).to(dtype)
    assert damped_inverse(factor, rho=1e-2).info.item() == Info.OK


def test_layouts_are_read_alike():
    factor = spd(20)
    factor[3, 4] += factor.abs().max()
    for view in (factor.T, offset_by_one(factor), factor.flip(0).flip(0)):
        assert damped_inverse(view, rho=1e-2).info.item() == Info.ASYMMETRIC
