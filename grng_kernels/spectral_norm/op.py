# SPDX-License-Identifier: Apache-2.0
"""``spectral_norm``: the public function, its checks, and the grouping of equal sizes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grng_kernels import _checks
from grng_kernels.damped_inverse.reference import scale_down
from grng_kernels.damped_inverse.spectral_norm import norm_bounds
from grng_kernels.damped_inverse.spectral_norm import spectral_norm as estimate
from grng_kernels.info import Info

OP = "spectral_norm"


class SpectralNorm(NamedTuple):
    """The result of :func:`grng_kernels.spectral_norm`; for a list argument every field is a list.

    Attributes:
        norm: Estimate of ``‖matrix‖₂``: 1.02 times a Rayleigh quotient, between ``lower`` and ``upper``.
        lower: The largest diagonal entry, which no norm of a PSD matrix is below.
        upper: The least of the infinity, Frobenius and trace norms, which no norm of it is above.
        info: :class:`Info`, int32: ``NONFINITE_INPUT`` where the matrix has NaN or infinity.
    """

    norm: Tensor | list[Tensor]
    lower: Tensor | list[Tensor]
    upper: Tensor | list[Tensor]
    info: Tensor | list[Tensor]


def spectral_norm(
    matrix: Tensor | Sequence[Tensor], *, vector: Tensor | Sequence[Tensor] | None = None
) -> SpectralNorm:
    """Spectral norm of symmetric PSD matrices by warm-started power iteration, without a host sync.

    Torch equivalent: ``torch.linalg.matrix_norm(matrix, 2)``, which takes a decomposition.

    Args:
        matrix: Symmetric PSD, ``[N, N]``, ``[L, N, N]``, or a list of ``[N, N]`` of mixed sizes; fp32,
            bf16, fp16 (both computed in fp32) or fp64; any strides. Asymmetry is averaged away.
        vector: ``[N]``, ``[L, N]`` or a list of ``[N]``: state of the estimate, updated in place where
            ``info`` is 0. Start it with zeros: the estimate sharpens from call to call.

    Returns:
        :class:`SpectralNorm` ``(norm, lower, upper, info)``, ``[]`` or ``[L]`` each, fp32 (fp64 for fp64).
        Any finite scale is safe: entries are brought near 1 by a power of two, and the result is brought
        back by the same. A zero matrix has norm 0.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape or device.

    Accuracy: from a warm vector 2 %; cold up to 15 % low where many eigenvalues lie close to the largest.
    ``lower`` and ``upper`` hold up to rounding.
    Cost: 17 products of a matrix and a vector, ``34N²`` FLOPs.
    Source: Householder 1964 for the bounds; Dash et al. 2026 (GRNG) for the use.
    """
    matrices = _checks.as_list(OP, "matrix", matrix)
    single = isinstance(matrix, Tensor)
    for i, m in enumerate(matrices):
        name = "matrix" if single else f"matrix[{i}]"
        _checks.check_dtype(OP, name, m)
        if m.dim() not in ((2, 3) if single else (2,)) or m.shape[-1] != m.shape[-2]:
            form = "[N, N] or [L, N, N]" if single else "[N, N]"
            raise ValueError(f"{OP}: {name} must be square, {form}, got shape {list(m.shape)}")
        _checks.check_device(OP, {"matrix" if single else "matrix[0]": matrices[0], name: m})
    vectors = [] if vector is None else _checks.as_list(OP, "vector", vector)
    if vector is not None:
        _checks.check_same_form(OP, matrix=matrix, vector=vector)
        _checks.check_lengths(OP, matrix=matrices, vector=vectors)
    for i, (v, m) in enumerate(zip(vectors, matrices, strict=False)):
        name = "vector" if single else f"vector[{i}]"
        _checks.check_dtype(OP, name, v)
        _checks.check_shape(OP, name, v, m.shape[:-1], "as matrix")
        _checks.check_device(OP, {"matrix": m, name: v})
        _checks.check_no_self_overlap(OP, name, v)
    _checks.check_no_overlap(
        OP,
        [(f"vector[{i}]", v) for i, v in enumerate(vectors)],
        [(f"matrix[{i}]", m) for i, m in enumerate(matrices)],
    )
    with torch.no_grad():
        columns: list[list[Tensor]] = [[m.new_empty(0)] * 4 for m in matrices]
        for indices in _same_size(matrices):
            _run(indices, matrices, vectors, columns)
    if single:
        return SpectralNorm._make(t.view(matrices[0].shape[:-2]) for t in columns[0])
    fields = [[t.view(()) for t in column] for column in zip(*columns, strict=True)]
    return SpectralNorm._make(fields or [[], [], [], []])


def _run(
    indices: list[int], matrices: list[Tensor], vectors: list[Tensor], columns: list[list[Tensor]]
) -> None:
    n = matrices[indices[0]].shape[-1]
    dtype = _state_dtype(matrices[indices[0]])
    if n == 0:
        for i in indices:
            zero = torch.zeros(matrices[i].shape[:-2], dtype=dtype, device=matrices[i].device)
            columns[i] = [zero, zero.clone(), zero.clone(), zero.to(torch.int32)]
        return
    a = torch.cat([matrices[i].reshape(-1, n, n).to(dtype) for i in indices])
    lengths = [matrices[i].numel() // (n * n) for i in indices]
    amax = a.abs().amax(dim=(-2, -1))
    finite = torch.isfinite(amax)
    a = torch.where(finite[:, None, None], a, torch.zeros_like(a))
    exponent = torch.frexp(torch.where(finite & (amax > 0), amax, torch.ones_like(amax))).exponent
    a = scale_down(a, exponent)
    a = (a + a.mT) / 2
    start = torch.cat([vectors[i].reshape(-1, n).to(dtype) for i in indices]) if vectors else None
    norm, new = estimate(a, start)
    values = [torch.ldexp(v, exponent) for v in (norm, *norm_bounds(a))]
    info = torch.where(finite, int(Info.OK), int(Info.NONFINITE_INPUT)).to(torch.int32)
    parts = [v.split(lengths) for v in (*values, info)]
    for k, i in enumerate(indices):
        columns[i] = [part[k] for part in parts]
    if vectors:
        ok = finite.unsqueeze(-1).split(lengths)
        for i, fresh, good in zip(indices, new.split(lengths), ok, strict=True):
            old = vectors[i].detach()
            kept = old.reshape(-1, n)
            old.copy_(torch.where(good, fresh.to(old.dtype), kept).view(old.shape))


def _state_dtype(matrix: Tensor) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


def _same_size(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices grouped by order and dtype of the state."""
    groups: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, m in enumerate(matrices):
        groups.setdefault((m.shape[-1], _state_dtype(m)), []).append(i)
    return list(groups.values())
