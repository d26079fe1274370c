# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule that all optimizers of a comparison share."""

from __future__ import annotations

import math
from collections.abc import Callable


def warmup_cosine(total_steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Factor on the learning rate: a linear rise, then half a cosine down to zero.

    Args:
        total_steps: Steps of the whole run.
        warmup_fraction: Part of the run that the rise takes, in ``[0, 1)``.

    Returns:
        Function from the number of steps already taken to the factor of the next step.
    """
    warmup_steps = math.floor(total_steps * warmup_fraction)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor
