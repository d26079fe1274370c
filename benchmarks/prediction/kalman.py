# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``kalman_update_``: those in CUDA C++, and those in Triton."""

from __future__ import annotations

import math

import torch

from grng_kernels.kalman_update import triton_kernel as kernel
from grng_kernels.kalman_update import triton_narrow as narrow
from grng_kernels.kalman_update import triton_wide as wide
from grng_kernels.kalman_update.gpu import unsupported
from grng_kernels.kalman_update.triton_shares import cut
from prediction.model import (
    BF16,
    FP32,
    GPUS,
    L2_BYTES,
    LATENCY_US,
    LAUNCH_US,
    MULTIPROCESSORS,
    REACH,
    Gpu,
    Work,
    microseconds,
)


def kalman_gram(outputs: int, d: int) -> list[Work]:
    """Return the two launches of the first pass."""
    tile, shares = 8, 264
    side = math.ceil(outputs / tile)
    tiles = side * (side + 1) // 2
    jacobian = 4.0 * outputs * d
    # Each tile reads its own 8 rows and those of its column; the tiles of one block column run far apart.
    reread = (
        4.0
        * d
        * sum(
            min(tile, outputs - tile * r) + (min(tile, outputs - tile * c) if c != r else 0) + 1
            for r in range(side)
            for c in range(r + 1)
        )
    )
    fits = jacobian <= L2_BYTES
    partial = Work(
        kernel="gram_partial_kernel (CUDA)",
        variant=f"C={outputs}, d={d:.0e}",
        blocks=shares * tiles,
        flops=2.0 * tiles * (tile * tile + tile) * d,
        rate=FP32 * 0.5,
        hbm=jacobian if fits else max(jacobian, reread),
        l2=reread,
        l1=0.0,
        serial_us=math.ceil(d / (shares * 256)) * LATENCY_US / 2,
        least_bytes=jacobian + 4.0 * d,
        least_flops=float(outputs) * (outputs + 1) * d,
        peak=FP32,
        first="H is read again for every pair of row tiles"
        if side > 1
        else "loads in flight per thread",
    )
    reduce = Work(
        kernel="gram_reduce_kernel (CUDA)",
        variant=f"C={outputs}",
        blocks=tiles,
        flops=float(tiles * shares * tile * tile),
        rate=FP32 * 0.01,
        hbm=4.0 * tiles * shares * tile * tile,
        l2=4.0 * tiles * shares * tile * tile,
        l1=0.0,
        serial_us=shares * LATENCY_US / 8,
        least_bytes=8.0 * outputs * outputs,
        least_flops=0.0,
        peak=FP32,
        first=f"one thread adds {shares} partial sums one after another: unroll or use a tree",
    )
    return [partial, reduce]


def kalman_apply(outputs: int, d: int) -> Work:
    """Return the launch of the second pass."""
    in_registers = outputs <= 16
    jacobian, vectors = 4.0 * outputs * d, 20.0 * d
    if in_registers:
        products, l1 = outputs * 16.0, 8.0 * outputs * 16 * d
    else:
        # Per element of the whitener one load of it and one of H.
        products, l1 = float(outputs) ** 2, 8.0 * outputs**2 * d
    # 256 columns of H per block and 8 blocks: more than an L1 holds, from 128 outputs of one block on.
    spills = not in_registers and 4.0 * outputs * 256 * 8 > 200e3
    return Work(
        kernel=f"apply_kernel<{str(in_registers).lower()}> (CUDA)",
        variant=f"C={outputs}, d={d:.0e}",
        blocks=min(math.ceil(d / 256), 4096),
        flops=2.0 * products * d,
        rate=FP32 * 0.5,
        hbm=jacobian + vectors,
        l2=4.0 * outputs**2 * d if spills else jacobian + vectors,
        l1=l1,
        serial_us=outputs * LATENCY_US / 8,
        least_bytes=jacobian + vectors,
        least_flops=(float(outputs) * (outputs + 1) + 4 * outputs) * d,
        peak=FP32,
        first=(
            "whitener loads: keep it in shared memory or constant cache"
            if in_registers
            else "H is read C times per element: tile it in shared memory, or use tensor cores"
        ),
    )


def _case(outputs: int, d: int, bf16: bool) -> str:
    return f"{'bf16' if bf16 else 'fp32'} H, C={outputs}, d={d:.0e}"


def _shares(outputs: int, d: int) -> int:
    few = outputs <= narrow.MAX_OUTPUTS
    most, unit = (narrow.SHARES, narrow.UNIT) if few else (wide.SHARES, wide.UNIT)
    return len(cut([d], most, unit)) - 1


def _sum(outputs: int, d: int, bf16: bool) -> Work:
    (tile, pairs), shares = kernel.tiles_of(outputs), _shares(outputs, d)
    read = 4.0 * shares * pairs * tile**2
    programs = math.ceil(outputs**2 / kernel.SUM_BLOCK)
    return Work(
        kernel="_sum_kernel (Triton)", variant=_case(outputs, d, bf16), blocks=programs,
        flops=float(shares * pairs * tile**2), rate=FP32 * 0.05, hbm=max(read - L2_BYTES, 0.0),
        l2=read, l1=0.0, serial_us=(math.ceil(shares / kernel.SUM_SHARES) + 2) * LATENCY_US,
        least_bytes=8.0 * outputs**2, least_flops=0.0, peak=FP32, first="fewer shares",
    )  # fmt: skip


def _narrow_passes(outputs: int, d: int, bf16: bool) -> list[Work]:
    (tile, pairs), shares = kernel.tiles_of(outputs), _shares(outputs, d)
    jacobian = (2.0 if bf16 else 4.0) * outputs * d
    # Of three tiles each reads the rows of both its sides; those of one side are in the L1.
    reread = jacobian * (2 if pairs > 1 else 1) + 8.0 * d * pairs
    # Six programs of two warps and 168 registers share a multiprocessor.
    waves = math.ceil(shares * pairs / (6 * MULTIPROCESSORS))
    steps = math.ceil(d / shares / narrow.gram_lanes(tile))
    gram = Work(
        kernel="_gram_narrow_kernel (Triton)", variant=_case(outputs, d, bf16),
        blocks=shares * pairs, flops=(2.0 * tile**2 + 6.0 * tile) * pairs * d, rate=FP32 * 0.5,
        hbm=jacobian + 8.0 * d, l2=reread + 4.0 * shares * pairs * tile**2, l1=0.0,
        serial_us=waves * steps * LATENCY_US, least_bytes=jacobian + 4.0 * d,
        least_flops=float(outputs) * (outputs + 1) * d, peak=FP32,
        first="loads of single elements, none in flight during the arithmetic",
    )  # fmt: skip
    rows = 1 << (outputs - 1).bit_length()
    again = jacobian + 4.0 * d if jacobian > L2_BYTES else 0.0
    steps = math.ceil(d / shares / narrow.APPLY_LANES)
    per_thread = narrow.APPLY_LANES / (32 * narrow.APPLY_WARPS)
    apply = Work(
        kernel="_apply_narrow_kernel (Triton)", variant=_case(outputs, d, bf16), blocks=shares,
        flops=2.0 * rows * (outputs + 2) * d, rate=FP32 * 0.5, hbm=again + 12.0 * d,
        l2=jacobian + 16.0 * d,
        # A weight is read by all lanes of a warp at once.
        l1=4.0 * rows * outputs * d / per_thread,
        serial_us=math.ceil(shares / (4 * MULTIPROCESSORS)) * steps * 2 * LATENCY_US,
        least_bytes=jacobian + 16.0 * d, least_flops=(float(outputs) * (outputs + 1) + 4 * outputs) * d,
        peak=FP32, first="loads of the whitener between the products",
    )  # fmt: skip
    return [gram, _sum(outputs, d, bf16), apply]


def _wide_passes(outputs: int, d: int, bf16: bool) -> list[Work]:
    (half, pairs), shares = kernel.tiles_of(outputs), _shares(outputs, d)
    rows = wide.padded(outputs)
    config = wide.config_of(outputs, torch.bfloat16 if bf16 else torch.float32)
    jacobian = (2.0 if bf16 else 4.0) * outputs * d
    partial = 4.0 * shares * pairs * half**2
    least = float(outputs) * (outputs + 1) * d
    together = MULTIPROCESSORS * max(1, 8 // config.gram_warps)
    waves = math.ceil(shares * pairs / together)
    used = shares * pairs / (waves * together)
    steps = math.ceil(d / shares / config.gram_k)
    # Each tile reads the rows of both its sides, on the diagonal the same ones: those are in the L1.
    reread = jacobian * (2 if pairs > 1 else 1)
    gram = Work(
        kernel="_gram_wide_kernel (Triton)", variant=_case(outputs, d, bf16), blocks=shares * pairs,
        flops=2.0 * (3 if bf16 else 6) * pairs * half**2 * d, rate=BF16 * REACH[half] * used,
        hbm=jacobian + 8.0 * d + max(partial - L2_BYTES, 0.0),
        l2=reread + 8.0 * pairs * d + partial,
        l1=0.0, serial_us=waves * steps * LATENCY_US / (config.gram_stages - 1),
        least_bytes=jacobian + 4.0 * d, least_flops=least, peak=BF16 / (3 if bf16 else 6),
        first="the pieces of H on their way from registers to the tensor cores",
    )  # fmt: skip
    split = Work(
        kernel="_split_kernel (Triton)", variant=_case(outputs, d, bf16),
        blocks=rows**2 // wide.SPLIT_BLOCK, flops=0.0, rate=FP32, hbm=0.0, l2=10.0 * rows**2, l1=0.0,
        serial_us=LATENCY_US, least_bytes=0.0, least_flops=0.0, peak=FP32,
        first="whether the second pass should split the whitener itself",
    )  # fmt: skip
    # Beyond the diagonal of the whitener no product is taken.
    terms = sum(range(half, rows + 1, half)) * half
    tiles = math.ceil(d / config.apply_d)
    together = MULTIPROCESSORS * max(1, 8 // config.apply_warps)
    waves = math.ceil(shares / together)
    used = shares / (waves * together)
    steps = math.ceil(tiles / shares) * terms // half // config.apply_k
    apply = Work(
        kernel="_apply_wide_kernel (Triton)", variant=_case(outputs, d, bf16), blocks=shares,
        flops=2.0 * (3 if bf16 else 6) * terms * d, rate=BF16 * REACH[half] * used,
        hbm=(jacobian + 4.0 * d if jacobian > L2_BYTES else 0.0) + 12.0 * d,
        l2=jacobian * terms / half / rows + 16.0 * d + 6.0 * terms * tiles, l1=0.0,
        serial_us=waves * steps * LATENCY_US / (config.apply_stages - 1),
        least_bytes=jacobian + 16.0 * d, least_flops=least + 4.0 * outputs * d,
        peak=BF16 / (3 if bf16 else 6), first="the whitener is read again for every tile of columns",
    )  # fmt: skip
    return [gram, _sum(outputs, d, bf16), split, apply]


def kalman_triton(outputs: int, d: int, *, bf16: bool) -> list[Work]:
    """Return the launches of both passes in Triton, without those of the C x C stage."""
    few = outputs <= narrow.MAX_OUTPUTS
    return (_narrow_passes if few else _wide_passes)(outputs, d, bf16)


def kalman_lines(sets: tuple[tuple[int, int], ...]) -> list[str]:
    """Return the section that compares the two."""

    def total(works: list[Work], gpu: Gpu) -> float:
        return sum(work.predicted_us(gpu) for work in works)

    lines = [
        "## The two passes of the Kalman update",
        "",
        "H100, us, the launches of both passes but not those of the C x C stage. The CUDA kernel takes a",
        "Jacobian in bf16 as a copy in fp32: two bytes read and four written for each element come on top.",
        "",
        "| C | d | CUDA, fp32 H | Triton, fp32 H | CUDA, bf16 H | Triton, bf16 H | chosen for fp32, bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    gpu = GPUS[0]
    for outputs, d in sets:
        cuda = total([*kalman_gram(outputs, d), kalman_apply(outputs, d)], gpu)
        copied = cuda + LAUNCH_US + 6.0 * outputs * d / gpu.tb_s / 1e6
        triton = [total(kalman_triton(outputs, d, bf16=bf16), gpu) for bf16 in (False, True)]
        chosen = [
            next(iter(unsupported(None, [torch.empty(0, dtype=dtype)], outputs)))
            for dtype in (torch.float32, torch.bfloat16)
        ]
        cells = [microseconds(us) for us in (cuda, triton[0], copied, triton[1])]
        lines.append(f"| {outputs} | {d:.0e} | {' | '.join(cells)} | {', '.join(chosen)} |")
    return lines
