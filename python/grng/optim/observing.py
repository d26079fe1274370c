# SPDX-License-Identifier: Apache-2.0
"""An optimizer whose steps are each made of one observation, which waits for its step."""

from collections.abc import Callable
from typing import Any

from torch import nn

from grng.curvature.jacobian import Jacobian
from grng.optim.parameters import are_same
from grng.optim.rehearsal import Rehearsing


class Observing(Rehearsing):
    """What the policy gradient and the Kalman optimizers do about observations; they fill the attributes."""

    _pending: Any  # the observation that waits, or None
    _stopped: bool  # whether a step with it has begun and not ended
    _engine: Jacobian | None

    def _begin_observation(self) -> None:
        """Refuse a second observation, but where a step with the first one was stopped by an error.

        Raises:
            RuntimeError: The first one still waits.
        """
        self._drop_rehearsal()
        if self._pending is not None and not self._stopped:
            raise RuntimeError(
                f"{type(self).__name__}: observe() was called twice; call step() between"
            )

    def _jacobian_by(
        self, parameters: list[nn.Parameter], *, budget_mb: float, jacobian: str
    ) -> Jacobian:
        """Return what differentiates by these parameters: that of the last time, where it was by the same."""
        if self._engine is None or not are_same(self._engine.parameters, parameters):
            self._engine = Jacobian(parameters, budget_mb=budget_mb, jacobian=jacobian)
        return self._engine

    def _waiting(self, closure: Callable[[], Any] | None, what_to_call: str) -> Any:
        """Return the observation that waits; None where the step only asks for the form of the state.

        Raises:
            RuntimeError: It does not, and there is none.
        """
        if self._pending is None and not (closure is None and self._rehearse_if_asked()):
            raise RuntimeError(
                f"{type(self).__name__}: step() needs an observation; call {what_to_call}"
            )
        return self._pending

    def _after_loading(self) -> None:
        super()._after_loading()
        self._pending = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the observation that waits: a copy is whole, for the copied parameters."""
        # A scheduler puts a step on the instance that is bound to it: the copy's would step the original.
        kept = {name: value for name, value in self.__dict__.items() if name != "step"}
        return {**kept, "_pending": None, "_engine": None}
