# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``precondition``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grng_kernels.precondition import triton_kernel as two_sided
from prediction.model import (
    BF16,
    L2_BYTES,
    LATENCY_US,
    MULTIPROCESSORS,
    REACH,
    Work,
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


LORA_SETS = (
    ("ViT-B/16 r16: 24 of [16, 768] + 24 of [768, 16]", ((16, 768), (768, 16)), 24),
    ("7B q,v r16: 64 of [16, 4096] + 64 of [4096, 16]", ((16, 4096), (4096, 16)), 64),
    ("7B q,v r64: 64 of [64, 4096] + 64 of [4096, 64]", ((64, 4096), (4096, 64)), 64),
    ("one [16, 4096]", ((16, 4096),), 1),
)
