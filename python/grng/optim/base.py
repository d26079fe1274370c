# SPDX-License-Identifier: Apache-2.0
"""What all optimizers with Kronecker layers share: groups, routing, the AdamW fallback, state, reports."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature.capture import Capture
from grng.curvature.find import find_layers
from grng.curvature.fisher import check_outputs, exact_losses, loss_terms, sampled_loss
from grng.curvature.layers import KroneckerLayer
from grng.optim.ascent import ascending, check_maximize
from grng.optim.checks import PreconditionerError, check_hyperparameter, check_rates
from grng.optim.devices import refuse_graph_capture
from grng.optim.factors import SIDES, State, add_counters, factor_dtype, new_factors
from grng.optim.fallback import adamw_step
from grng.optim.grafting import new_moments
from grng.optim.reporting import ReportingOptimizer
from grng.optim.strict import Strict, check_routes, check_strict, is_strict
from grng.optim.undo import undone_on_error

KRONECKER, ADAMW = "kronecker", "adamw"


class KroneckerOptimizer(ReportingOptimizer):
    """Base of the optimizers that precondition with Kronecker factors.

    A subclass implements :meth:`_update_layers`. Parameters that no supported layer owns form a second
    parameter group, ``kind="adamw"``, with its own learning rate: learning-rate schedulers scale both. It is
    there even when it is empty: layers whose statistics never come are trained with its settings, and stay
    in their group, so that groups and checkpoints keep their form. Parameters that are frozen when the
    optimizer is made are in no group: a later gradient of theirs is not used, with one warning.

    State per parameter, all tensors or numbers: for a layer its factors, inverses, how these came about (see
    :mod:`grng.optim.inversions`), and momentum, under the weight; ``exp_avg``, ``exp_avg_sq``, ``step`` for
    AdamW. It keeps its dtype through ``load_state_dict``.

    What a layer was fed is not copied: it must stay as it is until the step. Statistics of an input that was
    overwritten before it, as a static buffer is for the next micro-batch, are dropped, with one warning, and
    counted in ``factor_failures``.

    Under ``torch.compile`` statistics are taken between compiled parts: the graph breaks after each layer
    with curvature, and ``fullgraph=True`` is an error that says so. Make the optimizer before the first call
    of the compiled model; later, ``torch._dynamo.reset()`` lets the hooks be seen, else its layers are left
    to AdamW with a warning.

    ``torch.distributed.checkpoint`` makes a step with zero gradients at no learning rate, to learn which
    tensors a new optimizer has. It gets the form of the state of all layers and parameters to read into, by
    ``dcp.load`` too; nothing of that counts as a step. A checkpoint is read in place where every layer was
    used before it was saved. Flat, torch can read no parameter group without parameters, as is that of AdamW
    where layers have all parameters.

    The step counts and the schedule of refreshes live on the host: a step cannot be captured into a CUDA
    graph, and says so.
    """

    # Whether a factor may keep only its diagonal; else layers with larger ones are trained by AdamW.
    _diagonal_factors = True
    # Whether damping is relative to the norm of a factor, which the state then has a vector for.
    _spectral_damping = True

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        *,
        adamw_lr: float | Tensor,
        max_factor_dim: int,
        maximize: bool,
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
        check_maximize(owner, maximize)
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
            groups = _bare_groups(model, adamw_defaults)
        super().__init__(groups, {"kind": KRONECKER, "step": 0, **defaults, "maximize": maximize})
        self._all_layers = tuple(self._layers)
        self._layer_of = {x.weight: x for x in self._all_layers}
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
            lr = self._adamw_lr
            # A scheduler writes into a tensor: each group has its own.
            param_group = {
                "kind": ADAMW,
                "lr": lr.clone() if isinstance(lr, Tensor) else lr,
                **param_group,
            }
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
            ValueError: A learning rate is no finite number any more; nothing is changed.
        """
        refuse_graph_capture(type(self).__name__)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif not self._capture.has_passed() and self._rehearse_if_asked():
            return None
        self._drop_rehearsal()
        check_rates(type(self).__name__, self.param_groups)
        self._check_places()
        self._check_outside()
        if not self._is_in_order():
            self._forget()
            return loss
        with ascending(self.param_groups):
            self._update()
        self._forget()
        return loss

    def _update(self) -> None:
        curved: set[nn.Parameter] = set()
        for group in self.param_groups:
            if group["kind"] == KRONECKER:
                # Not what follows: what AdamW does not find memory for, the layers have moved without.
                with undone_on_error(self.state, but=PreconditionerError):
                    curved = self._curved_step(group)
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

    def _curved_step(self, group: dict[str, Any]) -> set[nn.Parameter]:
        """Make the step of the layers; return their parameters."""
        overwritten = self._find_overwritten()
        idle = self._demote_silent()
        layers = [x for x in self._layers if x.weight.grad is not None]
        curved = {p for x in layers for p in x.parameters}
        layers = [x for x in layers if x not in idle]
        if layers:
            self._note_fisher(layers)
            self._update_layers(group, layers)
        for x, count in overwritten.items():
            if self._has_curvature(x):
                self.state[x.weight]["factor_failures"] += count
        return curved

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; statistics of those that no step used go with the next forward pass."""
        super().zero_grad(set_to_none)
        self._capture.outdate()
        if not self._capture.waiting():
            # After a step that was skipped the next one draws the labels that it would have drawn.
            self._observations = 0

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
                        above=5,
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
        adamw_step(self.state, group, candidates)

    # ---- state and reports ----

    def _accepted(self, parameter: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        """See the base class; only factors take another dtype, where weights changed to or from fp64.

        What an older version did not save starts anew: counters, and momentum of another form.

        Raises:
            ValueError: Moments or factors that are not whole, or of another size.
        """
        layer = self._layer_of.get(parameter)
        shapes = {} if layer is None else self._factor_shapes(layer)
        if layer is not None and self._check_together(parameter, saved, shapes):
            for key, shape in shapes.items():
                self._check_shape(key, parameter, saved[key], shape)
                saved[key] = saved[key].to(factor_dtype(layer))
            add_counters(layer, saved)
        if self._check_together(parameter, saved, ("step", "exp_avg", "exp_avg_sq")):
            for key in ("exp_avg", "exp_avg_sq"):
                self._check_shape(key, parameter, saved[key], parameter.shape)
            if not isinstance(saved["step"], Tensor):  # as it was in older versions of torch
                saved["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32)
        momentum = saved.get("momentum_buffer")
        if "momentum_buffer" in saved and getattr(momentum, "shape", None) != parameter.shape:
            del saved["momentum_buffer"]
        return saved

    def _factor_shapes(self, layer: KroneckerLayer) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, side in enumerate(SIDES):
            shape = layer.factor_shape(i)
            shapes |= {f"{side}_factor": shape, f"{side}_inverse": shape, f"{side}_residual": ()}
            if self._spectral_damping and not layer.diagonal[i]:
                shapes[f"{side}_vector"] = shape[:-1]
        return shapes

    def _after_loading(self) -> None:
        super()._after_loading()
        self._forget()
        self._failures, self._excused = 0, None
        # What AdamW has trained so far stays with it, and what has curvature keeps it.
        self._layers = list(self._all_layers)
        states = {x: self.state.get(x.weight, {}) for x in self._layers}
        self._demote([x for x, s in states.items() if "exp_avg" in s and "input_factor" not in s])
        for state in states.values():
            if "input_factor" in state:  # an older version did not say when
                state.setdefault(
                    "inverted_at", state.get("updated_at", self.param_groups[0]["step"])
                )

    def _rehearse(self) -> None:
        """Give the state the form that it will have; see :mod:`grng.optim.rehearsal`."""
        owned = {p for x in self._layers for p in x.parameters}
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            if p not in owned:
                self.state[p] = new_moments(p)
        for layer in (x for x in self._layers if x.weight.grad is not None):
            self.state[layer.weight] = self._new_state(layer)
            for p in (p for p in layer.parameters if p.grad is not None):
                self.state[p].update(self._new_momentum(p))

    def _new_state(self, layer: KroneckerLayer) -> State:
        """Return the state of a layer before its first statistics."""
        group = self.param_groups[0]
        never = group["step"] - group["refresh_every"]
        return {**new_factors(layer, spectral=self._spectral_damping), "inverted_at": never}

    def _new_momentum(self, parameter: nn.Parameter) -> State:
        # What a parameter with curvature has besides, before its first step.
        raise AssertionError("implemented by each optimizer")

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


def _bare_groups(params: Iterable[Any], settings: dict[str, Any]) -> Any:
    """Return parameter groups as torch takes them, with what AdamW's groups have besides."""
    if isinstance(params, Tensor):
        return params  # torch says what is wrong
    items = list(params)
    if items and not isinstance(items[0], dict):
        items = [{"params": items}]
    return [{**settings, **g} if isinstance(g, dict) else g for g in items]
