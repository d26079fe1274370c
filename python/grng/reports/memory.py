# SPDX-License-Identifier: Apache-2.0
"""How much memory an optimizer's state takes, before there is any."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from grng.reports.text import bytes_text

State = Mapping[str, Any]
# What belongs where, by the key in the state or its end; the rest is "other".
_FACTORS = ("_factor", "hessian")
_INVERSES = ("_inverse", "variance", "covariance")
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of an optimizer's state once every parameter was trained; ``print`` shows them.

    Attributes:
        factors: Averages of curvature: Kronecker factors, or Sophia's diagonal of the Hessian.
        inverses: Of the factors; for the Kalman filters the variances, which play their part.
        moments: Averages of gradients: AdamW's two, or one.
        other: Vectors of the norm estimates, counters, copies of narrow weights.
        refresh: What a refresh of all layers needs besides until its step has ended, at least: new factors
            and inverses next to those before. Not in it, as they depend on the batch: from the forward pass
            to the step, on steps with statistics, the inputs of the layers and the gradients of their outputs
            are kept.
        adamw: What AdamW would hold for the same parameters, to compare.
        unknown: Parameters that are left out, as lazy modules have no shape yet.
    """

    factors: int
    inverses: int
    moments: int
    other: int
    refresh: int
    adamw: int
    unknown: int

    @property
    def total(self) -> int:
        """Bytes that stay from step to step."""
        return self.factors + self.inverses + self.moments + self.other

    def __str__(self) -> str:
        split = ", ".join(
            f"{kind} {bytes_text(getattr(self, kind))}"
            for kind in ("factors", "inverses", "moments", "other")
        )
        more = f"{bytes_text(self.refresh)} more during a refresh; " if self.refresh else ""
        left = f"; {self.unknown} parameters without a shape yet" if self.unknown else ""
        return (
            f"{bytes_text(self.total)}: {split}\n"
            f"       {more}AdamW would hold {bytes_text(self.adamw)}{left}"
        )


def estimate(
    parameters: Iterable[nn.Parameter], states: Mapping[nn.Parameter, State], *, refresh: int = 0
) -> MemoryEstimate:
    """Add up what the states of parameters will hold; tensors on ``meta`` will do.

    Args:
        parameters: All that are trained.
        states: Of each parameter.
        refresh: See :class:`MemoryEstimate`.
    """
    sums = dict.fromkeys(("factors", "inverses", "moments", "other"), 0)
    parameters = list(parameters)
    for p in parameters:
        for key, value in states.get(p, {}).items():
            if isinstance(value, Tensor):
                sums[_kind(key)] += value.nbytes
    known = [p for p in parameters if not isinstance(p, UninitializedParameter)]
    adamw = sum(bytes_of(adamw_state(p)) for p in known)
    return MemoryEstimate(
        **sums, refresh=refresh, adamw=adamw, unknown=len(parameters) - len(known)
    )


def bytes_of(state: State) -> int:
    """Return the bytes of the tensors of a state."""
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))


def planned(parameter: nn.Parameter, *keys: str, dtype: torch.dtype | None = None) -> State:
    """Return a state with tensors like a parameter under these keys, without memory."""
    if isinstance(parameter, UninitializedParameter):
        return {}
    return {key: torch.empty_like(parameter, device="meta", dtype=dtype) for key in keys}


def adamw_state(parameter: nn.Parameter, dtype: torch.dtype | None = None) -> State:
    """Return AdamW's state of a parameter, without memory; ``dtype`` is that of the moments."""
    moments = planned(parameter, "exp_avg", "exp_avg_sq", dtype=dtype)
    return {"step": torch.empty((), device="meta"), **moments} if moments else {}


def _kind(key: str) -> str:
    for kind, ends in (("factors", _FACTORS), ("inverses", _INVERSES), ("moments", _MOMENTS)):
        if key.endswith(ends):
            return kind
    return "other"


def memory_estimate(
    optimizer: str | type[Optimizer], model: nn.Module, **options: Any
) -> MemoryEstimate:
    """Return the bytes that an optimizer would hold for a model; nothing is trained, and nothing stays.

    ::

        print(grng.memory_estimate("RING", model))

    Args:
        optimizer: A class of this package, or its name.
        model: The model, with its weights: what is on the ``meta`` device has no curvature.
        **options: As for the optimizer.

    Raises:
        ValueError: No such optimizer; and what the optimizer raises.
    """
    import grng

    known = [name for name in grng.__all__ if hasattr(getattr(grng, name), "memory_estimate")]
    found = getattr(grng, optimizer) if optimizer in known else optimizer
    if not (isinstance(found, type) and hasattr(found, "memory_estimate")):
        raise ValueError(
            f"memory_estimate: optimizer must be one of {', '.join(known)}, got {optimizer!r}"
        )
    made: Any = found(model, **options)
    try:
        result: MemoryEstimate = made.memory_estimate()
        return result
    finally:
        close = getattr(made, "_close", None)
        if close is not None:
            close()  # its hooks on the model
