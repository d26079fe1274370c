# SPDX-License-Identifier: Apache-2.0
"""Predicted times of the GPU kernels that have never run on a GPU, as benchmarks/results/GPU_DEBT.md.

The model is deliberately simple: the slowest of arithmetic, memory, cache and latency, plus a launch.
It is written down before the first measurement so that the measurement can prove it wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.files import write_text
from prediction.damped_inverse_large import (
    INVERSE_RHO,
    INVERSE_SETS,
    large_inverse_lines,
    large_inverses,
    newton_schulz_launches,
)
from prediction.damped_inverse_small import (
    SMALL_INVERSES,
    SMALL_SETS,
    damped_inverse_small,
    small_inverse,
)
from prediction.kalman import (
    kalman_apply,
    kalman_gram,
    kalman_lines,
    kalman_triton,
)
from prediction.kron_factor import (
    AVERAGE_US,
    CUBLAS_768,
    VIT_B_LORA,
    Factors,
    kron_factor,
    kron_factor_conv2d,
    vit_b,
)
from prediction.model import (
    BF16,
    EAGER_US,
    FP32,
    GPUS,
    L2_TB_S,
    NODE_US,
    TF32X3,
    Work,
    microseconds,
)
from prediction.precondition import (
    LORA_SETS,
    precondition,
)
from prediction.rank_one import (
    rank_one,
)

TARGET = Path(__file__).resolve().parent / "results" / "GPU_DEBT.md"
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
        Call(
            "kalman_update_ in Triton, any list",
            69,
            "4, and 65 calls of torch in the C x C stage; 3 up to 16 outputs; 8 to 22 more with rho",
        ),
        Call("damped_inverse, one size", 180, "18 steps of power iteration, 5 launches each"),
        Call("precondition, any list of LoRA weights", 2, "3 with the inner products"),
        Call(
            "adam_moments_ of 48 weights, by torch's list kernels",
            58,
            "10 for the list where torch has one kernel for all, and a cast of each norm",
        ),
        Call(
            "grafted_step_ of 48 weights, by torch's kernels",
            480,
            "about 10 for each weight: a loop in the reference; the first thing to group on a GPU",
        ),
        Call("rank1_precondition, any list", 4, "with the one that writes the damping"),
        Call(
            "rank1_step_ of 48 weights, by torch's kernels",
            1274,
            "26 for each weight: a loop in the reference; RankOneNPG does not call it on a GPU",
        ),
    ]


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
            *(microseconds(work.predicted_us(gpu)) for gpu in GPUS),
            microseconds(work.least_us(GPUS[0])),
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
        times = f"{microseconds(eager)} | {microseconds(graph)}"
        lines.append(f"| {call.name} | {call.launches} | {times} | {call.remark} |")
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
