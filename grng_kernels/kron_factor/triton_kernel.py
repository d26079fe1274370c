# SPDX-License-Identifier: Apache-2.0
"""The factor update in Triton, in three launches and without a wait for the device.

1. ``_extremes_kernel``: the largest magnitudes of ``x`` and of the factor's diagonal, which decide whether
   anything may be written. It also brings ``x`` into L2.
2. ``_partial_products_kernel``: one program per tile of the lower triangle and per split of the rows. The
   splits let a small factor with many rows fill the machine; their number depends on the shape only.
3. ``_commit_kernel``: adds the splits in a fixed order and writes both triangles from one value.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels._dispatch import interpreting_triton


class Config(NamedTuple):
    """Tile sizes and launch parameters of one variant of the kernel."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Chosen by reasoning, not yet by measurement: the largest tile that compiles without spills for sm_80,
# sm_90 and sm_100 and for tensors of any alignment (tests/aot/test_triton_aot.py; a tile of 128 does not),
# and smaller tiles for small factors so that few lanes idle.
CONFIGS_16BIT = {
    16: Config(16, 64, 4, 3),
    32: Config(32, 32, 4, 3),
    64: Config(64, 64, 8, 3),
}
CONFIGS_FP32 = {
    16: Config(16, 64, 2, 3),
    32: Config(32, 32, 4, 3),
    64: Config(64, 32, 4, 3),
}


# Programs that fill a large GPU twice.
TARGET_PROGRAMS = 264
MAX_SPLITS = 64
# Blocks of rows that a split has at least: below, adding up costs more than it saves.
MIN_BLOCKS = 4
# Partial maxima: what one program of the last launch can read at once.
MAX_EXTREMES = 512
EXTREMES_ROWS, EXTREMES_COLUMNS = 32, 128
# Side of what one program of the last launch writes.
COMMIT_BLOCK = 32
# Warps of the first and the last launch: with fewer, ptxas spills for some alignments.
SIMPLE_WARPS = 8


def config_for(n: int, dtype: torch.dtype) -> Config:
    """Return the variant for a factor of order ``n``: the smallest tile that holds it, or the largest."""
    table = CONFIGS_FP32 if dtype == torch.float32 else CONFIGS_16BIT
    return table[min((b for b in table if b >= n), default=max(table))]


def rows_per_split(tiles: int, rows: int, block_k: int) -> int:
    """Return how many rows one program sums: a multiple of ``block_k``, decided by the shape alone."""
    wanted = min(-(-TARGET_PROGRAMS // tiles), MAX_SPLITS, max(1, rows // (MIN_BLOCKS * block_k)))
    return -(-rows // (wanted * block_k)) * block_k


@triton.jit
def _magnitude(x):
    # With the sign bit cleared, the order of the bit patterns is the order of the magnitudes, and every inf
    # and NaN lies above every finite number: one integer maximum finds both.
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _extremes_kernel(
    extremes_ptr,
    factor_ptr,
    x_ptr,
    n,
    width,
    rows,
    rows_per_program,
    stride_fm,
    stride_fn,
    stride_xk,
    stride_xn,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    largest = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.int32)
    first = program * rows_per_program
    for k in range(first, min(first + rows_per_program, rows), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        for column in range(0, width, BLOCK_N):
            offs_n = column + tl.arange(0, BLOCK_N)
            pointers = (
                x_ptr
                + offs_k[:, None].to(tl.int64) * stride_xk
                + offs_n[None, :].to(tl.int64) * stride_xn
            )
            mask = (offs_k[:, None] < rows) & (offs_n[None, :] < width)
            largest = tl.maximum(largest, _magnitude(tl.load(pointers, mask=mask, other=0.0)))
    tl.store(extremes_ptr + program, tl.max(tl.max(largest, axis=1), axis=0))

    held = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for start in range(program * BLOCK_N, n, programs * BLOCK_N):
        offs = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        diagonal = tl.load(
            factor_ptr + offs * stride_fm + offs * stride_fn, mask=offs < n, other=0.0
        )
        held = tl.maximum(held, _magnitude(diagonal))
    tl.store(extremes_ptr + programs + program, tl.max(held, axis=0))


@triton.jit
def _load_columns(
    x_ptr,
    offs_k,
    offs_n,
    rows,
    width,
    stride_xk,
    stride_xn,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Row offsets are int64: rows * stride passes 2^31 long before memory ends.
    pointers = (
        x_ptr + offs_k[:, None].to(tl.int64) * stride_xk + offs_n[None, :].to(tl.int64) * stride_xn
    )
    mask = (offs_k[:, None] < rows) & (offs_n[None, :] < width)
    x = tl.load(pointers, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    if BIAS:
        ones = (offs_k[:, None] < rows) & (offs_n[None, :] == width)
        x = tl.where(ones, 1.0, x).to(x.dtype)
    return x


@triton.jit
def _tile_position(tile):
    # Tile number -> (row, column) in the lower triangle; fp32 rounding is mended by the two steps.
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _partial_products_kernel(
    sums_ptr,
    x_ptr,
    width,
    rows,
    rows_per_split,
    stride_xk,
    stride_xn,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = _tile_position(tile)
    offs_m = tile_m * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * rows_per_split
    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for k in range(first, min(first + rows_per_split, rows), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        left = _load_columns(
            x_ptr, offs_k, offs_m, rows, width, stride_xk, stride_xn, BIAS, UPCAST
        )  # [BLOCK_K, BLOCK_N]
        right = _load_columns(
            x_ptr, offs_k, offs_n, rows, width, stride_xk, stride_xn, BIAS, UPCAST
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    inside = tl.arange(0, BLOCK_N).to(tl.int64)
    base = (split.to(tl.int64) * tl.num_programs(0) + tile) * (BLOCK_N * BLOCK_N)
    tl.store(sums_ptr + base + inside[:, None] * BLOCK_N + inside[None, :], acc)


@triton.jit
def _commit_kernel(
    factor_ptr,
    info_ptr,
    sums_ptr,
    extremes_ptr,
    decay,
    scale,
    n,
    rows,
    tiles,
    splits,
    extremes,
    stride_fm,
    stride_fn,
    BIAS: tl.constexpr,
    DECAY_TENSOR: tl.constexpr,
    SCALE_TENSOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    EXTREMES: tl.constexpr,
):
    # Numbers arrive as fp32 arguments, not constants: a new value does not compile a new kernel.
    if DECAY_TENSOR:
        decay = tl.load(decay).to(tl.float32)
    else:
        decay = tl.zeros((), dtype=tl.float32) + decay
    if SCALE_TENSOR:
        scale = tl.load(scale).to(tl.float32)
    else:
        scale = tl.zeros((), dtype=tl.float32) + scale

    # Every program comes to the same verdict, and the first one writes it down.
    offs = tl.arange(0, EXTREMES).to(tl.int64)
    amax_bits = tl.max(tl.load(extremes_ptr + offs, mask=offs < extremes, other=0), axis=0)
    held_bits = tl.max(
        tl.load(extremes_ptr + extremes + offs, mask=offs < extremes, other=0), axis=0
    )
    infinity = 0x7F800000
    finite = (amax_bits < infinity) & ((held_bits < infinity) | (decay == 0.0))
    finite = finite & (decay >= 0.0) & (decay <= 1.0) & (tl.abs(scale) <= 3.4028234663852886e38)
    amax = amax_bits.to(tl.float32, bitcast=True)
    if BIAS:
        amax = tl.maximum(amax, 1.0)
    held = tl.where(decay == 0.0, 0.0, held_bits.to(tl.float32, bitcast=True))
    bound = amax * amax * rows * tl.maximum(tl.abs(scale), 1.0) + decay * held
    # A little below the largest fp32 number, for the rounding of the bound itself; infinity is above.
    info = tl.where(bound <= 3.4028e38, 0, 3)
    info = tl.where(finite, info, 1)
    tile, piece = tl.program_id(0), tl.program_id(1)
    if (tile == 0) & (piece == 0):
        tl.store(info_ptr, info)
    if info == 0:
        PIECES: tl.constexpr = BLOCK_N // BLOCK
        tile_m, tile_n = _tile_position(tile)
        inside_m = (piece // PIECES * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        inside_n = (piece % PIECES * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        pointers = sums_ptr + tile.to(tl.int64) * (BLOCK_N * BLOCK_N)
        pointers += inside_m[:, None] * BLOCK_N + inside_n[None, :]
        step = (tl.zeros((), dtype=tl.int64) + tiles) * (BLOCK_N * BLOCK_N)
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for _ in range(splits):
            total += tl.load(pointers)
            pointers += step
        row = (tile_m * BLOCK_N + inside_m)[:, None]
        col = (tile_n * BLOCK_N + inside_n)[None, :]
        lower = (row < n) & (col <= row)
        target = factor_ptr + row * stride_fm + col * stride_fn
        old = tl.load(target, mask=lower, other=0.0)
        # With decay 0 the old content does not count: it may be anything, NaN included.
        old = tl.where(decay == 0.0, 0.0, old)
        new = decay * old + scale * total
        tl.store(target, new, mask=lower)
        # Transposed on the way, so that this store is coalesced too.
        row = (tile_m * BLOCK_N + inside_m)[None, :]
        col = (tile_n * BLOCK_N + inside_n)[:, None]
        mirrored = factor_ptr + col * stride_fm + row * stride_fn
        tl.store(mirrored, tl.trans(new), mask=(row < n) & (col < row))


def launch(
    factor: Tensor,
    x: Tensor,
    info: Tensor,
    *,
    decay: float | Tensor,
    scale: float | Tensor,
    bias: bool,
) -> None:
    """Update one factor in place and write ``info`` (0-d int32), with no host sync.

    The batch is checked first and the last kernel reads the verdict: where it is not 0, nothing is written.
    """
    n, (rows, width) = factor.shape[0], x.shape
    config = config_for(n, x.dtype)
    side = triton.cdiv(n, config.block_n)
    tiles = side * (side + 1) // 2
    split_rows = rows_per_split(tiles, rows, config.block_k)
    splits = triton.cdiv(rows, split_rows)
    blocks = triton.cdiv(rows, EXTREMES_ROWS)
    program_rows = triton.cdiv(blocks, MAX_EXTREMES) * EXTREMES_ROWS
    extremes = triton.cdiv(rows, program_rows)
    partial = torch.empty(2 * extremes, dtype=torch.int32, device=x.device)
    sums = torch.empty(splits * tiles * config.block_n**2, dtype=torch.float32, device=x.device)
    piece = min(config.block_n, COMMIT_BLOCK)
    with torch.cuda.device_of(x):
        _extremes_kernel[(extremes,)](
            partial,
            factor,
            x,
            n,
            width,
            rows,
            program_rows,
            factor.stride(0),
            factor.stride(1),
            x.stride(0),
            x.stride(1),
            BLOCK_K=EXTREMES_ROWS,
            BLOCK_N=EXTREMES_COLUMNS,
            num_warps=SIMPLE_WARPS,
        )
        options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        _partial_products_kernel[(tiles, splits)](
            sums,
            x,
            width,
            rows,
            split_rows,
            x.stride(0),
            x.stride(1),
            BIAS=bias,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee",
            # The interpreter multiplies the bit patterns of bf16.
            UPCAST=interpreting_triton() and x.dtype == torch.bfloat16,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            **options,
        )
        _commit_kernel[(tiles, (config.block_n // piece) ** 2)](
            factor,
            info,
            sums,
            partial,
            decay,
            scale,
            n,
            rows,
            tiles,
            splits,
            extremes,
            factor.stride(0),
            factor.stride(1),
            BIAS=bias,
            DECAY_TENSOR=isinstance(decay, Tensor),
            SCALE_TENSOR=isinstance(scale, Tensor),
            BLOCK_N=config.block_n,
            BLOCK=piece,
            EXTREMES=MAX_EXTREMES,
            num_warps=SIMPLE_WARPS,
        )
