# SPDX-License-Identifier: Apache-2.0
"""Rules that keep AdamW's step length for each layer and change something else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grng.curvature.layers import KroneckerLayer
from grng.optim.factors import preconditioned, update_factors
from grng.optim.fallback import ADAMW_EPS
from grng.optim.grafting import as_steps, graft, update_moments
from step_lengths.watched import Watched, flat, nested, scaled


class MomentumAfter(Watched):
    """``M <- β M + (1 − β) P_Λ G P_Γ``, ``Δ = lr·(‖u‖/‖M‖)·M``: averaged after preconditioning.

    Source: the momentum of K-FAC (Martens & Grosse 2015, section 7) and of kfac-pytorch, which both average
    steps and not gradients; grafting as in the default.
    """

    def _grafted_step(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        params = [p for x in layers for p in x.parameters]
        of_each, moments = [self.state[p] for p in params], (group["betas"], ADAMW_EPS)
        lengths = update_moments(params, of_each, *moments)
        states = [self.state[x.weight] for x in layers]
        directions, _ = preconditioned(layers, states, [x.grads() for x in layers])
        averages = []
        for p, d in zip(params, flat(directions), strict=True):
            average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(d))
            # What is not finite would stay in the average for ever.
            average.lerp_(torch.where(torch.isfinite(d), d, average), 1 - group["betas"][0])
            averages.append(average)
        moved = nested(averages, layers)
        steps = as_steps(moved, of_each, graft(moved, lengths), *moments)
        self._move(group, layers, flat(scaled(*steps)))


class WarmUp(Watched):
    """AdamW's own steps while the factors gather statistics; from step ``warm_up`` on the default.

    Source: the delayed first preconditioned step of Shampoo (Anil et al. 2020, "Scalable Second Order
    Optimization for Deep Learning").
    """

    warm_up = 20

    def _update_layers(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        if group["step"] >= self.warm_up:
            super()._update_layers(group, layers)
            return
        self._refresh(group, layers)
        self._adamw_step(group, [p for x in layers for p in x.parameters])


class MoreStatistics(Watched):
    """Statistics of every step in the factors, ``refresh_every`` times as many; inverted as often as ever.

    The decay of each update is the ``refresh_every``-th root, so that the factors look back on as many steps
    as the default's. Source: K-FAC itself averages at every step (Martens & Grosse 2015, section 5).
    """

    def _statistics_wanted(self, layer: KroneckerLayer) -> bool:
        return self._is_trained(layer)

    def _refresh(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        decay = group["factor_decay"] ** (1 / group["refresh_every"])
        if self._refresh_due(group["step"], group["refresh_every"]):
            super()._refresh({**group, "factor_decay": decay}, layers)
            return
        for layer in layers:
            records = self._capture.complete(layer)
            if records:
                update_factors(layer, self.state[layer.weight], records, decay, self._sharing)
        # The trust region is measured at refreshes, as in the default: one difference at a time.
        self._capture.clear()


class AdaptiveDamping(Watched):
    """The default, with ``ρ`` divided or multiplied by 1.5 as the model of the loss proves good or bad.

    At each refresh the reduction of the loss on the same batch is compared with that of the quadratic
    model, ``⟨g, Δ⟩ − ½ ΔᵀFΔ``: over 3/4 of it, ``ρ`` shrinks, below 1/4 it grows. A step that the model takes
    for one uphill says nothing. ``batch_loss`` evaluates the batch that the next step is taken on.

    Source: Levenberg-Marquardt as in Martens & Grosse 2015, section 6.5.
    """

    factor, bounds = 1.5, (1e-6, 1e2)

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.batch_loss: Callable[[], float] | None = None
        self.noted |= {"reduction_ratio": [], "rho": []}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, and at a refresh judge it."""
        group = self.param_groups[0]
        judged = self._refresh_due(group["step"], group["refresh_every"])
        if not judged or self.batch_loss is None:
            return super().step(closure)
        moving = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        before, old = self.batch_loss(), [p.clone() for p in moving]
        result = super().step(closure)
        slope = sum(float((p.grad * (o - p)).sum()) for p, o in zip(moving, old, strict=True))
        # The last divergence noted is that of this step, and twice that is ΔᵀFΔ.
        predicted = slope - self.noted["kl"][-1]
        if predicted > 0:
            ratio = (before - self.batch_loss()) / predicted
            group["rho"] = adapted(group["rho"], ratio, self.factor, self.bounds)
            self.noted["reduction_ratio"].append(ratio)
            self.noted["rho"].append(group["rho"])
        return result


def adapted(rho: float, ratio: float, factor: float, bounds: tuple[float, float]) -> float:
    """``ρ`` after a step that reduced the loss by ``ratio`` times what was predicted."""
    change = 1 / factor if ratio > 0.75 else factor if not ratio >= 0.25 else 1.0
    return min(max(rho * change, bounds[0]), bounds[1])


def loss_on(model: torch.nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Loss of a batch in training mode; running statistics stay as they are."""
    buffers = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        logits = model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        for b, saved in zip(model.buffers(), buffers, strict=True):
            b.copy_(saved)
    return float(loss)
