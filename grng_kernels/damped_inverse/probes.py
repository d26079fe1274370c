# SPDX-License-Identifier: Apache-2.0
"""How a residual is measured without forming it: through a few fixed vectors of signs."""

import functools

import torch
from torch import Tensor

from grng_kernels._precision import matmul

# ‖R V‖_F²/COUNT estimates ‖R‖_F² without bias for random signs V; the worst R, of rank one, leaves a
# standard deviation of √(2/COUNT), which is 35 %, on the square. Forming R costs twice the inverse.
COUNT = 16


@functools.lru_cache(maxsize=64)
def _signs(n: int) -> Tensor:
    i = torch.arange(n, dtype=torch.int64)[:, None]
    j = torch.arange(COUNT, dtype=torch.int64)[None, :]
    # lowbias32 of Chris Wellons, in 64-bit arithmetic; the kernels have the same in 32 bits.
    low = 0xFFFFFFFF
    h = i * COUNT + j
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & low
    h = ((h ^ (h >> 15)) * 0x846CA68B) & low
    h = h ^ (h >> 16)
    return 1 - 2 * (h >> 31)


def probes(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the vectors ``[n, k]``: COUNT vectors of signs, or the identity up to that order."""
    if n <= COUNT:
        return torch.eye(n, dtype=dtype, device=device)
    return _signs(n).to(device=device, dtype=dtype)


def residual(damped: Tensor, inverse: Tensor) -> Tensor:
    """Return ``‖I − M X‖_F/√N`` ``[L]`` of ``damped`` and ``inverse`` ``[L, N, N]``, through the probes.

    Exact up to order 16, and beyond an estimate: unbiased in its square, off by a factor of two in fewer
    than one of a thousand matrices.
    """
    n = damped.shape[-1]
    v = probes(n, damped.dtype, damped.device)
    rest = v - matmul(damped, matmul(inverse, v.expand(damped.shape[0], -1, -1)))
    exact_columns = n if n <= COUNT else n * COUNT
    return torch.linalg.matrix_norm(rest, ord="fro") / exact_columns**0.5
