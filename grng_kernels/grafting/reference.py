# SPDX-License-Identifier: Apache-2.0
"""AdamW's moments and a grafted step in plain PyTorch, on any device, without waiting for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Corrections(NamedTuple):
    """What corrects the start of the moments at zero, for each item: ``1/(1 − β₁ᵗ)``, ``1/√(1 − β₂ᵗ)``."""

    mean: list[float]
    root: list[float]


def corrections(betas: tuple[float, float], steps: Sequence[float]) -> Corrections:
    """Return the corrections after ``steps`` updates of the moments, 1 for the first."""
    return Corrections(
        [1 / (1 - betas[0] ** n) for n in steps], [(1 - betas[1] ** n) ** -0.5 for n in steps]
    )


def adam_steps(
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], found: Corrections, eps: float
) -> list[Tensor]:
    """Return ``m̂ / (√v̂ + eps)`` of each item."""
    root = torch._foreach_sqrt(list(exp_avg_sqs))
    torch._foreach_mul_(root, found.root)
    torch._foreach_add_(root, eps)
    mean = torch._foreach_mul(list(exp_avgs), found.mean)
    return list(torch._foreach_div(mean, root))


def adam_moments_(
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    betas: tuple[float, float],
    eps: float,
    found: Corrections,
) -> Tensor:
    """Average gradients into the moments; return the norm of each step, fp64 ``[items]``."""
    first, second = list(exp_avgs), list(exp_avg_sqs)
    wide = [g.to(m.dtype) for g, m in zip(grads, first, strict=True)]
    torch._foreach_lerp_(first, wide, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, wide, wide, 1 - betas[1])
    norms = torch._foreach_norm(adam_steps(first, second, found, eps))
    return torch.stack([n.double() for n in norms])


def grafted_step_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scales: Tensor,
    lr: float | Tensor,
    decay: float | Tensor,
    eps: float,
    found: Corrections,
) -> None:
    """``param <- decay·param − lr·scale·direction``; AdamW's step in its place where no scale is finite."""
    # The scale in two halves: what an inverse of nearly nothing made huge needs a tiny one.
    halves = scales.sqrt().unbind()
    own = adam_steps(exp_avgs, exp_avg_sqs, found, eps)
    for param, direction, half, other in zip(params, directions, halves, own, strict=True):
        here = half.to(direction.dtype)
        step = torch.where(torch.isfinite(here), direction * here * here, other)
        param.copy_(decay * param.to(step.dtype) - lr * step)
