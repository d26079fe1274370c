# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``kron_factor_update_``, and the factors of a ViT-B/16 beside a loop over cuBLAS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from grng_kernels.kron_factor import triton_conv2d
from grng_kernels.kron_factor.triton_kernel import (
    COMMIT_BLOCK,
    TILES_16BIT,
    TILES_FP32,
    UNROLL,
    Variants,
    rows_per_split,
)
from prediction.model import (
    BF16,
    FP32,
    GATHER,
    GPUS,
    L2_BYTES,
    LATENCY_US,
    LAUNCH_US,
    MULTIPROCESSORS,
    REACH,
    TF32X3,
    Work,
    microseconds,
)

# What cuBLAS reaches on a product of order 768, which fills a quarter of the machine, and the moving average
# after it.
CUBLAS_768, AVERAGE_US = 250.0, 5.0


class Factors(NamedTuple):
    """``count`` factors of one shape."""

    count: int
    width: int
    rows: int


def _tile_of(width: int, table: dict[int, Variants]) -> int:
    return min((tile for tile in table if tile >= width), default=max(table))


class _Shape(NamedTuple):
    """How one factor is cut up."""

    side: int
    tiles: int
    split_rows: int
    splits: int


def _cut(group: Factors, variants: Variants) -> _Shape:
    side = math.ceil(group.width / variants.aligned.block_n)
    split = rows_per_split(group.width, group.rows, variants)
    return _Shape(side, side * (side + 1) // 2, split, math.ceil(group.rows / split))


def _partial_bytes(group: Factors, variants: Variants) -> float:
    cut = _cut(group, variants)
    return 4.0 * group.count * cut.tiles * cut.splits * variants.aligned.block_n**2


def kron_factor_products(
    name: str,
    groups: Sequence[Factors],
    variants: Variants,
    *,
    wide: bool,
    patch: int = 0,
) -> Work:
    """Return one launch of the products: ``wide`` for fp32 input, else 16 bit; ``patch`` is k1 x k2."""
    config = variants.aligned
    size, peak = (4, TF32X3) if wide else (2, BF16)
    cuts = [_cut(group, variants) for group in groups]
    block = config.block_n
    programs = sum(g.count * c.tiles * c.splits for g, c in zip(groups, cuts, strict=True))
    flops = sum(
        2.0 * g.count * c.tiles * block**2 * g.rows for g, c in zip(groups, cuts, strict=True)
    )
    # A tile on the diagonal loads its columns once, any other those of its row and of its column.
    loads = sum(
        g.count * (2 * c.tiles - c.side) * block * float(g.rows) * size
        for g, c in zip(groups, cuts, strict=True)
    )
    once = sum(g.count * float(g.rows) * g.width * size for g in groups) / max(patch, 1)
    partial = sum(_partial_bytes(g, variants) for g in groups)
    # Tiles fill the machine in whole waves, and a few tiles use a few multiprocessors only.
    used = programs / (math.ceil(programs / MULTIPROCESSORS) * MULTIPROCESSORS)
    waves = math.ceil(programs / (MULTIPROCESSORS * max(1, 8 // config.hopper_warps)))
    steps = max(math.ceil(c.split_rows / config.block_k) for c in cuts)
    first = (
        "operand loads from L2: larger tiles" if block == max(TILES_16BIT) else "loads in flight"
    )
    if patch:
        first = "loads of single elements: vectors along the channels of channels_last"
    return Work(
        kernel=f"{'_conv2d' if patch else ''}_products_kernel (Triton)",
        variant=f"{'fp32' if wide else 'bf16/fp16'}, tile {block}, {name}",
        blocks=programs,
        flops=flops,
        rate=peak * REACH[block] * used * (GATHER if patch else 1.0),
        hbm=once + (partial if partial > L2_BYTES else 0.0),
        l2=(once if patch else loads) + partial,
        l1=loads if patch else 0.0,
        serial_us=waves * steps * LATENCY_US / max(config.num_stages - 1, 1),
        least_bytes=once,
        least_flops=sum(g.count * float(g.rows) * g.width * (g.width + 1) for g in groups),
        peak=peak,
        first=first + ("; tf32x3 through registers" if wide else ""),
    )


def kron_factor_commit(
    name: str, groups: Sequence[Factors], table: dict[int, Variants], *, wide: bool
) -> Work:
    """Return the launch that ends a call, of all its factors."""
    chosen = [table[_tile_of(g.width, table)] for g in groups]
    cuts = [_cut(g, v) for g, v in zip(groups, chosen, strict=True)]
    partial = sum(_partial_bytes(g, v) for g, v in zip(groups, chosen, strict=True))
    state = sum(8.0 * g.count * g.width**2 for g in groups)
    pieces = sum(
        g.count * c.tiles * (v.aligned.block_n // COMMIT_BLOCK) ** 2
        for g, c, v in zip(groups, cuts, chosen, strict=True)
    )
    deepest = max(math.ceil(c.splits / UNROLL) for c in cuts)
    return Work(
        kernel="_commit_kernel (Triton)",
        variant=f"{'fp32' if wide else 'bf16/fp16'}, {name}",
        blocks=pieces,
        flops=0.0,
        rate=FP32,
        hbm=state + max(partial - L2_BYTES / 2, 0.0),
        l2=partial + state,
        l1=0.0,
        # Before the sums: the layer, its row of the table, the extremes; after them the old factor.
        serial_us=math.ceil(pieces / (MULTIPROCESSORS * 4)) ** 0.5 * (deepest + 4) * LATENCY_US,
        least_bytes=state,
        least_flops=0.0,
        peak=FP32,
        first="partial sums: fewer splits",
    )


def kron_factor(name: str, groups: Sequence[Factors], *, wide: bool) -> list[Work]:
    """Return the launches of one call: one for each tile size in it, and the last."""
    table = TILES_FP32 if wide else TILES_16BIT
    launches = []
    for tile in sorted(table, reverse=True):
        members = [g for g in groups if _tile_of(g.width, table) == tile]
        if members:
            launches.append(kron_factor_products(name, members, table[tile], wide=wide))
    return [*launches, kron_factor_commit(name, groups, table, wide=wide)]


def kron_factor_conv2d(
    name: str, images: float, patches: Factors, patch: int, *, wide: bool
) -> list[Work]:
    """Return the launches for a convolution: ``images`` elements, ``patches`` of ``patch`` positions."""
    table = triton_conv2d.TILES_FP32 if wide else triton_conv2d.TILES_16BIT
    read = images * (4 if wide else 2)
    check = Work(
        kernel="_conv2d_extremes_kernel (Triton)", variant=f"{'fp32' if wide else 'bf16/fp16'}, {name}",
        blocks=min(math.ceil(images / triton_conv2d.EXTREMES_BLOCK), triton_conv2d.EXTREMES_PROGRAMS),
        flops=0.0, rate=FP32, hbm=read, l2=read, l1=0.0,
        serial_us=math.ceil(images / triton_conv2d.EXTREMES_BLOCK / triton_conv2d.EXTREMES_PROGRAMS)
        * LATENCY_US, least_bytes=read, least_flops=0.0, peak=FP32, first="loads of single elements",
    )  # fmt: skip
    variants = table[_tile_of(patches.width, table)]
    main = kron_factor_products(name, [patches], variants, wide=wide, patch=patch)
    return [check, main, kron_factor_commit(name, [patches], table, wide=wide)]


VIT_B_LORA = (Factors(36, 768, 12608), Factors(48, 16, 12608))


def vit_b() -> list[str]:
    """Return the set of a ViT-B/16 with LoRA beside the best that a loop over cuBLAS could do."""
    lines = []
    large, small = VIT_B_LORA
    for gpu in GPUS:
        ours = sum(work.predicted_us(gpu) for work in kron_factor("", VIT_B_LORA, wide=False))
        product = 2.0 * large.rows * large.width**2 / CUBLAS_768 / 1e6
        # A skinny product is two launches in a graph, and so is the average after it.
        theirs = large.count * (product + AVERAGE_US) + small.count * 2 * LAUNCH_US
        times = f"ours {microseconds(ours)} us, cuBLAS in a graph {microseconds(theirs)} us"
        lines.append(f"- {gpu.name}: {times}, {theirs / ours:.1f}x.")
    return lines
