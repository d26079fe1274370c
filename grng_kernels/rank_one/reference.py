# SPDX-License-Identifier: Apache-2.0
"""The Sherman-Morrison form in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    # fp64: squares of fp32 numbers below 1e-19 or above 1e19 leave the range of fp32.
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()


def rank1_precondition(
    grad: Sequence[Tensor], score: Sequence[Tensor], *, damping: float | Tensor
) -> list[Tensor]:
    """Return ``(g − u (uᵀg)/(damping + uᵀu)) / damping``, the dot products over all blocks.

    This is ``(damping·I + u uᵀ)⁻¹ g`` by Sherman-Morrison. Dot products in fp64, blocks in the dtype of
    ``grad``.
    """
    coefficient = _dot(score, grad) / (damping + _dot(score, score))
    return [
        ((g.double() - coefficient * u.double()) / damping).to(g.dtype)
        for g, u in zip(grad, score, strict=True)
    ]


def rank1_step_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    score: Sequence[Tensor],
    *,
    damping: float | Tensor,
    lr: Sequence[float | Tensor],
    decay: Sequence[float | Tensor],
    largest: float,
) -> Tensor:
    """``param <- decay·param − lr·d`` with ``d = (damping·I + u uᵀ)⁻¹ g``; return ``‖d‖``, fp64 0-d.

    In fp64, each parameter rounded once. Where a dot product is not finite or ``‖g‖/damping`` is above
    ``largest``, nothing moves and the norm is NaN. Nothing waits for the device.
    """
    mixed, square, own = _dot(score, grad), _dot(score, score), _dot(grad, grad)
    scale = 1 / (damping.double() if isinstance(damping, Tensor) else damping)
    usable = (own.sqrt() * scale <= largest) & mixed.isfinite() & square.isfinite()
    if isinstance(scale, Tensor):
        usable = usable & (scale > 0).to(usable.device)
    coefficient = mixed / (damping + square)
    # All before the first is written: memory may run out on the way.
    moved, squares = [], []
    for p, g, u, rate, kept in zip(param, grad, score, lr, decay, strict=True):
        d = (g.double() - coefficient * u.double()) * scale
        squares.append(d.square().sum())
        moved.append(torch.where(usable, (kept * p.double() - rate * d).to(p.dtype), p))
    norm = torch.stack(squares).sum().sqrt()
    for p, new in zip(param, moved, strict=True):
        p.copy_(new)
    return torch.where(usable, norm, math.nan)
