# SPDX-License-Identifier: Apache-2.0
"""Training with Stable-Baselines3, as it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from grng.compare.errors import UsageError
from grng.rl.compare.methods import Method
from grng.rl.environments import MakeEnvironment, Task
from grng.rl.evaluation import EVALUATION_SEED, returns_of

ENVIRONMENTS = 8
_GAMMA = 0.99


class _Episodes(BaseCallback):
    """Tells of each episode that ends, and of the steps so far; anneals the divergence of TRPO's steps."""

    def __init__(
        self, tell: Callable[[int, list[float]], None], steps: int, divergence: float | None
    ) -> None:
        super().__init__()
        self._tell, self._steps, self._divergence = tell, steps, divergence

    def _on_rollout_end(self) -> None:
        if self._divergence is not None:
            # A divergence falls with the square of a step's length, which is to fall linearly.
            left = max(0.0, 1.0 - self.num_timesteps / self._steps)
            trpo: Any = self.model
            trpo.target_kl = max(self._divergence * left**2, 1e-12)

    def _on_step(self) -> bool:
        found = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        self._tell(self.num_timesteps, [float(value) for value in found])
        return True


def _vector(task: Task, make: MakeEnvironment, gamma: float) -> VecNormalize:
    """The environments, with what :class:`grng.rl.ActorCritic` normalises normalised."""

    def monitored() -> gymnasium.Env[Any, Any]:
        one = Monitor(make())
        # In units of the bounds, as ours: else a deviation of 1 explores less where they are wider.
        is_box = isinstance(one.action_space, gymnasium.spaces.Box)
        return (
            gymnasium.wrappers.RescaleAction(one, np.float32(-1), np.float32(1)) if is_box else one
        )

    env = DummyVecEnv([monitored] * ENVIRONMENTS)
    return VecNormalize(env, norm_obs=task.is_normalized, norm_reward=True, gamma=gamma)


def build(
    method: Method, task: Task, make: MakeEnvironment, *, seed: int, hidden: tuple[int, ...]
) -> tuple[Any, Any]:
    """Return the model, not yet trained, and its environments; see :func:`train`.

    Raises:
        UsageError: The class refuses an option.
    """
    settings = method.settings()
    env: Any = None
    try:
        gamma = float(settings.get("gamma", _GAMMA))
        env = _vector(task, make, gamma)
        with warnings.catch_warnings():
            # PPO tells of a batch that does not divide the rollout; the last one is smaller then.
            warnings.simplefilter("ignore", UserWarning)
            model = method.rival_class(
                "MlpPolicy",
                env,
                seed=seed,
                device="cpu",
                policy_kwargs={"net_arch": list(hidden)},
                **settings,
            )
            if not hasattr(model, "target_kl") or method.name == "ppo":
                # To zero over the run, as for the others. TRPO's is that of its critic alone.
                model.lr_schedule = LinearSchedule(float(model.learning_rate), 0.0, 1.0)
            env.seed(seed * ENVIRONMENTS)
    except (TypeError, ValueError, AssertionError) as error:
        if env is not None:
            env.close()
        raise UsageError(f"optimizer {method.label!r}: {error}") from error
    return model, env


def train(
    method: Method,
    task: Task,
    make: MakeEnvironment,
    *,
    steps: int,
    seed: int,
    hidden: tuple[int, ...],
    tell: Callable[[int, list[float]], None],
) -> Callable[[int], list[float]]:
    """Train; return a function of a number of episodes that evaluates with the likeliest actions.

    Args:
        method: A rival.
        task: What is trained on; decides whether observations are normalised.
        make: Makes one environment.
        steps: In all environments.
        seed: Of weights, actions and environments.
        hidden: Layer sizes of both networks.
        tell: Called after each step with the steps so far and the returns of the episodes that ended.

    Raises:
        UsageError: The class refuses an option.
    """
    model, env = build(method, task, make, seed=seed, hidden=hidden)
    try:
        divergence = model.target_kl if method.name == "trpo" else None
        model.learn(steps, callback=_Episodes(tell, steps, divergence))
    finally:
        env.close()

    one = make()
    bounds = one.action_space
    one.close()

    def act(observations: Any) -> Any:
        actions = model.predict(env.normalize_obs(observations), deterministic=True)[0]
        if not isinstance(bounds, gymnasium.spaces.Box):
            return actions
        return bounds.low + (np.clip(actions, -1, 1) + 1) / 2 * (bounds.high - bounds.low)

    return lambda episodes: returns_of(act, make, episodes, EVALUATION_SEED)
