# SPDX-License-Identifier: Apache-2.0
"""What is known of the curvature of layers, read from their devices with one wait for all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import grng_kernels as kernels
from grng.curvature.layers import KroneckerLayer
from grng.optim.devices import by_device
from grng.optim.factors import COUNTERS, SIDES
from grng.optim.inversions import KEY, Column, matrices

State = Mapping[str, Any]
# Calls of the norm estimate, each of which goes on from where the last one stopped.
_SWEEPS = 2


class Reader:
    """Collects numbers on devices, to wait for them once."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._count = 0

    def add(self, tensor: Tensor) -> slice:
        """Add all elements of a tensor; return where they will be."""
        self._tensors.append(tensor.detach().reshape(-1))
        first, self._count = self._count, self._count + tensor.numel()
        return slice(first, self._count)

    def read(self) -> list[float]:
        """Return all numbers, after one wait for each device but the CPU: one, as a rule."""
        found: list[float] = [0.0] * self._count
        tensors = list(enumerate(self._tensors))
        starts = [0]
        for t in self._tensors:
            starts.append(starts[-1] + t.numel())
        for here in by_device(tensors, lambda item: item[1]):
            values = iter(torch.cat([t.double() for _, t in here]).tolist())
            for i, t in here:
                found[starts[i] : starts[i + 1]] = [next(values) for _ in range(t.numel())]
        return found


@dataclass
class Measured:
    """Of one layer. Pairs are of the output and of the input side; of blocks the largest counts.

    Attributes:
        damping: Of the inverses in use.
        norm: Estimates of the spectral norms of the factors when they were inverted.
        condition: Estimates of the condition numbers of the damped factors, from the norms of both the
            factor and the inverse, some percent off.
        residual: Of the last inversions, as :func:`grng_kernels.damped_inverse` measures it; 0 for a
            diagonal, which is exact.
        failures: How often, by kind.
        in_a_row: Failed inversions in a row of one matrix.
    """

    damping: tuple[float, float]
    norm: tuple[float, float]
    condition: tuple[float, float]
    residual: tuple[float, float]
    failures: dict[str, int] = field(default_factory=dict)
    in_a_row: int = 0

    @property
    def inverted(self) -> tuple[bool, bool]:
        """Whether there is an inverse."""
        return self.damping[0] > 0, self.damping[1] > 0


def measure(
    layers: Sequence[KroneckerLayer], states: Sequence[State], extra: Sequence[Tensor] = ()
) -> tuple[list[Measured], list[float]]:
    """Measure layers that have curvature.

    Args:
        layers: The layers.
        states: Their states.
        extra: Numbers to read on the way, 0-d.

    Returns:
        What was measured, and the extra numbers.
    """
    reader = Reader()
    norms = _inverse_norms(layers, states)
    places = []
    for layer, state in zip(layers, states, strict=True):
        table = reader.add(state[KEY])
        residuals = [reader.add(state[f"{side}_residual"]) for side in SIDES]
        counters = [reader.add(state[counter]) for counter in COUNTERS]
        places.append((table, [reader.add(n) for n in norms[layer]], residuals, counters))
    extras = [reader.add(t) for t in extra]
    values = reader.read()
    result = []
    for layer, (table, inverse, residuals, counters) in zip(layers, places, strict=True):
        flat, wide = values[table], len(Column)
        rows = [flat[i : i + wide] for i in range(0, len(flat), wide)]
        outputs = matrices(layer, 0)
        sides = (slice(None, outputs), slice(outputs, None))
        inverse_norms = [n for place in inverse for n in values[place]]
        conditions = [
            (row[Column.NORM] + row[Column.DAMPING]) * n
            for row, n in zip(rows, inverse_norms, strict=True)
        ]
        result.append(
            Measured(
                damping=_pair([max(r[Column.DAMPING] for r in rows[s]) for s in sides]),
                norm=_pair([max(r[Column.NORM] for r in rows[s]) for s in sides]),
                condition=_pair([max(1.0, *conditions[s]) for s in sides]),
                residual=_pair([values[place][0] for place in residuals]),
                failures={
                    c: int(values[place][0]) for c, place in zip(COUNTERS, counters, strict=True)
                },
                in_a_row=int(max(r[Column.IN_A_ROW] for r in rows)),
            )
        )
    return result, [values[place][0] for place in extras]


def _pair(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]


def _inverse_norms(
    layers: Sequence[KroneckerLayer], states: Sequence[State]
) -> dict[KroneckerLayer, list[Tensor]]:
    """Return for each layer the norms of its inverses: of the output side, of the input side."""
    found: dict[KroneckerLayer, list[Tensor]] = {x: [] for x in layers}
    dense: list[tuple[KroneckerLayer, int, Tensor]] = []
    for layer, state in zip(layers, states, strict=True):
        for i, side in enumerate(SIDES):
            inverse = state[f"{side}_inverse"]
            found[layer].append(inverse.max())
            if not layer.diagonal[i]:
                dense += [(layer, i, m) for m in (inverse if inverse.dim() == 3 else [inverse])]
    for here in by_device(dense, lambda item: item[2]):
        inverses = [matrix for _, _, matrix in here]
        vectors = [torch.zeros_like(matrix[0]) for matrix in inverses]
        for _ in range(_SWEEPS):
            norms = kernels.spectral_norm(inverses, vector=vectors).norm
        by_side: dict[tuple[KroneckerLayer, int], list[Tensor]] = {}
        for (layer, i, _), norm in zip(here, norms, strict=True):
            by_side.setdefault((layer, i), []).append(norm)
        for (layer, i), of_blocks in by_side.items():
            found[layer][i] = torch.stack(of_blocks)
    return found
