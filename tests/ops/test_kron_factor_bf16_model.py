# SPDX-License-Identifier: Apache-2.0
"""The path of ``kron_factor_update_`` for CPUs with bf16 dot products, the instruction replaced by a model.

Layout, order and the handling of odd rows are the kernel's own. What only such a CPU shows is not seen here:
whether the instruction does what its manual says.
"""

import ctypes
import math
import pathlib
import shutil
import subprocess

import pytest
import torch

import grng_kernels as gk
from grng_kernels import Info, kron_factor_update_
from tests.cases import MATRIX_LAYOUTS, assert_within_budget, small_integers

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
SOURCE = pathlib.Path(__file__).with_name("kron_factor_bf16_model.cpp")
# Rows shared out and tiles shared out; odd rows, and one; block edges of both.
SHAPES = [(1, 1), (1, 17), (2, 3), (63, 65), (97, 48), (600, 33), (481, 400), (257, 350)]
shapes = pytest.mark.parametrize(("rows", "n"), SHAPES, ids=str)
biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A function like the public one, for one contiguous factor."""
    library = tmp_path_factory.mktemp("model") / "model.so"
    flags = ["-O1", "-std=c++20", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC"]
    done = subprocess.run(
        ["g++", *flags, str(SOURCE), "-o", str(library)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = ctypes.CDLL(str(library)).kron_factor_bf16_model

    def call(factor, x, *, decay, scale, bias=False):
        number, size = ctypes.c_double, ctypes.c_int64
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (factor, x)]
        sizes = [size(v) for v in (*x.shape, *x.stride())]
        return run(*pointers, *sizes, ctypes.c_bool(bias), number(decay), number(scale))

    return call


def case(rows, n, bias):
    factor = torch.randn(n, n)
    return factor @ factor.mT / n, torch.randn(rows, n - bias).bfloat16()


def yardstick(factor, x, decay, scale, bias):
    x = x.double()
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1) if bias else x
    return decay * factor.double() + scale * (x.mT @ x)


@shapes
@biases
def test_small_integers_are_exact(model, rows, n, bias):
    factor = small_integers(n, n)
    factor = 4 * (factor + factor.mT)
    x = small_integers(rows, n - bias, dtype=torch.bfloat16)
    want = yardstick(factor, x, 0.5, 0.25, bias)
    assert model(factor, x, decay=0.5, scale=0.25, bias=bias) == Info.OK
    assert torch.equal(factor.double(), want)


@shapes
@biases
def test_every_bit_is_that_of_the_fp32_kernel(model, rows, n, bias):
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    factor, x = case(rows, n, bias)
    # In fp32 the public function runs the products one by one on any CPU. The sums alone: whether the
    # compiler fuses the average of old and new is up to its switches.
    want = factor.clone()
    kron_factor_update_(want, x.float(), decay=0.0, scale=0.25, bias=bias)
    assert model(factor, x, decay=0.0, scale=0.25, bias=bias) == Info.OK
    assert torch.equal(factor, want)


@pytest.mark.parametrize("shape", [(2048, 64), (481, 400)], ids=str)
def test_error_is_at_most_twice_that_of_torch(model, shape):
    factor, x = case(*shape, False)
    base = 0.9 * factor + 0.1 * (x.float().mT @ x.float())
    want = yardstick(factor, x, 0.9, 0.1, False)
    model(factor, x, decay=0.9, scale=0.1)
    assert_within_budget(factor, want, base)


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layout_does_not_matter(model, layout):
    factor, x = case(97, 65, False)
    want = factor.clone()
    model(want, x, decay=0.5, scale=0.25)
    model(factor, MATRIX_LAYOUTS[layout](x), decay=0.5, scale=0.25)
    assert torch.equal(factor, want)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("row", [0, 1, 96])
@pytest.mark.parametrize("n", [65, 400])
def test_nonfinite_input_leaves_the_factor(model, value, row, n):
    factor, x = case(97, n, False)
    x[row, -1] = value
    before = factor.clone()
    assert model(factor, x, decay=0.5, scale=0.25) == Info.NONFINITE_INPUT
    assert torch.equal(factor, before)


def test_denormals_count_as_zero(model):
    factor, x = torch.zeros(2, 2), torch.tensor([[1e-39, 2.0]]).bfloat16()
    assert model(factor, x, decay=0.5, scale=1.0) == Info.OK
    assert torch.equal(factor, torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
