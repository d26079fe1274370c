# SPDX-License-Identifier: Apache-2.0
"""What a Kalman optimizer says about itself."""

from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature.prior import coherence
from grng.optim.observing import Observing
from grng.optim.output_noise import OutputNoise
from grng.reports.diagonal import explain, read
from grng.reports.memory import MemoryEstimate, estimate, planned
from grng.reports.text import Report


class KalmanReports(Observing):
    """The reports of :class:`grng.optim.kalman.KalmanOptimizer`, which fills the attributes."""

    _likelihood: str
    _noise: OutputNoise
    _rows: str  # how the last outputs were observed
    _is_full: bool
    _correct_coherence: bool
    _follows_evidence: bool

    def _first_state(self) -> dict[str, Any]:
        raise AssertionError("implemented by the optimizer")

    def _largest_divergence(self) -> Tensor | float | None:
        raise AssertionError("implemented by the optimizer")

    def explain(self) -> Report:
        """Return a table to print: variance, coherence, Jacobian of each parameter; how outputs are observed.

        ``state`` is what a parameter holds in bytes. Waits for the device.
        """
        kinds: dict[nn.Parameter, str] = {}
        if self._engine is not None:
            names = {True: "factored", False: "dense"}
            flags = zip(self._engine.parameters, self._engine.factored, strict=True)
            kinds = {p: names[factored] for p, factored in flags}
        route = self._engine.route if self._engine is not None else "none yet"
        return explain(
            self._names,
            self._states(),
            ("variance", "coherence"),
            self._numbers(),
            {"variance": "not yet", "coherence": "1"},
            [
                f"Observation: {self._likelihood}, {self._rows}",
                f"Jacobian: {route}",
                f"Noise: {self._noise.describe()}",
                f"Covariance: {'full' if self._is_full else 'diagonal'}",
                f"Step: {self._describe_limit()}",
                f"State: {self.memory_estimate()}",
            ],
            last=("jacobian", kinds, "none yet"),
        )

    def _describe_limit(self) -> str:
        largest = self._largest_divergence()
        if largest is None:
            return "as long as the filter makes it"
        why = "; more with evidence" if self._follows_evidence else ""
        return f"at most {float(largest):.3g} nats of KL divergence{why}"

    def diagnostics(self) -> dict[str, float]:
        """Return plain numbers for a logger, after waiting for the device.

        ``step``, ``skipped`` and ``skipped_in_a_row`` observations, ``state_bytes``; ``max_kl`` of the next
        step, where there is a limit, from as many samples as the last; behind the name of a parameter and
        ``/`` its mean ``variance`` and its ``coherence``.
        """
        first = self._first_state()
        report = {
            "step": float(self.param_groups[0]["step"]),
            "skipped": float(first.get("skipped", 0)),
            "skipped_in_a_row": float(first.get("skipped_in_a_row", 0)),
            "state_bytes": float(self.memory_estimate().total),
        }
        largest = self._largest_divergence()
        if largest is not None:
            report["max_kl"] = float(largest)
        for p, numbers in read(self._numbers()).items():
            report.update({f"{self._name_of(p)}/{key}": value for key, value in numbers.items()})
        return report

    def memory_estimate(self) -> MemoryEstimate:
        """Return the bytes that the state holds once there was an observation; see the class.

        Before the first one at most: of a layer that is fed single samples the last score takes less. The
        estimated noise, a number for each pair of outputs, is not counted before.
        """
        states = self._states()
        return estimate(list(states), states)

    def _numbers(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        numbers: dict[nn.Parameter, dict[str, Tensor]] = {}
        for p in (p for g in self.param_groups for p in g["params"]):
            state = self.state.get(p, {})
            numbers[p] = {}
            if "variance" in state:
                numbers[p]["variance"] = state["variance"].mean()
            if "trace" in state:
                numbers[p]["coherence"] = coherence(state, p.numel())
        return numbers

    def _states(self) -> dict[nn.Parameter, dict[str, Any]]:
        """What the state holds, or will hold: tensors without memory."""
        parameters = [p for g in self.param_groups for p in g["params"]]
        states: dict[nn.Parameter, dict[str, Any]] = {}
        for p in parameters:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            keys = ["variance"] + (["weights"] if p.dtype.itemsize < dtype.itemsize else [])
            state = dict(planned(p, *keys, dtype=dtype))
            known = self.state.get(p, {})
            if self._correct_coherence and not self._is_full and "trace" not in known:
                state.update(planned(p, "score", dtype=dtype))
                for key in ("trace", "overlap"):
                    state[key] = torch.empty((), dtype=torch.float64, device="meta")
            states[p] = {**state, **known}
        if self._is_full:
            size = sum(p.numel() for p in parameters)
            full = torch.empty(size, size, dtype=torch.float64, device="meta")
            states[parameters[0]].setdefault("covariance", full)
        return states
