# SPDX-License-Identifier: Apache-2.0
"""The passes of the Kalman update in Triton for 17 to 128 outputs: on tensor cores, to fp32 accuracy.

A number in fp32 is three in bf16. Of the nine products of two such numbers six reach fp32 accuracy. A
Jacobian in bf16 is one piece as it is, and three products do. Tiles are at most 64 x 64 in the first pass:
the products of a larger one do not fit in the tensor memory of sm_100.
"""

from typing import NamedTuple

import torch
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
from grng_kernels.triton_pieces import pieces

MAX_OUTPUTS = 128
# Two programs per multiprocessor of the largest current GPUs for each tile of the gram.
SHARES, UNIT = 264, 128
# Outputs of a tile of the gram, and rows of the whitener whose products are held at once.
HALF = 64
SPLIT_BLOCK = 1024


class Config(NamedTuple):
    """Tile sizes and launch parameters of both passes."""

    gram_k: int
    gram_warps: int
    gram_stages: int
    apply_d: int
    apply_k: int
    apply_warps: int
    apply_stages: int


# By the padded number of outputs. Chosen by reasoning, not yet by measurement: no spills for sm_80, sm_90 and
# sm_100 (tests/aot/test_kalman_update_aot.py).
CONFIGS = {
    32: Config(64, 8, 3, 64, 32, 4, 3),
    64: Config(32, 4, 3, 64, 32, 4, 3),
    128: Config(32, 4, 3, 128, 16, 8, 2),
}
# One piece takes fewer registers than three.
CONFIGS_ONE_PIECE = {**CONFIGS, 128: Config(32, 4, 3, 128, 16, 8, 3)}


def padded(outputs: int) -> int:
    """Return the rows of a tile that holds all outputs."""
    return max(32, triton.next_power_of_2(outputs))


def is_one_piece(dtype: torch.dtype) -> bool:
    """Return whether an element of the Jacobian is one bf16 number."""
    return dtype == torch.bfloat16


def config_of(outputs: int, dtype: torch.dtype) -> Config:
    """Return the config for so many outputs and a Jacobian of this type."""
    return (CONFIGS_ONE_PIECE if is_one_piece(dtype) else CONFIGS)[padded(outputs)]


@triton.jit
def _elements(
    address, rows, at, outputs, inside, row_stride, column_stride,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # Products of indices and strides are int64: they pass 2^31 long before memory ends.
    ptr = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # The compiler knows nothing of numbers that were loaded, and would read one by one. Hints do not
        # outlive a call, but it sees what a number is multiplied with.
        EACH: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        ptr = tl.multiple_of(ptr, 16)
        pointers = ptr + rows.to(tl.int64) * (row_stride // EACH * EACH) + at
    else:
        pointers = ptr + rows.to(tl.int64) * row_stride + at * column_stride
    return tl.load(pointers, mask=inside & (rows < outputs), other=0.0).to(tl.float32)


@triton.jit
def _weighted_product(left, right, ONE_PIECE: tl.constexpr, PIECE: tl.constexpr):
    # left right^T, the smallest products first.
    high, middle, low = pieces(left)
    if ONE_PIECE:
        other = tl.trans(right.to(PIECE))
        total = tl.dot(low.to(PIECE), other)
        total = tl.dot(middle.to(PIECE), other, total)
        return tl.dot(high.to(PIECE), other, total)
    high, middle = high.to(PIECE), middle.to(PIECE)
    other_high, other_middle, other_low = pieces(right)
    other_high, other_middle = tl.trans(other_high.to(PIECE)), tl.trans(other_middle.to(PIECE))
    total = tl.dot(low.to(PIECE), other_high)
    total = tl.dot(high, tl.trans(other_low.to(PIECE)), total)
    total = tl.dot(middle, other_middle, total)
    total = tl.dot(middle, other_high, total)
    total = tl.dot(high, other_middle, total)
    return tl.dot(high, other_high, total)


@triton.jit
def _gram_of_columns(
    total, largest_mean, largest_variance, largest_element, left_rows, right_rows,
    jacobian, mean_ptr, variance_ptr, begin, end, outputs, row, column, weighted,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ONE_PIECE: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    if ALIGNED:
        begin, end = begin // 16 * 16, end // EACH * EACH
    for start in range(begin, end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = at < end
        p = tl.load(variance_ptr + at, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
        left = _elements(
            jacobian, left_rows, at[None, :], outputs, inside[None, :], row, column, DTYPE, ALIGNED
        )
        right = _elements(
            jacobian, right_rows, at[None, :], outputs, inside[None, :], row, column, DTYPE, ALIGNED
        )
        largest_mean = tl.maximum(largest_mean, magnitude(mean))
        largest_variance = tl.maximum(largest_variance, variance_magnitude(p))
        largest_element = tl.maximum(largest_element, tl.max(magnitude(left), 1))
        left *= tl.where(weighted, p, 1.0)[None, :]
        # Tensor cores cut off what they add to: sums of many terms are made beside them. As a sum of two the
        # compiler would give it back to them.
        total = tl.fma(_weighted_product(left, right, ONE_PIECE, PIECE), 1.0, total)
    return total, largest_mean, largest_variance, largest_element


@triton.jit(do_not_specialize=["starts_at", "outputs"])
def _gram_wide_kernel(
    partial_ptr,
    extremes_ptr,
    table_ptr,
    starts_at,
    outputs,
    DTYPE: tl.constexpr,
    ONE_PIECE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # First the tiles of H diag(p) H^T, then those of H H^T; neighbours read the same columns.
    local = tl.program_id(0)
    share = tl.program_id(1).to(tl.int64)
    number = share * tl.num_programs(0) + local
    weighted = local < PAIRS
    pair = local % PAIRS
    left_rows = ((pair + 1) // 2 * TILE + tl.arange(0, TILE))[:, None]
    right_rows = (pair // 2 * TILE + tl.arange(0, TILE))[:, None]
    total = tl.zeros((TILE, TILE), tl.float32)
    largest_mean = tl.zeros((BLOCK_K,), tl.int32)
    largest_variance = tl.zeros((BLOCK_K,), tl.int32)
    largest_element = tl.zeros((TILE,), tl.int32)
    first, begin_column, last, end_column = share_bounds(table_ptr + starts_at, share)
    for block in range(first, last + 1):
        jacobian, mean_ptr, variance_ptr, row, column, aligned = block_of(table_ptr, block)
        begin, end = columns_of(table_ptr, block, first, begin_column, last, end_column)
        if aligned != 0:
            total, largest_mean, largest_variance, largest_element = _gram_of_columns(
                total, largest_mean, largest_variance, largest_element, left_rows, right_rows,
                jacobian, mean_ptr, variance_ptr, begin, end, outputs, row, column, weighted,
                DTYPE, True, ONE_PIECE, PIECE, BLOCK_K,
            )  # fmt: skip
        else:
            total, largest_mean, largest_variance, largest_element = _gram_of_columns(
                total, largest_mean, largest_variance, largest_element, left_rows, right_rows,
                jacobian, mean_ptr, variance_ptr, begin, end, outputs, row, column, weighted,
                DTYPE, False, ONE_PIECE, PIECE, BLOCK_K,
            )  # fmt: skip
    inside_tile = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(partial_ptr + number * (TILE * TILE) + inside_tile, total)
    extremes_ptr += number * 3
    tl.store(extremes_ptr, tl.max(largest_mean, 0))
    tl.store(extremes_ptr + 1, tl.max(largest_variance, 0))
    tl.store(extremes_ptr + 2, tl.max(largest_element, 0))


@triton.jit(do_not_specialize=["outputs", "ranks"])
def _split_kernel(
    pieces_ptr,
    whitener_ptr,
    outputs,
    ranks,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rank, row = at // ROWS, at % ROWS
    inside = (rank < ranks) & (row < outputs)
    x = tl.load(whitener_ptr + rank * outputs + row, mask=inside, other=0.0)
    high, middle, low = pieces(x)
    tl.store(pieces_ptr + at, high.to(PIECE))
    tl.store(pieces_ptr + ROWS * ROWS + at, middle.to(PIECE))
    tl.store(pieces_ptr + 2 * ROWS * ROWS + at, low.to(PIECE))


@triton.jit
def _whitened(h, root, weights, ROWS: tl.constexpr, ONE_PIECE: tl.constexpr, PIECE: tl.constexpr):
    # h^T W^T of one block of rows of h, times the roots where h is not one piece. The smallest first.
    SIZE: tl.constexpr = ROWS * ROWS
    w_high = tl.load(weights)
    w_middle = tl.load(weights + SIZE)
    w_low = tl.load(weights + 2 * SIZE)
    if ONE_PIECE:
        left = tl.trans(h.to(PIECE))
        total = tl.dot(left, w_low)
        total = tl.dot(left, w_middle, total)
        return tl.dot(left, w_high, total)
    high, middle, low = pieces(h * root[None, :])
    left, left_middle = tl.trans(high.to(PIECE)), tl.trans(middle.to(PIECE))
    total = tl.dot(tl.trans(low.to(PIECE)), w_high)
    total = tl.dot(left, w_low, total)
    total = tl.dot(left_middle, w_middle, total)
    total = tl.dot(left_middle, w_high, total)
    total = tl.dot(left, w_middle, total)
    return tl.dot(left, w_high, total)


@triton.jit
def _gain_of_columns(
    jacobian, at, inside, root, outputs, row, column, pieces_ptr, direction_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ONE_PIECE: tl.constexpr, PIECE: tl.constexpr,
    TRIANGULAR: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # t and the step of the mean, before its last factor, the root.
    t = tl.zeros((BLOCK_D,), tl.float32)
    step = tl.zeros((BLOCK_D,), tl.float32)
    for half in tl.static_range(ROWS // HALF):
        ranks = half * HALF + tl.arange(0, HALF)[None, :]
        y = tl.zeros((BLOCK_D, HALF), tl.float32)
        # Beyond the diagonal a triangular whitener is zero.
        for k in range(0, (half + 1) * HALF if TRIANGULAR else ROWS, BLOCK_K):
            offs = k + tl.arange(0, BLOCK_K)[:, None]
            h = _elements(
                jacobian, offs, at[None, :], outputs, inside[None, :], row, column, DTYPE, ALIGNED
            )
            if half == ROWS // HALF - 1:
                u = tl.load(direction_ptr + offs, mask=offs < outputs, other=0.0)
                step += tl.sum(h * root[None, :] * u, 0)
            weights = pieces_ptr + ranks * ROWS + offs
            y = tl.fma(_whitened(h, root, weights, ROWS, ONE_PIECE, PIECE), 1.0, y)
        if ONE_PIECE:
            # Where nothing is uncertain a product may have become infinite.
            y = tl.where(root[:, None] > 0, y * root[:, None], 0.0)
        t += tl.sum(y * y, 1)
    return t, step


@triton.jit(do_not_specialize=["starts_at", "outputs"])
def _apply_wide_kernel(
    table_ptr,
    starts_at,
    pieces_ptr,
    direction_ptr,
    info_ptr,
    outputs,
    forgetting,
    process_noise,
    DTYPE: tl.constexpr,
    VARIATIONAL: tl.constexpr,
    TRIANGULAR: tl.constexpr,
    ONE_PIECE: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    EACH: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    share = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    first, begin_column, last, end_column = share_bounds(table_ptr + starts_at, share)
    # Nothing is written where the stage between the passes found a fault.
    blocks = tl.where(tl.load(info_ptr) == 0, last - first + 1, 0)
    for after in range(0, blocks):
        block = last - after
        jacobian, mean_ptr, variance_ptr, row, column, aligned = block_of(table_ptr, block)
        begin, end = columns_of(table_ptr, block, first, begin_column, last, end_column)
        steps = tl.cdiv(end - begin, BLOCK_D)
        for back in range(0, steps):
            start = begin + (steps - 1 - back) * BLOCK_D
            columns = tl.arange(0, BLOCK_D).to(tl.int64)
            at = start + columns
            inside = at < end
            p = tl.load(variance_ptr + at, mask=inside, other=0.0)
            root = tl.sqrt_rn(p)
            if aligned != 0:
                at_aligned = start // 16 * 16 + columns
                t, step = _gain_of_columns(
                    jacobian, at_aligned, at_aligned < end // EACH * EACH, root, outputs,
                    row, column, pieces_ptr, direction_ptr,
                    DTYPE, True, ONE_PIECE, PIECE, TRIANGULAR, ROWS, HALF, BLOCK_D, BLOCK_K,
                )  # fmt: skip
            else:
                t, step = _gain_of_columns(
                    jacobian, at, inside, root, outputs, row, column, pieces_ptr, direction_ptr,
                    DTYPE, False, ONE_PIECE, PIECE, TRIANGULAR, ROWS, HALF, BLOCK_D, BLOCK_K,
                )  # fmt: skip
            write_state(
                mean_ptr, variance_ptr, at, inside, p, t, root * step, forgetting, process_noise,
                VARIATIONAL,
            )  # fmt: skip
