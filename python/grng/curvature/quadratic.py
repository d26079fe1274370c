# SPDX-License-Identifier: Apache-2.0
"""The Fisher information along a step of all layers together, from the statistics of one batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from grng.curvature.layers import KroneckerLayer, Record


def fisher_along(
    layers: list[KroneckerLayer],
    records: Callable[[KroneckerLayer], list[Record]],
    steps: list[list[Tensor]],
) -> Tensor | None:
    """Return ``Δᵀ F Δ`` for the step ``Δ`` of all layers, 0-d; None without statistics.

    An example of the batch has the score ``s = Σ_layers Σ_positions gᵀ Δ_layer a``, and ``F`` is the second
    moment of the scores: ``ΔᵀFΔ = Σ s² / T``. Unlike the Kronecker factors, the sum sees that layers move
    together. It costs the products of one forward pass, and no forward pass.

    Args:
        layers: The layers that move.
        records: Gives the records of a layer.
        steps: For each layer the step of its parameters: weight, and bias if that moves.
    """
    scores: dict[tuple[int, int, int], Tensor] = {}
    squares: dict[tuple[int, int, int], float] = {}
    terms: dict[int, int] = {}
    for layer, step in zip(layers, steps, strict=True):
        for record in records(layer):
            count = record.terms or layer.examples(record.layer_input)
            terms[record.observation] = count
            for c, grad in enumerate(record.grads()):
                found = layer.scores(record.layer_input, grad, step)
                # Rows that are no examples, as of attention, cannot be added to those of other layers.
                key = (record.observation, c, len(found))
                scores[key] = scores[key] + found if key in scores else found
                # Sampled labels: their sum was differentiated. A mean loss: each gradient was divided by T.
                squares[key] = 1.0 if record.sampled else float(count) ** 2
    if not scores:
        return None
    parts = [s.square().sum() * squares[key] for key, s in scores.items()]
    return torch.stack(parts).sum() / sum(terms.values())
