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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.files import write_text

from grng_kernels.kron_factor.triton_kernel import (
    COMMIT_BLOCK,
    CONFIGS_16BIT,
    CONFIGS_FP32,
    EXTREMES_COLUMNS,
    EXTREMES_ROWS,
    Config,
    rows_per_split,
)
from grng_kernels.precondition import triton_kernel as two_sided

TARGET = Path(__file__).resolve().parent / "results" / "GPU_DEBT.md"
MULTIPROCESSORS = 132
# Planning values, not measured: TFLOP/s of bf16 tensor cores, of three TF32 products for one fp32
# product, of plain fp32; TB/s of the L2 and of all L1 together; us from request to data.
BF16, TF32X3, FP32 = 790.0, 133.0, 60.0
L2_TB_S, L1_TB_S, L2_BYTES, LATENCY_US = 5.5, 28.0, 40e6, 0.7
# A kernel on an otherwise full queue; the same in a CUDA graph.
LAUNCH_US, NODE_US, EAGER_US = 2.0, 0.6, 6.0
# Share of the peak that a tile can reach: public symmetric Triton kernels stay at about half.
REACH = {16: 0.10, 32: 0.20, 64: 0.35, 128: 0.50}


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


class Gpu(NamedTuple):
    """Name and copy bandwidth; the arithmetic of the two is the same."""

    name: str
    tb_s: float


GPUS = (Gpu("H100", 3.0), Gpu("H200", 4.3))


@dataclass(frozen=True)
class Work:
    """One launch.

    Attributes:
        kernel: Function.
        variant: Which of its variants, and the shape.
        blocks: Programs or thread blocks.
        flops: Executed, masked lanes included.
        rate: TFLOP/s that these could reach.
        hbm: Bytes from and to memory.
        l2: Bytes through the L2.
        l1: Bytes through the L1.
        serial_us: Time that no parallelism hides.
        least_bytes: Memory traffic that the problem needs.
        least_flops: Arithmetic that the problem needs.
        peak: TFLOP/s of the least arithmetic.
        first: What to look at first.
    """

    kernel: str
    variant: str
    blocks: int
    flops: float
    rate: float
    hbm: float
    l2: float
    l1: float
    serial_us: float
    least_bytes: float
    least_flops: float
    peak: float
    first: str

    def terms(self, gpu: Gpu) -> dict[str, float]:
        """Return what could bound it, in us."""
        return {
            "arithmetic": self.flops / self.rate / 1e6,
            "memory": self.hbm / gpu.tb_s / 1e6,
            "L2": self.l2 / L2_TB_S / 1e6,
            "L1": self.l1 / L1_TB_S / 1e6,
            "latency": self.serial_us,
        }

    def predicted_us(self, gpu: Gpu) -> float:
        """Return the predicted time."""
        return LAUNCH_US + max(self.terms(gpu).values())

    def bound(self, gpu: Gpu) -> str:
        """Return what bounds it; the launch, where that is most of the time."""
        terms = self.terms(gpu)
        return "launch" if max(terms.values()) < LAUNCH_US else max(terms, key=lambda k: terms[k])

    def least_us(self, gpu: Gpu) -> float:
        """Return the roofline of the problem."""
        return max(self.least_flops / self.peak / 1e6, self.least_bytes / gpu.tb_s / 1e6)


def kron_factor(n: int, rows: int, config: Config, *, wide: bool) -> Work:
    """Return the main launch of the Triton factor update: ``wide`` for fp32 input, else 16 bit."""
    side = math.ceil(n / config.block_n)
    tiles = side * (side + 1) // 2
    split = rows_per_split(tiles, rows, config.block_k)
    splits = math.ceil(rows / split)
    programs = tiles * splits
    size, peak = (4, TF32X3) if wide else (2, BF16)
    flops = 2.0 * tiles * config.block_n**2 * rows
    # Tiles fill the machine in whole waves, and a few tiles use a few multiprocessors only.
    used = programs / (math.ceil(programs / MULTIPROCESSORS) * MULTIPROCESSORS)
    blocks_per_sm = max(1, 16 // config.num_warps)
    waves = math.ceil(programs / (MULTIPROCESSORS * blocks_per_sm))
    steps = math.ceil(split / config.block_k)
    traffic = float(rows) * n * size + 8.0 * n * n
    # Partial sums are written once and read once, mostly in L2.
    partial = 8.0 * programs * config.block_n**2
    first = "operand loads from L2: larger tiles" if n > config.block_n else "splits of the rows"
    if wide:
        first += "; tf32x3 through registers"
    return Work(
        kernel="_partial_products_kernel (Triton)",
        variant=f"{'fp32' if wide else 'bf16/fp16'}, tile {config.block_n}, n={n}, {rows} rows",
        blocks=programs,
        flops=flops,
        rate=peak * REACH[config.block_n] * used,
        hbm=traffic,
        l2=2.0 * tiles * config.block_n * rows * size + partial,
        l1=0.0,
        serial_us=waves * steps * LATENCY_US / (config.num_stages - 1),
        least_bytes=traffic,
        least_flops=float(rows) * n * (n + 1),
        peak=peak,
        first=first,
    )


def kron_factor_around(n: int, rows: int, config: Config, *, wide: bool) -> list[Work]:
    """Return the first and the last launch of the factor update: both move memory and no more."""
    main = kron_factor(n, rows, config, wide=wide)
    read = float(rows) * n * (4 if wide else 2)
    programs = math.ceil(rows / EXTREMES_ROWS)
    partial = 4.0 * main.blocks * config.block_n**2
    piece = min(config.block_n, COMMIT_BLOCK)
    side = math.ceil(n / config.block_n)
    pieces = side * (side + 1) // 2 * (config.block_n // piece) ** 2
    common = dict(flops=0.0, rate=FP32, l1=0.0, least_flops=0.0, peak=FP32)
    variant = f"{'fp32' if wide else 'bf16/fp16'}, n={n}, {rows} rows"
    return [
        Work(
            kernel="_extremes_kernel (Triton)", variant=variant, blocks=programs, hbm=read, l2=read,
            serial_us=math.ceil(n / EXTREMES_COLUMNS) * LATENCY_US, least_bytes=read,
            first="fuse it into the main launch, if it shows", **common,
        ),
        Work(
            kernel="_commit_kernel (Triton)", variant=variant, blocks=pieces, hbm=8.0 * n * n,
            l2=partial + 8.0 * n * n, serial_us=(main.blocks * piece**2 / pieces / piece**2 + 2) * LATENCY_US,
            least_bytes=8.0 * n * n, first="partial sums: fewer splits", **common,
        ),
    ]  # fmt: skip


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


def works() -> Iterator[Work]:
    """Yield every kernel variant on the shapes of the benchmarks that use it."""
    orders = {16: (16, 12608), 32: (32, 8192), 64: (64, 8192), 128: (768, 8192)}
    for wide, table in ((False, CONFIGS_16BIT), (True, CONFIGS_FP32)):
        for block, config in table.items():
            shapes = [orders[block]]
            if block == max(table):
                shapes = [*dict.fromkeys([*shapes, (768, 12608), (3072, 8192)])]
            for n, rows in shapes:
                yield kron_factor(n, rows, config, wide=wide)
                yield from kron_factor_around(n, rows, config, wide=wide)
    for outputs, d in ((2, 300_000), (10, 300_000), (10, 3_000_000), (100, 300_000)):
        yield from kalman_gram(outputs, d)
        yield kalman_apply(outputs, d)
    for name, shapes, layers in LORA_SETS:
        yield from precondition(name, shapes * layers)


class Call(NamedTuple):
    """One call of a public function: how many launches it makes, counted from its source."""

    name: str
    launches: int
    remark: str


def calls() -> list[Call]:
    """Return the calls whose time is mostly launches."""
    per_factor = 32
    return [
        Call(
            "kron_factor_update_, one factor",
            per_factor,
            "28 of them check the batch; a decay or scale given as a number is copied from the host, "
            "which waits and cannot be captured in a graph",
        ),
        Call(
            "kron_factor_update_, 84 factors (ViT-B/16 LoRA)",
            84 * per_factor,
            "a loop, not grouped",
        ),
        Call(
            "kalman_update_, one block", 75, "the C x C stage between the passes: 67 small launches"
        ),
        Call("damped_inverse, one size", 180, "18 steps of power iteration, 5 launches each"),
        Call("precondition, any list of LoRA weights", 2, "3 with the inner products"),
        Call("rank1_precondition, one block", 20, "plain PyTorch in fp64"),
    ]


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
        f"4.3 TB/s (H200); L2 {L2_TB_S} TB/s. Tiles of 128, 64, 32, 16 are taken to reach 50, 35, 20,",
        "10 % of the peak. *Least* is the roofline of the problem, without a launch.",
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
