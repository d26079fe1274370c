# SPDX-License-Identifier: Apache-2.0
"""Composite minimax schedules of orders 2, 3 and 5: fewer products than order 2 alone, in fp32 only.

The package takes order 2: a composite saves at most two products of ten, and its rounding is ten times that
of order 2 in bf16 and TF32 (precision_table.py). This file is what that comparison rests on. All functions
also take and return ``fractions.Fraction``, exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Products of one step of an order: B X, then the polynomial by Paterson and Stockmeyer, then X times it. The
# first step starts from a multiple of the identity, which saves the first and the last.
PRODUCTS = {2: 2, 3: 3, 5: 4}


class Composite(NamedTuple):
    """Orders of the steps, and the residual after them."""

    orders: tuple[int, ...]
    residual: Any


def chebyshev(degree: int) -> list[int]:
    """Return the coefficients of ``T_degree``, lowest first."""
    before, now = [1], [0, 1]
    if degree == 0:
        return before
    for _ in range(degree - 1):
        following = [0, *(2 * c for c in now)]
        for i, c in enumerate(before):
            following[i] -= c
        before, now = now, following
    return now


def evaluate(polynomial: Sequence[Any], x: Any) -> Any:
    """Return the value of a polynomial with coefficients lowest first."""
    value = 0 * x
    for c in reversed(polynomial):
        value = value * x + c
    return value


def minimax_factor(order: int, error: Any) -> tuple[list[Any], Any]:
    """Return ``(p, error afterwards)`` of the best step ``X <- X p(B X)`` for a spectrum in ``1 ± error``.

    ``p(r) = (1 - T_d((1-r)/e) / T_d(1/e)) / r``, coefficients lowest first; the error becomes ``1/T_d(1/e)``.
    """
    t = chebyshev(order)
    after = 1 / evaluate(t, 1 / error)
    shifted: list[Any] = [0] * (order + 1)  # T_d((1-r)/e) in powers of r
    for k, c in enumerate(t):
        for j in range(k + 1):
            shifted[j] += c * (-1) ** j * math.comb(k, j) / error**k
    return [-after * c for c in shifted[1:]], after


def products(orders: Sequence[int]) -> int:
    """Return the matrix products of a schedule from a multiple of the identity."""
    return sum(PRODUCTS[d] for d in orders) - 2


def first_error(kappa: Any) -> Any:
    """Return the residual of the best multiple of the identity."""
    return (kappa - 1) / (kappa + 1)


def residual_after(kappa: Any, orders: Sequence[int]) -> Any:
    """Return the residual of a schedule, ``1/T_D((kappa+1)/(kappa-1))`` with ``D`` the product of orders."""
    error = first_error(kappa)
    for order in orders:
        error = 1 / evaluate(chebyshev(order), 1 / error)
    return error


def candidates(budget: int) -> Iterator[tuple[int, ...]]:
    """Yield every multiset of orders that takes exactly ``budget`` products."""
    for steps in range(1, budget // 2 + 2):
        for orders in itertools.combinations_with_replacement(PRODUCTS, steps):
            if products(orders) == budget:
                yield orders


def best_within(kappa: Any, budget: int) -> Composite:
    """Return the least residual of at most ``budget`` products."""
    chosen = max((o for b in range(budget + 1) for o in candidates(b)), key=math.prod)
    return Composite(chosen, residual_after(kappa, chosen))


def best_for(kappa: Any, tolerance: Any) -> Composite:
    """Return the schedule of fewest products that reaches ``tolerance``; of several, that of least degree."""
    return next(
        Composite(orders, residual)
        for budget in itertools.count()
        for orders in sorted(candidates(budget), key=math.prod)
        if (residual := residual_after(kappa, orders)) <= tolerance
    )
