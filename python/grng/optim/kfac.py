# SPDX-License-Identifier: Apache-2.0
"""K-FAC: Kronecker-factored approximate curvature, as a faithful baseline."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng.curvature.layers import KroneckerLayer
from grng.optim.base import KroneckerOptimizer, check_hyperparameter

CONVENTIONS = ("martens-grosse", "kfac-pytorch")
DECAY_FORMS = ("sgd", "decoupled")
FISHERS = ("sampled", "empirical")
# The split of the damping between two factors of which one is nearly zero; beyond it fp32 would overflow.
LARGEST_PI = 1e10


class KFAC(KroneckerOptimizer):
    """Natural gradient with Kronecker factors and absolute damping.

    For each Linear layer with gradient ``G [d_out, d_in + 1]``, ``A = E[x xᵀ]`` of its inputs and
    ``B = E[g gᵀ]`` of its output gradients::

        every factor_every steps:   A, B <- EMA
        every refresh_every steps:  P_B = (B + λ_B I)⁻¹,  P_A = (A + λ_A I)⁻¹
        every step:                 D = P_B G P_A
                                    D <- D · min(1, √(kl_clip / |lr² Σ_layers ⟨D, G⟩|))
                                    m <- momentum·m + D + weight_decay·W
                                    W <- W − lr·m

    Two conventions of scale, start and damping:

    ====================  =======================================  ===================================
    ..                    ``"martens-grosse"``                     ``"kfac-pytorch"``
    ====================  =======================================  ===================================
    rows of ``g``         gradient of one loss term                that of the mean loss, which is
                                                                   smaller by the number of terms
    start of the factors  first statistic: decay min(1 − 1/k, ·)   identity
    ``λ_A``, ``λ_B``      ``π√damping``, ``√damping/π`` with       ``damping``, ``damping``
                          ``π² = (tr A/dim A) / (tr B/dim B)``
    ====================  =======================================  ===================================

    With ``"kfac-pytorch"``, ``fisher="empirical"`` and the same settings, Linear layers take the steps of
    gpauloski/kfac-pytorch with its inverse method followed by ``torch.optim.SGD``, but for rounding. There
    the parameters of other layers are left to SGD; here AdamW trains them in the same object, and
    :meth:`explain` says which. One device-to-host wait per step checks that the gradients are finite.

    Args:
        model: The model, or parameters as for any torch optimizer (which are then trained by AdamW: only
            modules have curvature).
        lr: Learning rate of the layers with curvature.
        damping: Absolute damping λ, > 0, in units of the Fisher information (its root in units of a
            factor); may be changed in ``param_groups``, from the next refresh on.
        convention: ``"martens-grosse"`` or ``"kfac-pytorch"``, see the table.
        fisher: ``"sampled"``: of labels drawn from the model where :meth:`observe` is called, else of the
            loss; ``"empirical"``: of the loss always, ``observe`` then does nothing.
        factor_decay: EMA decay of the factors per update.
        factor_every: Steps between updates of the factors.
        refresh_every: Steps between inversions.
        momentum: Decay of the momentum, applied after preconditioning, as in ``torch.optim.SGD``.
        weight_decay: Weight decay; also that of AdamW, always decoupled there.
        decay_form: ``"sgd"``: added to the preconditioned gradient, before momentum, as the two packages do
            it together; ``"decoupled"``: multiplied by the learning rate, outside of momentum.
        kl_clip: Bound of the predicted KL change of one step, on the device; None switches it off.
        adamw_lr: Learning rate of the parameters trained by AdamW.
        max_factor_dim: Layers with a larger factor are trained by AdamW.

    Raises:
        ValueError: A hyperparameter is out of range, or the model has no trainable parameter.

    Source: Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", sections 4 to 6, without its learned step size and damping; Pauloski et al. 2021, "KAISA".
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.03,
        *,
        damping: float = 1e-3,
        convention: str = "martens-grosse",
        fisher: str = "sampled",
        factor_decay: float = 0.95,
        factor_every: int = 1,
        refresh_every: int = 1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        decay_form: str = "sgd",
        kl_clip: float | None = 1e-3,
        adamw_lr: float = 1e-3,
        max_factor_dim: int = 8192,
    ) -> None:
        check_hyperparameter("KFAC", "lr", lr)
        check_hyperparameter("KFAC", "damping", damping, low=1e-30)
        check_hyperparameter("KFAC", "factor_decay", factor_decay, high=1 - 1e-6)
        check_hyperparameter("KFAC", "factor_every", factor_every, low=1)
        if not isinstance(factor_every, int):
            raise ValueError(f"KFAC: factor_every must be a whole number, got {factor_every!r}")
        check_hyperparameter("KFAC", "refresh_every", refresh_every, low=1)
        check_hyperparameter("KFAC", "momentum", momentum, high=1 - 1e-6)
        check_hyperparameter("KFAC", "weight_decay", weight_decay)
        if kl_clip is not None:
            check_hyperparameter("KFAC", "kl_clip", kl_clip, low=1e-30)
        for name, value, choices in (
            ("convention", convention, CONVENTIONS),
            ("fisher", fisher, FISHERS),
            ("decay_form", decay_form, DECAY_FORMS),
        ):
            if value not in choices:
                raise ValueError(f"KFAC: {name} must be one of {', '.join(choices)}, got {value!r}")
        self._convention, self._fisher_kind, self._decay_form = convention, fisher, decay_form
        defaults = dict(
            lr=lr,
            damping=damping,
            factor_decay=factor_decay,
            factor_every=factor_every,
            refresh_every=refresh_every,
            momentum=momentum,
            weight_decay=weight_decay,
            kl_clip=kl_clip,
        )
        super().__init__(model, defaults, adamw_lr=adamw_lr, max_factor_dim=max_factor_dim)

    def observe(self, outputs: Tensor, *, likelihood: str = "categorical") -> None:
        """Sample labels from the model and take the statistics of their gradients (the true Fisher).

        As in :class:`grng.RING`; with ``fisher="empirical"`` it does nothing.

        Args:
            outputs: The model's outputs: logits ``[..., C]``, or means for ``likelihood="gaussian"``.
            likelihood: ``"categorical"`` or ``"gaussian"`` (unit variance).

        Raises:
            ValueError: Unknown likelihood, or ``outputs`` without a graph on a step that needs it.
        """
        if self._fisher_kind == "sampled":
            super().observe(outputs, likelihood=likelihood)

    def _statistics_wanted(self, layer: KroneckerLayer) -> bool:
        group = self.param_groups[0]
        return layer in self._layers and (
            group["step"] % group["factor_every"] == 0 or not self._has_curvature(layer)
        )

    def _note_fisher(self, layers: list[KroneckerLayer]) -> None:
        super()._note_fisher(layers)
        if self._fisher_kind == "empirical":
            self._fisher = "empirical, as asked for"

    def _update_layers(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        for layer in layers:
            if self._capture.complete(layer):
                self._update_factors(group, layer)
        layers = [x for x in layers if self._has_curvature(x)]
        due = group["step"] % group["refresh_every"] == 0
        stale = [x for x in layers if due or not self.state[x.weight]["refreshes"]]
        if stale:
            self._refresh_inverses(group, stale)
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
        scale = _kl_clip(form, group["lr"], group["kl_clip"])
        # A layer whose factors vanished can have an inverse that overflows: such a step is left out.
        in_range = torch.isfinite(form)
        lr, decay = group["lr"], group["weight_decay"]
        for layer, state, direction in zip(layers, states, directions, strict=True):
            momentum = state["momentum_buffer"].mul_(group["momentum"])
            momentum.add_(torch.where(in_range, direction * scale, 0.0))
            if self._decay_form == "sgd":
                if decay != 0:
                    momentum.add_(_weights(layer, momentum.dtype), alpha=decay)
                layer.apply_step(momentum * lr, decay=0.0)
            else:
                layer.apply_step(momentum * lr, decay=lr * decay)

    def _update_factors(self, group: dict[str, Any], layer: KroneckerLayer) -> None:
        state = self.state[layer.weight]
        if "input_factor" not in state:
            state.update(_new_state(layer, identity=self._convention == "kfac-pytorch"))
        records = self._capture.complete(layer)
        rows = sum(r.layer_input.shape[0] for r in records)
        decay = group["factor_decay"]
        if self._convention == "martens-grosse":
            # Martens & Grosse, section 5: no trace of the start.
            decay = min(1 - 1 / (state["updates"] + 1), decay)
        for i, record in enumerate(records):
            assert record.output_grad is not None, "complete() returns no other records"
            # Sampled labels: rows are per term. A mean loss: each row was divided by their number.
            if self._convention == "martens-grosse":
                terms = 1.0 if record.sampled else float(record.layer_input.shape[0]) ** 2
            else:
                terms = float(rows) ** -2 if record.sampled else 1.0
            # The first record ages the factor, the others add to it: together one batch.
            weight = decay if i == 0 else 1.0
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
        entries = [(self.state[x.weight], side) for x in layers for side in ("output", "input")]
        damping: float | list[Tensor] = float(group["damping"])
        if self._convention == "martens-grosse":
            damping = [
                d for x in layers for d in _split_damping(self.state[x.weight], group["damping"])
            ]
        result = kernels.damped_inverse(
            [s[f"{side}_factor"] for s, side in entries], damping=damping
        )
        for (state, side), inverse, info, residual in zip(
            entries, result.inverse, result.info, result.residual, strict=True
        ):
            # A failed inverse is not used: the previous one stays, without waiting for the device.
            state[f"{side}_inverse"].copy_(
                torch.where(info == 0, inverse, state[f"{side}_inverse"])
            )
            state[f"{side}_residual"].copy_(residual)
            state["inverse_failures"] += info != 0
        for layer in layers:
            self.state[layer.weight]["refreshes"] += 1

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


def _new_state(layer: KroneckerLayer, *, identity: bool) -> dict[str, Any]:
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=layer.weight.device)

    out, inp = layer.sizes
    state: dict[str, Any] = {"updates": 0, "refreshes": 0, "momentum_buffer": zeros(out, inp)}
    for side, n in (("output", out), ("input", inp)):
        state[f"{side}_factor"] = zeros(n, n)
        if identity:
            state[f"{side}_factor"].fill_diagonal_(1.0)
        state[f"{side}_inverse"] = zeros(n, n)
        state[f"{side}_residual"] = zeros()
    for counter in ("inverse_failures", "factor_failures"):
        state[counter] = torch.zeros((), dtype=torch.int32, device=layer.weight.device)
    return state


def _split_damping(state: dict[str, Any], damping: float) -> tuple[Tensor, Tensor]:
    """Damping of the output and of the input factor, 0-d on their device; their product is ``damping``.

    Source: Martens & Grosse 2015, section 6.3, with the trace norm.
    """
    means = [state[f"{side}_factor"].diagonal().mean() for side in ("input", "output")]
    pi = (means[0] / means[1]).sqrt()
    # Where a factor is zero there is nothing to balance.
    pi = torch.where((means[0] > 0) & (means[1] > 0), pi, 1.0).clamp(1 / LARGEST_PI, LARGEST_PI)
    root = damping**0.5
    return root / pi, root * pi


def _kl_clip(form: Tensor, lr: float | Tensor, bound: float | None) -> float | Tensor:
    """Return ``min(1, √(bound / |lr² ⟨D, G⟩|))`` as a tensor on the device, ``form`` being ``⟨D, G⟩``."""
    if bound is None:
        return 1.0
    smallest = torch.finfo(form.dtype).tiny
    return (bound / (lr * lr * form).abs().clamp(min=smallest)).sqrt().clamp(max=1.0)


def _weights(layer: KroneckerLayer, dtype: torch.dtype) -> Tensor:
    """The layer's parameters as its gradient has them, ``[d_out, d_in (+ 1)]``."""
    weight = layer.weight.detach().flatten(1).to(dtype)
    if layer.bias is None:
        return weight
    return torch.cat([weight, layer.bias.detach().to(dtype)[:, None]], dim=1)
