# SPDX-License-Identifier: Apache-2.0
"""Initial variances of a Kalman filter over weights, and how much an observation of one layer really tells.

**Prior.** ``"output"`` reads ``sigma0`` as the standard deviation of the outputs that the prior predicts
(of logits: relative to the likeliest class; of numbers: in units of their first error), the only unit in
which one number fits every architecture: the first Jacobian fixes the variances. ``"fan_in"`` and
``"global"`` read it as one of the weights.

**Coherence.** A diagonal covariance forgets that a layer's outputs move together. With the Fisher information
``F = E[g gᵀ]`` of a layer of ``d`` weights, ``d·tr(F²)/tr(F)²`` is ``d`` over the effective rank of F: 1
where every weight learns something of its own, ``d`` where all samples push in one direction. A diagonal that
many times larger bounds F, but kills what is specific to a sample; the diagonal of F does the opposite, and
fits every sample anew along the common direction. Their geometric mean, the coherence
``κ = √(d·tr(F²))/tr(F)``, is how often an observation is counted. ``tr(F²)`` comes from the scores of
consecutive samples, which are independent: ``E[(gᵗ·gˢ)²] = tr(F²)``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature.rows import Rows, remember, square_norm, with_remembered

PRIORS = ("output", "fan_in", "global")
# Weight of the newest sample in the averages, once there are this many.
_MEMORY = 200


def fan_in(parameter: nn.Parameter) -> int:
    """Number of inputs that one element's output sums over; 1 for vectors."""
    return max(1, parameter[0].numel()) if parameter.dim() > 1 and len(parameter) else 1


def initial_variances(
    parameters: list[nn.Parameter],
    squares: list[float],
    known: list[float | None],
    prior: str,
    sigma0: float,
    scale: float | None,
) -> tuple[list[float | None], float | None]:
    """Return the variance that each parameter without one starts with, None where it cannot be told yet.

    Args:
        parameters: All parameters of the filter.
        squares: Mean over the outputs of ``‖h‖²``, the squared norms of their Jacobian rows.
        known: The variance that a parameter started with; None for one that has none yet.
        prior: One of PRIORS.
        sigma0: Standard deviation, of outputs or of weights.
        scale: What ``"output"`` returned for the first observation; None then.

    With ``"output"`` the variance of a layer is proportional to ``√(d/‖h‖²)``, the inverse root mean square
    of its Jacobian: half way between equal variances of all weights and equal shares of all layers in the
    variance of the outputs, ``Σ p‖h‖² = sigma0²``. A layer without gradient at first gets its variance with
    its first gradient, which is small and will grow: LoRA's A, as long as B is about 0. For B of the size
    that its prior expects, ``‖h_A‖²/‖h_B‖² ≈ p_B/mean(A²)``. Then the rule gives ``p_A = √(p_B·mean(A²))``,
    which is therefore the most that it gets, with the mean of ``p`` over the weights that had a gradient.
    """
    result: list[float | None] = []
    if prior == "output" and scale is None:
        total = sum((s * p.numel()) ** 0.5 for s, p in zip(squares, parameters, strict=True))
        if total == 0:
            return [None] * len(parameters), None
        scale = sigma0**2 / total
    started = [(p.numel(), v) for p, v in zip(parameters, known, strict=True) if v is not None]
    usual = sum(n * v for n, v in started) / max(1, sum(n for n, _ in started))
    for p, square, before in zip(parameters, squares, known, strict=True):
        if before is not None:
            result.append(None)
        elif prior == "global":
            result.append(sigma0**2)
        elif prior == "fan_in":
            result.append(sigma0**2 / fan_in(p))
        elif square > 0:
            assert scale is not None
            value = scale * (p.numel() / square) ** 0.5
            if started:
                size = float(p.detach().square().mean()) if p.dim() > 1 else 0.0
                # Biases, and matrices that are zero themselves, say nothing of their own scale.
                value = min(value, (usual * size) ** 0.5 if size > 0 else usual)
            result.append(value)
        else:
            result.append(None)
    return result, scale


def update_coherence(state: dict[str, Any], whitened: Rows, score: Rows) -> None:
    """Account for one observation of a parameter.

    Args:
        state: The last score, and the averages; created here.
        whitened: ``Tᵀ H``, ``[k, d]``, whose squared norm is the trace of the information.
        score: ``g = Hᵀ v`` of an outcome drawn from the model, ``[d]``.
    """
    trace = square_norm(whitened)
    if "trace" not in state:
        state["trace"] = torch.zeros_like(trace)
        state["overlap"] = torch.zeros_like(trace)
        state["observations"] = 0
    n = state["observations"]
    # New tensors: a step that runs out of memory puts the old ones back.
    state["trace"] = state["trace"] + (trace - state["trace"]) / min(n + 1, _MEMORY)
    if n > 0:
        overlap = with_remembered(whitened, state).square().sum(dtype=torch.float64)
        state["overlap"] = state["overlap"] + (overlap - state["overlap"]) / min(n, _MEMORY)
    remember(state, score)
    state["observations"] = n + 1


def coherence(state: dict[str, Any], size: int) -> Tensor:
    """Return ``κ`` in ``[1, √d]`` (0-d, fp64): ``√d`` as long as there is no pair of observations."""
    largest = float(size) ** 0.5
    if state.get("observations", 0) < 2:
        return torch.full_like(state["trace"], largest)
    ratio = (size * state["overlap"]).sqrt() / state["trace"]
    return ratio.nan_to_num(nan=largest).clamp(1.0, largest)


def count_more_often(variances: list[Tensor], before: list[Tensor], factors: Tensor) -> None:
    """Let ``1/p`` grow ``κ`` times as much as the observation let it grow, in place.

    Args:
        variances: After the observation, one tensor per parameter.
        before: The same before it.
        factors: ``κ`` of each, 0-d or ``[parameters]``.
    """
    for p, old, factor in zip(variances, before, factors, strict=True):
        # p·p' / (p' + κ·(p − p')), which no zero variance makes 0/0.
        smallest = torch.finfo(p.dtype).tiny
        p.copy_(old * (p / (p + factor * (old - p)).clamp(min=smallest)))
