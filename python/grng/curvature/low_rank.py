# SPDX-License-Identifier: Apache-2.0
"""A damped Fisher matrix of few scores, which is solved without forming it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import grng_kernels as kernels

# Elements of a block of scores that are held in fp64 at a time.
_PIECE = 2**21


def solve(
    grads: Sequence[Tensor], scores: Sequence[Tensor], damping: float
) -> tuple[list[Tensor], Tensor]:
    """Solve ``(damping·I + (1/m) Σ_j u_j u_jᵀ) d = g``, where all blocks are one vector.

    One score on one device goes to :func:`grng_kernels.rank1_precondition` (Sherman-Morrison). Else by
    Woodbury, with the scores as the rows of ``U``::

        d = (g − Uᵀ (m·damping·I + U Uᵀ)⁻¹ U g) / damping

    with products and the Cholesky factor of the ``m × m`` matrix in fp64, a piece of a block at a time.

    Args:
        grads: Blocks of g, of any shape; on any devices.
        scores: ``[m, numel]`` of each block, of its dtype, where it is.
        damping: > 0.

    Returns:
        The blocks of d, like those of g; and 0, or on failure another number, 0-d, where the first is. A NaN
        or infinity gives a non-finite result, a failure, or both.

    Source: Sherman & Morrison 1950; Woodbury 1950.
    """
    if len(scores[0]) == 1 and len({g.device for g in grads}) == 1:
        rows = [u[0].view(g.shape) for g, u in zip(grads, scores, strict=True)]
        found = kernels.rank1_precondition(grads, rows, damping=damping)
        return found, torch.zeros((), dtype=torch.int32, device=grads[0].device)
    return _woodbury(grads, scores, damping)


def _woodbury(
    grads: Sequence[Tensor], scores: Sequence[Tensor], damping: float
) -> tuple[list[Tensor], Tensor]:
    m, device = len(scores[0]), grads[0].device
    flat = [g.reshape(-1) for g in grads]
    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    product = torch.zeros(m, 1, dtype=torch.float64, device=device)
    for g, u in zip(flat, scores, strict=True):
        for part in _pieces(g.numel(), m):
            rows = u[:, part].double()
            gram += (rows @ rows.mT).to(device)
            product += (rows @ g[part, None].double()).to(device)
    gram.diagonal().add_(m * damping)
    root, info = torch.linalg.cholesky_ex(gram)
    coefficients = torch.cholesky_solve(product, root)
    results = []
    for given, g, u in zip(grads, flat, scores, strict=True):
        c = coefficients.to(g.device)
        result = torch.empty_like(g, memory_format=torch.contiguous_format)
        for part in _pieces(g.numel(), m):
            # Rounded once: where g is a sum of scores, little is left of it.
            rest = g[part].double() - (u[:, part].double().mT @ c)[:, 0]
            result[part] = rest / damping
        results.append(result.view(given.shape))
    return results, info


def _pieces(size: int, rows: int) -> Iterator[slice]:
    length = max(1, _PIECE // rows)
    for begin in range(0, size, length):
        yield slice(begin, min(begin + length, size))
