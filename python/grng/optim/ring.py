# SPDX-License-Identifier: Apache-2.0
"""RING: regularised implicit natural gradient."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng.curvature.layers import KroneckerLayer
from grng.optim.base import KroneckerOptimizer, check_hyperparameter


class RING(KroneckerOptimizer):
    """Natural gradient with spectral damping and lazily refreshed Kronecker factors.

    For each Linear layer with gradient ``G [d_out, d_in + 1]``, ``Γ = E[x xᵀ]`` of its inputs and
    ``Λ = E[g gᵀ]`` of its output gradients under labels sampled from the model::

        every refresh_every steps:  Λ, Γ <- bias-corrected EMA
                                    P_Λ = (Λ + √rho·‖Λ‖₂ I)⁻¹,  P_Γ = (Γ + √rho·‖Γ‖₂ I)⁻¹
        every step:                 D = P_Λ G P_Γ
                                    D <- D · min(1, √(kl_clip / (lr² Σ_layers ⟨D, G⟩)))
                                    m <- momentum·m + lr·D
                                    W <- (1 − lr·weight_decay) W − m

    Everything that is not a Linear layer is trained by AdamW in the same object; :meth:`explain` says
    what and why. One device-to-host wait per step checks that the gradients are finite.

    Args:
        model: The model, or parameters as for any torch optimizer (which are then trained by AdamW: only
            modules have curvature).
        lr: Learning rate η of the layers with curvature.
        rho: Relative damping ρ, > 0; sensible from 0.01 to 0.1. The condition number of each damped factor
            is at most ``1 + 1/√rho``. Below 1e-3 training was seen to be unstable.
        refresh_every: S of Lazy Fisher: steps between refreshes (more often in the first S steps).
        factor_decay: EMA decay of the factors per refresh.
        momentum: Decay of the momentum, applied after preconditioning.
        weight_decay: Decoupled, multiplied by the learning rate; not zero by default, as in torch's AdamW.
        kl_clip: Bound of the predicted KL change of one step, on the device; None switches it off.
        adamw_lr: Learning rate of the parameters trained by AdamW.
        max_factor_dim: Layers with a larger factor are trained by AdamW.

    Raises:
        ValueError: A hyperparameter is out of range, or the model has no trainable parameter.

    Source: Dash et al. 2026, "Gradient Regularized Natural Gradients" (RING, Lazy Fisher). Momentum, KL clip
    (as in kfac-pytorch) and weight decay are additions; momentum=0, kl_clip=None gives the bare method.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.03,
        *,
        rho: float = 1e-2,
        refresh_every: int = 10,
        factor_decay: float = 0.95,
        momentum: float = 0.9,
        weight_decay: float = 0.03,
        kl_clip: float | None = 1e-3,
        adamw_lr: float = 1e-3,
        max_factor_dim: int = 8192,
    ) -> None:
        check_hyperparameter("RING", "lr", lr)
        check_hyperparameter("RING", "rho", rho, low=1e-8)
        check_hyperparameter("RING", "refresh_every", refresh_every, low=1)
        check_hyperparameter("RING", "factor_decay", factor_decay, high=1 - 1e-6)
        check_hyperparameter("RING", "momentum", momentum, high=1 - 1e-6)
        check_hyperparameter("RING", "weight_decay", weight_decay)
        if kl_clip is not None:
            check_hyperparameter("RING", "kl_clip", kl_clip, low=1e-30)
        defaults = dict(
            lr=lr,
            rho=rho,
            refresh_every=refresh_every,
            factor_decay=factor_decay,
            momentum=momentum,
            weight_decay=weight_decay,
            kl_clip=kl_clip,
        )
        super().__init__(model, defaults, adamw_lr=adamw_lr, max_factor_dim=max_factor_dim)

    def _update_layers(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        due = self._refresh_due(group["step"], group["refresh_every"])
        observed = [
            x for x in layers if self._capture.complete(x) and (due or not self._has_curvature(x))
        ]
        if observed:
            self._update_factors(group, observed)
            self._refresh_inverses(group, observed)
        layers = [x for x in layers if self._has_curvature(x)]
        if not layers:
            return
        states = [self.state[x.weight] for x in layers]
        weight_grads, bias_grads = zip(*(x.grads() for x in layers), strict=True)
        directions, products = kernels.precondition(
            list(weight_grads),
            [s["output_inverse"] for s in states],
            [s["input_inverse"] for s in states],
            bias_grad=list(bias_grads),
            return_dot=True,
        )
        form = products.sum()
        length = group["lr"] * _kl_clip(form, group["lr"], group["kl_clip"])
        # A layer whose factors vanished can have an inverse that overflows: such a step is left out.
        in_range = torch.isfinite(form)
        for layer, state, direction in zip(layers, states, directions, strict=True):
            # Steps, not directions: clipping bounds lr·D, so a direction that was clipped for one learning
            # rate must not be scaled by a later, larger one (a warm-up would undo the clip).
            step = state["momentum_buffer"].mul_(group["momentum"])
            step.add_(torch.where(in_range, direction * length, 0.0))
            layer.apply_step(step, decay=group["lr"] * group["weight_decay"])

    def _update_factors(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        for layer in layers:
            state = self.state[layer.weight]
            if "input_factor" not in state:
                state.update(_new_state(layer))
            records = self._capture.complete(layer)
            decay = _corrected_decay(state["updates"], group["factor_decay"])
            rows = sum(r.layer_input.shape[0] for r in records)
            for i, record in enumerate(records):
                # The first record ages the factor, the others add to it: together one batch.
                weight = decay if i == 0 else 1.0
                assert record.output_grad is not None, "complete() returns no other records"
                # Sampled labels: rows are per term. A mean loss: each row was divided by their number.
                terms = 1 if record.sampled else record.layer_input.shape[0] ** 2
                info = kernels.kron_factor_update_(
                    state["input_factor"],
                    record.layer_input,
                    decay=weight,
                    scale=(1 - decay) / rows,
                    bias=layer.bias is not None,
                )
                info = info + kernels.kron_factor_update_(
                    state["output_factor"],
                    record.output_grad,
                    decay=weight,
                    scale=(1 - decay) / rows * terms,
                )
                state["factor_failures"] += info != 0
            state["updates"] += 1

    def _refresh_inverses(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        states = [(self.state[x.weight], side) for x in layers for side in ("output", "input")]
        result = kernels.damped_inverse(
            [s[f"{side}_factor"] for s, side in states],
            rho=group["rho"],
            spectral_vector=[s[f"{side}_vector"] for s, side in states],
        )
        for (state, side), inverse, info, residual in zip(
            states, result.inverse, result.info, result.residual, strict=True
        ):
            # A failed inverse is not used: the previous one stays, without waiting for the device.
            kept = torch.where(info == 0, inverse, state[f"{side}_inverse"])
            state[f"{side}_inverse"].copy_(kept)
            state[f"{side}_residual"].copy_(residual)
            state["inverse_failures"] += info != 0

    def diagnostics(self) -> dict[str, float]:
        """Return scalars for a logger: counters, and per layer the residual of its last inverses.

        Waits for the device.
        """
        report = {
            "step": float(self.param_groups[0]["step"]),
            "kronecker_layers": float(len(self._layers)),
            "skipped_steps_in_a_row": float(self._failures),
        }
        for layer in self._layers:
            state = self.state[layer.weight]
            if "input_factor" in state:
                for key in (
                    "input_residual", "output_residual", "inverse_failures", "factor_failures",
                ):  # fmt: skip
                    report[f"{layer.name}/{key}"] = float(state[key])
        return report


def _new_state(layer: KroneckerLayer) -> dict[str, Any]:
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=layer.weight.device)

    out, inp = layer.sizes
    state: dict[str, Any] = {"updates": 0, "momentum_buffer": zeros(out, inp)}
    for side, n in (("output", out), ("input", inp)):
        state[f"{side}_factor"] = zeros(n, n)
        state[f"{side}_inverse"] = zeros(n, n)
        state[f"{side}_vector"] = zeros(n)
        state[f"{side}_residual"] = zeros()
    for counter in ("inverse_failures", "factor_failures"):
        state[counter] = torch.zeros((), dtype=torch.int32, device=layer.weight.device)
    return state


def _corrected_decay(updates: int, decay: float) -> float:
    """Return the decay that keeps an EMA free of its zero start: 0 for the first update."""
    return decay * (1 - decay**updates) / (1 - decay ** (updates + 1))


def _kl_clip(form: Tensor, lr: float | Tensor, bound: float | None) -> float | Tensor:
    """Return ``min(1, √(bound / (lr² ⟨D, G⟩)))`` as a tensor on the device, ``form`` being ``⟨D, G⟩``."""
    if bound is None:
        return 1.0
    # ⟨D, G⟩ is positive for positive definite inverses; rounding near zero must not reach the root.
    smallest = torch.finfo(form.dtype).tiny
    return (bound / (lr * lr * form).clamp(min=smallest)).sqrt().clamp(max=1.0)
