# SPDX-License-Identifier: Apache-2.0
"""Acting in a vector of environments, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from grng.rl.environments import MakeEnvironment
from grng.rl.errors import RLError
from grng.rl.networks import Policy, observation_size
from grng.rl.normalization import ObservationScale, RewardScale
from grng.rl.replay import Replayable

Array = np.ndarray[Any, Any]


@dataclass
class Rollout:
    """Some steps in each environment; arrays ``[steps, environments, ...]``."""

    observations: Array  # as the networks take them
    next_observations: Array  # after the step, before any reset
    actions: torch.Tensor
    rewards: Array  # in the units of the reward scale
    terminated: Array
    ended: Array  # terminated, or cut by a time limit
    # Of each episode that ended, in the order of their ends: step of the rollout, return, length.
    episodes: list[tuple[int, float, int]]


class Collector:
    """Environments that go on where they were, with the scales of what they gave."""

    def __init__(
        self,
        make: MakeEnvironment,
        environments: int,
        *,
        seed: int,
        gamma: float,
        normalize_observations: bool,
        normalize_rewards: bool,
    ) -> None:
        """Args: make: one environment; environments: how many; seed: no other seed has the same episodes.

        Raises:
            RLError: The space of observations is not supported, a first observation is not finite, or
                all environments are one.
        """
        self._each: list[Replayable] = [Replayable(make()) for _ in range(environments)]
        if len({id(env.unwrapped) for env in self._each}) < environments:
            raise RLError(
                "environment must be made anew by each call of its function, got the same"
            )
        self._environments = gymnasium.vector.SyncVectorEnv(
            [lambda env=env: env for env in self._each],  # type: ignore[misc]
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
        )
        self.observation_space = self._environments.single_observation_space
        self.action_space = self._environments.single_action_space
        size = observation_size(self.observation_space)
        self.observation_scale = ObservationScale(size, is_active=normalize_observations)
        self._reward_scale = RewardScale(environments, gamma, is_active=normalize_rewards)
        self._observations: Array
        self._begin(seed * environments)

    def _begin(self, seed: int | None = None) -> None:
        """Begin an episode in each environment."""
        self._observations = self._flat(self._environments.reset(seed=seed)[0])
        self._returns = np.zeros(len(self._each))
        self._lengths = np.zeros(len(self._each), dtype=int)
        self._reward_scale.begin()
        # Whether a rollout was begun and not ended: some environments may have acted, others not.
        self._is_torn = True
        _check_finite("observation", self._observations, "at the start")
        self._is_torn = False

    def _flat(self, observations: Array) -> Array:
        return observations.reshape(len(observations), -1).astype(np.float64)

    def collect(self, policy: Policy, steps: int, generator: torch.Generator) -> Rollout:
        """Act ``steps`` times in each environment with actions drawn from the policy.

        After a rollout that was not ended, by an error or Ctrl-C, new episodes begin.

        Raises:
            RLError: A reward, an observation or an output of the policy is NaN or infinite; says where.
        """
        self._mend()
        self._is_torn = True
        observations, following, actions, rewards, terminations, ends = [], [], [], [], [], []
        episodes: list[tuple[int, float, int]] = []
        for step in range(steps):
            seen = self._observations
            drawn = policy.draw(torch.from_numpy(self.observation_scale(seen)), generator)
            after, reward, terminated, truncated, info = self._environments.step(
                policy.to_environment(drawn)
            )
            ended = terminated | truncated
            after = self._flat(after)
            reached = after.copy()
            for i in np.flatnonzero(ended):
                reached[i] = np.asarray(info["final_obs"][i]).reshape(-1)
            place = f"at step {step} of the rollout; the policy is as it was before this rollout"
            _check_finite("reward", reward, place)
            _check_finite("observation", reached, place)
            _check_finite("observation", after, place)
            self._returns += reward
            self._lengths += 1
            for i in np.flatnonzero(ended):
                episodes.append((step, float(self._returns[i]), int(self._lengths[i])))
            self._returns[ended], self._lengths[ended] = 0.0, 0
            self._reward_scale.learn(reward, ended)
            observations.append(seen)
            following.append(reached)
            actions.append(drawn)
            rewards.append(reward)
            terminations.append(terminated)
            ends.append(ended)
            self._observations = after
        seen = np.stack(observations)
        # The scale of the actions' rollout is that of its gradient: it learns only now.
        rollout = Rollout(
            self.observation_scale(seen),
            self.observation_scale(np.stack(following)),
            torch.stack(actions),
            self._reward_scale(np.stack(rewards)),
            np.stack(terminations),
            np.stack(ends),
            episodes,
        )
        self.observation_scale.learn(seen)
        self._is_torn = False
        return rollout

    def _mend(self) -> None:
        if self._is_torn:
            self._begin()

    def close(self) -> None:
        """Close the environments."""
        self._environments.close()

    def state_dict(self) -> dict[str, Any]:
        """Return everything by which the environments go on exactly: numbers, strings, lists, dicts."""
        self._mend()
        return {
            "environments": [env.snapshot() for env in self._each],
            "observations": self._observations.tolist(),
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "observation_scale": self.observation_scale.state_dict(),
            "reward_scale": self._reward_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Repeat the episodes that were under way.

        Raises:
            RLError: The environments do not come to the observations that were saved.
        """
        saved = np.array(state["observations"])
        for i, (env, snapshot) in enumerate(zip(self._each, state["environments"], strict=True)):
            again = np.asarray(env.restore(snapshot), dtype=np.float64).reshape(-1)
            if not np.array_equal(again, saved[i]):
                raise RLError(
                    f"environment {i} came to another observation when its episode was repeated from the "
                    "checkpoint: it is not deterministic, or another version of it is installed"
                )
        self._observations = saved
        self._returns = np.array(state["returns"])
        self._lengths = np.array(state["lengths"])
        self.observation_scale.load_state_dict(state["observation_scale"])
        self._reward_scale.load_state_dict(state["reward_scale"])


def _check_finite(name: str, values: Array, place: str) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        i = int(np.flatnonzero(~finite)[0])
        raise RLError(f"{name} of environment {i} must be finite, got {values[i]} {place}")
