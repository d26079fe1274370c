# SPDX-License-Identifier: Apache-2.0
"""``kron_factor_conv2d_update_``: the factor of a convolution's patches, on every backend."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

import grng_kernels as gk
from grng_kernels import Info, kron_factor_conv2d_update_, kron_factor_update_
from grng_kernels.kron_factor.geometry import Conv2dGeometry
from tests.cases import (
    ALL_DTYPES,
    assert_memory_that_ends_changes_nothing,
    assert_within_budget,
    dtype_id,
    far_apart,
    guarded,
    offset_by_one,
    small_integers,
    spd,
    state_dtype,
    threads,
)
from tests.ops.errors import REFUSED, refused

dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)

# batch, channels, height, width, then the geometry. Few channels and 1 x 1 kernels go through patches,
# the others through distances: one panel and several, borders on both sides, strides that leave taps
# in classes of their own, taps that never meet the image, more lines than a strip holds.
CASES = {
    "3x3-same": (2, 20, 9, 7, dict(kernel_size=3, padding=1)),
    "3x3-valid": (2, 33, 6, 8, dict(kernel_size=3)),
    "3x3-panels": (1, 130, 6, 5, dict(kernel_size=3, padding=1)),
    "3x3-stride-2": (2, 40, 11, 10, dict(kernel_size=3, stride=2, padding=1)),
    "5x2-mixed": (1, 17, 12, 9, dict(kernel_size=(5, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 3))),
    "dilated": (2, 24, 11, 11, dict(kernel_size=3, padding=2, dilation=2)),
    "stride-above-kernel": (2, 18, 13, 13, dict(kernel_size=2, stride=3)),
    "mostly-padding": (2, 24, 2, 1, dict(kernel_size=3, padding=3)),
    "kernel-of-the-whole-image": (3, 20, 4, 5, dict(kernel_size=(4, 5))),
    "many-lines": (1, 36, 70, 33, dict(kernel_size=3, padding=1)),
    "groups": (2, 48, 6, 7, dict(kernel_size=3, padding=1, groups=2)),
    "depthwise": (2, 6, 7, 7, dict(kernel_size=3, padding=1, groups=6)),
    "stem": (2, 3, 19, 18, dict(kernel_size=7, stride=2, padding=3)),
    "1x1": (2, 33, 5, 6, dict(kernel_size=1)),
    "1x1-stride-2": (2, 10, 5, 6, dict(kernel_size=1, stride=2)),
    "taps-far-apart": (3, 20, 4, 5, dict(kernel_size=3, padding=2**20, dilation=2**20)),
    "steps-beyond-the-image": (3, 20, 4, 5, dict(kernel_size=2, stride=2**20)),
    "large-kernel": (1, 2, 13, 13, dict(kernel_size=13, padding=6)),
    "one-line": (40, 20, 1, 9, dict(kernel_size=(1, 3), padding=(0, 1))),
    "one-element": (1, 1, 1, 1, dict(kernel_size=1)),
}  # fmt: skip
cases = pytest.mark.parametrize("name", CASES)


def patches(x, *, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=False):
    """``[groups, rows, N]`` in fp64, by ``unfold``."""
    columns = functional.unfold(
        x.double().cpu(), kernel_size, dilation=dilation, padding=padding, stride=stride
    )
    batch, width, places = columns.shape
    rows = columns.reshape(batch, groups, width // groups, places).permute(1, 0, 3, 2)
    rows = rows.reshape(groups, batch * places, width // groups)
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2) if bias else rows


def plain(factor, x, geometry, decay, scale, bias=False, dtype=torch.float64):
    """The torch equivalent of the docstring in ``dtype``."""
    p = patches(x, **geometry, bias=bias).to(dtype)
    f = factor.to(dtype).cpu()
    return (decay * f.reshape(p.shape[0], *f.shape[-2:]) + scale * (p.mT @ p)).reshape(f.shape)


def random_factor(x, geometry, bias, integers=True):
    taps = math.prod(Conv2dGeometry(*full(geometry)).kernel_size)
    groups = geometry.get("groups", 1)
    n = x.shape[1] // groups * taps + bias
    dtype = state_dtype(x.dtype)
    if integers:
        half = small_integers(groups, n, n, dtype=dtype, device=x.device)
        factor = 4 * (half + half.mT)
    else:
        factor = torch.stack([spd(n, dtype=dtype) for _ in range(groups)]).to(x.device)
    return factor if groups > 1 else factor[0]


def full(geometry):
    def pair(value):
        return (value, value) if isinstance(value, int) else value

    names = (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
    return *(pair(geometry.get(name, default)) for name, default in names), geometry.get(
        "groups", 1
    )


def integer_case(name, dtype, device, bias=False):
    b, c, h, w, geometry = CASES[name]
    x = small_integers(b, c, h, w, dtype=dtype, device=device)
    return random_factor(x, geometry, bias), x, geometry


# ---- exact ----


@cases
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_small_integers_are_exact(backend, name, dtype, bias):
    if backend == ("auto", "cuda") and dtype == torch.float32:
        pytest.skip("tf32x3 is not exact")
    factor, x, geometry = integer_case(name, dtype, backend.device, bias)
    want = plain(factor, x, geometry, 0.5, 0.25, bias)
    info = kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5, scale=0.25, bias=bias)
    assert info.item() == Info.OK
    assert torch.equal(factor.double().cpu(), want)
    assert torch.equal(factor, factor.mT)


@dtypes
@pytest.mark.parametrize("content", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["3x3-same", "stem"])
def test_decay_zero_ignores_what_was_there(backend, name, dtype, content):
    if backend == ("auto", "cuda") and dtype == torch.float32:
        pytest.skip("tf32x3 is not exact")
    factor, x, geometry = integer_case(name, dtype, backend.device)
    want = plain(torch.zeros_like(factor), x, geometry, 0.0, 0.25)
    factor.fill_(content)
    info = kron_factor_conv2d_update_(factor, x, **geometry, decay=0.0, scale=0.25)
    assert info.item() == Info.OK
    assert torch.equal(factor.double().cpu(), want)


def test_a_1x1_kernel_is_the_matrix_update(backend):
    x = torch.randn(3, 10, 4, 5, device=backend.device)
    one, other = spd(10, device=backend.device), spd(10, device=backend.device)
    other.copy_(one)
    kron_factor_conv2d_update_(one, x, kernel_size=1, decay=0.9)
    kron_factor_update_(other, x.permute(0, 2, 3, 1).reshape(-1, 10), decay=0.9)
    torch.testing.assert_close(one, other)


def test_default_scale_divides_by_the_rows(backend):
    factor, x, geometry = integer_case("3x3-same", torch.float32, backend.device)
    rows = patches(x, **geometry).shape[1]
    other = factor.clone()
    kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5)
    kron_factor_conv2d_update_(other, x, **geometry, decay=0.5, scale=0.5 / rows)
    assert torch.equal(factor, other)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_padding_by_name(backend, padding):
    factor, x, _ = integer_case("3x3-same", torch.float32, backend.device)
    geometry = dict(kernel_size=(3, 3), padding={"valid": 0, "same": (1, 1)}[padding])
    want = plain(factor, x, geometry, 0.5, 0.25)
    kron_factor_conv2d_update_(factor, x, kernel_size=3, padding=padding, decay=0.5, scale=0.25)
    torch.testing.assert_close(factor.double().cpu(), want)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_reduce_takes_the_mean_patch_of_each_image(backend, groups, bias):
    geometry = dict(kernel_size=3, stride=2, padding=1, groups=groups)
    x = torch.randn(5, 6, 9, 8, device=backend.device)
    factor = random_factor(x, geometry, bias, integers=False)
    places = Conv2dGeometry(*full(geometry)).places(x)
    p = patches(x, **geometry, bias=bias)
    mean = p.reshape(groups, 5, places, -1).mean(dim=2)
    want = 0.9 * factor.double().cpu().reshape(groups, *factor.shape[-2:]) + 0.02 * mean.mT @ mean
    kron_factor_conv2d_update_(
        factor, x, **geometry, decay=0.9, bias=bias, sharing="reduce"
    )  # (1 - 0.9) / 5 images
    torch.testing.assert_close(
        factor.double().cpu(), want.reshape(factor.shape), rtol=2e-5, atol=1e-6
    )


def test_expand_is_the_fisher_of_a_convolution_with_a_loss_at_every_position(backend):
    """E[g gᵀ] ⊗ E[p pᵀ] where they are independent: one image of one patch, scale included."""
    conv = torch.nn.Conv2d(4, 3, 3).double()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    out = conv(x)
    torch.nn.functional.mse_loss(out, torch.randn_like(out), reduction="sum").backward()
    a = torch.zeros(37, 37, dtype=torch.float64, device=backend.device)
    kron_factor_conv2d_update_(a, x.to(a.device), kernel_size=3, decay=0.0, bias=True)
    joint = torch.cat([conv.weight.grad.flatten(1), conv.bias.grad[:, None]], dim=1)
    g = conv.bias.grad  # of the only position
    torch.testing.assert_close(
        torch.outer(joint.flatten(), joint.flatten()), torch.kron(torch.outer(g, g), a.cpu())
    )


def test_lists_of_mixed_sizes_equal_single_calls(backend):
    geometry = dict(kernel_size=3, padding=1)
    xs = [
        small_integers(2, c, h, h + 1, device=backend.device) for c, h in ((20, 5), (3, 8), (40, 1))
    ]
    factors = [random_factor(x, geometry, True) for x in xs]
    single = [f.clone() for f in factors]
    info = kron_factor_conv2d_update_(factors, xs, **geometry, decay=0.5, scale=0.25, bias=True)
    assert info.tolist() == [0, 0, 0]
    for f, s, x in zip(factors, single, xs, strict=True):
        kron_factor_conv2d_update_(s, x, **geometry, decay=0.5, scale=0.25, bias=True)
        assert torch.equal(f, s)


# ---- accuracy ----


@cases
@pytest.mark.parametrize("dtype", [d for d in ALL_DTYPES if d != torch.float64], ids=dtype_id)
def test_error_is_at_most_twice_that_of_torch(backend, name, dtype):
    b, c, h, w, geometry = CASES[name]
    x = torch.randn(b, c, h, w).to(backend.device, dtype)
    factor = random_factor(x, geometry, False, integers=False)
    want = plain(factor, x, geometry, 0.9, 0.1)
    base = plain(factor, x, geometry, 0.9, 0.1, dtype=factor.dtype)
    kron_factor_conv2d_update_(factor, x, **geometry, decay=0.9, scale=0.1)
    assert_within_budget(factor, want, base)


@cases
def test_fp64_is_computed_in_fp64(backend, name):
    b, c, h, w, geometry = CASES[name]
    x = torch.randn(b, c, h, w, dtype=torch.float64, device=backend.device)
    factor = random_factor(x, geometry, False, integers=False)
    want = plain(factor, x, geometry, 0.9, 0.1)
    kron_factor_conv2d_update_(factor, x, **geometry, decay=0.9, scale=0.1)
    # Both sides round each of some hundred sums once.
    torch.testing.assert_close(factor.cpu(), want, rtol=1e-13, atol=1e-13)


def test_a_border_far_larger_than_the_inside_cancels_nothing(backend):
    """Entries of taps that do not visit the border are as exact as without it."""
    x = torch.randn(2, 20, 8, 8)
    x[:, :, 0] = 1e4
    factor, geometry = torch.zeros(180, 180, device=backend.device), dict(kernel_size=3, padding=1)
    want = plain(factor, x, geometry, 0.5, 1.0)
    kron_factor_conv2d_update_(factor, x.to(backend.device), **geometry, decay=0.5, scale=1.0)
    bottom = [c * 9 + k for c in range(20) for k in range(6, 9)]  # taps that begin below the line
    got, ref = factor.double().cpu()[bottom][:, bottom], want[bottom][:, bottom]
    assert ref.abs().max() < 1e4
    torch.testing.assert_close(got, ref, rtol=1e-5, atol=1e-4)


def test_many_updates_with_one_batch_converge_to_it(backend):
    geometry = dict(kernel_size=3, padding=1)
    x = torch.randn(2, 6, 4, 5, device=backend.device)
    factor = torch.zeros(54, 54, device=backend.device)
    for _ in range(400):
        kron_factor_conv2d_update_(factor, x, **geometry, decay=0.9)
    want = plain(torch.zeros_like(factor), x, geometry, 0.0, 1 / 40)
    # As for matrices: what stays of the rounding of each step is at most 1/(1 - decay) = 10 times that.
    unit = torch.finfo(torch.float32).eps / 2
    error = (factor.double().cpu() - want).abs().max() / want.abs().max()
    assert error.item() < 40 * unit
    assert torch.equal(factor, factor.mT)


# Kernels as long as their image: of the patches' columns few positions are left, and what is planned for
# distances grows with the third power of the length.
VERY_LARGE = {
    "64x64": (1, 1, 70, 70, dict(kernel_size=64)),
    "1x1000": (2, 1, 1, 2000, dict(kernel_size=(1, 1000))),
    "1x200-panels": (1, 16, 1, 230, dict(kernel_size=(1, 200))),
}


@pytest.mark.parametrize("name", VERY_LARGE)
def test_very_large_kernels(backend, name):
    b, c, h, w, geometry = VERY_LARGE[name]
    x = small_integers(b, c, h, w, device=backend.device)
    n = c * math.prod(geometry["kernel_size"] if name != "64x64" else (64, 64))
    factor = torch.zeros(n, n, device=backend.device)
    want = plain(factor, x, geometry, 0.5, 0.25)
    info = kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5, scale=0.25)
    assert info.item() == Info.OK
    if backend == ("auto", "cuda"):
        torch.testing.assert_close(factor.double().cpu(), want)
    else:
        assert torch.equal(factor.double().cpu(), want)


def test_very_large_kernels_take_little_memory_and_time():
    """All sums of the first take 70 MB; to plan the second for distances would take 2 GB and 10 s."""
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_THE_CALLS, repr(VERY_LARGE)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 150
    assert seconds < 5


PEAK_OF_THE_CALLS = """
import resource, sys, time, torch
import grng_kernels as gk
calls = []
for b, c, h, w, geometry in eval(sys.argv[1]).values():
    k = geometry["kernel_size"]
    n = c * (k * k if isinstance(k, int) else k[0] * k[1])
    calls.append((torch.ones(n, n), torch.ones(b, c, h, w), geometry))
with gk.use_backend("cpu"):
    gk.kron_factor_conv2d_update_(torch.ones(4, 4), torch.ones(1, 1, 3, 3), kernel_size=2, decay=0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for factor, x, geometry in calls:
        gk.kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    print(time.perf_counter() - start)
"""


# ---- layouts ----

LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels_sliced": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1, 2)[
        :, ::2
    ],
    "columns_sliced": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 4).flatten(3)[
        ..., ::2
    ],
    "offset_by_one": offset_by_one,
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["3x3-same", "3x3-stride-2", "stem", "1x1"])
def test_any_layout_gives_the_same_bits(backend, name, layout):
    b, c, h, w, geometry = CASES[name]
    x = LAYOUTS[layout](torch.randn(b, c, h, w, device=backend.device))
    factor = random_factor(x, geometry, False)
    same = factor.clone()
    kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5)
    kron_factor_conv2d_update_(
        same, x.clone(memory_format=torch.contiguous_format), **geometry, decay=0.5
    )
    assert torch.equal(factor, same)


@pytest.mark.parametrize("name", ["3x3-panels", "groups", "stem"])
def test_nothing_around_the_factor_is_written(backend, name):
    factor, x, geometry = integer_case(name, torch.float32, backend.device)
    factor, check = guarded(factor)
    kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5)
    check()


@dtypes
@pytest.mark.parametrize("name", ["3x3-panels", "groups", "stem", "1x1"])
def test_memory_around_x_is_not_read(backend, name, dtype):
    factor, values, geometry = integer_case(name, dtype, backend.device)
    other = factor.clone()
    kron_factor_conv2d_update_(factor, values, **geometry, decay=0.5)
    x, _ = guarded(values)
    assert kron_factor_conv2d_update_(other, x, **geometry, decay=0.5).item() == Info.OK
    assert torch.equal(other, factor)


@pytest.mark.parametrize("name", ["3x3-panels", "groups", "stem"])
def test_unaligned_factor_after_an_aligned_call(backend, name):
    factor, x, geometry = integer_case(name, torch.float32, backend.device)
    shifted = offset_by_one(factor)
    kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5)
    kron_factor_conv2d_update_(shifted, x, **geometry, decay=0.5)
    assert torch.equal(shifted, factor)


@pytest.mark.parametrize("dim", range(4), ids=["images", "channels", "lines", "columns"])
@pytest.mark.parametrize("channels", [2, 34], ids=["patches", "distances"])
def test_elements_further_apart_than_int32_reaches(backend, dim, channels, tmp_path):
    shape = [3, channels, 6, 5]
    shape[dim] = 2
    geometry = dict(kernel_size=2, padding=1)
    x = small_integers(*shape, dtype=torch.bfloat16, device=backend.device)
    factor = random_factor(x, geometry, False)
    want = plain(factor, x, geometry, 0.5, 0.25)
    kron_factor_conv2d_update_(
        factor, far_apart(x, dim, tmp_path), **geometry, decay=0.5, scale=0.25
    )
    assert torch.equal(factor.double().cpu(), want)


@pytest.mark.parametrize("what", ["groups", "images"])
def test_more_matrices_than_a_side_of_a_grid(backend, what):
    count = 66_000
    groups, images = (count, 1) if what == "groups" else (1, count)
    x = small_integers(images, groups, 1, 2, device=backend.device)
    factor = torch.ones(groups, 1, 1, device=backend.device)
    kron_factor_conv2d_update_(
        factor if groups > 1 else factor[0], x, kernel_size=1, groups=groups, decay=0.5, scale=0.25
    )
    want = 0.5 + 0.25 * x.double().square().sum(dim=(0, 2, 3))
    torch.testing.assert_close(factor.double().flatten(), want)


def test_a_factor_that_is_not_contiguous(backend):
    factor, x, geometry = integer_case("3x3-same", torch.float32, backend.device)
    want = plain(factor, x, geometry, 0.5, 0.25)
    view = torch.zeros(2 * factor.shape[0], 2 * factor.shape[0], device=backend.device)[::2, ::2]
    view.copy_(factor)
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match="it needs contiguous factors"):
            kron_factor_conv2d_update_(view, x, **geometry, decay=0.5, scale=0.25)
        assert torch.equal(view, factor)
        return
    kron_factor_conv2d_update_(view, x, **geometry, decay=0.5, scale=0.25)
    torch.testing.assert_close(view.double().cpu(), want)


@pytest.mark.parametrize("name", ["3x3-panels", "3x3-stride-2", "groups", "stem"])
def test_same_bits_on_any_number_of_threads(name):
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    b, c, h, w, geometry = CASES[name]
    x = torch.randn(b, c, h, w)
    start = random_factor(x, geometry, True, integers=False)
    results = []
    for count in (1, 2, 3, 7):
        factor = start.clone()
        with threads(count), gk.use_backend("cpu"):
            kron_factor_conv2d_update_(factor, x, **geometry, decay=0.9, bias=True)
        results.append(factor)
    assert all(torch.equal(r, results[0]) for r in results)


# ---- empty ----


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_no_images_leave_the_factor_as_it_is(backend, sharing):
    factor = spd(27, device=backend.device)
    before = factor.clone()
    info = kron_factor_conv2d_update_(
        factor,
        torch.zeros(0, 3, 5, 5, device=backend.device),
        kernel_size=3,
        decay=0.5,
        sharing=sharing,
    )
    assert info.item() == Info.OK
    assert torch.equal(factor, before)


def test_an_empty_list(backend):
    assert kron_factor_conv2d_update_([], [], kernel_size=3, decay=0.5).shape == (0,)


# ---- faults ----


@dtypes
@pytest.mark.parametrize("name", ["3x3-same", "groups", "stem", "1x1"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30], ids=["zeros", "squares-underflow"])
def test_samples_without_squares_only_decay(backend, name, dtype, magnitude):
    if magnitude and dtype in (torch.float16, torch.float64):
        magnitude = {torch.float16: 0.0, torch.float64: 1e-200}[dtype]
    factor, x, geometry = integer_case(name, dtype, backend.device)
    want = 0.75 * factor
    x.fill_(magnitude)
    assert kron_factor_conv2d_update_(factor, x, **geometry, decay=0.75).item() == Info.OK
    assert torch.equal(factor, want)


@pytest.mark.parametrize(
    ("dtype", "magnitude", "code"),
    [
        (torch.float32, 1.9e19, Info.OVERFLOW),
        (torch.bfloat16, 3e38, Info.OVERFLOW),
        (torch.float64, 1e155, Info.OVERFLOW),
        (torch.float16, 65504.0, Info.OK),
        (torch.float32, 1e18, Info.OK),
        (torch.float64, 1e150, Info.OK),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["3x3-same", "stem"])
def test_largest_samples(backend, name, dtype, magnitude, code):
    factor, x, geometry = integer_case(name, dtype, backend.device)
    before = factor.clone()
    x.zero_()
    x[-1, -1, 3, 2] = magnitude
    info = kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5, scale=0.125)
    assert info.item() == code
    if code == Info.OK:
        torch.testing.assert_close(
            factor.double().cpu(), plain(before, x, geometry, 0.5, 0.125), rtol=1e-6, atol=0
        )
    else:
        assert torch.equal(factor, before)


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["3x3-panels", "groups", "stem", "1x1"])
def test_a_bad_sample_leaves_every_group_and_spares_the_others(backend, name, dtype, value):
    factor, x, geometry = integer_case(name, dtype, backend.device)
    bad = x.clone()
    bad[-1, -1, -1, -1] = value
    factors, before = [factor.clone(), factor.clone()], factor.clone()
    info = kron_factor_conv2d_update_(factors, [bad, x], **geometry, decay=0.5, scale=0.25)
    assert info.tolist() == [Info.NONFINITE_INPUT, Info.OK]
    assert torch.equal(factors[0], before)
    torch.testing.assert_close(factors[1].double().cpu(), plain(before, x, geometry, 0.5, 0.25))


@pytest.mark.parametrize("name", ["3x3-same", "stem", "1x1"])
def test_overflow_is_reported_before_anything_is_written(backend, name):
    factor, x, geometry = integer_case(name, torch.float32, backend.device)
    before = factor.clone()
    info = kron_factor_conv2d_update_(factor, x * 1e19, **geometry, decay=0.5)
    assert info.item() == Info.OVERFLOW
    assert torch.equal(factor, before)


def test_one_group_out_of_range_leaves_all_groups(backend):
    factor, x, geometry = integer_case("groups", torch.float32, backend.device)
    factor[1, 0, 0] = math.nan
    before = factor.clone()
    info = kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5)
    assert info.item() == Info.NONFINITE_INPUT
    assert torch.equal(factor.nan_to_num(7.0), before.nan_to_num(7.0))


def test_the_mean_of_large_numbers_is_in_range(backend):
    x = torch.full((2, 3, 9, 9), 1e18, device=backend.device)
    factor = torch.zeros(3, 3, device=backend.device)
    info = kron_factor_conv2d_update_(
        factor, x, kernel_size=1, decay=0.5, scale=1.0, sharing="reduce"
    )
    assert info.item() == Info.OK
    torch.testing.assert_close(factor, torch.full_like(factor, 2e36))


def test_tensors_as_scalars_equal_numbers(backend):
    factor, x, geometry = integer_case("3x3-same", torch.float32, backend.device)
    other = factor.clone()
    kron_factor_conv2d_update_(factor, x, **geometry, decay=0.5, scale=0.25)
    kron_factor_conv2d_update_(
        other,
        x,
        **geometry,
        decay=torch.tensor(0.5, device=backend.device),
        scale=torch.tensor(0.25, device=backend.device),
    )
    assert torch.equal(factor, other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["decay", "scale"])
@pytest.mark.parametrize("case", ["3x3-same", "stem"])
def test_nonfinite_tensor_scalar_sets_info(backend, case, name, value):
    factor, x, geometry = integer_case(case, torch.float32, backend.device)
    before = factor.clone()
    scalars = {"decay": 0.5, "scale": 1.0} | {name: torch.tensor(value, device=backend.device)}
    info = kron_factor_conv2d_update_(factor, x, **geometry, **scalars)
    assert info.item() == Info.NONFINITE_INPUT
    assert torch.equal(factor, before)


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_tensor_decay_out_of_range_sets_info(backend, value):
    factor, x, geometry = integer_case("3x3-same", torch.float32, backend.device)
    before = factor.clone()
    decay = torch.tensor(value, device=backend.device)
    assert kron_factor_conv2d_update_(factor, x, **geometry, decay=decay).item() != Info.OK
    assert torch.equal(factor, before)


def _list_of_both_ways():
    """Patches and distances in one call: the first must not be written before there is memory for all."""
    xs = [torch.randn(2, c, 40, 40) for c in (3, 40, 5, 64)]
    factors = [torch.ones(9 * x.shape[1], 9 * x.shape[1]) for x in xs]
    return (factors, xs), factors


SHORT_OF_MEMORY = {
    "expand": (
        _list_of_both_ways,
        lambda a: kron_factor_conv2d_update_(*a, kernel_size=3, padding=1, decay=0.5),
    ),
}


def test_memory_that_ends_leaves_the_factors_as_they_were():
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    assert_memory_that_ends_changes_nothing(__name__, "expand", 256 << 20)


# ---- errors ----

X, F = torch.zeros(2, 4, 5, 5), torch.zeros(36, 36)
ERRORS = {
    "rank of x": (
        dict(x=torch.zeros(4, 5, 5)),
        ValueError,
        r"x must be \[B, C, H, W\], got shape \[4, 5, 5\]",
    ),
    "empty image": (
        dict(x=torch.zeros(2, 4, 5, 0)),
        ValueError,
        "C, H and W of at least 1, got shape",
    ),
    "no channels": (
        dict(x=torch.zeros(2, 0, 5, 5)),
        ValueError,
        "C, H and W of at least 1, got shape",
    ),
    "far too large": (
        dict(stride=2**20 + 1),
        ValueError,
        r"stride must be one or two numbers >= 1 \(at most",
    ),
    "flag": (dict(bias=None), TypeError, "bias must be True or False, got None"),
    "size": (
        dict(factor=torch.zeros(4, 4)),
        ValueError,
        r"factor must have shape \[36, 36\].*got \[4, 4\]",
    ),
    "bias": (dict(bias=True), ValueError, r"factor must have shape \[37, 37\]"),
    "groups": (dict(groups=3), ValueError, "channels of x must be divisible by groups = 3, got 4"),
    "groups shape": (dict(groups=2), ValueError, r"factor must have shape \[2, 18, 18\]"),
    "groups kind": (dict(groups=1.0), TypeError, "groups must be an int, got 1.0"),
    "no groups": (dict(groups=0), ValueError, "groups must be >= 1, got 0"),
    "kernel": (
        dict(kernel_size=0),
        ValueError,
        "kernel_size must be one or two numbers >= 1 .*, got 0",
    ),
    "kernel kind": (
        dict(kernel_size=3.0),
        TypeError,
        "kernel_size must be an int or a pair of them, got 3.0",
    ),
    "kernel too large": (
        dict(kernel_size=9, factor=torch.zeros(324, 324)),
        ValueError,
        r"must fit in the padded x, got kernel_size \(9, 9\)",
    ),
    "stride": (
        dict(stride=(1, 0)),
        ValueError,
        r"stride must be one or two numbers >= 1 .*, got \(1, 0\)",
    ),
    "padding": (dict(padding=-1), ValueError, "padding must be one or two numbers >= 0 .*, got -1"),
    "padding name": (
        dict(padding="reflect"),
        ValueError,
        "padding must be one of valid, same, got 'reflect'",
    ),
    "padding same": (
        dict(padding="same", kernel_size=2, factor=torch.zeros(16, 16)),
        ValueError,
        "padding 'same' must be symmetric",
    ),
    "dilation": (
        dict(dilation=(1, 2, 3)),
        ValueError,
        r"dilation must be one or two numbers >= 1 .*, got \(1, 2, 3\)",
    ),
    "sharing": (
        dict(sharing="mean"),
        ValueError,
        "sharing must be one of expand, reduce, got 'mean'",
    ),
    "decay": (dict(decay=1.5), ValueError, r"decay must be finite and in \[0.0, 1.0\], got 1.5"),
    "decay below": (dict(decay=-0.1), ValueError, r"decay must be finite and in .*, got -0.1"),
    "decay nan": (dict(decay=math.nan), ValueError, r"decay must be finite and in .*, got nan"),
    "decay text": (dict(decay="0.5"), TypeError, "decay must be a number, got str"),
    "decay vector": (
        dict(decay=torch.ones(1)),
        ValueError,
        r"decay must be a number or a 0-d tensor, got \[1\]",
    ),
    "scale": (dict(scale=math.nan), ValueError, "scale must be finite"),
    "devices": (
        dict(x=X.to("meta")),
        ValueError,
        "all tensors must be on one device, got factor on cpu and x on meta",
    ),
    "decay elsewhere": (
        dict(decay=torch.tensor(0.5, device="meta")),
        ValueError,
        "all tensors must be on one device, got factor on cpu and decay on meta",
    ),
    "factor sparse": (
        dict(factor=F.to_sparse()),
        TypeError,
        r"factor must be a dense \(strided\) tensor, got layout torch.sparse_coo",
    ),
    "lengths": (
        dict(factor=[F.clone(), F.clone()], x=[X]),
        ValueError,
        "the lists must have the same length, got factor: 2, x: 1",
    ),
    "no tensor": (dict(x=3), TypeError, "x must be a tensor or a list of tensors, got int"),
    "dtype": (
        dict(x=X.int()),
        TypeError,
        "x must have dtype float32, bfloat16, float16, float64, got int32",
    ),
    "state dtype": (
        dict(factor=F.double()),
        TypeError,
        "factor must have dtype float32, got float64",
    ),
    "list": (dict(x=[X]), TypeError, "factor and x must all be tensors or all be lists"),
    "expanded": (
        dict(factor=torch.zeros(1, 36).expand(36, 36)),
        ValueError,
        "factor is written in place and must not overlap itself",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    change, kind, text = ERRORS[name]
    arguments = dict(factor=F.clone(), x=X, kernel_size=3, padding=1, decay=0.5) | change
    factor, x = arguments.pop("factor"), arguments.pop("x")
    with pytest.raises(kind, match=text):
        kron_factor_conv2d_update_(factor, x, **arguments)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
def test_refused_dtypes_and_layouts(kind):
    with pytest.raises(
        TypeError, match=r"x must (have dtype float32, bfloat16, float16, float64|be a dense)"
    ):
        kron_factor_conv2d_update_(
            F.clone(), refused(kind, 2, 4, 5, 5), kernel_size=3, padding=1, decay=0.5
        )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_overlapping_memory_is_refused(sharing):
    memory = torch.zeros(2000)
    with pytest.raises(ValueError, match=r"factor\[0\] and x\[0\]|x\[0\] and factor\[0\]"):
        kron_factor_conv2d_update_(
            memory[:1296].view(36, 36),
            memory[1000:1100].view(1, 4, 5, 5),
            kernel_size=3,
            decay=0.5,
            sharing=sharing,
        )
    assert (memory == 0).all()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_one_factor_for_two_images_is_refused(sharing):
    with pytest.raises(ValueError, match=r"factor\[1\] and factor\[0\] overlap in memory"):
        kron_factor_conv2d_update_(
            [F, F], [X, X], kernel_size=3, decay=0.5, padding=1, sharing=sharing
        )
