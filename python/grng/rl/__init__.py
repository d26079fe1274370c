# SPDX-License-Identifier: Apache-2.0
"""Deep reinforcement learning on Gymnasium environments with the rank-1 natural policy gradient."""

from typing import TYPE_CHECKING

from grng.rl.config import ActorCriticConfig
from grng.rl.environments import TASKS
from grng.rl.errors import EnvironmentUnavailable, RLError
from grng.rl.reports import TensorBoardLog

if TYPE_CHECKING:
    from grng.rl.trainer import ActorCritic

__all__ = [
    "TASKS",
    "ActorCritic",
    "ActorCriticConfig",
    "EnvironmentUnavailable",
    "RLError",
    "TensorBoardLog",
]


def __getattr__(name: str) -> object:
    # Only this needs Gymnasium: the rest can say how to install it.
    if name == "ActorCritic":
        import importlib.util

        if importlib.util.find_spec("gymnasium") is None:
            raise EnvironmentUnavailable(
                'grng.rl.ActorCritic needs gymnasium: pip install "grng-kernels[rl]"'
            )
        from grng.rl.trainer import ActorCritic

        return ActorCritic
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
