# SPDX-License-Identifier: Apache-2.0
"""``precondition`` on gradients with one small side, with a bias column, and with inner products."""

import math

import pytest
import torch

import grng_kernels as gk
from grng_kernels import precondition
from tests.cases import (
    MATRIX_LAYOUTS,
    assert_within_budget,
    dtype_id,
    far_apart,
    guarded,
    offset_by_one,
    small_integers,
    threads,
)
from tests.ops.errors import assert_raises

# Both orientations; one column tile and two; vectors and what is left of them; several blocks of rows, and
# sides longer than one part.
SHAPES = [(1, 1), (1, 7), (3, 16), (8, 48), (8, 65), (16, 129), (16, 1000), (5, 17), (16, 16)]
SHAPES = list(dict.fromkeys(SHAPES + [(n, m) for m, n in SHAPES]))
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id
)
biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


def case(m, n, backend, dtype=torch.float32, bias=False):
    """Integer arguments ``(grad, left, right, bias_grad)``: every product and sum is exact in fp32."""
    grad, left, right = (
        small_integers(*shape, dtype=kind, device=backend.device)
        for shape, kind in (((m, n - bias), dtype), ((m, m), None), ((n, n), None))
        for kind in [kind or torch.float32]
    )
    return (
        grad,
        left,
        right,
        small_integers(m, dtype=dtype, device=backend.device) if bias else None,
    )


def joint(grad, bias):
    grad = grad.double().cpu()
    return grad if bias is None else torch.cat([grad, bias.double().cpu()[:, None]], dim=1)


def plain(grad, left, right, bias=None):
    return left.double().cpu() @ joint(grad, bias) @ right.double().cpu()


@DTYPES
@biases
@pytest.mark.parametrize(("m", "n"), SHAPES, ids=str)
def test_small_integers_are_exact(backend, m, n, dtype, bias):
    grad, left, right, column = case(m, n, backend, dtype, bias)
    got, dot = precondition(grad, left, right, bias_grad=column, return_dot=True)
    want = plain(grad, left, right, column)
    assert got.shape == (m, n)
    assert torch.equal(got.double().cpu(), want)
    assert dot.shape == ()
    torch.testing.assert_close(
        dot.double().cpu(), (want * joint(grad, column)).sum(), rtol=1e-6, atol=1e-3
    )


@pytest.mark.parametrize(("m", "n"), [(16, 300), (300, 16), (8, 768), (768, 8)], ids=str)
@biases
def test_error_is_at_most_twice_that_of_torch(backend, m, n, bias):
    def normal(*shape):
        return torch.randn(shape).to(backend.device)

    grad, left, right = normal(m, n - bias), normal(m, m), normal(n, n)
    column = normal(m) if bias else None
    base = left @ (grad if column is None else torch.cat([grad, column[:, None]], 1)) @ right
    got = precondition(grad, left, right, bias_grad=column)
    assert_within_budget(got, plain(grad, left, right, column), base)


@biases
def test_a_list_of_all_kinds_gives_what_its_items_give(bias):
    """Narrow, square and fp64 items, with and without a bias, some of them sharing an inverse."""
    cpu = type("Device", (), {"device": "cpu"})
    items = [case(m, n, cpu, bias=bias) for m, n in ((8, 65), (40, 33), (8, 65), (65, 8), (3, 65))]
    items[1] = (*items[1][:3], None) if not bias else items[1]
    shared = items[0][2]
    items[2] = (items[2][0], items[2][1], shared, items[2][3])
    items[4] = (items[4][0], items[4][1], shared, items[4][3])
    items.append(tuple(t if t is None else t.double() for t in case(6, 9, cpu, bias=bias)))
    grads, lefts, rights, columns = (list(c) for c in zip(*items, strict=True))
    got, dots = precondition(grads, lefts, rights, bias_grad=columns, return_dot=True)
    assert dots.dtype == torch.float64
    for i, (grad, left, right, column) in enumerate(items):
        one, dot = precondition(grad, left, right, bias_grad=column, return_dot=True)
        assert torch.equal(got[i], one)
        torch.testing.assert_close(dots[i], dot.double(), rtol=1e-6, atol=0)
        assert torch.equal(one.double(), plain(grad, left, right, column))


def test_more_gradients_on_one_inverse_than_one_reading_serves():
    right, items = small_integers(70, 70), []
    for _ in range(9):
        items.append((small_integers(16, 70), small_integers(16, 16)))
    got = precondition([g for g, _ in items], [lo for _, lo in items], [right] * 9)
    for result, (grad, left) in zip(got, items, strict=True):
        assert torch.equal(result.double(), plain(grad, left, right))


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 65), (65, 8)], ids=str)
def test_any_layout_of_the_gradient(backend, shape, layout):
    grad, left, right, _ = case(*shape, backend)
    got = precondition(MATRIX_LAYOUTS[layout](grad), left, right)
    assert torch.equal(got, precondition(grad, left, right))


@pytest.mark.parametrize("layout", ["sliced", "offset_by_one", "expanded"])
@pytest.mark.parametrize("shape", [(8, 65), (65, 8)], ids=str)
def test_any_layout_of_the_bias(backend, shape, layout):
    grad, left, right, bias = case(*shape, backend, bias=True)
    if layout == "sliced":
        view = torch.stack([bias, torch.full_like(bias, math.nan)], dim=1)[:, 0]
    elif layout == "offset_by_one":
        view = offset_by_one(bias)
    else:
        view = bias[:1].expand(bias.shape)
    got = precondition(grad, left, right, bias_grad=view)
    assert torch.equal(got.double().cpu(), plain(grad, left, right, view))


@pytest.mark.parametrize("which", ["grad-rows", "grad-columns", "left", "right"])
@pytest.mark.parametrize("shape", [(8, 65), (65, 8)], ids=str)
def test_expanded_arguments(backend, shape, which):
    """An inverse with one row, repeated, is read by its row stride like any other."""
    grad, left, right, _ = case(*shape, backend)
    if which == "grad-rows":
        grad = grad[:1].expand(shape)
    elif which == "grad-columns":
        grad = grad[:, :1].expand(shape)
    elif which == "left":
        left = left[:1].expand(left.shape)
    else:
        right = right[:1].expand(right.shape)
    assert torch.equal(precondition(grad, left, right).double().cpu(), plain(grad, left, right))


@pytest.mark.parametrize("shape", [(8, 65), (65, 8), (16, 16)], ids=str)
def test_unaligned_pointers_after_an_aligned_call(backend, shape):
    arguments = case(*shape, backend)[:3]
    want = precondition(*arguments)
    out = offset_by_one(torch.zeros(shape, device=backend.device))
    precondition(*(offset_by_one(a) for a in arguments), out=out)
    assert torch.equal(out, want)


@pytest.mark.parametrize("which", ["grad", "left", "right", "bias", "out"])
@pytest.mark.parametrize("shape", [(2, 65), (65, 2)], ids=str)
def test_elements_further_apart_than_int32_reaches(backend, shape, which, tmp_path):
    grad, left, right, bias = case(*shape, backend, bias=which == "bias")
    if which == "bias":
        bias = bias[-2:] if shape[0] == 65 else bias
        grad, left = grad[-2:], left[-2:, -2:]
    elif which in ("left", "right"):
        # Two rows, of which the second lies far away; the other side is the large one or a small one.
        n = 65 if which == "left" else 2
        grad, left, right = (
            small_integers(a, b, device=backend.device)
            for a, b in ((2, n), (2, 2), (n, n))
        )  # fmt: skip
    tensors = {"grad": grad, "left": left, "right": right, "bias": bias}
    tensors["out"] = torch.zeros(len(left), len(right), device=backend.device)
    want = plain(grad, left, right, bias)
    dim = tensors[which].shape.index(2)
    tensors[which] = far_apart(tensors[which], dim, tmp_path)
    got = precondition(
        tensors["grad"],
        tensors["left"],
        tensors["right"],
        bias_grad=tensors["bias"],
        out=tensors["out"],
    )
    assert torch.equal(got.double().cpu(), want)


@pytest.mark.parametrize("sharing", [False, True], ids=["", "one inverse"])
def test_more_items_than_a_side_of_a_grid(sharing):
    count = 66_000
    grads, lefts = small_integers(count, 1, 2), small_integers(count, 1, 1)
    rights = small_integers(1 if sharing else count, 2, 2)
    want = lefts * grads @ rights
    rights = [rights[0]] * count if sharing else list(rights.unbind())
    got = precondition(list(grads.unbind()), list(lefts.unbind()), rights)
    assert torch.equal(torch.stack(got), want)


@pytest.mark.parametrize("contiguous", [True, False], ids=["", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_around_the_output_is_written(backend, shape, contiguous):
    grad, left, right, _ = case(*shape, backend)
    out, check = guarded(torch.zeros(shape, device=backend.device), contiguous=contiguous)
    assert precondition(grad, left, right, out=out) is out
    check()
    assert torch.equal(out.double().cpu(), plain(grad, left, right))


@pytest.mark.parametrize("shape", [(8, 1000), (1000, 8)], ids=str)
def test_same_bits_on_any_number_of_threads(shape):
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    m, n = shape
    arguments = torch.randn(m, n), torch.randn(m, m), torch.randn(n, n)
    results = []
    for count in (1, 2, 3, 7):
        with threads(count), gk.use_backend("cpu"):
            results.append(precondition(*arguments, return_dot=True))
    for got, dot in results[1:]:
        assert torch.equal(got, results[0][0])
        assert torch.equal(dot, results[0][1])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_gradients(backend, shape):
    m, n = shape
    got, dot = precondition(
        torch.zeros(shape, device=backend.device),
        torch.zeros(m, m, device=backend.device),
        torch.zeros(n, n, device=backend.device),
        return_dot=True,
    )
    assert got.shape == shape
    assert dot.item() == 0


def test_no_rows_and_a_bias(backend):
    empty, right = torch.zeros(0, 3, device=backend.device), torch.eye(4, device=backend.device)
    got = precondition(
        empty, empty.new_zeros(0, 0), right, bias_grad=empty.new_zeros(0), return_dot=True
    )
    assert got[0].shape == (0, 4)
    assert got[1].item() == 0


def test_the_default_device_does_not_matter():
    arguments = case(4, 30, type("Device", (), {"device": "cpu"}))[:3]
    with torch.device("meta"):
        got = precondition(*arguments)
    assert torch.equal(got.double(), plain(*arguments))


@pytest.mark.parametrize("place", ["grad", "left", "right", "bias"])
@pytest.mark.parametrize("shape", [(8, 65), (65, 8)], ids=str)
def test_nan_is_seen_in_the_result(backend, shape, place):
    arguments = dict(
        zip(("grad", "left", "right", "bias"), case(*shape, backend, bias=True), strict=True)
    )
    arguments[place].view(-1)[0] = math.nan
    got, dot = precondition(
        arguments["grad"],
        arguments["left"],
        arguments["right"],
        bias_grad=arguments["bias"],
        return_dot=True,
    )
    assert got.isnan().any()
    assert dot.isnan()


def test_requires_grad_gives_no_gradient():
    grad = torch.randn(4, 30, requires_grad=True)
    out = precondition(grad, torch.eye(4), torch.eye(30))
    assert not out.requires_grad


# ---- errors ----

G, L, R = torch.zeros(4, 6), torch.zeros(4, 4), torch.zeros(7, 7)


@pytest.mark.parametrize(
    ("kind", "text", "change"),
    [
        (
            ValueError,
            "bias_grad must have shape [4] (grad is [m, n]), got [5]",
            dict(bias_grad=torch.zeros(5)),
        ),
        (
            TypeError,
            "bias_grad must have dtype float32, got float64",
            dict(bias_grad=torch.zeros(4).double()),
        ),
        (
            TypeError,
            "bias_grad must be a tensor for a tensor and a list for a list, got list",
            dict(bias_grad=[None]),
        ),
        (
            ValueError,
            "right must have shape [7, 7] (grad is [m, n], and bias_grad one more column), got [6, 6]",
            dict(right=torch.zeros(6, 6)),
        ),
        (
            ValueError,
            "out must have shape [4, 7] (as grad, and one more column), got [4, 6]",
            dict(out=torch.zeros(4, 6)),
        ),
    ],
    ids=["shape", "dtype", "form", "right", "out"],
)
def test_error_names_the_argument(kind, text, change):
    arguments = dict(grad=G, left=L, right=R, bias_grad=torch.zeros(4)) | change
    assert_raises(
        kind,
        text,
        lambda: precondition(
            arguments.pop("grad"), arguments.pop("left"), arguments.pop("right"), **arguments
        ),
    )


def test_a_list_of_biases_must_be_as_long():
    assert_raises(
        ValueError,
        "got grad: 1, bias_grad: 2",
        lambda: precondition([G], [L], [R], bias_grad=[None, None]),
    )


def test_out_that_overlaps_the_bias_is_refused():
    memory = torch.zeros(100)
    with pytest.raises(ValueError, match="overlap in memory"):
        precondition(G, L, R, bias_grad=memory[10:14], out=memory[:28].view(4, 7))


def test_a_named_backend_says_what_it_cannot_do():
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    with gk.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="it serves gradients with a side of at most 16"):
            precondition(torch.zeros(17, 17), torch.eye(17), torch.eye(17))
        with pytest.raises(RuntimeError, match="it needs inverses whose rows are contiguous"):
            precondition(torch.zeros(3, 17), torch.eye(3), torch.eye(17).mT)
        with pytest.raises(RuntimeError, match="it has no fp64 products"):
            precondition(torch.zeros(3, 3).double(), torch.eye(3), torch.eye(3))
