# SPDX-License-Identifier: Apache-2.0
"""Many factors in one call of the Triton kernel: nothing of one may reach another."""

import itertools
import math

import pytest
import torch

from grng_kernels import Info, _table
from grng_kernels.kron_factor import triton_kernel
from grng_kernels.kron_factor.triton_kernel import launch
from tests.cases import MATRIX_LAYOUTS, guarded, small_integers, spd

# (rows, columns): one and several tiles of every size, less than a block of rows and several splits.
SHAPES = ((9, 3), (70, 17), (5, 40), (40, 70), (12, 130), (1200, 5))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


@pytest.fixture(autouse=True)
def empty_tables():
    _table.clear()
    yield
    _table.clear()


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    names = []
    for name in ("_products_kernel", "_commit_kernel"):
        kernel = getattr(triton_kernel, name)

        class Counted:
            def __getitem__(self, grid, kernel=kernel, name=name):
                # The other dimensions of a grid end at 65,535 programs.
                assert len(grid) == 1
                names.append(name)
                return kernel[grid]

        monkeypatch.setattr(triton_kernel, name, Counted())
    return names


def run(factors, xs, *, decay=0.5, scales=None, bias=False):
    info = torch.zeros(len(xs), dtype=torch.int32)
    launch(factors, xs, info, decay=decay, scales=scales or [0.25] * len(xs), bias=bias)
    return info.tolist()


def random_case(bias, dtypes=DTYPES):
    xs = [
        torch.randn(rows, width).to(dtype)
        for (rows, width), dtype in zip(SHAPES, itertools.cycle(dtypes))
    ]
    return [spd(x.shape[1] + bias) for x in xs], xs


def integer_case(bias, scale=0.25):
    xs = [
        small_integers(rows, width, dtype=dtype)
        for (rows, width), dtype in zip(SHAPES, itertools.cycle(DTYPES))
    ]
    factors, wants = [], []
    for x in xs:
        half = small_integers(x.shape[1] + bias, x.shape[1] + bias)
        factors.append(4 * (half + half.mT))
        wide = torch.cat([x.double(), x.new_ones(len(x), bias).double()], dim=1)
        wants.append((0.5 * factors[-1].double() + scale * wide.mT @ wide).float())
    return factors, xs, wants


@biases
def test_mixed_sizes_and_types_are_exact(bias):
    factors, xs, wants = integer_case(bias)
    assert run(factors, xs, bias=bias) == [Info.OK] * len(xs)
    for factor, want in zip(factors, wants, strict=True):
        assert torch.equal(factor, want)


@biases
def test_grouped_equals_one_by_one_bitwise(bias):
    factors, xs = random_case(bias)
    alone = [f.clone() for f in factors]
    run(factors, xs, bias=bias)
    for together, factor, x in zip(factors, alone, xs, strict=True):
        run([factor], [x], bias=bias)
        assert torch.equal(together, factor)
        assert torch.equal(factor, factor.mT)


def test_order_of_the_layers_does_not_change_bits():
    factors, xs = random_case(False)
    other = [f.clone() for f in factors]
    run(factors, xs)
    order = torch.randperm(len(xs)).tolist()
    run([other[i] for i in order], [xs[i] for i in order])
    for a, b in zip(factors, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", range(len(SHAPES)))
def test_a_faulty_layer_is_left_alone_and_the_others_are_not(bad):
    factors, xs, wants = integer_case(False)
    before = factors[bad].clone()
    # The last element: in the last split, block of rows and tile.
    xs[bad][-1, -1] = (math.nan, math.inf)[bad % 2]
    info = run(factors, xs)
    assert info == [Info.NONFINITE_INPUT if i == bad else Info.OK for i in range(len(xs))]
    for i, factor in enumerate(factors):
        assert torch.equal(factor, before if i == bad else wants[i])


def test_layers_without_rows_or_columns_are_left_as_they_are():
    factors = [spd(3), spd(4), torch.empty(0, 0), spd(5)]
    before = [f.clone() for f in factors]
    xs = [torch.empty(0, 3), torch.ones(2, 4), torch.empty(7, 0), torch.empty(0, 5)]
    assert run(factors, xs) == [Info.OK] * 4
    for i in (0, 2, 3):
        assert torch.equal(factors[i], before[i])
    assert torch.equal(factors[1], 0.5 * before[1] + 0.25 * 2 * torch.ones(4, 4))
    assert run([], []) == []
    assert run(factors[:1], xs[:1]) == [Info.OK]


def test_a_bias_alone():
    """N = 1: x has rows but no columns, and the only element counts the rows."""
    factor = torch.full((1, 1), 8.0)
    assert run([factor, factor.clone()[:0, :0]], [torch.empty(6, 0), torch.empty(0, 0)], bias=True)
    assert factor.item() == 0.5 * 8 + 0.25 * 6


def test_scales_per_layer_as_numbers_or_tensors():
    values = [2.0**-i for i in range(4)]
    results = []
    for kind in ("numbers", "tensors", "mixed", "fp64 tensors"):
        torch.manual_seed(0)
        factors, xs, _ = (part[:4] for part in integer_case(True))
        scales = [
            torch.tensor(v, dtype=torch.float64 if kind == "fp64 tensors" else torch.float32)
            if kind != "numbers" and (kind != "mixed" or i % 2)
            else v
            for i, v in enumerate(values)
        ]
        before = [f.clone() for f in factors]
        run(factors, xs, scales=scales, bias=True, decay=torch.tensor(0.5))
        for factor, x, old, v in zip(factors, xs, before, values, strict=True):
            wide = torch.cat([x.double(), x.new_ones(len(x), 1).double()], dim=1)
            assert torch.equal(factor, (0.5 * old.double() + v * wide.mT @ wide).float())
        results.append(factors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_scale_that_is_not_finite_stops_its_layer_only():
    factors, xs, wants = integer_case(False)
    before = factors[1].clone()
    scales = [torch.tensor(math.nan) if i == 1 else 0.25 for i in range(len(xs))]
    info = run(factors, xs, scales=scales)
    assert info == [Info.NONFINITE_INPUT if i == 1 else Info.OK for i in range(len(xs))]
    assert torch.equal(factors[1], before)
    assert torch.equal(factors[0], wants[0])


@pytest.fixture
def built(monkeypatch):
    """One entry for every table that was written."""
    calls = []
    plan = triton_kernel.plan_batches
    monkeypatch.setattr(triton_kernel, "plan_batches", lambda *a: (calls.append(1), plan(*a))[1])
    return calls


def test_a_table_is_reused_for_the_same_tensors_only(built):
    factors, xs, wants = integer_case(False)
    # Memory that stays in use: no other tensor can come to lie there.
    start = [f.clone() for f in factors]
    run(factors, xs)
    for factor, old in zip(factors, start, strict=True):
        factor.copy_(old)
    run(factors, xs)
    assert len(built) == 1
    for factor, want in zip(factors, wants, strict=True):
        assert torch.equal(factor, want)
    # Another address of one x, then of one factor, then other strides at the same address.
    xs[2] = 2 * xs[2]
    run(factors, xs)
    assert len(built) == 2
    assert torch.equal(factors[2], 0.5 * wants[2] + 0.25 * (xs[2].float().mT @ xs[2].float()))
    other = start[2].clone()
    run([other], [xs[2]])
    square = small_integers(40, 40)
    run([other], [square])
    before = other.clone()
    run([other], [square.mT])
    assert len(built) == 5
    assert torch.equal(other, 0.5 * before + 0.25 * (square @ square.mT))


def test_decay_and_scale_do_not_make_a_new_table(built):
    factors, xs, _ = (part[:3] for part in integer_case(False))
    for decay, scale in ((0.5, 0.25), (0.25, 0.5), (torch.tensor(0.5), torch.tensor(1.0))):
        before = factors[0].clone()
        run(factors, xs, decay=decay, scales=[scale] * len(xs))
        assert torch.equal(factors[0], decay * before + scale * (xs[0].mT @ xs[0]))
    assert len(built) == 1


def test_old_tables_are_forgotten(monkeypatch):
    monkeypatch.setattr(_table, "CAPACITY", 3)
    xs = [small_integers(2, 3) for _ in range(5)]
    for x in xs:
        factor = torch.zeros(3, 3)
        run([factor], [x])
        assert torch.equal(factor, 0.25 * (x.mT @ x))
    assert len(_table._recent) == 3


def test_what_a_graph_reads_is_kept_and_what_it_fills_is_its_own(monkeypatch):
    """The rules of the cache alone: a capture needs a GPU (tests/ops/test_kron_factor_gpu.py)."""
    device, capturing = torch.device("cpu"), False
    monkeypatch.setattr(_table, "_capturing", lambda device: capturing)
    for name in ("_recorded", "_captured"):
        monkeypatch.setattr(_table, name, type(getattr(_table, name))())
    monkeypatch.setattr(_table, "CAPACITY", 2)

    def get(key):
        return _table.cached(key, device, object)

    eager = get("a")
    capturing = True
    assert get("a") is eager
    inside = get("b")
    assert get("b") is not inside, "another graph fills its own table, or none"
    capturing = False
    assert get("b") is not inside, "filled by a replay only"
    for key in "cdefg":
        get(key)
    _table.clear()
    assert get("a") is eager, "a graph reads it"
    assert inside in _table._captured


def test_more_layers_than_a_program_looks_through_at_once(monkeypatch):
    """The search goes through several chunks; the last is not full."""
    monkeypatch.setattr(triton_kernel, "CHUNK", 4)
    xs = [small_integers(1 + i % 3, 1 + i % 2) for i in range(11)]
    factors = [torch.zeros(x.shape[1], x.shape[1]) for x in xs]
    run(factors, xs)
    for factor, x in zip(factors, xs, strict=True):
        assert torch.equal(factor, 0.25 * (x.mT @ x))


def test_the_number_of_launches_does_not_depend_on_the_number_of_layers(launches):
    x = small_integers(4, 8)
    for count in (1, 9):
        launches.clear()
        run([torch.zeros(8, 8) for _ in range(count)], [x] * count)
        assert launches == ["_products_kernel", "_commit_kernel"]
    launches.clear()
    # Two types; within fp16, aligned, not aligned, and another tile.
    xs = [x, x.half(), small_integers(4, 9, dtype=torch.float16), x.half().repeat(1, 5)]
    run([torch.zeros(x.shape[1], x.shape[1]) for x in xs], xs)
    assert launches == ["_products_kernel"] * 4 + ["_commit_kernel"]


def test_a_workspace_that_is_too_small_for_all_layers(monkeypatch, launches):
    """Several sets of launches; a layer that is larger than the workspace gets a set of its own."""
    monkeypatch.setattr(triton_kernel, "WORKSPACE", 4 * 32 * 32 * 4)
    factors, xs, wants = integer_case(True)
    assert run(factors, xs, bias=True) == [Info.OK] * len(xs)
    assert launches.count("_commit_kernel") > 2
    for factor, want in zip(factors, wants, strict=True):
        assert torch.equal(factor, want)


@biases
def test_layouts_and_memory_around_every_factor(bias):
    factors, xs, wants = integer_case(bias)
    checks = []
    for i, layout in enumerate(MATRIX_LAYOUTS.values()):
        factors[i], check = guarded(factors[i], contiguous=i % 2 == 0)
        checks.append(check)
        xs[i] = layout(xs[i])
    assert run(factors, xs, bias=bias) == [Info.OK] * len(xs)
    for factor, want in zip(factors, wants, strict=True):
        assert torch.equal(factor, want)
    for check in checks:
        check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_is_recognised(dtype):
    x = torch.zeros(8, 32, dtype=dtype)
    assert triton_kernel.is_aligned(x)
    per_16_bytes = 16 // x.element_size()
    for other in (
        x[:, :-1],
        x[:, 1:],
        x.mT,
        x.view(16, 16)[:, ::2],
        x.view(-1)[1:].unfold(0, 16, 16),
    ):
        assert not triton_kernel.is_aligned(other)
    assert triton_kernel.is_aligned(x[1::2, per_16_bytes:])
    odd = torch.zeros(8, 33, dtype=dtype)[:, :32]
    assert not triton_kernel.is_aligned(odd)


def test_splits_depend_on_the_shape_alone_and_are_bounded():
    for variants in (*triton_kernel.TILES_16BIT.values(), *triton_kernel.TILES_FP32.values()):
        assert variants.aligned.block_k == variants.general.block_k
        for width, rows in itertools.product((1, 100, 768, 4096), (1, 500, 12608, 10**6)):
            step = triton_kernel.rows_per_split(width, rows, variants)
            assert step % variants.aligned.block_k == 0
            assert step <= variants.max_rows
