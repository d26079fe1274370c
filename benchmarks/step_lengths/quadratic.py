# SPDX-License-Identifier: Apache-2.0
"""Rules whose step minimises the exact quadratic model of the loss along one or two directions.

``M(Δ) = −⟨g, Δ⟩ + ½ (ΔᵀFΔ + Σ_layers λ‖Δ_layer‖²)`` for the step ``W <- W − Δ``, with ``F`` measured along
the whole step (``grng.curvature.quadratic``) and not by the Kronecker factors, and a layer's ``λ`` what damps
its factors.
"""

from typing import Any

import torch
from torch import Tensor

from grng.curvature.layers import KroneckerLayer
from grng.optim.factors import preconditioned
from step_lengths.damping import ModelFloor, layer_damping, side_norms
from step_lengths.watched import Steps, Watched, flat, nested


class QuadraticDirection(Watched):
    """``Δ = lr·EMA(α D)``, ``α = ⟨g, D⟩ / (DᵀFD + Σ λ‖D‖²)``, ``D = P_Λ G P_Γ``, in the trust region.

    ``DᵀFD`` is measured at refreshes; between, its ratio to ``‖D‖²`` is taken to stay. ``lr=1`` is the
    minimum of the model.

    Source: Martens & Grosse 2015, section 6.4, without its forward pass.
    """

    def _grafted_step(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        states = [self.state[x.weight] for x in layers]
        directions, products = preconditioned(layers, states, [x.grads() for x in layers])
        alpha = self.length(group, layers, directions, products.sum())
        params = [p for x in layers for p in x.parameters]
        averages = []
        for p, d in zip(params, flat(directions), strict=True):
            average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(d))
            # Where the model fails there is no step, and nothing to average.
            new = torch.where(torch.isfinite(alpha), alpha * d, average)
            average.lerp_(new, 1 - group["betas"][0])
            averages.append(average)
        # A run starts at the first step: what the zero start of the average takes is given back.
        final = list(torch._foreach_div(averages, 1 - group["betas"][0] ** (group["step"] + 1)))
        self._move(group, layers, final)

    def length(
        self, group: dict[str, Any], layers: list[KroneckerLayer], directions: Steps, slope: Tensor
    ) -> Tensor:
        """``α``, 0-d; NaN where the direction is not finite."""
        squares = inner(directions, directions)
        shared = self.state[self._all_layers[0].weight]
        form = self._form(layers, directions)
        if form is not None:
            shared["direction_ratio"] = form / squares.sum()
        damped = (self.damping(group, layers) * squares).sum()
        return slope / (shared["direction_ratio"] * squares.sum() + damped)

    def damping(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> Tensor:
        """``λ`` of each layer."""
        norms = side_norms(layers, [self.state[x.weight] for x in layers])
        return layer_damping(norms, group["rho"], self.floor)


class QuadraticMomentum(QuadraticDirection):
    """``Δ = lr·(α D + μ Δ_previous)`` with the ``α, μ`` that minimise the model, in the trust region.

    They are found at refreshes from a system of two equations, and kept between, ``μ`` within 0 and
    ``betas[0]``: what is right for one step, which it may turn around, is not for the next ones.

    Source: Martens & Grosse 2015, section 7, and kfac-jax, which solve it at every step.
    """

    def _grafted_step(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        states = [self.state[x.weight] for x in layers]
        directions, _ = preconditioned(layers, states, [x.grads() for x in layers])
        params = [p for x in layers for p in x.parameters]
        previous = [
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(d))
            for p, d in zip(params, flat(directions), strict=True)
        ]
        shared = self.state[self._all_layers[0].weight]
        measured = self._has_statistics(layers)
        if measured:
            old = nested(previous, layers)
            shared["coefficients"] = self.coefficients(group, layers, directions, old)
        alpha, mu = shared["coefficients"].to(previous[0].dtype).unbind()
        if not measured:
            mu = mu.clamp(0.0, group["betas"][0])
        final = [alpha * d + mu * o for d, o in zip(flat(directions), previous, strict=True)]
        if all(bool(torch.isfinite(t).all()) for t in final):
            kept = self._move(group, layers, final)
            torch._foreach_copy_(previous, [kept.to(t) * t for t in final])

    def coefficients(
        self, group: dict[str, Any], layers: list[KroneckerLayer], directions: Steps, old: Steps
    ) -> Tensor:
        """``α, μ`` in fp64."""
        gradient = [[g for g in x.grads() if g is not None] for x in layers]
        # Unit vectors: the two can differ by orders of magnitude, and the cross term is a difference.
        lengths = [inner(v, v).sum().sqrt() for v in (directions, old)]
        u, v = (
            [[t / n.clamp(min=1e-30) for t in step] for step in vectors]
            for vectors, n in zip((directions, old), lengths, strict=True)
        )
        both = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(u, v, strict=True)]
        forms = [self._form(layers, step) for step in (u, v, both)]
        uu, vv, sum_of_both = (f.double() for f in forms if f is not None)
        uv = (sum_of_both - uu - vv) / 2
        damping = self.damping(group, layers).double()
        damp = [(damping * inner(x, y).double()).sum() for x, y in ((u, u), (u, v), (v, v))]
        matrix = torch.stack([uu + damp[0], uv + damp[1], uv + damp[1], vv + damp[2]]).view(2, 2)
        slopes = torch.stack([inner(gradient, x).sum().double() for x in (u, v)])
        # The pseudo-inverse: without a previous step, or with one along D, there is one unknown too many.
        found = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-9) @ slopes
        return found / torch.stack(lengths).double().clamp(min=1e-30)


class QuadraticMomentumAlways(QuadraticMomentum):
    """The same, measured at every step as in kfac-jax; factors and inverses as often as in the default."""

    def _statistics_wanted(self, layer: KroneckerLayer) -> bool:
        return self._is_trained(layer)


class DampedQuadraticDirection(ModelFloor, QuadraticDirection):
    """The same with a damping floor relative to the model."""


class DampedQuadraticMomentum(ModelFloor, QuadraticMomentum):
    """The same with a damping floor relative to the model."""


def inner(left: Steps, right: Steps) -> Tensor:
    """Inner product of each layer, ``[layers]``."""
    return torch.stack(
        [
            torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()
            for x, y in zip(left, right, strict=True)
        ]
    )
