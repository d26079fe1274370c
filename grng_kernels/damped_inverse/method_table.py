# SPDX-License-Identifier: Apache-2.0
"""Which of the two methods inverts matrices of orders above 128 on the GPU.

The table comes from the model of ``benchmarks/predict.py`` (H100, launches in a CUDA graph) and not from a
measurement: no GPU has run either method yet. Newton-Schulz is predicted to win where a call is so small
that its few launches count for more than its products; everywhere else the sweep of panels does ``n³`` FLOPs
where the iteration does ten times as many.
"""

from typing import Literal

Method = Literal["newton_schulz", "direct"]

# From this rho on. Below it the iteration needs more products than the model allows it.
SMALLEST_RHO = 1e-3
# Up to this order, up to how many matrices Newton-Schulz is predicted to be faster.
COUNTS = ((128, 32), (256, 16), (512, 4), (768, 2), (1024, 1))
# With emulated products it keeps within twice PyTorch's error (benchmarks/precision_table.py); on a GPU
# that has not been shown, and until then it serves only where it is asked for.
NEWTON_SCHULZ_WITHIN_BUDGET = False


def faster(n: int, count: int, rho: float | None) -> Method:
    """Return the method predicted to be faster for ``count`` matrices of order ``n``.

    Args:
        n: Order; of a mixed list that of the largest matrix.
        count: Matrices in the call.
        rho: As in ``damped_inverse``, or None with an absolute damping, which only one method serves.
    """
    if rho is None or rho < SMALLEST_RHO:
        return "direct"
    largest = next((counts for order, counts in COUNTS if n <= order), 0)
    return "newton_schulz" if count <= largest else "direct"


def choose(n: int, count: int, rho: float | None) -> Method:
    """Return the method of ``method="auto"``: the faster one of those that keep the error budget."""
    return faster(n, count, rho) if NEWTON_SCHULZ_WITHIN_BUDGET else "direct"
