# SPDX-License-Identifier: Apache-2.0
"""Kronecker factors in an optimizer's state: their moving averages, their inverses, and their use."""

from typing import Any

import torch
from torch import Tensor

import grng_kernels as kernels
from grng.curvature.diagonal import diagonal_damped_inverse
from grng.curvature.layers import KroneckerLayer, Record

State = dict[str, Any]
SIDES = ("output", "input")


def new_factors(layer: KroneckerLayer) -> State:
    """Return the state of a layer's factors before the first statistics: zeros."""
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=layer.weight.device)

    state: State = {"updates": 0}
    for i, side in enumerate(SIDES):
        shape = layer.factor_shape(i)
        state[f"{side}_factor"] = zeros(*shape)
        state[f"{side}_inverse"] = zeros(*shape)
        if not layer.diagonal[i]:
            state[f"{side}_vector"] = zeros(*shape[:-1])
        state[f"{side}_residual"] = zeros()
    for counter in ("inverse_failures", "factor_failures", "direction_failures"):
        state[counter] = torch.zeros((), dtype=torch.int32, device=layer.weight.device)
    return state


def update_factors(
    layer: KroneckerLayer, state: State, records: list[Record], factor_decay: float, sharing: str
) -> None:
    """Average the statistics of one step into a layer's factors, as if its passes were one large batch.

    With ``T`` terms of the loss, of which ``g`` are the gradients of the layer's outputs (of their sum) and
    ``a`` its inputs: ``Γ = mean of a aᵀ`` over all rows, ``Λ = Σ g gᵀ / T`` (*expand*); *reduce* takes the
    mean of the inputs and the sum of the gradients over the positions of each example first.

    Source: Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
    Architectures", and its scale of Λ.
    """
    decay = corrected_decay(state["updates"], factor_decay)
    reduced = [_is_reduced(layer, r, sharing) for r in records]
    terms = [r.terms or layer.examples(r.layer_input) for r in records]
    rows = sum(
        layer.examples(r.layer_input) * (1 if reduce else layer.positions(r.layer_input))
        for r, reduce in zip(records, reduced, strict=True)
    )
    # The first record ages the factor, the others add to it: together one batch.
    for i, (record, reduce, count) in enumerate(zip(records, reduced, terms, strict=True)):
        # Sampled labels: their sum was differentiated. A mean loss: each gradient was divided by T.
        square = 1 if record.sampled else count**2
        info = layer.update_input_factor(
            state["input_factor"],
            record.layer_input,
            decay=decay if i == 0 else 1.0,
            scale=(1 - decay) / rows,
            reduce=reduce,
        )
        for k, grad in enumerate(record.grads()):
            info = info + layer.update_output_factor(
                state["output_factor"],
                grad,
                decay=decay if i == k == 0 else 1.0,
                scale=(1 - decay) * square / sum(terms),
                reduce=reduce,
            )
        state["factor_failures"] += info != 0
    state["updates"] += 1


def _is_reduced(layer: KroneckerLayer, record: Record, sharing: str) -> bool:
    examples, positions = layer.examples(record.layer_input), layer.positions(record.layer_input)
    if positions == 1 or record.layer_input.dim() < 3:
        return False
    # One term for each example: the model pools the positions of an example, whose gradients then add up.
    auto = sharing == "auto" and layer.pools and record.terms == examples
    return sharing == "reduce" or auto


def corrected_decay(updates: int, decay: float) -> float:
    """Return the decay that keeps an EMA free of its zero start: 0 for the first update."""
    return decay * (1 - decay**updates) / (1 - decay ** (updates + 1))


def refresh_inverses(layers: list[KroneckerLayer], states: list[State], rho: float) -> None:
    """Invert the factors with spectral damping; a failed inverse is not used, the previous one stays."""
    dense: list[tuple[State, str, int | None]] = []
    for layer, state in zip(layers, states, strict=True):
        for i, side in enumerate(SIDES):
            if layer.diagonal[i]:
                inverse, info = diagonal_damped_inverse(state[f"{side}_factor"], rho)
                _keep(state, side, None, inverse, info)
            else:
                blocks: list[int | None] = [None] if layer.blocks == 1 else [*range(layer.blocks)]
                dense += [(state, side, block) for block in blocks]
    if not dense:
        return
    result = kernels.damped_inverse(
        [_part(s[f"{side}_factor"], block) for s, side, block in dense],
        rho=rho,
        spectral_vector=[_part(s[f"{side}_vector"], block) for s, side, block in dense],
    )
    for state, side, _ in dense:
        state[f"{side}_residual"].zero_()
    for (state, side, block), inverse, info, residual in zip(
        dense, result.inverse, result.info, result.residual, strict=True
    ):
        _keep(state, side, block, inverse, info)
        largest = torch.maximum(state[f"{side}_residual"], residual)
        state[f"{side}_residual"].copy_(largest)


def _part(tensor: Tensor, block: int | None) -> Tensor:
    return tensor if block is None else tensor[block]


def _keep(state: State, side: str, block: int | None, inverse: Tensor, info: Tensor) -> None:
    # No wait for the device: what failed is replaced by what was there.
    target = _part(state[f"{side}_inverse"], block)
    target.copy_(torch.where(info == 0, inverse, target))
    state["inverse_failures"] += info != 0


def preconditioned(
    layers: list[KroneckerLayer],
    states: list[State],
    given: list[tuple[Tensor, Tensor | None]],
) -> tuple[list[list[Tensor]], Tensor]:
    """Multiply what is shaped like weight and bias by the inverses of both sides.

    Args:
        layers: The layers.
        states: Their states.
        given: For each layer the tensor for its weight, and that for its bias or None.

    Returns:
        For each layer ``[weight, bias]`` shaped like its parameters, and the inner products of results and
        arguments, ``[layers]``.
    """
    blocks: list[list[Tensor]] = [[] for _ in layers]
    dots: list[Tensor | None] = [None] * len(layers)
    grads: list[Tensor] = []
    columns: list[Tensor | None] = []
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    owners: list[int] = []
    for i, (layer, state, (weight, bias)) in enumerate(zip(layers, states, given, strict=True)):
        parts, ends = layer.split(weight, bias)
        if any(layer.diagonal):
            blocks[i], dots[i] = _diagonal_product(layer, state, parts[0], ends[0])
            continue
        for k, (part, end) in enumerate(zip(parts, ends, strict=True)):
            block = None if layer.blocks == 1 else k
            grads.append(part)
            columns.append(end)
            lefts.append(_part(state["output_inverse"], block))
            rights.append(_part(state["input_inverse"], block))
            owners.append(i)
    if grads:
        results, products = kernels.precondition(
            grads, lefts, rights, bias_grad=columns, return_dot=True
        )
        for owner, result, product in zip(owners, results, products, strict=True):
            blocks[owner].append(result)
            so_far = dots[owner]
            dots[owner] = product if so_far is None else so_far + product
    directions = [layer.join(found) for layer, found in zip(layers, blocks, strict=True)]
    return directions, torch.stack([d for d in dots if d is not None])


def _diagonal_product(
    layer: KroneckerLayer, state: State, part: Tensor, end: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    left, right = state["output_inverse"], state["input_inverse"]
    grad = part if end is None else torch.cat([part, end[:, None]], 1)
    grad = grad.to(left.dtype)
    result = left[:, None] * grad if layer.diagonal[0] else left @ grad
    result = result * right if layer.diagonal[1] else result @ right
    return [result], (result * grad).sum()
