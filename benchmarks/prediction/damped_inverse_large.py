# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``damped_inverse`` for orders above 64: two methods, with the same frame around them."""

from __future__ import annotations

import math

from grng_kernels.damped_inverse import triton_direct as direct
from grng_kernels.damped_inverse import triton_newton_schulz as newton_schulz
from grng_kernels.damped_inverse import triton_prologue as large_inverse
from prediction.model import (
    BF16,
    FP32,
    GPUS,
    L2_BYTES,
    LATENCY_US,
    LAUNCH_US,
    MULTIPROCESSORS,
    NODE_US,
    REACH,
    TF32X3,
    Gpu,
    Work,
    microseconds,
)

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
                ", ".join(f"{value:.1f} {key}" for key, value in flops.items()), microseconds(frame),
                *(microseconds(large_inverse_us(method, count, n, graph=graph)) for graph in (False, True)),
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
