# SPDX-License-Identifier: Apache-2.0
"""The two-sided product in plain PyTorch."""

import torch
from torch import Tensor

from grng_kernels import _precision


def left_first(m: int, n: int) -> bool:
    """Return whether ``(left·grad)·right`` needs no more work than ``left·(grad·right)``.

    Both cost ``m²n + mn²`` multiplications for ``grad [m, n]``, so the order decides only how the result
    rounds and which intermediate is read again: the larger inverse first lets the smaller finish.
    """
    return m >= n


def precondition_into(
    out: Tensor,
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    plain: bool = False,
) -> None:
    """Write ``left · gradient · right`` to ``out``, in its dtype, the widest among the arguments.

    ``grad`` is ``[m, n]``; ``bias [m]`` is one more column of the gradient, at its end, and is not
    concatenated: its part of the product with ``right [n+1, n+1]`` is a rank-1 update. ``plain`` promises
    ``is_plain``: asking before every product takes as long as a small one.
    """
    matmul = torch.matmul if plain else _precision.matmul
    grad, left, right = (t.to(out.dtype) for t in (grad, left, right))
    m, n = out.shape
    if bias is None:
        if left_first(m, n):
            matmul(matmul(left, grad), right, out=out)
        else:
            matmul(left, matmul(grad, right), out=out)
        return
    column = bias.to(out.dtype).unsqueeze(1)
    if left_first(m, n):
        matmul(matmul(left, grad), right[:-1], out=out)
        out.addcmul_(matmul(left, column), right[-1:])
    else:
        product = matmul(grad, right[:-1]).addcmul_(column, right[-1:])
        matmul(left, product, out=out)


def precondition(
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    plain: bool = False,
) -> Tensor:
    """Return ``left · gradient · right`` of tensors of one dtype in new memory, as above."""
    if bias is not None:
        out = grad.new_empty(len(left), len(right))
        precondition_into(out, grad, left, right, bias, plain=plain)
        return out
    matmul = torch.matmul if plain else _precision.matmul
    if left_first(*grad.shape):
        return matmul(matmul(left, grad), right)
    return matmul(left, matmul(grad, right))


def inner_product(result: Tensor, grad: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``<result, gradient>``, 0-d, in the dtype of ``result``."""
    wide = result[:, : grad.shape[1]]
    total = (wide * grad).sum()
    return total if bias is None else total + (result[:, -1] * bias).sum()
