# SPDX-License-Identifier: Apache-2.0
"""Layers that are fed the same tensor, as the three projections of attention: one input factor serves them.

Their factors stay separate tensors in the state, but are averaged and inverted once, and copied: the steps
are those that each layer alone would take. Not so with ``stagger``: layers that share an inverse have one
turn, so that inverses are refreshed at other steps than those of each layer alone.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from grng.curvature.layers import KroneckerLayer, Record
from grng.optim.factors import State, is_reduced

_COPIED = ("input_factor", "input_inverse", "input_vector", "input_updates")


class SharedInputs:
    """Which layers have had the same inputs ever since their first statistics."""

    def __init__(self) -> None:
        # The layers with one history have equal input factors.
        self._histories: dict[KroneckerLayer, object] = {}

    def leaders(self, layers: Sequence[KroneckerLayer]) -> dict[KroneckerLayer, KroneckerLayer]:
        """Return for each layer the first one with its history, which may be itself."""
        first: dict[object, KroneckerLayer] = {}
        return {x: first.setdefault(self._histories.get(x, x), x) for x in layers}

    def advance(
        self, updates: Sequence[tuple[KroneckerLayer, list[Record]]], sharing: str
    ) -> dict[KroneckerLayer, KroneckerLayer]:
        """Note an update of the factors of some layers with their records; return their leaders."""
        keys = [self._key(layer, records, sharing) for layer, records in updates]
        new: dict[Hashable, object] = {}
        for (layer, _), key in zip(updates, keys, strict=True):
            self._histories[layer] = new.setdefault(key, object())
        return self.leaders([layer for layer, _ in updates])

    def _key(self, layer: KroneckerLayer, records: list[Record], sharing: str) -> Hashable:
        """What two layers must have in common for their input factors to stay equal."""
        if type(layer).update_input_factor is not KroneckerLayer.update_input_factor:
            return layer  # patches depend on the geometry of a convolution
        if any(type(r.layer_input) is not Tensor for r in records):
            return layer  # wrappers need not tell where their values are
        fed = tuple(
            # The records keep the memory: tensors in the same place are the same values.
            (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, is_reduced(layer, r, sharing))
            for r in records
            for x in [r.layer_input]
        )
        form = (layer.diagonal[1], layer.bias is not None, layer.weight.dtype == torch.float64)
        return fed, form, self._histories.get(layer)

    def recall(self, states: Sequence[tuple[KroneckerLayer, State]]) -> None:
        """Find the layers with equal input factors in states that were loaded; waits for the device."""
        self._histories.clear()
        known: dict[Hashable, list[tuple[State, object]]] = {}
        for layer, state in states:
            factor = state["input_factor"]
            alike = known.setdefault((factor.shape, factor.dtype, float(factor.sum())), [])
            found = next((h for s, h in alike if _are_equal(s, state)), None)
            self._histories[layer] = object() if found is None else found
            alike.append((state, self._histories[layer]))


def copy_input_factor(leader: State, state: State) -> None:
    """Bring the average of a layer's inputs up to that of its leader."""
    for key in ("input_factor", "input_updates"):
        state[key].copy_(leader[key])


def _are_equal(one: State, other: State) -> bool:
    return all((k in one) == (k in other) for k in _COPIED) and all(
        _same(one[k], other[k]) for k in _COPIED if k in one
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)
