# SPDX-License-Identifier: Apache-2.0
"""Saving an environment in the middle of an episode: how it began and what was done since.

Simulators keep state that no interface gives out (contacts, warm starts of solvers), so that a copy of their
numbers is not the same episode. The same actions from the same start are, in every environment that is
deterministic given its seed.
"""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np

from grng.rl.errors import RLError


class Replayable(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Remembers the start of the episode and its actions."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        """Args: env: The environment."""
        super().__init__(env)
        self._start: dict[str, Any] = {}
        self._actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode, as :meth:`gymnasium.Env.reset`."""
        if seed is None:
            # A deep copy: a bit generator's state holds an array, which lives on.
            state = self.unwrapped.np_random.bit_generator.state
            self._start = {"random": _plain(state)}
        else:
            self._start = {"seed": int(seed)}
        self._actions = []
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """Act, as :meth:`gymnasium.Env.step`; the last observation of an episode is a copy."""
        self._actions.append(np.array(action).tolist())
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            # The next reset may write into the same array, before anybody has read this one.
            observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, info

    def snapshot(self) -> dict[str, Any]:
        """Return start and actions: numbers, strings, lists and dicts."""
        return {"start": self._start, "actions": list(self._actions)}

    def restore(self, snapshot: dict[str, Any]) -> Any:
        """Begin the saved episode and repeat its actions; return the observation after the last.

        Raises:
            RLError: The episode ends, which it had not: not the environment that was saved.
        """
        start = snapshot["start"]
        seed = start.get("seed")
        if seed is None:
            state = start["random"]
            bits = getattr(np.random, state["bit_generator"])()
            bits.state = state
            self.unwrapped.np_random = np.random.Generator(bits)
        observation, _ = self.reset(seed=seed)
        space = self.env.action_space
        actions = snapshot["actions"]
        for number, action in enumerate(actions):
            # A number where it was one, and no array of no dimension: it may be a key of a dict.
            again = np.array(action, dtype=space.dtype)[()]
            observation, _, terminated, truncated, _ = self.step(again)
            if terminated or truncated:
                raise RLError(
                    f"environment ended its episode at action {number + 1} of {len(actions)} that were "
                    "repeated from the checkpoint; it is not the one that was saved"
                )
        return observation


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state
