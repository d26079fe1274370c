# SPDX-License-Identifier: Apache-2.0
"""An optimizer with curvature looks at itself: bad gradients, failing inverses, layers without statistics."""

import warnings
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from grng.curvature.capture import Capture
from grng.curvature.layers import KroneckerLayer
from grng.optim.checks import PreconditionerError
from grng.optim.devices import stacked
from grng.optim.factors import COUNTERS, State
from grng.optim.finite import are_finite
from grng.optim.inversions import describe_failures, forgive, most_in_a_row
from grng.optim.rehearsal import Rehearsing
from grng.optim.strict import Strict, is_strict


class WatchedOptimizer(Rehearsing):
    """What :class:`grng.optim.base.KroneckerOptimizer` does where something goes wrong.

    That class fills the attributes.
    """

    # The keyword that a failing inverse wants raised.
    _damping = "rho"

    _layers: list[KroneckerLayer]
    _capture: Capture
    _reasons: dict[nn.Parameter, str]
    _names: dict[nn.Parameter, str]
    # Frozen when the groups were made; layers whose hooks went, as was said.
    _outside: list[nn.Parameter]
    _cut_off: set[KroneckerLayer]
    _said_overwritten: bool
    _strict: Strict
    _failures: int
    _max_failures: int
    _check_interval: int
    # How many failures strict does not mind: those before it was there to see them.
    _excused: int | Tensor | None

    def _forget(self) -> None:
        raise AssertionError("implemented by the optimizer")

    def _statistics_wanted(self, layer: KroneckerLayer) -> bool:
        raise AssertionError("implemented by the optimizer")

    def _has_curvature(self, layer: KroneckerLayer) -> bool:
        return not self._rehearsed and "input_factor" in self.state.get(layer.weight, {})

    # ---- gradients ----

    def _check_outside(self) -> None:
        """Warn once of parameters of the model that have a gradient and are in no group."""
        found = [p for p in self._outside if p.grad is not None and p.requires_grad]
        if found:
            inside = {p for g in self.param_groups for p in g["params"]}
            found = [p for p in found if p not in inside]
        if found:
            names = [self._name_of(p) for p in found]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self._fall_back(
                f"{', '.join(names[:5])}{more} had requires_grad=False when the optimizer was made, and are "
                "not trained: make it after unfreezing, or give them to add_param_group, to be trained by "
                "AdamW",
                above=4,
                kind=UserWarning,
            )
            self._outside = []

    def _is_in_order(self) -> bool:
        """Look at gradients and counters of failures, with one wait; a bad step changes nothing.

        Returns:
            Whether all gradients are finite.

        Raises:
            PreconditionerError: Too many bad steps in a row, or too many inversions of a matrix; with
                ``strict`` any failure.
        """
        with_grad = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not with_grad:
            return True
        grads = [cast(Tensor, p.grad) for p in with_grad]
        finite, counted = are_finite(grads), self._counters_in_order()
        if counted is not None:
            finite = torch.cat([finite, counted.to(finite.device).view(1)])
        if not bool(finite.all()):
            finite = are_finite(grads, exact=True)
            if not bool(finite.all()):
                self._note_bad_step(with_grad[int((~finite).nonzero()[0])])
                return False
            if counted is not None and not bool(counted):
                self._raise_failures()
        self._failures = 0
        return True

    def _note_bad_step(self, parameter: nn.Parameter) -> None:
        self._failures += 1
        if self._failures > self._max_failures:
            self._forget()
            raise PreconditionerError(
                f"{type(self).__name__}: non-finite gradients in {self._failures} steps in a row, now at "
                f"step {self.param_groups[0]['step']}, first in {self._name_of(parameter)} "
                f"{list(parameter.shape)}; the parameters are unchanged since. Lower the learning rate, or "
                "look for the first non-finite loss."
            )

    # ---- failures that the device counts ----

    def _with_curvature(self) -> tuple[list[KroneckerLayer], list[State]]:
        layers = [x for x in self._layers if self._has_curvature(x)]
        return layers, [self.state[x.weight] for x in layers]

    def _counters_in_order(self) -> Tensor | None:
        """Return whether few enough inversions failed, 0-d on a device; None where nobody looks."""
        strict = is_strict(self._strict)
        if not strict and self.param_groups[0]["step"] % self._check_interval != 0:
            return None
        states = self._with_curvature()[1]
        if not states:
            return None
        if not strict:
            return most_in_a_row(states) <= self._max_failures
        total = stacked([s[counter] for s in states for counter in COUNTERS]).sum()
        if self._excused is None:
            self._excused = total
        return total <= self._excused

    def _raise_failures(self) -> NoReturn:
        """Say what failed, and begin to count again: whoever goes on has as many tries as before.

        Raises:
            PreconditionerError: Always.
        """
        layers, states = self._with_curvature()
        group, strict = self.param_groups[0], is_strict(self._strict)
        what = describe_failures(layers, states, 0 if strict else self._max_failures)
        if what is None:
            counts = [
                f"{int(s[counter])} {counter.replace('_', ' ')} in {x.name}"
                for x, s in zip(layers, states, strict=True)
                for counter in COUNTERS
                if s[counter] > 0
            ]
            what = f"strict: {', '.join(counts)}"
        forgive(states)
        self._excused = None
        self._forget()
        raise PreconditionerError(
            f"{type(self).__name__}: {what}, seen at step {group['step']}, which changed nothing. Where an "
            f"inverse failed, the one before it is still used. Raise {self._damping} (it is "
            f"{group[self._damping]:.3g}), lower the learning rate, or look for inputs out of range"
        )

    def _fall_back(self, message: str, *, above: int, kind: type[Warning] = RuntimeWarning) -> None:
        """Warn of a fallback at the line ``above`` frames up from the caller; with ``strict`` raise.

        Raises:
            PreconditionerError: With ``strict``.
        """
        if is_strict(self._strict):
            self._forget()
            raise PreconditionerError(
                f"{type(self).__name__}: strict refuses a fallback: {message}"
            )
        warnings.warn(f"{type(self).__name__}: {message}", kind, stacklevel=above + 2)

    def _find_overwritten(self) -> dict[KroneckerLayer, int]:
        """Return how many inputs of each layer were overwritten, where any was; warn once."""
        counts = {x: self._capture.overwritten(x) for x in self._layers}
        found = {x: count for x, count in counts.items() if count}
        if found and not self._said_overwritten:
            self._said_overwritten = not is_strict(self._strict)
            self._fall_back(
                f"the input of {', '.join(x.name for x in found)} was changed in place between the forward "
                "pass and step(): its statistics are dropped. Give the model a new tensor, or a clone() of a "
                "static buffer",
                above=6,
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
        if old:
            self._fall_back(
                f"no new statistics reach {', '.join(x.name for x in old)}: their factors stay as they are "
                "(the hooks were removed, or the module is bypassed now)",
                above=6,
            )
            self._cut_off.update(old)
        if new:
            self._fall_back(
                f"no statistics reached {', '.join(x.name for x in new)} although the gradient did (the "
                "module is bypassed, compiled before the optimizer was made, or recomputed; the forward "
                "pass ran before the optimizer was made; its input was overwritten; or the hooks were "
                "removed): trained by AdamW",
                above=6,
            )
            self._demote(new)
        return idle

    def _demote(self, layers: list[KroneckerLayer]) -> None:
        self._layers = [x for x in self._layers if x not in layers]
        for x in layers:
            spoiled = self._capture.overwritten(x)
            why = "its input was overwritten" if spoiled else "its module's hooks never ran"
            self._reasons.update({p: why for p in x.parameters})
