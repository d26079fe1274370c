# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``kron_factor_update_`` in Triton's interpreter, on CPU tensors."""

import math

import pytest
import torch

import grng_kernels as gk
from grng_kernels import Info, kron_factor_update_
from grng_kernels.kron_factor import triton_kernel
from tests.cases import (
    MATRIX_LAYOUTS,
    assert_within_budget,
    dtype_id,
    guarded,
    small_integers,
    spd,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
# Tile edges of every block size; the last has several tiles, and so needs the tile number decoded.
ORDERS = (1, 3, 17, 65, 129)
# Less than one block of rows, whole blocks, and a rest.
ROWS = (1, 64, 70)


@pytest.fixture(autouse=True)
def backend():
    with gk.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Count the launches, so that no test passes on a fallback."""
    calls = []
    launch = triton_kernel.launch
    monkeypatch.setattr(
        triton_kernel, "launch", lambda *a, **k: (calls.append(1), launch(*a, **k))[1]
    )
    return calls


def case(rows, n, dtype, bias=False):
    """Inputs whose result is exact in fp32 for decay 0.5 and scale 0.25, and that result."""
    half = small_integers(n, n)
    factor, x = 4 * (half + half.mT), small_integers(rows, n - bias, dtype=dtype)
    wide = x.double()
    if bias:
        wide = torch.cat([wide, torch.ones(rows, 1, dtype=torch.float64)], dim=1)
    return factor, x, (0.5 * factor.double() + 0.25 * wide.mT @ wide).float()


@dtypes
@biases
@pytest.mark.parametrize("n", ORDERS)
@pytest.mark.parametrize("rows", ROWS)
def test_small_integers_are_exact(launches, dtype, bias, n, rows):
    factor, x, want = case(rows, n, dtype, bias)
    info = kron_factor_update_(factor, x, decay=0.5, scale=0.25, bias=bias)
    assert info.item() == Info.OK
    assert torch.equal(factor, want)
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("dtype", "variants"),
    [(torch.float32, v) for v in triton_kernel.TILES_FP32.values()]
    + [(torch.float16, v) for v in triton_kernel.TILES_16BIT.values()],
    ids=lambda v: str(v.aligned.block_n) if isinstance(v, tuple) else dtype_id(v),
)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "general"])
@biases
def test_every_config_is_right(monkeypatch, dtype, variants, aligned, bias):
    """All tile sizes with the same factor: several rows and columns of tiles, the last one cut off."""
    monkeypatch.setattr(triton_kernel, "variants_for", lambda width, dtype: variants)
    width = 160 if aligned else 161
    factor, x, want = case(150, width + bias, dtype, bias)
    assert triton_kernel.is_aligned(x) == aligned
    kron_factor_update_(factor, x, decay=0.5, scale=0.25, bias=bias)
    assert torch.equal(factor, want)


@dtypes
def test_error_is_at_most_twice_that_of_torch(dtype):
    factor, x = spd(129), torch.randn(70, 129).to(dtype)
    base = 0.9 * factor + 0.1 / 70 * (x.float().mT @ x.float())
    ref = 0.9 * factor.double() + 0.1 / 70 * (x.double().mT @ x.double())
    kron_factor_update_(factor, x, decay=0.9)
    assert_within_budget(factor, ref, base)
    assert torch.equal(factor, factor.mT)


@dtypes
@biases
@pytest.mark.parametrize(("rows", "n"), [(1100, 17), (2300, 65)])
def test_split_rows_are_exact(dtype, bias, rows, n):
    """Every split but the last has whole blocks of rows; the sum of all is the sum."""
    variants = triton_kernel.variants_for(n - bias, dtype)
    small = variants._replace(min_rows=2 * variants.aligned.block_k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernel, "variants_for", lambda width, dtype: small)
        step = triton_kernel.rows_per_split(n - bias, rows, small)
        assert step % small.aligned.block_k == 0
        assert 2 * step < rows
        factor, x, want = case(rows, n, dtype, bias)
        kron_factor_update_(factor, x, decay=0.5, scale=0.25, bias=bias)
    assert torch.equal(factor, want)


@pytest.mark.parametrize("scale", [None, 0.25], ids=["mean", "scale"])
def test_tensor_decay_equals_the_number(scale):
    x, factor = torch.randn(20, 17), spd(17)
    other = factor.clone()
    kron_factor_update_(factor, x, decay=0.9375, scale=scale)
    tensor = None if scale is None else torch.tensor(scale)
    kron_factor_update_(other, x, decay=torch.tensor(0.9375), scale=tensor)
    assert torch.equal(factor, other)


@pytest.mark.parametrize("n", [3, 65])
@pytest.mark.parametrize("content", [math.nan, math.inf])
def test_decay_zero_ignores_what_was_there(n, content):
    x = small_integers(20, n)
    factor = torch.full((n, n), content)
    assert kron_factor_update_(factor, x, decay=0.0, scale=1.0).item() == Info.OK
    assert torch.equal(factor, x.mT @ x)


@dtypes
@pytest.mark.parametrize(("row", "column"), [(0, 0), (19, 64), (10, 30)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_sample_leaves_the_factor(launches, dtype, row, column, value):
    factor, x = spd(65), torch.randn(20, 65).to(dtype)
    before = factor.clone()
    x[row, column] = value
    assert kron_factor_update_(factor, x, decay=0.5).item() == Info.NONFINITE_INPUT
    assert torch.equal(factor, before)
    assert len(launches) == 1


def test_overflow_leaves_the_factor():
    factor, x = spd(17), torch.full((8, 17), 1.9e19)
    before = factor.clone()
    assert kron_factor_update_(factor, x, decay=0.5).item() == Info.OVERFLOW
    assert torch.equal(factor, before)


def test_largest_fp16_samples():
    factor, x = torch.zeros(17, 17), torch.full((8, 17), 65504.0, dtype=torch.float16)
    assert kron_factor_update_(factor, x, decay=0.5, scale=1.0).item() == Info.OK
    torch.testing.assert_close(factor, torch.full((17, 17), 8 * 65504.0**2), rtol=1e-6, atol=0)


@dtypes
@biases
@pytest.mark.parametrize("n", ORDERS)
def test_memory_around_the_factor_is_not_written(dtype, bias, n):
    values, x, want = case(20, n, dtype, bias)
    for contiguous in (True, False):
        factor, check = guarded(values, contiguous=contiguous)
        kron_factor_update_(factor, x, decay=0.5, scale=0.25, bias=bias)
        assert torch.equal(factor, want)
        check()


@dtypes
@biases
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layout_of_x_does_not_matter(dtype, bias, layout):
    """The memory between the elements is NaN: reading it would show."""
    factor, x, want = case(70, 65, dtype, bias)
    kron_factor_update_(factor, MATRIX_LAYOUTS[layout](x), decay=0.5, scale=0.25, bias=bias)
    assert torch.equal(factor, want)


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layout_of_the_factor_does_not_matter(layout):
    values, x, want = case(20, 65, torch.float32)
    factor = MATRIX_LAYOUTS[layout](values)
    kron_factor_update_(factor, x, decay=0.5, scale=0.25)
    assert torch.equal(factor, want)


@pytest.mark.parametrize("expand", [(1, 33), (20, 1)], ids=["rows", "columns"])
def test_expanded_x(expand):
    factor, _, _ = case(20, 33, torch.float32)
    x = small_integers(*expand).expand(20, 33)
    want = 0.5 * factor + 0.25 * (x.mT @ x)
    kron_factor_update_(factor, x, decay=0.5, scale=0.25)
    assert torch.equal(factor, want)


def test_list_with_empty_and_faulty_items(launches):
    factors = [spd(n) for n in (3, 17, 5, 33)]
    before = [f.clone() for f in factors]
    xs = [torch.randn(4, 3), torch.full((4, 17), math.nan), torch.empty(0, 5), torch.randn(9, 33)]
    info = kron_factor_update_(factors, xs, decay=0.5)
    assert info.tolist() == [Info.OK, Info.NONFINITE_INPUT, Info.OK, Info.OK]
    assert torch.equal(factors[1], before[1])
    assert torch.equal(factors[2], before[2])
    for i in (0, 3):
        want = 0.5 * before[i] + 0.5 / len(xs[i]) * (xs[i].mT @ xs[i])
        torch.testing.assert_close(factors[i], want)
    assert len(launches) == 1


def test_only_the_lower_triangle_is_read():
    factor, x, want = case(20, 65, torch.float32)
    factor[torch.ones(65, 65, dtype=torch.bool).triu(1)] = math.nan
    kron_factor_update_(factor, x, decay=0.5, scale=0.25)
    assert torch.equal(factor, want)


@dtypes
@pytest.mark.parametrize("width", [0, 1, 32, 33, 64, 65, 128, 1000])
def test_tile_is_the_smallest_that_holds_the_columns(dtype, width):
    table = triton_kernel.TILES_FP32 if dtype == torch.float32 else triton_kernel.TILES_16BIT
    tile = triton_kernel.variants_for(width, dtype).aligned.block_n
    assert tile == next((t for t in sorted(table) if t >= width), max(table))
