# SPDX-License-Identifier: Apache-2.0
"""The two networks of an actor-critic: a policy for discrete or continuous actions, and a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from grng.rl.errors import RLError

# Gains of the orthogonal start: a policy that begins near uniform, as is usual for these networks.
_HIDDEN_GAIN, _POLICY_GAIN, _VALUE_GAIN = math.sqrt(2.0), 0.01, 1.0


def mlp(
    inputs: int, hidden: Sequence[int], outputs: int, gain: float, generator: torch.Generator
) -> nn.Sequential:
    """Return a tanh network with orthogonal weights and zero biases."""
    layers: list[nn.Module] = []
    sizes = [inputs, *hidden, outputs]
    for i, (a, b) in enumerate(pairwise(sizes)):
        is_last = i + 2 == len(sizes)
        # Without torch's own start, which would draw from the global generator.
        linear = nn.utils.skip_init(nn.Linear, a, b)
        nn.init.orthogonal_(linear.weight, gain if is_last else _HIDDEN_GAIN, generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if is_last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """Distribution over actions: softmax for a discrete space, a diagonal normal for a bounded box.

    Continuous actions are in units of the bounds, −1 to 1, and cut off there for the environment only: the
    log-probability is that of the action drawn.
    """

    def __init__(
        self,
        observations: gymnasium.Space[Any],
        actions: gymnasium.Space[Any],
        hidden: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        """Args: observations, actions: of one environment; hidden: layer sizes; generator: draws weights.

        Raises:
            RLError: A space that is not supported.
        """
        super().__init__()
        inputs = observation_size(observations)
        self.space = actions
        self.is_discrete = isinstance(actions, gymnasium.spaces.Discrete)
        if isinstance(actions, gymnasium.spaces.Discrete):
            outputs = int(actions.n)
        elif isinstance(actions, gymnasium.spaces.Box) and len(actions.shape) == 1:
            if not np.issubdtype(actions.dtype, np.floating):
                raise RLError(f"action space must be Discrete or of floating-point, got {actions}")
            if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
                raise RLError(f"action space must have finite bounds, got {actions}")
            outputs = actions.shape[0]
        else:
            raise RLError(f"action space must be Discrete or a Box of one dimension, got {actions}")
        self.net = mlp(inputs, hidden, outputs, _POLICY_GAIN, generator)
        if not self.is_discrete:
            self.log_std = nn.Parameter(torch.zeros(outputs))

    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution for observations ``[..., inputs]``."""
        out = self.net(observations)
        if self.is_discrete:
            return Categorical(logits=out, validate_args=False)
        return Independent(Normal(out, self.log_std.exp(), validate_args=False), 1)

    @torch.no_grad()
    def draw(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Return an action for each observation, drawn with the generator.

        Raises:
            RLError: An output is NaN or infinite.
        """
        out = self._outputs(observations)
        if self.is_discrete:
            return torch.multinomial(out.softmax(-1), 1, generator=generator).squeeze(-1)
        noise = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        return out + self.log_std.exp() * noise

    @torch.no_grad()
    def best(self, observations: Tensor) -> Tensor:
        """Return the likeliest action for each observation.

        Raises:
            RLError: An output is NaN or infinite.
        """
        out = self._outputs(observations)
        return out.argmax(-1) if self.is_discrete else out

    def _outputs(self, observations: Tensor) -> Tensor:
        out: Tensor = self.net(observations)
        deviation = out if self.is_discrete else self.log_std.exp()
        if not (out.isfinite().all() and deviation.isfinite().all()):
            raise RLError(
                "policy: its outputs must be finite, got NaN or infinity; training diverged"
            )
        return out

    def to_environment(self, actions: Tensor) -> np.ndarray[Any, Any]:
        """Return the actions as the environment takes them."""
        values = actions.numpy()
        if isinstance(self.space, gymnasium.spaces.Discrete):
            return values + self.space.start
        assert isinstance(self.space, gymnasium.spaces.Box)
        part = (np.clip(values, -1.0, 1.0) + 1.0) / 2.0
        low, high = self.space.low, self.space.high
        # Rounding can pass a bound.
        return np.clip(low + part * (high - low), low, high).astype(self.space.dtype)


def observation_size(space: gymnasium.Space[Any]) -> int:
    """Return the number of inputs for a box of any shape, which is flattened.

    Raises:
        RLError: Not a box of numbers.
    """
    if not isinstance(space, gymnasium.spaces.Box):
        raise RLError(f"observation space must be a Box, got {space}")
    return int(np.prod(space.shape))
