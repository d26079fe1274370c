# SPDX-License-Identifier: Apache-2.0
"""The Sherman-Morrison form in plain PyTorch."""

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
