# SPDX-License-Identifier: Apache-2.0
"""Environments of a few lines, so that what should come of them is known, and small agents for them."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from grng.rl import ActorCritic


class Counter(gymnasium.Env):
    """Counts its steps: the observation is (episode, step), the reward 1 + step / 10.

    Ends for good at ``length``, or is cut there where ``is_cut``. The observation is one array that is
    written again and again, as simulators do.
    """

    def __init__(self, length: int = 3, *, is_cut: bool = False, actions: Any = None) -> None:
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Discrete(2) if actions is None else actions
        self._length, self._is_cut, self._episode, self._step = length, is_cut, -1, 0
        self._seen = np.zeros(2, dtype=np.float32)
        self.taken: list[Any] = []

    def _observation(self) -> np.ndarray:
        self._seen[:] = self._episode, self._step
        return self._seen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._episode, self._step = self._episode + 1, 0
        return self._observation(), {}

    def step(self, action):
        self.taken.append(action)
        self._step += 1
        is_over = self._step == self._length
        reward = 1 + self._step / 10
        return (
            self._observation(),
            reward,
            is_over and not self._is_cut,
            is_over and self._is_cut,
            {},
        )


class Bandit(gymnasium.Env):
    """One step: of four contexts each has its own best action among ``actions``; it pays 1, others 0."""

    def __init__(self, start: int = 0, actions: int = 3) -> None:
        self.observation_space = Box(0, 1, (4,), np.float32)
        self.action_space = Discrete(actions, start=start)
        self._start, self._actions, self._context = start, actions, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._context = int(self.np_random.integers(4))
        return np.eye(4, dtype=np.float32)[self._context], {}

    def step(self, action):
        reward = float(action - self._start == (self._context * 2 + 1) % self._actions)
        return np.zeros(4, dtype=np.float32), reward, True, False, {}


class Corridor(gymnasium.Env):
    """Five states in a row, a start in one of the first three: −0.1 a step, 1 at the right end."""

    def __init__(self) -> None:
        self.observation_space = Box(0, 1, (5,), np.float32)
        self.action_space = Discrete(2)
        self._place = self._step = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place, self._step = int(self.np_random.integers(3)), 0
        return np.eye(5, dtype=np.float32)[self._place], {}

    def step(self, action):
        self._place, self._step = max(0, self._place + (1 if action == 1 else -1)), self._step + 1
        is_there = self._place == 4
        return (
            np.eye(5, dtype=np.float32)[self._place],
            1.0 if is_there else -0.1,
            is_there,
            self._step == 20 and not is_there,
            {},
        )


class Target(gymnasium.Env):
    """Continuous, of uneven bounds: the reward is −(action − goal)², each goal drawn anew."""

    LOW, HIGH = np.array([-1.0, 2.0], np.float32), np.array([3.0, 2.5], np.float32)

    def __init__(self) -> None:
        self.observation_space = Box(-10, 10, (1,), np.float32)
        self.action_space = Box(self.LOW, self.HIGH)
        self._goal, self._step = 0.0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._step = 0
        return self._draw(), {}

    def _draw(self) -> np.ndarray:
        self._goal = float(self.np_random.uniform(0, 2))
        return np.array([self._goal], np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = -((float(action[0]) - self._goal) ** 2)
        self._step += 1
        return self._draw(), reward, False, self._step == 5, {}


class Failing(Counter):
    """The ``at``-th step of all gives a reward or an observation that is not finite."""

    def __init__(self, at: int, what: str, bad: float = np.nan) -> None:
        super().__init__(4)
        self._at, self._what, self._bad = at, what, bad

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        if self._what == "reset" and len(self.taken) >= self._at:
            observation[0] = self._bad
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if len(self.taken) == self._at:
            if self._what == "reward":
                reward = self._bad
            elif self._what == "observation":
                observation[1] = self._bad
            elif self._what == "interrupt":
                raise KeyboardInterrupt
        return observation, reward, terminated, truncated, info


def agent(environment, **settings) -> ActorCritic:
    """A small one: 2 environments, rollouts of 8 steps, one hidden layer."""
    small: dict[str, Any] = dict(environments=2, rollout=8, hidden=(8,), critic_epochs=1)
    return ActorCritic(environment, **{**small, **settings})


def numbers(value: Any) -> Any:
    """Tensors and arrays of a nested state as bytes: equal where two states are bitwise the same."""
    if hasattr(value, "numpy"):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(item) for item in value]
    return value


def state(one: ActorCritic) -> Any:
    """Everything that one step of training changes."""
    return numbers({
        "policy": one.policy.state_dict(),
        "value": one.value.state_dict(),
        "optimizer": one.optimizer.state_dict(),
        "value_optimizer": one._value_optimizer.state_dict(),
        "generator": one._generator.get_state(),
        "collector": one._collector.state_dict(),
        "steps": one.steps,
    })  # fmt: skip
