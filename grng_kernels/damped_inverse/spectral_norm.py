# SPDX-License-Identifier: Apache-2.0
"""The spectral norm of symmetric PSD matrices by warm-started power iteration, with certified bounds."""

import torch
from torch import Tensor

from grng_kernels._precision import matmul

# A power iteration approaches the norm from below. An estimate that is too high only damps a little
# more; one that is too low by a relative 1/kappa would let Newton-Schulz diverge. Hence the factor.
SAFETY = 1.02
# Products with a vector: little beside the N³ of an inverse, and enough from a cold start. Whether a
# given vector is warm is known on the device only, so the number does not depend on it.
STEPS = 16


def start_vector(matrix: Tensor) -> Tensor:
    """Return a deterministic start ``[L, N]`` for matrices ``[L, N, N]``: the longest row of each.

    Of ``e_i``, all ``i``, the one whose image under the matrix is longest: for a PSD matrix of any rank it
    has a part along the leading eigenvector, which a fixed vector may lack.
    """
    lengths = torch.linalg.vector_norm(matrix, dim=-1)
    longest = lengths.argmax(dim=-1)
    return matrix.gather(1, longest[:, None, None].expand(-1, 1, matrix.shape[-1])).squeeze(1)


def spectral_norm(matrix: Tensor, vector: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``(estimate, vector)`` for symmetric PSD matrices of moderate scale (largest entry near 1).

    Args:
        matrix: ``[L, N, N]``, fp32 or fp64, N >= 1.
        vector: ``[L, N]``, the vector returned by an earlier call for nearly the same matrices. All zero
            counts as none.

    Returns:
        ``estimate`` ``[L]``: at least the largest diagonal entry, at most the least of the infinity, the
        Frobenius and the trace norm (all certified upper bounds), and in between 1.02 times the Rayleigh
        quotient. ``vector`` ``[L, N]`` of unit length, or zero for a zero matrix.
    """
    start = start_vector(matrix)
    if vector is not None:
        known = (vector != 0).any(dim=-1, keepdim=True) & torch.isfinite(vector).all(
            dim=-1, keepdim=True
        )
        # A little of the cold start lets a vector that became orthogonal to the new leading one recover.
        start = torch.where(known, vector.to(matrix.dtype) + 1e-3 * _unit(start), start)
    v = _unit(start)
    for _ in range(STEPS):
        v = _unit(matmul(matrix, v.unsqueeze(-1)).squeeze(-1))
    rayleigh = (v * matmul(matrix, v.unsqueeze(-1)).squeeze(-1)).sum(dim=-1)
    lower, upper = norm_bounds(matrix)
    return torch.minimum(torch.maximum(SAFETY * rayleigh, lower), upper), v


def norm_bounds(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds ``[L]`` that the norm of PSD matrices ``[L, N, N]`` is never below and never above."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    lower = diagonal.amax(dim=-1)
    infinity = matrix.abs().sum(dim=-1).amax(dim=-1)
    frobenius = torch.linalg.matrix_norm(matrix, ord="fro")
    # Of a matrix that is indefinite by rounding the trace could be below the largest entry.
    trace = torch.maximum(diagonal.sum(dim=-1), lower)
    return lower, torch.minimum(torch.minimum(infinity, frobenius), trace)


def _unit(v: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / torch.where(length > 0, length, torch.ones_like(length))
