# SPDX-License-Identifier: Apache-2.0
"""The time of one launch: the slowest of arithmetic, memory, cache and latency, and the launch itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MULTIPROCESSORS = 132
# Planning values, not measured: TFLOP/s of bf16 tensor cores, of three TF32 products for one fp32
# product, of plain fp32; TB/s of the L2 and of all L1 together; us from request to data.
BF16, TF32X3, FP32 = 790.0, 133.0, 60.0
L2_TB_S, L1_TB_S, L2_BYTES, LATENCY_US = 5.5, 28.0, 40e6, 0.7
# A kernel on an otherwise full queue; the same in a CUDA graph.
LAUNCH_US, NODE_US, EAGER_US = 2.0, 0.6, 6.0
# Share of the peak that a tile can reach: public symmetric Triton kernels stay at about half.
REACH = {16: 0.10, 32: 0.20, 64: 0.35, 128: 0.50}
# The same for tiles whose elements are loaded one by one.
GATHER = 0.4


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


def microseconds(value: float) -> str:
    """Return a time as text, with one decimal where it is short."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
