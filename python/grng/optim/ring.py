# SPDX-License-Identifier: Apache-2.0
"""RING: regularised implicit natural gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature.find import embedding_weights
from grng.curvature.fisher import FISHERS
from grng.curvature.layers import SHARINGS, KroneckerLayer, Record
from grng.curvature.quadratic import fisher_along, out_of_order
from grng.optim.base import ADAMW, KroneckerOptimizer
from grng.optim.checks import check_betas, check_hyperparameter
from grng.optim.devices import beside, stacked
from grng.optim.factors import State, new_factors, preconditioned, refresh_inverses, update_factors
from grng.optim.fallback import ADAMW_EPS, embedding_step
from grng.optim.grafting import as_steps, graft, new_moments, take_steps, update_moments
from grng.optim.kl_clip import clipped_directions
from grng.optim.shared_inputs import SharedInputs, copy_input_factor
from grng.optim.strict import Strict, is_strict
from grng.optim.undo import write_copies
from grng.reports.memory import adamw_state, planned

STEP_LENGTHS = ("graft", "kl_clip")


class RING(KroneckerOptimizer):
    """Natural gradient with spectral damping, lazily refreshed Kronecker factors and AdamW's step length.

    For each layer with gradient ``G [d_out, d_in + 1]``, ``Γ = E[x xᵀ]`` of its inputs and ``Λ = E[g gᵀ]`` of
    its output gradients under labels sampled from the model::

        every refresh_every steps:  Λ, Γ <- bias-corrected EMA
                                    P_Λ = (Λ + √rho·‖Λ‖₂ I)⁻¹,  P_Γ = (Γ + √rho·‖Γ‖₂ I)⁻¹
        every step:                 m <- EMA of G;  u = AdamW's update of the layer
                                    D = P_Λ m̂ P_Γ
                                    Δ = lr·(‖u‖/‖D‖)·D
                                    W <- (1 − lr·weight_decay) W − Δ·min(1, √(2·max_kl / ΔᵀFΔ))

    so that curvature decides where to go, AdamW's step how far each layer goes, and a trust region how far
    all of them together. ``ΔᵀFΔ`` is the Fisher information along the whole step, layers together: measured
    at each refresh from the statistics at hand, and between, and for layers that have none there, taken to
    be proportional to ``‖Δ‖²``. Linear
    layers (any leading dimensions), 1-d and 2-d convolutions (grouped too) and transformers' ``Conv1D`` have
    curvature; everything else is trained by AdamW in the same object, and :meth:`explain` says what and why.
    One device-to-host wait per step checks that the gradients are finite.

    Args:
        model: The model, or parameters as for any torch optimizer (which are then trained by AdamW: only
            modules have curvature).
        lr: Learning rate: for ``step_length="graft"`` AdamW's, or a larger one, which ``max_kl`` cuts where
            it is too large; ``"kl_clip"`` wants about 0.03.
        rho: Relative damping ρ, > 0. The condition number of each damped factor is at most ``1 + 1/√rho``.
        refresh_every: S of Lazy Fisher: steps between refreshes (more often in the first S steps). A layer
            that was not used at a refresh has its own as soon as its statistics are S steps old.
        factor_decay: EMA decay of the factors per refresh.
        betas: Decays of the averages of the gradient, which is preconditioned, and of its square; for what
            AdamW trains too.
        weight_decay: Decoupled, multiplied by the learning rate; for what AdamW trains too.
        step_length: ``"graft"``, as above; or ``"kl_clip"``, without AdamW's moments:
            ``m <- betas[0]·m + lr·ν·P_Λ G P_Γ`` with ``ν = min(1, √(kl_clip / (lr² Σ_layers ⟨D, G⟩)))``.
        max_kl: Largest KL divergence between the model's predictions before and after one step, per term of
            the loss, as the Fisher information predicts it; None switches it off. Only for
            ``step_length="graft"``; what AdamW trains is not counted. Without :meth:`observe` the loss is
            taken to be the mean over the examples, unscaled. Examples come first in every layer's input;
            layers that are seen to have them elsewhere are left out of the measure, with a warning. With
            ``likelihood="gaussian"`` it is in units of the outputs, whose variance is taken to be one: scale
            the targets to about that, or switch it off, else large targets are reached slowly. Sampled labels
            both precondition the step and measure it, which underestimates the divergence where batches are
            small; ``fisher="exact"`` does not draw any.
        kl_clip: Bound of the KL change of one step, as the factors predict it; None switches it off. Only
            for ``step_length="kl_clip"``.
        fisher: ``"sampled"`` labels where :meth:`observe` is called, else the gradients of the loss;
            ``"exact"``, with a backward pass for each class, at most 100; or ``"empirical"``: always the
            gradients of the loss, where :meth:`observe` only tells how many terms it has.
        sharing: What a row of a factor is where a weight is used at several positions of an example:
            ``"expand"``, each position; ``"reduce"``, each example; ``"auto"``, each example in a linear
            layer where :meth:`observe` saw one term of the loss for each, and each position else.
        stagger: Spread the inversions of a refresh over the ``refresh_every`` steps after it, for a flat
            step time. The statistics are still taken together.
        adamw_lr: Learning rate of the parameters trained by AdamW; None: ``lr`` for ``"graft"``, else 1e-3.
            With None and ``"graft"`` the steps of embeddings are shorter: times ``min(1, RMS(W) / 0.1)``, and
            at least a tenth. At BERT's 0.02 that makes 1e-3 of the default, at 0.1 and more it is ``lr``.
            It is for the weights of ``nn.Embedding`` and ``nn.EmbeddingBag`` that AdamW trains from the
            start, tied ones too, whatever the ``lr`` of their group is set to later; the group's key
            ``"short_embeddings"`` switches it off.
        max_factor_dim: Largest order of a dense factor of a linear layer; of a longer side, as of the long
            side of LoRA's weights, only the diagonal is kept. Larger convolutions are trained by AdamW.
        max_failures: Steps in a row with non-finite gradients, which change nothing, before
            :class:`PreconditionerError`; and failed inversions in a row of one matrix, whose previous inverse
            is used meanwhile. The count begins anew when all matrices of the layer are inverted without one.
        check_interval: Steps between looks at that count, which the device keeps; a look waits for nothing
            that the step does not wait for anyway.
        strict: Whether fallbacks are errors; or, for the same, a tuple of the module classes whose matrices
            AdamW may train nevertheless, as ``(nn.Embedding,)``. At construction: parameters of two or more
            dimensions that AdamW would train. In a step, before parameters change: layers that no statistics
            reach, inputs that were overwritten, statistics without :meth:`observe` unless
            ``fisher="empirical"``, gradients of parameters that were frozen at construction; in the step
            after: any inverse, statistics or direction that failed. Steps with non-finite gradients are
            skipped as ever, and what :meth:`add_param_group` adds is trained by AdamW. Looking costs a little
            in every step.
        maximize: Go up and not down: the step is that of the negative of the loss. Statistics are those of
            the model's outputs, which have no sign.

    Raises:
        ValueError: A hyperparameter is out of range, the model has no trainable parameter, or ``strict`` and
            AdamW would train a matrix.

    Source: Dash et al. 2026, "Gradient Regularized Natural Gradients" (RING, Lazy Fisher), for the direction;
    Eschenhagen et al. 2023 for shared weights; Agarwal et al. 2020 for grafting; Martens & Grosse 2015,
    section 6, for the exact quadratic form, here without its forward pass. ``step_length="kl_clip"`` with
    ``betas=(0, 0.999)``, ``kl_clip=None`` and ``weight_decay=0`` is the bare method.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 5e-3,
        *,
        rho: float = 1e-3,
        refresh_every: int = 10,
        factor_decay: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
        step_length: str = "graft",
        max_kl: float | None = 0.01,
        kl_clip: float | None = 1e-3,
        fisher: str = "sampled",
        sharing: str = "auto",
        stagger: bool = False,
        adamw_lr: float | Tensor | None = None,
        max_factor_dim: int = 8192,
        max_failures: int = 3,
        check_interval: int = 10,
        strict: Strict = False,
        maximize: bool = False,
    ) -> None:
        owner = type(self).__name__
        check_hyperparameter(owner, "lr", lr)
        check_hyperparameter(owner, "rho", rho, low=1e-8)
        check_hyperparameter(owner, "refresh_every", refresh_every, low=1)
        check_hyperparameter(owner, "factor_decay", factor_decay, high=1 - 1e-6)
        check_betas(owner, betas)
        check_hyperparameter(owner, "weight_decay", weight_decay)
        for name, bound in (("kl_clip", kl_clip), ("max_kl", max_kl)):
            if bound is not None:
                check_hyperparameter(owner, name, bound, low=1e-30)
        for name, value, choices in (
            ("step_length", step_length, STEP_LENGTHS),
            ("fisher", fisher, FISHERS),
            ("sharing", sharing, SHARINGS),
        ):
            if value not in choices:
                raise ValueError(
                    f"{owner}: {name} must be one of {', '.join(choices)}, got {value!r}"
                )
        self._step_length, self._sharing, self._stagger = step_length, sharing, stagger
        self._inputs = SharedInputs()
        self._said_out_of_order = False
        defaults = dict(
            lr=lr,
            rho=rho,
            refresh_every=refresh_every,
            factor_decay=factor_decay,
            betas=tuple(betas),
            weight_decay=weight_decay,
            kl_clip=kl_clip,
            max_kl=max_kl,
        )
        # A rate that was chosen for AdamW is AdamW's.
        is_shared = adamw_lr is None and step_length == "graft"
        if is_shared:
            # A scheduler writes into a tensor: each group has its own.
            adamw_lr = lr.clone() if isinstance(lr, Tensor) else lr
        super().__init__(
            model,
            defaults,
            adamw_lr=1e-3 if adamw_lr is None else adamw_lr,
            max_factor_dim=max_factor_dim,
            maximize=maximize,
            max_failures=max_failures,
            check_interval=check_interval,
            strict=strict,
            fisher=fisher,
        )
        self._embeddings: set[nn.Parameter] = set()
        if isinstance(model, nn.Module):
            self._embeddings = embedding_weights(model) & self._reasons.keys()
        for group in (g for g in self.param_groups if g["kind"] == ADAMW):
            # In the group, so that a checkpoint goes on as it began.
            group["short_embeddings"] = is_shared
        if is_shared:
            for p in self._embeddings:
                self._reasons[p] += "; steps times min(1, RMS / 0.1)"

    def _after_loading(self) -> None:
        super()._after_loading()
        states = [(x, self.state.get(x.weight, {})) for x in self._layers]
        states = [(x, s) for x, s in states if "input_factor" in s]
        for _, state in states:
            # An older version did not say when.
            for key in ("updated_at", "stale_since"):
                state.setdefault(key, self.param_groups[0]["step"])
        self._inputs.recall(states)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As the base class; one of an older version knows no embeddings."""
        super().__setstate__({"_embeddings": set(), **state})

    def _rehearse(self) -> None:
        super()._rehearse()
        is_measured = self._step_length == "graft" and self.param_groups[0]["max_kl"] is not None
        if self._layers and is_measured:
            weight = self._all_layers[0].weight
            ratio = torch.zeros((), dtype=torch.float64, device=weight.device)
            self.state[weight]["fisher_ratio"] = ratio

    def _new_state(self, layer: KroneckerLayer) -> State:
        group = self.param_groups[0]
        # Long ago: a layer that a checkpoint lacks is due at once.
        never = group["step"] - group["refresh_every"]
        return {**super()._new_state(layer), "updated_at": never, "stale": 0, "stale_since": never}

    def _new_momentum(self, parameter: nn.Parameter) -> State:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if self._step_length == "graft":
            return new_moments(parameter, dtype)
        return {"momentum_buffer": torch.zeros_like(parameter, dtype=dtype)}

    def _update_layers(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        self._refresh(group, layers)
        layers = [x for x in layers if self._has_curvature(x)]
        if not layers:
            return
        if self._step_length == "graft":
            self._grafted_step(group, layers)
        else:
            self._clipped_step(group, layers)

    def _adamw_step(self, group: dict[str, Any], candidates: list[nn.Parameter]) -> None:
        tables = self._embeddings if group.get("short_embeddings") else set()
        super()._adamw_step(group, [p for p in candidates if p not in tables])
        embedding_step(self.state, group, [p for p in candidates if p in tables])

    def _planned_factors(self, layer: KroneckerLayer) -> dict[str, Any]:
        shared = {"fisher_ratio": torch.empty((), dtype=torch.float64, device="meta")}
        is_kept = self._step_length == "graft" and self.param_groups[0]["max_kl"] is not None
        first = is_kept and layer is self._all_layers[0]
        return {**super()._planned_factors(layer), **(shared if first else {})}

    def _planned_moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if self._step_length == "graft":
            return dict(adamw_state(parameter, wide))
        return dict(planned(parameter, "momentum_buffer", dtype=wide))

    def _kept_by(self) -> str:
        return "max_kl" if self._step_length == "graft" else "kl_clip"

    def _leaders(self) -> dict[KroneckerLayer, KroneckerLayer]:
        return self._inputs.leaders(self._layers)

    def _refresh(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        """Average the statistics that came with this step into the factors, and invert what is due."""
        step, every = group["step"], group["refresh_every"]
        updates, new = [], set()
        for layer in layers:
            state, records = self.state[layer.weight], self._capture.complete(layer)
            is_new = "input_factor" not in state
            if records and (is_new or self._is_due(layer, group)):
                updates.append((layer, records))
                if is_new:
                    state.update(new_factors(layer))
                    new.add(layer)
        for layer, _ in updates:
            write_copies(self.state[layer.weight], inverses=layer.blocks > 1)
        self._average(group, updates)
        leaders = self._inputs.leaders(layers)
        # Layers that share an inverse have one turn.
        places = {x: i for i, x in enumerate(dict.fromkeys(leaders.values()))}
        stale = [
            x
            for x in layers
            if (
                x in new
                or not self._stagger
                or step < every
                or (step - places[leaders[x]]) % every == 0
                # A layer that was not used at its turn.
                or step - self.state[x.weight].get("stale_since", step) >= every
            )
            and self.state[x.weight].get("stale")
        ]
        if stale:
            averaged = {x for x, _ in updates}
            for layer in (x for x in stale if x not in averaged):
                write_copies(self.state[layer.weight], inverses=layer.blocks > 1)
            states = [self.state[x.weight] for x in stale]
            leaders = self._inputs.leaders(stale)
            refresh_inverses(
                stale, states, group["rho"], [self.state[leaders[x].weight] for x in stale]
            )
            for state in states:
                state["stale"], state["inverted_at"] = 0, step

    def _average(
        self, group: dict[str, Any], updates: list[tuple[KroneckerLayer, list[Record]]]
    ) -> None:
        """Average statistics into the factors; those of inputs once for all layers that are fed the same."""
        leaders = self._inputs.advance(updates, self._sharing)
        infos: dict[KroneckerLayer, list[Tensor]] = {}
        for layer, records in updates:
            state, leader = self.state[layer.weight], leaders[layer]
            if leader is not layer:
                copy_input_factor(self.state[leader.weight], state)
            infos[layer] = update_factors(
                layer,
                state,
                records,
                group["factor_decay"],
                self._sharing,
                input_infos=infos.get(leader),
            )
            state["updated_at"] = group["step"]
            if not state.get("stale"):
                state["stale"], state["stale_since"] = 1, group["step"]

    def _grafted_step(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        used = [[p for p in x.parameters if p.grad is not None] for x in layers]
        params = [p for ps in used for p in ps]
        states = [self.state[p] for p in params]
        moments = group["betas"], ADAMW_EPS
        lengths = update_moments(params, states, *moments)
        # The direction gets AdamW's length: no scale of the average matters, nor the correction of its bias.
        given = [_averages(self.state, x) for x in layers]
        directions, _ = preconditioned(
            layers, [self.state[x.weight] for x in layers], given, with_products=False
        )
        cut = [d[: len(ps)] for d, ps in zip(directions, used, strict=True)]
        found = graft(cut, lengths)
        # Only a CPU can be asked without waiting for it.
        if not found.serves.is_cpu or not found.serves.all():
            for layer, flag in zip(layers, found.serves.unbind(), strict=True):
                failures = self.state[layer.weight]["direction_failures"]
                failures += (~flag).to(failures.device)
        lr = group["lr"]
        rate = lr
        if group["max_kl"] is not None:
            self._kept = self._trust(
                group,
                layers,
                lambda: as_steps(cut, states, found, *moments),
                found.lengths.square(),
            )
            rate = lr * self._kept
        take_steps(
            params,
            states,
            [d for ds in cut for d in ds],
            found.scales,
            lr=rate,
            decay=1 - lr * group["weight_decay"],
            betas=group["betas"],
            eps=ADAMW_EPS,
        )

    def _trust(
        self,
        group: dict[str, Any],
        layers: list[KroneckerLayer],
        steps: Callable[[], tuple[list[list[Tensor]], list[Tensor]]],
        squares: Tensor,
    ) -> Tensor:
        """The part of the step, 0-d in (0, 1], that changes the model's outputs by at most ``max_kl``.

        The Fisher information along the step is measured where there are statistics; between, its ratio to
        the squared length of the step is taken to stay. Layers whose statistics are missing at a refresh are
        taken to have the ratio of the others.

        Args:
            group: The group of the layers.
            layers: The layers.
            steps: Gives their steps at lr 1, see :func:`as_steps`; asked only where they are measured.
            squares: Their squared lengths, fp64 ``[layers]``.
        """
        norm = squares.sum()
        shared = self.state[self._all_layers[0].weight]
        capture = self._capture
        known = [
            i for i, x in enumerate(layers) if capture.complete(x) and not capture.overwritten(x)
        ]
        known = self._in_order(known, layers)
        # Between the refreshes of all, the few layers that missed the last one do not speak for the others.
        if known and (
            len(known) == len(layers) or self._refresh_due(group["step"], group["refresh_every"])
        ):
            tensors, factors = steps()
            form = fisher_along(
                [layers[i] for i in known],
                capture.complete,
                [tensors[i] for i in known],
                [factors[i] for i in known],
            )
            old = shared.get("fisher_ratio", torch.zeros_like(norm)).to(norm)
            if form is not None:
                # A layer without statistics would count in the length of the step, not in its information.
                length = norm
                if len(known) < len(layers):
                    length = stacked([squares[i] for i in known]).sum()
                form = form.to(norm)
                serves = (length > 0) & torch.isfinite(form)
                shared["fisher_ratio"] = torch.where(serves, form / length, old)
        if "fisher_ratio" not in shared:
            return torch.ones_like(norm)
        divergence = 0.5 * group["lr"] ** 2 * shared["fisher_ratio"].to(norm) * norm
        smallest = torch.finfo(divergence.dtype).tiny
        return (group["max_kl"] / divergence.clamp(min=smallest)).sqrt().clamp(max=1.0)

    def _in_order(self, known: list[int], layers: list[KroneckerLayer]) -> list[int]:
        """Leave out the layers whose inputs have another order than the examples, with one warning."""
        strangers = out_of_order([layers[i] for i in known], self._capture.complete)
        if strangers and not self._said_out_of_order:
            self._said_out_of_order = not is_strict(self._strict)
            names = ", ".join(layers[i].name for i in known if layers[i] in strangers)
            self._fall_back(
                f"the inputs of {names} do not have the examples of the loss in their leading dimension: the "
                "trust region is measured without these layers. Examples must come first in every layer's "
                "input (batch_first=True)",
                above=9,
            )
        return [i for i in known if layers[i] not in strangers]

    def _clipped_step(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        states = [self.state[x.weight] for x in layers]
        directions, self._kept = clipped_directions(
            layers, states, [_grads(x) for x in layers], group["lr"], group["kl_clip"]
        )
        for layer, direction in zip(layers, directions, strict=True):
            # Steps, not directions: clipping bounds lr·D, so a direction that was clipped for one learning
            # rate must not be scaled by a later, larger one (a warm-up would undo the clip).
            for p, d in zip(layer.parameters, direction, strict=True):
                if p.grad is None:  # frozen after the optimizer was made
                    continue
                state, lr = self.state[p], beside(group["lr"], p)
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(d)
                step = state["momentum_buffer"].mul_(group["betas"][0]).add_(lr * d)
                p.mul_(1 - lr * group["weight_decay"]).sub_(step.to(p.dtype))


def _in_state_dtype(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, in fp32 where it has fewer bits."""
    grad = parameter.grad
    assert grad is not None, "asked only for parameters that have a gradient"
    return grad if grad.dtype in (torch.float32, torch.float64) else grad.float()


def _averages(state: Any, layer: KroneckerLayer) -> tuple[Tensor, Tensor | None]:
    """The averaged gradients of weight and bias; a bias that was frozen later has no part in the step."""
    weight = state[layer.weight]["exp_avg"]
    if layer.bias is None:
        return weight, None
    if layer.bias.grad is None:
        return weight, torch.zeros_like(layer.bias, dtype=weight.dtype)
    return weight, state[layer.bias]["exp_avg"]


def _grads(layer: KroneckerLayer) -> tuple[Tensor, Tensor | None]:
    if layer.bias is None:
        return _in_state_dtype(layer.weight), None
    if layer.bias.grad is None:
        return _in_state_dtype(layer.weight), torch.zeros_like(layer.bias)
    return _in_state_dtype(layer.weight), layer.bias.grad
