# SPDX-License-Identifier: Apache-2.0
"""What all optimizers with Kronecker layers share: groups, routing, the AdamW fallback, state, reports."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from grng.curvature.capture import Capture
from grng.curvature.find import find_layers
from grng.curvature.fisher import check_outputs, exact_losses, loss_terms, sampled_loss
from grng.curvature.layers import KroneckerLayer
from grng.optim.ascent import ascending, check_maximize
from grng.optim.devices import refuse_graph_capture, stacked
from grng.optim.factors import COUNTERS, SIDES, State, add_counters, factor_dtype, new_factors
from grng.optim.fallback import adamw_step
from grng.optim.grafting import new_moments
from grng.optim.rehearsal import Rehearsing
from grng.optim.undo import undone_on_error

KRONECKER, ADAMW = "kronecker", "adamw"
COUNTS = ("refresh_every", "max_factor_dim", "max_rows", "max_failures")


class PreconditionerError(RuntimeError):
    """The numerics failed too often in a row; the parameters are those of the last good step."""


def check_hyperparameter(
    owner: str, name: str, value: Any, *, low: float = 0.0, high: float = math.inf
) -> None:
    """Check a number in ``[low, high]``; a learning rate may also be a tensor, 0-d.

    Raises:
        ValueError: Out of range, NaN, or not a number; not a whole number for a count.
    """
    number = value
    if isinstance(value, Tensor) and name in ("lr", "adamw_lr"):
        if value.dim() > 0:
            raise ValueError(
                f"{owner}: {name} must be a number or 0-d, got shape {list(value.shape)}: "
                "a Tensor lr must be 1-element, without dimensions"
            )
        number = float(value)
    right = ")" if high == math.inf else "]"
    known = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not (known and math.isfinite(number) and low <= number <= high):
        raise ValueError(
            f"{owner}: {name} must be a number in [{low}, {high}{right}, got {value!r}"
        )
    if name in COUNTS and not isinstance(value, int):
        raise ValueError(
            f"{owner}: {name} must be a whole number in [{low}, {high}{right}, got {value!r}"
        )


def check_betas(owner: str, betas: Any) -> None:
    """Check AdamW's pair of decays.

    Raises:
        ValueError: Not two numbers in ``[0, 1)``.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{owner}: betas must be two numbers in [0, 1), got {betas!r}")
    for i, value in enumerate(betas):
        check_hyperparameter(owner, f"betas[{i}]", value, high=1 - 1e-9)


class KroneckerOptimizer(Rehearsing):
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
        fisher: str = "sampled",
    ) -> None:
        owner = type(self).__name__
        check_hyperparameter(owner, "adamw_lr", adamw_lr)
        check_hyperparameter(owner, "max_factor_dim", max_factor_dim, low=1)
        check_maximize(owner, maximize)
        self._reasons: dict[nn.Parameter, str] = {}
        self._layers: list[KroneckerLayer] = []
        self._cut_off: set[KroneckerLayer] = set()  # whose hooks went, as was said
        self._said_overwritten = False
        self._adamw_lr = adamw_lr
        self._observations = 0
        self._failures, self._max_failures = 0, max_failures
        self._fisher_kind, self._fisher = fisher, "not yet"
        self._names: dict[nn.Parameter, str] = {}
        self._outside: list[nn.Parameter] = []  # frozen when the groups were made
        adamw_defaults = {"kind": ADAMW, "lr": adamw_lr}
        if isinstance(model, nn.Module):
            groups = self._groups_of(model, adamw_defaults, max_factor_dim)
        else:
            # Bare parameters: no module says what their gradients are made of.
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

    def _has_curvature(self, layer: KroneckerLayer) -> bool:
        return not self._rehearsed and "input_factor" in self.state.get(layer.weight, {})

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
            RuntimeError: The model was moved or cast after the optimizer got its state, or a gradient is
                sparse; nothing is changed.
        """
        refuse_graph_capture(type(self).__name__)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif not any(self._capture.records.values()) and self._rehearse_if_asked():
            return None
        self._drop_rehearsal()
        self._check_places()
        self._check_outside()
        if not self._gradients_are_finite():
            self._forget()
            return loss
        with ascending(self.param_groups), undone_on_error(self.state, but=PreconditionerError):
            self._update()
        self._forget()
        return loss

    def _update(self) -> None:
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

    def _check_outside(self) -> None:
        """Warn once of parameters of the model that have a gradient and are in no group."""
        found = [p for p in self._outside if p.grad is not None and p.requires_grad]
        if found:
            inside = {p for g in self.param_groups for p in g["params"]}
            found = [p for p in found if p not in inside]
        if found:
            self._outside = []
            names = [self._name_of(p) for p in found]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            warnings.warn(
                f"{type(self).__name__}: {', '.join(names[:5])}{more} had requires_grad=False when the "
                "optimizer was made, and are not trained: make it after unfreezing, or give them to "
                "add_param_group, to be trained by AdamW",
                UserWarning,
                stacklevel=5,
            )

    def _gradients_are_finite(self) -> bool:
        """Check all gradients, with one wait for the device; a bad step changes nothing and is counted.

        Raises:
            PreconditionerError: The last of too many bad steps in a row.
        """
        with_grad = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not with_grad:
            return True
        norms = torch._foreach_norm([cast(Tensor, p.grad) for p in with_grad])
        flags = torch.isfinite(stacked(norms))
        if not bool(flags.all()):
            # A norm can leave the range of its dtype where no element does.
            exact = [torch.isfinite(cast(Tensor, p.grad)).all() for p in with_grad]
            flags = stacked(exact)
        if bool(flags.all()):
            self._failures = 0
            return True
        self._failures += 1
        if self._failures > self._max_failures:
            bad = with_grad[int((~flags).nonzero()[0])]
            self._forget()
            raise PreconditionerError(
                f"{type(self).__name__}: non-finite gradients in {self._failures} steps in a row, now at "
                f"step {self.param_groups[0]['step']}, first in {self._name_of(bad)} "
                f"{list(bad.shape)}; the parameters are unchanged since. Lower the learning rate, or look "
                "for the first non-finite loss."
            )
        return False

    def _find_overwritten(self) -> dict[KroneckerLayer, int]:
        """Return how many inputs of each layer were overwritten, where any was; warn once."""
        counts = {x: self._capture.overwritten(x) for x in self._layers}
        found = {x: count for x, count in counts.items() if count}
        if found and not self._said_overwritten:
            self._said_overwritten = True
            warnings.warn(
                f"{type(self).__name__}: the input of {', '.join(x.name for x in found)} was changed in "
                "place between the forward pass and step(): its statistics are dropped. Give the model a new "
                "tensor, or a clone() of a static buffer",
                RuntimeWarning,
                stacklevel=6,
            )
        return found

    def _demote_silent(self) -> list[KroneckerLayer]:
        """Find layers whose hooks never ran although they were used: they get gradients, but no statistics.

        Without factors they are left to AdamW; those that have some keep them as they are. One warning each.

        Returns:
            The layers without factors whose hooks did not run because they were not used: their gradients are
            all zero, and the step leaves them as they are.
        """
        silent = [
            x
            for x in self._layers
            if x.weight.grad is not None
            and not self._capture.complete(x)
            and not self._capture.only_empty(x)
            and x not in self._cut_off
            and not (self._has_curvature(x) and self._capture.overwritten(x))
            and (self._statistics_wanted(x) or not self._has_curvature(x))
        ]
        if not silent:
            return []
        flags = [
            torch.stack([p.grad.any() for p in x.parameters if p.grad is not None]).any()
            for x in silent
        ]
        used = torch.stack(
            [f.to(flags[0].device) for f in flags]
        ).tolist()  # one wait for the device
        idle = [
            x for x, flag in zip(silent, used, strict=True) if not (flag or self._has_curvature(x))
        ]
        silent = [x for x, flag in zip(silent, used, strict=True) if flag]
        old = [x for x in silent if self._has_curvature(x)]
        new = [x for x in silent if x not in old]
        owner = type(self).__name__
        if old:
            self._cut_off.update(old)
            warnings.warn(
                f"{owner}: no new statistics reach {', '.join(x.name for x in old)}: their factors stay as "
                "they are (the hooks were removed, or the module is bypassed now)",
                RuntimeWarning,
                stacklevel=6,
            )
        if new:
            warnings.warn(
                f"{owner}: no statistics reached {', '.join(x.name for x in new)} although the gradient did "
                "(the module is bypassed, compiled before the optimizer was made, or recomputed; the "
                "forward pass ran before the optimizer was made; its input was overwritten; or the hooks "
                "were removed): trained by AdamW",
                RuntimeWarning,
                stacklevel=6,
            )
            self._demote(new)
        return idle

    def _demote(self, layers: list[KroneckerLayer]) -> None:
        self._layers = [x for x in self._layers if x not in layers]
        for x in layers:
            spoiled = self._capture.overwritten(x)
            why = "its input was overwritten" if spoiled else "its module's hooks never ran"
            self._reasons.update({p: why for p in x.parameters})

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
        self._failures = 0
        # What AdamW has trained so far stays with it, and what has curvature keeps it.
        self._layers = list(self._all_layers)
        states = {x: self.state.get(x.weight, {}) for x in self._layers}
        self._demote([x for x, s in states.items() if "exp_avg" in s and "input_factor" not in s])

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
        return new_factors(layer, spectral=self._spectral_damping)

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

    def explain(self) -> str:
        """Return a table: which parameters are trained how, with what factors, and why."""
        rows = [("parameter", "shape", "route", "factors", "why")]
        layers = {layer.weight: layer for layer in self._layers}
        biases = {layer.bias for layer in self._layers}
        for group in self.param_groups:
            for p in group["params"]:
                shape = _shape_text(p)
                if p in layers:  # demoted layers are not among them
                    layer = layers[p]
                    factors = ", ".join(_factor_text(layer, side) for side in (0, 1))
                    rows.append((self._name_of(p), shape, KRONECKER, factors, layer.kind))
                elif p in biases:
                    rows.append(
                        (self._name_of(p), shape, KRONECKER, "", "last column of its weight")
                    )
                else:
                    why = self._reasons.get(p, "given as a bare parameter, without its module")
                    rows.append((self._name_of(p), shape, ADAMW, "", why))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        return "\n".join([*lines, f"Fisher: {self._fisher}"])

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
                for key in ("input_residual", "output_residual", *COUNTERS):
                    report[f"{layer.name}/{key}"] = float(state[key])
        return report


def _shape_text(parameter: nn.Parameter) -> str:
    if isinstance(parameter, UninitializedParameter):
        return "unknown"
    return "x".join(map(str, parameter.shape)) or "scalar"


def _factor_text(layer: KroneckerLayer, side: int) -> str:
    n = layer.sizes[side]
    text = f"{n} (diagonal)" if layer.diagonal[side] else f"{n}x{n}"
    return text if layer.blocks == 1 else f"{layer.blocks} of {text}"


def _bare_groups(params: Iterable[Any], settings: dict[str, Any]) -> Any:
    """Return parameter groups as torch takes them, with what AdamW's groups have besides."""
    if isinstance(params, Tensor):
        return params  # torch says what is wrong
    items = list(params)
    if items and not isinstance(items[0], dict):
        items = [{"params": items}]
    return [{**settings, **g} if isinstance(g, dict) else g for g in items]
