# SPDX-License-Identifier: Apache-2.0
"""The factor update of a convolution in Triton: its patches are gathered in the loads and never stored.

Row ``(b, o1, o2)`` and column ``(channel, k1, k2)`` of the patch matrix are one element of the image, found
by index arithmetic: that of the columns once per program, that of the rows once per block of rows.
The check is a launch of its own here, over the image: a patch matrix holds each element up to
``k1·k2`` times. It looks at all of the image, so NaN or infinity is reported even where the convolution,
having a stride larger than its kernel, never reads it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels import _table
from grng_kernels.kron_factor import triton_kernel as linear
from grng_kernels.kron_factor.geometry import Conv2dGeometry
from grng_kernels.kron_factor.triton_kernel import (
    _FIELDS,
    _FIRST_PRODUCT,
    _ROWS,
    _ROWS_PER_SPLIT,
    _STRIDE_XK,
    _STRIDE_XN,
    _TILES,
    _WIDTH,
    _X,
    Batch,
    Config,
    Layer,
    Unit,
    Variants,
    _bits,
    _by_height,
    _find_layer,
    _store_column_sums,
    _store_held,
    _store_product,
    _tile_position,
)

# Every element is a load of its own, whatever the strides: blocks of rows are short, so that the addresses
# of a block fit in the registers. The kernel loads one block ahead by itself, so one stage: with more, the
# compiler of Triton 3.6 fails for sm_100.
_CONFIG_16BIT_32 = Config(32, 64, 8, 8, 1)
_CONFIG_16BIT_64 = Config(64, 32, 8, 8, 1)
TILES_16BIT = {
    32: Variants(_CONFIG_16BIT_32, _CONFIG_16BIT_32, 512, 4096),
    64: Variants(_CONFIG_16BIT_64, _CONFIG_16BIT_64, 512, 4096),
}
_CONFIG_FP32_32 = Config(32, 32, 4, 4, 1)
_CONFIG_FP32_64 = Config(64, 32, 8, 8, 1)
TILES_FP32 = {
    32: Variants(_CONFIG_FP32_32, _CONFIG_FP32_32, 512, 1024),
    64: Variants(_CONFIG_FP32_64, _CONFIG_FP32_64, 512, 1024),
}

# Elements that a program of the check reads at once, and programs for one image at most.
EXTREMES_BLOCK = 2048
EXTREMES_PROGRAMS = 528
EXTREMES_WARPS = 8

_STRIDE_XH = tl.constexpr(Layer._fields.index("stride_xh"))
_STRIDE_XW = tl.constexpr(Layer._fields.index("stride_xw"))
_IMAGE_HEIGHT = tl.constexpr(Layer._fields.index("image_height"))
_IMAGE_WIDTH = tl.constexpr(Layer._fields.index("image_width"))
_OUT_HEIGHT = tl.constexpr(Layer._fields.index("out_height"))
_OUT_WIDTH = tl.constexpr(Layer._fields.index("out_width"))
# A coordinate outside of every image, and twice that too.
_OUTSIDE = tl.constexpr(1 << 29)


class Image(NamedTuple):
    """One row of the table of the check: an image as lines of elements that lie ``stride`` apart."""

    x: int
    size_1: int
    size_2: int
    stride_0: int
    stride_1: int
    stride_2: int
    length: int
    stride: int
    blocks_per_line: int
    blocks: int
    programs: int
    first_program: int
    slot: int
    unused: int = 0


_IMAGE_FIELDS = tl.constexpr(len(Image._fields))


@triton.jit(do_not_specialize=["images"])
def _conv2d_extremes_kernel(
    table_ptr,
    ends_ptr,
    extremes_ptr,
    images,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = table_ptr + _find_layer(ends_ptr, images, CHUNK) * _IMAGE_FIELDS
    x_ptr = tl.load(row).to(tl.pointer_type(DTYPE))
    size_1, size_2 = tl.load(row + 1), tl.load(row + 2)
    stride_0, stride_1, stride_2 = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    length, stride = tl.load(row + 6), tl.load(row + 7)
    blocks_per_line, blocks = tl.load(row + 8), tl.load(row + 9).to(tl.int32)
    programs = tl.load(row + 10).to(tl.int32)
    inside = tl.program_id(0) - tl.load(row + 11).to(tl.int32)
    offs = tl.arange(0, BLOCK).to(tl.int64)
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in range(inside, blocks, programs):
        line = block // blocks_per_line
        position = block % blocks_per_line * BLOCK + offs
        start = line // size_2 // size_1 * stride_0
        start += line // size_2 % size_1 * stride_1 + line % size_2 * stride_2
        x = tl.load(x_ptr + start + position * stride, mask=position < length, other=0.0)
        # Widening first keeps the order of the magnitudes, and of inf and NaN above them.
        largest = tl.maximum(largest, _bits(x.to(tl.float32)))
    tl.store(extremes_ptr + tl.load(row + 12) + inside, tl.max(largest, axis=0))


@triton.jit
def _columns(offs, row, kernel_width, kernel_elements, dilation_height, dilation_width):
    # Column -> offset in memory, and what to add to the coordinates of a row.
    channel, tap = offs // kernel_elements, offs % kernel_elements
    down = (tap // kernel_width).to(tl.int64) * dilation_height
    right = (tap % kernel_width).to(tl.int64) * dilation_width
    offsets = (
        channel.to(tl.int64) * tl.load(row + _STRIDE_XN)
        + down * tl.load(row + _STRIDE_XH)
        + right * tl.load(row + _STRIDE_XW)
    )
    # A column past the last one is outside of the image, and so needs no mask of its own.
    down = tl.where(offs < tl.load(row + _WIDTH), down.to(tl.int32), _OUTSIDE)
    return offsets, down, right.to(tl.int32)


@triton.jit
def _rows(
    k, rest, count, positions, out_width, stride_xb, stride_xh, stride_xw,
    stride_height, stride_width, padding_height, padding_width,
):  # fmt: skip
    # Row -> offset in memory and coordinates of the corner of its patch, which may lie in the padding.
    image, position = (rest + k) // positions, (rest + k) % positions
    top = (position // out_width).to(tl.int64) * stride_height - padding_height
    left = (position % out_width).to(tl.int64) * stride_width - padding_width
    offsets = image.to(tl.int64) * stride_xb + top * stride_xh + left * stride_xw
    # A row past the last one is outside of the image too.
    return offsets, tl.where(k < count, top.to(tl.int32), _OUTSIDE), left.to(tl.int32)


@triton.jit
def _gather(
    base, row_offsets, top, left, column_offsets, down, right, height, width, UPCAST: tl.constexpr
):
    y = (top[:, None] + down[None, :]).to(tl.uint32, bitcast=True)
    x = (left[:, None] + right[None, :]).to(tl.uint32, bitcast=True)
    # As unsigned numbers the negative coordinates of the padding are larger than any image.
    inside = (y < height) & (x < width)
    values = tl.load(
        base + (row_offsets[:, None] + column_offsets[None, :]), mask=inside, other=0.0
    )
    if UPCAST:
        values = values.to(tl.float32)
    return values


@triton.jit(
    do_not_specialize=[
        "layers", "kernel_height", "kernel_width", "stride_height", "stride_width", "padding_height",
        "padding_width", "dilation_height", "dilation_width",
    ]
)  # fmt: skip
def _conv2d_products_kernel(
    table_ptr,
    ends_ptr,
    sums_ptr,
    column_sums_ptr,
    extremes_ptr,
    layers,
    kernel_height,
    kernel_width,
    stride_height,
    stride_width,
    padding_height,
    padding_width,
    dilation_height,
    dilation_width,
    DTYPE: tl.constexpr,
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
    split, tile = inside // tiles, inside % tiles
    tile_m, tile_n = _tile_position(tile)
    split_rows = tl.load(row + _ROWS_PER_SPLIT)
    first = split * split_rows
    count = tl.minimum(split_rows, tl.load(row + _ROWS) - first).to(tl.int32)
    out_width = tl.load(row + _OUT_WIDTH).to(tl.int32)
    positions = tl.load(row + _OUT_HEIGHT).to(tl.int32) * out_width
    # Before the loops: the compiler does not move loads out of them.
    stride_xb, stride_xh = tl.load(row + _STRIDE_XK), tl.load(row + _STRIDE_XH)
    stride_xw = tl.load(row + _STRIDE_XW)
    height = tl.load(row + _IMAGE_HEIGHT).to(tl.uint32)
    width = tl.load(row + _IMAGE_WIDTH).to(tl.uint32)
    base = tl.load(row + _X).to(tl.pointer_type(DTYPE))
    base += first // positions * stride_xb
    # The first row of the split lies inside of an image.
    rest = (first % positions).to(tl.int32)
    elements = kernel_height * kernel_width
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_n, down_n, right_n = _columns(
        offs_n, row, kernel_width, elements, dilation_height, dilation_width
    )
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    # Elements of 16 bits cannot be copied one by one to shared memory in the background. Instead, the next
    # block is loaded into registers while this one is multiplied.
    if tile_m == tile_n:
        ones = tl.zeros((HEIGHT, BLOCK_N), dtype=tl.float32)
        offsets, top, left = _rows(
            offs_k, rest, count, positions, out_width, stride_xb, stride_xh, stride_xw,
            stride_height, stride_width, padding_height, padding_width,
        )  # fmt: skip
        next_n = _gather(
            base, offsets, top, left, offsets_n, down_n, right_n, height, width, UPCAST
        )
        for k in range(0, count, BLOCK_K):
            offsets, top, left = _rows(
                k + BLOCK_K + offs_k, rest, count, positions, out_width, stride_xb, stride_xh, stride_xw,
                stride_height, stride_width, padding_height, padding_width,
            )  # fmt: skip
            values_n = next_n
            next_n = _gather(
                base, offsets, top, left, offsets_n, down_n, right_n, height, width, UPCAST
            )
            if BIAS:
                ones += tl.sum(_by_height(values_n.to(tl.float32), HEIGHT), axis=0)
            acc = tl.dot(tl.trans(values_n), values_n, acc, input_precision=PRECISION)
        if split == 0:
            _store_held(extremes_ptr, row, tile_n, offs_n)
        if BIAS:
            _store_column_sums(column_sums_ptr, row, split, tile_n, ones, BLOCK_N)
        _store_product(sums_ptr, row, inside, acc, BLOCK_N)
    else:
        offs_m = tile_m * BLOCK_N + tl.arange(0, BLOCK_N)
        offsets_m, down_m, right_m = _columns(
            offs_m, row, kernel_width, elements, dilation_height, dilation_width
        )
        offsets, top, left = _rows(
            offs_k, rest, count, positions, out_width, stride_xb, stride_xh, stride_xw,
            stride_height, stride_width, padding_height, padding_width,
        )  # fmt: skip
        next_m = _gather(
            base, offsets, top, left, offsets_m, down_m, right_m, height, width, UPCAST
        )
        next_n = _gather(
            base, offsets, top, left, offsets_n, down_n, right_n, height, width, UPCAST
        )
        for k in range(0, count, BLOCK_K):
            offsets, top, left = _rows(
                k + BLOCK_K + offs_k, rest, count, positions, out_width, stride_xb, stride_xh, stride_xw,
                stride_height, stride_width, padding_height, padding_width,
            )  # fmt: skip
            values_m, values_n = next_m, next_n
            next_m = _gather(
                base, offsets, top, left, offsets_m, down_m, right_m, height, width, UPCAST
            )
            next_n = _gather(
                base, offsets, top, left, offsets_n, down_n, right_n, height, width, UPCAST
            )
            acc = tl.dot(tl.trans(values_m), values_n, acc, input_precision=PRECISION)
        _store_product(sums_ptr, row, inside, acc, BLOCK_N)


def variants_for(width: int, dtype: torch.dtype) -> Variants:
    """Return the variants for ``width`` columns: the smallest tile that holds them, or the largest."""
    table = TILES_FP32 if dtype == torch.float32 else TILES_16BIT
    return table[min((b for b in table if b >= width), default=max(table))]


def _lines(x: Tensor) -> tuple[list[int], list[int]]:
    """Return sizes and strides of a view of the same elements, of four dimensions, the last one long.

    The largest magnitude does not depend on their order: dimensions are sorted by stride, those that lie
    in memory as one become one, and of repeated elements one is kept.
    """
    dims = sorted(
        (
            (stride, size)
            for size, stride in zip(x.shape, x.stride(), strict=True)
            if size > 1 and stride
        ),
        reverse=True,
    )
    merged: list[tuple[int, int]] = []
    for stride, size in dims:
        if merged and merged[-1][0] == stride * size:
            merged[-1] = (stride, merged[-1][1] * size)
        else:
            merged.append((stride, size))
    merged = [(0, 1)] * (4 - len(merged)) + merged
    return [size for _, size in merged], [stride for stride, _ in merged]


def _image(x: Tensor) -> Image:
    sizes, strides = _lines(x)
    per_line = -(-sizes[3] // EXTREMES_BLOCK)
    blocks = sizes[0] * sizes[1] * sizes[2] * per_line
    return Image(
        x=x.data_ptr(),
        size_1=sizes[1],
        size_2=sizes[2],
        stride_0=strides[0],
        stride_1=strides[1],
        stride_2=strides[2],
        length=sizes[3],
        stride=strides[3],
        blocks_per_line=per_line,
        blocks=blocks,
        programs=min(blocks, EXTREMES_PROGRAMS),
        first_program=0,
        slot=0,
    )


def _unit(item: int, factor: Tensor, x: Tensor, geometry: Conv2dGeometry, image: Image) -> Unit:
    batch, channels, height, width = x.shape
    out_height, out_width = geometry.output_size(height, width)
    per_group = channels // geometry.groups
    columns = per_group * geometry.kernel_size[0] * geometry.kernel_size[1]
    rows = batch * out_height * out_width
    variants = variants_for(columns, x.dtype)
    config = variants.general
    split_rows = linear.rows_per_split(columns, rows, variants)
    side = max(-(-columns // config.block_n), 1)
    layer = Layer(
        factor=0,
        stride_fm=factor.stride(1),
        stride_fn=factor.stride(2),
        n=factor.shape[1],
        x=0,
        stride_xk=x.stride(0),
        stride_xn=x.stride(1),
        width=columns,
        rows=rows,
        rows_per_split=split_rows,
        splits=-(-rows // split_rows),
        tiles=max(side * (side + 1) // 2, 1),
        side=side,
        block_n=config.block_n,
        item=item,
        stride_xh=x.stride(2),
        stride_xw=x.stride(3),
        image_height=height,
        image_width=width,
        out_height=out_height,
        out_width=out_width,
    )
    layers = [
        layer._replace(
            factor=factor.data_ptr() + g * factor.stride(0) * factor.element_size(),
            x=x.data_ptr() + g * per_group * x.stride(1) * x.element_size(),
        )
        for g in range(geometry.groups)
    ]
    return Unit(x.dtype, config, False, layers, image.programs)


class Check(NamedTuple):
    """One launch of the check: the images of one input type."""

    dtype: torch.dtype
    table: Tensor
    ends: Tensor
    images: int
    programs: int


def _plan_checks(
    batch: Batch, images: dict[int, tuple[torch.dtype, Image]], device: torch.device
) -> list[Check]:
    checks = []
    for dtype in linear.TRITON_DTYPES:
        rows: list[int] = []
        ends: list[int] = []
        for item, slot in batch.slots.items():
            if images[item][0] == dtype:
                first = ends[-1] if ends else 0
                image = images[item][1]._replace(first_program=first, slot=slot)
                rows += image
                ends.append(first + image.programs)
        if ends:
            table = _table.upload(torch.tensor(rows + ends, dtype=torch.int64), device)
            checks.append(Check(dtype, table, table[len(rows) :], len(ends), ends[-1]))
    return checks


def products_constants(
    dtype: torch.dtype, config: Config, warps: int, *, bias: bool
) -> dict[str, Any]:
    """Return the compile-time arguments of ``_conv2d_products_kernel``."""
    constants = linear.products_constants(dtype, config, warps, aligned=False, bias=bias)
    del constants["ALIGNED"]
    return constants


def launch_conv2d(
    factors: Sequence[Tensor],
    xs: Sequence[Tensor],
    info: Tensor,
    *,
    geometry: Conv2dGeometry,
    decay: float | Tensor,
    scales: Sequence[float | Tensor],
    bias: bool,
) -> None:
    """Update the factors of convolutions in place: ``factor[g] <- decay·factor[g] + scale·PᵀP`` per group.

    Row ``(b, o1, o2)`` of ``P`` is a patch of the image with its columns in the order of ``F.unfold``:
    ``(channel within the group, k1, k2)``, then a one with ``bias``. Padding is zeros.

    Args:
        factors: ``[G, N, N]``, fp32, any strides; ``N = C/G·k1·k2``, plus one with ``bias``.
        xs: ``[B, C, H, W]``; fp32, bf16 or fp16, any strides.
        info: int32 ``[items]``, zeros. All groups of an item are updated, or none. Items without a patch
            stay zero and are left as they are.
        geometry: Of all items.
        decay: Number or 0-d tensor.
        scales: One number or 0-d tensor for each item.
        bias: Each patch counts as having a last element of one.
    """
    key = (
        "conv2d",
        geometry,
        bias,
        tuple(
            (f.data_ptr(), f.stride(), x.data_ptr(), x.shape, x.stride(), x.dtype)
            for f, x in zip(factors, xs, strict=True)
        ),
    )

    def build() -> list[tuple[Batch, list[Check]]]:
        units: list[Unit] = []
        images: dict[int, tuple[torch.dtype, Image]] = {}
        for item, (f, x) in enumerate(zip(factors, xs, strict=True)):
            if f.numel() and x.numel() and min(geometry.output_size(*x.shape[2:])) > 0:
                images[item] = (x.dtype, _image(x))
                units.append(_unit(item, f, x, geometry, images[item][1]))
        batches = linear.plan_batches(units, info.device)
        return [(batch, _plan_checks(batch, images, info.device)) for batch in batches]

    with torch.cuda.device_of(info):
        plan: list[tuple[Batch, list[Check]]] = _table.cached(key, info.device, build)
        if not plan:
            return
        scale_array = linear.scales_on_device(scales, info.device)
        for batch, checks in plan:
            workspace = linear.allocate(batch, info.device)
            for check in checks:
                _conv2d_extremes_kernel[(check.programs,)](
                    check.table,
                    check.ends,
                    workspace[2],
                    check.images,
                    DTYPE=linear.TRITON_DTYPES[check.dtype],
                    BLOCK=EXTREMES_BLOCK,
                    CHUNK=linear.CHUNK,
                    num_warps=EXTREMES_WARPS,
                )
            for group in batch.groups:
                warps = linear.warps_of(group.config, info.device)
                _conv2d_products_kernel[(group.programs,)](
                    group.table,
                    group.ends,
                    *workspace,
                    group.layers,
                    *(number for pair in geometry[:4] for number in pair),
                    **products_constants(group.dtype, group.config, warps, bias=bias),
                    num_warps=warps,
                    num_stages=group.config.num_stages,
                )
            linear.commit(batch, info, workspace, decay=decay, scales=scale_array, bias=bias)
