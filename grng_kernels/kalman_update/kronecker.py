# SPDX-License-Identifier: Apache-2.0
"""Jacobians with Kronecker structure, and how the backends without a kernel for them expand them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grng_kernels import _checks


class KroneckerJacobian(NamedTuple):
    """A block ``H`` of a Jacobian, ``[C, m·n]``, with the rows ``kron(outputs[c], inputs)``.

    That of the weight ``[m, n]`` of a linear layer which was fed one vector: ``outputs [C, m]`` is the
    derivative by what the layer returned and ``inputs [n]`` what it was fed. ``H`` is never formed by the
    kernels that know its structure.
    """

    outputs: Tensor
    inputs: Tensor

    def expanded(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``H [C, m·n]``, computed in ``dtype`` (by default that of ``outputs``)."""
        dtype = self.outputs.dtype if dtype is None else dtype
        product = self.outputs.to(dtype).unsqueeze(-1) * self.inputs.to(dtype)
        return product.flatten(-2)


Jacobian = Tensor | KroneckerJacobian


def split(blocks: Sequence[Jacobian]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Return a tensor for each block (of a factored one the outputs), and inputs and numbers of those."""
    factored = [i for i, h in enumerate(blocks) if isinstance(h, KroneckerJacobian)]
    inputs = [blocks[i][1] for i in factored]
    rows = [h.outputs if isinstance(h, KroneckerJacobian) else h for h in blocks]
    return rows, inputs, factored


def as_blocks(
    op: str, name: str, value: Jacobian | Sequence[Jacobian]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Check the kind of a Jacobian argument, and split it as :func:`split`.

    Raises:
        TypeError: Neither a tensor, nor factored, nor a list of these.
    """
    if isinstance(value, KroneckerJacobian):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return _checks.as_list(op, name, value), [], []  # type: ignore[arg-type]
    for i, block in enumerate(value):
        if isinstance(block, KroneckerJacobian):
            for part, tensor in zip(block._fields, block, strict=True):
                if not isinstance(tensor, Tensor):
                    raise TypeError(
                        f"{op}: {part} of {name}[{i}] must be a tensor, got {type(tensor).__name__}"
                    )
    rows, inputs, factored = split(value)
    return _checks.as_list(op, name, rows), inputs, factored


def expand(
    rows: Sequence[Tensor], inputs: Sequence[Tensor], factored: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """Return the dense Jacobian of every block."""
    dense = list(rows)
    for i, x in zip(factored, inputs, strict=True):
        dense[i] = KroneckerJacobian(rows[i], x).expanded(dtype)
    return dense


def check_block(
    op: str,
    name: str,
    outputs: Tensor,
    inputs: Tensor,
    size: tuple[int, int],
    dtypes: list[torch.dtype],
) -> None:
    """Check a factored block for ``size = (C, d)``.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape.
    """
    for part, tensor in (("outputs", outputs), ("inputs", inputs)):
        _checks.check_dtype(op, f"{part} of {name}", tensor, dtypes)
    _checks.check_rank(op, f"outputs of {name}", outputs, 2, "[C, m]")
    _checks.check_rank(op, f"inputs of {name}", inputs, 1, "[n]")
    c, d = size
    m, n = outputs.shape[1], inputs.shape[0]
    if outputs.shape[0] != c or m * n != d:
        raise ValueError(
            f"{op}: outputs and inputs of {name} must have shapes [C, m] and [n] with C = {c} outputs and "
            f"m·n = {d} parameters, got {list(outputs.shape)} and {list(inputs.shape)}"
        )
