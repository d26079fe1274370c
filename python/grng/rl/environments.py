# SPDX-License-Identifier: Apache-2.0
"""The environments that are trained on: by name, vectorised, with an error that says what to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grng.rl.errors import EnvironmentUnavailable, RLError

if TYPE_CHECKING:
    import gymnasium

MakeEnvironment = Callable[[], "gymnasium.Env[Any, Any]"]


@dataclass(frozen=True)
class Task:
    """An environment with what is known about it."""

    id: str
    title: str
    # Of this distribution; what it needs besides torch.
    extra: str = "rl"
    # Mean return over 100 episodes from which on it counts as solved; None where nobody says so.
    solved: float | None = None
    # Whether observations are normalised, for every method; rewards always are.
    is_normalized: bool = False
    options: dict[str, Any] = field(default_factory=dict)


TASKS: dict[str, Task] = {
    "cartpole": Task("CartPole-v1", "CartPole-v1", solved=475.0),
    "cartpole-1000": Task(
        "CartPole-v1",
        "CartPole-v1, 1,000 steps",
        solved=950.0,
        options={"max_episode_steps": 1000},
    ),
    "acrobot": Task("Acrobot-v1", "Acrobot-v1", solved=-100.0),
    "pendulum": Task("Pendulum-v1", "Pendulum-v1", is_normalized=True),
    "lunarlander": Task("LunarLander-v3", "LunarLander-v3", "box2d", solved=200.0),
    "hopper": Task("Hopper-v5", "MuJoCo Hopper-v5", "mujoco", is_normalized=True),
    "halfcheetah": Task("HalfCheetah-v5", "MuJoCo HalfCheetah-v5", "mujoco", is_normalized=True),
    "walker2d": Task("Walker2d-v5", "MuJoCo Walker2d-v5", "mujoco", is_normalized=True),
    "swimmer": Task("Swimmer-v5", "MuJoCo Swimmer-v5", "mujoco", is_normalized=True),
}


def find_task(name: str) -> Task:
    """Return the task of a name in ``TASKS``, or of an id; another name is an id of Gymnasium's."""
    of_id = (task for task in TASKS.values() if task.id == name and not task.options)
    return TASKS.get(name) or next(of_id, Task(name, name))


def maker(name: str) -> MakeEnvironment:
    """Return a function that makes one environment, after one was made and closed again.

    Args:
        name: A key of ``TASKS``, or an id that Gymnasium knows.

    Raises:
        EnvironmentUnavailable: Gymnasium, or what this environment is built on, is not installed.
        RLError: There is no such environment.
    """
    task = find_task(name)
    if importlib.util.find_spec("gymnasium") is None:
        raise EnvironmentUnavailable(_missing(name, "gymnasium", task.extra))
    import gymnasium

    def make() -> gymnasium.Env[Any, Any]:
        return gymnasium.make(task.id, **task.options)

    try:
        make().close()
    except gymnasium.error.DependencyNotInstalled as error:
        text = first_line(error)
        # An id of Gymnasium is no task whose extra is known.
        extra = next((one for one in ("mujoco", "box2d") if one in text.lower()), task.extra)
        raise EnvironmentUnavailable(_missing(name, text, extra)) from error
    except (gymnasium.error.Error, ImportError) as error:
        known = ", ".join(TASKS)
        raise RLError(
            f"environment must be one of {known}, or an id that Gymnasium knows, got {name!r}: "
            f"{first_line(error)}"
        ) from error
    return make


def _missing(name: str, what: str, extra: str) -> str:
    return f'environment {name!r} needs more ({what}): pip install "grng-kernels[{extra}]"'


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]
