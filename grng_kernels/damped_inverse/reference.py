# SPDX-License-Identifier: Apache-2.0
"""The damped inverse in plain PyTorch: Cholesky, and Newton-Schulz as the readable second method."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grng_kernels._precision import matmul
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.probes import residual as measured_residual
from grng_kernels.damped_inverse.schedule import newton_schulz_schedule
from grng_kernels.damped_inverse.spectral_norm import spectral_norm
from grng_kernels.info import Info

# The damping of a zero matrix, whose relative damping would be zero: its inverse is I/FLOOR. Near the end
# of the range of fp32, so that it decides nothing for a matrix that is merely small.
FLOOR = 1e-36
# A result whose measured residual ‖I − M X‖_F/√N is larger is reported as NOT_CONVERGED.
RESIDUAL_LIMIT = 1e-2
# A factor stored with unit roundoff eps is taken for symmetric up to √eps of its largest entry: far above
# what the order of any sum leaves, and far below what would make the mean of the triangles a wrong answer.
ASYMMETRY_LIMITS = {
    torch.bfloat16: torch.finfo(torch.bfloat16).eps ** 0.5,
    torch.float16: torch.finfo(torch.float16).eps ** 0.5,
    torch.float32: torch.finfo(torch.float32).eps ** 0.5,
    # As fp32: it may be the sum of products that were taken there.
    torch.float64: torch.finfo(torch.float32).eps ** 0.5,
}
# Newton-Schulz diverges on eigenvalues above its interval, and the norm is an estimate.
MARGIN = 1.05
# A given damping is at most 2^this times the largest entry after scaling: more would leave fp32.
DAMPING_BITS = 60


class DampedInverse(NamedTuple):
    """The result of :func:`grng_kernels.damped_inverse`; for a list argument every field is a list.

    Attributes:
        inverse: ``(factor + damping·I)⁻¹``, shape of ``factor``, fp32 (fp64 for fp64).
        damping: What was added to the diagonal, ``[]`` or ``[L]``.
        spectral_norm: Estimate of ``‖factor‖₂``, at most 2 % high. Low by up to 15 % where many eigenvalues
            lie close to the largest, or for a call or two after the leading eigenvector was replaced;
            ``[]`` or ``[L]``.
        residual: Measured ``‖I − M X‖_F/√N``, ``M`` the damped matrix; ``[]`` or ``[L]``. Exact up to order
            16 (on the CPU 32); beyond, an estimate through 16 fixed vectors of signs, unbiased in its
            square.
        info: :class:`Info`, int32, ``[]`` or ``[L]``.
    """

    inverse: Tensor | list[Tensor]
    damping: Tensor | list[Tensor]
    spectral_norm: Tensor | list[Tensor]
    residual: Tensor | list[Tensor]
    info: Tensor | list[Tensor]


def scale_down(a: Tensor, exponent: Tensor) -> Tensor:
    """Return ``a · 2^-exponent``, exact inside the range of the dtype; ``exponent`` is ``[L]``."""
    # In two halves: 2^-exponent alone can leave the range of fp32 where the product does not.
    half = torch.div(exponent, 2, rounding_mode="trunc")
    one = torch.ones_like(half, dtype=a.dtype)
    shape = (-1,) + (1,) * (a.dim() - 1)
    first, second = torch.ldexp(one, -half), torch.ldexp(one, half - exponent)
    return a * first.view(shape) * second.view(shape)


def _newton_schulz(damped: Tensor, norm: Tensor, kappa: float) -> Tensor:
    # R = B X is recomputed from B in every step and never symmetrised: that keeps it self-correcting.
    schedule = newton_schulz_schedule(kappa, tolerance=1e-5)
    b = damped / norm[:, None, None]
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    x = schedule.start * eye.expand_as(b)
    for p, q in schedule.steps:
        x = matmul(x, p * eye + q * matmul(b, x))
        x = (x + x.mT) / 2
    return x / norm[:, None, None]


def damped_inverse(
    factor: Tensor,
    *,
    rho: float | None,
    damping: Tensor | None,
    method: str,
    vector: Tensor | None = None,
    stored: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(inverse, damping, spectral_norm, residual, info, vector)`` for ``factor [L, N, N]``.

    ``M = (factor + factorᵀ)/2 + damping·I`` with ``damping = max(√rho·‖factor‖₂, FLOOR)``, or as given,
    ``[L]``. Computed in the dtype of ``factor`` (fp32 or fp64). Every matrix is first scaled by a power of
    two to a largest entry near 1, so the result for ``2^k·A`` under relative damping is exactly ``2^-k``
    times that for ``A``, and no square leaves the range of the dtype. ``stored`` is the dtype that the matrix
    came in, which says how much asymmetry is rounding.
    """
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    amax = factor.abs().amax(dim=(-2, -1))
    finite = torch.isfinite(amax)
    # LAPACK may hang or crash on NaN: such a matrix is replaced before the factorisation.
    factor = torch.where(finite[:, None, None], factor, eye)
    exponent = torch.frexp(torch.where(finite & (amax > 0), amax, torch.ones_like(amax))).exponent
    if damping is not None:
        damping = damping.to(factor.dtype)
        legal = torch.isfinite(damping) & (damping > 0)
        own = torch.frexp(torch.where(legal, damping, torch.ones_like(damping))).exponent
        exponent = torch.maximum(exponent, own - DAMPING_BITS)
    a = scale_down(factor, exponent)
    share = ASYMMETRY_LIMITS[stored] * a.abs().amax(dim=(-2, -1))
    floor = scale_down(torch.full_like(share, FLOOR), exponent)
    # What is below the floor decides nothing; there the rounding is that of subnormal numbers.
    symmetric = (a - a.mT).abs().amax(dim=(-2, -1)) <= torch.maximum(share, floor)
    a = (a + a.mT) / 2

    norm, vector = spectral_norm(a, vector)
    if damping is None:
        assert rho is not None, "the public function passes rho or damping"
        # A zero matrix has exponent 1, so the floor is exact there; where 2^-exponent overflows, the
        # matrix is far below the floor and infinity says so.
        shift = torch.maximum(rho**0.5 * norm, floor)
    else:
        damping = damping.to(a.dtype)
        finite = finite & torch.isfinite(damping) & (damping > 0)
        shift = scale_down(torch.where(finite, damping, torch.ones_like(damping)), exponent)
    damped = a + shift[:, None, None] * eye

    if method == "newton_schulz":
        assert rho is not None, "the public function asks for rho with newton_schulz"
        inverse = _newton_schulz(damped, MARGIN * norm + shift, 1 + MARGIN * rho**-0.5)
        failed = torch.zeros_like(finite)
    else:
        lower, status = torch.linalg.cholesky_ex(damped)
        failed = status != 0
        inverse = torch.cholesky_inverse(torch.where(failed[:, None, None], eye, lower))
        inverse = (inverse + inverse.mT) / 2
    residual = measured_residual(damped, inverse)
    residual = torch.where(finite, residual, torch.full_like(residual, torch.nan))
    inverse = scale_down(inverse, exponent)

    bad = failed | ~(residual <= RESIDUAL_LIMIT)
    info = torch.where(bad, int(Info.NOT_CONVERGED), int(Info.OK))
    in_range = torch.isfinite(inverse).all(dim=-1).all(dim=-1)
    info = torch.where(~bad & ~in_range, int(Info.OVERFLOW), info)
    info = torch.where(symmetric, info, int(Info.ASYMMETRIC))
    info = torch.where(finite, info, int(Info.NONFINITE_INPUT)).to(torch.int32)
    return (
        inverse,
        torch.ldexp(shift, exponent),
        torch.ldexp(norm, exponent),
        residual,
        info,
        vector,
    )


def run(entries: Sequence[Entry], rho: float | None, method: str) -> None:
    """Fill in the results of entries of any orders and dtypes."""
    groups: dict[tuple[int, torch.dtype], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.factor.shape[-1], entry.factor.dtype), []).append(entry)
    for (_, stored), group in groups.items():
        dtype = group[0].inverse.dtype
        counts = [e.factor.shape[0] for e in group]
        given = [e.damping for e in group if e.damping is not None]
        *fields, vector = damped_inverse(
            torch.cat([e.factor.to(dtype) for e in group]),
            rho=rho,
            damping=torch.cat(given) if given else None,
            method=method,
            vector=torch.cat([e.vector for e in group]),
            stored=stored,
        )
        good = fields[4] == int(Info.OK)
        columns = [f.split(counts) for f in (*fields, vector, good)]
        for e, x, damping, norm, rest, info, v, ok in zip(group, *columns, strict=True):
            e.inverse.copy_(x)
            e.used_damping.copy_(damping)
            e.spectral_norm.copy_(norm)
            e.residual.copy_(rest)
            e.info.copy_(info)
            e.vector.copy_(torch.where(ok.unsqueeze(-1), v, e.vector))
