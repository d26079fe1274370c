# SPDX-License-Identifier: Apache-2.0
"""What an optimizer with curvature says about itself."""

from typing import Any

from torch import Tensor, nn

from grng.curvature.layers import KroneckerLayer
from grng.optim.factors import new_factors
from grng.optim.watch import WatchedOptimizer
from grng.reports.diagnostics import diagnostics
from grng.reports.explain import explain
from grng.reports.memory import MemoryEstimate, adamw_state, bytes_of, estimate
from grng.reports.subject import Subject
from grng.reports.text import Report


class ReportingOptimizer(WatchedOptimizer):
    """The reports of :class:`grng.optim.base.KroneckerOptimizer`, which fills the attributes."""

    _fisher: str
    _kept: Tensor | None
    _spectral_damping: bool

    def explain(self, *, full: bool = False) -> Report:
        """Return a report to print: which parameters are trained how, at what cost, and with what curvature.

        Tables in plain text, or drawn by rich where that prints it: of the layers with curvature and their
        factors, of what is known of these once there are statistics, and of what AdamW trains and why.
        ``state`` is what a layer holds in bytes, moments included; ``refresh`` and ``step`` are
        floating-point operations in products, ``grng/reports/costs.py`` says by which formulas. Waits for the
        device once.

        Args:
            full: A line for each layer, with its whole name. Else those that differ only in numbers within
                their names have one, with their number in brackets; its costs are sums, what it says of
                curvature is the largest.
        """
        return explain(self._subject(), full=full)

    def diagnostics(self) -> dict[str, float]:
        """Return plain numbers for a logger, after one wait for the device.

        ==============================  ======================================================================
        ``step``                        steps taken
        ``kronecker_layers``            layers with curvature
        ``adamw_parameters``            parameters that AdamW trains
        ``skipped_steps_in_a_row``      with non-finite gradients
        ``step_kept``                   part of the last step that ``max_kl`` (or ``kl_clip``) let through
        ``state_bytes``                 all that is held: ``factor_bytes``, ``inverse_bytes``,
                                        ``moment_bytes``, ``other_bytes``; for a moment ``refresh_bytes`` more
        ``flops_per_refresh``           in products, as are ``flops_per_row`` and ``flops_per_step``
        ``inverse_failures``            inversions that failed, ever
        ``factor_failures``             statistics that were not finite, or whose input was overwritten
        ``direction_failures``          directions that could not be used
        ``inverse_failures_in_a_row``   of one matrix, the most
        ``largest_condition``           of all damped factors; likewise ``largest_residual`` and
                                        ``largest_refresh_age``
        ==============================  ======================================================================

        Of each layer, behind its name and ``/``: ``state_bytes``, the flops, the failures, and
        ``refresh_age``, the steps that its inverses have served; of its two factors, behind ``output_`` and
        ``input_``: ``damping`` and ``norm`` at their last good inversion, ``condition`` (an estimate) and
        ``residual``.

        The decrease of the loss that the quadratic model predicts is not among them: to compare it with the
        actual one takes a forward pass. ``step_kept`` stands for it: where it stays far below 1, the model
        curves more than the learning rate allows for.
        """
        return diagnostics(self._subject())

    def memory_estimate(self) -> MemoryEstimate:
        """Return the bytes that the state holds once all parameters were trained; see the class.

        Counted from shapes: right after construction too.
        """
        return self._subject().memory

    def _subject(self) -> Subject:
        group, planned = self.param_groups[0], self._planned_state()
        parameters = [p for g in self.param_groups for p in g["params"]]
        states = {p: {**planned.get(p, {}), **self.state.get(p, {})} for p in parameters}
        leaders = {x: y for x, y in self._leaders().items() if x is not y}
        # Statistics are averaged into copies, inverses replaced; what was there stays until the step ends.
        refresh = sum(bytes_of(states[x.weight]) for x in self._layers)
        refresh -= sum(bytes_of(self._planned_moments(x.weight)) for x in self._layers)
        return Subject(
            owner=type(self).__name__,
            layers=list(self._layers),
            curved=self._with_curvature()[0],
            parameters=parameters,
            reasons=self._reasons,
            names=self._names,
            states=states,
            memory=estimate(parameters, states, refresh=refresh),
            leaders=leaders,
            step=group["step"],
            refresh_every=group.get("refresh_every", 0),
            kept=self._kept,
            kept_by=self._kept_by(),
            skipped=self._failures,
            fisher=self._fisher,
        )

    def _planned_state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Return what the state will hold, as tensors without memory."""
        owned = {p for x in self._layers for p in x.parameters}
        others = [p for g in self.param_groups for p in g["params"] if p not in owned]
        planned = {p: dict(adamw_state(p)) for p in others}
        for layer in self._layers:
            planned.update({p: self._planned_moments(p) for p in layer.parameters})
            planned[layer.weight].update(self._planned_factors(layer))
        return planned

    def _planned_factors(self, layer: KroneckerLayer) -> dict[str, Any]:
        return new_factors(layer, spectral=self._spectral_damping, device="meta")

    def _planned_moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        raise AssertionError("implemented by each optimizer")

    def _kept_by(self) -> str:
        return "kl_clip"

    def _leaders(self) -> dict[KroneckerLayer, KroneckerLayer]:
        """Return the layers whose input factors are those of others, with these."""
        return {}

    def _close(self) -> None:
        """Take the hooks off the model: this optimizer steps no more."""
        self._capture.close()
