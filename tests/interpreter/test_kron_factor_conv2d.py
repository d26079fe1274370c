# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that gathers the patches of convolutions, against ``F.unfold``."""

import math

import pytest
import torch
import torch.nn.functional as F

from grng_kernels import Info, _table
from grng_kernels.kron_factor import triton_conv2d
from grng_kernels.kron_factor.geometry import Conv2dGeometry
from grng_kernels.kron_factor.triton_conv2d import launch_conv2d
from tests.cases import assert_within_budget, dtype_id, small_integers

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
GEOMETRIES = {
    "pointwise": Conv2dGeometry((1, 1)),
    "padded": Conv2dGeometry((3, 3), padding=(1, 1)),
    "strided": Conv2dGeometry((3, 2), stride=(2, 1), padding=(0, 1)),
    "dilated": Conv2dGeometry((2, 3), stride=(1, 2), padding=(2, 0), dilation=(3, 2)),
    "gaps": Conv2dGeometry((1, 1), stride=(2, 3)),
    "groups": Conv2dGeometry((3, 3), padding=(1, 1), groups=2),
    "depthwise": Conv2dGeometry((2, 2), groups=4),
}
geometries = pytest.mark.parametrize("name", GEOMETRIES)
# Values of an image at other addresses.
LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0],
    "every second image": lambda x: torch.stack([x, torch.full_like(x, math.nan)], dim=1)[:, 0],
    "offset by one": lambda x: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(
        x.shape
    ),
}


@pytest.fixture(autouse=True)
def empty_tables():
    _table.clear()
    yield
    _table.clear()


def patches(x, geometry, bias):
    """``[G, B*O1*O2, N]`` in fp64."""
    kernel, stride, padding, dilation, groups = geometry
    batch, channels, height, width = x.shape
    images = x.double().reshape(batch * groups, channels // groups, height, width)
    columns = F.unfold(images, kernel, dilation, padding, stride)
    columns = columns.view(batch, groups, *columns.shape[1:]).permute(1, 0, 3, 2)
    columns = columns.reshape(groups, -1, columns.shape[3])
    return torch.cat([columns, columns.new_ones(*columns.shape[:2], bias)], dim=2)


def integer_case(shape, geometry, dtype, bias):
    """Inputs whose result is exact in fp32 for decay 0.5 and scale 0.25, and that result."""
    x = small_integers(*shape, dtype=dtype)
    rows = patches(x, geometry, bias)
    half = small_integers(geometry.groups, rows.shape[2], rows.shape[2])
    factor = 4 * (half + half.mT)
    return factor, x, (0.5 * factor.double() + 0.25 * rows.mT @ rows).float()


def run(factors, xs, geometry, *, decay=0.5, scales=None, bias=False):
    info = torch.zeros(len(xs), dtype=torch.int32)
    scales = scales or [0.25] * len(xs)
    launch_conv2d(factors, xs, info, geometry=geometry, decay=decay, scales=scales, bias=bias)
    return info.tolist()


@geometries
@biases
def test_small_integers_are_exact(name, bias):
    geometry = GEOMETRIES[name]
    factor, x, want = integer_case((3, 4, 7, 6), geometry, torch.float32, bias)
    assert run([factor], [x], geometry, bias=bias) == [Info.OK]
    assert torch.equal(factor, want)


@dtypes
@biases
def test_several_tiles_and_splits(dtype, bias):
    """72 columns are two tiles; 2,028 rows are three splits, whose borders lie inside of images."""
    geometry = GEOMETRIES["padded"]
    factor, x, want = integer_case((12, 8, 13, 13), geometry, dtype, bias)
    assert run([factor], [x], geometry, bias=bias) == [Info.OK]
    assert torch.equal(factor, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["padded", "groups"])
def test_layout_of_the_image_does_not_matter(layout, name):
    """The memory between the elements is NaN: reading it would show."""
    geometry = GEOMETRIES[name]
    factor, x, want = integer_case((3, 4, 7, 6), geometry, torch.float16, True)
    x = LAYOUTS[layout](x)
    assert run([factor], [x], geometry, bias=True) == [Info.OK]
    assert torch.equal(factor, want)


def test_expanded_image():
    geometry = GEOMETRIES["strided"]
    x = small_integers(1, 1, 7, 6).expand(3, 2, 7, 6)
    rows = patches(x, geometry, False)
    factor = torch.zeros(1, 12, 12)
    run([factor], [x], geometry)
    assert torch.equal(factor, (0.25 * rows.mT @ rows).float())


def test_layout_of_the_factor_does_not_matter():
    geometry = GEOMETRIES["groups"]
    values, x, want = integer_case((2, 4, 5, 5), geometry, torch.float32, True)
    buffer = torch.full((2, 38, 3 * 19), math.nan)
    factor = buffer[:, ::2, 1::3]
    factor.copy_(values)
    run([factor], [x], geometry, bias=True)
    assert torch.equal(factor, want)
    factor.fill_(math.nan)
    assert buffer.isnan().all(), "memory around the factor was written"


def test_list_of_images_with_one_fault():
    """Sizes and types differ; all groups of the faulty item are left alone, and no other item is."""
    geometry = GEOMETRIES["groups"]
    shapes = ((3, 4, 7, 6), (1, 2, 3, 3), (2, 8, 5, 4), (0, 4, 5, 5))
    cases = [
        integer_case(shape, geometry, dtype, False)
        for shape, dtype in zip(shapes, (*DTYPES, torch.float32), strict=True)
    ]
    factors, xs, wants = map(list, zip(*cases, strict=True))
    before = [f.clone() for f in factors]
    # In the second group: the first must wait for its verdict.
    xs[0][2, 3, 6, 5] = math.inf
    assert run(factors, xs, geometry) == [Info.NONFINITE_INPUT, Info.OK, Info.OK, Info.OK]
    for i, factor in enumerate(factors):
        assert torch.equal(factor, wants[i] if i in (1, 2) else before[i])


def test_a_bad_factor_of_one_group_stops_all_groups():
    geometry = GEOMETRIES["groups"]
    factor, x, _ = integer_case((1, 4, 3, 3), geometry, torch.float32, False)
    factor[1, 17, 17] = math.nan
    before = factor.clone()
    assert run([factor], [x], geometry) == [Info.NONFINITE_INPUT]
    assert torch.equal(factor[0], before[0])


def test_an_element_between_the_patches_is_checked_too():
    geometry = GEOMETRIES["gaps"]
    factor, x, _ = integer_case((2, 4, 7, 6), geometry, torch.float32, False)
    before = factor.clone()
    x[1, 2, 1, 1] = math.nan
    assert run([factor], [x], geometry) == [Info.NONFINITE_INPUT]
    assert torch.equal(factor, before)


def test_overflow_counts_the_patches():
    """max|x|² fits eight times, and there are nine patches."""
    geometry = GEOMETRIES["pointwise"]
    x = torch.full((1, 1, 3, 3), math.sqrt(torch.finfo(torch.float32).max / 8.5))
    factor = torch.zeros(1, 1, 1)
    assert run([factor], [x], geometry, scales=[1.0]) == [Info.OVERFLOW]
    assert run([factor], [x[..., :2]], geometry, scales=[1.0]) == [Info.OK]


def test_without_patches_nothing_changes():
    factor = torch.full((1, 9, 9), 7.0)
    assert run([factor], [torch.ones(2, 1, 2, 2)], Conv2dGeometry((3, 3))) == [Info.OK]
    assert (factor == 7).all()


@dtypes
def test_error_is_at_most_twice_that_of_torch(dtype):
    geometry = GEOMETRIES["padded"]
    x = torch.randn(2, 8, 9, 9).to(dtype)
    rows = patches(x, geometry, True)[0]
    factor = torch.zeros(1, 73, 73)
    run([factor], [x], geometry, scales=[1 / len(rows)], bias=True)
    base = rows.float().mT @ rows.float() / len(rows)
    assert_within_budget(factor[0], rows.mT @ rows / len(rows), base)
    assert torch.equal(factor, factor.mT)


def test_grouped_equals_one_by_one_bitwise_and_tables_are_reused(monkeypatch):
    geometry = GEOMETRIES["strided"]
    xs = [torch.randn(2, c, 6, 5) for c in (1, 9, 3)]
    factors = [torch.zeros(1, 6 * x.shape[1], 6 * x.shape[1]) for x in xs]
    alone = [f.clone() for f in factors]
    run(factors, xs, geometry, decay=0.0)
    built = []
    plan = triton_conv2d.linear.plan_batches
    monkeypatch.setattr(
        triton_conv2d.linear, "plan_batches", lambda *a: (built.append(1), plan(*a))[1]
    )
    run(factors, xs, geometry, decay=0.0)
    assert not built
    for together, factor, x in zip(factors, alone, xs, strict=True):
        run([factor], [x], geometry, decay=0.0)
        assert torch.equal(together, factor)
    assert len(built) == 3
    # The same tensors under another geometry are another table.
    other = geometry._replace(padding=(1, 1))
    run(factors, xs, other, decay=0.0)
    rows = patches(xs[0], other, False)
    torch.testing.assert_close(factors[0], (0.25 * rows.mT @ rows).float())


def test_programs_lie_on_the_first_dimension_of_the_grid(monkeypatch):
    """The other dimensions end at 65,535 programs."""
    grids = {}
    for module, name in (
        (triton_conv2d, "_conv2d_extremes_kernel"),
        (triton_conv2d, "_conv2d_products_kernel"),
        (triton_conv2d.linear, "_commit_kernel"),
    ):
        original = getattr(module, name)

        class Seen:
            def __getitem__(self, grid, kernel=original, name=name):
                grids[name] = grid
                return kernel[grid]

        monkeypatch.setattr(module, name, Seen())
    geometry = GEOMETRIES["depthwise"]
    factor, x, want = integer_case((2, 4, 5, 5), geometry, torch.float32, False)
    run([factor], [x], geometry)
    assert torch.equal(factor, want)
    assert [len(grid) for grid in grids.values()] == [1, 1, 1]
    # One program for each group.
    assert grids["_conv2d_products_kernel"] == (4,)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_output_size_is_that_of_torch(name):
    kernel, stride, padding, dilation, _ = GEOMETRIES[name]
    got = GEOMETRIES[name].output_size(9, 8)
    want = F.conv2d(
        torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, *kernel), None, stride, padding, dilation
    )
    assert got == tuple(want.shape[2:])
