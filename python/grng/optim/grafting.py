# SPDX-License-Identifier: Apache-2.0
"""AdamW's moments, and a direction that is given the length of AdamW's step."""

from typing import Any

import torch
from torch import Tensor

from grng.optim.devices import stacked

State = dict[str, Any]


def adam_moments(
    states: list[State], grads: list[Tensor], betas: tuple[float, float], eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Update AdamW's moments; return the averaged gradients and the steps that AdamW would take, at lr 1.

    The state has AdamW's own form, ``step``, ``exp_avg``, ``exp_avg_sq``, so that a parameter may change
    between this and AdamW at any time.

    Args:
        states: Of each parameter; filled on its first step.
        grads: Of each parameter, in the dtype that its moments shall have.
        betas: Decays of the two moments.
        eps: Added to the root of the second.

    Returns:
        ``m̂`` and ``m̂ / (√v̂ + eps)``, bias corrected, for each parameter.
    """
    for state, grad in zip(states, grads, strict=True):
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
        elif state["exp_avg"].dtype != grad.dtype:  # AdamW trained it so far, in its own dtype
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(grad.dtype)
        state["step"] += 1
    first = [s["exp_avg"] for s in states]
    second = [s["exp_avg_sq"] for s in states]
    torch._foreach_lerp_(first, grads, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, grads, grads, 1 - betas[1])
    # On the host, where AdamW keeps it too: nothing waits for the device.
    counts = [float(s["step"]) for s in states]
    mean = torch._foreach_div(first, [1 - betas[0] ** n for n in counts])
    root = torch._foreach_sqrt(second)
    torch._foreach_div_(root, [(1 - betas[1] ** n) ** 0.5 for n in counts])
    torch._foreach_add_(root, eps)
    return list(mean), list(torch._foreach_div(mean, root))


def grafted(
    directions: list[list[Tensor]], steps: list[list[Tensor]]
) -> tuple[list[Tensor], Tensor]:
    """Give the direction of each layer the norm of its step; where it has none, return the step itself.

    Args:
        directions: For each layer, tensors shaped like its parameters.
        steps: The same, of the lengths wanted.

    Returns:
        The new steps, one for each parameter; and for each layer whether its direction served, bool
        ``[layers]``: it does not where it is not finite, or zero while the step is not.

    Source: Agarwal et al. 2020, "Disentangling Adaptive Gradient Methods from Learning Rates" (grafting).
    """
    sizes = [len(d) for d in directions]
    flat = [t for d in directions for t in d]
    wanted = [t for d in steps for t in d]
    # Brought near 1 first: an inverse of a factor that nearly vanished can send squares out of range.
    largest = _per_layer(torch._foreach_norm(flat, float("inf")), sizes).amax(1)
    targets = _per_layer(torch._foreach_norm(wanted), sizes).square().sum(1).sqrt()
    usable = torch.isfinite(largest) & (largest > 0)
    near = torch._foreach_div(flat, _per_parameter(torch.where(usable, largest, 1.0), directions))
    norms = _per_layer(torch._foreach_norm(near), sizes).square().sum(1).sqrt()
    factors = _per_parameter(targets / torch.where(usable, norms, 1.0), directions)
    serves = usable | (targets == 0)
    flags = _per_parameter(serves, directions)
    torch._foreach_mul_(near, factors)
    return [
        torch.where(flag, new, old) for flag, new, old in zip(flags, near, wanted, strict=True)
    ], serves


def _per_layer(values: tuple[Tensor, ...] | list[Tensor], sizes: list[int]) -> Tensor:
    """Stack numbers of parameters as ``[layers, most parameters]``, zeros where a layer has fewer."""
    table, done = [], 0
    wide = max(sizes)
    for n in sizes:
        row = [v.float() if v.dtype != torch.float64 else v for v in values[done : done + n]]
        table.append(torch.stack([*row, *[torch.zeros_like(row[0])] * (wide - n)]))
        done += n
    return stacked(table)


def _per_parameter(values: Tensor, like: list[list[Tensor]]) -> list[Tensor]:
    """Repeat the number of each layer for its tensors, where they are."""
    return [value.to(t.device) for value, ts in zip(values.unbind(), like, strict=True) for t in ts]
