# SPDX-License-Identifier: Apache-2.0
"""The factor update in Triton: any number of factors in a few launches, without a wait for the device.

1. ``_products_kernel``: one program per tile of the lower triangle and per split of the rows of one layer;
   it finds its layer in a table. It writes partial products and, from the tiles on the diagonal, what
   decides whether the factor may be changed: the largest magnitudes of ``x`` and of the factor's diagonal.
   One launch for each combination of input type, tile size and alignment in the call, so up to six for
   one input type and usually one or two.
2. ``_commit_kernel``: adds the splits in a fixed order and writes both triangles from one value; one launch.

A plain grid and not a persistent loop: the programs of a layer differ little in length, two of them share a
multiprocessor, and so the start and the end of one hide behind the products of the other, which a loop over
work items in one program cannot do without giving up half of its shared memory. The splits of a layer depend
on its own shape alone: grouped or alone, the result is the same bitwise.

The column of ones of a bias is never multiplied: its products are column sums, which the programs on the
diagonal take from the tile they have anyway. Tiles cover ``width`` columns, 768 and not 769. The order of
these sums follows the alignment of ``x``: a copy of ``x`` at another address may change the last bits of that
row, and of no other element.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels import _table
from grng_kernels._dispatch import interpreting_triton


class Config(NamedTuple):
    """Tile sizes and launch parameters of one variant of the kernel.

    ``hopper_warps`` is for sm_90 and later, ``num_warps`` for what came before.
    """

    block_n: int
    block_k: int
    num_warps: int
    hopper_warps: int
    num_stages: int


class Variants(NamedTuple):
    """What one tile size needs: a config for aligned tensors, one for all others, and bounds of a split.

    A partial product is written and read once, which ``min_rows`` keeps small beside the work that made it.
    ``max_rows`` keeps the sequence of fp32 additions short: its rounding error grows with the length.
    """

    aligned: Config
    general: Config
    min_rows: int
    max_rows: int

    def config(self, aligned: bool) -> Config:
        """Return the config; both kinds have one ``block_k``, so that they add in the same order."""
        return self.aligned if aligned else self.general


# Chosen by reasoning, not yet by measurement; all compile without spills for sm_80, sm_90 and sm_100
# (tests/aot/test_triton_aot.py). A tile of 128 with 4 warps takes 208 to 234 registers and 96 KiB on sm_90:
# two programs share a multiprocessor, and one multiplies while the other begins or ends; sm_80 needs 8 warps
# for it. Without alignment every element is a load of its own, and a tile of 128 spills.
_GENERAL_64 = Config(64, 64, 8, 8, 3)
TILES_16BIT = {
    32: Variants(Config(32, 128, 4, 4, 3), Config(32, 128, 8, 8, 3), 512, 4096),
    64: Variants(Config(64, 64, 4, 4, 3), _GENERAL_64, 512, 4096),
    128: Variants(Config(128, 64, 8, 4, 3), _GENERAL_64, 2048, 4096),
}
# A tile of 128 spills on sm_80.
TILES_FP32 = {
    32: Variants(Config(32, 32, 4, 4, 3), Config(32, 32, 4, 4, 3), 512, 1024),
    64: Variants(Config(64, 32, 4, 4, 3), Config(64, 32, 8, 8, 3), 512, 1024),
}

# Programs that fill a large GPU twice.
TARGET_PROGRAMS = 264
MAX_SPLITS = 64
# Memory for partial products, in bytes: a call that needs more is served in several sets of launches.
WORKSPACE = 512 << 20
# Layers that a program looks through at once.
CHUNK = 256
# Extremes that a program of the last launch reads at once, and the side of what it writes.
EXTREMES = 256
COMMIT_BLOCK = 32
# Splits whose loads are in flight together.
UNROLL = 4
COMMIT_WARPS = 4


def variants_for(width: int, dtype: torch.dtype) -> Variants:
    """Return the variants for ``width`` columns: the smallest tile that holds them, or the largest."""
    table = TILES_FP32 if dtype == torch.float32 else TILES_16BIT
    return table[min((b for b in table if b >= width), default=max(table))]


def rows_per_split(width: int, rows: int, variants: Variants) -> int:
    """Return how many rows one program sums: a multiple of ``block_k``, decided by the shape alone."""
    block_n, block_k = variants.aligned[:2]
    tiles = _triangle(-(-width // block_n))
    wanted = min(-(-TARGET_PROGRAMS // tiles), MAX_SPLITS, rows // variants.min_rows)
    wanted = max(wanted, -(-rows // variants.max_rows), 1)
    return -(-rows // (wanted * block_k)) * block_k


def _triangle(side: int) -> int:
    return max(side * (side + 1) // 2, 1)


class Layer(NamedTuple):
    """One row of the table: what the kernels know of a layer, or of one group of a convolution.

    Offsets count elements of a workspace. The last six numbers are those of a convolution.
    """

    factor: int
    stride_fm: int
    stride_fn: int
    n: int
    x: int
    stride_xk: int
    stride_xn: int
    width: int
    rows: int
    rows_per_split: int
    splits: int
    tiles: int
    side: int
    block_n: int
    item: int
    sums: int = 0
    column_sums: int = 0
    extremes: int = 0
    extreme_count: int = 0
    held: int = 0
    held_first: int = 0
    held_count: int = 0
    first_product: int = 0
    first_commit: int = 0
    stride_xh: int = 0
    stride_xw: int = 0
    image_height: int = 0
    image_width: int = 0
    out_height: int = 0
    out_width: int = 0


# Kernels read module constants only as tl.constexpr.
_FIELDS = tl.constexpr(len(Layer._fields))
_FACTOR = tl.constexpr(Layer._fields.index("factor"))
_STRIDE_FM = tl.constexpr(Layer._fields.index("stride_fm"))
_STRIDE_FN = tl.constexpr(Layer._fields.index("stride_fn"))
_N = tl.constexpr(Layer._fields.index("n"))
_X = tl.constexpr(Layer._fields.index("x"))
_STRIDE_XK = tl.constexpr(Layer._fields.index("stride_xk"))
_STRIDE_XN = tl.constexpr(Layer._fields.index("stride_xn"))
_WIDTH = tl.constexpr(Layer._fields.index("width"))
_ROWS = tl.constexpr(Layer._fields.index("rows"))
_ROWS_PER_SPLIT = tl.constexpr(Layer._fields.index("rows_per_split"))
_SPLITS = tl.constexpr(Layer._fields.index("splits"))
_TILES = tl.constexpr(Layer._fields.index("tiles"))
_SIDE = tl.constexpr(Layer._fields.index("side"))
_BLOCK_N = tl.constexpr(Layer._fields.index("block_n"))
_SUMS = tl.constexpr(Layer._fields.index("sums"))
_COLUMN_SUMS = tl.constexpr(Layer._fields.index("column_sums"))
_EXTREMES = tl.constexpr(Layer._fields.index("extremes"))
_EXTREME_COUNT = tl.constexpr(Layer._fields.index("extreme_count"))
_HELD = tl.constexpr(Layer._fields.index("held"))
_HELD_FIRST = tl.constexpr(Layer._fields.index("held_first"))
_HELD_COUNT = tl.constexpr(Layer._fields.index("held_count"))
_ITEM = tl.constexpr(Layer._fields.index("item"))
_FIRST_PRODUCT = tl.constexpr(Layer._fields.index("first_product"))
_FIRST_COMMIT = tl.constexpr(Layer._fields.index("first_commit"))
# An fp32 product out of three TF32 products. Three bf16 products would take half the tensor instructions on
# sm_90 (6 HGMMA of k16 for 12 of k8 in 32 rows) but err 6 to 20 times as much as PyTorch in fp32, where the
# limit is twice; see tests/ops/test_fp32_products.py.
PRECISION_FP32 = "tf32x3"


@triton.jit
def _find_layer(ends_ptr, layers, CHUNK: tl.constexpr):
    # How many layers end at or before this program. One load for all of them: a search by halving would
    # wait for memory at every step.
    layer = tl.zeros((), dtype=tl.int64)
    for first in range(0, layers, CHUNK):
        offs = first + tl.arange(0, CHUNK).to(tl.int64)
        ends = tl.load(ends_ptr + offs, mask=offs < layers, other=0x7FFFFFFFFFFFFFFF)
        layer += tl.sum((ends <= tl.program_id(0)).to(tl.int32), axis=0)
    return layer


@triton.jit
def _tile_position(tile):
    # Tile number -> (row, column) in the lower triangle; fp32 rounding is mended by the two steps.
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _bits(x):
    # With the sign bit cleared, the order of the bit patterns is the order of the magnitudes, and every inf
    # and NaN lies above every finite number: one integer maximum finds both.
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True) & 0x7FFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _by_height(x, HEIGHT: tl.constexpr):
    # Rows that lie HEIGHT apart are rows of one thread: combining them takes no exchange between threads, and
    # an accumulator of HEIGHT rows takes a fraction of the registers of one for the whole block.
    return tl.reshape(x, (x.shape[0] // HEIGHT, HEIGHT, x.shape[1]))


@triton.jit
def _largest(bits, DTYPE: tl.constexpr):
    # The same as the bits of an fp32 number; tl.max has made 32 bits of 16.
    most = tl.max(tl.max(bits, axis=1), axis=0)
    if DTYPE.primitive_bitwidth == 16:
        most = most.to(tl.int16)
    return most.to(DTYPE, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _store_product(sums_ptr, row, inside, acc, BLOCK_N: tl.constexpr):
    offs = tl.arange(0, BLOCK_N).to(tl.int64)
    target = sums_ptr + tl.load(row + _SUMS) + inside.to(tl.int64) * (BLOCK_N * BLOCK_N)
    tl.store(target + offs[:, None] * BLOCK_N + offs[None, :], acc)


@triton.jit
def _store_held(extremes_ptr, row, tile, offs):
    # The factor's diagonal, from the programs of the first split; its last element in every tile, because
    # with a bias it lies in none.
    n = tl.load(row + _N)
    step = tl.load(row + _STRIDE_FM) + tl.load(row + _STRIDE_FN)
    diagonal_ptr = tl.load(row + _FACTOR).to(tl.pointer_type(tl.float32))
    offs = tl.minimum(offs.to(tl.int64), n - 1)
    held = tl.max(_bits(tl.load(diagonal_ptr + offs * step)), axis=0)
    held = tl.maximum(held, _bits(tl.load(diagonal_ptr + (n - 1) * step)))
    tl.store(extremes_ptr + tl.load(row + _HELD) + tile, held)


@triton.jit
def _store_column_sums(column_sums_ptr, row, split, tile, ones, BLOCK_N: tl.constexpr):
    # Laid out as [splits, side * BLOCK_N].
    target = column_sums_ptr + tl.load(row + _COLUMN_SUMS)
    target += (split * tl.load(row + _SIDE) + tile) * BLOCK_N
    tl.store(target + tl.arange(0, BLOCK_N).to(tl.int64), tl.sum(ones, axis=0))


@triton.jit
def _pointers(base, row, offs_k, offs_n, stride_xk, ALIGNED: tl.constexpr):
    # Row offsets are int64: rows * stride passes 2^31 long before memory ends.
    rows = base + offs_k[:, None].to(tl.int64) * stride_xk
    if ALIGNED:
        return rows + offs_n[None, :].to(tl.int64)
    else:
        return rows + offs_n[None, :].to(tl.int64) * tl.load(row + _STRIDE_XN)


@triton.jit(do_not_specialize=["layers"])
def _products_kernel(
    table_ptr,
    ends_ptr,
    sums_ptr,
    column_sums_ptr,
    extremes_ptr,
    layers,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = table_ptr + _find_layer(ends_ptr, layers, CHUNK) * _FIELDS
    inside = tl.program_id(0) - tl.load(row + _FIRST_PRODUCT).to(tl.int32)
    tiles = tl.load(row + _TILES).to(tl.int32)
    # Tiles of one split lie side by side: they read the same rows at the same time.
    split, tile = inside // tiles, inside % tiles
    tile_m, tile_n = _tile_position(tile)
    split_rows = tl.load(row + _ROWS_PER_SPLIT)
    first = split * split_rows
    count = tl.minimum(split_rows, tl.load(row + _ROWS) - first).to(tl.int32)
    stride_xk = tl.load(row + _STRIDE_XK)
    width = tl.load(row + _WIDTH).to(tl.int32)
    base = tl.load(row + _X).to(tl.pointer_type(DTYPE)) + first * stride_xk
    if ALIGNED:
        # Nothing is known of numbers from memory; without this there is no vector load and no pipeline.
        PER_16_BYTES: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        base = tl.multiple_of(base, 16)
        stride_xk = tl.multiple_of(stride_xk, PER_16_BYTES)
        width = tl.multiple_of(width, PER_16_BYTES)
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tile_m * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    left_ptrs = _pointers(base, row, offs_k, offs_m, stride_xk, ALIGNED)
    right_ptrs = _pointers(base, row, offs_k, offs_n, stride_xk, ALIGNED)
    step = stride_xk * BLOCK_K
    in_left, in_right = offs_m[None, :] < width, offs_n[None, :] < width
    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    if tile_m == tile_n:
        # Both operands are one tile: half the loads, and every element of x comes by once.
        bits = tl.zeros((HEIGHT, BLOCK_N), dtype=tl.int32)
        ones = tl.zeros((HEIGHT, BLOCK_N), dtype=tl.float32)
        for k in range(0, count, BLOCK_K):
            x = tl.load(right_ptrs, mask=(offs_k[:, None] < count - k) & in_right, other=0.0)
            bits = tl.maximum(bits, tl.max(_by_height(_bits(x), HEIGHT), axis=0))
            if BIAS:
                ones += tl.sum(_by_height(x.to(tl.float32), HEIGHT), axis=0)
            if UPCAST:
                x = x.to(tl.float32)
            acc = tl.dot(tl.trans(x), x, acc, input_precision=PRECISION)
            right_ptrs += step
        slot = tl.load(row + _EXTREMES) + split * tl.load(row + _SIDE) + tile_n
        tl.store(extremes_ptr + slot, _largest(bits, DTYPE))
        if split == 0:
            _store_held(extremes_ptr, row, tile_n, offs_n)
        if BIAS:
            _store_column_sums(column_sums_ptr, row, split, tile_n, ones, BLOCK_N)
        _store_product(sums_ptr, row, inside, acc, BLOCK_N)
    else:
        for k in range(0, count, BLOCK_K):
            inside_rows = offs_k[:, None] < count - k
            left = tl.load(left_ptrs, mask=inside_rows & in_left, other=0.0)
            right = tl.load(right_ptrs, mask=inside_rows & in_right, other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
            left_ptrs += step
            right_ptrs += step
        _store_product(sums_ptr, row, inside, acc, BLOCK_N)


@triton.jit
def _largest_of(extremes_ptr, first, count, EXTREMES: tl.constexpr):
    largest = tl.zeros((EXTREMES,), dtype=tl.int32)
    offs = tl.arange(0, EXTREMES).to(tl.int64)
    for start in range(0, count, EXTREMES):
        mask = start + offs < count
        largest = tl.maximum(
            largest, tl.load(extremes_ptr + first + start + offs, mask=mask, other=0)
        )
    return tl.max(largest, axis=0)


@triton.jit
def _verdict(row, extremes_ptr, decay, scale, BIAS: tl.constexpr, EXTREMES: tl.constexpr):
    amax_bits = _largest_of(
        extremes_ptr,
        tl.load(row + _EXTREMES),
        tl.load(row + _EXTREME_COUNT).to(tl.int32),
        EXTREMES,
    )
    held_bits = _largest_of(
        extremes_ptr, tl.load(row + _HELD_FIRST), tl.load(row + _HELD_COUNT).to(tl.int32), EXTREMES
    )
    infinity = 0x7F800000
    finite = (amax_bits < infinity) & ((held_bits < infinity) | (decay == 0.0))
    finite = finite & (decay >= 0.0) & (decay <= 1.0) & (tl.abs(scale) <= 3.4028234663852886e38)
    amax = amax_bits.to(tl.float32, bitcast=True)
    if BIAS:
        amax = tl.maximum(amax, 1.0)
    held = tl.where(decay == 0.0, 0.0, held_bits.to(tl.float32, bitcast=True))
    rows = tl.load(row + _ROWS).to(tl.float32)
    bound = amax * amax * rows * tl.maximum(tl.abs(scale), 1.0) + decay * held
    # A little below the largest fp32 number, for the rounding of the bound itself; infinity is above.
    info = tl.where(bound <= 3.4028e38, 0, 3)
    return tl.where(finite, info, 1)


@triton.jit
def _updated(old, total, decay, scale):
    # With decay 0 the old content does not count: it may be anything, NaN included.
    return decay * tl.where(decay == 0.0, 0.0, old) + scale * total


@triton.jit
def _commit_ones(
    row, factor_ptr, column_sums_ptr, offs_n, corner, decay, scale, BLOCK: tl.constexpr
):
    # The last row of a factor with a bias, where it meets these columns, and its last element.
    last = tl.load(row + _N) - 1
    stride_fm, stride_fn = tl.load(row + _STRIDE_FM), tl.load(row + _STRIDE_FN)
    step = tl.load(row + _SIDE) * tl.load(row + _BLOCK_N)
    pointers = column_sums_ptr + tl.load(row + _COLUMN_SUMS) + offs_n
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(tl.load(row + _SPLITS).to(tl.int32)):
        total += tl.load(pointers)
        pointers += step
    mask = offs_n < tl.load(row + _WIDTH)
    lower = factor_ptr + last * stride_fm + offs_n * stride_fn
    new = _updated(tl.load(lower, mask=mask, other=0.0), total, decay, scale)
    tl.store(lower, new, mask=mask)
    tl.store(factor_ptr + offs_n * stride_fm + last * stride_fn, new, mask=mask)
    if corner:
        target = factor_ptr + last * (stride_fm + stride_fn)
        rows = tl.load(row + _ROWS).to(tl.float32)
        tl.store(target, _updated(tl.load(target), rows, decay, scale))


@triton.jit(do_not_specialize=["layers"])
def _commit_kernel(
    table_ptr,
    ends_ptr,
    info_ptr,
    sums_ptr,
    column_sums_ptr,
    extremes_ptr,
    scales_ptr,
    decay,
    layers,
    BIAS: tl.constexpr,
    DECAY_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    EXTREMES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = table_ptr + _find_layer(ends_ptr, layers, CHUNK) * _FIELDS
    inside = tl.program_id(0) - tl.load(row + _FIRST_COMMIT).to(tl.int32)
    item = tl.load(row + _ITEM)
    # Numbers arrive as fp32 arguments, not constants: a new value does not compile a new kernel.
    if DECAY_TENSOR:
        decay = tl.load(decay).to(tl.float32)
    else:
        decay = tl.zeros((), dtype=tl.float32) + decay
    scale = tl.load(scales_ptr + item)

    # Every program comes to the same verdict, and the first one of the layer writes it down.
    info = _verdict(row, extremes_ptr, decay, scale, BIAS, EXTREMES)
    if inside == 0:
        tl.store(info_ptr + item, info)
    if info == 0:
        block_n = tl.load(row + _BLOCK_N).to(tl.int32)
        side_pieces = block_n // BLOCK
        tile = inside // (side_pieces * side_pieces)
        piece = inside % (side_pieces * side_pieces)
        piece_m, piece_n = piece // side_pieces, piece % side_pieces
        tile_m, tile_n = _tile_position(tile)
        inside_m = (piece_m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        inside_n = (piece_n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        size = block_n.to(tl.int64) * block_n
        splits = tl.load(row + _SPLITS).to(tl.int32)
        pointers = sums_ptr + tl.load(row + _SUMS) + tile * size
        pointers += inside_m[:, None] * block_n + inside_n[None, :]
        step = tl.load(row + _TILES) * size
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for first in range(0, splits, UNROLL):
            # One after another in the order of the splits, but loaded together.
            for i in tl.static_range(UNROLL):
                total += tl.load(pointers + i * step, mask=first + i < splits, other=0.0)
            pointers += UNROLL * step
        width = tl.load(row + _WIDTH)
        stride_fm, stride_fn = tl.load(row + _STRIDE_FM), tl.load(row + _STRIDE_FN)
        factor_ptr = tl.load(row + _FACTOR).to(tl.pointer_type(tl.float32))
        offs_m, offs_n = tile_m * block_n + inside_m, tile_n * block_n + inside_n
        row_m, col_n = offs_m[:, None], offs_n[None, :]
        lower = (row_m < width) & (col_n <= row_m)
        target = factor_ptr + row_m * stride_fm + col_n * stride_fn
        new = _updated(tl.load(target, mask=lower, other=0.0), total, decay, scale)
        tl.store(target, new, mask=lower)
        # Transposed on the way, so that this store is coalesced too.
        row_m, col_n = offs_m[None, :], offs_n[:, None]
        mirrored = factor_ptr + col_n * stride_fm + row_m * stride_fn
        tl.store(mirrored, tl.trans(new), mask=(row_m < width) & (col_n < row_m))
        if BIAS:
            if (tile_m == tile_n) & (piece_m == piece_n):
                _commit_ones(
                    row, factor_ptr, column_sums_ptr, offs_n, inside == 0, decay, scale, BLOCK
                )


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Group(NamedTuple):
    """One launch of a products kernel: layers of one input type, tile and alignment."""

    dtype: torch.dtype
    config: Config
    aligned: bool
    table: Tensor
    ends: Tensor
    layers: int
    programs: int


class Batch(NamedTuple):
    """Layers whose partial products fit in the workspace together.

    ``slots`` holds where the partial maxima of each item begin.
    """

    groups: list[Group]
    table: Tensor
    ends: Tensor
    layers: int
    programs: int
    sums: int
    column_sums: int
    extremes: int
    slots: dict[int, int]


class Unit(NamedTuple):
    """One item of a call: the layers that are committed together, and how they are launched.

    ``extremes`` is the number of partial maxima of ``x`` where another kernel writes them; by default the
    programs on the diagonal do.
    """

    dtype: torch.dtype
    config: Config
    aligned: bool
    layers: list[Layer]
    extremes: int = 0

    @property
    def sums(self) -> int:
        """Size of the partial products."""
        return sum(layer.tiles * layer.splits * layer.block_n**2 for layer in self.layers)


def plan_batches(units: Sequence[Unit], device: torch.device) -> list[Batch]:
    """Lay out the workspaces, write the tables and copy them to the device."""
    # Launches of one kind together; in each, the longest programs first, so that short ones fill the end.
    ordered = sorted(
        units,
        key=lambda u: (str(u.dtype), -u.config.block_n, not u.aligned, -u.layers[0].rows_per_split),
    )
    batches: list[list[Unit]] = []
    room = 0
    for unit in ordered:
        if not batches or 4 * unit.sums > room:
            batches.append([])
            room = WORKSPACE
        batches[-1].append(unit)
        room -= 4 * unit.sums
    return [_plan_batch(batch, device) for batch in batches]


def _plan_batch(units: Sequence[Unit], device: torch.device) -> Batch:
    sums = column_sums = extremes = commits = 0
    layers: list[Layer] = []
    slots: dict[int, int] = {}
    commit_ends: list[int] = []
    # [dtype, config, aligned, first layer, ends of the programs]
    groups: list[tuple[torch.dtype, Config, bool, int, list[int]]] = []
    for unit in units:
        if not groups or groups[-1][:3] != unit[:3]:
            groups.append((*unit[:3], len(layers), []))
        ends = groups[-1][4]
        own = sum(layer.side * layer.splits for layer in unit.layers)
        first, held = extremes, extremes + (unit.extremes or own)
        slots[unit.layers[0].item] = first
        held_end = held
        held_count = sum(layer.side for layer in unit.layers)
        for layer in unit.layers:
            start = ends[-1] if ends else 0
            layers.append(
                layer._replace(
                    sums=sums, column_sums=column_sums, extremes=first,
                    extreme_count=unit.extremes or own, held=held_end, held_first=held,
                    held_count=held_count, first_product=start, first_commit=commits,
                )
            )  # fmt: skip
            sums += layer.tiles * layer.splits * layer.block_n**2
            column_sums += layer.splits * layer.side * layer.block_n
            held_end += layer.side
            ends.append(start + layer.tiles * layer.splits)
            commits += layer.tiles * (layer.block_n // COMMIT_BLOCK) ** 2
            commit_ends.append(commits)
        extremes = held_end
    numbers = [number for layer in layers for number in layer]
    starts = []
    for values in (*(group[4] for group in groups), commit_ends):
        starts.append(len(numbers))
        # Two numbers are 16 bytes: all parts are aligned alike, and one compiled kernel serves them.
        numbers += [*values, 0] if len(values) % 2 else values
    table = _table.upload(torch.tensor(numbers, dtype=torch.int64), device)
    width = len(Layer._fields)
    return Batch(
        groups=[
            Group(
                dtype, config, aligned, table[first * width :], table[start:], len(ends), ends[-1]
            )
            for (dtype, config, aligned, first, ends), start in zip(groups, starts, strict=False)
        ],
        table=table,
        ends=table[starts[-1] :],
        layers=len(layers),
        programs=commits,
        sums=sums,
        column_sums=column_sums,
        extremes=extremes,
        slots=slots,
    )


def is_aligned(x: Tensor) -> bool:
    """Return whether every row of a matrix starts and ends at a multiple of 16 bytes."""
    per_16_bytes = 16 // x.element_size()
    return (
        x.data_ptr() % 16 == 0
        and x.stride(1) == 1
        and x.stride(0) % per_16_bytes == 0
        and x.shape[1] % per_16_bytes == 0
    )


def _unit(item: int, factor: Tensor, x: Tensor) -> Unit:
    rows, width = x.shape
    variants = variants_for(width, x.dtype)
    aligned = is_aligned(x)
    config = variants.config(aligned)
    side = max(-(-width // config.block_n), 1)
    split_rows = rows_per_split(width, rows, variants)
    layer = Layer(
        factor=factor.data_ptr(),
        stride_fm=factor.stride(0),
        stride_fn=factor.stride(1),
        n=factor.shape[0],
        x=x.data_ptr(),
        stride_xk=x.stride(0),
        stride_xn=x.stride(1),
        width=width,
        rows=rows,
        rows_per_split=split_rows,
        splits=-(-rows // split_rows),
        tiles=_triangle(side),
        side=side,
        block_n=config.block_n,
        item=item,
    )
    return Unit(x.dtype, config, aligned, [layer])


def warps_of(config: Config, device: torch.device) -> int:
    """Return the warps of a program on this device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return config.num_warps
    return config.hopper_warps


def fold_height(config: Config, warps: int, *, per_load: int) -> int:
    """Return how many rows of a block the threads of a program cover at once, ``per_load`` elements each."""
    return min(max(32 * warps * per_load // config.block_n, 1), config.block_k)


def products_constants(
    dtype: torch.dtype, config: Config, warps: int, *, aligned: bool, bias: bool
) -> dict[str, Any]:
    """Return the compile-time arguments of ``_products_kernel``."""
    per_load = 16 // dtype.itemsize if aligned else 1
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "ALIGNED": aligned,
        "BIAS": bias,
        "PRECISION": PRECISION_FP32 if dtype == torch.float32 else "ieee",
        # The interpreter multiplies the bit patterns of bf16.
        "UPCAST": interpreting_triton() and dtype == torch.bfloat16,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "HEIGHT": fold_height(config, warps, per_load=per_load),
        "CHUNK": CHUNK,
    }


def scales_on_device(scales: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Return one fp32 number per item, without a wait for the device."""
    numbers = tuple(0.0 if isinstance(s, Tensor) else float(s) for s in scales)
    where = [i for i, s in enumerate(scales) if isinstance(s, Tensor)]
    result: Tensor
    if len(where) < len(scales):
        result = _table.cached(
            ("scales", numbers),
            device,
            lambda: _table.upload(torch.tensor(numbers, dtype=torch.float32), device),
        )
        if not where:
            return result
        parts = list(result.unbind())
    else:
        parts = [result for result in scales if isinstance(result, Tensor)]
    for i in where:
        parts[i] = torch.as_tensor(scales[i]).to(torch.float32)
    return torch.stack(parts)


def commit(
    batch: Batch,
    info: Tensor,
    workspace: tuple[Tensor, Tensor, Tensor],
    *,
    decay: float | Tensor,
    scales: Tensor,
    bias: bool,
) -> None:
    """Launch ``_commit_kernel`` for every layer of a batch."""
    sums, column_sums, extremes = workspace
    _commit_kernel[(batch.programs,)](
        batch.table,
        batch.ends,
        info,
        sums,
        column_sums,
        extremes,
        scales,
        decay,
        batch.layers,
        BIAS=bias,
        DECAY_TENSOR=isinstance(decay, Tensor),
        BLOCK=COMMIT_BLOCK,
        UNROLL=UNROLL,
        EXTREMES=EXTREMES,
        CHUNK=CHUNK,
        num_warps=COMMIT_WARPS,
    )


def allocate(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the partial products, the column sums and the largest magnitudes."""
    return (
        torch.empty(batch.sums, dtype=torch.float32, device=device),
        torch.empty(batch.column_sums, dtype=torch.float32, device=device),
        torch.empty(batch.extremes, dtype=torch.int32, device=device),
    )


def launch(
    factors: Sequence[Tensor],
    xs: Sequence[Tensor],
    info: Tensor,
    *,
    decay: float | Tensor,
    scales: Sequence[float | Tensor],
    bias: bool,
) -> None:
    """Update factors in place and write ``info``, with no host sync; the launches can be captured in a graph.

    The number of launches does not depend on the number of factors, up to 512 MiB of partial products; past
    that there is one more set for every 512 MiB.

    Args:
        factors: ``[N, N]``, fp32, any strides. One whose ``info`` becomes nonzero is not written.
        xs: ``[rows, N]``, or ``[rows, N-1]`` with ``bias``; fp32, bf16 or fp16, any strides.
        info: int32 ``[items]``, zeros. Items without rows or columns stay zero and are left as they are.
        decay: Number or 0-d tensor.
        scales: One number or 0-d tensor for each item.
        bias: Each ``x`` counts as having a last column of ones.
    """
    key = (
        "linear",
        bias,
        tuple(
            (f.data_ptr(), f.stride(), x.data_ptr(), x.shape, x.stride(), x.dtype)
            for f, x in zip(factors, xs, strict=True)
        ),
    )

    def build() -> list[Batch]:
        return plan_batches(
            [
                _unit(i, f, x)
                for i, (f, x) in enumerate(zip(factors, xs, strict=True))
                if x.shape[0] and f.shape[0]
            ],
            info.device,
        )

    with torch.cuda.device_of(info):
        batches: list[Batch] = _table.cached(key, info.device, build)
        if not batches:
            return
        scale_array = scales_on_device(scales, info.device)
        for batch in batches:
            workspace = allocate(batch, info.device)
            for group in batch.groups:
                warps = warps_of(group.config, info.device)
                _products_kernel[(group.programs,)](
                    group.table,
                    group.ends,
                    *workspace,
                    group.layers,
                    **products_constants(
                        group.dtype, group.config, warps, aligned=group.aligned, bias=bias
                    ),
                    num_warps=warps,
                    num_stages=group.config.num_stages,
                )
            commit(batch, info, workspace, decay=decay, scales=scale_array, bias=bias)
