# SPDX-License-Identifier: Apache-2.0
"""Kronecker factors of which only the diagonal is kept: the wide side of a low-rank weight."""

import torch
from torch import Tensor

from grng_kernels import Info

# Below this a factor is nothing but rounding: as in damped_inverse.
SMALLEST_DAMPING = 1e-36


def diagonal_factor_update_(
    factor: Tensor, x: Tensor, *, decay: float | Tensor, scale: float | Tensor, bias: bool
) -> Tensor:
    """``factor <- decay·factor + scale·diag(xᵀx)``, in place, for all or nothing.

    Args:
        factor: State ``[N]``, fp32 or fp64. Mutated.
        x: Rows ``[rows, N]``, or ``[rows, N - 1]`` with ``bias``, which adds a column of ones.
        decay: EMA decay in [0, 1], number or 0-d tensor.
        scale: Weight of the sum of squares.
        bias: See ``x``.

    Returns:
        ``Info``, int32, 0-d: ``NONFINITE_INPUT`` where a square is NaN or infinite; the factor is then
        unchanged.
    """
    if len(x) == 0:
        return torch.zeros((), dtype=torch.int32, device=factor.device)
    squares = x.to(factor.dtype).square().sum(0)
    if bias:
        squares = torch.cat([squares, squares.new_full((1,), len(x))])
    # As in BLAS: what does not count may hold anything.
    old = decay * factor
    if isinstance(decay, Tensor):
        old = torch.where(decay == 0, 0.0, old)
    elif decay == 0:
        old = torch.zeros_like(factor)
    new = old + scale * squares
    finite = torch.isfinite(new).all()
    factor.copy_(torch.where(finite, new, factor))
    return torch.where(finite, Info.OK, Info.NONFINITE_INPUT).to(torch.int32)


def diagonal_damped_inverse(factor: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``1 / (factor + √rho·max(factor))``: spectral damping of a diagonal matrix.

    Args:
        factor: ``[N]``, not negative.
        rho: Relative regulariser, > 0.

    Returns:
        The inverse ``[N]``; 0-d each: the damping, the norm, and ``Info``, int32, not 0 where the factor is
        not finite.
    """
    norm = factor.max()
    damping = (rho**0.5 * norm).clamp(min=SMALLEST_DAMPING)
    inverse = 1 / (factor + damping)
    info = torch.where(torch.isfinite(factor).all(), Info.OK, Info.NONFINITE_INPUT)
    return inverse, damping, norm, info.to(torch.int32)
