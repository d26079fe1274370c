# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``damped_inverse`` for small matrices: one launch each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grng_kernels.damped_inverse import triton_small
from prediction.model import (
    FP32,
    MULTIPROCESSORS,
    REACH,
    TF32X3,
    Work,
)

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
