# SPDX-License-Identifier: Apache-2.0
"""Kronecker factors in an optimizer's state: their moving averages, their inverses, and their use."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grng_kernels as kernels
from grng.curvature.diagonal import diagonal_damped_inverse
from grng.curvature.layers import KroneckerLayer, Record
from grng.optim.devices import by_device, stacked
from grng.optim.inversions import KEY, Outcome, new_inversions, note_inversions

State = dict[str, Any]
SIDES = ("output", "input")
COUNTERS = ("inverse_failures", "factor_failures", "direction_failures")


def factor_dtype(layer: KroneckerLayer) -> torch.dtype:
    """Return the dtype of a layer's factors: fp32, and fp64 for a weight in fp64."""
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


def new_factors(
    layer: KroneckerLayer, *, spectral: bool = True, device: torch.device | str | None = None
) -> State:
    """Return the state of a layer's factors before the first statistics: zeros.

    ``spectral`` damping needs a vector for the norm of each dense factor. ``device`` is that of the weight;
    ``"meta"`` tells what there will be, without memory.
    """
    dtype = factor_dtype(layer)
    device = layer.weight.device if device is None else device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    state: State = {}
    for i, side in enumerate(SIDES):
        shape = layer.factor_shape(i)
        state[f"{side}_factor"] = zeros(*shape)
        state[f"{side}_inverse"] = zeros(*shape)
        if spectral and not layer.diagonal[i]:
            state[f"{side}_vector"] = zeros(*shape[:-1])
        state[f"{side}_residual"] = zeros()
        state[f"{side}_updates"] = torch.zeros((), dtype=torch.int32, device=device)
    add_counters(layer, state, device=device)
    return state


def add_counters(
    layer: KroneckerLayer, state: State, *, device: torch.device | str | None = None
) -> None:
    """Add the counters that a state lacks: of failures, at zero, and of updates, which were one for both."""
    device = layer.weight.device if device is None else device
    both = state.pop("updates", 0)
    for side in SIDES:
        if f"{side}_updates" not in state:
            state[f"{side}_updates"] = torch.tensor(int(both), dtype=torch.int32, device=device)
    for counter in COUNTERS:
        if counter not in state:
            state[counter] = torch.zeros((), dtype=torch.int32, device=device)
    if KEY not in state:
        state.update(new_inversions(layer, factor_dtype(layer), device))


def update_factors(
    layer: KroneckerLayer,
    state: State,
    records: list[Record],
    factor_decay: float,
    sharing: str,
    *,
    input_infos: list[Tensor] | None = None,
) -> list[Tensor]:
    """Average the statistics of one step into a layer's factors, as if its passes were one large batch.

    With ``T`` terms of the loss, of which ``g`` are the gradients of the layer's outputs (of their sum) and
    ``a`` its inputs: ``Γ = mean of a aᵀ`` over all rows, ``Λ = Σ g gᵀ / T`` (*expand*); *reduce* takes the
    mean of the inputs and the sum of the gradients over the positions of each example first.

    ``input_infos``: see :func:`add_statistics`, whose result is returned.

    Source: Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
    Architectures", and its scale of Λ.
    """
    decays = [corrected_decay(n, factor_decay) for n in updates_so_far(state)]
    return update_factors_with(layer, state, records, decays, sharing, input_infos=input_infos)


def update_factors_with(
    layer: KroneckerLayer,
    state: State,
    records: list[Record],
    decays: Sequence[float | Tensor],
    sharing: str,
    *,
    input_infos: list[Tensor] | None = None,
) -> list[Tensor]:
    """Do what :func:`update_factors` does, with decays, output side first, that are used as they are."""
    reduced = [is_reduced(layer, r, sharing) for r in records]
    terms = [r.terms or layer.examples(r.layer_input) for r in records]
    rows = sum(
        layer.examples(r.layer_input) * (1 if reduce else layer.positions(r.layer_input))
        for r, reduce in zip(records, reduced, strict=True)
    )
    # A module that is used twice in one forward pass has two records of the same terms.
    passes = {(r.observation or -i): n for i, (r, n) in enumerate(zip(records, terms, strict=True))}
    total = sum(passes.values())
    # Sampled labels: their sum was differentiated. A mean loss: each gradient was divided by T.
    squares = [1 if r.sampled else n**2 for r, n in zip(records, terms, strict=True)]
    return add_statistics(
        layer,
        state,
        records,
        decays,
        input_weights=[1 / rows] * len(records),
        output_weights=[s / total for s in squares],
        reduced=reduced,
        input_infos=input_infos,
    )


def add_statistics(
    layer: KroneckerLayer,
    state: State,
    records: list[Record],
    decays: Sequence[float | Tensor],
    *,
    input_weights: Sequence[float],
    output_weights: Sequence[float],
    reduced: Sequence[bool],
    input_infos: list[Tensor] | None = None,
) -> list[Tensor]:
    """``factor <- decay·factor + (1 - decay)·Σ weight·(sum of squares of a record)``, both factors.

    ``decays`` are that of the output and that of the input factor. ``input_infos``, what this returned for a
    layer with the same inputs, means that its input factor is here already.

    Returns:
        ``Info`` of each record's inputs.
    """
    if input_infos is None:
        input_infos = _add_inputs(layer, state, records, decays[1], input_weights, reduced)
    # The first gradient that serves ages the factor, the others add to it: together one batch.
    age, share = decays[0], 1 - decays[0]
    infos: list[Tensor] = []
    for i, record in enumerate(records):
        failed = input_infos[i] != 0
        for grad in record.grads():
            if infos:
                age = torch.where(infos[-1] == 0, 1.0, age)
            info = layer.update_output_factor(
                state["output_factor"],
                grad,
                decay=age,
                scale=share * output_weights[i],
                reduce=reduced[i],
            )
            infos.append(info)
            failed = failed | (info != 0)
        state["factor_failures"] += failed
    _count(state, "output", infos)
    return input_infos


def _add_inputs(
    layer: KroneckerLayer,
    state: State,
    records: list[Record],
    decay: float | Tensor,
    weights: Sequence[float],
    reduced: Sequence[bool],
) -> list[Tensor]:
    age, share = decay, 1 - decay
    infos: list[Tensor] = []
    for i, record in enumerate(records):
        if infos:
            age = torch.where(infos[-1] == 0, 1.0, age)
        info = layer.update_input_factor(
            state["input_factor"],
            record.layer_input,
            decay=age,
            scale=share * weights[i],
            reduce=reduced[i],
        )
        infos.append(info)
    _count(state, "input", infos)
    return infos


def _count(state: State, side: str, infos: list[Tensor]) -> None:
    # A factor that is still zero, as its first statistics were bad, starts with the next ones.
    served = infos[0] == 0
    for info in infos[1:]:
        served = served | (info == 0)
    state[f"{side}_updates"] += served


def updates_so_far(state: State) -> list[int | Tensor]:
    """Return how often the output and the input factor were updated: on a device without waiting for it."""
    counts = [state[f"{side}_updates"] for side in SIDES]
    return [int(n) if n.is_cpu else n for n in counts]


def is_reduced(layer: KroneckerLayer, record: Record, sharing: str) -> bool:
    """Return whether a row of the statistics is an example, and not each of its positions."""
    examples, positions = layer.examples(record.layer_input), layer.positions(record.layer_input)
    if positions == 1:
        return False
    # One term for each example: the model pools the positions of an example, whose gradients then add up.
    auto = sharing == "auto" and layer.pools and record.terms == examples
    return sharing == "reduce" or auto


def corrected_decay(updates: int | Tensor, decay: float) -> float | Tensor:
    """Return the decay that keeps an EMA free of its zero start: 0 for the first update."""
    if isinstance(updates, Tensor):
        updates = updates.double()  # in fp32 the differences below would lose what matters
    return decay * (1 - decay**updates) / (1 - decay ** (updates + 1))


class Part(NamedTuple):
    """One dense matrix of the factors of a layer: the whole factor, or that of one block."""

    state: State
    side: str
    block: int | None
    # States whose input factor is equal to this one: they get the same inverse.
    followers: tuple[State, ...] = ()

    def of(self, kind: str) -> Tensor:
        """Return its part of the state ``kind``: "factor", "inverse" or "vector"."""
        return _part(self.state[f"{self.side}_{kind}"], self.block)


def dense_parts(layers: list[KroneckerLayer], states: list[State]) -> list[Part]:
    """Return all dense matrices of the factors, by layers, sides (output, input) and blocks."""
    return [
        part
        for layer, state in zip(layers, states, strict=True)
        for part in _parts(layer, state)
        if part.of("factor").dim() > 1
    ]


def _parts(layer: KroneckerLayer, state: State) -> list[Part]:
    return [
        Part(state, side, block)
        for i, side in enumerate(SIDES)
        for block in ([None] if layer.diagonal[i] or layer.blocks == 1 else range(layer.blocks))
    ]


def refresh_inverses(
    layers: list[KroneckerLayer],
    states: list[State],
    rho: float,
    leaders: Sequence[State] | None = None,
) -> None:
    """Invert the factors with spectral damping; a failed inverse is not used, the previous one stays.

    ``leaders`` are for each state the first one of the list with an equal input factor, itself if no other.
    """
    parts = []
    for i, layer in enumerate(layers):
        state = states[i]
        followers: tuple[State, ...] = ()
        if leaders is not None:
            followers = tuple(
                s for s, leader in zip(states, leaders, strict=True) if leader is state is not s
            )
        for part in _parts(layer, state):
            if part.side == "output":
                parts.append(part)
            elif leaders is None or leaders[i] is state:
                parts.append(part._replace(followers=followers))
    found: list[tuple[Part, Outcome]] = []
    for part in parts:
        factor = part.of("factor")
        if factor.dim() == 1:
            inverse, *rest = diagonal_damped_inverse(factor, rho)
            found.append((part, Outcome(*rest)))
            _keep(part, inverse, rest[-1])
    for together in by_device(
        [p for p in parts if p.of("factor").dim() > 1], lambda p: p.of("factor")
    ):
        result = kernels.damped_inverse(
            [p.of("factor") for p in together],
            rho=rho,
            spectral_vector=[p.of("vector") for p in together],
        )
        found += _keep_all(together, result)
    _note(found)


def keep_inverses(parts: list[Part], result: kernels.DampedInverse) -> None:
    """Put inverses into the state, where they did not fail, with the largest residual of each side."""
    _note(_keep_all(parts, result))


def _keep_all(parts: list[Part], result: kernels.DampedInverse) -> list[tuple[Part, Outcome]]:
    for part in parts:
        part.state[f"{part.side}_residual"].zero_()
    for part, inverse, info, residual in zip(
        parts, result.inverse, result.info, result.residual, strict=True
    ):
        _keep(part, inverse, info)
        largest = part.state[f"{part.side}_residual"]
        largest.copy_(torch.maximum(largest, residual))
        for state in part.followers:
            state["input_residual"].copy_(largest)
    outcomes = map(Outcome, result.damping, result.spectral_norm, result.info)
    return list(zip(parts, outcomes, strict=True))


def _part(tensor: Tensor, block: int | None) -> Tensor:
    return tensor if block is None else tensor[block]


def _keep(part: Part, inverse: Tensor, info: Tensor) -> None:
    # No wait for the device: what failed is replaced by what was there.
    target = part.of("inverse")
    if part.block is None:
        # Not written: a step that runs out of memory later puts it back.
        part.state[f"{part.side}_inverse"] = torch.where(info == 0, inverse, target, out=inverse)
    else:
        target.copy_(torch.where(info == 0, inverse, target))
    for state in part.followers:
        for kind in ("inverse", "vector"):
            key = f"{part.side}_{kind}"
            if key in state and part.block is None:
                state[key] = part.of(kind).clone()
            elif key in state:
                _part(state[key], part.block).copy_(part.of(kind))


def _note(found: list[tuple[Part, Outcome]]) -> None:
    """Note how inversions went, of the layers and of those that share the inverse."""
    states: dict[int, State] = {}
    rows: dict[int, list[Outcome | None]] = {}
    for part, outcome in found:
        for state in (part.state, *part.followers):
            key = id(state)
            if key not in states:
                states[key], rows[key] = state, [None] * len(state[KEY])
            # The blocks of the output side come first, those of the input side last.
            blocks = 1 if part.block is None else len(state[f"{part.side}_factor"])
            first = 0 if part.side == "output" else len(rows[key]) - blocks
            rows[key][first + (part.block or 0)] = outcome
    if states:
        note_inversions(list(states.values()), list(rows.values()))


def preconditioned(
    layers: list[KroneckerLayer],
    states: list[State],
    given: list[tuple[Tensor, Tensor | None]],
    *,
    with_products: bool = True,
) -> tuple[list[list[Tensor]], Tensor | None]:
    """Multiply what is shaped like weight and bias by the inverses of both sides.

    Args:
        layers: The layers.
        states: Their states.
        given: For each layer the tensor for its weight, and that for its bias or None.
        with_products: Whether inner products are wanted: they are one more pass over everything.

    Returns:
        For each layer ``[weight, bias]`` shaped like its parameters, and the inner products of results and
        arguments, ``[layers]``, or None.
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
            blocks[i], dots[i] = _diagonal_product(layer, state, parts[0], ends[0], with_products)
            continue
        for k, (part, end) in enumerate(zip(parts, ends, strict=True)):
            block = None if layer.blocks == 1 else k
            grads.append(part)
            columns.append(end)
            lefts.append(_part(state["output_inverse"], block))
            rights.append(_part(state["input_inverse"], block))
            owners.append(i)
    calls = list(zip(owners, grads, lefts, rights, columns, strict=True))
    for call in by_device(calls, lambda given: given[1]):
        here, gs, ls, rs, ends = (list(column) for column in zip(*call, strict=True))
        if not with_products:
            for owner, result in zip(
                here, kernels.precondition(gs, ls, rs, bias_grad=ends), strict=True
            ):
                blocks[owner].append(result)
            continue
        results, products = kernels.precondition(gs, ls, rs, bias_grad=ends, return_dot=True)
        for owner, result, product in zip(here, results, products, strict=True):
            blocks[owner].append(result)
            so_far = dots[owner]
            dots[owner] = product if so_far is None else so_far + product
    directions = [layer.join(found) for layer, found in zip(layers, blocks, strict=True)]
    return directions, stacked([d for d in dots if d is not None]) if with_products else None


def _diagonal_product(
    layer: KroneckerLayer, state: State, part: Tensor, end: Tensor | None, with_product: bool
) -> tuple[list[Tensor], Tensor | None]:
    left, right = state["output_inverse"], state["input_inverse"]
    grad = part if end is None else torch.cat([part, end[:, None]], 1)
    grad = grad.to(left.dtype)
    result = left[:, None] * grad if layer.diagonal[0] else left @ grad
    result = result * right if layer.diagonal[1] else result @ right
    return [result], (result * grad).sum() if with_product else None
