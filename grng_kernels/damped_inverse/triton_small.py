# SPDX-License-Identifier: Apache-2.0
"""The damped inverse of matrices up to order 128 in Triton: one program each, all of it in registers.

A program loads its matrix, scales it by a power of two, estimates its norm, inverts it and measures the
residual; the host waits for nothing and gives no memory besides a table (``_table.py``). All matrices of a
call up to order 64 share one launch, and so do all larger ones.

Two methods:

- ``_eliminate``: Gauss-Jordan elimination of symmetric blocks of 16, whose large products run on tensor
  cores. It needs no bound of the condition number.
- ``_newton_schulz``: a number of products fixed by ``rho``, whose coefficients are read from memory: one
  compiled kernel serves every ``rho``. Up to order 64.

``"auto"`` is elimination for every tile size, also where ``rho`` would allow Newton-Schulz. From the machine
code for sm_90 (``benchmarks/predict.py``): at order 64 eliminating two columns takes about 450 cycles and a
block beside that 1,000, in all 18,000. A product takes about 5,000, most of it waiting for the other warps,
and ``rho`` 1e-2 needs eight. At order 128 the products do not even fit into registers. Elimination also has
an error that does not grow with the condition number faster than that of Cholesky.

Two launches and not one: order 128 needs 8 warps and with them all registers of a multiprocessor, where two
of the small programs find room. Not four either: tiles of 16, 32 and 64 in one kernel take no more registers
than the largest alone, and three launches one after another would add up their times.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels import _table
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.probes import COUNT
from grng_kernels.damped_inverse.reference import DAMPING_BITS, FLOOR, MARGIN, RESIDUAL_LIMIT
from grng_kernels.damped_inverse.schedule import newton_schulz_schedule
from grng_kernels.damped_inverse.spectral_norm import SAFETY, STEPS
from grng_kernels.damped_inverse.triton_compensated import _two_sum
from grng_kernels.info import Info

# The largest orders of the two launches.
SMALL, LARGEST = 64, 128
# Warps of a program: ``(small or large, direct or not)``. With fewer the registers do not suffice.
WARPS = {(False, True): 4, (False, False): 8, (True, True): 8}
# How products are taken. Three TF32 products reach fp32 accuracy.
PRECISION = "tf32x3"

# What the table holds of one matrix, in this order.
FIELDS = (
    "factor", "damping", "vector", "inverse", "used_damping", "spectral_norm", "residual", "info",
    "n", "row", "column", "kind",
)  # fmt: skip
(
    _FACTOR, _DAMPING, _VECTOR, _INVERSE, _USED, _NORM, _RESIDUAL, _INFO, _N, _ROW, _COLUMN, _KIND,
) = map(tl.constexpr, range(len(FIELDS)))  # fmt: skip
_FIELDS = tl.constexpr(len(FIELDS))
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_BLOCK = tl.constexpr(16)
_PROBES = tl.constexpr(COUNT)
_ROUNDS = tl.constexpr(STEPS // 4)
_SAFETY, _MARGIN = tl.constexpr(SAFETY), tl.constexpr(MARGIN)
_FLOOR, _LIMIT = tl.constexpr(FLOOR), tl.constexpr(RESIDUAL_LIMIT)
_DAMPING_BITS = tl.constexpr(DAMPING_BITS)
_OK, _NONFINITE = tl.constexpr(int(Info.OK)), tl.constexpr(int(Info.NONFINITE_INPUT))
_NOT_CONVERGED = tl.constexpr(int(Info.NOT_CONVERGED))
_OVERFLOW = tl.constexpr(int(Info.OVERFLOW))
# Bits of infinity; those of NaN are larger, those of finite magnitudes smaller.
_INFINITY = tl.constexpr(0x7F800000)


def supports(n: int, method: str = "auto") -> bool:
    """Return whether matrices of this order are served by this method."""
    # The three matrices of a Newton-Schulz step of order 128 take more registers than a program has.
    return 1 <= n <= (SMALL if method == "newton_schulz" else LARGEST)


@triton.jit
def _magnitude(x):
    # As integers, magnitudes keep their order, and NaN comes last: a maximum of floats would drop it.
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(x, exponent):
    # In two halves: 2^exponent alone can leave the range of fp32 where the product does not.
    half = exponent >> 1
    return x * _power(half) * _power(exponent - half)


@triton.jit
def _exponent(bits):
    # That of frexp. A number below the normal range is first lifted into it.
    lifted = (bits.to(tl.float32, bitcast=True) * 18446744073709551616.0).to(tl.int32, bitcast=True)
    tiny = bits < 0x00800000
    return tl.where(tiny, (lifted >> 23) - 64, bits >> 23) - 126


@triton.jit
def _order(item):
    # Volatile, and read again by each part of the program: otherwise the compiler keeps the addresses and
    # the masks of all elements from one part to the next, which are more than there are registers.
    return tl.load(item + _N, volatile=True).to(tl.int32)


@triton.jit
def _load(item, TILE: tl.constexpr):
    # Neighbouring threads read neighbours along ``i``; the host gives that index the smaller stride.
    # Products of indices and strides are int64: they pass 2^31 long before memory ends.
    n, kind = _order(item), tl.load(item + _KIND)
    address = tl.load(item + _FACTOR)
    row, column = tl.load(item + _ROW), tl.load(item + _COLUMN)
    i = tl.arange(0, TILE)[:, None]
    # A branch and not a variant: one launch serves every dtype. The place of the inverse is still free.
    if kind != 0:
        inverse = tl.load(item + _INVERSE)
        CHUNK: tl.constexpr = min(TILE, 16)
        for first in range(0, n, CHUNK):
            j = first + tl.arange(0, CHUNK)[None, :]
            inside = (i < n) & (j < n)
            # As bits, so that both 16-bit types share the reads.
            pointers = address.to(tl.pointer_type(tl.int16)) + i.to(tl.int64) * row
            bits = tl.load(pointers + j.to(tl.int64) * column, mask=inside, other=0)
            bf16 = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            x = tl.where(kind == 1, bf16, bits.to(tl.float16, bitcast=True).to(tl.float32))
            target = inverse.to(tl.pointer_type(tl.float32)) + (i + j * n).to(tl.int64)
            tl.store(target, x, mask=inside)
        tl.debug_barrier()
        address, row, column = inverse, tl.full((), 1, tl.int64), n.to(tl.int64)
    j = tl.arange(0, TILE)[None, :]
    pointers = address.to(tl.pointer_type(tl.float32)) + i.to(tl.int64) * row
    return tl.load(pointers + j.to(tl.int64) * column, mask=(i < n) & (j < n), other=0.0)


@triton.jit
def _unit(v):
    length = tl.sqrt_rn(tl.sum(v * v, axis=0))
    return v / tl.where(length > 0, length, 1.0)


@triton.jit
def _spectral_norm(a, vector_ptr, n, TILE: tl.constexpr):
    # ``spectral_norm.py``. Only rows are summed: a thread holds large parts of them.
    i, j = tl.arange(0, TILE), tl.arange(0, TILE)[None, :]
    squares = tl.sum(a * a, axis=1)
    longest = tl.argmax(squares, axis=0)
    start = _unit(tl.sum(tl.where(j == longest, a, 0.0), axis=1))
    given = tl.load(vector_ptr + i, mask=i < n, other=0.0)
    largest = tl.max(_magnitude(given), axis=0)
    known = (largest > 0) & (largest < _INFINITY)
    v = tl.where(known, _unit(given + 1e-3 * start), start)
    for _ in range(_ROUNDS):
        # Entries are at most 1, so in four products no length leaves the range.
        for _ in range(4):
            v = tl.sum(a * v[None, :], axis=1)
        v = _unit(v)
    rayleigh = tl.sum(v * tl.sum(a * v[None, :], axis=1), axis=0)
    rows = tl.max(tl.sum(tl.abs(a), axis=1), axis=0)
    frobenius = tl.sqrt_rn(tl.sum(squares, axis=0))
    diagonal = tl.sum(tl.where(j == i[:, None], a, 0.0), axis=1)
    lower = tl.max(tl.where(i < n, diagonal, -float("inf")), axis=0)
    # Of a matrix that is indefinite by rounding the trace could be below the largest entry.
    trace = tl.maximum(tl.sum(diagonal, axis=0), lower)
    upper = tl.minimum(tl.minimum(rows, frobenius), trace)
    return tl.minimum(tl.maximum(_SAFETY * rayleigh, lower), upper), v


@triton.jit
def _columns(x, k, TILE: tl.constexpr, CHUNK: tl.constexpr):
    # Which thread holds an element does not depend on the chunk of columns: the sum only selects.
    number = tl.arange(0, TILE // CHUNK)[None, :, None]
    chunks = tl.reshape(x, (TILE, TILE // CHUNK, CHUNK))
    return tl.sum(tl.where(number == k, chunks, 0.0), axis=1)


@triton.jit
def _row(x, p):
    return tl.sum(tl.where(tl.arange(0, _BLOCK)[:, None] == p, x, 0.0), axis=0)


@triton.jit
def _column(x, p):
    return tl.sum(tl.where(tl.arange(0, _BLOCK)[None, :] == p, x, 0.0), axis=1)[:, None]


@triton.jit
def _column_of_blocks(x, p):
    return tl.sum(tl.where(tl.arange(0, _BLOCK)[None, None, :] == p, x, 0.0), axis=2)[:, :, None]


@triton.jit
def _element(x, p):
    return tl.sum(tl.where(tl.arange(0, _BLOCK) == p, x, 0.0), axis=0)


@triton.jit
def _reciprocal(pivot):
    # A matrix that is not positive definite becomes NaN, and so does its residual.
    return tl.where(pivot > 0, 1.0 / pivot, float("nan"))


@triton.jit
def _panel(panel, k, BLOCKS: tl.constexpr):
    # Eliminates 16 columns, ``panel [BLOCKS, 16, 16]``; the pivots are in its block ``k``. Every warp holds
    # a copy of that block, so that no step waits for another warp. Two columns at a time: what the second
    # needs of the first is known before it begins, and the chain of sums has half as many links.
    # Returns the columns as they were when their turn came, and the same divided by the pivots.
    own = tl.arange(0, BLOCKS)[:, None, None] == k
    i, j = tl.arange(0, _BLOCK)[None, :, None], tl.arange(0, _BLOCK)[None, None, :]
    pivot = tl.sum(tl.where(own, panel, 0.0), axis=0)
    kept, inverses = tl.zeros_like(panel), tl.zeros((1, 1, _BLOCK), tl.float32)
    for p in range(0, _BLOCK, 2):
        q = p + 1
        row0, row1 = _row(pivot, p), _row(pivot, q)
        column0, column1 = _column(pivot, p), _column(pivot, q)
        a, b, c = _element(row0, p), _element(row0, q), _element(row1, q)
        inverse0 = _reciprocal(a)
        t = b * inverse0
        inverse1 = _reciprocal(c - b * t)
        row1 -= t * row0
        weight0 = column0 * inverse0
        weight1 = (column1 - weight0 * b) * inverse1
        pivot = pivot - weight0 * row0[None, :] - weight1 * row1[None, :]

        column0, column1 = _column_of_blocks(panel, p), _column_of_blocks(panel, q)
        is_first, is_second = own & (i == p), own & (i == q)
        column0 = tl.where(is_first, -1.0, column0)
        weight0 = column0 * inverse0
        column1 = tl.where(is_first, 0.0, column1) - weight0 * b
        column1 = tl.where(is_second, -1.0, column1)
        weight1 = column1 * inverse1
        kept = tl.where(j == p, column0, tl.where(j == q, column1, kept))
        inverses = tl.where(j == p, inverse0, tl.where(j == q, inverse1, inverses))
        panel = tl.where(is_first | is_second, 0.0, panel)
        panel -= (
            tl.where(is_second, 0.0, weight0) * row0[None, None, :] + weight1 * row1[None, None, :]
        )
    # What a row had before its turn was dropped when it came.
    kept = tl.where(own & (i > j), 0.0, kept)
    return kept, kept * inverses


@triton.jit
def _eliminate(a, n, TILE: tl.constexpr, PRECISION: tl.constexpr):
    # Symmetric Gauss-Jordan elimination by blocks of 16 columns: after the last block ``a`` is minus its
    # inverse. The pivots of a block are not inverted together: its columns would lose the square of the
    # condition number. Rows and columns of the block become zero first, so that the product yields them
    # together with the update of the rest.
    BLOCKS: tl.constexpr = TILE // _BLOCK
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    for k in range(tl.cdiv(n, _BLOCK)):
        panel = tl.reshape(_columns(a, k, TILE, _BLOCK), (BLOCKS, _BLOCK, _BLOCK))
        kept, weights = _panel(panel, k, BLOCKS)
        kept, weights = tl.reshape(kept, (TILE, _BLOCK)), tl.reshape(weights, (TILE, _BLOCK))
        update = tl.dot(weights, tl.trans(kept), input_precision=PRECISION)
        a = tl.where((i // _BLOCK == k) | (j // _BLOCK == k), 0.0, a) - update
    return -a


@triton.jit
def _product(x, y, TILE: tl.constexpr, PRECISION: tl.constexpr):
    # ``x y`` for symmetric ``y``; at once it would take more registers than there are.
    CHUNK: tl.constexpr = min(TILE, 16)
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(TILE // CHUNK):
        left, right = _columns(x, k, TILE, CHUNK), _columns(y, k, TILE, CHUNK)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def _newton_schulz(b, schedule_ptr, steps, TILE: tl.constexpr, PRECISION: tl.constexpr):
    # The first step from a multiple of the identity is a polynomial of first degree in ``b``.
    eye = tl.arange(0, TILE)[:, None] == tl.arange(0, TILE)[None, :]
    x = tl.where(eye, tl.load(schedule_ptr), 0.0) + tl.load(schedule_ptr + 1) * b
    b_diagonal = tl.sum(tl.where(eye, b, 0.0), axis=0)
    b = tl.where(eye, 0.0, b)
    for step in range(steps):
        own = tl.load(schedule_ptr + 2 + 2 * step)
        change = tl.load(schedule_ptr + 3 + 2 * step)
        # X B, the transpose of B X: of the two factors of each product the right one is then symmetric.
        # From b in every step and never symmetrised: that keeps it self-correcting.
        error = _product(tl.where(eye, 0.0, x), b, TILE, PRECISION)
        x_diagonal = tl.sum(tl.where(eye, x, 0.0), axis=1)
        # The rest of ``_last_residual``, what rounding the products drops, would not fit into registers.
        total, rest = _two_sum(x_diagonal[:, None] * b, x * b_diagonal[None, :])
        total, last = _two_sum(total, error)
        error = (tl.where(eye, 1.0, 0.0) - total) - (rest + last)
        # p·X + q·R·X as (p + q)·X - q·(I - R)·X: rounding of the product shrinks with the error.
        x = own * x - change * _product(error, x, TILE, PRECISION)
        x = (x + tl.trans(x)) * 0.5
    return x


@triton.jit
def _probes(first, n, ROWS: tl.constexpr):
    # ``probes.py``, in 32 bits: rows from ``first`` on.
    i, j = first + tl.arange(0, ROWS)[:, None], tl.arange(0, _PROBES)[None, :]
    h = (i * _PROBES + j).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    signs = tl.where((h >> 31) != 0, -1.0, 1.0)
    return tl.where(i < n, tl.where(n <= _PROBES, tl.where(i == j, 1.0, 0.0), signs), 0.0)


@triton.jit
def _residual(x, item, TILE: tl.constexpr, PRECISION: tl.constexpr):
    # ``x`` is in registers and the damped matrix in memory; both are multiplied a few columns at a time,
    # which takes few registers beside ``x``.
    n = _order(item)
    damped_ptr = tl.load(item + _INVERSE).to(tl.pointer_type(tl.float32))
    CHUNK: tl.constexpr = min(TILE, 32)
    CHUNKS: tl.constexpr = TILE // CHUNK
    number = tl.arange(0, CHUNKS)
    y = tl.zeros((TILE, _PROBES), tl.float32)
    for k in range(CHUNKS):
        columns = _columns(x, k, TILE, CHUNK)
        y = tl.dot(columns, _probes(k * CHUNK, n, CHUNK), y, input_precision=PRECISION)
    parts = tl.reshape(y, (CHUNKS, CHUNK, _PROBES))
    product = tl.zeros((TILE, _PROBES), tl.float32)
    i = tl.arange(0, TILE)[:, None]
    for k in range(CHUNKS):
        j = k * CHUNK + tl.arange(0, CHUNK)[None, :]
        # The matrix is symmetric: its rows stand for its columns.
        columns = tl.load(damped_ptr + (i * n + j).to(tl.int64), mask=(i < n) & (j < n), other=0.0)
        rows = tl.sum(tl.where(number[:, None, None] == k, parts, 0.0), axis=0)
        product = tl.dot(columns, rows, product, input_precision=PRECISION)
    rest = tl.where(i < n, _probes(0, n, TILE) - product, 0.0)
    samples = tl.where(n <= _PROBES, n, n * _PROBES)
    return tl.sqrt_rn(tl.sum(tl.sum(rest * rest, axis=1), axis=0) / samples)


@triton.jit
def _store(item, x, TILE: tl.constexpr):
    # What is there has been read by all warps.
    tl.debug_barrier()
    n = _order(item)
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    inverse_ptr = tl.load(item + _INVERSE).to(tl.pointer_type(tl.float32))
    tl.store(inverse_ptr + (i * n + j).to(tl.int64), x, mask=(i < n) & (j < n))


@triton.jit
def _invert(
    item,
    schedule_ptr,
    steps,
    root_rho,
    TILE: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    n, diagonal = _order(item), i == j
    a = _load(item, TILE)
    largest = tl.max(tl.max(_magnitude(a), axis=1), axis=0)
    finite = largest < _INFINITY
    a = tl.where(finite, a, tl.where(diagonal & (i < n), 1.0, 0.0))
    exponent = _exponent(tl.where(finite & (largest > 0), largest, 0x3F800000))
    if DIRECT:
        # A damping far above a fading matrix would leave the range of fp32.
        given = tl.load(item + _DAMPING).to(tl.pointer_type(tl.float32))
        given = tl.load(given, mask=root_rho <= 0, other=0.0)
        legal = (given > 0) & (given < float("inf"))
        own = _exponent(_magnitude(given)) - _DAMPING_BITS
        exponent = tl.where(legal, tl.maximum(exponent, own), exponent)
    a = _scaled(a, -exponent)
    a = (a + tl.trans(a)) * 0.5

    vector_ptr = tl.load(item + _VECTOR).to(tl.pointer_type(tl.float32))
    norm, vector = _spectral_norm(a, vector_ptr, n, TILE)
    if root_rho > 0:
        shift = tl.maximum(root_rho * norm, _scaled(tl.full((), _FLOOR, tl.float32), -exponent))
    else:
        damping = tl.load(tl.load(item + _DAMPING).to(tl.pointer_type(tl.float32)))
        usable = (damping > 0) & (damping < float("inf"))
        finite = finite & usable
        shift = _scaled(tl.where(finite, damping, 1.0), -exponent)
    used_ptr = tl.load(item + _USED).to(tl.pointer_type(tl.float32))
    norm_ptr = tl.load(item + _NORM).to(tl.pointer_type(tl.float32))
    tl.store(used_ptr, _scaled(shift, exponent))
    tl.store(norm_ptr, _scaled(norm, exponent))
    # Outside of the matrix the identity, which no step mixes with the inside.
    a = tl.where(diagonal, tl.where(i < n, a + shift, 1.0), a)
    # It is needed once more, for the residual, and until then only in the way.
    _store(item, a, TILE)
    if DIRECT:
        x = _eliminate(a, n, TILE, PRECISION)
        x = (x + tl.trans(x)) * 0.5
    else:
        scale = _MARGIN * norm + shift
        b = tl.where(diagonal & (i >= n), 1.0, a / scale)
        x = _newton_schulz(b, schedule_ptr, steps, TILE, PRECISION) / scale
    tl.debug_barrier()
    residual = _residual(x, item, TILE, PRECISION)

    x = _scaled(x, -exponent)
    n = _order(item)
    inside = (i < n) & (j < n)
    in_range = tl.max(tl.max(_magnitude(tl.where(inside, x, 0.0)), axis=1), axis=0) < _INFINITY
    info = tl.where(residual <= _LIMIT, tl.where(in_range, _OK, _OVERFLOW), _NOT_CONVERGED)
    info = tl.where(finite, info, _NONFINITE)
    # That of the identity, which stood in, says nothing.
    residual = tl.where(finite, residual, float("nan"))
    _store(item, x, TILE)
    residual_ptr = tl.load(item + _RESIDUAL).to(tl.pointer_type(tl.float32))
    info_ptr = tl.load(item + _INFO).to(tl.pointer_type(tl.int32))
    tl.store(residual_ptr, residual)
    tl.store(info_ptr, info)
    own = tl.arange(0, TILE)
    tl.store(vector_ptr + own, vector, mask=(own < n) & (info == _OK))


@triton.jit(do_not_specialize=["first", "steps"])
def _small_inverse_kernel(
    table_ptr,
    schedule_ptr,
    first,
    steps,
    root_rho,
    LARGE: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = table_ptr + (first + tl.program_id(0)).to(tl.int64) * _FIELDS
    n = tl.load(item + _N).to(tl.int32)
    if LARGE:
        _invert(item, schedule_ptr, steps, root_rho, 128, DIRECT, PRECISION)
    elif n <= 16:
        _invert(item, schedule_ptr, steps, root_rho, 16, DIRECT, PRECISION)
    elif n <= 32:
        _invert(item, schedule_ptr, steps, root_rho, 32, DIRECT, PRECISION)
    else:
        _invert(item, schedule_ptr, steps, root_rho, 64, DIRECT, PRECISION)


class Plan(NamedTuple):
    """One call on the device: the table, and how many matrices of each launch it holds."""

    table: Tensor
    small: int
    large: int


def _table_rows(entry: Entry) -> list[int]:
    """Return the table of the matrices of one entry."""
    n = entry.factor.shape[-1]
    batch, row, column = entry.factor.stride()
    if row > column:
        # The symmetric part of the transpose is the same. Neighbouring threads read along the first index.
        row, column = column, row
    rows: list[int] = []
    for k in range(entry.factor.shape[0]):
        rows += [
            entry.factor.data_ptr() + k * batch * entry.factor.element_size(),
            0 if entry.damping is None else entry.damping.data_ptr() + 4 * k,
            entry.vector.data_ptr() + 4 * k * n,
            entry.inverse.data_ptr() + 4 * k * n * n,
            *(t.data_ptr() + 4 * k for t in entry[4:]),
            n, row, column, KINDS[entry.factor.dtype],
        ]  # fmt: skip
    return rows


def _plan(entries: Sequence[Entry]) -> Plan:
    device = entries[0].factor.device
    small = [e for e in entries if e.factor.shape[-1] <= SMALL]
    large = [e for e in entries if e.factor.shape[-1] > SMALL]
    # The largest first: the last programs to start are then short ones.
    small.sort(key=lambda e: -e.factor.shape[-1])
    numbers = [number for e in (*small, *large) for number in _table_rows(e)]
    table = _table.upload(torch.tensor(numbers, dtype=torch.int64), device)
    return Plan(table, *(sum(e.factor.shape[0] for e in group) for group in (small, large)))


def _schedule(rho: float) -> tuple[list[float], int]:
    """Return the numbers that ``_newton_schulz`` reads, and how many steps follow the first."""
    # Below the rounding of an inverse in fp32.
    schedule = newton_schulz_schedule(1 + MARGIN * rho**-0.5, tolerance=1e-8)
    start = schedule.start
    if not schedule.steps:
        return [start, 0.0], 0
    (p, q), *rest = schedule.steps
    numbers = [start * p, start * start * q]
    for p, q in rest:
        numbers += [p + q, q]
    return numbers, len(rest)


def _key(entry: Entry) -> tuple[object, ...]:
    return (
        entry.factor.data_ptr(), entry.factor.shape, entry.factor.stride(), entry.factor.dtype,
        *(None if t is None else t.data_ptr() for t in entry[1:]),
    )  # fmt: skip


def launch(entries: Sequence[Entry], *, rho: float | None, method: str) -> None:
    """Fill in the results of entries of mixed orders up to 128, with no host sync.

    One launch for all matrices up to order 64, and one for all larger ones.

    Args:
        entries: fp32, bf16 or fp16 each; all with ``damping``, or none and ``rho``.
        rho: Relative regulariser, or None.
        method: ``"cholesky"`` stands for any direct method, here symmetric elimination.
    """
    entries = [e for e in entries if e.factor.numel()]
    if not entries:
        return
    device = entries[0].factor.device
    plan: Plan = _table.cached(
        ("small damped inverses", *map(_key, entries)), device, lambda: _plan(entries)
    )
    direct = method != "newton_schulz"
    numbers, steps = ([0.0], 0) if rho is None or direct else _schedule(rho)
    schedule = _table.cached(
        ("newton_schulz", *numbers),
        device,
        lambda: _table.upload(torch.tensor(numbers, dtype=torch.float32), device),
    )
    with torch.cuda.device_of(entries[0].factor):
        for first, count, large in ((0, plan.small, False), (plan.small, plan.large, True)):
            if count:
                _small_inverse_kernel[(count,)](
                    plan.table,
                    schedule,
                    first,
                    steps,
                    0.0 if rho is None else math.sqrt(rho),
                    LARGE=large,
                    DIRECT=direct,
                    PRECISION=PRECISION,
                    num_warps=WARPS[large, direct],
                    num_stages=1,
                )
