# SPDX-License-Identifier: Apache-2.0
"""Shapes, dtypes, layouts, spectra and error budgets shared by the tests of all ops."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATE_DTYPES = (torch.float32, torch.float64)
ODD_SIZES = (1, 3, 17, 63, 65, 127, 129)


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def state_dtype(dtype):
    """The dtype of the state that belongs to inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def small_integers(*shape, dtype=torch.float32, device="cpu"):
    """Products and sums of a few thousand of these are exact in fp32, in any order."""
    return torch.randint(-3, 4, shape).to(device=device, dtype=dtype)


# ---- layouts: the same values at other addresses ----


def _in_buffer(x, shape, index):
    buffer = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[index]
    view.copy_(x)
    return view


def offset_by_one(x):
    """``x`` starting one element behind an aligned address."""
    buffer = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


MATRIX_LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows_sliced": lambda x: _in_buffer(
        x, (2 * x.shape[0], x.shape[1]), (slice(None, None, 2), slice(None))
    ),
    "columns_sliced": lambda x: _in_buffer(
        x, (x.shape[0], 2 * x.shape[1]), (slice(None), slice(None, None, 2))
    ),
    "channels_last_like": lambda x: _in_buffer(
        x, (x.shape[0], 3, x.shape[1]), (slice(None), 1, slice(None))
    ),
    "offset_by_one": offset_by_one,
}


# ---- guard bands ----


def guarded(values, margin=64, contiguous=True):
    """A copy of ``values`` inside a buffer of NaN, and a function that checks the NaN around it."""
    if contiguous or values.dim() == 0:
        buffer = torch.full(
            (values.numel() + 2 * margin,), torch.nan, dtype=values.dtype, device=values.device
        )
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        inside[margin : margin + values.numel()] = True
        view = buffer[margin : margin + values.numel()].view(values.shape)
    else:
        shape = [n + 2 * margin for n in values.shape]
        buffer = torch.full(shape, torch.nan, dtype=values.dtype, device=values.device)
        index = tuple(slice(margin, margin + n) for n in values.shape)
        inside = torch.zeros(shape, dtype=torch.bool, device=values.device)
        inside[index] = True
        view = buffer[index]
    view.copy_(values)

    def check():
        assert buffer[~inside].isnan().all(), "memory around the output was written"

    return view, check


# ---- addresses and memory ----

# More elements than an int32 counts.
FAR = 2**31 + 24


def far_apart(values, dim, folder):
    """``values``, of size 2 in ``dim``, with the two halves further apart than int32 reaches.

    On a CPU in a file that is empty but for them: it takes no memory.
    """
    assert values.shape[dim] == 2
    rest = list(values.shape)
    rest[dim] = 1
    strides = list(torch.empty(rest, device="meta").stride())
    strides[dim] = FAR
    count = FAR + values.numel()
    if values.is_cuda:
        free, _ = torch.cuda.mem_get_info()
        if free < 2 * count * values.element_size():
            pytest.skip(f"{free >> 30} GB of GPU memory are free")
        buffer = torch.empty(count, dtype=values.dtype, device=values.device)
    else:
        name = folder / f"far_apart_{len(list(folder.iterdir()))}"
        buffer = torch.from_file(str(name), shared=True, size=count, dtype=values.dtype)
    return buffer.as_strided(values.shape, strides).copy_(values)


# Run as `python -c ... name`: calls of an op with less and less memory, from enough to none at all.
_SHORT_OF_MEMORY = """
import resource, sys, torch
import grng_kernels as gk
torch.set_num_threads(2)
make, call = __import__(sys.argv[1], fromlist=["x"]).SHORT_OF_MEMORY[sys.argv[2]]
arguments, states = make()
before = [s.clone() for s in states]
with gk.use_backend("cpu"):
    call(arguments)
    want = [s.clone() for s in states]
    failures = successes = 0
    free = int(sys.argv[3])
    while free > 0:
        for s, b in zip(states, before):
            s.copy_(b)
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + free, resource.RLIM_INFINITY))
        try:
            call(arguments)
            wanted, successes = want, successes + 1
        except (MemoryError, RuntimeError) as error:
            wanted, failures = before, failures + 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        for s, w in zip(states, wanted):
            assert torch.equal(s, w), f"changed with {free} bytes to spare"
        free = free * 3 // 5 - 4096
assert failures and successes, (failures, successes)
"""


def assert_memory_that_ends_changes_nothing(module, name, enough):
    """Call an op on the CPU kernel with ever less memory: it does all of its work or none.

    ``module.SHORT_OF_MEMORY[name]`` is ``(make, call)``: ``make()`` returns the arguments of ``call`` and the
    states among them. ``enough`` is how many bytes are more than the call takes.
    """
    done = subprocess.run(
        [sys.executable, "-c", _SHORT_OF_MEMORY, module, name, str(enough)],
        # What is freed goes back to the system, and every larger piece must be asked for again.
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"}
        | {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# ---- matrices ----


def spd(n, kind="random", dtype=torch.float32, device="cpu"):
    """A symmetric positive semidefinite matrix of order ``n`` with the named spectrum, norm about 1."""
    if kind == "zero":
        return torch.zeros(n, n, dtype=dtype, device=device)
    if kind == "random":
        x = torch.randn(n + n // 2 + 1, n, dtype=torch.float64)
        a = x.mT @ x / x.shape[0]
    elif kind == "rank1":
        v = torch.randn(n, 1, dtype=torch.float64)
        a = v @ v.mT / v.square().sum()
    else:
        q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
        if kind == "clustered":
            spectrum = torch.where(torch.arange(n) % 2 == 0, 1.0, 1e-3).double()
        elif kind == "cond1e8":
            spectrum = torch.logspace(0, -8, n, dtype=torch.float64)
        else:
            raise ValueError(f"unknown kind of matrix: {kind}")
        a = (q * spectrum) @ q.mT
    a = ((a + a.mT) / 2).to(dtype)
    return a.to(device)


SPECTRA = ("random", "rank1", "clustered", "cond1e8", "zero")


def inverse64(matrix):
    """The inverse of an SPD matrix by Cholesky in fp64, on the CPU."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix.double().cpu()))


# ---- error budgets ----


def assert_within_budget(got, ref64, base, factor=2, floor=None):
    """Assert that ``got`` errs at most ``factor`` times as much as ``base``, both against ``ref64``.

    Both the largest and the mean error are held to it. ``floor`` is absolute; by default it is half a
    unit in the last place of the largest value, the error of rounding a perfect result once. A few
    numbers are no sample: one of them may be exact by luck, so there it is four units.
    """
    unit = torch.finfo(got.dtype).eps * (0.5 if got.numel() >= 64 else 4)
    got, ref, base = (t.detach().double().cpu() for t in (got, ref64, base))
    assert got.shape == ref.shape == base.shape, (got.shape, ref.shape, base.shape)
    if ref.numel() == 0:
        return
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} of {got.numel()} are not finite"
    if floor is None:
        floor = unit * ref.abs().max().item()
    for name, reduce in (("largest", torch.max), ("mean", torch.mean)):
        error, allowed = reduce((got - ref).abs()).item(), reduce((base - ref).abs()).item()
        assert error <= factor * allowed + floor, (
            f"{name} error {error:.3e} > {factor} x {allowed:.3e} + {floor:.1e} "
            f"(values up to {ref.abs().max().item():.3e})"
        )


# ---- surroundings that must not matter ----


@contextlib.contextmanager
def threads(count):
    """Run torch on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _reduced_precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
        assert torch.get_float32_matmul_precision() == name, "the user's switch was changed"
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Switches that users turn for their model and that must not change our results.
USER_SWITCHES = {
    "matmul_high": lambda: _reduced_precision("high"),
    "matmul_medium": lambda: _reduced_precision("medium"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": _deterministic,
    "inference_mode": torch.inference_mode,
    "default_dtype": lambda: _default_dtype(torch.float64),
}


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
