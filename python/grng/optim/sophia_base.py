# SPDX-License-Identifier: Apache-2.0
"""What the two Sophias share: momentum over a diagonal estimate of the Hessian, clipped elementwise."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from grng.optim.ascent import ascending, check_maximize
from grng.optim.checks import PreconditionerError, check_hyperparameter
from grng.optim.devices import refuse_graph_capture, scale_
from grng.optim.finite import all_finite
from grng.optim.parameters import (
    check_dense,
    check_place,
    gradient_marks,
    take_back_unless_floating,
    trainable,
)
from grng.optim.rehearsal import Rehearsing
from grng.optim.undo import undone_on_error
from grng.reports.diagonal import explain, read
from grng.reports.memory import MemoryEstimate, estimate, planned
from grng.reports.text import Report

MAX_FAILURES = 3


class SophiaOptimizer(Rehearsing):
    """What the two Sophias share; see :class:`grng.SophiaG`. A subclass implements ``observe``.

    State per parameter: ``exp_avg`` and ``hessian``, in fp32 (fp64 for fp64 parameters) whatever the dtype
    of the parameter, and kept so by ``load_state_dict``. The first parameter group also counts: ``step``,
    ``next_refresh``, ``skipped_steps``, ``dropped_statistics``. As that is on the host, a step cannot be
    captured into a CUDA graph, and says so.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor,
        *,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        weight_decay: float,
        refresh_every: int,
        maximize: bool,
    ) -> None:
        owner = type(self).__name__
        check_maximize(owner, maximize)
        check_hyperparameter(owner, "lr", lr)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{owner}: betas must be two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check_hyperparameter(owner, f"betas[{i}]", beta, high=1 - 1e-9)
        check_hyperparameter(owner, "gamma", gamma, low=1e-30)
        check_hyperparameter(owner, "eps", eps, low=1e-30)
        check_hyperparameter(owner, "weight_decay", weight_decay)
        check_hyperparameter(owner, "refresh_every", refresh_every, low=1)
        params, self._names = trainable(owner, model)
        # Of the forward passes since the last step: what their statistics add up to.
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._terms, self._observations = 0, 0
        self._gradients_seen: list[tuple[int, int]] = []  # when the first of them came
        self._failures = 0
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            gamma=gamma,
            eps=eps,
            weight_decay=weight_decay,
            refresh_every=refresh_every,
            step=0,
            next_refresh=0,
            skipped_steps=0,
            dropped_statistics=0,
            maximize=maximize,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for any torch optimizer.

        Raises:
            TypeError: A parameter of a dtype that is not real floating-point.
        """
        super().add_param_group(param_group)
        take_back_unless_floating(self)

    # ---- statistics ----

    def _is_wanted(self) -> bool:
        # At the first chance once it is due: a step without observe() does not cost a whole period.
        group = self.param_groups[0]
        return bool(group["step"] >= group["next_refresh"])

    def _trained(self) -> list[nn.Parameter]:
        return [p for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _add(self, parameter: nn.Parameter, value: Tensor) -> None:
        if not self._sums:
            self._gradients_seen = gradient_marks(self.param_groups)
        value = value.detach().to(state_dtype(parameter))
        known = self._sums.get(parameter)
        self._sums[parameter] = value if known is None else known.add_(value)

    def _estimates(self) -> dict[nn.Parameter, Tensor]:
        # The diagonal of the Hessian as observed since the last step, by parameter.
        raise AssertionError("implemented by each optimizer")

    def _forget(self) -> None:
        self._sums = {}
        self._terms, self._observations = 0, 0

    # ---- step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one optimization step.

        A step with NaN or infinity in a gradient changes nothing and is counted; statistics with NaN or
        infinity in them are dropped and counted. One wait for the device finds both.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.

        Returns:
            What the closure returned, or None.

        Raises:
            PreconditionerError: Non-finite gradients for more than 3 steps in a row.
            RuntimeError: A sparse gradient; or the model was moved or cast after the optimizer got its state.
        """
        refuse_graph_capture(type(self).__name__)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif not self._sums and self._rehearse_if_asked():
            return None
        self._drop_rehearsal()
        estimates = self._estimates()
        with_grad = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        self._check_places(with_grad)
        good, usable = all_finite([_grad(p) for p in with_grad], list(estimates.values()))
        first = self.param_groups[0]
        if not usable:
            first["dropped_statistics"] += 1
        if not good:
            self._forget()
            first["skipped_steps"] += 1
            self._note_failure(with_grad)
            return loss
        self._failures = 0
        with (
            ascending(self.param_groups),
            undone_on_error(self.state, but=PreconditionerError),
        ):
            if estimates and usable:
                self._update_hessian(estimates)
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._update(group, params)
        if estimates and usable:
            first["next_refresh"] = first["step"] + first["refresh_every"]
        first["step"] += 1
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop the statistics that came before those that no step used."""
        if self._sums and self._gradients_seen != gradient_marks(self.param_groups):
            # A backward pass came after them: its step was skipped.
            self._forget()
        super().zero_grad(set_to_none)
        if self._sums:
            self._gradients_seen = gradient_marks(self.param_groups)

    def _check_places(self, params: list[nn.Parameter]) -> None:
        owner = type(self).__name__
        for p in params:
            check_dense(owner, self._name_of, p)
        for p in params:
            known = self.state.get(p, {}).get("exp_avg")
            check_place(owner, self._name_of, p, known, state_dtype(p))

    def _note_failure(self, params: list[nn.Parameter]) -> None:
        self._failures += 1
        if self._failures > MAX_FAILURES:
            bad = next(p for p in params if not bool(torch.isfinite(_grad(p)).all()))
            raise PreconditionerError(
                f"{type(self).__name__}: non-finite gradients in {self._failures} steps in a row, now at "
                f"step {self.param_groups[0]['step']}, first in {self._name_of(bad)} {list(bad.shape)}; "
                "the parameters are unchanged since. Lower the learning rate, or look for the first "
                "non-finite loss."
            )

    def _rehearse(self) -> None:
        """Give the state the form that it will have; see :mod:`grng.optim.rehearsal`."""
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            self._state_of(p)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            for key in ("exp_avg", "hessian"):
                state[key] = torch.zeros_like(parameter, dtype=state_dtype(parameter))
        return state

    def _update_hessian(self, estimates: dict[nn.Parameter, Tensor]) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p in estimates]
            if params:
                # New tensors: a step that runs out of memory puts the old ones back.
                averages = torch._foreach_mul(
                    [self._state_of(p)["hessian"] for p in params], group["betas"][1]
                )
                torch._foreach_add_(
                    averages, [estimates[p] for p in params], alpha=1 - group["betas"][1]
                )
                for p, average in zip(params, averages, strict=True):
                    self.state[p]["hessian"] = average

    def _update(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        states = [self._state_of(p) for p in params]
        grads = [_grad(p).to(state_dtype(p)) for p in params]
        # New tensors, and all of them before a parameter is written: see _update_hessian.
        momenta = torch._foreach_mul([s["exp_avg"] for s in states], group["betas"][0])
        torch._foreach_add_(momenta, grads, alpha=1 - group["betas"][0])
        scales = torch._foreach_mul([s["hessian"] for s in states], group["gamma"])
        torch._foreach_clamp_min_(scales, group["eps"])
        steps = list(torch._foreach_div(momenta, scales))
        torch._foreach_clamp_max_(steps, 1.0)
        torch._foreach_clamp_min_(steps, -1.0)
        lr = group["lr"]
        for state, momentum in zip(states, momenta, strict=True):
            state["exp_avg"] = momentum
        # A parameter with fewer bits is rounded once, after decay and step.
        weights: list[Tensor] = [p.to(m.dtype) for p, m in zip(params, momenta, strict=True)]
        scale_(weights, 1 - lr * group["weight_decay"])
        if isinstance(lr, Tensor):  # which nothing waits for
            scale_(steps, lr)
            torch._foreach_sub_(weights, steps)
        else:
            torch._foreach_add_(weights, steps, alpha=-lr)
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                p.copy_(weight)

    # ---- state and reports ----

    def _accepted(self, parameter: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        if self._check_together(parameter, saved, ("exp_avg", "hessian")):
            for key in ("exp_avg", "hessian"):
                self._check_shape(key, parameter, saved[key], parameter.shape)
                # Another dtype only where the weights have changed between fp64 and a narrower one.
                saved[key] = saved[key].to(state_dtype(parameter))
        return saved

    def _after_loading(self) -> None:
        super()._after_loading()
        self._forget()
        self._failures = 0

    def __getstate__(self) -> dict[str, Any]:
        """What torch's optimizers keep, and the names; not statistics that wait for a step."""
        kept = super().__getstate__()
        return {
            **kept,
            "_names": self._names,
            "_failures": self._failures,
            "_rehearsed": self._rehearsed,
            "_sums": {},
            "_gradients_seen": [],
            "_terms": 0,
            "_observations": 0,
        }

    def explain(self) -> Report:
        """Return a table to print: state, mean Hessian and share of unclipped coordinates of each parameter.

        ``state`` is what the parameter holds in bytes. Waits for the device.
        """
        first = self.param_groups[0]
        return explain(
            {p: self._name_of(p) for p in self._states()},
            self._states(),
            ("hessian", "unclipped"),
            self._numbers(),
            {"hessian": "none yet", "unclipped": "none yet"},
            [
                f"Hessian: estimated every {first['refresh_every']} steps, next at step "
                f"{first['next_refresh']}; this is step {first['step']}",
                f"State: {self.memory_estimate()}",
            ],
        )

    def diagnostics(self) -> dict[str, float]:
        """Return plain numbers for a logger, after one wait for the device.

        ``unclipped`` is the share of coordinates whose last step was not clipped; the method's authors tune
        ``gamma`` until it is between 0.1 and 0.5. Behind the name of a parameter and ``/`` the same of it,
        and the mean of its ``hessian``.
        """
        first, numbers = self.param_groups[0], read(self._numbers())
        total = sum(p.numel() for p, found in numbers.items() if found)
        unclipped = sum(found["unclipped"] * p.numel() for p, found in numbers.items() if found)
        report = {
            "step": float(first["step"]),
            "skipped_steps": float(first["skipped_steps"]),
            "skipped_steps_in_a_row": float(self._failures),
            "dropped_statistics": float(first["dropped_statistics"]),
            "unclipped": unclipped / max(total, 1),
            "state_bytes": float(self.memory_estimate().total),
        }
        for p, found in numbers.items():
            report.update({f"{self._name_of(p)}/{key}": value for key, value in found.items()})
        return report

    def memory_estimate(self) -> MemoryEstimate:
        """Return the bytes that the state holds once all parameters were trained; see the class."""
        states = self._states()
        refresh = sum(s["hessian"].nbytes for s in states.values())
        return estimate(list(states), states, refresh=refresh)

    def _states(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {
            p: dict(planned(p, "exp_avg", "hessian", dtype=state_dtype(p)))
            for g in self.param_groups
            for p in g["params"]
        }

    def _numbers(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        numbers: dict[nn.Parameter, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                state, numbers[p] = self.state.get(p, {}), {}
                if "hessian" in state:
                    scale = (group["gamma"] * state["hessian"]).clamp(min=group["eps"])
                    unclipped = state["exp_avg"].abs() < scale
                    numbers[p]["hessian"] = state["hessian"].mean()
                    numbers[p]["unclipped"] = unclipped.double().mean()
        return numbers


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of the momentum and of the Hessian: fp32, and fp64 for a parameter in fp64."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _grad(parameter: nn.Parameter) -> Tensor:
    return cast(Tensor, parameter.grad)
