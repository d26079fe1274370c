# SPDX-License-Identifier: Apache-2.0
"""How the inversions of a layer's factors went: kept on the device, looked at when the host waits anyway.

The state of a layer has one small tensor for it, ``inversions [matrices, 4]`` in the dtype of its factors:
the blocks of the output factor, then those of the input factor, with the columns of :class:`Column`.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grng.curvature.layers import KroneckerLayer
from grng.optim.devices import stacked
from grng_kernels import Info

State = dict[str, Any]
KEY = "inversions"


class Column(IntEnum):
    """What the columns of ``inversions`` are."""

    DAMPING = 0
    """Of the inverse in use."""
    NORM = 1
    """Estimate of the spectral norm of the factor that was inverted."""
    INFO = 2
    """:class:`grng_kernels.Info` of the last inversion, also of one that failed."""
    IN_A_ROW = 3
    """Failures since all matrices of the layer were last inverted together without one."""


class Outcome(NamedTuple):
    """Of one inversion, 0-d each: ``info`` is not 0 where it failed."""

    damping: Tensor
    norm: Tensor
    info: Tensor


def matrices(layer: KroneckerLayer, side: int) -> int:
    """Return how many matrices a layer's factor has; a diagonal one counts as one."""
    return 1 if layer.diagonal[side] else layer.blocks


def new_inversions(
    layer: KroneckerLayer, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Return what a state has before the first inversion: zeros."""
    rows = matrices(layer, 0) + matrices(layer, 1)
    return {KEY: torch.zeros(rows, len(Column), dtype=dtype, device=device)}


def note_inversions(states: Sequence[State], outcomes: Sequence[Sequence[Outcome | None]]) -> None:
    """Write how the inversions of some layers went, and count the failures, without a wait.

    Args:
        states: Of the layers, each once.
        outcomes: For each a list with one entry per row of its ``inversions``; None where that matrix was not
            inverted.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, state in enumerate(states):
        table = state[KEY]
        alike.setdefault((table.device, table.dtype, len(table)), []).append(i)
    for members in alike.values():
        _note([states[i] for i in members], [outcomes[i] for i in members])


def _note(states: list[State], outcomes: list[Sequence[Outcome | None]]) -> None:
    old = torch.stack([s[KEY] for s in states])
    found = [
        _as_before(old[i, j]) if outcome is None else outcome
        for i, rows in enumerate(outcomes)
        for j, outcome in enumerate(rows)
    ]
    columns = zip(*found, strict=True)
    damping, norm, info = (torch.stack(c).to(old.dtype).view(old.shape[:2]) for c in columns)
    bad = info != 0
    in_a_row = torch.where(
        bad.any(1, keepdim=True), old[..., Column.IN_A_ROW] + bad, torch.zeros_like(damping)
    )
    # A failed inversion left the inverse as it was, and so what describes it.
    kept = torch.where(bad[..., None], old[..., : Column.INFO], torch.stack([damping, norm], -1))
    new = torch.cat([kept, torch.stack([info, in_a_row], -1)], -1)
    for state, table in zip(states, new.unbind(), strict=True):
        state[KEY] = table.clone()  # of its own: whoever saves it saves its storage
    torch._foreach_add_(
        [s["inverse_failures"] for s in states], list(bad.sum(1, dtype=torch.int32).unbind())
    )


def _as_before(row: Tensor) -> Outcome:
    return Outcome(row[Column.DAMPING], row[Column.NORM], torch.zeros_like(row[0]).to(torch.int32))


def most_in_a_row(states: Sequence[State]) -> Tensor:
    """Return the largest number of failures in a row of any matrix, 0-d on the device of the first state."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for state in states:
        alike.setdefault((state[KEY].device, state[KEY].dtype), []).append(state[KEY])
    worst = [torch.cat(tables)[:, Column.IN_A_ROW].amax().double() for tables in alike.values()]
    return stacked(worst).amax()


def forgive(states: Sequence[State]) -> None:
    """Begin to count again."""
    for state in states:
        state[KEY][:, Column.IN_A_ROW] = 0


def describe_failures(
    layers: Sequence[KroneckerLayer], states: Sequence[State], more_than: int
) -> str | None:
    """Say of the first matrix with ``more_than`` failures in a row what it is and how it failed.

    Waits for the device.

    Returns:
        The sentence, or None where there is no such matrix.
    """
    for layer, state in zip(layers, states, strict=True):
        for row, values in enumerate(state[KEY].tolist()):
            if values[Column.IN_A_ROW] <= more_than:
                continue
            outputs = matrices(layer, 0)
            side = "output" if row < outputs else "input"
            block = row if row < outputs else row - outputs
            which = f"block {block} of the " if layer.blocks > 1 else "the "
            info = Info(int(values[Column.INFO]))
            residual = float(state[f"{side}_residual"])
            return (
                f"the inverse of {which}{side} factor {list(layer.factor_shape(side == 'input'))} of "
                f"{layer.name} (weight {list(layer.weight.shape)}) failed "
                f"{int(values[Column.IN_A_ROW])} times in a row, last with info {int(info)} ({info.name}), "
                f"residual {residual:.2g}"
            )
    return None
