# SPDX-License-Identifier: Apache-2.0
"""Which precision each product of the Newton-Schulz iteration needs: a plan that follows from rho alone."""

import functools
import math
from typing import NamedTuple

from grng_kernels.damped_inverse.schedule import newton_schulz_schedule

# Newton-Schulz diverges on eigenvalues above its interval, and the norm is an estimate.
MARGIN = 1.05
# Unit roundoff of the operands of a product; the sums are fp32 throughout.
ROUNDOFF = {
    "bf16": 2.0**-8,
    "tf32": 2.0**-11,
    "bf16x3": 2.0**-17,
    "tf32x3": 2.0**-22,
    "fp32": 2.0**-24,
}
PRECISIONS = ("auto", "bf16", "tf32", "fp32")


class Step(NamedTuple):
    """``X <- X (a·I + b·B X)``, computed as ``E = I - B X``, ``X <- (a + b)·X - b·X E``, then symmetrised.

    Written with ``E``, the second product rounds a correction and not ``X`` itself, so that it may be of low
    precision even in the last step. ``a + b`` is 1 in a pure correction.

    Attributes:
        a: Coefficient.
        b: Coefficient.
        residual_precision: Of ``B X``; ``I - B X`` is formed in the fp32 accumulator.
        precision: Of ``X E``, added to ``(a + b)·X`` in fp32.
    """

    a: float
    b: float
    residual_precision: str
    precision: str


class Plan(NamedTuple):
    """Start from ``X = start·I`` for ``B`` with spectrum in ``[1/kappa, 1]``, then take the ``steps``.

    Attributes:
        start: Multiple of the identity.
        steps: Low-precision steps, then corrections.
        residual: Predicted size of ``‖I - B X‖₂`` afterwards, rounding included.
    """

    start: float
    steps: tuple[Step, ...]
    residual: float


@functools.cache
def newton_schulz_plan(rho: float, precision: str = "auto") -> Plan:
    """Return the steps for ``B = (A + √rho·ν·I) / ((MARGIN + √rho)·ν)``, ``ν`` the estimate of ``‖A‖₂``.

    Args:
        rho: Relative regulariser, > 0.
        precision: ``"auto"`` aims at the forward error of Cholesky in fp32; ``"bf16"`` and ``"tf32"`` take
            all products in that precision and no correction, ``"fp32"`` all of them in fp32.

    Raises:
        ValueError: An argument is out of range.
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"newton_schulz_plan: rho must be finite and > 0, got {rho}")
    if precision not in PRECISIONS:
        raise ValueError(
            f"newton_schulz_plan: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    kappa = 1 + MARGIN * rho**-0.5
    low = precision if precision != "auto" else "bf16" if kappa < 40 else "tf32"
    floor = min(0.5, kappa * ROUNDOFF[low] / 2)
    schedule = newton_schulz_schedule(kappa, max(floor, 1e-6))
    steps = tuple(Step(a, b, low, low) for a, b in schedule.steps)
    if precision == "auto":
        steps += 2 * (Step(2.0, -1.0, "tf32x3", low),)
        floor = 0.2 * kappa**2 * ROUNDOFF["fp32"]
    return Plan(schedule.start, steps, max(floor, schedule.residual**4))
