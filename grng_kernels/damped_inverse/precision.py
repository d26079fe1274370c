# SPDX-License-Identifier: Apache-2.0
"""Which precision each product of the Newton-Schulz iteration needs: a plan that follows from rho alone."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from grng_kernels.damped_inverse.schedule import (
    condition_number,
    minimax_step,
    newton_schulz_schedule,
)

# Newton-Schulz diverges on eigenvalues above its interval, and the norm is an estimate.
MARGIN = 1.05
PRECISIONS = ("auto", "bf16", "tf32", "fp32")
# Unit roundoff of an operand; the sums are fp32 throughout. "x3": each operand in two parts, three products.
ROUNDOFF = {"bf16": 2**-8, "tf32": 2**-11, "bf16x3": 2**-17, "tf32x3": 2**-22, "fp32": 2**-24}
# Time of one product on tensor cores, in bf16 products.
COST = {"bf16": 1, "tf32": 2, "bf16x3": 3, "tf32x3": 6, "fp32": 16}
# A step beside its two products: launches, or a barrier of the grid.
STEP_COST = 1
# Below the rounding of an inverse in fp32.
TOLERANCE = 2.0**-23
# Noise of a product over ‖B‖·‖X‖·roundoff: the largest over the spectra of benchmarks/precision_table.py,
# where half of the eigenvalues lie at either end. It hardly depends on the order of the matrix.
NOISE = 0.7
# The same over (‖B‖·‖X‖)²·roundoff. The errors of a product of rounded symmetric matrices are symmetric up
# to X on both sides and the next step sees them; dropped parts and rounded sums are not.
ASYMMETRY = 0.15


class Step(NamedTuple):
    """``X <- X (a·I + b·B X)``, computed as ``E = I - B X``, ``X <- (a + b)·X - b·X E``, then symmetrised.

    Written with ``E`` the second product rounds a correction and not ``X``, so that its precision may stay
    low to the last step. In a last step of ``"tf32x3"`` the diagonals ``D`` of ``B``, ``F`` of ``X``, which
    hold the largest elements, stay out of the product: ``E = (I - D X - (B - D) F) - (B - D)(X - F)``,
    and the rounding of all that has a diagonal in it is collected. In low precision that would lose the
    symmetry that makes errors correct themselves.

    Attributes:
        a: Coefficient; 2 in a correction.
        b: Coefficient; -1 in a correction.
        residual_precision: Of the product in ``E``; the rest of ``E`` is fp32.
        precision: Of ``X E``; what it is added to is fp32.
    """

    a: float
    b: float
    residual_precision: str
    precision: str


class Plan(NamedTuple):
    """Start from ``X = start·I`` for ``B`` with spectrum in ``[1/kappa, 1]``, then take the ``steps``.

    Attributes:
        start: Multiple of the identity. The first step multiplies it only, and needs no product.
        steps: Minimax steps of low precision, then corrections.
        residual: Predicted bound of ``‖I - B X‖₂`` afterwards, rounding included, for orders up to 512.
    """

    start: float
    steps: tuple[Step, ...]
    residual: float


# From this error on a step is a correction.
CORRECT = 0.1
# What a step may be, cheapest first.
KINDS = (
    ("bf16", "bf16"),
    ("tf32", "tf32"),
    ("bf16x3", "tf32"),
    ("tf32x3", "tf32"),
    ("tf32x3", "tf32x3"),
)


def residual_noise(precision: str, size: float) -> float:
    """Return what rounding in ``B X`` adds to ``‖I - B X‖₂``; ``size`` bounds ``‖B‖·‖X‖``."""
    noise = NOISE * size * ROUNDOFF[precision]
    if precision.endswith("x3") or precision == "fp32":
        noise += size**2 * (ASYMMETRY * ROUNDOFF[precision] + ROUNDOFF["fp32"])
    return noise


def cost_of(kinds: Sequence[tuple[str, str]]) -> int:
    """Return the time of steps of these kinds on tensor cores, in bf16 products; the first has none."""
    return sum(STEP_COST + COST[residual] + COST[correction] for residual, correction in kinds[1:])


def predict(
    kappa: float, kinds: Sequence[tuple[str, str]]
) -> tuple[tuple[Step, ...], float, float]:
    """Return steps of the given ``kinds``, and bounds of the forward error and of the residual they leave.

    The forward error is relative, and without what rounding in the last residual adds: that is the floor
    which Cholesky has as well.

    Args:
        kappa: Bound of the condition number.
        kinds: ``residual_precision`` and ``precision`` of every step.
    """
    low = 2 / (kappa + 1)  # least eigenvalue of B X
    error, forward, floor = 1 - low, 1 - low, 0.0
    steps: list[Step] = []
    for residual, correction in kinds:
        # The minimax step is best for the largest error alone; a correction squares every error.
        a, b, after = (2.0, -1.0, error * error) if error < CORRECT else minimax_step(error)
        forward = after
        if steps:
            size = kappa * low
            floor = residual_noise(residual, size)
            forward += ROUNDOFF[correction] * error / 2
            after += NOISE * size * ROUNDOFF[correction] * error
            after += 0.0 if residual == "tf32x3" else floor
        steps.append(Step(a, b, residual, correction))
        error = min(after, 1.0)
        low *= a + b * low
    return tuple(steps), forward, error + floor


@functools.cache
def newton_schulz_plan(rho: float, precision: str = "auto") -> Plan:
    """Return the steps for ``B = (A + √rho·ν·I) / ((MARGIN + √rho)·ν)``, ``ν`` the estimate of ``‖A‖₂``.

    Of all sequences of ``KINDS`` in rising order that end in a correction and reach ``TOLERANCE``, the one of
    least cost on tensor cores. It depends on ``rho`` alone.

    Args:
        rho: Relative regulariser, > 0.
        precision: ``"auto"`` aims at the forward error of Cholesky in fp32; any other name takes every
            product in that precision and stops at its rounding.

    Raises:
        ValueError: An argument is out of range.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"newton_schulz_plan: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    kappa = condition_number(rho, MARGIN)
    start = 2 / (1 + 1 / kappa)
    if precision != "auto":
        floor = residual_noise(precision, kappa)
        schedule = newton_schulz_schedule(kappa, min(max(floor / 4, TOLERANCE), 0.5))
        steps = tuple(Step(a, b, precision, precision) for a, b in schedule.steps)
        return Plan(start, steps, schedule.residual + floor)
    # A kind whose noise alone is no inverse is never of use; the last kind is always there.
    usable = [k for k in KINDS if k[0] == "tf32x3" or residual_noise(k[0], kappa) < 1]
    fewest = max(1, len(newton_schulz_schedule(kappa, TOLERANCE).steps))
    found = (_cheapest(kappa, usable, count) for count in itertools.count(fewest))
    first = next(plan for plan in found if plan)
    # One step more may be cheaper: it lets an earlier one be coarse.
    return min(first, next(found) or first)[1]


def _cheapest(
    kappa: float, kinds: Sequence[tuple[str, str]], count: int
) -> tuple[int, Plan] | None:
    """Return the cheapest plan of ``count`` steps with its cost, or None where none reaches the tolerance."""
    best: tuple[int, Plan] | None = None
    for chosen in itertools.combinations_with_replacement(kinds, count):
        cost = cost_of(chosen)
        if chosen[-1][0] != "tf32x3" or (best and cost >= best[0]):
            continue
        steps, forward, residual = predict(kappa, chosen)
        if forward <= TOLERANCE:
            best = cost, Plan(2 / (1 + 1 / kappa), steps, residual)
    return best
