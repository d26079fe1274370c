# SPDX-License-Identifier: Apache-2.0
"""AdamW's moments, and steps that have the length of AdamW's along another direction."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grng_kernels as kernels
from grng.optim.devices import by_device, stacked

State = dict[str, Any]
# Norms in fp32 whose squares stay in its range, with room for a sum.
SAFE = (1e-15, 1e15)


class Graft(NamedTuple):
    """What gives each layer's direction the length of AdamW's step.

    Attributes:
        scales: Factor of the direction of each parameter, fp64 ``[parameters]``; NaN where its layer's
            direction does not serve, and AdamW's own step is taken.
        serves: Whether it serves, bool ``[layers]``: it does not where it is not finite, or zero while the
            step is not.
        lengths: Length of the step of each layer at lr 1, fp64 ``[layers]``.
    """

    scales: Tensor
    serves: Tensor
    lengths: Tensor


def new_moments(like: Tensor, dtype: torch.dtype | None = None) -> State:
    """Return the state of AdamW before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(like, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(like, dtype=dtype),
    }


def update_moments(
    params: Sequence[Tensor],
    states: Sequence[State],
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Average the gradients into AdamW's moments; return the length of each step at lr 1.

    The state has AdamW's own form, ``step``, ``exp_avg``, ``exp_avg_sq``, so that a parameter may change
    between this and AdamW at any time. The moments are fp32, or fp64 where the parameter is.

    Args:
        params: Parameters with a gradient.
        states: Of each; filled on its first step.
        betas: Decays of the two moments.
        eps: Added to the root of the second.

    Returns:
        fp64 ``[parameters]``, on the device of the first.
    """
    for p, state in zip(params, states, strict=True):
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        if "exp_avg" not in state:
            state.update(new_moments(p, dtype))
        elif state["exp_avg"].dtype != dtype:  # AdamW trained it so far, in its own dtype
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(dtype)
        state["step"] += 1
    found: dict[int, Tensor] = {}
    for call in by_device(list(enumerate(params)), lambda given: given[1]):
        here = [states[i] for i, _ in call]
        norms = kernels.adam_moments_(
            [s["exp_avg"] for s in here],
            [s["exp_avg_sq"] for s in here],
            [_grad(p) for _, p in call],
            step=_counts(here),
            betas=betas,
            eps=eps,
        )
        found |= {i: norm for (i, _), norm in zip(call, norms.unbind(), strict=True)}
    return stacked([found[i] for i in range(len(params))])


def graft(directions: list[list[Tensor]], lengths: Tensor) -> Graft:
    """Return what gives the direction of each layer the length of its step.

    Args:
        directions: For each layer tensors shaped like its parameters.
        lengths: Of the steps wanted, for each parameter.

    Source: Agarwal et al. 2020, "Disentangling Adaptive Gradient Methods from Learning Rates" (grafting).
    """
    sizes = [len(d) for d in directions]
    norms = _per_layer(_norms([t for d in directions for t in d]), sizes)
    wanted = _per_layer(list(lengths.unbind()), sizes)
    serves = torch.isfinite(norms) & ((norms > 0) | (wanted == 0))
    scales = torch.where(norms > 0, wanted / norms, 0.0)
    chosen = torch.where(serves, scales, torch.nan).unbind()
    each = [scale for scale, n in zip(chosen, sizes, strict=True) for _ in range(n)]
    return Graft(stacked(each), serves, wanted)


def take_steps(
    params: Sequence[Tensor],
    states: Sequence[State],
    directions: Sequence[Tensor],
    scales: Tensor,
    *,
    lr: float | Tensor,
    decay: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take the steps that :class:`Graft` describes, times ``lr``; parameters shrink to ``decay`` first."""
    items = list(zip(params, states, directions, scales.unbind(), strict=True))
    # Views that lie between each other's elements would be taken to overlap: each of them alone.
    alone = [item for item in items if not _is_dense(item[0])]
    rest = [item for item in items if _is_dense(item[0])] if alone else items
    for call in [*by_device(rest, lambda given: given[0]), *([item] for item in alone)]:
        here = [s for _, s, _, _ in call]
        device = call[0][0].device
        kernels.grafted_step_(
            [p for p, _, _, _ in call],
            [d for _, _, d, _ in call],
            [s["exp_avg"] for s in here],
            [s["exp_avg_sq"] for s in here],
            scale=scales.to(device)
            if len(call) == len(items)
            else stacked([x for *_, x in call]).to(device),
            # A schedule may have made it a number of numpy.
            lr=lr.to(device) if isinstance(lr, Tensor) else float(lr),
            decay=decay.to(device) if isinstance(decay, Tensor) else float(decay),
            step=_counts(here),
            betas=betas,
            eps=eps,
        )


def as_steps(
    directions: list[list[Tensor]],
    states: Sequence[State],
    found: Graft,
    betas: tuple[float, float],
    eps: float,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return the steps at lr 1 as tensors and a factor for each layer: step = factor · tensor.

    On a CPU the tensors are the directions, but for layers whose direction does not serve or whose scale is
    out of the usual. Elsewhere nobody may look at the scales without waiting, and all steps are formed.
    """
    scales, done, steps = list(found.scales.unbind()), 0, []
    factors: list[Tensor] = []
    for direction, serves in zip(directions, found.serves.unbind(), strict=True):
        here, scale = states[done : done + len(direction)], scales[done]
        done += len(direction)
        usual = scale.is_cpu and SAFE[0] < float(scale) < SAFE[1]
        if usual:
            steps.append(direction)
            factors.append(scale)
            continue
        own = adam_steps(here, betas, eps)
        half = scale.sqrt()
        steps.append(
            [
                torch.where(serves.to(d.device), d * half.to(d) * half.to(d), u)
                for d, u in zip(direction, own, strict=True)
            ]
        )
        factors.append(torch.ones_like(scale))
    return steps, factors


def adam_steps(states: Sequence[State], betas: tuple[float, float], eps: float) -> list[Tensor]:
    """Return AdamW's steps at lr 1, of the moments as they are."""
    steps = []
    for state in states:
        n = float(state["step"])
        root = (state["exp_avg_sq"] / (1 - betas[1] ** n)).sqrt_().add_(eps)
        steps.append(state["exp_avg"] / (1 - betas[0] ** n) / root)
    return steps


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(t))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "asked only for parameters that have a gradient"
    return parameter.grad


def _counts(states: Sequence[State]) -> list[float]:
    # On the host, where AdamW keeps them too: nothing waits for the device.
    return [float(s["step"]) for s in states]


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms in fp64: an inverse of a factor that nearly vanished sends squares out of the range of fp32."""
    if not tensors[0].is_cpu:
        return list(torch._foreach_norm(tensors, 2, torch.float64))
    # There a sum in fp64 of fp32 elements makes a copy of them first.
    norms = stacked([n.double() for n in torch._foreach_norm(tensors)])
    unusual = ~((norms > SAFE[0]) & (norms < SAFE[1]))
    if unusual.any():
        for i in unusual.nonzero().flatten().tolist():
            norms[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float64)
    return list(norms.unbind())


def _per_layer(values: list[Tensor], sizes: list[int]) -> Tensor:
    """Return the norm of the numbers of each layer's parameters, ``[layers]``."""
    wide, table, done = max(sizes), [], 0
    zero = torch.zeros_like(values[0])
    for n in sizes:
        table += values[done : done + n] + [zero] * (wide - n)
        done += n
    return torch.linalg.vector_norm(stacked(table).view(len(sizes), wide), dim=1)
