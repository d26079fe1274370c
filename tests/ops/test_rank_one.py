# SPDX-License-Identifier: Apache-2.0
"""``rank1_precondition``: (damping·I + u uᵀ)⁻¹ g without a matrix."""

import math

import numpy as np
import pytest
import torch

from grng_kernels import rank1_precondition
from tests.cases import (
    ALL_DTYPES,
    ODD_SIZES,
    assert_within_budget,
    dtype_id,
    far_apart,
    guarded,
    offset_by_one,
    small_integers,
)
from tests.ops.errors import REFUSED, assert_raises, refused
from tests.properties import given, st

dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
sizes = pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 65), (2, 3, 5), (1000,)], ids=str)


def dense(grad, score, damping):
    """The solution with the matrix built, numpy fp64."""
    g = grad.detach().double().cpu().numpy().reshape(-1)
    u = score.detach().double().cpu().numpy().reshape(-1)
    x = np.linalg.solve(damping * np.eye(len(u)) + np.outer(u, u), g)
    return torch.from_numpy(x).view(grad.shape)


def plain(grad, score, damping):
    """The formula with torch's operations in the dtype of ``grad``."""
    return (grad - score * (score * grad).sum() / (damping + (score * score).sum())) / damping


# ---- exact ----


@dtypes
def test_zero_score_divides_by_the_damping(device, dtype):
    grad = small_integers(65, dtype=dtype, device=device)
    assert torch.equal(rank1_precondition(grad, torch.zeros_like(grad), damping=0.5), 2 * grad)


@dtypes
def test_orthogonal_score_divides_by_the_damping(device, dtype):
    grad = torch.tensor([1.0, 0, 2, 0]).to(device, dtype)
    score = torch.tensor([0, 3.0, 0, -1]).to(device, dtype)
    assert torch.equal(rank1_precondition(grad, score, damping=0.25), 4 * grad)


@dtypes
def test_gradient_along_the_score(device, dtype):
    """g = 3u, uᵀu = 7, damping 1: the answer is 3u/8, exact in every dtype."""
    score = torch.tensor([1.0, -1, 2, 1]).to(device, dtype)
    assert torch.equal(rank1_precondition(3 * score, score, damping=1.0), 0.375 * score)


@pytest.mark.parametrize("power", [-30, 30])
def test_powers_of_two_pass_through(device, power):
    grad, score = torch.randn(65, device=device), torch.randn(65, device=device)
    want = rank1_precondition(grad, score, damping=0.1)
    got = rank1_precondition(grad * 2.0**power, score, damping=0.1)
    assert torch.equal(got, want * 2.0**power)
    got = rank1_precondition(grad, score * 2.0**power, damping=0.1 * 4.0**power)
    assert torch.equal(got, want * 4.0**-power)


def test_scalar_formula(device):
    grad, score = torch.tensor(3.0, device=device), torch.tensor(2.0, device=device)
    got = rank1_precondition(grad, score, damping=0.5)
    assert got.shape == ()
    assert got.item() == pytest.approx(3 / 4.5, rel=1e-7)


def test_tensor_damping_equals_the_number(device):
    grad, score = torch.randn(65, device=device), torch.randn(65, device=device)
    want = rank1_precondition(grad, score, damping=0.375)
    for dtype in ALL_DTYPES:
        damping = torch.tensor(0.375, dtype=dtype, device=device)
        assert torch.equal(rank1_precondition(grad, score, damping=damping), want)


# ---- accuracy ----


@dtypes
@sizes
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_error_is_at_most_twice_that_of_torch(device, dtype, shape, damping):
    grad, score = torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)
    got = rank1_precondition(grad, score, damping=damping)
    assert (got.dtype, got.shape) == (dtype, shape)
    ref, base = dense(grad, score, damping), plain(grad, score, damping)
    floor = 1e-12 * ref.abs().max().item() if dtype == torch.float64 else None
    assert_within_budget(got, ref, base, floor=floor)


@given(
    g=st.floats(-30, 30), u=st.floats(-30, 30), damping=st.floats(-6, 6), seed=st.integers(0, 1000)
)
def test_any_scale(g, u, damping, seed):
    """Squares of 1e-30 and 1e30 leave fp32; the sums must not."""
    torch.manual_seed(seed)
    grad, score = torch.randn(20) * 10**g, torch.randn(20) * 10**u
    got = rank1_precondition(grad, score, damping=10**damping).double()
    x, y = grad.double(), score.double()
    want = (x - y * (x @ y) / (10**damping + y @ y)) / 10**damping
    # Beyond the range of fp32 the result is infinite, and the cancellation is that of the formula.
    in_range = want.abs().max() < 3e38
    if in_range:
        slack = (2**-22 * want.abs().max() + 1e-14 * x.abs().max() / 10**damping + 1e-44).item()
        assert ((got - want).abs() <= slack).all()


# ---- blocks, shapes, layouts, out ----


def test_blocks_are_one_vector(device):
    shapes = [(3, 5), (1,), (0,), (), (7, 2, 2)]
    grads = [torch.randn(s, dtype=torch.float64, device=device) for s in shapes]
    scores = [torch.randn(s, dtype=torch.float64, device=device) for s in shapes]
    got = rank1_precondition(grads, scores, damping=0.1)
    whole = rank1_precondition(
        torch.cat([g.flatten() for g in grads]),
        torch.cat([s.flatten() for s in scores]),
        damping=0.1,
    )
    assert [g.shape for g in got] == [torch.Size(s) for s in shapes]
    torch.testing.assert_close(torch.cat([g.flatten() for g in got]), whole, rtol=1e-13, atol=1e-13)


@dtypes
def test_list_of_one_is_bitwise_the_single_form(device, dtype):
    grad, score = torch.randn(65).to(device, dtype), torch.randn(65).to(device, dtype)
    [got] = rank1_precondition([grad], (score,), damping=0.1)
    assert torch.equal(got, rank1_precondition(grad, score, damping=0.1))


def test_blocks_may_have_different_dtypes(device):
    grads = [small_integers(5, dtype=t, device=device) for t in ALL_DTYPES]
    scores = [small_integers(5, dtype=t, device=device) for t in ALL_DTYPES]
    got = rank1_precondition(grads, scores, damping=2.0)
    want = dense(
        torch.cat([g.double() for g in grads]), torch.cat([s.double() for s in scores]), 2.0
    )
    for g, w, t in zip(got, want.split(5), ALL_DTYPES, strict=True):
        assert g.dtype == t
        torch.testing.assert_close(g.cpu(), w.to(t))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_empty_input(device, shape):
    empty = torch.empty(shape, device=device)
    assert rank1_precondition(empty, empty.clone(), damping=0.1).shape == shape


def test_empty_list():
    assert rank1_precondition([], [], damping=0.1) == []


def test_mixed_forms_are_refused():
    grad, score = torch.ones(3), torch.ones(3)
    with pytest.raises(TypeError):
        rank1_precondition(grad, [score], damping=0.1)
    with pytest.raises(TypeError):
        rank1_precondition([grad], [score], damping=0.1, out=torch.empty(3))


def sliced(x):
    buffer = torch.full([2 * n for n in x.shape], math.nan, dtype=x.dtype, device=x.device)
    return buffer[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)


@dtypes
@pytest.mark.parametrize(
    "layout",
    [lambda x: x.mT.contiguous().mT, sliced, offset_by_one],
    ids=["transposed", "sliced", "offset"],
)
def test_layout_does_not_matter(device, dtype, layout):
    # Integers: exact sums in any order.
    grad, score = (small_integers(33, 65, dtype=dtype, device=device) for _ in range(2))
    want = rank1_precondition(grad, score, damping=0.5)
    assert torch.equal(rank1_precondition(layout(grad), score, damping=0.5), want)
    assert torch.equal(rank1_precondition(grad, layout(score), damping=0.5), want)


@dtypes
@pytest.mark.parametrize("which", ["grad", "score", "out"])
def test_elements_further_apart_than_int32_reaches(device, dtype, which, tmp_path):
    tensors = {name: small_integers(2, 9, dtype=dtype, device=device) for name in ("grad", "score")}
    want = rank1_precondition(**tensors, damping=0.5)
    tensors["out"] = torch.zeros_like(want)
    tensors[which] = far_apart(tensors[which], 0, tmp_path)
    assert torch.equal(rank1_precondition(**tensors, damping=0.5), want)


@pytest.mark.parametrize("n", ODD_SIZES)
def test_nothing_is_written_around_an_output_of_odd_size(device, n):
    grad, score = torch.randn(n, device=device), torch.randn(n, device=device)
    out, check = guarded(torch.full_like(grad, math.nan))
    rank1_precondition(grad, score, damping=0.1, out=out)
    assert torch.equal(out, rank1_precondition(grad, score, damping=0.1))
    check()


def test_expanded_input(device):
    grad = small_integers(1, device=device).expand(65)
    score = small_integers(65, device=device)
    want = rank1_precondition(grad.clone(), score, damping=0.5)
    assert torch.equal(rank1_precondition(grad, score, damping=0.5), want)
    assert torch.equal(
        rank1_precondition(score, grad, damping=0.5),
        rank1_precondition(score, grad.clone(), damping=0.5),
    )


@dtypes
@pytest.mark.parametrize("contiguous", [True, False])
def test_out_is_written_and_nothing_around_it(device, dtype, contiguous):
    grad, score = torch.randn(9, 17).to(device, dtype), torch.randn(9, 17).to(device, dtype)
    out, check = guarded(torch.full_like(grad, math.nan), contiguous=contiguous)
    assert rank1_precondition(grad, score, damping=0.1, out=out) is out
    assert torch.equal(out, rank1_precondition(grad, score, damping=0.1))
    check()


# ---- faults ----


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", ["grad", "score"])
def test_nonfinite_input_gives_nonfinite_output(device, which, value):
    tensors = {"grad": torch.ones(65, device=device), "score": torch.ones(65, device=device)}
    tensors[which][7] = value
    assert not rank1_precondition(**tensors, damping=0.1).isfinite().all()


def test_zero_everything(device):
    zero = torch.zeros(9, device=device)
    assert torch.equal(rank1_precondition(zero, zero.clone(), damping=1e-12), zero)


# ---- errors ----

G, U = torch.ones(4), torch.ones(4)
BIG = torch.zeros(64)
ERRORS = {
    "grad_no_tensor": (
        TypeError, "grad must be a tensor or a list of tensors, got int", {"grad": 1},
    ),
    "score_no_tensor": (
        TypeError, "score must be a tensor or a list of tensors, got NoneType", {"score": None},
    ),
    "list_item_no_tensor": (
        TypeError,
        "score must be a tensor or a list of tensors, got a list with int",
        {"grad": [G], "score": [1]},
    ),
    "lengths": (
        ValueError,
        "the lists must have the same length, got grad: 2, score: 1",
        {"grad": [G, G], "score": [U]},
    ),
    "out_length": (
        ValueError,
        "the lists must have the same length, got grad: 1, score: 1, out: 0",
        {"grad": [G], "score": [U], "out": []},
    ),
    "damping_zero": (ValueError, "damping must be finite and in (0.0, inf), got 0.0", {"damping": 0.0}),
    "damping_negative": (ValueError, "damping must be finite and in (0.0, inf), got -1", {"damping": -1}),
    "damping_nan": (ValueError, "damping must be finite and in (0.0, inf), got nan", {"damping": math.nan}),
    "damping_infinite": (
        ValueError, "damping must be finite and in (0.0, inf), got inf", {"damping": math.inf},
    ),
    "damping_text": (TypeError, "damping must be a number, got str", {"damping": "1"}),
    "damping_bool": (TypeError, "damping must be a number, got bool", {"damping": True}),
    "damping_vector": (
        ValueError, "damping must be a number or a 0-d tensor, got [1]", {"damping": torch.ones(1)},
    ),
    "damping_integer_tensor": (
        TypeError,
        "damping must have dtype float32, bfloat16, float16, float64, got int64",
        {"damping": torch.tensor(1)},
    ),
    "damping_device": (
        ValueError,
        "all tensors must be on one device, got grad on cpu and damping on meta",
        {"damping": torch.tensor(1.0, device="meta")},
    ),
    "score_dtype": (
        TypeError, "score must have dtype float32, got float64", {"score": U.double()},
    ),
    "score_shape": (
        ValueError, "score must have shape [4] (as grad), got [2, 2]", {"score": U.view(2, 2)},
    ),
    "item_is_named": (
        ValueError,
        "score[1] must have shape [4] (as grad), got [3]",
        {"grad": [G, G], "score": [U, U[:3]]},
    ),
    "devices": (
        ValueError,
        "all tensors must be on one device, got grad on cpu and score on meta",
        {"score": U.to("meta")},
    ),
    "out_dtype": (
        TypeError, "out must have dtype float32, got bfloat16", {"out": torch.empty(4).bfloat16()},
    ),
    "out_shape": (
        ValueError, "out must have shape [4] (as grad), got [5]", {"out": torch.empty(5)},
    ),
    "out_expanded": (
        ValueError,
        "out is written in place and must not overlap itself, got strides [0] for shape [4]",
        {"out": torch.empty(1).expand(4)},
    ),
    "out_is_grad": (
        ValueError, "overlap in memory, and one is written", {"grad": BIG[:4], "out": BIG[:4]},
    ),
    "out_overlaps_score": (
        ValueError, "overlap in memory, and one is written", {"score": BIG[:4], "out": BIG[3:7]},
    ),
    "same_out_twice": (
        ValueError,
        "out[1] and out[0] overlap in memory, and one is written",
        {"grad": [G, G], "score": [U, U], "out": [BIG[:4], BIG[:4]]},
    ),
}  # fmt: skip


def call(**changes):
    arguments = {"grad": G, "score": U, "damping": 0.1} | changes
    return rank1_precondition(**arguments)


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong(case):
    exception, text, changes = ERRORS[case]
    assert_raises(exception, text, call, **changes)
    with pytest.raises(exception, match=r"^rank1_precondition: "):
        call(**changes)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
def test_refused_dtypes_and_layouts(kind):
    with pytest.raises(
        TypeError, match=r"grad must (have dtype float32, bfloat16, float16, float64|be a dense)"
    ):
        call(grad=refused(kind, 4))
