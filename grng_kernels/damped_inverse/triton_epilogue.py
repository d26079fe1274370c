# SPDX-License-Identifier: Apache-2.0
"""What both methods for large matrices end with on the GPU: results of exact shape, residual and info.

1. ``_write_kernel``: the inverse in the units of the factor, and its products with the probes.
2. ``_probe_kernel``: those products times the damped matrix, compared with the probes.
3. ``_verdict_kernel``: residual, ``info`` and the scalars; the vector of the norm only where ``info`` is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels.damped_inverse.probes import COUNT
from grng_kernels.damped_inverse.reference import RESIDUAL_LIMIT
from grng_kernels.damped_inverse.triton_prologue import (
    _BLOCKS,
    _EXPONENT,
    _FIELDS,
    _FINITE,
    _LINE_AT,
    _N,
    _NORM,
    _PADDED,
    _SHIFT,
    _SQUARE,
    _STATE,
    _UNSCALE,
    _VECTOR,
    CHUNK,
    COLUMNS,
    GATHER_COLUMNS,
    LINE,
    ROWS,
    WARPS,
    Batch,
    Matrices,
    Row,
    _find,
    _largest,
    _magnitudes,
    _scaled_down,
    _total,
)

_COUNT, _LIMIT = tl.constexpr(COUNT), tl.constexpr(RESIDUAL_LIMIT)
_INVERSE = tl.constexpr(Row._fields.index("inverse"))
_USED_DAMPING = tl.constexpr(Row._fields.index("used_damping"))
_SPECTRAL_NORM = tl.constexpr(Row._fields.index("spectral_norm"))
_RESIDUAL = tl.constexpr(Row._fields.index("residual"))
_INFO = tl.constexpr(Row._fields.index("info"))


@triton.jit
def _signs(rows, n):
    # As in probes.py: lowbias32 of Chris Wellons.
    h = (rows[:, None] * _COUNT + tl.arange(0, _COUNT)[None, :]).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    signs = 1.0 - 2.0 * (h >> 31).to(tl.float32)
    return tl.where((rows < n)[:, None], signs, 0.0)


@triton.jit(do_not_specialize=["count"])
def _write_kernel(
    table_ptr,
    ends_ptr,
    state_ptr,
    inverse_ptr,
    products_ptr,
    largest_ptr,
    count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index, block = _find(ends_ptr, count, tl.program_id(0), CHUNK)
    row = table_ptr + index * _FIELDS
    n = tl.load(row + _N).to(tl.int32)
    padded = tl.multiple_of(tl.load(row + _PADDED).to(tl.int32), 64)
    first = (block * ROWS).to(tl.int64)
    inverse_ptr += tl.multiple_of(tl.load(row + _SQUARE), 64) + first * padded
    out = tl.load(row + _INVERSE).to(tl.pointer_type(tl.float32)) + first * n
    exponent = tl.load(state_ptr + index * _STATE + _UNSCALE).to(tl.int32)
    # From a 64-bit place, offsets inside a few rows: they fit in 32 bits.
    inside_m, inside_n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offs_m = block * ROWS + inside_m
    bits = tl.zeros((ROWS,), dtype=tl.int32)
    total = tl.zeros((ROWS, _COUNT), dtype=tl.float32)
    for start in range(0, padded, COLUMNS):
        offs_n = start + inside_n
        mask = (offs_m < n)[:, None] & (offs_n < n)[None, :]
        x = tl.load(
            inverse_ptr + inside_m[:, None] * padded + offs_n[None, :],
            mask=(offs_n < padded)[None, :],
            other=0.0,
        )
        result = _scaled_down(x, exponent)
        bits = tl.maximum(bits, tl.max(tl.where(mask, _magnitudes(result), 0), axis=1))
        tl.store(out + inside_m[:, None] * n + offs_n[None, :], result, mask=mask)
        total = tl.dot(x, _signs(offs_n, n), total, input_precision="ieee")
    to = (tl.load(row + _LINE_AT) + offs_m.to(tl.int64))[:, None] * _COUNT
    tl.store(products_ptr + to + tl.arange(0, _COUNT).to(tl.int64)[None, :], total)
    largest = tl.max(bits, axis=0)
    tl.store(largest_ptr + tl.load(row + _BLOCKS) + block, largest)


@triton.jit(do_not_specialize=["count"])
def _probe_kernel(
    table_ptr,
    ends_ptr,
    matrix_ptr,
    products_ptr,
    parts_ptr,
    count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index, block = _find(ends_ptr, count, tl.program_id(0), CHUNK)
    row = table_ptr + index * _FIELDS
    n = tl.load(row + _N).to(tl.int32)
    padded = tl.multiple_of(tl.load(row + _PADDED).to(tl.int32), 64)
    matrix_ptr += tl.multiple_of(tl.load(row + _SQUARE), 64)
    products_ptr += tl.load(row + _LINE_AT) * _COUNT
    offs_m = block * ROWS + tl.arange(0, ROWS)
    inside, probe = tl.arange(0, COLUMNS), tl.arange(0, _COUNT).to(tl.int64)
    total = tl.zeros((ROWS, _COUNT), dtype=tl.float32)
    for start in range(0, padded, COLUMNS):
        offs_n = start + inside
        rows, columns = offs_m[:, None].to(tl.int64), offs_n[None, :].to(tl.int64)
        a = tl.load(matrix_ptr + rows * padded + columns, mask=columns < padded, other=0.0)
        along = offs_n[:, None].to(tl.int64)
        y = tl.load(products_ptr + along * _COUNT + probe[None, :], mask=along < padded, other=0.0)
        total = tl.dot(a, y, total, input_precision="ieee")
    rest = tl.where((offs_m < n)[:, None], _signs(offs_m, n) - total, 0.0)
    part = tl.sum(tl.sum(rest * rest, axis=1), axis=0)
    tl.store(parts_ptr + tl.load(row + _BLOCKS) + block, part)


@triton.jit
def _verdict_kernel(
    table_ptr,
    state_ptr,
    parts_ptr,
    largest_ptr,
    vector_ptr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = table_ptr + index * _FIELDS
    state = state_ptr + index * _STATE
    n, padded = tl.load(row + _N).to(tl.int32), tl.load(row + _PADDED).to(tl.int32)
    blocks_at = tl.load(row + _BLOCKS)
    squared = _total(parts_ptr + blocks_at, padded // ROWS, LINE)
    residual = tl.sqrt_rn(tl.div_rn(squared, (n * _COUNT).to(tl.float32)))
    in_range = _largest(largest_ptr + blocks_at, padded // ROWS, LINE) < 0x7F800000
    info = tl.where(residual <= _LIMIT, tl.where(in_range, 0, 3), 2)
    finite = tl.load(state + _FINITE) > 0
    info = tl.where(finite, info, 1)
    # That of the identity, which stood in, says nothing.
    residual = tl.where(finite, residual, float("nan"))
    exponent = -tl.load(state + _EXPONENT).to(tl.int32)
    pointer = tl.pointer_type(tl.float32)
    damping, norm = tl.load(state + _SHIFT), tl.load(state + _NORM)
    tl.store(tl.load(row + _USED_DAMPING).to(pointer), _scaled_down(damping, exponent))
    tl.store(tl.load(row + _SPECTRAL_NORM).to(pointer), _scaled_down(norm, exponent))
    tl.store(tl.load(row + _RESIDUAL).to(pointer), residual)
    tl.store(tl.load(row + _INFO).to(tl.pointer_type(tl.int32)), info)
    if info == 0:
        vector_ptr += tl.load(row + _LINE_AT)
        vector = tl.load(row + _VECTOR).to(pointer)
        offs = tl.arange(0, LINE).to(tl.int64)
        for start in range(0, n, LINE):
            here = start + offs
            mask = here < n
            x = tl.load(vector_ptr + here, mask=mask, other=0.0)
            tl.store(vector + here, x, mask=mask)


def epilogue(batch: Batch, matrices: Matrices, inverse: Tensor) -> None:
    """Write all results: 3 launches. ``inverse`` is padded like the matrices."""
    device = batch.table.device
    products = torch.empty(batch.lines * COUNT, dtype=torch.float32, device=device)
    parts = torch.empty(batch.blocks, dtype=torch.float32, device=device)
    largest = torch.empty(batch.blocks, dtype=torch.int32, device=device)
    rows, count = batch.rows, len(batch.orders)
    _write_kernel[(rows.programs,)](
        rows.table, rows.ends, matrices.state, inverse, products, largest, count,
        ROWS=ROWS, COLUMNS=GATHER_COLUMNS, CHUNK=CHUNK, num_warps=WARPS,
    )  # fmt: skip
    _probe_kernel[(rows.programs,)](
        rows.table, rows.ends, matrices.wide, products, parts, count,
        ROWS=ROWS, COLUMNS=COLUMNS, CHUNK=CHUNK, num_warps=WARPS,
    )  # fmt: skip
    _verdict_kernel[(count,)](
        rows.table, matrices.state, parts, largest, matrices.vector,
        ROWS=ROWS, LINE=LINE, num_warps=WARPS,
    )  # fmt: skip
