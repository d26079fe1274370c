# SPDX-License-Identifier: Apache-2.0
"""The machine's own copy bandwidth and matrix rate, measured first in every run."""

from __future__ import annotations

import torch

from harness.case import Plan
from harness.device import stopwatch_for
from harness.load import under_watch
from harness.row import Ceilings
from harness.timer import interleave


def measure_ceilings(plan: Plan) -> Ceilings:
    """Return what a plain copy and plain matrix products reach on this machine, now.

    Args:
        plan: Device and effort; ``quick`` takes smaller sizes.
    """
    on_gpu = plan.device.type == "cuda"
    copy_bytes = (2**30 if on_gpu else 2**28) // (8 if plan.quick else 1)
    n = (8192 if on_gpu else 2048) // (4 if plan.quick else 1)
    generator = torch.Generator(plan.device).manual_seed(0)
    source = torch.empty(copy_bytes // 4, device=plan.device).normal_(generator=generator)
    target = torch.empty_like(source)
    # Normal numbers: a product of zeros draws less power and runs faster than real ones.
    square = torch.empty(n, n, device=plan.device).normal_(generator=generator)
    calls = {"copy": lambda: target.copy_(source)}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = square.to(dtype)
        calls[str(dtype).removeprefix("torch.")] = lambda m=matrix: torch.mm(m, m)  # type: ignore[misc]
    timings, load = under_watch(
        lambda: interleave(calls, stopwatch_for(plan.device), plan.effort), attempts=plan.attempts
    )
    rates = {name: 2 * n**3 / t.p50 / 1e9 for name, t in timings.items() if name != "copy"}
    rates["float16"] = rates["bfloat16"]
    return Ceilings(2 * copy_bytes / timings["copy"].p50 / 1e6, rates, load)
