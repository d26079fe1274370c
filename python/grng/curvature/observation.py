# SPDX-License-Identifier: Apache-2.0
"""What a Kalman filter needs of the outputs: directions to differentiate, score and Fisher information.

The gradient of the log-likelihood by the parameters is ``Hᵀ v`` and its Fisher information ``Hᵀ T Tᵀ H``,
with the rows of ``H`` the derivatives of ``⟨direction, outputs⟩``. The fewer directions, the fewer backward
passes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LIKELIHOODS = ("categorical", "gaussian")
BATCHES = ("auto", "stacked", "sampled", "mean")


@dataclass
class Observation:
    """One observation of the outputs ``[N, C]`` through ``k`` directions."""

    directions: Tensor  # [k, N, C]: a row of H is the derivative of the sum of direction * outputs
    score: Tensor  # v [k]: score of the outputs, in the directions
    root: Tensor  # T [k, m]: T Tᵀ is the Fisher information, in the directions
    is_sketch: bool = False


def softmax_factor(probabilities: Tensor) -> Tensor:
    """Return lower-triangular ``T``, ``T Tᵀ = diag(q) − q qᵀ`` without the last class, ``[..., C−1, C−1]``.

    In closed form (Tanabe & Sagae 1992), so it never fails: with the remaining mass ``r_j = Σ_{k>j} q_k``,
    ``T_jj = √(q_j r_j / r_{j−1})`` and ``T_ij = −q_i √(q_j / (r_j r_{j−1}))``. The last class has to be
    a likely one, which keeps every ``r_j`` away from 0.
    """
    remaining = probabilities.flip(-1).cumsum(-1).flip(-1)  # r_{j-1} = q_j + r_j
    before, after = remaining[..., :-1], remaining[..., 1:]
    q = probabilities[..., :-1]
    columns = (q / (after * before)).sqrt()
    lower = torch.tril(-q.unsqueeze(-1) * columns.unsqueeze(-2), diagonal=-1)
    return lower + torch.diag_embed((q * after / before).sqrt())


def reference_last(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes in rising order ``[N, C]``, and the directions relative to the last ``[N, C−1, C]``.

    Adding a number to all logits changes no probability: with the likeliest class as the reference, only the
    other ``C−1`` logits relative to it are differentiated. Two classes take one backward pass.
    """
    n, c = probabilities.shape
    order = probabilities.argsort(dim=-1)
    basis = torch.zeros(n, c - 1, c, dtype=probabilities.dtype, device=probabilities.device)
    basis.scatter_(2, order[:, :-1, None], 1.0)
    basis.scatter_(2, order[:, -1:, None].expand(n, c - 1, 1), -1.0)
    return order, basis


def categorical(probabilities: Tensor, targets: Tensor) -> Observation:
    """Softmax outputs ``[N, C]`` and classes ``[N]``: ``N·(C−1)`` directions, which lose nothing."""
    order, basis = reference_last(probabilities)
    root = softmax_factor(probabilities.gather(1, order))
    score = _errors(probabilities, targets).gather(1, order)[:, :-1]
    blocks = root[0] if len(root) == 1 else torch.block_diag(*root)
    return Observation(spread(basis), score.flatten(), blocks)


def mean_categorical(probabilities: Tensor, targets: Tensor) -> Observation:
    """The mean logits of N samples as one observation with N times the information.

    Few rows, but which sample erred in which direction is lost: for samples that belong together only.
    """
    n = len(probabilities)
    mean = probabilities.mean(0, keepdim=True)
    order, basis = reference_last(mean)
    score = _errors(probabilities, targets).sum(0, keepdim=True).gather(1, order)[0, :-1]
    root = softmax_factor(mean.gather(1, order))[0] * n**0.5
    return Observation(basis[0].unsqueeze(1).expand(-1, n, -1) / n, score, root)


def categorical_scores(probabilities: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Draw classes from the model and return their scores ``[samples, N, C]``."""
    c = probabilities.shape[1]
    # multinomial refuses NaN. Any class will do: the scores are NaN too, and that is what is counted.
    finite = torch.isfinite(probabilities).all(-1, keepdim=True)
    safe = torch.where(finite, probabilities, 1 / c)
    drawn = torch.multinomial(safe, samples, replacement=True, generator=generator).mT
    return torch.nn.functional.one_hot(drawn, c).to(probabilities) - probabilities


def sketch(score: Tensor, draws: Tensor) -> Observation:
    """A sketch of the Fisher information of many outputs with few directions; the gradient stays exact.

    Args:
        score: Score of the outputs, ``[N, C]``.
        draws: Scores of outcomes drawn from the model, ``[m, N, C]``.

    The ``m`` drawn scores and the true one are the directions. ``E[Σ_s h_s h_sᵀ / m] = Hᵀ F H``, as scores of
    different samples are independent with mean 0.
    """
    m = len(draws)
    eye = torch.eye(m + 1, dtype=score.dtype, device=score.device)
    directions = torch.cat([draws, score.unsqueeze(0)])
    return Observation(directions, eye[-1], eye[:, :m] / m**0.5, is_sketch=True)


def spread(directions: Tensor) -> Tensor:
    """From ``[N, k, C]``, directions in each sample's own outputs, to ``[N·k, N, C]`` in all outputs."""
    n, k, c = directions.shape
    result = directions.new_zeros(n, k, n, c)
    index = torch.arange(n, device=directions.device)
    result[index, :, index] = directions
    return result.flatten(0, 1)


def _errors(probabilities: Tensor, targets: Tensor) -> Tensor:
    one_hot = torch.nn.functional.one_hot(targets, probabilities.shape[1])
    return one_hot.to(probabilities) - probabilities
