# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``precondition`` in Triton's interpreter, on CPU tensors."""

import math

import pytest
import torch

import grng_kernels as gk
from grng_kernels import _table, precondition
from grng_kernels.precondition import reference, triton_kernel
from grng_kernels.precondition.triton_kernel import SKINNY, launch, split_length, supports
from tests.cases import (
    MATRIX_LAYOUTS,
    assert_within_budget,
    dtype_id,
    guarded,
    offset_by_one,
    small_integers,
    spd,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
RANKS = (1, 4, 8, 16, 17, 64)
KERNELS = ("_partial_kernel", "_finish_kernel", "_dots_kernel")


@pytest.fixture(autouse=True)
def backend():
    with gk.use_backend("triton"):
        yield


class Counted:
    """A kernel that writes down its launches: ``(name, programs)``."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls
        self.kernel = getattr(triton_kernel, name)

    def __getitem__(self, grid):
        # The other dimensions of a grid end at 65,535 programs.
        assert len(grid) == 1
        self.calls.append((self.name, grid[0]))
        return self.kernel[grid]


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Every launch of a test, so that none passes on a fallback."""
    calls = []
    for name in KERNELS:
        monkeypatch.setattr(triton_kernel, name, Counted(name, calls))
    return calls


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Tables of this test alone: one of another test may hold other constants for the same addresses."""
    _table.clear()


@pytest.fixture
def short_splits(monkeypatch):
    """Many splits of few terms, so that small sizes have several."""
    monkeypatch.setattr(triton_kernel, "MIN_SPLIT", 32)
    monkeypatch.setattr(triton_kernel, "MAX_SPLIT", 32)


@pytest.fixture
def no_reference(monkeypatch):
    """Make a fallback to the reference an error."""
    monkeypatch.setattr(reference, "precondition_into", None)


def integers(m, n, dtype=torch.float32, bias=False):
    """Arguments of ``launch`` for one item, without the output, whose products are exact in fp32."""
    return (
        small_integers(m, n - bias, dtype=dtype),
        small_integers(m, m),
        small_integers(n, n),
        small_integers(m, dtype=dtype) if bias else None,
    )


def whole(grad, bias):
    """The gradient with the bias as its last column, in fp64."""
    columns = [grad] if bias is None else [grad, bias[:, None]]
    return torch.cat([c.double() for c in columns], dim=1)


def expected(grad, left, right, bias=None):
    return (left.double() @ whole(grad, bias) @ right.double()).float()


def fresh(items):
    return [torch.full((len(left), len(right)), math.nan) for _, left, right, _ in items]


def run(items, outs=None, *, dots=False):
    """Launch a list of items; return the outputs, and the inner products where they are wanted."""
    outs = fresh(items) if outs is None else outs
    sums = torch.full((len(items),), math.nan) if dots else None
    launch(outs, *(list(column) for column in zip(*items, strict=True)), sums)
    return (outs, sums) if dots else outs


# ---- exact ----


@pytest.mark.parametrize(("r", "d"), [(r, 65) for r in RANKS] + [(16, 129), (17, 129)], ids=str)
def test_small_integers_are_exact(no_reference, launches, r, d):
    for m, n in ((r, d), (d, r)):
        grad, left, right, _ = integers(m, n)
        assert torch.equal(precondition(grad, left, right), expected(grad, left, right))
    assert [name for name, _ in launches] == ["_partial_kernel", "_finish_kernel"] * 2


@dtypes
@biases
@pytest.mark.parametrize(
    ("m", "n"), [(16, 68), (68, 16), (5, 65), (65, 5), (20, 64), (72, 20), (1, 1), (2, 2)], ids=str
)
def test_dtypes_bias_and_inner_products(dtype, bias, m, n):
    """Sizes divisible by 4 take the kernel for aligned items, unless there is a bias."""
    item = integers(m, n, dtype, bias)
    [out], dots = run([item], dots=True)
    want = expected(*item)
    assert torch.equal(out, want)
    assert dots.item() == (want.double() * whole(item[0], item[3])).sum().item()


@pytest.mark.parametrize(("m", "n"), [(16, 16), (64, 64), (17, 17), (68, 68), (70, 100)], ids=str)
def test_both_sides_small(m, n):
    item = integers(m, n)
    [out] = run([item])
    assert torch.equal(out, expected(*item))


@biases
@pytest.mark.parametrize(("r", "d"), [(3, 65), (16, 68), (65, 66), (4, 161)], ids=str)
def test_split_sums_are_exact(short_splits, r, d, bias):
    """The last split is shorter than the others; in the last case they are not all read at once."""
    assert -(-d // split_length(d)) == -(-d // 32)
    for m, n in ((r, d), (d, r)):
        item = integers(m, n, bias=bias)
        [out], dots = run([item], dots=True)
        want = expected(*item)
        assert torch.equal(out, want)
        assert dots.item() == (want.double() * whole(item[0], item[3])).sum().item()


def test_splits_of_the_usual_length_are_exact():
    d = triton_kernel.MIN_SPLIT + 4
    assert -(-d // split_length(d)) == 2
    item = integers(4, d)
    assert torch.equal(run([item])[0], expected(*item))


def test_more_splits_are_tested_than_are_read_at_once():
    assert triton_kernel.SPLITS_AT_ONCE < 161 // 32


def test_the_sides_are_not_mixed_up():
    """Neither inverse is symmetric, and the two are of the same order."""
    for n in (5, 40):
        item = integers(n, n)
        assert not torch.equal(item[1], item[1].mT)
        assert torch.equal(run([item])[0], expected(*item))


# ---- accuracy ----


@dtypes
@pytest.mark.parametrize(("m", "n"), [(8, 129), (129, 8), (20, 65), (65, 20)], ids=str)
def test_error_is_at_most_twice_that_of_torch(dtype, m, n):
    grad, left, right = torch.randn(m, n).to(dtype), spd(m), spd(n)
    [out], dots = run([(grad, left, right, None)], dots=True)
    base = left @ grad.float() @ right
    ref = left.double() @ grad.double() @ right.double()
    assert_within_budget(out, ref, base)
    assert_within_budget(dots[0], (ref * grad.double()).sum(), (base * grad.float()).sum())


# ---- lists ----

# Tiles of both sizes, one item twice, and nothing that costs the interpreter much.
MIXED = [
    ((4, 65), torch.float32, False), ((65, 4), torch.float32, False), ((16, 72), torch.float32, False),
    ((72, 16), torch.bfloat16, False), ((0, 5), torch.float32, False), ((40, 33), torch.float16, True),
    ((5, 0), torch.float32, False), ((1, 1), torch.float32, False), ((17, 70), torch.float32, True),
    ((70, 17), torch.float32, True), ((16, 72), torch.float32, False), ((68, 32), torch.float32, False),
]  # fmt: skip


def mixed(values=integers):
    return [values(*shape, dtype, bias) for shape, dtype, bias in MIXED]


def normal(m, n, dtype, bias):
    grad = torch.randn(m, n - bias).to(dtype)
    return grad, spd(m), spd(n), torch.randn(m).to(dtype) if bias else None


def test_mixed_list_is_exact():
    items = mixed()
    outs, dots = run(items, dots=True)
    for out, dot, item in zip(outs, dots, items, strict=True):
        want = expected(*item)
        assert torch.equal(out, want)
        assert dot.item() == (want.double() * whole(item[0], item[3])).sum().item()


def test_list_is_bitwise_one_by_one_and_bitwise_the_same_again(short_splits):
    items = mixed(normal)
    outs, dots = run(items, dots=True)
    again, dots_again = run(items, dots=True)
    assert torch.equal(dots, dots_again)
    for i, item in enumerate(items):
        assert torch.equal(outs[i], again[i])
        [alone], dot = run([item], dots=True)
        assert torch.equal(outs[i], alone)
        assert torch.equal(dots[i], dot[0])


@pytest.mark.parametrize("layers", [1, 6])
def test_number_of_launches_does_not_depend_on_the_number_of_layers(launches, layers):
    items = [integers(*shape) for shape in ((8, 36), (36, 8))] * layers
    outs, _ = run(items, dots=True)
    assert [name for name, _ in launches] == list(KERNELS)
    assert all(torch.equal(o, expected(*i)) for o, i in zip(outs, items, strict=True))


def test_programs_are_those_of_the_tiles(launches):
    """Every tile and split once, and no program beyond: counted by hand."""
    run([integers(16, 260), integers(36, 16), integers(16, 64)], dots=True)
    # Tiles of 64 columns; 260 terms are two splits; a tile is finished in two pieces.
    tiles = 5 + 1 + 1
    assert launches == [
        ("_partial_kernel", tiles + 5),
        ("_finish_kernel", 2 * tiles),
        ("_dots_kernel", 3),
    ]


def test_long_list_of_tiny_items(launches):
    items = [integers(1 + i % 3, 1 + i % 5) for i in range(24)]
    outs, dots = run(items, dots=True)
    for out, dot, item in zip(outs, dots, items, strict=True):
        want = expected(*item)
        assert torch.equal(out, want)
        assert dot.item() == (want.double() * item[0].double()).sum().item()
    # The aligned ones, those that are not, and the inner products.
    assert len(launches) <= 5


def test_zero_size_items_alone(launches):
    _, dots = run([integers(0, 5), integers(5, 0), integers(0, 0)], dots=True)
    assert dots.tolist() == [0, 0, 0]
    assert launches == [("_dots_kernel", 3)]
    launch([], [], [], [], [], None)
    assert len(launches) == 1


def test_a_non_finite_item_leaves_the_others():
    items = [integers(4, 65) for _ in range(3)]
    items[1][2][64, 64] = math.inf
    items[1][0][:, 64] = 1
    outs, dots = run(items, dots=True)
    assert not outs[1][:, 64].isfinite().any()
    assert not dots[1].isfinite()
    for i in (0, 2):
        assert torch.equal(outs[i], expected(*items[i]))
        assert dots[i].isfinite()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad", "left", "right"])
@pytest.mark.parametrize(("m", "n"), [(4, 65), (65, 4)], ids=str)
def test_non_finite_input_gives_non_finite_output(which, m, n):
    item = [abs(t) + 1 if t is not None else t for t in integers(m, n)]
    item[which][1, 2] = math.nan
    [out], dots = run([item], dots=True)
    assert not out.isfinite().all()
    assert dots.isnan().all()


# ---- layouts ----


@pytest.mark.parametrize(
    ("m", "n", "bias"), [(8, 68, False), (68, 8, False), (5, 33, True), (33, 5, True)], ids=str
)
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad", "left", "right"])
def test_layout_does_not_matter(which, layout, m, n, bias):
    """The memory between the elements is NaN: reading it would show."""
    item = list(integers(m, n, bias=bias))
    want = expected(*item)
    item[which] = MATRIX_LAYOUTS[layout](item[which])
    if bias:
        item[3] = torch.stack([item[3], torch.full_like(item[3], math.nan)], dim=1)[:, 0]
    [out] = run([item])
    assert torch.equal(out, want)


def test_expanded_gradient():
    _, left, right, _ = integers(8, 68)
    grad = small_integers(1, 68).expand(8, 68)
    assert torch.equal(run([(grad, left, right, None)])[0], expected(grad, left, right))


def test_unaligned_item_after_an_aligned_one_of_the_same_shape():
    item = integers(8, 64)
    other = [None if t is None else offset_by_one(t) for t in item]
    assert torch.equal(run([item])[0], expected(*item))
    assert torch.equal(run([other])[0], expected(*item))


@pytest.mark.parametrize(
    ("change", "aligned"),
    [
        (lambda g, a, b: (g, a, b), True),
        (lambda g, a, b: (offset_by_one(g), a, b), False),
        (lambda g, a, b: (g, a, offset_by_one(b)), False),
        (lambda g, a, b: (g, a, b.mT), False),
        (lambda g, a, b: (g, a, MATRIX_LAYOUTS["columns_sliced"](b)), False),
        (lambda g, a, b: (g.mT.contiguous().mT, a, b), False),
        # The small inverse is read once: its layout decides nothing.
        (lambda g, a, b: (g, offset_by_one(a), b), True),
    ],
)
def test_variant_is_aligned_only_if_all_that_matters_is(change, aligned):
    grad, left, right = change(torch.ones(8, 64), torch.eye(8), torch.eye(64))
    variant = triton_kernel.variant_of(torch.empty(8, 64), grad, left, right, False)
    assert variant.aligned is aligned


@pytest.mark.parametrize(("m", "n"), [(4, 65), (8, 68), (65, 4), (33, 40)], ids=str)
def test_memory_around_the_output_is_not_written(m, n):
    item = integers(m, n)
    outs, checks = [], []
    for contiguous in (True, False):
        out, check = guarded(torch.full((m, n), math.nan), contiguous=contiguous)
        outs.append(out)
        checks.append(check)
    outs.append(torch.full((n, m), math.nan).mT)
    run([item] * 3, outs)
    dots, check_dots = guarded(torch.full((3,), math.nan))
    launch(outs, *(list(c) for c in zip(*[item] * 3, strict=True)), dots)
    for out in outs:
        assert torch.equal(out, expected(*item))
    for check in (*checks, check_dots):
        check()


def test_strided_inner_products():
    items = [integers(4, 9), integers(9, 4)]
    wide = torch.full((4,), math.nan)
    launch(fresh(items), *(list(c) for c in zip(*items, strict=True)), wide[::2])
    assert torch.equal(wide[::2], run(items, dots=True)[1])
    assert wide[1::2].isnan().all()


# ---- table ----


def test_table_is_built_once_for_the_same_tensors(monkeypatch):
    builds, build = [], triton_kernel._build
    monkeypatch.setattr(triton_kernel, "_build", lambda *a: builds.append(1) or build(*a))
    items = [integers(4, 9)]
    outs = fresh(items)
    for scale in (1, 2):
        items[0][0].mul_(scale)
        run(items, outs)
        assert torch.equal(outs[0], expected(*items[0]))
    assert len(builds) == 1
    run(items, [torch.empty(9, 4).mT])
    assert len(builds) == 2


# ---- the public function ----


def test_wide_weights_go_to_the_library(launches):
    shapes = ((4, 200), (SKINNY + 1, SKINNY + 1), (200, 4))
    items = [integers(*shape) for shape in shapes]
    got = precondition(*(list(c) for c in list(zip(*items, strict=True))[:3]))
    for result, item in zip(got, items, strict=True):
        assert torch.equal(result, expected(*item))
    assert [name for name, _ in launches] == ["_partial_kernel", "_finish_kernel"]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad", "left", "right"])
def test_fp64_is_refused_by_name(launches, which):
    arguments = list(integers(4, 9)[:3])
    arguments[which] = arguments[which].double()
    out = torch.full((4, 9), math.nan, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="it has no fp64 products"):
        precondition(*arguments, out=out)
    assert out.isnan().all()
    assert launches == []


def test_skinny_is_the_smaller_side():
    assert supports(SKINNY, 10**6)
    assert supports(10**6, 1)
    assert not supports(SKINNY + 1, SKINNY + 1)


@pytest.mark.parametrize("d", [1, 256, 257, 768, 1024, 1025, 4096, 11008, 10**6])
def test_splits_are_whole_blocks_and_bounded(d):
    length = split_length(d)
    assert triton_kernel.MIN_SPLIT <= length <= triton_kernel.MAX_SPLIT
    for configs in (triton_kernel.CONFIGS_ALIGNED, triton_kernel.CONFIGS_ANY):
        assert all(length % config.block_k == 0 for config in configs.values())
