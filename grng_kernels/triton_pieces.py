# SPDX-License-Identifier: Apache-2.0
"""fp32 numbers as sums of bf16 numbers: fp32 accuracy from the tensor cores' products of bf16."""

import triton
import triton.language as tl


@triton.jit
def rounded(x):
    """Round fp32 to eight significant bits, in integer arithmetic: converting there and back takes longer."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def pieces(x):
    """Return three fp32 numbers of eight bits whose sum is ``x``, the largest first."""
    high = rounded(x)
    rest = x - high
    middle = rounded(rest)
    return high, middle, rest - middle
