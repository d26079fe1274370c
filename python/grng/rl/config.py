# SPDX-License-Identifier: Apache-2.0
"""The settings of an actor-critic, and which optimizers its policy can be trained by."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

import grng
from grng.rl.errors import RLError


@dataclass(frozen=True)
class PolicyOptimizer:
    """An optimizer of the policy with the settings it has here unless others are given."""

    factory: Callable[..., torch.optim.Optimizer]
    defaults: Mapping[str, Any]


POLICY_OPTIMIZERS: dict[str, PolicyOptimizer] = {
    # These networks are small: 64 scores cost about what acting does, and learn a little faster than one.
    # One step for each rollout: with a max_kl of 0.01 it is too short for MuJoCo's tasks, with 0.1 too long
    # for CartPole. With a damping of 0.1 a few hundred actions do not tell noise from direction.
    "rank1": PolicyOptimizer(grng.RankOneNPG, {"scores": 64, "max_kl": 0.03, "damping": 1.0}),
    "adamw": PolicyOptimizer(torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.0}),
    "rmsprop": PolicyOptimizer(torch.optim.RMSprop, {"lr": 7e-4, "alpha": 0.99, "eps": 1e-5}),
}


@dataclass(frozen=True)
class ActorCriticConfig:
    """Settings of :class:`grng.rl.ActorCritic`.

    Attributes:
        optimizer: Of the policy: ``"rank1"``, ``"adamw"`` or ``"rmsprop"``.
        optimizer_options: Keyword arguments of that optimizer besides its defaults.
        environments: Environments side by side.
        rollout: Steps in each of them between two updates of the policy.
        gamma: Discount, in [0, 1].
        gae_lambda: Of the advantages, in [0, 1].
        entropy: Weight of the policy's entropy in what is maximised.
        anneal_steps: Steps in all environments over which the learning rate of the policy falls linearly to
            zero; None: it stays. A policy that is as good as it gets is then left alone.
        critic_lr: AdamW's for the value.
        critic_epochs: Passes of the value over each rollout.
        critic_batch: Samples in a step of the value.
        hidden: Layer sizes of both networks.
        normalize_observations: Observations in units of what was seen so far.
        normalize_rewards: Rewards in units of the deviation of the discounted return.
        seed: Of weights, actions and environments.
    """

    optimizer: str = "rank1"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    environments: int = 8
    rollout: int = 32
    gamma: float = 0.99
    gae_lambda: float = 0.95
    entropy: float = 0.0
    anneal_steps: int | None = None
    critic_lr: float = 1e-3
    critic_epochs: int = 4
    critic_batch: int = 64
    hidden: tuple[int, ...] = (64, 64)
    normalize_observations: bool = False
    normalize_rewards: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            RLError: One is out of range; names it.
        """
        if not isinstance(self.optimizer, str) or self.optimizer not in POLICY_OPTIMIZERS:
            raise RLError(
                f"optimizer must be one of {', '.join(POLICY_OPTIMIZERS)}, got {self.optimizer!r}"
            )
        for name in ("environments", "rollout", "critic_epochs", "critic_batch"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), int), low=1)
        for name in ("gamma", "gae_lambda"):
            _check(name, getattr(self, name), True, low=0.0, high=1.0)
        for name in ("entropy", "critic_lr"):
            _check(name, getattr(self, name), True, low=0.0)
        if self.anneal_steps is not None:
            is_whole = isinstance(self.anneal_steps, int)
            _check("anneal_steps", self.anneal_steps, is_whole, low=1)
        # What torch's generators take.
        _check("seed", self.seed, isinstance(self.seed, int), low=0, high=2**63 - 1)
        for name in ("normalize_observations", "normalize_rewards"):
            if not isinstance(getattr(self, name), bool):
                raise RLError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.optimizer_options, dict):
            raise RLError(f"optimizer_options must be a dict, got {self.optimizer_options!r}")
        sizes = self.hidden if isinstance(self.hidden, (tuple, list)) else [None]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise RLError(f"hidden must be a tuple of whole numbers > 0, got {self.hidden!r}")
        # A list, as JSON and the command line have it, is as good.
        object.__setattr__(self, "hidden", tuple(self.hidden))
        object.__setattr__(self, "optimizer_options", copy.deepcopy(self.optimizer_options))

    def policy_optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a policy.

        Raises:
            RLError: It does not take its options.
        """
        known = POLICY_OPTIMIZERS[self.optimizer]
        options = {**known.defaults, **self.optimizer_options}
        if self.optimizer == "rank1":
            options.setdefault("seed", self.seed)
        try:
            return known.factory(policy.parameters(), **options)
        except (TypeError, ValueError) as error:
            raise RLError(f"optimizer {self.optimizer!r}: {error}") from error

    def plain(self) -> dict[str, Any]:
        """Return the settings as numbers, strings, lists and dicts."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return copy.deepcopy({**values, "hidden": list(self.hidden)})


def _check(name: str, value: Any, is_kind: bool, *, low: float, high: float = math.inf) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and is_kind and math.isfinite(value) and low <= value <= high):
        kind = "a number" if isinstance(low, float) else "a whole number"
        bound = f"in [{low}, {high}]" if math.isfinite(high) else f">= {low}"
        raise RLError(f"{name} must be {kind} {bound}, got {value!r}")
