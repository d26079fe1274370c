# SPDX-License-Identifier: Apache-2.0
"""Natural-gradient directions of all layers, scaled down together to a bound of the predicted KL change."""

import torch
from torch import Tensor

from grng.curvature.layers import KroneckerLayer
from grng.optim.factors import State, preconditioned


def clipped_directions(
    layers: list[KroneckerLayer],
    states: list[State],
    given: list[tuple[Tensor, Tensor | None]],
    lr: float | Tensor,
    bound: float | None,
) -> tuple[list[list[Tensor]], Tensor]:
    """Return ``ν·P_Λ G P_Γ`` with ``ν = min(1, √(bound / (lr² Σ_layers ⟨D, G⟩)))``; no ``bound``, no ``ν``.

    A layer whose factors vanished can have an inverse that overflows. The sum is then not finite, and says
    of no layer how far it may go: the directions of all layers are zero in that step, and all are counted.

    Args:
        layers: The layers.
        states: Their states.
        given: For each layer the gradient of its weight, and that of its bias or None.
        lr: The learning rate that the directions will be multiplied by.
        bound: The bound.

    Returns:
        For each layer tensors shaped like its parameters; and ``ν``, 0-d.

    Source: Pauloski et al. 2021, "KAISA"; Martens & Grosse 2015 for the quadratic form.
    """
    directions, products = preconditioned(layers, states, given)
    assert products is not None, "asked for"
    form = products.sum()
    factor = torch.where(torch.isfinite(form), kl_clip(form, lr, bound), 0.0)
    for i, (state, direction) in enumerate(zip(states, directions, strict=True)):
        here = factor.to(direction[0].device)
        in_range = here > 0
        state["direction_failures"] += ~in_range
        directions[i] = [torch.where(in_range, d * here.to(d.dtype), 0.0) for d in direction]
    return directions, factor


def kl_clip(form: Tensor, lr: float | Tensor, bound: float | None) -> Tensor:
    """Return ``min(1, √(bound / |lr² ⟨D, G⟩|))``, ``form`` being ``⟨D, G⟩``, on the device."""
    if bound is None:
        return torch.ones_like(form)
    smallest = torch.finfo(form.dtype).tiny
    return (bound / (lr * lr * form).abs().clamp(min=smallest)).sqrt().clamp(max=1.0)
