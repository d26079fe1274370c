# SPDX-License-Identifier: Apache-2.0
"""Generalised advantage estimation."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def generalized_advantages(
    rewards: Array,
    values: Array,
    next_values: Array,
    terminated: Array,
    ended: Array,
    *,
    gamma: float,
    gae_lambda: float,
) -> Array:
    """Return how much better each action was than the value of its state, ``[steps, environments]``.

    With ``δ_t = r_t + γ·V(s_{t+1})·(1 − terminated_t) − V(s_t)``::

        A_t = δ_t + γ·λ·(1 − ended_t)·A_{t+1}

    An episode that was cut by a time limit has ended but not terminated: what would have come after counts.

    Args:
        rewards: ``[steps, environments]``, like all others.
        values: Of the state before each step.
        next_values: Of the state after it, before any reset.
        terminated: Whether the episode ended there for good.
        ended: Whether it ended there at all.
        gamma: Discount, in [0, 1].
        gae_lambda: In [0, 1]: 0 trusts the values, 1 the returns.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation".
    """
    errors = rewards + gamma * next_values * ~terminated - values
    advantages = np.zeros_like(errors)
    following = np.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        following = errors[t] + gamma * gae_lambda * ~ended[t] * following
        advantages[t] = following
    return advantages
