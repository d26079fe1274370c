# SPDX-License-Identifier: Apache-2.0
"""What a Kalman optimizer does with rows of a Jacobian ``H [k, d]``, which may be factored.

Rows are a tensor, or a :class:`~grng_kernels.KroneckerJacobian` of ``k`` output gradients and one input: none
of the functions here forms ``[k, d]`` of those. A combination of rows, ``Hᵀ v``, is a tensor ``[d]``, or the
same pair with one combined output gradient ``[m]``.
"""

from typing import Any

import torch
from torch import Tensor

from grng_kernels import KroneckerJacobian

Rows = Tensor | KroneckerJacobian


def dtype_of(h: Rows) -> torch.dtype:
    """The dtype of the elements."""
    return h.outputs.dtype if isinstance(h, KroneckerJacobian) else h.dtype


def parts(h: Rows) -> list[Tensor]:
    """The tensors that the rows consist of."""
    return list(h) if isinstance(h, KroneckerJacobian) else [h]


def dense(h: Rows) -> Tensor:
    """The rows as a matrix ``[k, d]``, formed where they are factored."""
    if isinstance(h, KroneckerJacobian):
        return (h.outputs.unsqueeze(-1) * h.inputs).flatten(1)
    return h


def squares(h: Rows) -> Tensor:
    """The squared norm of each row, ``[k]``."""
    if isinstance(h, KroneckerJacobian):
        return h.outputs.square().sum(1) * h.inputs.square().sum()
    return h.square().sum(1)


def product(h: Rows, v: Tensor) -> Tensor:
    """``H v``, ``[k]``."""
    if isinstance(h, KroneckerJacobian):
        return h.outputs @ (_matrix(h, v) @ h.inputs)
    return h @ v


def gram(h: Rows, p: Tensor) -> Tensor:
    """``H diag(p) Hᵀ``, ``[k, k]``."""
    if isinstance(h, KroneckerJacobian):
        return (h.outputs * (_matrix(h, p) @ h.inputs.square())) @ h.outputs.mT
    return (h * p) @ h.mT


def mixed(t: Tensor, h: Rows) -> Rows:
    """``Tᵀ H`` for ``T [k, m]``: ``m`` rows."""
    if isinstance(h, KroneckerJacobian):
        return KroneckerJacobian(t.mT.to(h.outputs.dtype) @ h.outputs, h.inputs)
    return t.mT.to(h.dtype) @ h


def combination(h: Rows, v: Tensor) -> Rows:
    """``Hᵀ v`` for ``v [k]``."""
    if isinstance(h, KroneckerJacobian):
        return KroneckerJacobian(h.outputs.mT @ v.to(h.outputs.dtype), h.inputs)
    return h.mT @ v.to(h.dtype)


def square_norm(h: Rows) -> Tensor:
    """The sum of the squares of all elements, 0-d in fp64."""
    if isinstance(h, KroneckerJacobian):
        one, other = (part.square().sum(dtype=torch.float64) for part in h)
        return one * other
    return h.square().sum(dtype=torch.float64)


# ---- the last combination of rows in an optimizer's state ----

_DENSE, _FACTORED = "score", ("score_outputs", "score_inputs")


def remember(state: dict[str, Any], score: Rows) -> None:
    """Keep a combination of rows in a state, in place of the one before."""
    names = _FACTORED if isinstance(score, KroneckerJacobian) else (_DENSE,)
    for name in {_DENSE, *_FACTORED} - set(names):
        state.pop(name, None)
    for name, part in zip(names, parts(score), strict=True):
        state[name] = part.clone()


def with_remembered(h: Rows, state: dict[str, Any]) -> Tensor:
    """``H s`` of rows and the remembered combination ``s``, ``[k]``, whichever of them are factored."""
    if _DENSE in state:
        return product(h, state[_DENSE])
    outputs, inputs = (state[name] for name in _FACTORED)
    if isinstance(h, KroneckerJacobian):
        return (h.outputs @ outputs) * (h.inputs @ inputs)
    return (h.reshape(len(h), len(outputs), len(inputs)) @ inputs) @ outputs


def _matrix(h: KroneckerJacobian, v: Tensor) -> Tensor:
    return v.reshape(h.outputs.shape[-1], len(h.inputs))
