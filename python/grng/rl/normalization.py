# SPDX-License-Identifier: Apache-2.0
"""Observations and rewards in units of what was seen so far; saved and loaded with the trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.wrappers.utils import RunningMeanStd

Array = np.ndarray[Any, Any]
_LIMIT, _EPSILON = 10.0, 1e-8


class ObservationScale:
    """Subtracts the running mean, divides by the running deviation, cuts off at 10."""

    def __init__(self, size: int, *, is_active: bool) -> None:
        """Args: size: numbers in an observation; is_active: False returns observations as they are."""
        self._is_active = is_active
        self._moments = RunningMeanStd(shape=(size,), dtype=np.float64)

    def learn(self, observations: Array) -> None:
        """Take observations ``[..., size]`` into the moments."""
        if self._is_active:
            self._moments.update(observations.reshape(-1, observations.shape[-1]))

    def __call__(self, observations: Array) -> Array:
        """Return the observations normalised, fp32."""
        if self._is_active:
            deviation = np.sqrt(self._moments.var + _EPSILON)
            observations = np.clip((observations - self._moments.mean) / deviation, -_LIMIT, _LIMIT)
        return observations.astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments as plain numbers."""
        return _saved(self._moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take moments from :meth:`state_dict`."""
        _load(self._moments, state)


class RewardScale:
    """Divides rewards by the running deviation of the discounted return; their sign and zero stay."""

    def __init__(self, environments: int, gamma: float, *, is_active: bool) -> None:
        """Args: environments: how many; gamma: discount; is_active: False leaves rewards as they are."""
        self._is_active, self._gamma = is_active, gamma
        self._moments = RunningMeanStd(shape=(), dtype=np.float64)
        self._returns = np.zeros(environments)

    def begin(self) -> None:
        """Forget the episodes under way, and not the moments."""
        self._returns = np.zeros_like(self._returns)

    def learn(self, rewards: Array, ended: Array) -> None:
        """Take one step's rewards ``[environments]`` into the moments of the discounted return."""
        if self._is_active:
            self._returns = self._gamma * self._returns + rewards
            self._moments.update(self._returns)
            self._returns[ended] = 0.0

    def __call__(self, rewards: Array) -> Array:
        """Return the rewards in units of the return's deviation."""
        return rewards / np.sqrt(self._moments.var + _EPSILON) if self._is_active else rewards

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and the running returns as plain numbers."""
        return {**_saved(self._moments), "returns": self._returns.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        _load(self._moments, state)
        self._returns = np.array(state["returns"])


def _saved(moments: Any) -> dict[str, Any]:
    return {
        "mean": moments.mean.tolist(),
        "variance": moments.var.tolist(),
        "count": float(moments.count),
    }


def _load(moments: Any, state: dict[str, Any]) -> None:
    moments.mean, moments.var = np.array(state["mean"]), np.array(state["variance"])
    moments.count = state["count"]
