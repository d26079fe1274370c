# SPDX-License-Identifier: Apache-2.0
"""K-FAC: Kronecker-factored approximate curvature, as a faithful baseline."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng.curvature.convolution import ConvolutionLayer
from grng.curvature.fisher import FISHERS
from grng.curvature.layers import KroneckerLayer, Record
from grng.optim.base import KroneckerOptimizer, check_hyperparameter
from grng.optim.devices import beside, by_device
from grng.optim.factors import (
    SIDES,
    State,
    add_statistics,
    dense_parts,
    keep_inverses,
    update_factors_with,
    updates_so_far,
)
from grng.optim.kl_clip import clipped_directions
from grng.optim.undo import write_copies

CONVENTIONS = ("martens-grosse", "kfac-pytorch")
DECAY_FORMS = ("sgd", "decoupled")
# The split of the damping between two factors of which one is nearly zero; beyond it fp32 would overflow.
LARGEST_PI = 1e10


class KFAC(KroneckerOptimizer):
    """Natural gradient with Kronecker factors and absolute damping.

    For each layer with gradient ``G [d_out, d_in + 1]``, ``A = E[x xᵀ]`` of its inputs and
    ``B = E[g gᵀ]`` of its output gradients, a convolution's inputs being its patches::

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
    ``B``                 sum over the positions of a term         mean over the positions
    convolutions          as above                                 ``x`` and ``g`` divided by the
                                                                   number of positions
    start of the factors  first statistic: decay min(1 − 1/k, ·)   identity
    ``λ_A``, ``λ_B``      ``π√damping``, ``√damping/π`` with       ``damping``, ``damping``
                          ``π² = (tr A/dim A) / (tr B/dim B)``
    ====================  =======================================  ===================================

    With ``"kfac-pytorch"``, ``fisher="empirical"`` and the same settings, Linear and Conv2d layers take the
    steps of gpauloski/kfac-pytorch with its inverse method followed by ``torch.optim.SGD``, but for rounding.
    There the parameters of other layers are left to SGD; here AdamW trains them in the same object, and
    :meth:`explain` says which. Grouped and dilated convolutions, which it does not have, and those in one
    dimension follow its rules by groups. One device-to-host wait per step checks that the gradients are
    finite.

    Args:
        model: The model, or parameters as for any torch optimizer (which are then trained by AdamW: only
            modules have curvature).
        lr: Learning rate of the layers with curvature.
        damping: Absolute damping λ, > 0, in units of the Fisher information (its root in units of a
            factor); may be changed in ``param_groups``, from the next refresh on.
        convention: ``"martens-grosse"`` or ``"kfac-pytorch"``, see the table.
        fisher: ``"sampled"`` labels where :meth:`observe` is called, else the gradients of the loss;
            ``"exact"``, with a backward pass for each class, at most 100; or ``"empirical"``: always the
            gradients of the loss, where :meth:`observe` only tells how many terms it has.
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
        maximize: Go up and not down: the step is that of the negative of the loss. Statistics are those of
            the model's outputs, which have no sign.

    Raises:
        ValueError: A hyperparameter is out of range, or the model has no trainable parameter.

    Source: Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", sections 4 to 6, without its learned step size and damping; Pauloski et al. 2021, "KAISA".
    """

    _diagonal_factors = False
    _spectral_damping = False

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
        adamw_lr: float | Tensor = 1e-3,
        max_factor_dim: int = 8192,
        maximize: bool = False,
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
        self._convention, self._decay_form = convention, decay_form
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
        super().__init__(
            model,
            defaults,
            adamw_lr=adamw_lr,
            max_factor_dim=max_factor_dim,
            maximize=maximize,
            fisher=fisher,
        )

    def _statistics_wanted(self, layer: KroneckerLayer) -> bool:
        group = self.param_groups[0]
        return self._is_trained(layer) and (
            group["step"] % group["factor_every"] == 0 or not self._has_curvature(layer)
        )

    def _new_state(self, layer: KroneckerLayer) -> State:
        state = {**super()._new_state(layer), "refreshes": 0}
        if self._convention == "kfac-pytorch":
            for side in SIDES:
                state[f"{side}_factor"].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return state

    def _new_momentum(self, parameter: nn.Parameter) -> State:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return {"momentum_buffer": torch.zeros_like(parameter, dtype=dtype)}

    def _accepted(self, parameter: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        saved = super()._accepted(parameter, saved)
        if "input_factor" in saved:
            saved.setdefault("refreshes", 0)
        return saved

    def _update_layers(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        for layer in layers:
            if self._capture.complete(layer):
                write_copies(self.state[layer.weight], inverses=layer.blocks > 1)
                self._update_factors(group, layer)
        layers = [x for x in layers if self._has_curvature(x)]
        due = group["step"] % group["refresh_every"] == 0
        stale = [x for x in layers if due or not self.state[x.weight]["refreshes"]]
        if stale:
            self._refresh_inverses(group, stale)
        if not layers:
            return
        states = [self.state[x.weight] for x in layers]
        directions = clipped_directions(
            layers, states, [x.grads() for x in layers], group["lr"], group["kl_clip"]
        )
        for layer, direction in zip(layers, directions, strict=True):
            for p, d in zip(layer.parameters, direction, strict=True):
                if p.grad is not None:  # a bias may be frozen after the optimizer was made
                    self._apply(group, p, d)

    def _apply(self, group: dict[str, Any], p: nn.Parameter, direction: Tensor) -> None:
        state, lr, decay = self.state[p], beside(group["lr"], p), group["weight_decay"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(direction)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
        if self._decay_form == "decoupled":
            p.mul_(1 - lr * decay)
        elif decay != 0:
            momentum.add_(p.to(momentum.dtype), alpha=decay)
        p.sub_((momentum * lr).to(p.dtype))

    def _update_factors(self, group: dict[str, Any], layer: KroneckerLayer) -> None:
        state, records = self.state[layer.weight], self._capture.complete(layer)
        if "input_factor" not in state:
            state.update(self._new_state(layer))
        decay = group["factor_decay"]
        if self._convention == "martens-grosse":
            # Martens & Grosse, section 5: no trace of the start.
            decays = [_decay_from_start(n, decay) for n in updates_so_far(state)]
            update_factors_with(layer, state, records, decays, "expand")
        else:
            _update_like_kfac_pytorch(layer, state, records, decay)

    def _refresh_inverses(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        states = [self.state[x.weight] for x in layers]
        for layer, state in zip(layers, states, strict=True):
            if not self._capture.complete(layer):  # else they are copies already
                write_copies(state, inverses=layer.blocks > 1)
        parts = dense_parts(layers, states)
        damping: list[Tensor] | None = None
        if self._convention == "martens-grosse":
            damping = [
                d for s in states for both in _split_damping(s, group["damping"]) for d in both
            ]
        calls = list(enumerate(parts))
        for call in by_device(calls, lambda given: given[1].of("factor")):
            result = kernels.damped_inverse(
                [part.of("factor") for _, part in call],
                damping=[damping[i] for i, _ in call] if damping else float(group["damping"]),
            )
            keep_inverses([part for _, part in call], result)
        for state in states:
            state["refreshes"] += 1


def _update_like_kfac_pytorch(
    layer: KroneckerLayer, state: State, records: list[Record], decay: float
) -> None:
    """Average the means over the rows of each forward pass, of gradients of the mean loss.

    Source: kfac-pytorch, kfac/layers/modules.py and base.py.
    """
    rows, squares = [], []
    terms = sum(r.terms or layer.examples(r.layer_input) for r in records)
    for record in records:
        positions = layer.positions(record.layer_input)
        spread = positions if isinstance(layer, ConvolutionLayer) else 1
        rows.append(layer.examples(record.layer_input) * positions * spread**2 * len(records))
        # Sampled labels: the sum of the terms was differentiated.
        squares.append(terms**-2 if record.sampled else 1.0)
    add_statistics(
        layer,
        state,
        records,
        (decay, decay),
        input_weights=[1 / n for n in rows],
        output_weights=[s / n for s, n in zip(squares, rows, strict=True)],
        reduced=[False] * len(records),
    )


def _decay_from_start(updates: int | Tensor, decay: float) -> float | Tensor:
    if isinstance(updates, Tensor):
        return (1 - 1 / (updates.double() + 1)).clamp(max=decay)
    return min(1 - 1 / (updates + 1), decay)


def _split_damping(state: State, damping: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Damping of the blocks of the output and of the input factor, 0-d on their device.

    The product of the two of a block is ``damping``.

    Source: Martens & Grosse 2015, section 6.3, with the trace norm.
    """
    means = [
        state[f"{side}_factor"].diagonal(dim1=-2, dim2=-1).mean(-1) for side in ("input", "output")
    ]
    pi = (means[0] / means[1]).sqrt()
    # Where a factor is zero there is nothing to balance.
    pi = torch.where((means[0] > 0) & (means[1] > 0), pi, 1.0).clamp(1 / LARGEST_PI, LARGEST_PI)
    root = damping**0.5
    return (root / pi).view(-1).unbind(), (root * pi).view(-1).unbind()
