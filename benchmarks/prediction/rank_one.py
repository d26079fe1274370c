# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``rank1_precondition``."""

from __future__ import annotations

import math

from grng_kernels.rank_one import triton_kernel as rank_one_kernel
from prediction.model import (
    FP32,
    L2_BYTES,
    LATENCY_US,
    Work,
)


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
