# SPDX-License-Identifier: Apache-2.0
"""Predicted times of the GPU kernels that have never run on a GPU, as benchmarks/results/GPU_DEBT.md.

The model is deliberately simple: the slowest of arithmetic, memory, cache and latency, plus a launch.
It is written down before the first measurement so that the measurement can prove it wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.files import write_text
from prediction.kalman import kalman_apply, kalman_gram, kalman_lines, kalman_triton
from prediction.model import (
    BF16,
    EAGER_US,
    FP32,
    GATHER,
    GPUS,
    L2_BYTES,
    L2_TB_S,
    LATENCY_US,
    LAUNCH_US,
    MULTIPROCESSORS,
    NODE_US,
    REACH,
    TF32X3,
    Gpu,
    Work,
)

from grng_kernels.damped_inverse import triton_direct as direct
from grng_kernels.damped_inverse import triton_newton_schulz as newton_schulz
from grng_kernels.damped_inverse import triton_prologue as large_inverse
from grng_kernels.damped_inverse import triton_small
from grng_kernels.kron_factor import triton_conv2d
from grng_kernels.kron_factor.triton_kernel import (
    COMMIT_BLOCK,
    TILES_16BIT,
    TILES_FP32,
    UNROLL,
    Variants,
    rows_per_split,
)
from grng_kernels.precondition import triton_kernel as two_sided
from grng_kernels.rank_one import triton_kernel as rank_one_kernel

TARGET = Path(__file__).resolve().parent / "results" / "GPU_DEBT.md"
# What cuBLAS reaches on a product of order 768, which fills a quarter of the machine, and the moving average
# after it.
CUBLAS_768, AVERAGE_US = 250.0, 5.0


COLUMNS = (
    "kernel",
    "variant",
    "status",
    "blocks",
    "MB",
    "executed GFLOP",
    "bound by",
    "H100 us",
    "H200 us",
    "least us, H100",
    "look at first",
)


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


def rank_one(d: int) -> list[Work]:
    """Return the three launches of ``rank1_precondition`` on one fp32 vector."""
    chunks = math.ceil(d / rank_one_kernel.CHUNK)
    steps = rank_one_kernel.CHUNK / rank_one_kernel.BLOCK
    # The second pass finds in the L2 what the first read last.
    again = 8.0 * d if 8.0 * d > L2_BYTES else 0.0
    passes = [
        Work(
            kernel=f"{name} (Triton)", variant=f"d={d:.0e}", blocks=chunks, flops=flops * d,
            rate=FP32 * 0.5, hbm=hbm, l2=l2, l1=0.0, serial_us=steps * LATENCY_US / 2,
            least_bytes=hbm, least_flops=flops * d, peak=FP32,
            first="loads in flight per thread; fp64 arithmetic on GPUs that have little of it",
        )
        for name, flops, hbm, l2 in (
            ("_dots_kernel", 4.0, 8.0 * d, 8.0 * d),
            ("_apply_kernel", 3.0, again + 4.0 * d, 12.0 * d),
        )
    ]  # fmt: skip
    total = Work(
        kernel="_coefficient_kernel (Triton)", variant=f"d={d:.0e}", blocks=1, flops=2.0 * chunks,
        rate=FP32 * 0.01, hbm=0.0, l2=16.0 * chunks, l1=0.0,
        serial_us=math.ceil(chunks / rank_one_kernel.SUMS_BLOCK) * LATENCY_US,
        least_bytes=16.0 * chunks, least_flops=0.0, peak=FP32, first="one program adds all",
    )  # fmt: skip
    return [passes[0], total, passes[1]]


# Cycles of one matrix of order n in damped_inverse_small_kernel, which nothing hides: counted in the machine
# code for sm_90 of the four-warp path. Two pivots take 165 instructions of each scheduler, a barrier and two
# reciprocals; a product with a vector 32 FMA between two barriers; the residual 12 instructions for each of
# 2 n rows. The rest: descriptor 400, loads 1500, symmetrising 350, sums over the matrix 900, damping 150,
# writing 600, end of the residual 200.
CLOCK_MHZ, SMALL_CYCLES, PAIR_CYCLES, VECTOR_CYCLES, RESIDUAL_CYCLES = 1700.0, 4100, 210, 150, 24


def damped_inverse_small(name: str, matrices: Sequence[tuple[int, int]]) -> Work:
    """Return the launch for ``(count, order)`` of fp32 matrices of order at most 64."""
    large = sum(count for count, n in matrices if n > 32)
    small = sum(count for count, n in matrices if n <= 32)
    blocks = large + math.ceil(small / 4)
    size = sum(4.0 * count * n * n for count, n in matrices)
    longest = max(n for _, n in matrices)
    cycles = SMALL_CYCLES + 17 * VECTOR_CYCLES + RESIDUAL_CYCLES * longest
    cycles += 4 * math.ceil(longest / 8) * PAIR_CYCLES
    return Work(
        # Parameters of 32 KB for a list of more than 39.
        kernel=f"damped_inverse_small_kernel<{str(large + small > 39).lower()}> (CUDA)",
        variant=name,
        blocks=blocks,
        # Three operations for each two of the sweep, on the padded order.
        flops=sum(
            count * (3.0 * (64 if n > 32 else 32) ** 2 * n + 98.0 * n * n) for count, n in matrices
        ),
        rate=FP32 * 0.25,
        hbm=2 * size,
        l2=2 * size,
        l1=0.0,
        # Three blocks share a multiprocessor.
        serial_us=math.ceil(blocks / (3 * MULTIPROCESSORS)) * cycles / CLOCK_MHZ,
        least_bytes=2 * size,
        least_flops=sum(float(count) * n**3 for count, n in matrices),
        peak=FP32,
        first="stalls between two pivots; then the fetch of code that runs once (50 KB)",
    )


SMALL_SETS = (
    ("one of 64", ((1, 64),)),
    ("48 of 16", ((48, 16),)),
    ("48 of 16 and 64 of 64", ((48, 16), (64, 64))),
    ("300 of 32", ((300, 32),)),
    ("300 of 64", ((300, 64),)),
)


# Warp instructions of one step of the loop over a tile of the large inverse, and how many a multiprocessor
# starts in a second: counted in the machine code for sm_90 of the aligned fp32 variant.
STEP_INSTRUCTIONS = {16: 640, 64: 410}
ISSUE_PER_SM = 4 * 1.7e9


def precondition(name: str, shapes: Sequence[tuple[int, int]]) -> list[Work]:
    """Return the two launches for a list of weights with one small side, all fp32 and aligned."""
    block_s = 16 if max(min(shape) for shape in shapes) <= 16 else 64
    config = two_sided.CONFIGS_ALIGNED[block_s]
    programs = finishes = steps = 0
    large = thin = partial = reread = flops = least_flops = small = longest = 0.0
    for shape in shapes:
        s, d = min(shape), max(shape)
        split = min(two_sided.split_length(d), d)
        splits = math.ceil(d / split)
        tiles_s, tiles_d = math.ceil(s / block_s), math.ceil(d / config.block_d)
        programs += tiles_s * tiles_d * splits
        finishes += tiles_s * tiles_d * config.block_d // config.finish_d
        steps += tiles_s * tiles_d * math.ceil(d / config.block_k)
        longest = max(longest, math.ceil(split / config.block_k))
        large, thin, small = large + 4.0 * d * d, thin + 4.0 * s * d, small + 4.0 * s * s
        partial += 4.0 * splits * s * d
        reread += 4.0 * tiles_d * s * d
        flops += 6 * 2.0 * tiles_s * block_s * d * d
        least_flops += 2.0 * s * d * (s + d)
    warps = programs * config.num_warps
    # Partial results that the L2 cannot hold until the second launch go to memory and come back.
    spilled = partial if partial > L2_BYTES else 0.0
    waves = math.ceil(warps / (MULTIPROCESSORS * 12))
    used = min(1.0, programs / MULTIPROCESSORS)
    issue_us = (
        steps
        * config.num_warps
        * STEP_INSTRUCTIONS[block_s]
        / (ISSUE_PER_SM * MULTIPROCESSORS)
        * 1e6
    )
    tiles = f"tile {block_s}, {name}"
    common = dict(l1=0.0, peak=BF16 / 6)
    return [
        Work(
            kernel="_partial_kernel (Triton)", variant=tiles, blocks=programs, flops=flops,
            rate=flops / (issue_us / used) / 1e6, hbm=large + thin + spilled, l2=large + reread + partial,
            serial_us=waves * longest * LATENCY_US / (config.num_stages - 1),
            least_bytes=large + small + 2 * thin, least_flops=least_flops,
            first="bytes in flight: stages and programs per multiprocessor, then the splitting into pieces",
            **common,
        ),
        Work(
            kernel="_finish_kernel (Triton)", variant=tiles, blocks=finishes,
            flops=6 * 2.0 * finishes * block_s**2 * config.finish_d, rate=BF16 * REACH[16],
            hbm=thin + small + spilled, l2=partial + thin, serial_us=5 * LATENCY_US,
            least_bytes=thin + small, least_flops=0.0,
            first="partial results: fewer splits, or a fused second product", **common,
        ),
    ]  # fmt: skip


# The damped inverse of small matrices is one chain of short steps. Cycles of each on sm_90, from counts in
# the machine code: instructions times warps per scheduler, 40 for a barrier, and for the pair of columns
# half as much again for sums between lanes that wait for each other. Of ``(64, 128)``.
SMALL_INVERSE_CYCLES = {
    "pair of columns": (450, 650),
    "block of 16": (1000, 2000),
    "four products of the norm": (1200, 1800),
    "32 columns of the residual": (1300, 2300),
    "loads and stores": (2500, 2500),
}
CYCLES_PER_US = 1700.0
# Registers let so many programs share a multiprocessor.
SMALL_INVERSE_PROGRAMS = (2, 1)


def small_inverse(name: str, orders: Sequence[int]) -> Work:
    """Return the launch for matrices of these orders, all at most 64 or all above, by elimination."""
    largest = max(orders)
    column = int(largest > triton_small.SMALL)
    pair, block, norm, residual, rest = (v[column] for v in SMALL_INVERSE_CYCLES.values())
    blocks = math.ceil(largest / 16)
    cycles = blocks * (8 * pair + block) + 4 * norm + math.ceil(largest / 32) * residual + rest
    waves = math.ceil(len(orders) / (MULTIPROCESSORS * SMALL_INVERSE_PROGRAMS[column]))
    entries = sum(float(n * n) for n in orders)
    return Work(
        kernel="_small_inverse_kernel (Triton)",
        variant=name,
        blocks=len(orders),
        # Three TF32 products of each block, and six of the residual with 16 vectors.
        flops=sum(2.0 * 3 * n**3 for n in orders),
        rate=TF32X3 * 3 * REACH[32],
        hbm=8.0 * entries,
        l2=16.0 * entries,
        l1=0.0,
        serial_us=waves * cycles / CYCLES_PER_US,
        least_bytes=8.0 * entries,
        least_flops=sum(float(n) ** 3 for n in orders),
        peak=FP32,
        first="the pair of columns: sums between lanes; then barriers of the norm",
    )


SMALL_INVERSES = (
    ("48 of 16 (ViT-B/16 LoRA)", [16] * 48),
    ("96 of 64", [64] * 96),
    ("32 each of 8, 16, 32, 64", [8, 16, 32, 64] * 32),
    ("64 of 128", [128] * 64),
)


LORA_SETS = (
    ("ViT-B/16 r16: 24 of [16, 768] + 24 of [768, 16]", ((16, 768), (768, 16)), 24),
    ("7B q,v r16: 64 of [16, 4096] + 64 of [4096, 16]", ((16, 4096), (4096, 16)), 64),
    ("7B q,v r64: 64 of [64, 4096] + 64 of [4096, 64]", ((64, 4096), (4096, 64)), 64),
    ("one [16, 4096]", ((16, 4096),), 1),
)


# ---- damped inverses of orders above 64 ----

# Rates of the products of the two methods: what the tensor cores do of each kind, in TFLOP/s of the product.
PRODUCT_PEAKS = {"bf16": BF16, "bf16x3": BF16 / 3, "tf32": 3 * TF32X3, "tf32x3": TF32X3}
# One step of the elimination of a 64-block in registers: an exchange between warps, a pass over it in fp64.
ELIMINATION_US = 0.3
# The sets of the benchmark, as orders and counts.
INVERSE_SETS = ((36, 768), (64, 128), (16, 256), (12, 1024), (1, 4096))
INVERSE_RHO = 1e-2
# What cholesky_ex and cholesky_inverse take for 36 x 768, in us: from published times, not measured here.
CHOLESKY_36X768 = (3300.0, 7000.0)


def _sweep(name: str, kernel: str, blocks: int, read: float, written: float, *, cached: float = 0.0,
           flops: float = 0.0, serial_us: float = 3 * LATENCY_US, first: str) -> Work:  # fmt: skip
    """Return a launch that goes through matrices once; of ``read``, ``cached`` bytes may be in the L2."""
    missed = read if cached > L2_BYTES else read - cached
    return Work(
        kernel=f"{kernel} (Triton)", variant=name, blocks=blocks, flops=flops, rate=FP32 * 0.25,
        hbm=missed + written, l2=read + written, l1=0.0, serial_us=serial_us,
        least_bytes=missed + written, least_flops=0.0, peak=FP32, first=first,
    )  # fmt: skip


Launches = list[tuple[int, Work]]


def large_prologue(count: int, n: int, padded: int) -> Launches:
    """Return how often each kernel before the method runs, and once for what time."""
    name = f"{count} x {n}"
    matrix = 4.0 * count * n * n
    wide = 4.0 * count * padded * padded
    blocks = count * padded // large_inverse.ROWS
    chunks = math.ceil(padded / large_inverse.COLUMNS)
    loops = math.ceil(blocks / (8 * MULTIPROCESSORS)) * chunks * LATENCY_US / 2
    lines = math.ceil(padded / large_inverse.LINE) * LATENCY_US
    return [
        (1, _sweep(name, "_scan_kernel", blocks, matrix, 0.0, serial_us=loops,
                   first="loads in flight: several columns at once")),
        (1, _sweep(name, "_form_kernel", blocks, 2 * matrix, 1.5 * wide, cached=matrix,
                   serial_us=2 * loops, first="the transposed tile")),
        (1, _sweep(name, "_start_kernel", count, 20.0 * count * padded, 4.0 * count * padded,
                   serial_us=4 + 4 * lines, first="one program per matrix")),
        (large_inverse.STEPS, _sweep(name, "_step_kernel, bf16", blocks, wide / 2, 0.0, cached=wide / 2,
                   flops=2.0 * count * padded**2, serial_us=2 + loops,
                   first="16 passes over the matrix: read its lower triangle only")),
        (1, _sweep(name, "_step_kernel, fp32", blocks, wide, 0.0, flops=2.0 * count * padded**2,
                   serial_us=2 + loops, first="loads in flight")),
        (1, _sweep(name, "_shift_kernel", count, 64.0 * count * padded, 64.0 * count * padded,
                   serial_us=3 + lines, first="one program per matrix")),
    ]  # fmt: skip


def large_epilogue(count: int, n: int, padded: int) -> Launches:
    """Return the launches after the method."""
    name = f"{count} x {n}"
    wide = 4.0 * count * padded * padded
    blocks = count * padded // large_inverse.ROWS
    flops = 32.0 * count * padded**2
    loops = math.ceil(padded / large_inverse.COLUMNS) * LATENCY_US
    return [
        (1, _sweep(name, "_write_kernel", blocks, wide, 4.0 * count * n * n, flops=flops, serial_us=loops,
                   first="the products with the probes on the fp32 units")),
        (1, _sweep(name, "_probe_kernel", blocks, wide, 0.0, flops=flops, serial_us=loops,
                   first="the products with the probes on the fp32 units")),
        (1, _sweep(name, "_verdict_kernel", count, 8.0 * count * padded, 4.0 * count * padded,
                   serial_us=4 * LATENCY_US, first="one program per matrix")),
    ]  # fmt: skip


def newton_schulz_launches(count: int, n: int, rho: float) -> Launches:
    """Return the launches of Newton-Schulz on matrices of one order."""
    padded = newton_schulz.padded_order(n)
    launches = []
    _, _, products = newton_schulz.products_of(newton_schulz.newton_schulz_plan(rho))
    for product in products:
        small, large = newton_schulz.configs_of(product, before_hopper=False)
        config = large if n >= newton_schulz.LARGE else small
        block, side = config.block, padded // config.block
        full = product.mode in newton_schulz.FULL
        tiles = side * side if full else side * (side + 1) // 2
        programs = count * tiles
        flops = 2.0 * programs * block**2 * padded
        peak = PRODUCT_PEAKS[product.precision]
        used = programs / (math.ceil(programs / MULTIPROCESSORS) * MULTIPROCESSORS)
        element = 2 if product.precision == "bf16" else 4
        elements = float(count) * padded**2
        written = elements * (4 * product.wide + 2 * product.high + 2 * product.low)
        added = 0.0 if product.mode == newton_schulz.RESIDUAL else 2 * elements
        operands = 2 * element * elements
        loads = 2.0 * programs * block * padded * element
        steps = math.ceil(padded / config.block_k)
        waves = math.ceil(programs / (MULTIPROCESSORS * max(1, 12 // config.num_warps)))
        mode = ("X B", "X E", "B B", "B E", "X B, last")[product.mode]
        launches.append(
            (1, Work(
                kernel="_product_kernel (Triton)",
                variant=f"{product.precision} {mode}, tile {block}, {count} x {n}",
                blocks=programs, flops=flops, rate=peak * REACH[block] * used,
                hbm=operands + added + written, l2=loads + added + written, l1=0.0,
                serial_us=waves * steps * LATENCY_US / (config.num_stages - 1),
                least_bytes=operands + added + written,
                least_flops=float(count) * n**3 * (2 if full else 1),
                peak=peak, first="the two stores of a tile" if added else "operand loads from L2",
            ))
        )  # fmt: skip
    return launches


def direct_launches(count: int, n: int) -> Launches:
    """Return the launches of the sweep of panels on matrices of one order."""
    padded = direct.padded_order(n)
    block = direct.TILE
    panels = padded // block
    tiles = panels * (panels + 1) // 2
    elimination = block * ELIMINATION_US + 4 * LATENCY_US

    def rate(programs: int) -> float:
        used = programs / (math.ceil(programs / MULTIPROCESSORS) * MULTIPROCESSORS)
        return TF32X3 * REACH[block] * used

    def work(
        kernel: str, programs: int, read: float, written: float, serial_us: float, first: str
    ) -> Work:
        # What was written by the launch before is still in the L2, as far as it fits.
        state = read + written
        flops = 0.0 if kernel.endswith("first") else 2.0 * programs * block**3
        return Work(
            kernel=f"{kernel} (Triton)", variant=f"tf32x3, tile {block}, {count} x {n}", blocks=programs,
            flops=flops, rate=rate(programs), hbm=max(state - L2_BYTES, 0.0),
            l2=state + 8.0 * programs * block**2, l1=0.0, serial_us=serial_us, least_bytes=0.0,
            least_flops=float(count) * n**3 / panels if "update" in kernel else 0.0, peak=TF32X3, first=first,
        )  # fmt: skip

    tile = 4.0 * block**2
    rows = count * panels
    return [
        (1, work("_update_kernel, first", count, count * tile, count * tile, elimination,
                 "64 dependent steps")),
        (panels, work("_panel_kernel", rows, rows * tile, rows * tile, 4 * LATENCY_US,
                      "a product of 64-blocks: latency")),
        (panels, work("_update_kernel", count * tiles, count * tiles * tile, count * tiles * tile,
                      elimination if panels > 1 else 4 * LATENCY_US,
                      "each panel reads and writes the triangle: panels of 128")),
    ]  # fmt: skip


def large_inverses(method: str, count: int, n: int, rho: float = INVERSE_RHO) -> Launches:
    """Return all launches of one call of a method on ``count`` matrices of order ``n``."""
    if method == "direct":
        padded, middle = direct.padded_order(n), direct_launches(count, n)
    else:
        padded, middle = newton_schulz.padded_order(n), newton_schulz_launches(count, n, rho)
    return [*large_prologue(count, n, padded), *middle, *large_epilogue(count, n, padded)]


def large_inverse_us(method: str, count: int, n: int, rho: float = INVERSE_RHO, *,
                     graph: bool = False, gpu: Gpu = GPUS[0]) -> float:  # fmt: skip
    """Return the predicted time of a call, its launches queued one after another or in a graph."""
    start = NODE_US if graph else LAUNCH_US
    launches = large_inverses(method, count, n, rho)
    return sum(times * (start + max(work.terms(gpu).values())) for times, work in launches)


def large_inverse_lines() -> list[str]:
    """Return the section on the two methods for large matrices."""
    lines = [
        "## Damped inverses of orders above 64",
        "",
        f"Two methods at rho {INVERSE_RHO:g}, H100, us: all launches of a call, with the same 24 before and",
        "after the method (*frame*). Serial panels wait for each other; FLOPs are executed ones.",
        "",
        "| set | method | launches | serial panels | GFLOP by precision | frame | queued | in a graph |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count, n in INVERSE_SETS:
        for method in ("newton_schulz", "direct"):
            launches = large_inverses(method, count, n)
            flops: dict[str, float] = {}
            for times, work in launches:
                if "_product" in work.kernel or "_panel" in work.kernel or "_update" in work.kernel:
                    precision = work.variant.split()[0].rstrip(",")
                    flops[precision] = flops.get(precision, 0.0) + times * work.flops / 1e9
            frame = sum(
                times * (NODE_US + max(work.terms(GPUS[0]).values()))
                for times, work in launches
                if not any(k in work.kernel for k in ("_product", "_panel", "_update"))
            )
            cells = (
                f"{count} x {n}", method, f"{sum(times for times, _ in launches)}",
                f"{direct.padded_order(n) // direct.TILE if method == 'direct' else '-'}",
                ", ".join(f"{value:.1f} {key}" for key, value in flops.items()), _us(frame),
                _us(large_inverse_us(method, count, n)), _us(large_inverse_us(method, count, n, graph=True)),
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    best = min(large_inverse_us(m, 36, 768, graph=True) for m in ("newton_schulz", "direct"))
    low, high = (us / best for us in CHOLESKY_36X768)
    return [
        *lines,
        "",
        f"36 x 768 by cholesky_ex and cholesky_inverse is taken at {CHOLESKY_36X768[0] / 1e3:.1f} to"
        f" {CHOLESKY_36X768[1] / 1e3:.1f} ms (published times of",
        f"other GPUs): {low:.1f} to {high:.1f}x of that is predicted, where 13x is wanted.",
    ]


def works() -> Iterator[Work]:
    """Yield every kernel variant on the shapes of the benchmarks that use it."""
    shapes = ((16, 12608), (32, 8192), (64, 8192), (768, 8192), (768, 12608), (3072, 8192))
    for wide in (False, True):
        for n, rows in shapes:
            yield from kron_factor(f"n={n}, {rows} rows", [Factors(1, n, rows)], wide=wide)
        yield from kron_factor("ViT-B/16 LoRA: 36 x 768, 48 x 16", VIT_B_LORA, wide=wide)
        for channels, kernel, out, batch in ((3, 7, 112, 32), (64, 3, 56, 32), (256, 3, 14, 32)):
            patches = Factors(1, channels * kernel**2, batch * out**2)
            stride = 2 if kernel == 7 else 1
            images = float(batch * channels * (out * stride) ** 2)
            name = f"{channels} channels, {kernel}x{kernel}, {batch} images of {out * stride}"
            yield from kron_factor_conv2d(name, images, patches, kernel**2, wide=wide)
    yield from vector_works()
    for name, shapes, layers in LORA_SETS:
        yield from precondition(name, shapes * layers)
    for name, orders in SMALL_INVERSES:
        yield small_inverse(name, orders)
    for name, matrices in SMALL_SETS:
        yield damped_inverse_small(name, matrices)
    for count, n in INVERSE_SETS:
        iterated = newton_schulz_launches(count, n, INVERSE_RHO)
        for _, work in (*large_inverses("direct", count, n), *iterated):
            yield work


# Outputs and parameters.
KALMAN_SETS = ((2, 300_000), (10, 300_000), (10, 3_000_000), (100, 300_000))


def vector_works() -> Iterator[Work]:
    """Yield the kernels that walk over all parameters as one vector."""
    for outputs, d in KALMAN_SETS:
        yield from kalman_gram(outputs, d)
        yield kalman_apply(outputs, d)
    for one_piece in (False, True):
        for outputs, d in KALMAN_SETS:
            yield from kalman_triton(outputs, d, bf16=one_piece)
    for d in (100_000, 10_000_000):
        yield from rank_one(d)


class Call(NamedTuple):
    """One call of a public function: how many launches it makes, counted from its source."""

    name: str
    launches: int
    remark: str


def calls() -> list[Call]:
    """Return the calls whose time is mostly launches."""
    return [
        Call("kron_factor_update_, one factor", 3, "with the one that clears info"),
        Call(
            "kron_factor_update_, 84 factors (ViT-B/16 LoRA)",
            4,
            "grouped: two tile sizes, the last launch, and the one that clears info",
        ),
        Call(
            "kalman_update_, one block", 75, "the C x C stage between the passes: 67 small launches"
        ),
        Call("damped_inverse, one size", 180, "18 steps of power iteration, 5 launches each"),
        Call("precondition, any list of LoRA weights", 2, "3 with the inner products"),
        Call("rank1_precondition, any list", 4, "with the one that writes the damping"),
    ]


def vit_b() -> list[str]:
    """Return the set of a ViT-B/16 with LoRA beside the best that a loop over cuBLAS could do."""
    lines = []
    large, small = VIT_B_LORA
    for gpu in GPUS:
        ours = sum(work.predicted_us(gpu) for work in kron_factor("", VIT_B_LORA, wide=False))
        product = 2.0 * large.rows * large.width**2 / CUBLAS_768 / 1e6
        # A skinny product is two launches in a graph, and so is the average after it.
        theirs = large.count * (product + AVERAGE_US) + small.count * 2 * LAUNCH_US
        lines.append(
            f"- {gpu.name}: ours {_us(ours)} us, cuBLAS in a graph {_us(theirs)} us, {theirs / ours:.1f}x."
        )
    return lines


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def report() -> str:
    """Return the Markdown text."""
    lines = [
        "# GPU debt",
        "",
        "Kernels that compile ahead of time for sm_80, sm_90 and sm_100 but have never run on a GPU, with",
        "the time that a simple model predicts. `python benchmarks/predict.py --write` makes this file;",
        "`python benchmarks/campaign.py` on a GPU machine pays the debt. A prediction stays here, beside",
        "the measured value, when there is one.",
        "",
        "Model: launch 2 us + the slowest of arithmetic, memory, L2, L1 and latency. Ceilings (planning",
        f"values): bf16 {BF16:.0f}, tf32x3 {TF32X3:.0f}, fp32 {FP32:.0f} TFLOP/s; copy 3.0 TB/s (H100),",
        f"4.3 TB/s (H200); L2 {L2_TB_S} TB/s. Tiles of 128, 64, 32, 16 reach 50, 35, 20, 10 % of",
        "the peak, and 40 % of that where patches are gathered. *Least* is the roofline of the problem,",
        "without a launch.",
        "",
        "## Kernels",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for work in works():
        cells = (
            f"`{work.kernel}`",
            work.variant,
            "never run on a GPU",
            f"{work.blocks}",
            f"{work.hbm / 1e6:.1f}",
            f"{work.flops / 1e9:.2f}",
            work.bound(GPUS[0]),
            *(_us(work.predicted_us(gpu)) for gpu in GPUS),
            _us(work.least_us(GPUS[0])),
            work.first,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "With `bias=True` each factor variant compiles to one more kernel: the same time, not listed again.",
        "",
        "## Whole calls",
        "",
        f"Launches counted from the source, {EAGER_US:.0f} us each eager and {NODE_US} us in a CUDA graph;",
        "the kernels above come on top.",
        "",
        "| call | launches | eager us | graph us | remark |",
        "|---|---|---|---|---|",
    ]
    for call in calls():
        eager, graph = call.launches * EAGER_US, call.launches * NODE_US
        lines.append(
            f"| {call.name} | {call.launches} | {_us(eager)} | {_us(graph)} | {call.remark} |"
        )
    lines += [
        "",
        "## The factors of a ViT-B/16 with LoRA",
        "",
        f"36 of order 768 and 48 of order 16 from {VIT_B_LORA[0].rows} rows of bf16. cuBLAS is taken at",
        f"{CUBLAS_768:.0f} TFLOP/s of the full product, plus {AVERAGE_US:.0f} us for the moving average;",
        "4 us for each small factor.",
        "",
        *vit_b(),
        "",
        *kalman_lines(KALMAN_SETS),
        "",
        *large_inverse_lines(),
    ]
    lines += [
        "",
        "## Left out on a GPU",
        "",
        "`damped_inverse` reports asymmetry beyond rounding (`Info.ASYMMETRIC`) from the reference and the",
        "CPU kernel. The Triton and CUDA kernels take the mean of the two triangles without comparing them.",
        "",
        "## Not seen without a GPU",
        "",
        "Bank conflicts, clocks, races, out-of-bounds reads, register use after the driver's own compiler,",
        "whether a call can be captured, and whether the stream of torch reaches the CUDA kernels.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it, or check that the file is up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/GPU_DEBT.md")
    parser.add_argument("--check", action="store_true", help="exit 1 where the file differs")
    arguments = parser.parse_args(argv)
    text = report()
    if arguments.write:
        write_text(TARGET, text)
    elif arguments.check:
        return int(not TARGET.exists() or TARGET.read_text() != text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
