# SPDX-License-Identifier: Apache-2.0
"""What the natural policy gradient says about itself."""

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from grng.optim.observing import Observing
from grng.optim.parameters import wide
from grng.optim.rank_one_step import BUFFER
from grng.reports.diagonal import explain, read
from grng.reports.memory import MemoryEstimate, estimate, planned
from grng.reports.text import Report, bytes_text


class RankOneReports(Observing):
    """The reports of :class:`grng.RankOneNPG`, which fills the attributes."""

    _last: dict[str, float]  # numbers of the last step
    _norms: dict[nn.Parameter, Tensor]  # of the scores that were last observed

    def explain(self) -> Report:
        """Return a table to print: the norm of the last scores by each parameter, and how steps are made.

        ``state`` is what a parameter holds in bytes, ``score`` the norm of all its scores together. A
        parameter whose score is 0 takes steps along its gradient. Waits for the device.
        """
        first, states = self.param_groups[0], self._states()
        if first["score"] == "mean":
            kind = "the mean of all log-probabilities"
        else:
            kind = f"{first['scores']} drawn by seed {first['seed']}"
        numbers = {p: {"score": self._norms[p]} if p in self._norms else {} for p in states}
        length = "fixed"
        if first["step_length"] == "kl":
            length = f"KL divergence {first['max_kl']:g}"
        report = self._last.items()
        last = ", ".join(f"{k} {v:.3g}" for k, v in report) if report else "none yet"
        return explain(
            {p: self._name_of(p) for p in states},
            states,
            ("score",),
            numbers,
            {"score": "none yet"},
            [
                f"Scores: {kind}, {bytes_text(self._score_bytes())} from observe() to step()",
                f"Damping: {first['damping']:g}",
                f"Step length: {length}",
                f"Last step: {last}",
                f"State: {self.memory_estimate()}",
            ],
        )

    def diagnostics(self) -> dict[str, float]:
        """Return plain numbers for a logger, after one wait for the device.

        ==============================  ======================================================================
        ``step``                        steps taken
        ``skipped``                     for NaN or infinity; ``skipped_in_a_row``
        ``state_bytes``                 held from step to step
        ``step_factor``                 η of the last step
        ``predicted_kl``                of the last step at a learning rate of 1, without momentum; below
                                        ``max_kl`` by what damping takes; only with ``"kl"``
        ``direction_norm``              ‖d‖
        ``score_squared_norm``          mean of ``‖u_j‖²``, to compare damping with
        ==============================  ======================================================================

        The last four from the first step on. Behind the name of a parameter and ``/`` its ``score``, as in
        :meth:`explain`.
        """
        first = self.param_groups[0]
        report = {
            "step": float(first["step"]),
            "skipped": float(first["skipped"]),
            "skipped_in_a_row": float(first["skipped_in_a_row"]),
            "state_bytes": float(self.memory_estimate().total),
            **self._last,
        }
        for p, found in read({p: {"score": norm} for p, norm in self._norms.items()}).items():
            report.update({f"{self._name_of(p)}/{key}": value for key, value in found.items()})
        return report

    def memory_estimate(self) -> MemoryEstimate:
        """Return the bytes that the state holds once all parameters were trained; see the class.

        ``refresh`` is what the scores take from :meth:`observe` to :meth:`step`, on every step. With
        ``step_length="kl"`` the graph of a second backward pass comes to it, which depends on the batch.
        """
        states = self._states()
        return estimate(list(states), states, refresh=self._score_bytes())

    def _score_bytes(self) -> int:
        count = self.param_groups[0]["scores"]
        known = [
            p
            for g in self.param_groups
            for p in g["params"]
            if not isinstance(p, UninitializedParameter)
        ]
        return sum(count * p.numel() * wide(p).itemsize for p in known)

    def _states(self) -> dict[nn.Parameter, dict[str, Any]]:
        """What the state holds, or will hold: tensors without memory."""
        return {
            p: dict(planned(p, *([BUFFER] if g["momentum"] != 0 else []), dtype=wide(p)))
            for g in self.param_groups
            for p in g["params"]
        }
