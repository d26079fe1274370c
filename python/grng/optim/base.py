# SPDX-License-Identifier: Apache-2.0
"""What all optimizers with Kronecker layers share: groups, routing, the AdamW fallback, state, reports."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from grng.curvature.capture import Capture
from grng.curvature.fisher import sampled_loss
from grng.curvature.layers import KroneckerLayer, find_layers

KRONECKER, ADAMW = "kronecker", "adamw"
ADAMW_BETAS, ADAMW_EPS = (0.9, 0.999), 1e-8


class PreconditionerError(RuntimeError):
    """The numerics failed too often in a row; the parameters are those of the last good step."""


def check_hyperparameter(
    owner: str, name: str, value: Any, *, low: float = 0.0, high: float = math.inf
) -> None:
    """Check a number in ``[low, high]``; a tensor (a learning rate) is taken as it is.

    Raises:
        ValueError: Out of range, NaN, or not a number.
    """
    if isinstance(value, Tensor):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        right = ")" if high == math.inf else "]"
        raise ValueError(
            f"{owner}: {name} must be a number in [{low}, {high}{right}, got {value!r}"
        )


class KroneckerOptimizer(Optimizer):
    """Base of the optimizers that precondition with Kronecker factors.

    A subclass implements :meth:`_update_layers`. Parameters that no supported layer owns form a second
    parameter group, ``kind="adamw"``, with its own learning rate: learning-rate schedulers scale both.

    State per parameter, all tensors or numbers: for a layer its factors, inverses and momentum under the
    weight; ``exp_avg``, ``exp_avg_sq``, ``step`` for AdamW. It keeps its dtype through ``load_state_dict``.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        *,
        adamw_lr: float,
        max_factor_dim: int,
        max_failures: int = 3,
    ) -> None:
        owner = type(self).__name__
        check_hyperparameter(owner, "adamw_lr", adamw_lr)
        check_hyperparameter(owner, "max_factor_dim", max_factor_dim, low=1)
        self._reasons: dict[nn.Parameter, str] = {}
        self._layers: list[KroneckerLayer] = []
        self._failures, self._max_failures = 0, max_failures
        self._fisher = "not yet"
        self._names: dict[nn.Parameter, str] = {}
        adamw_defaults = {"kind": ADAMW, "lr": adamw_lr}
        if isinstance(model, nn.Module):
            groups = self._groups_of(model, adamw_defaults, max_factor_dim)
        else:
            # Bare parameters: no module says what their gradients are made of.
            groups = [
                {**adamw_defaults, **g}
                if isinstance(g, dict)
                else {**adamw_defaults, "params": [g]}
                for g in _merge_tensors(model)
            ]
        super().__init__(groups, {"kind": KRONECKER, "step": 0, **defaults})
        self._capture = Capture(self._layers, self._statistics_due)

    def _groups_of(
        self, model: nn.Module, adamw_defaults: dict[str, Any], max_factor_dim: int
    ) -> list[dict[str, Any]]:
        self._layers, self._reasons = find_layers(model, max_factor_dim=max_factor_dim)
        self._names = {p: name for name, p in model.named_parameters()}
        groups = []
        if self._layers:
            owned = [p for layer in self._layers for p in layer.parameters]
            groups.append({"params": owned, "kind": KRONECKER})
        if self._reasons:
            groups.append({**adamw_defaults, "params": list(self._reasons)})
        if not groups:
            raise ValueError(f"{type(self).__name__}: the model has no trainable parameters")
        return groups

    # ---- statistics ----

    def observe(self, outputs: Tensor, *, likelihood: str = "categorical") -> None:
        """Sample labels from the model and take the statistics of their gradients (the true Fisher).

        Call it between the forward pass and ``loss.backward()``. It does nothing, at no cost, on steps
        that need no statistics, and never touches ``.grad`` or the global random state.

        Args:
            outputs: The model's outputs: logits ``[..., C]``, or means for ``likelihood="gaussian"``.
            likelihood: ``"categorical"`` or ``"gaussian"`` (unit variance).

        Raises:
            ValueError: Unknown likelihood, or ``outputs`` without a graph on a step that needs it.
        """
        if not self._statistics_due() or not self._layers:
            return
        if not outputs.requires_grad:
            raise ValueError("observe: outputs must be attached to the graph of the forward pass")
        generator = torch.Generator(device=outputs.device)
        # The step decides the labels: a resumed run draws what the uninterrupted one would.
        generator.manual_seed(self.param_groups[0]["step"])
        with torch.enable_grad():
            self._capture.observe(sampled_loss(outputs, likelihood, generator))

    def _statistics_due(self) -> bool:
        """Return whether the next step refreshes the curvature."""
        group = self.param_groups[0]
        return group["kind"] == KRONECKER and self._refresh_due(
            group["step"], group["refresh_every"]
        )

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gradients_are_finite():
            self._capture.clear()
            return loss
        for group in self.param_groups:
            if group["kind"] == KRONECKER:
                mine = set(group["params"])
                layers = [x for x in self._layers if x.weight in mine and x.weight.grad is not None]
                self._demote_silent(group, layers)
                layers = [x for x in layers if x in self._capture.records]
                if layers:
                    self._note_fisher(layers)
                    self._update_layers(group, layers)
            group["step"] += 1
        for group in self.param_groups:
            if group["kind"] == ADAMW:
                self._adamw_step(group)
        self._capture.clear()
        return loss

    def _update_layers(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        raise AssertionError("implemented by each optimizer")

    def _note_fisher(self, layers: list[KroneckerLayer]) -> None:
        sampled = {r.sampled for x in layers for r in self._capture.complete(x)}
        if sampled:
            self._fisher = (
                "sampled labels" if all(sampled) else "empirical: observe() was not called"
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
        flags = torch.isfinite(torch.stack([n.float().to(norms[0].device) for n in norms]))
        if bool(flags.all()):
            self._failures = 0
            return True
        self._failures += 1
        if self._failures > self._max_failures:
            bad = with_grad[int((~flags).nonzero()[0])]
            raise PreconditionerError(
                f"{type(self).__name__}: non-finite gradients in {self._failures} steps in a row, now at "
                f"step {self.param_groups[0]['step']}, first in {self._name_of(bad)} "
                f"{list(bad.shape)}; the parameters are unchanged since. Lower the learning rate, or look "
                "for the first non-finite loss."
            )
        return False

    def _demote_silent(self, group: dict[str, Any], layers: list[KroneckerLayer]) -> None:
        """Hand layers to AdamW whose module is bypassed: they get gradients, but their hooks never ran."""
        silent = [
            x
            for x in layers
            if "input_factor" not in self.state[x.weight] and not self._capture.complete(x)
        ]
        if not silent or not self._refresh_due(group["step"], group["refresh_every"]):
            return
        names = ", ".join(x.name for x in silent)
        warnings.warn(
            f"{type(self).__name__}: no statistics reached {names} although the gradient did (the module "
            "is bypassed, compiled before the optimizer was made, or recomputed): trained by AdamW",
            RuntimeWarning,
            stacklevel=3,
        )
        moved = {p for x in silent for p in x.parameters}
        self._layers = [x for x in self._layers if x not in silent]
        for x in silent:
            del self._capture.records[x]
            self._reasons.update({p: "its module's hooks never ran" for p in x.parameters})
        group["params"] = [p for p in group["params"] if p not in moved]
        target = next((g for g in self.param_groups if g["kind"] == ADAMW), None)
        if target is None:
            lr = self.defaults.get("adamw_lr", 1e-3)
            self.add_param_group({"params": list(moved), "kind": ADAMW, "lr": lr})
        else:
            target["params"].extend(moved)

    def _adamw_step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
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
            beta1=ADAMW_BETAS[0],
            beta2=ADAMW_BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=ADAMW_EPS,
            maximize=False,
        )

    # ---- state and reports ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; unlike the base class, keep the dtype of every tensor (fp32 factors)."""
        saved = state_dict["state"]
        super().load_state_dict(state_dict)
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        parameters = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(ids, parameters, strict=True):
            for key, value in saved.get(i, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.to(device=device, copy=True)

    def _name_of(self, parameter: nn.Parameter) -> str:
        return self._names.get(parameter, "a parameter")

    def explain(self) -> str:
        """Return a table: which parameters are trained how, with what factors, and why."""
        rows = [("parameter", "shape", "route", "factors", "why")]
        layers = {layer.weight: layer for layer in self._layers}
        biases = {layer.bias for layer in self._layers}
        for group in self.param_groups:
            for p in group["params"]:
                shape = "x".join(map(str, p.shape)) or "scalar"
                if p in layers:
                    out, inp = layers[p].sizes
                    rows.append(
                        (self._name_of(p), shape, KRONECKER, f"{out}x{out}, {inp}x{inp}", "Linear")
                    )
                elif p in biases:
                    rows.append(
                        (self._name_of(p), shape, KRONECKER, "", "last column of its weight")
                    )
                else:
                    why = self._reasons.get(p, "given as a bare parameter, without its module")
                    rows.append((self._name_of(p), shape, group["kind"], "", why))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        return "\n".join([*lines, f"Fisher: {self._fisher}"])


def _merge_tensors(params: Iterable[Any]) -> list[Any]:
    """Put bare tensors into one group; dict groups stay as they are."""
    items = list(params)
    bare = [p for p in items if not isinstance(p, dict)]
    named = [p for p in bare if isinstance(p, tuple)]
    groups: list[Any] = [p for p in items if isinstance(p, dict)]
    return ([{"params": [p[1] for p in named] if named else bare}] if bare else []) + groups
