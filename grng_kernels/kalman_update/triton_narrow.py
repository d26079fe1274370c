# SPDX-License-Identifier: Apache-2.0
"""The passes of the Kalman update in Triton for up to 16 outputs: fp32 arithmetic, one lane per column."""

import triton
import triton.language as tl

from grng_kernels.kalman_update.triton_shares import (
    block_of,
    columns_of,
    magnitude,
    share_bounds,
    variance_magnitude,
    write_state,
)

MAX_OUTPUTS = 16
# A tile of sums of each lane is at most 8 x 8: more do not fit in its registers.
TILE = 8
# Eight programs per multiprocessor of the largest current GPUs.
SHARES, UNIT = 1056, 1024
GRAM_WARPS, APPLY_WARPS, APPLY_LANES = 2, 4, 256


def gram_lanes(tile: int) -> int:
    """Return the columns of a program of the first pass at once: 64 sums of a thread, 8 loads of a row."""
    return 32 * GRAM_WARPS * min(8, 64 // tile**2)


@triton.jit
def _columns(
    address, rows, at, outputs, inside, row_stride, column_stride, DTYPE: tl.constexpr
):  # fmt: skip
    # Products of indices and strides are int64: they pass 2^31 long before memory ends.
    ptr = address.to(tl.pointer_type(DTYPE))
    pointers = ptr + rows.to(tl.int64) * row_stride + at * column_stride
    return tl.load(pointers, mask=inside & (rows < outputs), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["starts_at", "outputs"])
def _gram_narrow_kernel(
    partial_ptr,
    extremes_ptr,
    table_ptr,
    starts_at,
    outputs,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    LANES: tl.constexpr,
):
    # First the tiles of H diag(p) H^T, then those of H H^T; neighbours read the same columns.
    local = tl.program_id(0)
    share = tl.program_id(1).to(tl.int64)
    number = share * tl.num_programs(0) + local
    weighted = local < PAIRS
    pair = local % PAIRS
    left_rows = (pair + 1) // 2 * TILE + tl.arange(0, TILE)
    right_rows = pair // 2 * TILE + tl.arange(0, TILE)
    lanes = tl.arange(0, LANES).to(tl.int64)
    total = tl.zeros((TILE, TILE, LANES), tl.float32)
    largest_mean = tl.zeros((1, 1, LANES), tl.int32)
    largest_variance = tl.zeros((1, 1, LANES), tl.int32)
    largest_element = tl.zeros((1, LANES), tl.int32)
    first, begin_column, last, end_column = share_bounds(table_ptr + starts_at, share)
    for block in range(first, last + 1):
        jacobian, mean_ptr, variance_ptr, row, column, _ = block_of(table_ptr, block)
        begin, end = columns_of(table_ptr, block, first, begin_column, last, end_column)
        for start in range(begin, end, LANES):
            at = (start + lanes)[None, None, :]
            inside = at < end
            p = tl.load(variance_ptr + at, mask=inside, other=0.0)
            mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
            left = _columns(
                jacobian, left_rows[:, None, None], at, outputs, inside, row, column, DTYPE
            )
            right = _columns(
                jacobian, right_rows[None, :, None], at, outputs, inside, row, column, DTYPE
            )
            largest_mean = tl.maximum(largest_mean, magnitude(mean))
            largest_variance = tl.maximum(largest_variance, variance_magnitude(p))
            largest_element = tl.maximum(largest_element, tl.max(magnitude(left), 0))
            total += (left * tl.where(weighted, p, 1.0)) * right
    inside_tile = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(partial_ptr + number * (TILE * TILE) + inside_tile, tl.sum(total, 2))
    extremes_ptr += number * 3
    tl.store(extremes_ptr, tl.max(tl.max(tl.max(largest_mean, 2), 1), 0))
    tl.store(extremes_ptr + 1, tl.max(tl.max(tl.max(largest_variance, 2), 1), 0))
    tl.store(extremes_ptr + 2, tl.max(tl.max(largest_element, 1), 0))


@triton.jit(do_not_specialize=["starts_at", "outputs", "ranks"])
def _apply_narrow_kernel(
    table_ptr,
    starts_at,
    whitener_ptr,
    direction_ptr,
    info_ptr,
    outputs,
    ranks,
    forgetting,
    process_noise,
    DTYPE: tl.constexpr,
    VARIATIONAL: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    share = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES).to(tl.int64)
    direction = tl.load(direction_ptr + rows, mask=rows < outputs, other=0.0)[:, None]
    first, begin_column, last, end_column = share_bounds(table_ptr + starts_at, share)
    # Nothing is written where the stage between the passes found a fault.
    blocks = tl.where(tl.load(info_ptr) == 0, last - first + 1, 0)
    for after in range(0, blocks):
        block = last - after
        jacobian, mean_ptr, variance_ptr, row, column, _ = block_of(table_ptr, block)
        begin, end = columns_of(table_ptr, block, first, begin_column, last, end_column)
        steps = tl.cdiv(end - begin, LANES)
        for back in range(0, steps):
            at = begin + (steps - 1 - back) * LANES + lanes
            inside = at < end
            p = tl.load(variance_ptr + at, mask=inside, other=0.0)
            root = tl.sqrt_rn(p)
            # Squares of this are below the trace of S: nothing leaves the range that S itself has not left.
            scaled = root[None, :] * _columns(
                jacobian, rows[:, None], at[None, :], outputs, inside[None, :], row, column, DTYPE
            )
            step = root * tl.sum(scaled * direction, 0)
            t = tl.zeros((LANES,), tl.float32)
            for rank in range(0, ranks):
                weights = tl.load(
                    whitener_ptr + rank * outputs + rows, mask=rows < outputs, other=0.0
                )
                y = tl.sum(weights[:, None] * scaled, 0)
                t += y * y
            write_state(
                mean_ptr, variance_ptr, at, inside, p, t, step, forgetting, process_noise,
                VARIATIONAL,
            )  # fmt: skip
