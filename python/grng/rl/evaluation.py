# SPDX-License-Identifier: Apache-2.0
"""Playing whole episodes with a policy that no longer learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from grng.rl.environments import MakeEnvironment

Array = np.ndarray[Any, Any]
# Of the first episode; far from those of training.
EVALUATION_SEED = 1_000_000_000


def returns_of(
    act: Callable[[Array], Array], make: MakeEnvironment, episodes: int, seed: int
) -> list[float]:
    """Return the sums of rewards of whole episodes.

    Args:
        act: From observations ``[n, ...]`` to actions ``[n, ...]``.
        make: Makes one environment, whose episodes have to end.
        episodes: How many.
        seed: Of the first; each has the next.
    """
    # All at once: a policy is as quick with many observations as with one.
    envs = [make() for _ in range(episodes)]
    try:
        seen = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
        returns = [0.0] * episodes
        running = list(range(episodes))
        while running:
            actions = act(np.stack([seen[i] for i in running]))
            ended = set()
            for i, action in zip(running, actions, strict=True):
                seen[i], reward, terminated, truncated, _ = envs[i].step(action)
                returns[i] += float(reward)
                if terminated or truncated:
                    ended.add(i)
            running = [i for i in running if i not in ended]
    finally:
        for env in envs:
            env.close()
    return returns
