# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz steps known in advance: damping bounds the condition number, and that fixes them all."""

from typing import NamedTuple


class Schedule(NamedTuple):
    """Scaled Newton-Schulz for a matrix with spectrum in ``[1/kappa, 1]``.

    Start from ``X = start·I``; each ``(a, b)`` of ``steps`` is ``X <- X (a·I + b·B X)``. Afterwards
    ``‖I − B X‖₂ <= residual`` in exact arithmetic.
    """

    start: float
    steps: tuple[tuple[float, float], ...]
    residual: float


def newton_schulz_schedule(kappa: float, tolerance: float = 1e-3) -> Schedule:
    """Return the shortest schedule of minimax order-2 steps that reaches ``tolerance``.

    With the spectrum of ``B X`` in ``[1-e, 1+e]`` the best step of this form is ``a = 4/(2-e²)``,
    ``b = -2/(2-e²)``, after which ``e <- e²/(2-e²) = 1/T₂(1/e)``, ``T₂`` the Chebyshev polynomial.

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
        scale = 2 / (2 - error * error)
        steps.append((2 * scale, -scale))
        error = error * error / (2 - error * error)
    return Schedule(start, tuple(steps), error)
