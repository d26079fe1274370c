# SPDX-License-Identifier: Apache-2.0
"""The actor-critic: act, estimate advantages, take one step of the policy, fit the value, again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

import grng
from grng.rl.advantages import generalized_advantages
from grng.rl.config import ActorCriticConfig
from grng.rl.environments import MakeEnvironment, find_task, maker
from grng.rl.errors import RLError
from grng.rl.evaluation import EVALUATION_SEED, returns_of
from grng.rl.networks import Policy, mlp, observation_size
from grng.rl.reports import Update, progress_bar
from grng.rl.rollout import Collector, Rollout
from grng.tasks.atomic import replacing

_FORMAT = "grng-actor-critic-1"


class ActorCritic:
    """Actor-critic with generalised advantages whose policy learns by natural gradient (SMAC).

    ::

        agent = ActorCritic("CartPole-v1", seed=0)
        agent.train(100_000)
        print(agent.evaluate(episodes=100))
        agent.save("cartpole.pt")                     # ActorCritic.load goes on exactly there

    Each update, from ``rollout`` steps of each environment::

        A    <- generalised advantages, to mean 0 and deviation 1
        θ    <- one step of the optimizer on −mean(A·log π_θ(a|s)) − entropy·H(π_θ)
        V    <- a few epochs of AdamW on (V(s) − returns)²

    With ``optimizer="rank1"`` the step is :class:`grng.RankOneNPG`'s, which observes ``log π_θ(a|s)``; with
    ``"adamw"`` or ``"rmsprop"`` this is A2C.

    Args:
        environment: A name of ``grng.rl.TASKS``, an id of Gymnasium, or a function that makes an environment.
        settings: See :class:`ActorCriticConfig`. For a named task observations are normalised where it is
            usual.

    Raises:
        EnvironmentUnavailable: A package is missing; says what to install.
        RLError: An unknown environment, spaces that are not supported, or a setting out of range.

    Source: Huo et al. 2026, arXiv 2601.18626; Mnih et al. 2016 (A2C); Schulman et al. 2016.
    """

    def __init__(self, environment: str | MakeEnvironment = "cartpole", **settings: Any) -> None:
        known = {f.name for f in fields(ActorCriticConfig)}
        for name in settings:
            if name not in known:
                raise RLError(
                    f"unknown setting {name!r}; valid settings: {', '.join(sorted(known))}"
                )
        if not isinstance(environment, str) and (
            not callable(environment) or isinstance(environment, gymnasium.Env)
        ):
            raise RLError(
                f"environment must be a name or a function that makes one, got {environment!r}"
            )
        self.name = environment if isinstance(environment, str) else "given"
        if isinstance(environment, str):
            settings.setdefault("normalize_observations", find_task(environment).is_normalized)
        self.config = ActorCriticConfig(**settings)
        make = maker(environment) if isinstance(environment, str) else environment
        c = self.config
        self._make = make
        self._collector = Collector(
            make,
            c.environments,
            seed=c.seed,
            gamma=c.gamma,
            normalize_observations=c.normalize_observations,
            normalize_rewards=c.normalize_rewards,
        )
        spaces = self._collector.observation_space, self._collector.action_space
        self._generator = torch.Generator().manual_seed(c.seed)
        self.policy = Policy(*spaces, c.hidden, self._generator)
        self.value = mlp(observation_size(spaces[0]), c.hidden, 1, 1.0, self._generator)
        self.optimizer = c.policy_optimizer(self.policy)
        self._value_optimizer = torch.optim.AdamW(
            self.value.parameters(), lr=c.critic_lr, weight_decay=0.0
        )
        # Before any annealing.
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # Steps taken in all environments.
        self.steps = 0

    # ---- learning ----

    def train(
        self,
        steps: int,
        *,
        report: Callable[[Update], None] | None = None,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 10_000,
    ) -> None:
        """Learn until that many steps more were taken in all environments, or up to a rollout more.

        Args:
            steps: > 0.
            report: Called after each update, for example a :class:`grng.rl.TensorBoardLog`.
            progress: Show a bar with the returns; needs rich.
            checkpoint: File to :meth:`save` to, every ``checkpoint_every`` steps and at the end: a run that
                is interrupted goes on from there.
            checkpoint_every: > 0.

        Raises:
            RLError: ``steps`` or ``checkpoint_every`` is no whole number > 0; the folder of ``checkpoint``
                is not there; or an environment or the policy gave NaN.
        """
        for name, value in (("steps", steps), ("checkpoint_every", checkpoint_every)):
            _check_count(name, value)
        if checkpoint is not None:
            _check_folder("checkpoint", checkpoint)
        goal, saved = self.steps + steps, self.steps
        with progress_bar(self.name, self.steps, goal, is_shown=progress) as show:
            while self.steps < goal:
                update = self.update()
                show(update)
                if report is not None:
                    report(update)
                if checkpoint is not None and self.steps - saved >= checkpoint_every:
                    self.save(checkpoint)
                    saved = self.steps
        if checkpoint is not None:
            self.save(checkpoint)

    def update(self) -> Update:
        """Act for one rollout and learn from it."""
        begin, c = time.perf_counter(), self.config
        rollout = self._collector.collect(self.policy, c.rollout, self._generator)
        observations = torch.from_numpy(rollout.observations)
        with torch.no_grad():
            values = self.value(observations).squeeze(-1).numpy()
            following = torch.from_numpy(rollout.next_observations)
            next_values = self.value(following).squeeze(-1).numpy()
        advantages = generalized_advantages(
            rollout.rewards,
            values,
            next_values,
            rollout.terminated,
            rollout.ended,
            gamma=c.gamma,
            gae_lambda=c.gae_lambda,
        )
        returns = advantages + values
        entropy = self._improve_policy(observations, rollout, advantages)
        loss = self._fit_value(
            observations.flatten(0, 1), torch.from_numpy(returns).float().flatten()
        )
        before = self.steps
        taken = advantages.size
        self.steps += taken
        spread = float(np.var(returns))
        return Update(
            steps=self.steps,
            taken=taken,
            episodes=[(before + (t + 1) * c.environments, r, n) for t, r, n in rollout.episodes],
            entropy=entropy,
            value_loss=loss,
            explained_variance=1.0 - float(np.var(returns - values)) / max(spread, 1e-12),
            seconds=time.perf_counter() - begin,
            optimizer=self._diagnostics(),
        )

    def _diagnostics(self) -> dict[str, float]:
        found = getattr(self.optimizer, "diagnostics", None)
        return {} if found is None else found()

    def _improve_policy(
        self, observations: Tensor, rollout: Rollout, advantages: np.ndarray[Any, Any]
    ) -> float:
        weights = torch.from_numpy((advantages - advantages.mean()) / (advantages.std() + 1e-8))
        if self.config.anneal_steps is not None:
            left = max(0.0, 1.0 - self.steps / self.config.anneal_steps)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * left
        # First: with the gradients of an update that was interrupted, what was observed for it goes too.
        self.optimizer.zero_grad()
        distribution = self.policy(observations.flatten(0, 1))
        log_probs = distribution.log_prob(rollout.actions.flatten(0, 1))
        entropy = distribution.entropy().mean()
        gain = (weights.float().flatten() * log_probs).mean() + self.config.entropy * entropy
        if isinstance(self.optimizer, grng.RankOneNPG):
            self.optimizer.observe(log_probs)
        (-gain).backward()
        self.optimizer.step()
        return float(entropy.detach())

    def _fit_value(self, observations: Tensor, returns: Tensor) -> float:
        c, losses = self.config, []
        for _ in range(c.critic_epochs):
            order = torch.randperm(len(returns), generator=self._generator)
            for batch in order.split(c.critic_batch):
                error = self.value(observations[batch]).squeeze(-1) - returns[batch]
                loss = error.square().mean()
                self._value_optimizer.zero_grad()
                loss.backward()
                self._value_optimizer.step()
                losses.append(float(loss.detach()))
        return float(np.mean(losses))

    # ---- using what was learned ----

    def act(self, observations: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the likeliest action for each of the observations ``[n, ...]``."""
        flat = np.asarray(observations, dtype=np.float64).reshape(len(observations), -1)
        scaled = self._collector.observation_scale(flat)
        return self.policy.to_environment(self.policy.best(torch.from_numpy(scaled)))

    def evaluate(self, episodes: int = 100, seed: int = EVALUATION_SEED) -> list[float]:
        """Return the returns of whole episodes with the likeliest actions, in new environments.

        Args:
            episodes: How many; each begins with a seed of its own.
            seed: Of the first; far from those of training.

        Raises:
            RLError: ``episodes`` is no whole number > 0; or the policy's outputs are not finite.
        """
        _check_count("episodes", episodes)
        return returns_of(self.act, self._make, episodes, seed)

    def close(self) -> None:
        """Close the environments."""
        self._collector.close()

    # ---- checkpoints ----

    def save(self, path: str | Path) -> None:
        """Write everything by which training goes on exactly; the file is whole or is not there.

        Raises:
            RLError: The folder of ``path`` is not there.
        """
        _check_folder("path", path)
        state = {
            "format": _FORMAT,
            "environment": self.name,
            "spaces": self._spaces(),
            "config": self.config.plain(),
            "steps": self.steps,
            "policy": self.policy.state_dict(),
            "value": self.value.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "value_optimizer": self._value_optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "collector": self._collector.state_dict(),
        }
        with replacing(Path(path)) as partial:
            torch.save(state, partial)

    @classmethod
    def load(
        cls, path: str | Path, environment: str | MakeEnvironment | None = None
    ) -> ActorCritic:
        """Return the agent that :meth:`save` wrote; it goes on as the saved one would have.

        Args:
            path: The file.
            environment: Only where it was made by a function: that function.

        Raises:
            RLError: Not such a file; or the environment has other spaces now, or comes to other
                observations.
        """
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            # Whatever the bytes of another file make of torch's reader.
            raise RLError(f"{path}: no checkpoint that can be read: {error}") from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise RLError(f"{path}: must be a checkpoint of format {_FORMAT}")
        if environment is None:
            if state["environment"] == "given":
                raise RLError(f"{path}: environment must be given: it was made by a function")
            environment = state["environment"]
        agent = cls(environment, **state["config"])
        if agent._spaces() != state["spaces"]:
            raise RLError(
                f"{path}: environment {agent.name!r} must have the spaces that were trained with, "
                f"{state['spaces']}, got {agent._spaces()}"
            )
        agent.policy.load_state_dict(state["policy"])
        agent.value.load_state_dict(state["value"])
        agent.optimizer.load_state_dict(state["optimizer"])
        agent._value_optimizer.load_state_dict(state["value_optimizer"])
        agent._generator.set_state(state["generator"])
        agent._collector.load_state_dict(state["collector"])
        agent.steps = state["steps"]
        return agent

    def _spaces(self) -> list[str]:
        return [str(self._collector.observation_space), str(self._collector.action_space)]


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RLError(f"{name} must be a whole number > 0, got {value!r}")


def _check_folder(name: str, path: str | Path) -> None:
    if not Path(path).parent.is_dir():
        raise RLError(f"{name} must be a file in a folder that exists, got {str(path)!r}")
