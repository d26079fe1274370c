# SPDX-License-Identifier: Apache-2.0
"""The two-sided product in Triton for lists of weights with one small side, such as those of LoRA.

The time of such a product is that of reading the large inverse once. ``s`` is the smaller side of a
gradient and ``d`` the larger; a tall gradient is treated as its transpose, so that every item reads as
``small [s, s] · gradient [s, d] · large [d, d]``. Items of every size share the launches:

1. ``_partial_kernel``: gradient · large, one program per tile of the result and per split of the sum over
   ``d``. The splits let one item fill the machine; their number depends on the item's shape only.
2. ``_finish_kernel``: adds the splits in a fixed order, multiplies by the small inverse, and writes.
3. ``_dots_kernel``, where the inner products with the gradients are wanted: adds their parts.

Addresses, strides and sizes come from a table on the device (``_table.py``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels import _table
from grng_kernels._dispatch import interpreting_triton
from grng_kernels.triton_pieces import pieces

# Larger sides are no longer a matter of reading one inverse: there a library product does as well.
SKINNY = 128


class Config(NamedTuple):
    """Tile sizes and launch parameters of one variant of the kernels."""

    block_s: int
    block_d: int
    block_k: int
    num_warps: int
    num_stages: int
    finish_d: int
    finish_warps: int


# Chosen by reasoning, not yet by measurement: tiles of the large inverse with enough bytes in flight, no
# spills for sm_80, sm_90 and sm_100 (tests/aot/test_triton_aot.py), and room for several programs on one
# multiprocessor. Without alignment an address takes more registers, so fewer stages fit.
CONFIGS_ALIGNED = {16: Config(16, 64, 32, 2, 4, 32, 4), 64: Config(64, 64, 32, 8, 3, 16, 4)}
CONFIGS_ANY = {16: Config(16, 64, 32, 4, 2, 32, 4), 64: Config(64, 64, 32, 8, 2, 16, 4)}

# Rows of the large inverse that one program reads, at least and at most. Each split costs one write and one
# read of a partial result; a quarter of the sum keeps that small and still fills a large GPU from one item.
MIN_SPLIT, MAX_SPLIT, SPLITS = 256, 1024, 4
# Partial results that a program of the second launch reads at once.
SPLITS_AT_ONCE = 4
DOTS_BLOCK = 128

# What the table holds of one item, in this order.
FIELDS = (
    "grad", "bias", "large", "small", "out", "m", "n", "width", "tall", "split", "splits",
    "grad_row", "grad_column", "bias_row", "large_row", "large_column", "small_row", "small_column",
    "out_row", "out_column", "first_partial", "first_finish", "partials", "parts", "part_count",
)  # fmt: skip
(
    _GRAD, _BIAS, _LARGE, _SMALL, _OUT, _M, _N, _WIDTH, _TALL, _SPLIT, _SPLITS,
    _GRAD_ROW, _GRAD_COLUMN, _BIAS_ROW, _LARGE_ROW, _LARGE_COLUMN, _SMALL_ROW, _SMALL_COLUMN,
    _OUT_ROW, _OUT_COLUMN, _FIRST_PARTIAL, _FIRST_FINISH, _PARTIALS, _PARTS, _PART_COUNT,
) = map(tl.constexpr, range(len(FIELDS)))  # fmt: skip
_FIELDS = tl.constexpr(len(FIELDS))

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Variant(NamedTuple):
    """What a launch is compiled for; a property of an item alone, so that its neighbours do not matter."""

    dtype: torch.dtype
    block_s: int
    aligned: bool
    bias: bool

    @property
    def config(self) -> Config:
        """Tile sizes and launch parameters."""
        return (CONFIGS_ALIGNED if self.aligned else CONFIGS_ANY)[self.block_s]


def supports(m: int, n: int) -> bool:
    """Return whether a gradient of this shape has a side small enough for these kernels."""
    return min(m, n) <= SKINNY


def split_length(d: int) -> int:
    """Return how many terms of a sum over ``d`` one program adds, decided by ``d`` alone."""
    wanted = -(-d // (SPLITS * MIN_SPLIT)) * MIN_SPLIT
    return min(max(wanted, MIN_SPLIT), MAX_SPLIT)


@triton.jit
def _elements(ptr, rows, columns, m, n, row_stride, column_stride, ALIGNED: tl.constexpr):
    # Products of indices and strides are int64: they pass 2^31 long before memory ends.
    pointers = ptr + rows.to(tl.int64) * row_stride
    if ALIGNED:
        pointers += columns.to(tl.int64)
    else:
        pointers += columns.to(tl.int64) * column_stride
    return tl.load(pointers, mask=(rows < m) & (columns < n), other=0.0)


@triton.jit
def _gradient(
    ptr,
    bias_ptr,
    rows,
    columns,
    m,
    n,
    width,
    row_stride,
    column_stride,
    bias_stride,
    ALIGNED: tl.constexpr,
    BIAS: tl.constexpr,
):
    values = _elements(ptr, rows, columns, m, width, row_stride, column_stride, ALIGNED)
    values = values.to(tl.float32)
    if BIAS:
        # The gradient of the bias is the last column, and lies elsewhere.
        last = (rows < m) & (columns >= width) & (columns < n)
        offsets = rows.to(tl.int64) * bias_stride + columns.to(tl.int64) * 0
        values += tl.load(bias_ptr + offsets, mask=last, other=0.0).to(tl.float32)
    return values


@triton.jit
def _product(x, y, PIECE: tl.constexpr):
    # Three bf16 pieces hold all 24 bits of an fp32 number. Of their nine products six reach fp32 precision;
    # with an identity the result is exact, which it is not from three products in TF32.
    x_high, x_middle, x_low = pieces(x)
    y_high, y_middle, y_low = pieces(y)
    x_low, y_low = x_low.to(PIECE), y_low.to(PIECE)
    x_high, y_high = x_high.to(PIECE), y_high.to(PIECE)
    x_middle, y_middle = x_middle.to(PIECE), y_middle.to(PIECE)
    # The smallest first.
    total = tl.dot(x_low, y_high)
    total = tl.dot(x_high, y_low, total)
    total = tl.dot(x_middle, y_middle, total)
    total = tl.dot(x_middle, y_high, total)
    total = tl.dot(x_high, y_middle, total)
    return tl.dot(x_high, y_high, total)


@triton.jit(do_not_specialize=["programs_at"])
def _partial_kernel(
    sums_ptr,
    table_ptr,
    programs_at,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BIAS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    item = table_ptr + tl.load(table_ptr + programs_at + program) * _FIELDS
    grad = tl.load(item + _GRAD).to(tl.pointer_type(GRAD))
    bias = tl.load(item + _BIAS).to(tl.pointer_type(GRAD))
    large = tl.load(item + _LARGE).to(tl.pointer_type(tl.float32))
    m = tl.load(item + _M).to(tl.int32)
    n = tl.load(item + _N).to(tl.int32)
    width = tl.load(item + _WIDTH).to(tl.int32)
    tall = tl.load(item + _TALL)
    split = tl.load(item + _SPLIT).to(tl.int32)
    grad_row, grad_column = tl.load(item + _GRAD_ROW), tl.load(item + _GRAD_COLUMN)
    bias_row = tl.load(item + _BIAS_ROW)
    large_row, large_column = tl.load(item + _LARGE_ROW), tl.load(item + _LARGE_COLUMN)
    sums_ptr += tl.load(item + _PARTIALS)
    # The compiler knows nothing of numbers that were loaded, and reads one by one what it cannot prove to
    # be aligned.
    split = tl.multiple_of(split, BLOCK_K)
    if ALIGNED:
        grad, large = tl.multiple_of(grad, 16), tl.multiple_of(large, 16)
        grad_row, large_row = tl.multiple_of(grad_row, 4), tl.multiple_of(large_row, 4)
        m, n, width = tl.multiple_of(m, 4), tl.multiple_of(n, 4), tl.multiple_of(width, 4)
    s, d = min(m, n), max(m, n)
    if ALIGNED:
        s, d = tl.multiple_of(s, 4), tl.multiple_of(d, 4)

    # Neighbours share the tile of the large inverse first, then its rows.
    local = program - tl.load(item + _FIRST_PARTIAL).to(tl.int32)
    tiles_s, tiles_d = tl.cdiv(s, BLOCK_S), tl.cdiv(d, BLOCK_D)
    offs_s = local % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = local // tiles_s % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    first = local // (tiles_s * tiles_d) * split
    last = min(first + split, d)
    acc = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    # Both loops read every matrix along its rows; only the product sees the transpose.
    if tall != 0:
        for k in range(first, last, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = _gradient(
                grad, bias, offs_k[:, None], offs_s[None, :], m, n, width,
                grad_row, grad_column, bias_row, ALIGNED, BIAS,
            )  # fmt: skip
            y = _elements(
                large, offs_d[:, None], offs_k[None, :], d, d, large_row, large_column, ALIGNED
            )
            acc += _product(tl.trans(x), tl.trans(y), PIECE)
    else:
        for k in range(first, last, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = _gradient(
                grad, bias, offs_s[:, None], offs_k[None, :], m, n, width,
                grad_row, grad_column, bias_row, ALIGNED, BIAS,
            )  # fmt: skip
            y = _elements(
                large, offs_k[:, None], offs_d[None, :], d, d, large_row, large_column, ALIGNED
            )
            acc += _product(x, y, PIECE)
    inside_s, inside_d = tl.arange(0, BLOCK_S).to(tl.int64), tl.arange(0, BLOCK_D).to(tl.int64)
    base = local.to(tl.int64) * (BLOCK_S * BLOCK_D)
    tl.store(sums_ptr + base + inside_s[:, None] * BLOCK_D + inside_d[None, :], acc)


@triton.jit(do_not_specialize=["programs_at"])
def _finish_kernel(
    parts_ptr,
    sums_ptr,
    table_ptr,
    programs_at,
    GRAD: tl.constexpr,
    BIAS: tl.constexpr,
    DOTS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FINISH_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    program = tl.program_id(0)
    item = table_ptr + tl.load(table_ptr + programs_at + program) * _FIELDS
    small = tl.load(item + _SMALL).to(tl.pointer_type(tl.float32))
    out = tl.load(item + _OUT).to(tl.pointer_type(tl.float32))
    m = tl.load(item + _M).to(tl.int32)
    n = tl.load(item + _N).to(tl.int32)
    tall = tl.load(item + _TALL)
    splits = tl.load(item + _SPLITS).to(tl.int32)
    small_row, small_column = tl.load(item + _SMALL_ROW), tl.load(item + _SMALL_COLUMN)
    out_row, out_column = tl.load(item + _OUT_ROW), tl.load(item + _OUT_COLUMN)
    sums_ptr += tl.load(item + _PARTIALS)
    s, d = min(m, n), max(m, n)

    local = program - tl.load(item + _FIRST_FINISH).to(tl.int32)
    PIECES: tl.constexpr = BLOCK_D // FINISH_D
    tiles_s, tiles_d = tl.cdiv(s, BLOCK_S), tl.cdiv(d, BLOCK_D)
    piece = local // tiles_s
    tile_d, first = piece // PIECES, piece % PIECES * FINISH_D
    inside_s, inside_d = tl.arange(0, BLOCK_S), first + tl.arange(0, FINISH_D)
    offs_s = local % tiles_s * BLOCK_S + inside_s
    offs_d = tile_d * BLOCK_D + inside_d
    inside = inside_s[:, None].to(tl.int64) * BLOCK_D + inside_d[None, :].to(tl.int64)
    acc = tl.zeros((BLOCK_S, FINISH_D), dtype=tl.float32)
    for tile in range(tiles_s):
        tile_ptr = sums_ptr + (tile_d * tiles_s + tile).to(tl.int64) * (BLOCK_S * BLOCK_D)
        step = (tiles_s * tiles_d).to(tl.int64) * (BLOCK_S * BLOCK_D)
        total = tl.zeros((BLOCK_S, FINISH_D), dtype=tl.float32)
        for start in range(0, splits, AT_ONCE):
            # Unrolled: the reads are under way together, and the order of the sum stays.
            for i in tl.static_range(AT_ONCE):
                pointers = tile_ptr + step * (start + i) + inside
                total += tl.load(pointers, mask=start + i < splits, other=0.0)
        offs_a = tile * BLOCK_S + inside_s
        factor = _elements(
            small, offs_s[:, None], offs_a[None, :], s, s, small_row, small_column, False
        )
        acc += _product(factor, total, PIECE)
    # Back from the transpose of a tall gradient.
    across, along = offs_s[:, None] + offs_d[None, :] * 0, offs_d[None, :] + offs_s[:, None] * 0
    rows = tl.where(tall != 0, along, across)
    columns = tl.where(tall != 0, across, along)
    inner = (rows < m) & (columns < n)
    target = out + rows.to(tl.int64) * out_row + columns.to(tl.int64) * out_column
    tl.store(target, acc, mask=inner)
    if DOTS:
        grad = tl.load(item + _GRAD).to(tl.pointer_type(GRAD))
        bias = tl.load(item + _BIAS).to(tl.pointer_type(GRAD))
        width = tl.load(item + _WIDTH).to(tl.int32)
        grad_row, grad_column = tl.load(item + _GRAD_ROW), tl.load(item + _GRAD_COLUMN)
        bias_row = tl.load(item + _BIAS_ROW)
        values = _gradient(
            grad, bias, rows, columns, m, n, width,
            grad_row, grad_column, bias_row, False, BIAS,
        )  # fmt: skip
        # Beyond the edge the product may be NaN where the data is: it does not count.
        part = tl.where(inner, acc * values, 0.0)
        total = tl.sum(tl.sum(part, axis=1), axis=0)
        tl.store(parts_ptr + tl.load(item + _PARTS) + local, total)


@triton.jit
def _dots_kernel(dots_ptr, parts_ptr, table_ptr, stride, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    item = table_ptr + number * _FIELDS
    parts_ptr += tl.load(item + _PARTS)
    count = tl.load(item + _PART_COUNT).to(tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + offs.to(tl.int64), mask=offs < count, other=0.0)
    tl.store(dots_ptr + number * stride, tl.sum(total, axis=0))


class Group(NamedTuple):
    """The two launches of one variant: where their programs stand in the table, and how many there are."""

    variant: Variant
    partial_at: int
    partials: int
    finish_at: int
    finishes: int


class Plan(NamedTuple):
    """What the host needs of one list."""

    groups: list[Group]
    sums: int
    parts: int


def variant_of(out: Tensor, grad: Tensor, left: Tensor, right: Tensor, bias: bool) -> Variant:
    """Return the variant that serves one item."""
    m, n = out.shape
    large = left if m > n else right
    aligned = (
        not bias
        and m % 4 == 0
        and n % 4 == 0
        and all(
            t.data_ptr() % 16 == 0 and t.stride(1) == 1 and t.stride(0) % 4 == 0
            for t in (grad, large)
        )
    )
    return Variant(grad.dtype, 16 if min(m, n) <= 16 else 64, aligned, bias)


def _build(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bias_grads: Sequence[Tensor | None],
) -> tuple[list[int], Plan]:
    """Return the table of one list and its plan."""
    rows: list[int] = []
    partials: dict[Variant, list[int]] = {}
    finishes: dict[Variant, list[int]] = {}
    sums = parts = 0
    items = zip(outs, grads, lefts, rights, bias_grads, strict=True)
    for number, (out, grad, left, right, bias) in enumerate(items):
        m, n = out.shape
        s, d, tall = min(m, n), max(m, n), m > n
        large, small = (left, right) if tall else (right, left)
        variant = variant_of(out, grad, left, right, bias is not None)
        config = variant.config
        split = split_length(d)
        splits = triton.cdiv(d, split)
        tiles = triton.cdiv(s, config.block_s) * triton.cdiv(d, config.block_d)
        pieces = tiles * config.block_d // config.finish_d
        mine, after = partials.setdefault(variant, []), finishes.setdefault(variant, [])
        # Of the small inverse the kernel sees the transpose, as it does of a tall gradient.
        across = (small.stride(1), small.stride(0)) if tall else (small.stride(0), small.stride(1))
        rows += [
            grad.data_ptr(), 0 if bias is None else bias.data_ptr(),
            large.data_ptr(), small.data_ptr(), out.data_ptr(),
            m, n, grad.shape[1], tall, split, splits,
            *grad.stride(), 0 if bias is None else bias.stride(0),
            *large.stride(), *across, *out.stride(),
            len(mine), len(after), sums, parts, pieces,
        ]  # fmt: skip
        mine += [number] * (tiles * splits)
        after += [number] * pieces
        sums += tiles * splits * config.block_s * config.block_d
        parts += pieces
    groups = []
    for variant, mine in partials.items():
        after = finishes[variant]
        if mine:
            at = len(rows)
            groups.append(Group(variant, at, len(mine), at + len(mine), len(after)))
            rows += mine + after
    return rows, Plan(groups, sums, parts)


def _key(tensors: Sequence[Tensor | None]) -> tuple[object, ...]:
    return tuple(t if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)


def launch(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bias_grads: Sequence[Tensor | None],
    dots: Tensor | None,
) -> None:
    """Write ``left · grad · right`` of every item into ``outs``, with no host sync.

    Two launches for each variant in the list (usually there is one), and one for the inner products.

    Args:
        outs: ``[m, n]`` each, fp32, any strides.
        grads: ``[m, n]``, or ``[m, n - 1]`` where there is a bias gradient; fp32, bf16 or fp16.
        lefts: ``[m, m]``, fp32.
        rights: ``[n, n]``, fp32.
        bias_grads: ``[m]``, the last column of the gradient, in its dtype; None where there is none.
        dots: fp32 ``[items]``, or None: receives ``sum(out * grad)``, the bias column included.
    """
    if not outs:
        return
    device = outs[0].device
    lists = (outs, grads, lefts, rights, bias_grads)

    def build() -> tuple[Tensor, Plan]:
        numbers, plan = _build(*lists)
        return _table.upload(torch.tensor(numbers, dtype=torch.int64), device), plan

    key = ("precondition", *map(_key, lists))
    # The table too: whether a graph is being captured is asked of the current device.
    with torch.cuda.device_of(outs[0]):
        table, plan = _table.cached(key, device, build)
        sums = torch.empty(plan.sums, dtype=torch.float32, device=device)
        parts = (
            torch.empty(plan.parts, dtype=torch.float32, device=device)
            if dots is not None
            else sums
        )
        # The interpreter multiplies the bit patterns of bf16; in fp32 the pieces are the same numbers.
        piece = tl.float32 if interpreting_triton() else tl.bfloat16
        for variant, partial_at, partials, finish_at, finishes in plan.groups:
            config = variant.config
            tiles: dict[str, Any] = {
                "GRAD": DTYPES[variant.dtype],
                "BIAS": variant.bias,
                "PIECE": piece,
                "BLOCK_S": config.block_s,
                "BLOCK_D": config.block_d,
            }
            _partial_kernel[(partials,)](
                sums,
                table,
                partial_at,
                ALIGNED=variant.aligned,
                BLOCK_K=config.block_k,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **tiles,
            )
            _finish_kernel[(finishes,)](
                parts,
                sums,
                table,
                finish_at,
                DOTS=dots is not None,
                FINISH_D=config.finish_d,
                AT_ONCE=SPLITS_AT_ONCE,
                num_warps=config.finish_warps,
                **tiles,
            )
        if dots is not None:
            _dots_kernel[(len(outs),)](
                dots, parts, table, dots.stride(0), BLOCK=DOTS_BLOCK, num_warps=1
            )
