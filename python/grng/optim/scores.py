# SPDX-License-Identifier: Apache-2.0
"""Scores of actions: which are drawn, and what else a step needs of the log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grng.curvature.jacobian import Jacobian
from grng.curvature.tangent import Tangent
from grng.optim.devices import stacked


@dataclass(frozen=True)
class ObservedActions:
    """What a step needs of the log-probabilities.

    Attributes:
        parameters: What they were differentiated by.
        scores: ``[m, numel]`` of each.
        norms: Of the scores of each, 0-d.
        squared_norm: Mean of ``‖u_j‖²``, 0-d.
        total: Sum of the log-probabilities, 0-d; NaN or infinity is in it.
        tangent: Their change along a direction; None for steps of fixed length.
    """

    parameters: list[nn.Parameter]
    scores: list[Tensor]
    norms: Sequence[Tensor]
    squared_norm: Tensor
    total: Tensor
    tangent: Tangent | None

    @property
    def count(self) -> int:
        """How many scores there are."""
        return len(self.scores[0])

    def scores_of(self, parameters: list[nn.Parameter], like: Sequence[Tensor]) -> list[Tensor]:
        """Return the scores of parameters; zeros, ``like`` these, of one that was not trained then."""
        known = dict(zip(self.parameters, self.scores, strict=True))
        return [
            known[p]
            if p in known
            else torch.zeros(self.count, p.numel(), dtype=t.dtype, device=t.device)
            for p, t in zip(parameters, like, strict=True)
        ]


def observed(
    log_probs: Tensor, engine: Jacobian, directions: Tensor, *, with_tangent: bool
) -> ObservedActions:
    """Differentiate log-probabilities ``[N]``, whose graph stays usable.

    Args:
        log_probs: Of the actions.
        engine: Differentiates them, with dense rows.
        directions: See :func:`directions_of`.
        with_tangent: Whether to keep how they change along a direction.

    Raises:
        RuntimeError: The graph is gone.
    """
    parameters = engine.parameters
    # First: where the graph is gone, this is what says so.
    tangent = Tangent(log_probs, parameters) if with_tangent else None
    rows = engine.rows(log_probs[:, None], directions)
    scores = [row for row in rows if isinstance(row, Tensor)]  # "dense" has no others
    norms = torch._foreach_norm(scores)
    squared = stacked(norms).double().square().sum() / len(scores[0])
    total = log_probs.detach().double().sum()
    return ObservedActions(parameters, scores, norms, squared, total, tangent)


def directions_of(log_probs: Tensor, *, score: str, scores: int, seed: int, step: int) -> Tensor:
    """Return of which sums of log-probabilities the scores are the gradients, ``[m, N, 1]``."""
    size = len(log_probs)
    if score == "mean":
        return torch.full_like(log_probs.detach(), 1 / size).view(1, size, 1)
    count = min(scores, size)
    chosen = torch.arange(size)
    if count < size:
        generator = torch.Generator()
        # Neighbouring seeds and steps draw differently.
        mixed = seed * 0x9E3779B97F4A7C15 + step
        generator.manual_seed(mixed % 2**63)
        chosen = torch.randperm(size, generator=generator)[:count]
    directions = torch.zeros(count, size, dtype=log_probs.dtype)
    directions[torch.arange(count), chosen] = 1
    return directions.to(log_probs.device).unsqueeze(-1)
