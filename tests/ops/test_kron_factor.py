# SPDX-License-Identifier: Apache-2.0
"""``kron_factor_update_``: factor <- decay·factor + scale·xᵀx, on every backend."""

import math

import pytest
import torch

import grng_kernels as gk
from grng_kernels import Info, kron_factor_update_
from tests.cases import (
    ALL_DTYPES,
    MATRIX_LAYOUTS,
    ODD_SIZES,
    assert_memory_that_ends_changes_nothing,
    assert_within_budget,
    dtype_id,
    far_apart,
    guarded,
    offset_by_one,
    small_integers,
    spd,
    state_dtype,
)
from tests.ops.errors import REFUSED, assert_raises, refused

dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
# rows and order of the factor: fewer rows than columns and more, block edges, a second row block.
SHAPES = [(1, 1), (5, 1), (1, 17), (2, 3), (63, 65), (64, 64), (257, 127), (256, 129), (600, 33)]


def with_ones(x, bias):
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1) if bias else x


def plain(factor, x, decay, scale, bias=False):
    """The torch equivalent of the docstring, in the dtype of ``factor``."""
    x = with_ones(x.to(factor.dtype), bias)
    return decay * factor + scale * (x.mT @ x)


def yardstick(factor, x, decay, scale, bias=False):
    return plain(factor.double().cpu(), x.double().cpu(), decay, scale, bias)


def integer_case(rows, n, dtype, device, bias=False):
    """Inputs whose result is exact in fp32 and in fp64 for decay 0.5 and scale 0.25."""
    half = small_integers(n, n, dtype=state_dtype(dtype), device=device)
    factor = 4 * (half + half.mT)
    x = small_integers(rows, n - 1 if bias else n, dtype=dtype, device=device)
    return factor, x


# ---- exact ----


@dtypes
@biases
@pytest.mark.parametrize(("rows", "n"), SHAPES, ids=str)
def test_small_integers_are_exact(backend, dtype, bias, rows, n):
    if backend == ("auto", "cuda") and dtype == torch.float32:
        pytest.skip("tf32x3 is not exact")
    factor, x = integer_case(rows, n, dtype, backend.device, bias)
    want = yardstick(factor, x, 0.5, 0.25, bias)
    info = kron_factor_update_(factor, x, decay=0.5, scale=0.25, bias=bias)
    assert info.item() == Info.OK
    assert torch.equal(factor.double().cpu(), want)


def test_default_scale_is_one_minus_decay_over_rows(backend):
    factor, x = integer_case(64, 9, torch.float32, backend.device)
    want = yardstick(factor, x, 0.5, 0.5 / 64)
    kron_factor_update_(factor, x, decay=0.5)
    assert torch.equal(factor.double().cpu(), want)


@pytest.mark.parametrize("power", [-40, -3, 5, 40])
@dtypes
def test_powers_of_two_pass_through(backend, dtype, power):
    if dtype == torch.float16:
        power = power // 8
    factor, x = spd(65, dtype=state_dtype(dtype)), torch.randn(130, 65)
    factor, x = factor.to(backend.device), x.to(backend.device, dtype)
    if dtype == torch.float16:
        x = small_integers(130, 65, dtype=dtype, device=backend.device)
    scaled_factor, scaled_x = factor * 2.0 ** (2 * power), x * 2.0**power
    kron_factor_update_(factor, x, decay=0.9)
    kron_factor_update_(scaled_factor, scaled_x, decay=0.9)
    assert torch.equal(scaled_factor, factor * 2.0 ** (2 * power))


@pytest.mark.parametrize("n", ODD_SIZES)
@dtypes
def test_factor_stays_bitwise_symmetric(backend, dtype, n):
    factor = spd(n, dtype=state_dtype(dtype), device=backend.device)
    for _ in range(3):
        kron_factor_update_(
            factor, torch.randn(50, n).to(backend.device, dtype), decay=0.9, scale=0.3
        )
    assert torch.equal(factor, factor.mT)


@pytest.mark.parametrize("content", [math.nan, math.inf])
def test_decay_zero_ignores_what_was_there(backend, content):
    x = small_integers(40, 33, device=backend.device)
    factor = torch.full((33, 33), content, device=backend.device)
    assert kron_factor_update_(factor, x, decay=0.0, scale=1.0).item() == Info.OK
    assert torch.equal(factor, x.mT @ x)


def test_decay_one_without_a_scale_changes_nothing(backend):
    factor = spd(33, device=backend.device)
    before = factor.clone()
    kron_factor_update_(factor, torch.randn(40, 33, device=backend.device), decay=1.0)
    assert torch.equal(factor, before)


def test_only_the_lower_triangle_is_read(backend):
    factor, x = integer_case(40, 65, torch.float32, backend.device)
    want = yardstick(factor, x, 0.5, 0.25)
    factor[torch.ones_like(factor, dtype=torch.bool).triu(1)] = math.nan
    kron_factor_update_(factor, x, decay=0.5, scale=0.25)
    assert torch.equal(factor.double().cpu(), want)


def test_negative_scale_takes_samples_back(backend):
    factor, x = integer_case(40, 17, torch.float32, backend.device)
    before = factor.clone()
    kron_factor_update_(factor, x, decay=1.0, scale=1.0)
    kron_factor_update_(factor, x, decay=1.0, scale=-1.0)
    assert torch.equal(factor, before)


def test_order_one_is_the_scalar_formula(backend):
    factor = torch.full((1, 1), 3.0, device=backend.device)
    x = torch.tensor([[1.0], [2.0], [4.0]], device=backend.device)
    kron_factor_update_(factor, x, decay=0.5, scale=2.0)
    assert factor.item() == 0.5 * 3 + 2 * 21


def test_order_one_of_the_bias_alone(backend):
    factor = torch.full((1, 1), 3.0, device=backend.device)
    x = torch.empty(4, 0, device=backend.device)
    kron_factor_update_(factor, x, decay=0.5, scale=1.0, bias=True)
    assert factor.item() == 0.5 * 3 + 4


def test_permuting_samples_of_integers_changes_nothing(backend):
    factor, x = integer_case(300, 65, torch.float32, backend.device)
    other = factor.clone()
    kron_factor_update_(factor, x, decay=0.5, scale=0.25)
    kron_factor_update_(other, x[torch.randperm(300)], decay=0.5, scale=0.25)
    assert torch.equal(factor, other)


# ---- accuracy ----


@dtypes
@biases
@pytest.mark.parametrize(("rows", "n"), [*SHAPES, (1000, 65)], ids=str)
def test_error_is_at_most_twice_that_of_torch(backend, dtype, bias, rows, n):
    factor = spd(n, dtype=state_dtype(dtype), device=backend.device)
    x = torch.randn(rows, n - bias).to(backend.device, dtype)
    base = plain(factor, x, 0.95, 0.05 / rows, bias)
    ref = yardstick(factor, x, 0.95, 0.05 / rows, bias)
    kron_factor_update_(factor, x, decay=0.95, bias=bias)
    # fp64 against itself: the yardstick has the error of the thing measured.
    floor = 1e-14 * ref.abs().max().item() if dtype == torch.float64 else None
    assert_within_budget(factor, ref, base, floor=floor)


@dtypes
def test_error_of_a_wide_factor(backend, dtype):
    test_error_is_at_most_twice_that_of_torch(backend, dtype, False, 40, 1000)


def test_large_offset_in_the_samples(backend):
    """Sums of nearly equal numbers: what a bf16 or TF32 product would visibly lose."""
    x = 100 + torch.randn(500, 65).to(backend.device)
    factor = torch.zeros(65, 65, device=backend.device)
    base, ref = plain(factor, x, 0, 1 / 500), yardstick(factor, x, 0, 1 / 500)
    kron_factor_update_(factor, x, decay=0.0)
    assert_within_budget(factor, ref, base)


def test_many_updates_with_one_batch_converge_to_it(backend):
    x = torch.randn(20, 9).to(backend.device)
    factor = torch.zeros(9, 9, device=backend.device)
    # The reference rounds alike at every step: fewer of them say the same.
    for _ in range(100_000 if backend.name == "cpu" else 400):
        kron_factor_update_(factor, x, decay=0.9)
    want = x.double().mT @ x.double() / 20
    # Each step rounds a few times (decay itself, two products, their sum), and old errors decay: what
    # stays is at most 1/(1 - decay) = 10 times that.
    unit = torch.finfo(torch.float32).eps / 2
    assert ((factor - want).abs().max() / want.abs().max()).item() < 40 * unit
    assert torch.equal(factor, factor.mT)


# ---- shapes ----


@dtypes
def test_empty_batch_leaves_the_factor(backend, dtype):
    factor = spd(17, dtype=state_dtype(dtype), device=backend.device)
    before = factor.clone()
    x = torch.empty(0, 17, dtype=dtype, device=backend.device)
    for bias in (False, True):
        info = kron_factor_update_(factor, x[:, : 17 - bias], decay=0.5, bias=bias)
        assert (info.item(), torch.equal(factor, before)) == (Info.OK, True)


def test_factor_of_order_zero(backend):
    factor, x = torch.empty(0, 0, device=backend.device), torch.empty(5, 0, device=backend.device)
    assert kron_factor_update_(factor, x, decay=0.5).item() == Info.OK


def test_empty_list(backend):
    info = kron_factor_update_([], [], decay=0.5)
    assert (info.dtype, info.shape) == (torch.int32, (0,))


def test_info_is_int32_on_the_device_of_the_factor(backend):
    factor, x = spd(3, device=backend.device), torch.ones(2, 3, device=backend.device)
    one, many = (
        kron_factor_update_(factor, x, decay=0.5),
        kron_factor_update_([factor], [x], decay=0.5),
    )
    assert (one.dtype, one.shape, one.device) == (torch.int32, (), factor.device)
    assert (many.dtype, many.shape, many.device) == (torch.int32, (1,), factor.device)


@biases
def test_list_is_bitwise_the_single_form(backend, bias):
    sizes = [(1, 1), (40, 17), (0, 5), (300, 65), (7, 129)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float16]
    factors = [
        spd(n, dtype=state_dtype(t), device=backend.device)
        for (_, n), t in zip(sizes, dtypes, strict=True)
    ]
    xs = [
        torch.randn(rows, n - bias).to(backend.device, t)
        for (rows, n), t in zip(sizes, dtypes, strict=True)
    ]
    singles = [f.clone() for f in factors]
    infos = [
        kron_factor_update_(f, x, decay=0.9, bias=bias) for f, x in zip(singles, xs, strict=True)
    ]
    info = kron_factor_update_(factors, tuple(xs), decay=0.9, bias=bias)
    assert torch.equal(info, torch.stack(infos))
    assert all(torch.equal(f, s) for f, s in zip(factors, singles, strict=True))


def test_more_matrices_than_a_side_of_a_grid():
    count = 66_000
    factors = list(torch.ones(count, 1, 1).unbind())
    xs = small_integers(count, 2, 1)
    info = kron_factor_update_(factors, list(xs.unbind()), decay=0.5, scale=0.25)
    assert info.shape == (count,)
    assert (info == Info.OK).all()
    assert torch.equal(torch.stack(factors), 0.5 + 0.25 * xs.square().sum(dim=1, keepdim=True))


@pytest.mark.gpu
def test_more_matrices_than_a_side_of_a_grid_on_a_gpu():
    count = 66_000
    factors = list(torch.ones(count, 1, 1, device="cuda").unbind())
    xs = small_integers(count, 2, 1, dtype=torch.bfloat16, device="cuda")
    info = kron_factor_update_(factors, list(xs.unbind()), decay=0.5, scale=0.25)
    assert (info == Info.OK).all()
    want = 0.5 + 0.25 * xs.float().square().sum(dim=1, keepdim=True)
    assert torch.equal(torch.stack(factors), want)


# ---- layouts ----


@dtypes
@biases
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layout_of_x_does_not_matter(backend, dtype, bias, layout):
    factor, x = integer_case(130, 65, dtype, backend.device, bias)
    other = factor.clone()
    kron_factor_update_(factor, x, decay=0.5, scale=0.25, bias=bias)
    view = MATRIX_LAYOUTS[layout](x)
    assert torch.equal(view, x)
    kron_factor_update_(other, view, decay=0.5, scale=0.25, bias=bias)
    assert torch.equal(other, factor)


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_cpu_kernel_gives_the_same_bits_for_any_layout(layout):
    x, factor = torch.randn(300, 70), spd(70)
    other = factor.clone()
    with gk.use_backend("cpu"):
        kron_factor_update_(factor, x, decay=0.9)
        kron_factor_update_(other, MATRIX_LAYOUTS[layout](x), decay=0.9)
    assert torch.equal(other, factor)


@dtypes
@pytest.mark.parametrize("expand", [(1, 33), (40, 1)], ids=["rows", "columns"])
def test_expanded_x(backend, dtype, expand):
    x = small_integers(*expand, dtype=dtype, device=backend.device).expand(40, 33)
    factor, _ = integer_case(1, 33, dtype, backend.device)
    want = yardstick(factor, x, 0.5, 0.25)
    kron_factor_update_(factor, x, decay=0.5, scale=0.25)
    assert torch.equal(factor.double().cpu(), want)


@pytest.mark.parametrize("layout", [*MATRIX_LAYOUTS, "guarded"])
def test_layout_of_the_factor_does_not_matter(backend, layout):
    if backend.name == "cpu":
        pytest.skip("named, this backend takes contiguous factors only: see the error tests")
    factor, x = integer_case(130, 65, torch.float32, backend.device)
    want = yardstick(factor, x, 0.5, 0.25)
    check = None
    if layout == "guarded":
        view, check = guarded(factor, contiguous=False)
    else:
        view = MATRIX_LAYOUTS[layout](factor)
    kron_factor_update_(view, x, decay=0.5, scale=0.25)
    assert torch.equal(view.double().cpu(), want)
    if check:
        check()


def test_automatic_choice_takes_a_strided_factor():
    factor, x = integer_case(130, 65, torch.float32, "cpu")
    want = yardstick(factor, x, 0.5, 0.25)
    view, check = guarded(factor, contiguous=False)
    kron_factor_update_(view, x, decay=0.5, scale=0.25)
    assert torch.equal(view.double(), want)
    check()


@dtypes
@pytest.mark.parametrize("n", ODD_SIZES)
def test_memory_around_the_factor_is_not_written(backend, dtype, n):
    values, x = integer_case(70, n, dtype, backend.device)
    want = yardstick(values, x, 0.5, 0.25)
    factor, check = guarded(values)
    kron_factor_update_(factor, x, decay=0.5, scale=0.25)
    assert torch.equal(factor.double().cpu(), want)
    check()


@dtypes
def test_memory_around_x_is_not_read(backend, dtype):
    factor, values = integer_case(70, 65, dtype, backend.device)
    want = yardstick(factor, values, 0.5, 0.25)
    x, _ = guarded(values)
    assert kron_factor_update_(factor, x, decay=0.5, scale=0.25).item() == Info.OK
    assert torch.equal(factor.double().cpu(), want)


@dtypes
def test_unaligned_pointers_after_an_aligned_call(backend, dtype):
    factor, x = integer_case(70, 65, dtype, backend.device)
    want = yardstick(factor, x, 0.5, 0.25)
    shifted_factor, shifted_x = offset_by_one(factor), offset_by_one(x)
    kron_factor_update_(factor, x, decay=0.5, scale=0.25)
    kron_factor_update_(shifted_factor, shifted_x, decay=0.5, scale=0.25)
    assert torch.equal(factor.double().cpu(), want)
    assert torch.equal(shifted_factor, factor)


@dtypes
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_elements_further_apart_than_int32_reaches(backend, dtype, dim, tmp_path):
    factor, x = integer_case(2, 17 if dim == 0 else 2, dtype, backend.device)
    want = yardstick(factor, x, 0.5, 0.25)
    kron_factor_update_(factor, far_apart(x, dim, tmp_path), decay=0.5, scale=0.25)
    assert torch.equal(factor.double().cpu(), want)


# ---- scalars ----


@pytest.mark.parametrize("scale", [None, 0.375], ids=["mean", "scale"])
def test_tensor_decay_and_scale_equal_the_numbers(backend, scale):
    x, factor = torch.randn(40, 33, device=backend.device), spd(33, device=backend.device)
    other = factor.clone()
    kron_factor_update_(factor, x, decay=0.9375, scale=scale)
    tensor = None if scale is None else torch.tensor(scale, device=backend.device)
    kron_factor_update_(other, x, decay=torch.tensor(0.9375, device=backend.device), scale=tensor)
    assert torch.equal(factor, other)


def test_tensor_decay_in_fp64_is_not_rounded_early(backend):
    x, factor = torch.randn(40, 33, device=backend.device), spd(33, device=backend.device)
    other = factor.clone()
    kron_factor_update_(factor, x, decay=0.999)
    decay = torch.tensor(0.999, dtype=torch.float64, device=backend.device)
    kron_factor_update_(other, x, decay=decay)
    assert torch.equal(factor, other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["decay", "scale"])
def test_nonfinite_tensor_scalar_sets_info(backend, name, value):
    factor = spd(9, device=backend.device)
    before = factor.clone()
    scalars = {"decay": 0.5, "scale": 1.0} | {name: torch.tensor(value, device=backend.device)}
    info = kron_factor_update_(factor, torch.ones(4, 9, device=backend.device), **scalars)
    assert info.item() == Info.NONFINITE_INPUT
    assert torch.equal(factor, before)


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_tensor_decay_out_of_range_sets_info(backend, value):
    factor = spd(9, device=backend.device)
    before = factor.clone()
    decay = torch.tensor(value, device=backend.device)
    info = kron_factor_update_(factor, torch.ones(4, 9, device=backend.device), decay=decay)
    assert info.item() != Info.OK
    assert torch.equal(factor, before)


# ---- faults ----


def test_zero_samples_only_decay(backend):
    factor = spd(33, device=backend.device)
    want = 0.75 * factor
    assert kron_factor_update_(factor, torch.zeros(8, 33).to(factor), decay=0.75).item() == Info.OK
    assert torch.equal(factor, want)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-40])
def test_squares_that_underflow_only_decay(backend, magnitude):
    factor = spd(33, device=backend.device)
    want = 0.75 * factor
    x = torch.full((8, 33), magnitude, device=backend.device)
    assert kron_factor_update_(factor, x, decay=0.75).item() == Info.OK
    assert torch.equal(factor, want)


@pytest.mark.parametrize(
    ("dtype", "magnitude", "code"),
    [
        (torch.float32, 1.9e19, Info.OVERFLOW),
        (torch.float32, 3e38, Info.OVERFLOW),
        (torch.float32, 1e18, Info.OK),
        (torch.bfloat16, 3e38, Info.OVERFLOW),
        (torch.float16, 65504.0, Info.OK),
        (torch.float64, 1e155, Info.OVERFLOW),
        (torch.float64, 1e150, Info.OK),
    ],
    ids=str,
)
def test_largest_samples(backend, dtype, magnitude, code):
    factor = spd(33, dtype=state_dtype(dtype), device=backend.device)
    before = factor.clone()
    x = torch.zeros(8, 33, dtype=dtype, device=backend.device)
    x[3, 5] = magnitude
    info = kron_factor_update_(factor, x, decay=0.5, scale=0.125)
    assert info.item() == code
    if code != Info.OK:
        assert torch.equal(factor, before)
    else:
        assert factor.isfinite().all()
        want = 0.5 * before[5, 5].item() + 0.125 * x[3, 5].item() ** 2
        assert factor[5, 5].item() == pytest.approx(want, rel=1e-6)


def test_sum_that_overflows_though_no_square_does(backend):
    factor = torch.zeros(3, 3, device=backend.device)
    x = torch.full((1000, 3), 1e18, device=backend.device)
    assert kron_factor_update_(factor, x, decay=0.5, scale=1.0).item() == Info.OVERFLOW
    assert kron_factor_update_(factor, x[:100], decay=0.5, scale=1e3).item() == Info.OVERFLOW
    assert (factor == 0).all()


def test_factor_near_the_end_of_its_range_does_not_become_infinite(backend):
    factor = torch.full((3, 3), 3e38, device=backend.device)
    x = torch.full((1, 3), 1.5e19, device=backend.device)
    info = kron_factor_update_(factor, x, decay=1.0, scale=1.0)
    assert factor.isfinite().all() or info.item() == Info.OVERFLOW


@dtypes
@biases
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", [(0, 0), (69, 63), (-1, -1)], ids=["first", "middle", "last"])
def test_one_nonfinite_sample_leaves_the_factor(backend, dtype, bias, value, where):
    factor = spd(65, dtype=state_dtype(dtype), device=backend.device)
    before = factor.clone()
    x = torch.randn(130, 65 - bias).to(backend.device, dtype)
    x[where] = value
    info = kron_factor_update_(factor, x, decay=0.5, bias=bias)
    assert info.item() == Info.NONFINITE_INPUT
    assert torch.equal(factor, before)


def test_other_factors_of_the_call_are_updated(backend):
    factors = [spd(n, device=backend.device) for n in (17, 33, 65)]
    xs = [torch.randn(40, n, device=backend.device) for n in (17, 33, 65)]
    alone = [f.clone() for f in factors]
    for f, x in zip(alone, xs, strict=True):
        kron_factor_update_(f, x, decay=0.5)
    before = factors[1].clone()
    xs[1][7, 3] = math.nan
    info = kron_factor_update_(factors, xs, decay=0.5)
    assert info.tolist() == [Info.OK, Info.NONFINITE_INPUT, Info.OK]
    assert torch.equal(factors[1], before)
    assert torch.equal(factors[0], alone[0])
    assert torch.equal(factors[2], alone[2])


def _list_of_both_ways():
    """Factors that split the rows, factors that split the tiles, and both dtypes of the state."""
    sizes = [(3000, 64), (700, 500), (2000, 16), (600, 700), (1500, 100)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float64]
    xs = [torch.randn(size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    factors = [torch.ones(x.shape[1], x.shape[1], dtype=state_dtype(x.dtype)) for x in xs]
    return (factors, xs), factors


SHORT_OF_MEMORY = {"list": (_list_of_both_ways, lambda a: kron_factor_update_(*a, decay=0.5))}


def test_memory_that_ends_leaves_the_factors_as_they_were():
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    assert_memory_that_ends_changes_nothing(__name__, "list", 32 << 20)


# ---- errors ----


def call(**changes):
    arguments = {"factor": torch.eye(4), "x": torch.ones(3, 4), "decay": 0.5} | changes
    return kron_factor_update_(arguments.pop("factor"), arguments.pop("x"), **arguments)


SHARED = torch.zeros(64)
ERRORS = {
    "factor_no_tensor": (
        TypeError, "factor must be a tensor or a list of tensors, got int", {"factor": 3},
    ),
    "x_no_tensor": (TypeError, "x must be a tensor or a list of tensors, got str", {"x": "x"}),
    "list_item_no_tensor": (
        TypeError,
        "x must be a tensor or a list of tensors, got a list with int",
        {"factor": [torch.eye(4)], "x": [1]},
    ),
    "tensor_and_list": (
        TypeError, "factor and x must all be tensors or all be lists", {"x": [torch.ones(3, 4)]},
    ),
    "lengths": (
        ValueError,
        "the lists must have the same length, got factor: 2, x: 1",
        {"factor": [torch.eye(4), torch.eye(4)], "x": [torch.ones(3, 4)]},
    ),
    "decay_low": (ValueError, "decay must be finite and in [0.0, 1.0], got -0.1", {"decay": -0.1}),
    "decay_high": (ValueError, "decay must be finite and in [0.0, 1.0], got 1.1", {"decay": 1.1}),
    "decay_nan": (ValueError, "decay must be finite and in [0.0, 1.0], got nan", {"decay": math.nan}),
    "decay_text": (TypeError, "decay must be a number, got str", {"decay": "0.5"}),
    "decay_bool": (TypeError, "decay must be a number, got bool", {"decay": True}),
    "decay_vector": (
        ValueError, "decay must be a number or a 0-d tensor, got [1]", {"decay": torch.ones(1)},
    ),
    "decay_integer_tensor": (
        TypeError,
        "decay must have dtype float32, bfloat16, float16, float64, got int64",
        {"decay": torch.tensor(1)},
    ),
    "decay_on_another_device": (
        ValueError,
        "all tensors must be on one device, got factor on cpu and decay on meta",
        {"decay": torch.tensor(0.5, device="meta")},
    ),
    "scale_infinite": (
        ValueError, "scale must be finite and in (-inf, inf), got inf", {"scale": math.inf},
    ),
    "scale_vector": (
        ValueError, "scale must be a number or a 0-d tensor, got [2]", {"scale": torch.ones(2)},
    ),
    "scale_on_another_device": (
        ValueError,
        "all tensors must be on one device, got factor on cpu and scale on meta",
        {"scale": torch.tensor(0.5, device="meta")},
    ),
    "factor_bf16": (
        TypeError, "factor must have dtype float32, got bfloat16", {"factor": torch.eye(4).bfloat16()},
    ),
    "factor_fp64_for_fp32": (
        TypeError, "factor must have dtype float32, got float64", {"factor": torch.eye(4).double()},
    ),
    "factor_fp32_for_fp64": (
        TypeError, "factor must have dtype float64, got float32", {"x": torch.ones(3, 4).double()},
    ),
    "factor_sparse": (
        TypeError,
        "factor must be a dense (strided) tensor, got layout torch.sparse_coo",
        {"factor": torch.eye(4).to_sparse()},
    ),
    "factor_rectangular": (
        ValueError, "factor must be square [N, N], got shape [4, 5]", {"factor": torch.ones(4, 5)},
    ),
    "factor_batched": (
        ValueError, "factor must be square [N, N], got shape [2, 4, 4]", {"factor": torch.ones(2, 4, 4)},
    ),
    "x_rank": (
        ValueError, "x must be [rows, N] with N = 4, got shape [4]", {"x": torch.ones(4)},
    ),
    "x_width": (
        ValueError, "x must be [rows, N] with N = 4, got shape [3, 5]", {"x": torch.ones(3, 5)},
    ),
    "x_width_with_bias": (
        ValueError,
        "x must be [rows, N-1] with N = 4 (bias=True), got shape [3, 4]",
        {"bias": True},
    ),
    "item_is_named": (
        ValueError,
        "x[1] must be [rows, N] with N = 4, got shape [3, 5]",
        {"factor": [torch.eye(4), torch.eye(4)], "x": [torch.ones(3, 4), torch.ones(3, 5)]},
    ),
    "factor_expanded": (
        ValueError,
        "factor is written in place and must not overlap itself, got strides [0, 1] for shape [4, 4]",
        {"factor": torch.ones(1, 4).expand(4, 4)},
    ),
    "devices": (
        ValueError,
        "all tensors must be on one device, got factor on cpu and x on meta",
        {"x": torch.ones(3, 4, device="meta")},
    ),
    "devices_in_a_list": (
        ValueError,
        "all tensors must be on one device, got factor[0] on cpu and factor[1] on meta",
        {
            "factor": [torch.eye(4), torch.eye(4, device="meta")],
            "x": [torch.ones(3, 4), torch.ones(3, 4, device="meta")],
        },
    ),
    "overlap_with_x": (
        ValueError,
        "overlap in memory, and one is written",
        {"factor": SHARED[:16].view(4, 4), "x": SHARED[12:24].view(3, 4)},
    ),
    "same_factor_twice": (
        ValueError,
        "factor[1] and factor[0] overlap in memory, and one is written",
        {"factor": [SHARED[:16].view(4, 4)] * 2, "x": [torch.ones(3, 4)] * 2},
    ),
    "factor_overlaps_itself": (
        ValueError, "factor", {"factor": torch.zeros(16).as_strided((4, 4), (1, 1))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong(case):
    exception, text, changes = ERRORS[case]
    assert_raises(exception, text, call, **changes)
    with pytest.raises(exception, match=r"^kron_factor_update_: "):
        call(**changes)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
def test_refused_dtypes_and_layouts(kind):
    with pytest.raises(
        TypeError, match=r"x must (have dtype float32, bfloat16, float16, float64|be a dense)"
    ):
        call(x=refused(kind, 3, 4))


def test_scalar_that_is_the_factor_itself_is_refused_or_right():
    """A decay tensor that is a view of the factor must not change while it is used."""
    factor = torch.eye(4) / 2
    want = 0.5 * factor + torch.ones(3, 4).mT @ torch.ones(3, 4)
    try:
        kron_factor_update_(factor, torch.ones(3, 4), decay=factor[0, 0], scale=1.0)
    except ValueError:
        return
    assert torch.equal(factor, want)


@pytest.mark.parametrize("where", ["x", "factor"])
def test_nothing_is_written_after_an_error(where):
    factors = [torch.eye(4), torch.eye(4)]
    xs = [torch.ones(3, 4), torch.ones(3, 4)]
    if where == "x":
        xs[1] = torch.ones(3, 5)
    else:
        factors[1] = torch.ones(4, 4, dtype=torch.int32)
    with pytest.raises((TypeError, ValueError)):
        kron_factor_update_(factors, xs, decay=0.5)
    assert torch.equal(factors[0], torch.eye(4))


def test_named_cpu_backend_refuses_a_strided_factor():
    with gk.use_backend("cpu"):
        assert_raises(
            RuntimeError,
            "backend 'cpu' was asked for, but it needs contiguous factors",
            call,
            factor=torch.eye(8)[::2, ::2],
        )


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_scale_beyond_fp32_never_reaches_an_fp32_factor(backend, tensor):
    factor = torch.eye(4, device=backend.device)
    before = factor.clone()
    x = torch.zeros(3, 4, device=backend.device)
    if tensor:
        scale = torch.tensor(1e39, dtype=torch.float64, device=backend.device)
        assert kron_factor_update_(factor, x, decay=0.5, scale=scale).item() != Info.OK
    else:
        with pytest.raises(ValueError, match="scale must stay finite"):
            kron_factor_update_(factor, x, decay=0.5, scale=1e39)
    assert torch.equal(factor, before)
