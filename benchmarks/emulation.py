# SPDX-License-Identifier: Apache-2.0
"""Tensor-core products on a CPU: operands rounded to the format, sums in fp32; and what inverts with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from composite import minimax_factor
from torch import Tensor

from grng_kernels.damped_inverse.precision import Plan
from grng_kernels.damped_inverse.reference import MARGIN
from grng_kernels.damped_inverse.schedule import Schedule


def to_tf32(x: Tensor) -> Tensor:
    """Round fp32 to 10 bits of mantissa, to nearest even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def to_tf32_truncated(x: Tensor) -> Tensor:
    """Drop all but 10 bits of mantissa, as tensor cores do to fp32 operands that nobody rounded."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda x: x.bfloat16().float(),
    "fp16": lambda x: x.half().float(),
    "tf32": to_tf32,
    "tf32 truncated": to_tf32_truncated,
    "fp32": lambda x: x,
}
# Format of the parts, number of parts, and the pairs of parts that are multiplied, smallest first.
SPLIT = {
    "bf16x3": ("bf16", 2, ((1, 0), (0, 1), (0, 0))),
    "tf32x3": ("tf32", 2, ((1, 0), (0, 1), (0, 0))),
    "bf16x6": ("bf16", 3, ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0))),
}


def _parts(x: Tensor, name: str, count: int) -> list[Tensor]:
    parts = []
    for _ in range(count):
        parts.append(ROUND[name](x))
        x = x - parts[-1]
    return parts


def product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Return ``a @ b`` of fp32 matrices as tensor cores would compute it in ``precision``; fp64 is exact."""
    if a.dtype == torch.float64:
        return a @ b
    if precision not in SPLIT:
        return ROUND[precision](a) @ ROUND[precision](b)
    name, count, pairs = SPLIT[precision]
    left, right = _parts(a, name, count), _parts(b, name, count)
    total = a.new_zeros(a.shape[0], b.shape[1])
    for i, j in pairs:
        total = total + left[i] @ right[j]
    return total


# Columns of the kernel's last residual whose products are added up on tensor cores.
LAST_COLUMNS = 16

# ---- what is inverted ----

# Eigenvalues of A, largest 1. "two ends" is the worst known: half of the directions amplify all noise.
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "log-uniform": lambda n: torch.logspace(0, -8, n, dtype=torch.float64),
    "two ends": lambda n: (torch.arange(n) % 2 == 0).double(),
    "few small": lambda n: (torch.arange(n) >= max(1, n // 16)).double(),
    "rank 1": lambda n: (torch.arange(n) == 0).double(),
    "power law": lambda n: torch.arange(1, n + 1).double() ** -2,
    "uniform": lambda n: torch.linspace(1, 0, n, dtype=torch.float64),
}


class Problem(NamedTuple):
    """``b = S + sigma·I`` in fp32 with ``‖b‖₂ <= 1``, and its inverse in fp64."""

    b: Tensor
    sigma: float
    inverse: Tensor
    inverse_norm: float


def problem(spectrum: str, n: int, rho: float, margin: float = MARGIN, seed: int = 0) -> Problem:
    """Return a damped matrix of the named spectrum with random eigenvectors, divided by ``margin + √rho``.

    With ``margin=1`` its norm is 1; the package divides by more, since its norm is an estimate.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    shift = math.sqrt(rho)
    a = (q * (SPECTRA[spectrum](n) + shift)) @ q.mT / (margin + shift)
    b = ((a + a.mT) / 2).float()
    values, vectors = torch.linalg.eigh(b.double())
    return Problem(
        b, shift / (margin + shift), (vectors / values) @ vectors.mT, float(1 / values[0])
    )


class Errors(NamedTuple):
    """``‖I - B X‖₂``, and ``‖X - B⁻¹‖/‖B⁻¹‖`` in the spectral and in the Frobenius norm."""

    residual: float
    spectral: float
    frobenius: float


def errors(of: Problem, x: Tensor) -> Errors:
    """Return the errors of ``x``, infinite where it is not finite."""
    if not bool(x.isfinite().all()):
        return Errors(math.inf, math.inf, math.inf)
    x = x.double()
    eye = torch.eye(len(x), dtype=torch.float64)
    difference, residual = x - of.inverse, eye - of.b.double() @ x
    return Errors(
        float(torch.linalg.eigvalsh(residual.mT @ residual)[-1].clamp(min=0).sqrt()),
        float(torch.linalg.eigvalsh(difference).abs().max()) / of.inverse_norm,
        float(difference.norm() / of.inverse.norm()),
    )


# ---- what inverts ----


def cholesky(of: Problem) -> Tensor:
    """Return torch's inverse in fp32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(of.b).L)
    return (inverse + inverse.mT) / 2


def last_residual(b: Tensor, x: Tensor, precision: str) -> Tensor:
    """Return ``I - B X`` of symmetric fp32 matrices as the kernel's last step computes it.

    Both diagonals are kept out of the product, and so is the rounding of what they contribute.
    """
    eye = torch.eye(len(b))
    x_diagonal, b_diagonal = (m.diagonal().double() for m in (x, b))
    outside = b - torch.diag(b.diagonal())
    own = b_diagonal[:, None] * x.double() + outside.double() * x_diagonal
    total = torch.zeros_like(b)
    for k in range(0, len(b), LAST_COLUMNS):
        here = slice(k, k + LAST_COLUMNS)
        total = total + product(outside[:, here], (x * (1 - eye))[here], precision)
    return ((eye - total.double()) - own).float()


def planned(
    of: Problem, plan: Plan, swap: dict[str, str] | None = None, *, kernel: bool = True
) -> list[Tensor]:
    """Return ``X`` after every step of a plan.

    Args:
        of: What is inverted.
        plan: The steps.
        swap: Other precisions in the place of the plan's.
        kernel: Whether as the kernel does: the shift inside of the products, and a last step of tf32x3 by
            ``last_residual``. Without it the shift is kept out of all products: ``E = (I - σ·X) - S X``.
    """
    swap, n = swap or {}, len(of.b)
    eye, sigma = torch.eye(n), 0.0 if kernel else of.sigma
    x, iterates = plan.start * eye, []
    for step in plan.steps:
        if not iterates:
            e = eye - plan.start * of.b
            change = plan.start * e
        else:
            last = step is plan.steps[-1] and step.residual_precision == "tf32x3"
            first, second = (swap.get(p, p) for p in (step.residual_precision, step.precision))
            if last and kernel:
                e = last_residual(of.b, x, first)
            else:
                e = (eye - sigma * x) - product(of.b - sigma * eye, x, first)
            change = product(x, e, second)
        x = (step.a + step.b) * x - step.b * change
        x = (x + x.mT) / 2
        iterates.append(x)
    return iterates


def scaled(
    b: Tensor, schedule: Schedule, precision: str, *, form: str = "uncoupled", corrections: int = 0
) -> list[Tensor]:
    """Return ``X`` after every plain step ``X <- X (a·I + b·R)``.

    Args:
        b: Matrix, fp32 or fp64.
        schedule: The steps.
        precision: Of both products.
        form: ``"uncoupled"``, ``R = B X``; ``"symmetrised"``, its symmetric part; or ``"coupled"``,
            ``R <- R (a·I + b·R)``, without ``B``.
        corrections: Steps ``X <- X + X (I - B X)`` in fp32 behind them.
    """
    eye = torch.eye(len(b), dtype=b.dtype)
    x, r, iterates = schedule.start * eye, schedule.start * b, []
    for p, q in schedule.steps:
        if iterates and form != "coupled":
            r = product(b, x, precision)
            r = (r + r.mT) / 2 if form == "symmetrised" else r
        factor = p * eye + q * r
        x = product(x, factor, precision) if iterates else schedule.start * factor
        r = product(r, factor, precision) if form == "coupled" else r
        x = (x + x.mT) / 2
        iterates.append(x)
    for _ in range(corrections):
        x = x + x @ (eye - b @ x)
        x = (x + x.mT) / 2
        iterates.append(x)
    return iterates


def fifth_order(b: Tensor, kappa: float, tolerance: float, precision: str) -> Tensor:
    """Return the inverse by minimax steps of order 5, ``R = B X`` from ``B`` in every step."""
    eye, error = torch.eye(len(b), dtype=b.dtype), (kappa - 1) / (kappa + 1)
    start = 2 / (1 + 1 / kappa)
    x, first = start * eye, True
    while error > tolerance:
        p, error = minimax_factor(5, error)
        r = start * b if first else product(b, x, precision)
        square = product(r, r, precision)
        factor = p[0] * eye + p[1] * r
        factor = factor + product(square, p[4] * square + p[3] * r + p[2] * eye, precision)
        x = start * factor if first else product(x, factor, precision)
        x, first = (x + x.mT) / 2, False
    return x


def worst(found: Sequence[Errors]) -> Errors:
    """Return the largest of each."""
    return Errors(*(max(column) for column in zip(*found, strict=True)))
