# SPDX-License-Identifier: Apache-2.0
"""The Fisher information along a step of all layers together, from the statistics of one batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from grng.curvature.attention import ProjectionLayer
from grng.curvature.convolution import ConvolutionLayer
from grng.curvature.layers import KroneckerLayer, Record


def fisher_along(
    layers: Sequence[KroneckerLayer],
    records: Callable[[KroneckerLayer], list[Record]],
    steps: list[list[Tensor]],
    factors: Sequence[Tensor] | None = None,
) -> Tensor | None:
    """Return ``Δᵀ F Δ`` for the step ``Δ`` of all layers, 0-d; None without statistics.

    An example of the batch has the score ``s = Σ_layers Σ_positions gᵀ Δ_layer a``, and ``F`` is the second
    moment of the scores: ``ΔᵀFΔ = Σ s² / T``. Unlike the Kronecker factors, the sum sees that layers move
    together. It costs the products of one forward pass, and no forward pass.

    Args:
        layers: The layers that move.
        records: Gives the records of a layer.
        steps: For each layer the step of its parameters: weight, and bias if that moves.
        factors: Of the step of each layer, 0-d; None: 1.
    """
    found: dict[tuple[int, int], list[Tensor]] = {}
    squares: dict[int, float] = {}
    terms: dict[int, int] = {}
    for k, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        for i, record in enumerate(records(layer)):
            # Where nobody said which passes belong together, it is those of one number in their layer.
            seen_in = record.observation or -1 - i
            count = record.terms or layer.examples(record.layer_input)
            terms[seen_in] = min(count, terms.get(seen_in, count))
            # Sampled labels: their sum was differentiated. A mean loss: each gradient was divided by T.
            squares[seen_in] = 1.0 if record.sampled else float(terms[seen_in]) ** 2
            for c, grad in enumerate(record.grads(), record.first):
                scores = layer.scores(record.layer_input, grad, step)
                if factors is not None:
                    scores = scores * factors[k].to(scores)
                found.setdefault((seen_in, c), []).append(scores)
    if not found:
        return None
    parts = [_summed(s).square().sum() * squares[seen_in] for (seen_in, _), s in found.items()]
    # The layers of a model may be on several devices.
    return torch.stack([p.to(parts[0].device) for p in parts]).sum() / sum(terms.values())


def _summed(scores: list[Tensor]) -> Tensor:
    """Add the scores of all layers; of a layer that was fed ``[examples * positions, d]``, by example."""
    examples = min(len(s) for s in scores)
    scores = [s.to(scores[0].device) for s in scores]
    whole = [s for s in scores if len(s) % examples == 0]
    # What fits no example counts for itself.
    odd = torch.cat([s.new_zeros(0) for s in scores[:1]] + [s for s in scores if len(s) % examples])
    total = torch.stack([s.unflatten(0, (examples, -1)).sum(1) for s in whole]).sum(0)
    return torch.cat([total, odd.to(total.dtype)])


def out_of_order(
    layers: Sequence[KroneckerLayer], records: Callable[[KroneckerLayer], list[Record]]
) -> set[KroneckerLayer]:
    """Return the layers whose scores :func:`fisher_along` could not add to those of the same examples.

    Their leading dimension is that of the positions, where another layer of the same pass, an attention
    module that was told so or one with a row for each term of the loss, shows that the examples are the
    second; or it fits no number of examples that fits the terms of the loss. Layers that all have the same
    order are not found, nor is a leading dimension that could be one of flattened examples and positions.
    """
    together: dict[int, list[tuple[KroneckerLayer, Record]]] = {}
    for layer in layers:
        for i, record in enumerate(records(layer)):
            together.setdefault(record.observation or -1 - i, []).append((layer, record))
    return {layer for found in together.values() for layer in _strangers(found)}


def _strangers(found: list[tuple[KroneckerLayer, Record]]) -> set[KroneckerLayer]:
    given = [(x, x.examples(r.layer_input), r.layer_input.shape) for x, r in found]
    terms = min((r.terms for _, r in found if r.terms), default=0)
    told = [
        n
        for x, n, _ in given
        if isinstance(x.module, nn.MultiheadAttention) and not x.module.batch_first
    ]
    examples = min(told) if told else terms if any(n == terms for _, n, _ in given) else 0
    strangers = {
        x
        for x, n, shape in given
        if not isinstance(x, (ProjectionLayer, ConvolutionLayer))
        and len(shape) > 2
        and 1 < n != shape[1] == examples
    }
    counts = [n for x, n, _ in given if x not in strangers]
    fitting = [n for n in counts if n and terms % n == 0]
    if terms and fitting and any(n % min(counts) for n in counts if min(counts)):
        strangers |= {x for x, n, _ in given if n % min(fitting)}
    return strangers
