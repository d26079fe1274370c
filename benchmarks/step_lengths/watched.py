# SPDX-License-Identifier: Apache-2.0
"""RING that notes what explains a failure, where it has statistics at hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grng import RING
from grng.curvature.layers import KroneckerLayer
from grng.curvature.quadratic import fisher_along
from grng.optim.factors import preconditioned

Steps = list[list[Tensor]]


class Watched(RING):
    """RING, unchanged; ``noted`` grows with the run.

    ``kept``: the part of each step that the trust region leaves. ``kl``: the divergence that the Fisher
    information predicts for each step that was taken. ``form_ratio``: at each refresh ``ΔᵀFΔ`` over what the
    Kronecker factors say it is, ``Σ_layers ⟨Δ, Λ Δ Γ⟩``.
    """

    # Of the largest norm in the model: the least norm that a layer's damping is relative to.
    floor = 0.0

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.noted: dict[str, list[float]] = {"kept": [], "kl": [], "form_ratio": []}

    def _trust(
        self,
        group: dict[str, Any],
        layers: list[KroneckerLayer],
        steps: Callable[[], tuple[Steps, list[Tensor]]],
        squares: Tensor,
    ) -> Tensor:
        kept = super()._trust(group, layers, steps, squares)
        ratio = self.state[self._all_layers[0].weight].get("fisher_ratio")
        if ratio is not None:
            form = ratio * squares.sum()
            self.noted["kept"].append(float(kept))
            self.noted["kl"].append(float(0.5 * (group["lr"] * kept) ** 2 * form))
            if self._has_statistics(layers):
                self._note_ratio(layers, scaled(*steps()), form)
        return kept

    def _move(
        self, group: dict[str, Any], layers: list[KroneckerLayer], steps: list[Tensor]
    ) -> Tensor:
        """Take steps, a tensor for each parameter at lr 1, within the trust region; return what it keeps."""
        each = nested(steps, layers)
        squares = torch.stack([squared_norm(step) for step in each]).double()
        ones = list(torch.ones_like(squares).unbind())
        lr, kept = group["lr"], self._trust(group, layers, lambda: (each, ones), squares)
        for p, step in zip([p for x in layers for p in x.parameters], steps, strict=True):
            p.mul_(1 - lr * group["weight_decay"]).sub_((lr * kept.to(step) * step).to(p.dtype))
        return kept

    def _clipped_step(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        super()._clipped_step(group, layers)
        taken = [[self.state[p]["momentum_buffer"] for p in x.parameters] for x in layers]
        form = self._form(layers, taken)
        if form is not None:
            self.noted["kl"].append(float(0.5 * form))
            self._note_ratio(layers, taken, form)

    def _has_statistics(self, layers: list[KroneckerLayer]) -> bool:
        return all(self._capture.complete(x) for x in layers)

    def _form(self, layers: list[KroneckerLayer], steps: Steps) -> Tensor | None:
        """``ΔᵀFΔ`` by the statistics of this step; None where a layer has none."""
        if not self._has_statistics(layers):
            return None
        return fisher_along(layers, self._capture.complete, steps)

    def _note_ratio(self, layers: list[KroneckerLayer], steps: Steps, form: Tensor) -> None:
        predicted = kronecker_form(layers, [self.state[x.weight] for x in layers], steps)
        if predicted > 0:
            self.noted["form_ratio"].append(float(form / predicted))


def kronecker_form(
    layers: list[KroneckerLayer], states: list[dict[str, Any]], steps: Steps
) -> Tensor:
    """``Σ_layers ⟨Δ, Λ Δ Γ⟩``: the quadratic form of the factors, undamped."""
    factors = [
        {f"{side}_inverse": s[f"{side}_factor"] for side in ("output", "input")} for s in states
    ]
    given = [(d[0], d[1] if len(d) > 1 else None) for d in steps]
    return preconditioned(layers, factors, given)[1].sum()


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, 0-d."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def scaled(steps: Steps, factors: list[Tensor]) -> Steps:
    """Multiply the tensors of each layer by its factor."""
    return [[f.to(t) * t for t in step] for step, f in zip(steps, factors, strict=True)]


def nested(tensors: list[Tensor], layers: list[KroneckerLayer]) -> Steps:
    """Sort one tensor for each parameter by layer."""
    taken = iter(tensors)
    return [[next(taken) for _ in x.parameters] for x in layers]


def flat(steps: Steps) -> list[Tensor]:
    """One tensor for each parameter."""
    return [t for step in steps for t in step]
