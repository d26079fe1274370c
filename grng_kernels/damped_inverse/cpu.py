# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel of ``damped_inverse``, for CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grng_kernels.damped_inverse.entry import Entry


def unsupported(entry: Entry, method: str) -> str | None:
    """Return why the kernel cannot serve an entry, or None."""
    if entry.inverse.dtype == torch.float64:
        return "it computes in fp32"
    if method == "newton_schulz":
        return "it inverts by Cholesky, which is faster than Newton-Schulz on a CPU at every size"
    return None


def run(entries: Sequence[Entry], rho: float | None, method: str) -> None:
    """Fill in the results of entries that are supported."""
    lengths = [e.info.numel() for e in entries]
    results, info = call(
        [e.inverse for e in entries],
        [e.vector for e in entries],
        [e.factor for e in entries],
        [e.damping for e in entries if e.damping is not None],
        rho,
        [sum(lengths)],
    )
    columns = [*(row.split(lengths) for row in results), info.split(lengths)]
    for entry, *values in zip(entries, *columns, strict=True):
        for out, value in zip(entry[4:], values, strict=True):
            out.copy_(value)


def call(
    inverses: list[Tensor],
    vectors: list[Tensor],
    factors: list[Tensor],
    dampings: list[Tensor],
    rho: float | None,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Write ``inverses`` and ``vectors``; return damping, norm, residual ``[3, *shape]``, and ``info``.

    Factors are ``[N, N]`` or ``[L, N, N]``, and the rest as in :class:`Entry`; ``shape`` has as many
    elements as there are matrices. One tensor of ``inverses`` (or ``vectors``) may hold those of several
    factors, one after the other. Without ``vectors`` every norm estimate starts cold.
    """
    results = torch.empty((3, *shape), dtype=torch.float32, device="cpu")
    info = torch.empty(shape, dtype=torch.int32, device="cpu")
    torch.ops.grng._damped_inverse_.default(
        inverses, vectors, results, info, factors, dampings, 0.0 if rho is None else rho**0.5
    )
    return results, info
