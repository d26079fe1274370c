# SPDX-License-Identifier: Apache-2.0
"""The equations of the factor update in plain PyTorch; fp64 in, fp64 math."""

import torch
from torch import Tensor

from grng_kernels._precision import matmul
from grng_kernels.info import Info


def mirror_lower(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix whose lower triangle is that of ``matrix``."""
    lower = matrix.tril()
    return lower + lower.tril(-1).mT


def batch_info(
    factor: Tensor,
    x: Tensor,
    *,
    decay: float | Tensor,
    scale: float | Tensor,
    bias: bool,
    rows: int | None = None,
) -> Tensor:
    """Return :class:`Info` (int32, 0-d) of one batch, from largest magnitudes alone.

    ``amax² · rows · max(1, |scale|)`` bounds every partial sum of ``scale·xᵀx``, and the diagonal what a PSD
    ``factor`` already holds. Together below the largest number of its dtype they exclude NaN, infinity and
    overflow at once, before anything is written. ``rows`` is how many ``x`` stands for, if not as many as it
    has. Several factors ``[groups, N, N]`` of one batch have one verdict.
    """
    if x.numel() == 0:
        amax = torch.zeros((), dtype=torch.float64, device=x.device)
    else:
        # One pass without a temporary that propagates NaN; the infinity norm is ten times slower on a CPU.
        amax = torch.stack(torch.aminmax(x)).abs().amax().double()
    if bias:
        # Not clamp(min=1): that would turn a NaN into a number on some devices.
        amax = torch.where(amax < 1, 1.0, amax)
    finite = torch.isfinite(amax)
    # A number stays on the host: copying it to the device would wait for it, and break graph capture.
    if isinstance(scale, Tensor):
        finite = finite & torch.isfinite(scale.to(factor.dtype))
        weight: float | Tensor = scale.double().abs().clamp(min=1)
    else:
        weight = max(1.0, abs(scale))
    bound = amax * amax * (x.shape[0] if rows is None else rows) * weight
    # The diagonal bounds the magnitudes of a PSD matrix.
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    held = torch.linalg.vector_norm(diagonal, ord=torch.inf).double()
    if isinstance(decay, Tensor):
        finite = finite & (decay >= 0) & (decay <= 1)
        held = torch.where(decay == 0, 0.0, decay * held)
    else:
        held = decay * held if decay != 0 else torch.zeros_like(held)
    finite = finite & torch.isfinite(held)
    bound = bound + held
    info = torch.where(bound <= torch.finfo(factor.dtype).max, int(Info.OK), int(Info.OVERFLOW))
    return torch.where(finite, info, int(Info.NONFINITE_INPUT)).to(torch.int32)


def kron_factor_update(
    factor: Tensor, x: Tensor, *, decay: float | Tensor, scale: float | Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(decay·factor + scale·xᵀx, info)``, computed in the dtype of ``factor``.

    ``factor`` is ``[N, N]``, ``x`` is ``[rows, N]`` or, with ``bias``, ``[rows, N-1]`` and is given a last
    column of ones. As in BLAS, ``decay == 0`` ignores the old content, and only the lower triangle of
    ``factor`` is read. Where ``info != 0`` the returned factor is the given one.
    """
    info = batch_info(factor, x, decay=decay, scale=scale, bias=bias)
    x = x.to(factor.dtype)
    if bias:
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
    if isinstance(decay, Tensor):
        old = torch.where(decay == 0, torch.zeros_like(factor), decay.to(factor.dtype) * factor)
    else:
        old = decay * factor if decay != 0 else torch.zeros_like(factor)
    new = mirror_lower(old + matmul(x.mT, x) * scale)
    return torch.where(info == int(Info.OK), new, factor), info
