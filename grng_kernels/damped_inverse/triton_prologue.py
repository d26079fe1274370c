# SPDX-License-Identifier: Apache-2.0
"""What both methods for large matrices share on the GPU: the table, the workspace, and the damped matrices.

The launches before a method, each for all matrices of a call together:

1. ``_scan_kernel``: the largest magnitude of each matrix, by which NaN and infinity are found, and the scale.
2. ``_form_kernel``: the symmetric matrix, scaled by a power of two, in fp32 and in bf16, and its row sums.
3. ``_start_kernel``: the bounds of the norm and the start of its estimate.
4. ``_step_kernel``: one step of power iteration, 16 times. It reads the matrix in bf16: the direction of the
   leading vector is all that matters here, and an error of the direction counts squared.
5. The same kernel in fp32 for the Rayleigh quotient.
6. ``_shift_kernel``: the norm, and the damping onto the diagonal.

A program finds its matrix in a table on the device (``_table.py``). What it computes depends on that matrix
alone: grouped or alone, the result is the same bitwise.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels import _table
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.reference import DAMPING_BITS, FLOOR, MARGIN
from grng_kernels.damped_inverse.spectral_norm import SAFETY, STEPS

# Smaller matrices stay inside one program, in other kernels.
SMALLEST = 65
# Side of the smallest tile; every matrix is padded to a multiple of it.
TILE = 64
# Rows of one program that goes through a matrix once, and how many columns it reads at a time.
ROWS, COLUMNS = 32, 128
# The same where elements are read one by one, each with an address of its own.
GATHER_COLUMNS = 32
# Numbers that a program for a whole matrix reads at a time.
LINE = 1024
# Matrices that a program looks through at once.
CHUNK = 256
WARPS = 4

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Row(NamedTuple):
    """One row of the table: what the kernels know of a matrix. Offsets count elements of a workspace."""

    factor: int
    stride_row: int
    stride_column: int
    kind: int
    n: int
    padded: int
    damping: int
    vector: int
    inverse: int
    used_damping: int
    spectral_norm: int
    residual: int
    info: int
    square: int
    line: int
    blocks: int


# Kernels read module constants only as tl.constexpr.
_FIELDS = tl.constexpr(len(Row._fields))
_FACTOR = tl.constexpr(Row._fields.index("factor"))
_STRIDE_ROW = tl.constexpr(Row._fields.index("stride_row"))
_STRIDE_COLUMN = tl.constexpr(Row._fields.index("stride_column"))
_KIND = tl.constexpr(Row._fields.index("kind"))
_N = tl.constexpr(Row._fields.index("n"))
_PADDED = tl.constexpr(Row._fields.index("padded"))
_DAMPING = tl.constexpr(Row._fields.index("damping"))
_VECTOR = tl.constexpr(Row._fields.index("vector"))
_SQUARE = tl.constexpr(Row._fields.index("square"))
_LINE_AT = tl.constexpr(Row._fields.index("line"))
_BLOCKS = tl.constexpr(Row._fields.index("blocks"))

# What is found out about a matrix on the device, one fp32 number each. The exponent is that of the scaling
# of the matrix; the damping is given in the scaled units; `unscale` is the exponent of what the inverse is
# divided by in the end, and `top` an upper bound of the spectrum of the damped matrix.
STATE = ("finite", "exponent", "lower", "upper", "norm", "shift", "unscale", "top")
_STATE = tl.constexpr(len(STATE))
_FINITE, _EXPONENT, _LOWER, _UPPER, _NORM, _SHIFT, _UNSCALE, _TOP = map(
    tl.constexpr, range(len(STATE))
)
_FLOOR, _MARGIN, _SAFETY = map(tl.constexpr, (FLOOR, MARGIN, SAFETY))
_DAMPING_SHARE = tl.constexpr(2.0**-DAMPING_BITS)


@triton.jit
def _find(ends_ptr, count, number, CHUNK: tl.constexpr):
    # The part of a launch that program `number` belongs to, and its number inside. One load for all: a
    # search by halving would wait for memory at every step.
    index = tl.zeros((), dtype=tl.int32)
    first = tl.zeros((), dtype=tl.int64)
    for start in range(0, count, CHUNK):
        offs = start + tl.arange(0, CHUNK).to(tl.int64)
        ends = tl.load(ends_ptr + offs, mask=offs < count, other=0x7FFFFFFFFFFFFFFF)
        before = ends <= number
        index += tl.sum(before.to(tl.int32), axis=0)
        first = tl.maximum(first, tl.max(tl.where(before, ends, 0), axis=0))
    return index.to(tl.int64), (number - first).to(tl.int32)


@triton.jit
def _power(exponent):
    # 2^exponent for -126 <= exponent <= 127.
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scaled_down(x, exponent):
    # x·2^-exponent, exact inside the range of fp32. In two halves: 2^-exponent alone can leave it.
    half = tl.where(exponent < 0, -(-exponent // 2), exponent // 2)
    return x * _power(-half) * _power(half - exponent)


@triton.jit
def _exponent(x):
    # That of frexp: x is in [2^(e-1), 2^e). Subnormal numbers are made normal first.
    tiny = x < 1.1754943508222875e-38
    bits = tl.where(tiny, x * 4294967296.0, x).to(tl.int32, bitcast=True)
    return (bits >> 23) - 126 - tl.where(tiny, 32, 0)


@triton.jit
def _rounded(x):
    # To eight significant bits, to nearest; infinity and NaN never come here.
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _magnitudes(x):
    # Their order as integers is that of the magnitudes, with infinity and NaN above all finite numbers.
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _factor_tile(address, kind, offsets, mask):
    # Converted to fp32 from whatever the matrix is stored in.
    if kind == 0:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif kind == 1:
        halves = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0)
        x = halves.to(tl.float32)
    else:
        small = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0)
        x = small.to(tl.float32)
    return x


@triton.jit
def _largest(values_ptr, count, LINE: tl.constexpr):
    largest = tl.zeros((LINE,), dtype=tl.int32)
    offs = tl.arange(0, LINE).to(tl.int64)
    for start in range(0, count, LINE):
        mask = start + offs < count
        largest = tl.maximum(largest, tl.load(values_ptr + start + offs, mask=mask, other=0))
    return tl.max(largest, axis=0)


@triton.jit
def _total(values_ptr, count, LINE: tl.constexpr):
    total = tl.zeros((LINE,), dtype=tl.float32)
    offs = tl.arange(0, LINE).to(tl.int64)
    for start in range(0, count, LINE):
        mask = start + offs < count
        total += tl.load(values_ptr + start + offs, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["count"])
def _scan_kernel(
    table_ptr,
    ends_ptr,
    largest_ptr,
    count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index, block = _find(ends_ptr, count, tl.program_id(0), CHUNK)
    row = table_ptr + index * _FIELDS
    address, kind = tl.load(row + _FACTOR), tl.load(row + _KIND)
    stride_row, stride_column = tl.load(row + _STRIDE_ROW), tl.load(row + _STRIDE_COLUMN)
    n = tl.load(row + _N).to(tl.int32)
    offs_m = (block * ROWS + tl.arange(0, ROWS))[:, None]
    offs_n = tl.arange(0, COLUMNS)[None, :]
    bits = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for start in range(0, n, COLUMNS):
        columns = start + offs_n
        offsets = offs_m.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_column
        x = _factor_tile(address, kind, offsets, (offs_m < n) & (columns < n))
        bits = tl.maximum(bits, _magnitudes(x))
    largest = tl.max(tl.max(bits, axis=1), axis=0)
    # A damping far above a fading matrix would leave the range of fp32: it counts with the entries.
    given = tl.load(row + _DAMPING)
    damping = tl.load(given.to(tl.pointer_type(tl.float32)), mask=given != 0, other=0.0)
    right = (damping > 0) & (damping < float("inf"))
    least = tl.where(right, damping * _DAMPING_SHARE, 0.0).to(tl.int32, bitcast=True)
    tl.store(largest_ptr + tl.load(row + _BLOCKS) + block, tl.maximum(largest, least))


@triton.jit(do_not_specialize=["count"])
def _form_kernel(
    table_ptr,
    ends_ptr,
    state_ptr,
    largest_ptr,
    wide_ptr,
    high_ptr,
    low_ptr,
    squares_ptr,
    sums_ptr,
    count,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index, block = _find(ends_ptr, count, tl.program_id(0), CHUNK)
    row = table_ptr + index * _FIELDS
    address, kind = tl.load(row + _FACTOR), tl.load(row + _KIND)
    stride_row, stride_column = tl.load(row + _STRIDE_ROW), tl.load(row + _STRIDE_COLUMN)
    n, padded = tl.load(row + _N).to(tl.int32), tl.load(row + _PADDED).to(tl.int32)
    square = tl.load(row + _SQUARE) + (block * ROWS).to(tl.int64) * padded
    wide_ptr += square
    high_ptr += square
    low_ptr += square
    blocks = padded // ROWS
    bits = _largest(largest_ptr + tl.load(row + _BLOCKS), blocks, LINE)
    finite = bits < 0x7F800000
    largest = bits.to(tl.float32, bitcast=True)
    exponent = _exponent(tl.where(finite & (largest > 0), largest, 1.0))
    if block == 0:
        tl.store(state_ptr + index * _STATE + _FINITE, finite.to(tl.float32))
        tl.store(state_ptr + index * _STATE + _EXPONENT, exponent.to(tl.float32))
    inside_m, inside_n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offs_m = block * ROWS + inside_m
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, padded, COLUMNS):
        offs_n = start + inside_n
        rows, columns = offs_m[:, None], offs_n[None, :]
        mask = (rows < n) & (columns < n)
        here = rows.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_column
        x = _factor_tile(address, kind, here, mask)
        # The tile on the other side of the diagonal is read along its own rows, and turned over.
        others, along = offs_n[:, None], offs_m[None, :]
        there = others.to(tl.int64) * stride_row + along.to(tl.int64) * stride_column
        y = tl.trans(_factor_tile(address, kind, there, (others < n) & (along < n)))
        x, y = _scaled_down(x, exponent), _scaled_down(y, exponent)
        # Not finite: the identity stands in, so that nothing else has to be said about this matrix.
        identity = tl.where((rows == columns) & mask, 0.5, 0.0)
        x = tl.where(finite, (x + y) * 0.5, identity)
        squares += x * x
        sums += tl.abs(x)
        # From a 64-bit place, offsets inside a few rows: they fit in 32 bits.
        to = inside_m[:, None] * padded + columns
        inside = columns < padded
        tl.store(wide_ptr + to, x, mask=inside)
        high = _rounded(x)
        tl.store(high_ptr + to, high.to(tl.bfloat16), mask=inside)
        if LOW:
            tl.store(low_ptr + to, _rounded(x - high).to(tl.bfloat16), mask=inside)
    line = tl.load(row + _LINE_AT) + offs_m.to(tl.int64)
    tl.store(squares_ptr + line, tl.sum(squares, axis=1))
    tl.store(sums_ptr + line, tl.sum(sums, axis=1))


@triton.jit
def _start_kernel(
    table_ptr,
    state_ptr,
    wide_ptr,
    squares_ptr,
    sums_ptr,
    out_ptr,
    parts_ptr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = table_ptr + index * _FIELDS
    n, padded = tl.load(row + _N).to(tl.int32), tl.load(row + _PADDED).to(tl.int32)
    line = tl.load(row + _LINE_AT)
    wide_ptr += tl.load(row + _SQUARE)
    offs = tl.arange(0, LINE).to(tl.int64)
    frobenius = tl.zeros((LINE,), dtype=tl.float32)
    infinity = tl.zeros((LINE,), dtype=tl.float32)
    diagonal = tl.full((LINE,), -float("inf"), dtype=tl.float32)
    trace = tl.zeros((LINE,), dtype=tl.float32)
    longest = tl.full((LINE,), -1.0, dtype=tl.float32)
    at = tl.zeros((LINE,), dtype=tl.int32)
    vector = tl.load(row + _VECTOR).to(tl.pointer_type(tl.float32))
    nonzero = tl.zeros((LINE,), dtype=tl.int32)
    bits = tl.zeros((LINE,), dtype=tl.int32)
    for start in range(0, n, LINE):
        here = start + offs
        mask = here < n
        lengths = tl.load(squares_ptr + line + here, mask=mask, other=-1.0)
        frobenius += tl.where(mask, lengths, 0.0)
        at = tl.where(lengths > longest, here.to(tl.int32), at)
        longest = tl.maximum(longest, lengths)
        infinity = tl.maximum(infinity, tl.load(sums_ptr + line + here, mask=mask, other=0.0))
        entries = tl.load(wide_ptr + here * (padded + 1), mask=mask, other=-float("inf"))
        diagonal = tl.maximum(diagonal, entries)
        trace += tl.where(mask, entries, 0.0)
        given = tl.load(vector + here, mask=mask, other=0.0)
        nonzero = tl.maximum(nonzero, (given != 0).to(tl.int32))
        bits = tl.maximum(bits, _magnitudes(given))
    most = tl.max(longest, axis=0)
    # The first of the longest rows.
    first = tl.min(tl.where(longest == most, at, 0x7FFFFFFF), axis=0)
    upper = tl.minimum(tl.max(infinity, axis=0), tl.sqrt_rn(tl.sum(frobenius, axis=0)))
    lower = tl.max(diagonal, axis=0)
    # Of a matrix that is indefinite by rounding the trace could be below the largest entry.
    upper = tl.minimum(upper, tl.maximum(tl.sum(trace, axis=0), lower))
    tl.store(state_ptr + index * _STATE + _LOWER, lower)
    tl.store(state_ptr + index * _STATE + _UPPER, upper)
    known = (tl.max(nonzero, axis=0) > 0) & (tl.max(bits, axis=0) < 0x7F800000)
    # A little of the cold start lets a vector that became orthogonal to the leading one recover.
    share = tl.where(known, 1e-3 / tl.where(most > 0, tl.sqrt_rn(most), 1.0), 1.0)
    total = tl.zeros((LINE,), dtype=tl.float32)
    for start in range(0, padded, LINE):
        here = start + offs
        cold = tl.load(wide_ptr + first.to(tl.int64) * padded + here, mask=here < n, other=0.0)
        warm = tl.load(vector + here, mask=(here < n) & known, other=0.0)
        x = warm + share * cold
        total += x * x
        tl.store(out_ptr + line + here, x, mask=here < padded)
    blocks_at = tl.load(row + _BLOCKS)
    for start in range(0, padded // ROWS, LINE):
        here = start + offs
        part = tl.where(here == 0, tl.sum(total, axis=0), 0.0)
        tl.store(parts_ptr + blocks_at + here, part, mask=here < padded // ROWS)


@triton.jit(do_not_specialize=["count"])
def _step_kernel(
    table_ptr,
    ends_ptr,
    matrix_ptr,
    in_ptr,
    parts_in_ptr,
    out_ptr,
    parts_out_ptr,
    count,
    RAYLEIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index, block = _find(ends_ptr, count, tl.program_id(0), CHUNK)
    row = table_ptr + index * _FIELDS
    padded = tl.multiple_of(tl.load(row + _PADDED).to(tl.int32), 64)
    line, blocks_at = tl.load(row + _LINE_AT), tl.load(row + _BLOCKS)
    matrix_ptr += tl.multiple_of(tl.load(row + _SQUARE), 64)
    squared = _total(parts_in_ptr + blocks_at, padded // ROWS, LINE)
    length = tl.sqrt_rn(squared)
    length = tl.where(length > 0, length, 1.0)
    offs_m = block * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, COLUMNS)
    pointers = matrix_ptr + offs_m.to(tl.int64)[:, None] * padded
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, padded, COLUMNS):
        offs_n = start + inside
        mask = offs_n < padded
        x = tl.load(in_ptr + line + offs_n.to(tl.int64), mask=mask, other=0.0)
        x = tl.div_rn(x, length)
        a = tl.load(pointers + offs_n.to(tl.int64)[None, :], mask=mask[None, :], other=0.0)
        total += a.to(tl.float32) * x[None, :]
    y = tl.sum(total, axis=1)
    here = line + offs_m.to(tl.int64)
    if RAYLEIGH:
        x = tl.div_rn(tl.load(in_ptr + here), length)
        tl.store(out_ptr + here, x)
        tl.store(parts_out_ptr + blocks_at + block, tl.sum(x * y, axis=0))
    else:
        tl.store(out_ptr + here, y)
        tl.store(parts_out_ptr + blocks_at + block, tl.sum(y * y, axis=0))


@triton.jit
def _shift_kernel(
    table_ptr,
    state_ptr,
    parts_ptr,
    wide_ptr,
    high_ptr,
    low_ptr,
    root,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = table_ptr + index * _FIELDS
    state = state_ptr + index * _STATE
    n, padded = tl.load(row + _N).to(tl.int32), tl.load(row + _PADDED).to(tl.int32)
    rayleigh = _total(parts_ptr + tl.load(row + _BLOCKS), padded // ROWS, LINE)
    norm = tl.maximum(_SAFETY * rayleigh, tl.load(state + _LOWER))
    norm = tl.minimum(norm, tl.load(state + _UPPER))
    exponent = tl.load(state + _EXPONENT).to(tl.int32)
    given = tl.load(row + _DAMPING)
    if given == 0:
        # Where 2^-exponent overflows, the matrix is far below the floor, and infinity says so.
        floor = _scaled_down(tl.zeros((), dtype=tl.float32) + _FLOOR, exponent)
        shift = tl.maximum(root * norm, floor)
    else:
        damping = tl.load(given.to(tl.pointer_type(tl.float32)))
        right = (damping > 0) & (damping < float("inf"))
        tl.store(state + _FINITE, tl.where(right, tl.load(state + _FINITE), 0.0))
        shift = _scaled_down(tl.where(right, damping, 1.0), exponent)
    tl.store(state + _NORM, norm)
    tl.store(state + _SHIFT, shift)
    # Of a zero matrix nothing but the damping is left, possibly near the end of the range of fp32: it is
    # brought near 1 too. Any other damped matrix has an entry near 1 already.
    more = tl.where((norm == 0) & (shift < float("inf")), _exponent(tl.minimum(shift, 1e38)), 0)
    shift = _scaled_down(shift, more)
    top = _MARGIN * norm + shift
    tl.store(state + _UNSCALE, (exponent + more).to(tl.float32))
    tl.store(state + _TOP, top)
    square = tl.load(row + _SQUARE)
    offs = tl.arange(0, LINE).to(tl.int64)
    for start in range(0, padded, LINE):
        here = start + offs
        mask = here < padded
        to = square + here * (padded + 1)
        x = tl.load(wide_ptr + to, mask=mask, other=0.0) + shift
        # What pads the matrix must lie in the interval of the spectrum too.
        x = tl.where(here < n, x, top)
        high = _rounded(x)
        tl.store(wide_ptr + to, x, mask=mask)
        tl.store(high_ptr + to, high.to(tl.bfloat16), mask=mask)
        if LOW:
            tl.store(low_ptr + to, _rounded(x - high).to(tl.bfloat16), mask=mask)


class Segment(NamedTuple):
    """One launch over a run of matrices: where its table and its ends begin, and how many programs."""

    table: Tensor
    ends: Tensor
    matrices: int
    programs: int


class Batch(NamedTuple):
    """All matrices of a call, the largest first.

    Attributes:
        orders: Order of each matrix.
        sides: Padded order of each.
        squares: Elements of a buffer of all padded matrices.
        lines: Elements of a buffer of one number per row.
        blocks: Elements of a buffer of one number per program that goes through rows.
        table: ``[matrices * fields]``, int64.
        rows: The launch of one program per ``ROWS`` rows.
        segments: More launches, as the method asked for.
    """

    orders: list[int]
    sides: list[int]
    squares: int
    lines: int
    blocks: int
    table: Tensor
    rows: Segment
    segments: list[Segment]


class Matrices(NamedTuple):
    """The damped matrices on the device, padded, and what is known about them."""

    state: Tensor
    wide: Tensor
    high: Tensor
    low: Tensor
    vector: Tensor


# First matrix, and how many programs each one from there on has.
Counts = tuple[int, list[int]]


def supports(n: int) -> bool:
    """Return whether the kernels for large matrices take matrices of this order."""
    return n >= SMALLEST


def ceil_to(n: int, multiple: int) -> int:
    """Return the smallest multiple that is not less than ``n``."""
    return -(-n // multiple) * multiple


def _rows_of(entry: Entry) -> list[Row]:
    length, n = entry.factor.shape[:2]

    def at(tensor: Tensor | None, i: int, numbers: int = 1) -> int:
        return 0 if tensor is None else tensor.data_ptr() + i * numbers * tensor.element_size()

    return [
        Row(
            factor=at(entry.factor, i, entry.factor.stride(0)),
            stride_row=entry.factor.stride(1),
            stride_column=entry.factor.stride(2),
            kind=KINDS[entry.factor.dtype],
            n=n,
            padded=0,
            damping=at(entry.damping, i),
            vector=at(entry.vector, i, n),
            inverse=at(entry.inverse, i, n * n),
            used_damping=at(entry.used_damping, i),
            spectral_norm=at(entry.spectral_norm, i),
            residual=at(entry.residual, i),
            info=at(entry.info, i),
            square=0,
            line=0,
            blocks=0,
        )
        for i in range(length)
    ]


def batch_of(
    name: str,
    entries: Sequence[Entry],
    padded: Callable[[int], int],
    segments: Callable[[list[int]], list[Counts]],
) -> Batch:
    """Return the table of a call, from the cache where the same call has been before.

    Args:
        name: Of the method: its part of the cache.
        entries: As in ``launch``.
        padded: Padded order, from the order.
        segments: More launches, from the padded orders of all matrices, the largest first.
    """
    device = entries[0].factor.device

    def build() -> Batch:
        rows: list[Row] = []
        square = line = blocks = 0
        # Stable: equal orders keep their places.
        for row in sorted((r for e in entries for r in _rows_of(e)), key=lambda r: -r.n):
            side = padded(row.n)
            rows.append(row._replace(padded=side, square=square, line=line, blocks=blocks))
            square, line, blocks = square + side * side, line + side, blocks + side // ROWS
        sides = [row.padded for row in rows]
        numbers = [number for row in rows for number in row]
        places = []
        for first, counts in [(0, [side // ROWS for side in sides]), *segments(sides)]:
            ends = list(itertools.accumulate(counts))
            places.append((first, len(numbers), len(ends), ends[-1]))
            # Two numbers are 16 bytes: all parts are aligned alike, and one compiled kernel serves them.
            numbers += [*ends, 0] if len(ends) % 2 else ends
        table = _table.upload(torch.tensor(numbers, dtype=torch.int64), device)
        width = len(Row._fields)
        own, *more = (
            Segment(table[first * width :], table[at:], count, programs)
            for first, at, count, programs in places
        )
        return Batch([r.n for r in rows], sides, square, line, blocks, table, own, more)

    def place(tensor: Tensor | None) -> tuple[object, ...] | None:
        if tensor is None:
            return None
        return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)

    batch: Batch = _table.cached((name, *(tuple(map(place, e)) for e in entries)), device, build)
    return batch


def prologue(batch: Batch, *, rho: float | None, low: bool) -> Matrices:
    """Form the damped matrices of a call: 21 launches.

    Args:
        batch: The matrices.
        rho: As in ``launch``.
        low: Also store what bf16 leaves over, rounded to bf16.
    """
    device = batch.table.device

    def empty(numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(numbers, dtype=dtype, device=device)

    count = len(batch.orders)
    state = empty(count * len(STATE))
    wide, high = empty(batch.squares), empty(batch.squares, torch.bfloat16)
    lower = empty(batch.squares, torch.bfloat16) if low else high
    squares, sums = empty(batch.lines), empty(batch.lines)
    vectors = empty(batch.lines), empty(batch.lines)
    parts = empty(batch.blocks), empty(batch.blocks)
    largest = empty(batch.blocks, torch.int32)
    rows = batch.rows
    grid = (rows.programs,)
    table, ends = rows.table, rows.ends

    _scan_kernel[grid](
        table, ends, largest, count,
        ROWS=ROWS, COLUMNS=GATHER_COLUMNS, CHUNK=CHUNK, num_warps=WARPS,
    )  # fmt: skip
    _form_kernel[grid](
        table, ends, state, largest, wide, high, lower, squares, sums, count,
        LOW=low, ROWS=ROWS, COLUMNS=GATHER_COLUMNS, LINE=LINE, CHUNK=CHUNK, num_warps=WARPS,
    )  # fmt: skip
    _start_kernel[(count,)](
        table, state, wide, squares, sums, vectors[0], parts[0],
        ROWS=ROWS, LINE=LINE, num_warps=WARPS,
    )  # fmt: skip
    for step in range(STEPS + 1):
        last = step == STEPS
        now, then = step % 2, 1 - step % 2
        _step_kernel[grid](
            table, ends, wide if last else high,
            vectors[now], parts[now], vectors[then], parts[then], count,
            RAYLEIGH=last, ROWS=ROWS, COLUMNS=COLUMNS, LINE=LINE, CHUNK=CHUNK, num_warps=WARPS,
        )  # fmt: skip
    then = (STEPS + 1) % 2
    _shift_kernel[(count,)](
        table, state, parts[then], wide, high, lower, 0.0 if rho is None else rho**0.5,
        LOW=low, ROWS=ROWS, LINE=LINE, num_warps=WARPS,
    )  # fmt: skip
    return Matrices(state, wide, high, lower, vectors[then])
