# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz steps known in advance: damping bounds the condition number, and that fixes them all."""

import math
from typing import NamedTuple


class Schedule(NamedTuple):
    """Scaled Newton-Schulz for a matrix with spectrum in ``[1/kappa, 1]``.

    Start from ``X = start·I``; each ``(a, b)`` of ``steps`` is ``X <- X (a·I + b·B X)``. Afterwards
    ``‖I − B X‖₂ <= residual`` in exact arithmetic.
    """

    start: float
    steps: tuple[tuple[float, float], ...]
    residual: float


def condition_number(rho: float, margin: float = 1.0) -> float:
    """Return the bound ``1 + margin/√rho`` of the condition number of ``(A + √rho·ν·I)``, ``A`` PSD.

    Args:
        rho: Relative regulariser, > 0.
        margin: How far the norm of ``A`` may exceed its estimate ``ν``, as a factor.

    Raises:
        ValueError: An argument is out of range.
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"condition_number: rho must be finite and > 0, got {rho}")
    if not 1 <= margin < math.inf:
        raise ValueError(f"condition_number: margin must be finite and >= 1, got {margin}")
    return 1 + margin / math.sqrt(rho)


def minimax_step(error: float) -> tuple[float, float, float]:
    """Return ``(a, b, error afterwards)`` of the best step ``X <- X (a·I + b·B X)``.

    Best for any spectrum of ``B X`` in ``[1-e, 1+e]``, ``e`` the error: ``a = 4/(2-e²)``, ``b = -2/(2-e²)``,
    after which ``e <- e²/(2-e²) = 1/T₂(1/e)``, ``T₂`` the Chebyshev polynomial.
    """
    square = error * error
    scale = 2 / (2 - square)
    return 2 * scale, -scale, square / (2 - square)


def newton_schulz_schedule(kappa: float, tolerance: float = 1e-3) -> Schedule:
    """Return the shortest schedule of minimax order-2 steps that reaches ``tolerance``.

    After ``K`` steps the residual is ``1/T_D((kappa+1)/(kappa-1))``, ``D = 2^K``: since ``T_a ∘ T_b = T_ab``,
    the best steps one by one are the best polynomial of their degree.

    Args:
        kappa: Bound of the condition number, >= 1. With damping ``√rho·‖A‖₂`` it is ``1 + 1/√rho``.
        tolerance: Wanted bound of the residual, in (0, 1).

    Raises:
        ValueError: An argument is out of range.
    """
    if not kappa >= 1:
        raise ValueError(f"newton_schulz_schedule: kappa must be >= 1, got {kappa}")
    if not 0 < tolerance < 1:
        raise ValueError(f"newton_schulz_schedule: tolerance must be in (0, 1), got {tolerance}")
    low = 1 / kappa
    start, error = 2 / (1 + low), (1 - low) / (1 + low)
    steps = []
    while error > tolerance:
        a, b, error = minimax_step(error)
        steps.append((a, b))
    return Schedule(start, tuple(steps), error)
