# SPDX-License-Identifier: Apache-2.0
"""Damping of a layer relative to the model's largest block."""

from typing import Any

import torch
from torch import Tensor

import grng_kernels as kernels
from grng.curvature.diagonal import SMALLEST_DAMPING
from grng.curvature.layers import KroneckerLayer
from grng.optim.factors import SIDES, State, dense_parts, keep_inverses
from step_lengths.watched import Watched


def side_norms(layers: list[KroneckerLayer], states: list[State]) -> Tensor:
    """``‖Λ‖₂`` and ``‖Γ‖₂`` of each layer, ``[layers, 2]``, by the vectors of the last inversion."""
    rows = []
    for layer, state in zip(layers, states, strict=True):
        row = []
        for i, side in enumerate(SIDES):
            factor = state[f"{side}_factor"]
            if layer.diagonal[i]:
                row.append(factor.max())
                continue
            vector = state[f"{side}_vector"].unsqueeze(-1)
            length = vector.norm(dim=(-2, -1)).clamp(min=SMALLEST_DAMPING)
            row.append(((factor @ vector).norm(dim=(-2, -1)) / length).max())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def layer_damping(norms: Tensor, rho: float, floor: float) -> Tensor:
    """``λ = ρ·max(‖F_layer‖, floor·max_layers ‖F_layer‖)``, ``[layers]``, with ``‖F_layer‖ = ‖Λ‖‖Γ‖``."""
    own = norms.prod(1)
    return rho * torch.maximum(own, floor * own.max())


def split_damping(norms: Tensor, damping: Tensor) -> Tensor:
    """Damping of both factors, ``[layers, 2]``: their product is ``λ``, their ratio that of the norms.

    At ``λ = ρ‖Λ‖‖Γ‖`` this is the spectral damping ``√ρ‖Λ‖``, ``√ρ‖Γ‖``. The ratio is kept within 1e±6: the
    output factor of LoRA's A vanishes at B = 0.
    """
    safe = norms.clamp(min=SMALLEST_DAMPING**0.5)
    skew = (safe[:, 0] / safe[:, 1]).clamp(1e-6, 1e6).sqrt()
    root = damping.sqrt()
    return torch.stack([root * skew, root / skew], 1).clamp(min=SMALLEST_DAMPING**0.5)


class ModelFloor(Watched):
    """The default, with ``λ = ρ·max(‖F_layer‖, floor·max_layers ‖F_layer‖)`` instead of ``ρ‖F_layer‖``.

    Relative damping alone lets a layer move by ``|G|/(ρ‖F_layer‖)``, however small its block. Source: the
    one ``λ`` for all layers of Martens & Grosse 2015, section 6.6, here as a floor under a damping of each.
    """

    floor = 0.1

    def _refresh(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        super()._refresh(group, layers)
        if self._refresh_due(group["step"], group["refresh_every"]):
            found = [x for x in layers if self._has_curvature(x)]
            invert(found, [self.state[x.weight] for x in found], group["rho"], self.floor)


def invert(layers: list[KroneckerLayer], states: list[State], rho: float, floor: float) -> None:
    """Replace the inverses by those with this damping."""
    norms = side_norms(layers, states)
    dampings = split_damping(norms, layer_damping(norms, rho, floor))
    of_state = {id(s): d for s, d in zip(states, dampings.unbind(), strict=True)}
    for layer, state in zip(layers, states, strict=True):
        for i, side in enumerate(SIDES):
            if layer.diagonal[i]:
                inverse = 1 / (state[f"{side}_factor"] + of_state[id(state)][i])
                state[f"{side}_inverse"].copy_(inverse)
    parts = dense_parts(layers, states)
    if parts:
        damping = [of_state[id(p.state)][SIDES.index(p.side)] for p in parts]
        keep_inverses(
            parts, kernels.damped_inverse([p.of("factor") for p in parts], damping=damping)
        )
