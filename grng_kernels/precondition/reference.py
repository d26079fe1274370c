# SPDX-License-Identifier: Apache-2.0
"""The two-sided product in plain PyTorch."""

import torch
from torch import Tensor

from grng_kernels._precision import matmul


def left_first(m: int, n: int) -> bool:
    """Return whether ``(left·grad)·right`` needs no more work than ``left·(grad·right)``.

    Both cost ``m²n + mn²`` multiplications for ``grad [m, n]``, so the order decides only how the result
    rounds and which intermediate is read again: the larger inverse first lets the smaller finish.
    """
    return m >= n


def precondition(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``left · grad · right`` for ``grad [m, n]``, in the widest dtype among the three."""
    dtype = torch.promote_types(torch.promote_types(grad.dtype, left.dtype), right.dtype)
    grad, left, right = grad.to(dtype), left.to(dtype), right.to(dtype)
    if left_first(*grad.shape):
        return matmul(matmul(left, grad), right)
    return matmul(left, matmul(grad, right))
