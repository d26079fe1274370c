# SPDX-License-Identifier: Apache-2.0
"""Which of the two methods inverts matrices of orders above 64 on the GPU.

The table comes from the model of ``benchmarks/predict.py`` (H100, launches in a CUDA graph) and not from a
measurement: no GPU has run either method yet. Newton-Schulz wins where a call is so small that its few
launches count for more than its products; everywhere else the sweep of panels does ``n³`` FLOPs where the
iteration does ten times as many.
"""

from typing import Literal

Method = Literal["newton_schulz", "direct"]

# From this rho on. Below it the predicted residual of Newton-Schulz in fp32 grows past 1e-4.
SMALLEST_RHO = 1e-4
# Up to this order, up to how many matrices Newton-Schulz is predicted to be faster.
COUNTS = ((128, 32), (256, 16), (512, 4), (768, 2), (1024, 1))


def choose(n: int, count: int, rho: float | None) -> Method:
    """Return the method for ``count`` matrices of order ``n``; without ``rho`` only one is possible.

    Args:
        n: Order; of a mixed list that of the largest matrix.
        count: Matrices in the call.
        rho: As in ``damped_inverse``, or None with an absolute damping.
    """
    if rho is None or rho < SMALLEST_RHO:
        return "direct"
    largest = next((counts for order, counts in COUNTS if n <= order), 0)
    return "newton_schulz" if count <= largest else "direct"
