# SPDX-License-Identifier: Apache-2.0
"""The inverse of large matrices in one sweep of panels on the GPU, all matrices of a call in lock-step.

Sweeping the panel ``k`` of a symmetric matrix, with ``A_kk = L Lᵀ`` and ``W_i = A_ik L⁻ᵀ``, replaces every
``A_ij`` by ``A_ij - W_i W_jᵀ``, and in the panel itself ``A_ik`` by ``W_i L⁻¹`` and ``A_kk`` by
``-L⁻ᵀ L⁻¹``. With ``W_k = -L⁻ᵀ``, and zero for what stood in the panel, the first rule says all three. When
all panels are swept, the negated inverse is left: ``n³`` FLOPs in all, every one in a product of 64-blocks
(the one-sweep inversion of Bientinesi, Gunter and van de Geijn 2008, with one sign for all parts).
What is multiplied by an explicit ``L⁻¹`` errs with the condition number of ``L``; hence ``L`` and ``L⁻¹`` are
computed in fp64, and rounded once. The error then stays near that of Cholesky.

Two launches per panel for all matrices together:

1. ``_panel_kernel``: ``W`` of every block of rows.
2. ``_update_kernel``: the lower triangle. The program of the next diagonal block is among the first ones, and
   goes on to invert its Cholesky factor in registers while the others update: so that is rarely waited for.

A pivot that is not positive becomes NaN, and NaN ends in the residual: ``NOT_CONVERGED``.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from grng_kernels.damped_inverse import triton_prologue
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.triton_epilogue import epilogue
from grng_kernels.damped_inverse.triton_prologue import (
    _FIELDS,
    _LINE_AT,
    _PADDED,
    _SQUARE,
    CHUNK,
    TILE,
    _find,
    ceil_to,
)
from grng_kernels.kron_factor.triton_kernel import _tile_position

# An fp32 product out of three TF32 products; three in bf16 would miss the accuracy of fp32 by a factor of 30.
PRECISION = "tf32x3"
PANEL_WARPS, UPDATE_WARPS, STAGES = 4, 4, 2
BLOCK_K = 32

supports = triton_prologue.supports


@triton.jit
def _inverse_square_root(x):
    # From 24 bits to all of fp64 by two Newton steps: its own instruction takes ten times as long.
    y = tl.rsqrt(x.to(tl.float32)).to(tl.float64)
    half = x * 0.5
    y = y * (1.5 - half * y * y)
    return y * (1.5 - half * y * y)


@triton.jit
def _inverse_root(a, BLOCK: tl.constexpr):
    # L⁻¹ of a = L Lᵀ by elimination in place: columns that are done hold the multipliers, as they would
    # act on an identity to the right. One row is taken out per step; its mirror image is the column.
    # In fp64, because everything is multiplied by the result: its error would count with the condition
    # number of the block.
    a = a.to(tl.float64)
    inside = tl.arange(0, BLOCK)
    rows, columns = inside[:, None], inside[None, :]
    roots = tl.zeros((BLOCK,), dtype=tl.float64)
    for k in range(BLOCK):
        line = tl.sum(tl.where(rows == k, a, 0.0), axis=0)
        here = inside == k
        pivot = tl.sum(tl.where(here, line, 0.0), axis=0)
        root = _inverse_square_root(tl.where(pivot > 0, pivot, float("nan")))
        roots = tl.where(here, root, roots)
        multipliers = tl.where(inside > k, line * (root * root), 0.0)
        line = tl.where(here, 1.0, line)
        a = tl.where(columns == k, 0.0, a) - multipliers[:, None] * line[None, :]
    a = tl.where(rows == columns, 1.0, tl.where(columns < rows, a, 0.0))
    return (a * roots[:, None]).to(tl.float32)


@triton.jit(do_not_specialize=["panel", "count"])
def _panel_kernel(
    table_ptr,
    ends_ptr,
    in_ptr,
    roots_ptr,
    lines_ptr,
    panel,
    count,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index, block = _find(ends_ptr, count, tl.program_id(0), CHUNK)
    row = table_ptr + index * _FIELDS
    padded = tl.multiple_of(tl.load(row + _PADDED).to(tl.int32), 64)
    in_ptr += tl.multiple_of(tl.load(row + _SQUARE), 64)
    lines_ptr += (tl.multiple_of(tl.load(row + _LINE_AT), 64) + block * BLOCK) * BLOCK
    roots_ptr += index * (BLOCK * BLOCK)
    inside, step = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    within = inside[:, None] * BLOCK + inside[None, :]
    if block == panel:
        lines = -tl.trans(tl.load(roots_ptr + within))
    else:
        # Only the lower triangle is kept up to date. From a 64-bit place, offsets inside a stripe of tiles
        # fit in 32 bits.
        from_m, from_n = tl.maximum(block, panel) * BLOCK, tl.minimum(block, panel) * BLOCK
        in_ptr += from_m.to(tl.int64) * padded + from_n
        lines = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for k in range(0, BLOCK, BLOCK_K):
            if block < panel:
                tile = tl.trans(tl.load(in_ptr + (k + step[:, None]) * padded + inside[None, :]))
            else:
                tile = tl.load(in_ptr + inside[:, None] * padded + (k + step[None, :]))
            root = tl.load(roots_ptr + inside[:, None] * BLOCK + (k + step[None, :]))
            lines = tl.dot(tile, tl.trans(root), lines, input_precision=PRECISION)
    tl.store(lines_ptr + within, lines)


@triton.jit(do_not_specialize=["panel", "count"])
def _update_kernel(
    table_ptr,
    ends_ptr,
    in_ptr,
    out_ptr,
    lines_ptr,
    roots_ptr,
    panel,
    count,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    number = tl.program_id(0)
    if number < count:
        index, local = number.to(tl.int64), -1
    else:
        index, local = _find(ends_ptr, count, number - count, CHUNK)
    row = table_ptr + index * _FIELDS
    padded = tl.multiple_of(tl.load(row + _PADDED).to(tl.int32), 64)
    square = tl.multiple_of(tl.load(row + _SQUARE), 64)
    side = padded // BLOCK
    # The first programs take the next diagonal block of each matrix, the others the tiles around it.
    after = panel + 1
    special = tl.where(after < side, after * (after + 1) // 2 + after, 0)
    tile = tl.where(local < 0, special, tl.where(local < special, local, local + 1))
    tile_m, tile_n = _tile_position(tile)
    inside, step = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    within = inside[:, None] * padded + inside[None, :]
    here = square + (tile_m * BLOCK).to(tl.int64) * padded + tile_n * BLOCK
    if FIRST:
        a = tl.load(in_ptr + here + within)
    else:
        lines_ptr += tl.multiple_of(tl.load(row + _LINE_AT), 64) * BLOCK
        product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        along = inside[:, None] * BLOCK + step[None, :]
        for k in range(0, BLOCK, BLOCK_K):
            left = tl.load(lines_ptr + tile_m * (BLOCK * BLOCK) + k + along)
            right = tl.load(lines_ptr + tile_n * (BLOCK * BLOCK) + k + along)
            product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
            squares += tl.sum(left * left, axis=1)
        # The largest elements, all of one sign: here the cut-off sums of tensor cores would add up.
        on_diagonal = (tile_m == tile_n) & (inside[:, None] == inside[None, :])
        product = tl.where(on_diagonal, squares[:, None], product)
        swept = (tile_m == panel) | (tile_n == panel)
        a = tl.where(swept, 0.0, tl.load(in_ptr + here + within)) - product
        if after == side:
            # The last panel: what is left is the negated inverse, and both triangles get one value.
            a = -a
            if tile_m == tile_n:
                a = (a + tl.trans(a)) * 0.5
            else:
                there = square + (tile_n * BLOCK).to(tl.int64) * padded + tile_m * BLOCK
                tl.store(out_ptr + there + within, tl.trans(a))
        tl.store(out_ptr + here + within, a)
    if (local < 0) & (after < side):
        root = _inverse_root(a, BLOCK)
        roots_ptr += index * (BLOCK * BLOCK)
        tl.store(roots_ptr + inside[:, None] * BLOCK + inside[None, :], root)


def padded_order(n: int) -> int:
    """Return the order that a matrix is padded to."""
    return ceil_to(n, TILE)


def _segments(sides: list[int]) -> list[triton_prologue.Counts]:
    """Return the blocks of rows of all matrices, and their tiles but the first."""
    blocks = [side // TILE for side in sides]
    return [(0, blocks), (0, [b * (b + 1) // 2 - 1 for b in blocks])]


def launch(entries: Sequence[Entry], *, rho: float | None) -> None:
    """Invert the damped matrices of all entries, with no host sync; can be captured in a graph.

    Launches: 21 before, 2 per panel of the largest matrix and one more, and 3 after: 49 for order 768.
    Workspace: 10 bytes for each element of a padded matrix, and 256 for each of its rows.

    Args:
        entries: Of any orders that are supported; fp32, bf16 or fp16, any strides; with a damping each, or
            none and ``rho``.
        rho: As in ``damped_inverse``.
    """
    if not entries:
        return
    batch = triton_prologue.batch_of("direct", entries, padded_order, _segments)
    device = batch.table.device
    panels, tiles = batch.segments
    sides = [side // TILE for side in batch.sides]
    count = len(sides)
    with torch.cuda.device_of(batch.table):
        matrices = triton_prologue.prologue(batch, rho=rho, low=False)
        work = torch.empty(batch.squares, dtype=torch.float32, device=device)
        lines = torch.empty(batch.lines * TILE, dtype=torch.float32, device=device)
        roots = torch.empty(count * TILE * TILE, dtype=torch.float32, device=device)
        constants = {"PRECISION": PRECISION, "BLOCK": TILE, "BLOCK_K": BLOCK_K, "CHUNK": CHUNK}
        _update_kernel[(count,)](
            tiles.table, tiles.ends, matrices.wide, work, lines, roots, -1, count,
            FIRST=True, num_warps=UPDATE_WARPS, num_stages=STAGES, **constants,
        )  # fmt: skip
        for panel in range(sides[0]):
            # The largest matrices come first: those with this panel are a run from the start.
            active = [side for side in sides if side > panel]
            # The first panel reads the damped matrix, which stays as it is for the residual.
            source = work if panel else matrices.wide
            _panel_kernel[(sum(active),)](
                panels.table, panels.ends, source, roots, lines, panel, len(active),
                num_warps=PANEL_WARPS, num_stages=STAGES, **constants,
            )  # fmt: skip
            _update_kernel[(sum(b * (b + 1) // 2 for b in active),)](
                tiles.table, tiles.ends, source, work, lines, roots, panel, len(active),
                FIRST=False, num_warps=UPDATE_WARPS, num_stages=STAGES, **constants,
            )  # fmt: skip
        epilogue(batch, matrices, work)
