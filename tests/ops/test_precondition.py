# SPDX-License-Identifier: Apache-2.0
"""``precondition``: left · grad · right."""

import math

import pytest
import torch

from grng_kernels import precondition
from grng_kernels.precondition.reference import left_first
from tests.cases import (
    ALL_DTYPES,
    MATRIX_LAYOUTS,
    STATE_DTYPES,
    assert_within_budget,
    dtype_id,
    guarded,
    offset_by_one,
    small_integers,
    spd,
)
from tests.ops.errors import REFUSED, assert_raises, refused

dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
state_dtypes = pytest.mark.parametrize("state", STATE_DTYPES, ids=dtype_id)
sizes = pytest.mark.parametrize(
    ("m", "n"),
    [(1, 1), (1, 17), (17, 1), (3, 65), (65, 3), (64, 64), (129, 33), (40, 1000)],
    ids=str,
)


def integers(m, n, dtype=torch.float32, device="cpu"):
    """Inputs whose products are exact in fp32."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        small_integers(m, n, dtype=dtype, device=device),
        small_integers(m, m, dtype=state, device=device),
        small_integers(n, n, dtype=state, device=device),
    )


def yardstick(grad, left, right):
    return left.double().cpu() @ grad.double().cpu() @ right.double().cpu()


# ---- exact ----


@dtypes
@sizes
def test_small_integers_are_exact(device, dtype, m, n):
    grad, left, right = integers(m, n, dtype, device)
    assert torch.equal(precondition(grad, left, right).double().cpu(), yardstick(grad, left, right))


@dtypes
def test_identities_return_the_gradient(device, dtype):
    grad = torch.randn(17, 65).to(device, dtype)
    eye = [torch.eye(k, device=device, dtype=torch.float32) for k in (17, 65)]
    got = precondition(grad, *eye)
    assert torch.equal(got, grad.to(got.dtype))


@pytest.mark.parametrize("power", [-60, 60])
def test_powers_of_two_pass_through(device, power):
    grad, left, right = torch.randn(17, 65), spd(17), spd(65)
    grad, left, right = grad.to(device), left.to(device), right.to(device)
    want = precondition(grad, left, right) * 2.0**power
    assert torch.equal(precondition(grad * 2.0**power, left, right), want)
    assert torch.equal(precondition(grad, left * 2.0**power, right), want)


def test_left_acts_on_rows_and_right_on_columns(device):
    grad = torch.ones(2, 3, device=device)
    left = torch.diag(torch.tensor([1.0, 10.0], device=device))
    right = torch.diag(torch.tensor([1.0, 2.0, 3.0], device=device))
    want = torch.tensor([[1.0, 2, 3], [10, 20, 30]], device=device)
    assert torch.equal(precondition(grad, left, right), want)


def test_factors_need_not_be_symmetric(device):
    grad, left, right = integers(5, 7, device=device)
    assert not torch.equal(left, left.mT)
    assert torch.equal(precondition(grad, left, right).double().cpu(), yardstick(grad, left, right))


def test_both_orders_of_the_products_are_taken():
    assert left_first(3, 3)
    assert left_first(4, 3)
    assert not left_first(3, 4)


# ---- accuracy ----


@dtypes
@state_dtypes
@sizes
def test_error_is_at_most_twice_that_of_torch(device, dtype, state, m, n):
    grad, left, right = torch.randn(m, n), spd(m), spd(n)
    grad = grad.to(device, dtype)
    left, right = left.to(device, state), right.to(device, state)
    got = precondition(grad, left, right)
    wide = torch.promote_types(dtype, state)
    assert (got.dtype, got.shape) == (wide, (m, n))
    base = left.to(wide) @ grad.to(wide) @ right.to(wide)
    ref = yardstick(grad, left, right)
    floor = 1e-14 * ref.abs().max().item() if wide == torch.float64 else None
    assert_within_budget(got, ref, base, floor=floor)


def test_widest_of_the_three_dtypes_wins(device):
    grad = torch.randn(3, 4, device=device)
    left, right = torch.eye(3, device=device), torch.eye(4, device=device).double()
    assert precondition(grad, left, right).dtype == torch.float64
    assert precondition(grad.half(), left, right.float()).dtype == torch.float32


# ---- shapes, layouts, out ----


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_empty_gradient(device, m, n):
    grad = torch.empty(m, n, device=device)
    got = precondition(grad, torch.eye(m, device=device), torch.eye(n, device=device))
    assert got.shape == (m, n)


def test_empty_list():
    assert precondition([], [], []) == []


def test_list_is_bitwise_the_single_form(device):
    sizes = [(17, 65), (1, 1), (0, 3), (65, 17), (17, 65)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float64]
    grads = [torch.randn(s).to(device, t) for s, t in zip(sizes, dtypes, strict=True)]
    lefts = [spd(m, device=device) for m, _ in sizes]
    rights = [spd(n, device=device) for _, n in sizes]
    results = precondition(grads, lefts, tuple(rights))
    assert isinstance(results, list)
    for got, *arguments in zip(results, grads, lefts, rights, strict=True):
        assert torch.equal(got, precondition(*arguments))


def test_mixed_forms_are_refused():
    grad, left, right = integers(2, 3)
    with pytest.raises(TypeError):
        precondition(grad, [left], [right])
    with pytest.raises(TypeError):
        precondition([grad], [left], [right], out=torch.empty(2, 3))


@dtypes
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad", "left", "right"])
def test_layout_does_not_matter(device, dtype, layout, which):
    arguments = list(integers(33, 65, dtype, device))
    want = precondition(*arguments)
    arguments[which] = MATRIX_LAYOUTS[layout](arguments[which])
    assert torch.equal(precondition(*arguments), want)


def test_expanded_gradient(device):
    _, left, right = integers(5, 7, device=device)
    grad = small_integers(1, 7, device=device).expand(5, 7)
    assert torch.equal(precondition(grad, left, right).double().cpu(), yardstick(grad, left, right))


@dtypes
def test_unaligned_pointers_after_an_aligned_call(device, dtype):
    arguments = integers(33, 65, dtype, device)
    want = precondition(*arguments)
    assert torch.equal(precondition(*(offset_by_one(a) for a in arguments)), want)


@pytest.mark.parametrize("contiguous", [True, False])
def test_out_is_written_and_nothing_around_it(device, contiguous):
    arguments = integers(17, 33, device=device)
    out, check = guarded(torch.full((17, 33), math.nan, device=device), contiguous=contiguous)
    got = precondition(*arguments, out=out)
    assert got is out
    assert torch.equal(out, precondition(*arguments))
    check()


def test_out_of_a_list(device):
    both = [integers(5, 3, device=device), integers(2, 9, device=device)]
    outs = [
        torch.full((5, 3), math.nan, device=device),
        torch.full((2, 9), math.nan, device=device),
    ]
    got = precondition(*(list(t) for t in zip(*both, strict=True)), out=outs)
    assert all(g is o for g, o in zip(got, outs, strict=True))
    assert all(torch.equal(o, precondition(*a)) for o, a in zip(outs, both, strict=True))


# ---- faults ----


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad", "left", "right"])
def test_nonfinite_input_gives_nonfinite_output_of_that_item_alone(device, which, value):
    first, second = list(integers(5, 7, device=device)), integers(5, 7, device=device)
    first[which] = first[which].abs() + 1
    first[which][2, 3] = value
    got = precondition(*(list(t) for t in zip(first, second, strict=True)))
    assert not got[0].isfinite().all()
    assert torch.equal(got[1], precondition(*second))


# ---- errors ----

G, L, R = torch.ones(2, 3), torch.eye(2), torch.eye(3)
BIG = torch.zeros(64)
ERRORS = {
    "grad_no_tensor": (
        TypeError, "grad must be a tensor or a list of tensors, got NoneType", {"grad": None},
    ),
    "list_item_no_tensor": (
        TypeError,
        "left must be a tensor or a list of tensors, got a list with int",
        {"grad": [G], "left": [1], "right": [R]},
    ),
    "out_no_tensor": (
        TypeError, "out must be a tensor or a list of tensors, got bool", {"out": True},
    ),
    "lengths": (
        ValueError,
        "the lists must have the same length, got grad: 2, left: 2, right: 1",
        {"grad": [G, G], "left": [L, L], "right": [R]},
    ),
    "out_length": (
        ValueError,
        "the lists must have the same length, got grad: 2, left: 2, right: 2, out: 1",
        {"grad": [G, G], "left": [L, L], "right": [R, R], "out": [torch.empty(2, 3)]},
    ),
    "left_bf16": (
        TypeError, "left must have dtype float32, float64, got bfloat16", {"left": L.bfloat16()},
    ),
    "right_fp16": (
        TypeError, "right must have dtype float32, float64, got float16", {"right": R.half()},
    ),
    "grad_rank": (
        ValueError, "grad must be [m, n], got shape [2, 3, 1]", {"grad": torch.ones(2, 3, 1)},
    ),
    "left_shape": (
        ValueError, "left must have shape [2, 2] (grad is [m, n]), got [3, 3]", {"left": R},
    ),
    "right_shape": (
        ValueError, "right must have shape [3, 3] (grad is [m, n]), got [2, 2]", {"right": L},
    ),
    "item_is_named": (
        ValueError,
        "right[1] must have shape [3, 3] (grad is [m, n]), got [2, 2]",
        {"grad": [G, G], "left": [L, L], "right": [R, L]},
    ),
    "devices": (
        ValueError,
        "all tensors must be on one device, got grad on cpu and left on meta",
        {"left": L.to("meta")},
    ),
    "devices_in_a_list": (
        ValueError,
        "all tensors must be on one device, got grad[0] on cpu and grad[1] on meta",
        {
            "grad": [G, G.to("meta")],
            "left": [L, L.to("meta")],
            "right": [R, R.to("meta")],
        },
    ),
    "out_dtype": (
        TypeError, "out must have dtype float32, got float64", {"out": torch.empty(2, 3).double()},
    ),
    "out_shape": (
        ValueError, "out must have shape [2, 3] (as grad), got [3, 2]", {"out": torch.empty(3, 2)},
    ),
    "out_expanded": (
        ValueError,
        "out is written in place and must not overlap itself, got strides [0, 1] for shape [2, 3]",
        {"out": torch.empty(1, 3).expand(2, 3)},
    ),
    "out_device": (
        ValueError,
        "all tensors must be on one device, got grad on cpu and out on meta",
        {"out": torch.empty(2, 3, device="meta")},
    ),
    "out_is_grad": (
        ValueError,
        "overlap in memory, and one is written",
        {"grad": BIG[:6].view(2, 3), "out": BIG[:6].view(2, 3)},
    ),
    "out_overlaps_right": (
        ValueError,
        "overlap in memory, and one is written",
        {"right": BIG[:9].view(3, 3), "out": BIG[8:14].view(2, 3)},
    ),
    "same_out_twice": (
        ValueError,
        "out[1] and out[0] overlap in memory, and one is written",
        {"grad": [G, G], "left": [L, L], "right": [R, R], "out": [BIG[:6].view(2, 3)] * 2},
    ),
}  # fmt: skip


def call(**changes):
    arguments = {"grad": G, "left": L, "right": R} | changes
    return precondition(**arguments)


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong(case):
    exception, text, changes = ERRORS[case]
    assert_raises(exception, text, call, **changes)
    with pytest.raises(exception, match=r"^precondition: "):
        call(**changes)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
def test_refused_dtypes_and_layouts(kind):
    with pytest.raises(
        TypeError, match=r"grad must (have dtype float32, bfloat16, float16, float64|be a dense)"
    ):
        call(grad=refused(kind, 2, 3))
