# SPDX-License-Identifier: Apache-2.0
"""What all optimizers with Kronecker layers share: groups, routing, the AdamW fallback, state, reports."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grng.curvature.capture import Capture
from grng.curvature.find import find_layers
from grng.curvature.fisher import check_outputs, exact_losses, loss_terms, sampled_loss
from grng.curvature.layers import KroneckerLayer
from grng.optim.checks import check_hyperparameter
from grng.optim.factors import add_counters, factor_dtype
from grng.optim.grafting import adam_moments
from grng.optim.reporting import ReportingOptimizer
from grng.optim.strict import Strict, check_routes, check_strict, is_strict

KRONECKER, ADAMW = "kronecker", "adamw"
ADAMW_BETAS, ADAMW_EPS = (0.9, 0.999), 1e-8


class KroneckerOptimizer(ReportingOptimizer):
    """Base of the optimizers that precondition with Kronecker factors.

    A subclass implements :meth:`_update_layers`. Parameters that no supported layer owns form a second
    parameter group, ``kind="adamw"``, with its own learning rate: learning-rate schedulers scale both. It is
    there even when it is empty: layers whose statistics never come are trained with its settings, and stay
    in their group, so that groups and checkpoints keep their form. Parameters that are frozen when the
    optimizer is made are in no group: a later gradient of theirs is not used, with one warning.

    State per parameter, all tensors or numbers: for a layer its factors, inverses and momentum under the
    weight; ``exp_avg``, ``exp_avg_sq``, ``step`` for AdamW. It keeps its dtype through ``load_state_dict``.

    What a layer was fed is not copied: it must stay as it is until the step. Statistics of an input that was
    overwritten before it, as a static buffer is for the next micro-batch, are dropped, with one warning, and
    counted in ``factor_failures``.

    Under ``torch.compile`` statistics are taken between compiled parts: the graph breaks after each layer
    with curvature, and ``fullgraph=True`` is an error that says so. Make the optimizer before the first call
    of the compiled model; later, ``torch._dynamo.reset()`` lets the hooks be seen, else its layers are left
    to AdamW with a warning.

    ``torch.distributed.checkpoint`` fills a new optimizer by a step with zero gradients, to learn which
    tensors to read. That step changes nothing here, but makes no factors either, as nothing passes through
    the model: reading into a new optimizer needs the whole state dict, by ``load_state_dict`` or
    ``set_optimizer_state_dict``; reading in place (``dcp.load``) needs a training step before.
    """

    # Whether a factor may keep only its diagonal; else layers with larger ones are trained by AdamW.
    _diagonal_factors = True

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        *,
        adamw_lr: float,
        max_factor_dim: int,
        max_failures: int = 3,
        check_interval: int = 10,
        strict: Strict = False,
        fisher: str = "sampled",
    ) -> None:
        owner = type(self).__name__
        check_hyperparameter(owner, "adamw_lr", adamw_lr)
        check_hyperparameter(owner, "max_factor_dim", max_factor_dim, low=1)
        check_hyperparameter(owner, "max_failures", max_failures)
        check_hyperparameter(owner, "check_interval", check_interval, low=1)
        check_strict(owner, strict)
        self._reasons: dict[nn.Parameter, str] = {}
        self._layers: list[KroneckerLayer] = []
        self._cut_off: set[KroneckerLayer] = set()  # whose hooks went, as was said
        self._said_overwritten = False
        self._adamw_lr = adamw_lr
        self._observations = 0
        self._failures, self._max_failures = 0, max_failures
        self._check_interval, self._strict = check_interval, strict
        # How many failures strict does not mind: those before it was there to see them.
        self._excused: int | Tensor | None = 0
        self._kept: Tensor | None = None  # the part of the last step that was taken
        self._fisher_kind, self._fisher = fisher, "not yet"
        self._names: dict[nn.Parameter, str] = {}
        self._outside: list[nn.Parameter] = []  # frozen when the groups were made
        adamw_defaults = {"kind": ADAMW, "lr": adamw_lr}
        if isinstance(model, nn.Module):
            groups = self._groups_of(model, adamw_defaults, max_factor_dim)
        else:
            # Bare parameters: no module says what their gradients are made of.
            if is_strict(strict):
                raise ValueError(
                    f"{owner}: strict, but given parameters and not a model: AdamW would train all of them. "
                    f"Pass the model itself, {owner}(model)"
                )
            warnings.warn(
                f"{owner}: given parameters and not a model, which alone says what their gradients are made "
                f"of: all of them are trained by AdamW. Pass the model itself, {owner}(model), for curvature",
                UserWarning,
                stacklevel=3,
            )
            groups = [
                {**adamw_defaults, **g}
                if isinstance(g, dict)
                else {**adamw_defaults, "params": [g]}
                for g in _merge_tensors(model)
            ]
        super().__init__(groups, {"kind": KRONECKER, "step": 0, **defaults})
        self._all_layers = tuple(self._layers)
        self._capture = Capture(self._layers, self._statistics_wanted)

    def _groups_of(
        self, model: nn.Module, adamw_defaults: dict[str, Any], max_factor_dim: int
    ) -> list[dict[str, Any]]:
        self._layers, self._reasons = find_layers(
            model, max_factor_dim=max_factor_dim, diagonal=self._diagonal_factors
        )
        self._names = {p: name for name, p in model.named_parameters()}
        self._outside = [p for p in self._names if not p.requires_grad]
        groups = []
        if self._layers:
            owned = [p for layer in self._layers for p in layer.parameters]
            groups.append({"params": owned, "kind": KRONECKER})
        if self._layers or self._reasons:
            groups.append({**adamw_defaults, "params": list(self._reasons)})
        else:
            raise ValueError(f"{type(self).__name__}: the model has no trainable parameters")
        check_routes(type(self).__name__, model, self._reasons, self._names, self._strict)
        return groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: trained by AdamW, as their module is unknown, at ``adamw_lr`` if no lr is given."""
        if isinstance(param_group, dict) and "kind" not in param_group:
            param_group = {"kind": ADAMW, "lr": self._adamw_lr, **param_group}
        super().add_param_group(param_group)

    # ---- statistics ----

    def observe(self, outputs: Tensor, *, likelihood: str = "categorical") -> None:
        """Take the statistics of the Fisher information under the model's own predictions.

        Call it between the forward pass and ``loss.backward()``. It does nothing, at no cost, on steps
        that need no statistics, and never touches ``.grad`` or the global random state. With
        ``fisher="empirical"`` it only tells how many terms the loss has.

        A model with several heads: one call for the outputs of each, before the first ``backward``, where the
        loss is the sum of their mean losses. Micro-batches: one call for each. Several optimizers on one
        model: one call of each. Outputs that are given again do not count again.

        Args:
            outputs: The model's outputs, one loss term for each leading index: logits ``[..., C]``, or means
                for ``likelihood="gaussian"``. One number for each example is ``[N, 1]``; ``[C]`` are the
                outputs of one example, where every layer was fed one example.
            likelihood: ``"categorical"`` or ``"gaussian"`` (unit variance).

        Raises:
            TypeError: ``outputs`` is no tensor of a floating-point dtype.
            ValueError: Unknown likelihood, a wrong shape, or ``outputs`` without a graph, on a step that
                needs it.
        """
        if not self._capture.waiting():
            return
        check_outputs(outputs, likelihood)
        if not outputs.requires_grad:
            raise ValueError("observe: outputs must be attached to the graph of the forward pass")
        if outputs.dim() == 1 and self._capture.is_batched():
            raise ValueError(
                "observe: outputs must have shape [..., C], one term of the loss for each leading index, got "
                f"{list(outputs.shape)}: for one output per example give outputs.unsqueeze(-1), for one "
                "example of C outputs outputs.unsqueeze(0)"
            )
        if not self._capture.is_new(outputs):
            return
        if self._fisher_kind == "empirical":
            self._capture.announce(loss_terms(outputs))
            return
        generator = torch.Generator(device=outputs.device)
        # The step decides the labels: a resumed run draws what the uninterrupted one would. Micro-batches
        # of one step draw different ones: far apart, and in the low 32 bits, all that a CPU generator takes.
        generator.manual_seed(self.param_groups[0]["step"] + self._observations * 0x9E3779B9)
        self._observations += 1
        with torch.enable_grad():
            if self._fisher_kind == "exact":
                losses = exact_losses(outputs, likelihood, generator)
            else:
                losses = [sampled_loss(outputs, likelihood, generator)]
            self._capture.observe(losses, loss_terms(outputs))

    def _statistics_wanted(self, layer: KroneckerLayer) -> bool:
        """Return whether the next step refreshes the curvature of this layer, or it has none yet."""
        return self._is_trained(layer) and (
            self._is_due(layer, self.param_groups[0]) or not self._has_curvature(layer)
        )

    def _is_due(self, layer: KroneckerLayer, group: dict[str, Any]) -> bool:
        """Return whether the schedule refreshes a layer, or has missed it as the layer was not used then."""
        step, every = group["step"], group["refresh_every"]
        updated = self.state.get(layer.weight, {}).get("updated_at", step)
        return self._refresh_due(step, every) or step - updated >= every

    def _is_trained(self, layer: KroneckerLayer) -> bool:
        return layer in self._layers and layer.weight.requires_grad

    @staticmethod
    def _refresh_due(step: int, refresh_every: int) -> bool:
        # Early factors rest on few batches and age fast: refresh after 1, 2, 4, ... steps at first.
        return step % refresh_every == 0 or (step < refresh_every and step & (step - 1) == 0)

    # ---- step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one optimization step.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.

        Returns:
            What the closure returned, or None.

        Raises:
            PreconditionerError: Non-finite gradients for more than ``max_failures`` steps in a row.
                Inversions of one matrix that failed more than ``max_failures`` times in a row; with
                ``strict`` every fallback.
            RuntimeError: The model was moved or cast after the optimizer got its state, or a gradient is
                sparse; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_places()
        self._check_outside()
        if not self._is_in_order():
            self._forget()
            return loss
        curved: set[nn.Parameter] = set()
        for group in self.param_groups:
            if group["kind"] == KRONECKER:
                overwritten = self._find_overwritten()
                idle = self._demote_silent()
                layers = [x for x in self._layers if x.weight.grad is not None]
                curved.update(p for x in layers for p in x.parameters)
                layers = [x for x in layers if x not in idle]
                if layers:
                    self._note_fisher(layers)
                    self._update_layers(group, layers)
                for x, count in overwritten.items():
                    if self._has_curvature(x):
                        self.state[x.weight]["factor_failures"] += count
            group["step"] += 1
        left = [
            p
            for g in self.param_groups
            if g["kind"] == KRONECKER
            for p in g["params"]
            if p not in curved
        ]
        for group in self.param_groups:
            if group["kind"] == ADAMW:
                # Layers without statistics share the settings of the first such group.
                self._adamw_step(group, [*group["params"], *left])
                left = []
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; statistics of those that no step used go with the next forward pass."""
        super().zero_grad(set_to_none)
        self._capture.outdate()

    def _forget(self) -> None:
        self._capture.clear()
        self._observations = 0

    def _update_layers(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        raise AssertionError("implemented by each optimizer")

    def _note_fisher(self, layers: list[KroneckerLayer]) -> None:
        sampled = {r.sampled for x in layers for r in self._capture.complete(x)}
        if sampled:
            if self._fisher_kind == "empirical":
                self._fisher = "empirical, as asked for"
            elif all(sampled):
                self._fisher = "exact" if self._fisher_kind == "exact" else "sampled labels"
            else:
                self._fisher = "empirical: observe() was not called, or could not reach all layers"
                if is_strict(self._strict):
                    self._fall_back(
                        'the statistics are of the gradients of the loss, as with fisher="empirical": '
                        "observe() was not called, or could not reach all layers",
                        above=4,
                    )

    def _check_places(self) -> None:
        """Check that the factors still are where, and as wide as, their weights want them; and the gradients.

        Raises:
            RuntimeError: They are not, or a gradient is sparse.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__}: the gradient of {self._name_of(p)} is sparse: sparse "
                        "gradients are not supported (make the nn.Embedding with sparse=False)"
                    )
        for x in self._layers:
            factor = self.state.get(x.weight, {}).get("input_factor")
            if factor is None or x.weight.grad is None:
                continue
            weight = x.weight
            if factor.device != weight.device or factor.dtype != factor_dtype(x):
                raise RuntimeError(
                    f"{type(self).__name__}: {x.name} ({weight.dtype}, {weight.device}) was moved or cast "
                    f"after the optimizer got its state ({factor.dtype}, {factor.device}); make the "
                    "optimizer after that, or load its state_dict into a new one"
                )

    def _adamw_step(self, group: dict[str, Any], candidates: list[nn.Parameter]) -> None:
        params: list[Tensor] = [p for p in candidates if p.grad is not None]
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        betas = group.get("betas", ADAMW_BETAS)
        wide = [p for p in params if self.state[p]["exp_avg"].dtype != p.dtype]
        if wide:
            # Moments in fp32 of narrower parameters, from when curvature trained them.
            self._wide_adamw_step(group, wide, betas)
            params = [p for p in params if self.state[p]["exp_avg"].dtype == p.dtype]
        if not params:
            return
        adamw(
            params,
            [cast(Tensor, p.grad) for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=ADAMW_EPS,
            maximize=False,
        )

    def _wide_adamw_step(
        self, group: dict[str, Any], params: list[Tensor], betas: tuple[float, float]
    ) -> None:
        states = [self.state[p] for p in params]
        grads = [
            cast(Tensor, p.grad).to(s["exp_avg"].dtype) for p, s in zip(params, states, strict=True)
        ]
        _, updates = adam_moments(states, grads, betas, ADAMW_EPS)
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_((group["lr"] * update).to(p.dtype))

    # ---- state and reports ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; unlike the base class, keep the dtype of every tensor (fp32 factors).

        Only factors take another dtype, where the weights have changed between fp64 and a narrower one. What
        an older version did not save starts anew: settings as given to the constructor, counters, and
        momentum of another form.

        Raises:
            ValueError: Other parameter groups, or factors of another size than the layers have. Nothing is
                loaded then.
        """
        given = state_dict["param_groups"]
        if len(given) == len(self.param_groups):
            groups = [{**mine, **g} for mine, g in zip(self.param_groups, given, strict=True)]
            state_dict = {**state_dict, "param_groups": groups}
        saved = state_dict["state"]
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        parameters = [p for g in self.param_groups for p in g["params"]]
        self._check_sizes(dict(zip(parameters, (saved.get(i, {}) for i in ids), strict=False)))
        super().load_state_dict(state_dict)
        parameters = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(ids, parameters, strict=True):
            for key, value in saved.get(i, {}).items():
                if isinstance(value, Tensor):
                    device = torch.device("cpu") if key == "step" else p.device
                    self.state[p][key] = value.to(device=device, copy=True)
            momentum = self.state[p].get("momentum_buffer")
            if momentum is not None and momentum.shape != p.shape:
                del self.state[p]["momentum_buffer"]
        self._forget()
        self._failures, self._excused = 0, None
        for layer in self._all_layers:
            state = self.state.get(layer.weight, {})
            if "input_factor" in state:
                add_counters(layer, state)
                for key, value in state.items():
                    if key.startswith(("output_", "input_")) and value.is_floating_point():
                        state[key] = value.to(factor_dtype(layer))
        # What AdamW has trained so far stays with it, and what has curvature keeps it.
        self._layers = list(self._all_layers)
        states = {x: self.state.get(x.weight, {}) for x in self._layers}
        self._demote([x for x, s in states.items() if "exp_avg" in s and "input_factor" not in s])

    def _check_sizes(self, states: dict[nn.Parameter, dict[str, Any]]) -> None:
        for layer in self._all_layers:
            state = states.get(layer.weight, {})
            for i, key in enumerate(("output_factor", "input_factor")):
                shape = layer.factor_shape(i)
                if key in state and state[key].shape != shape:
                    raise ValueError(
                        f"{type(self).__name__}: {key} of {layer.name} must have shape {list(shape)}, "
                        f"the state dict has {list(state[key].shape)}"
                    )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks and what they recorded: copy or pickle it together with its model.

        Of an optimizer alone a copy has its own copy of the modules with curvature.
        """
        # A scheduler puts a step on the instance that is bound to it: the copy's would step the original.
        # Hooks on steps are left behind by every torch optimizer.
        left = {"step", "_capture"}
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in left and not name.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the modules that came with the copy."""
        super().__setstate__(state)
        self._capture = Capture(list(self._all_layers), self._statistics_wanted)


def _merge_tensors(params: Iterable[Any]) -> list[Any]:
    """Put bare or named tensors into one group; dict groups stay as they are."""
    items = list(params)
    bare = [p[1] if isinstance(p, tuple) else p for p in items if not isinstance(p, dict)]
    groups: list[Any] = [p for p in items if isinstance(p, dict)]
    return ([{"params": bare}] if bare else []) + groups
