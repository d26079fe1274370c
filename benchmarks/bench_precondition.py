# SPDX-License-Identifier: Apache-2.0
"""Two-sided product ``left · grad · right``, for one weight and for all of a model.

Inverses are shared as in the models: weights that read the same tensor, like the A matrices of the query
and the value of a LoRA layer, have the same input factor, and their ``right`` is one tensor object. The
rivals get the same tensors, and two of them join such gradients so that the inverse is read once.
A shared inverse counts once in the memory traffic.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from harness import cli
from harness.case import (
    Bench,
    Case,
    Contender,
    Outputs,
    Plan,
    compiled,
    our_backend,
    relative_error,
)
from shapes import WEIGHTS, chosen_models
from torch import Tensor

from grng_kernels import precondition, use_backend
from grng_kernels.precondition.op import cpu_serves

LIMIT = 5e-5
# Models that are also measured with the inner products of a KL clip.
WITH_DOT = ("minilm-lora", "vit-b16-lora-r16")
Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Item:
    """One weight: its gradient, that of its bias as a column of its own, and both inverses.

    Attributes:
        grad: ``[m, n]``; without the column of the bias where there is one.
        bias: ``[m]``, or None.
        left: ``[m, m]``.
        right: ``[n, n]``, with a bias one more; the same object for items that share it.
    """

    grad: Tensor
    bias: Tensor | None
    left: Tensor
    right: Tensor

    def whole(self) -> Tensor:
        """Return the gradient with the column of the bias; a copy where there is one."""
        if self.bias is None:
            return self.grad
        return torch.cat([self.grad, self.bias[:, None]], dim=1)


def _data(
    shapes: Sequence[tuple[int, int]], inputs: Sequence[int], bias: bool, device: torch.device
) -> list[Item]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(m: int, n: int) -> Tensor:
        return torch.empty(m, n, device=device).normal_(generator=generator)

    def inverse(n: int) -> Tensor:
        y = normal(n, n) / n**0.5
        return (y + y.mT) / 2 + 2 * torch.eye(n, device=device)

    rights: dict[int, Tensor] = {}
    items = []
    for (m, n), place in zip(shapes, inputs, strict=True):
        grad, left = normal(m, n), inverse(m)
        if place not in rights:
            rights[place] = inverse(n)
        column = grad[:, -1].clone() if bias else None
        grad = grad[:, :-1].contiguous() if bias else grad
        items.append(Item(grad, column, left, rights[place]))
    return items


def _readers(items: Sequence[Item]) -> list[list[int]]:
    """Return the places of the items, those with the same ``right`` together."""
    groups: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(id(item.right), []).append(i)
    return list(groups.values())


def _product(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Both orders cost the same; the larger inverse first leaves the smaller product for last."""
    m, n = grad.shape[-2:]
    product: Tensor = (left @ grad) @ right if m >= n else left @ (grad @ right)
    return product


def _finished(results: list[Tensor], grads: Sequence[Tensor], dot: bool) -> Outputs:
    if not dot:
        return results
    products = [(d * g).sum() for d, g in zip(results, grads, strict=True)]
    return [*results, torch.stack(products)]


def _loop(items: Sequence[Item], dot: bool) -> Call:
    def call() -> Outputs:
        grads = [item.whole() for item in items]
        results = [_product(g, item.left, item.right) for g, item in zip(grads, items, strict=True)]
        return _finished(results, grads, dot)

    return call


def _joined(items: Sequence[Item], dot: bool) -> Call:
    """Gradients of the same input one below the other: one product with their inverse."""
    groups = _readers(items)

    def call() -> Outputs:
        grads = [item.whole() for item in items]
        results = [*grads]
        for group in groups:
            if len(group) == 1:
                i = group[0]
                results[i] = _product(grads[i], items[i].left, items[i].right)
                continue
            product = torch.cat([grads[i] for i in group]) @ items[group[0]].right
            for i, rows in zip(group, product.split([len(grads[i]) for i in group]), strict=True):
                results[i] = items[i].left @ rows
        return _finished(results, grads, dot)

    return call


def _by_shape(items: Sequence[Item], dot: bool) -> Call:
    """One batched product for each shape; the inverses lie stacked already, gradients do not.

    Where all inverses of a shape have as many readers, each is stacked once.
    """
    shapes = [(len(item.left), len(item.right)) for item in items]
    readers = _readers(items)
    groups: list[tuple[list[int], int]] = []
    for shape in dict.fromkeys(shapes):
        mine = [[i for i in group if shapes[i] == shape] for group in readers]
        mine = [group for group in mine if group]
        counts = {len(group) for group in mine}
        share = counts.pop() if len(counts) == 1 and shape[0] < shape[1] else 1
        groups.append(([i for group in mine for i in group], share))
    lefts = [torch.stack([items[i].left for i in group]) for group, _ in groups]
    rights = [torch.stack([items[i].right for i in group[::share]]) for group, share in groups]

    def call() -> Outputs:
        grads = [item.whole() for item in items]
        results = [*grads]
        for (group, share), left, right in zip(groups, lefts, rights, strict=True):
            stack = torch.stack([grads[i] for i in group])
            if share > 1:
                count, m, n = stack.shape
                out = left @ (stack.view(-1, share * m, n) @ right).view(count, m, n)
            else:
                out = _product(stack, left, right)
            for i, one in zip(group, out.unbind(), strict=True):
                results[i] = one
        return _finished(results, grads, dot)

    return call


def _ours(items: Sequence[Item], dot: bool) -> Call:
    grads, lefts, rights = (
        [i.grad for i in items],
        [i.left for i in items],
        [i.right for i in items],
    )
    biases = None if items[0].bias is None else [i.bias for i in items]

    def call() -> Outputs:
        if not dot:
            return precondition(grads, lefts, rights, bias_grad=biases)
        results, dots = precondition(grads, lefts, rights, bias_grad=biases, return_dot=True)
        return [*results, dots]

    return call


def _on_reference(call: Call) -> Call:
    def wrapped() -> Outputs:
        with use_backend("reference"):
            return call()

    return wrapped


def _backend(
    shapes: Sequence[tuple[int, int]], device: torch.device
) -> tuple[str, tuple[str, ...]]:
    """Return what ``auto`` runs these items on: a kernel, the reference, or both."""
    backend, remarks = our_backend({"cpu": "cpu", "cuda": "triton"}, device)
    if backend == "cpu":
        narrow = [i in cpu_serves(shapes) for i in range(len(shapes))]
    elif backend == "triton":
        from grng_kernels.precondition.triton_kernel import supports

        narrow = [supports(*shape) for shape in shapes]
    else:
        return backend, remarks
    if all(narrow):
        return backend, remarks
    return (f"{backend}+reference" if any(narrow) else "reference"), remarks


def _expected(items: Sequence[Item], dot: bool) -> list[Tensor]:
    grads = [item.whole().double() for item in items]
    results = [
        item.left.double() @ g @ item.right.double() for g, item in zip(grads, items, strict=True)
    ]
    return [*_finished(results, grads, dot)]


def _contenders(
    plan: Plan, items: Sequence[Item], shapes: Sequence[tuple[int, int]], dot: bool
) -> Iterator[Contender]:
    backend, remarks = _backend(shapes, plan.device)
    ours = _ours(items, dot)
    yield Contender("grng", backend, "ours", ours, notes=remarks)
    if backend != "reference":
        yield Contender("grng reference", "reference", "yardstick", _on_reference(ours))
    yield Contender("matmul loop", "torch", "rival", _loop(items, dot))
    if len(_readers(items)) < len(items):
        yield Contender("matmul, shared joined", "torch", "rival", _joined(items, dot))
    if len(items) > 1:
        note = "bmm: inverses stored stacked, a shared one once"
        yield Contender("bmm by shape", "torch", "rival", _by_shape(items, dot), notes=(note,))
    if plan.compile:
        call = compiled(_loop(items, dot))
        yield Contender("matmul compiled", "inductor", "rival", call)


def _case(
    plan: Plan,
    name: str,
    shapes: Sequence[tuple[int, int]],
    inputs: Sequence[int] | None = None,
    *,
    bias: bool = False,
    dot: bool = False,
) -> Case:
    items = _data(shapes, inputs or range(len(shapes)), bias, plan.device)
    groups = _readers(items)
    shared = len(items) - len(groups)
    notes = []
    if shared:
        notes.append("weights that read the same tensor are given the same right inverse")
    if bias:
        notes.append("bias column: grng is given bias_grad, the rivals concatenate")
    if dot:
        notes.append("inner products <result, gradient> too: return_dot; rivals: sum, stack")
    return Case(
        op="precondition",
        shape=name,
        dims={
            "weights": len(shapes),
            "shapes": sorted({f"{m}x{n}" for m, n in shapes}),
            "right_inverses": len(groups),
        },
        dtype="float32",
        bytes=sum(4.0 * (m * m + 2 * m * n) for m, n in shapes)
        + sum(4.0 * items[group[0]].right.numel() for group in groups),
        flops=sum(2.0 * m * n * (m + n + dot) for m, n in shapes),
        error=relative_error(_expected(items, dot)),
        limit=LIMIT,
        contenders=list(_contenders(plan, items, shapes, dot)),
        notes=tuple(notes),
    )


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan; ``sizes`` are orders of square weights."""
    default = (
        ("mlp-fashion", "minilm-lora")
        if plan.quick
        else ("mlp-fashion", "minilm-lora", "vit-b16-lora-r16", "roberta-lora-r8")
    )
    models = chosen_models(plan.shapes, default)
    for model in models:
        yield _case(plan, model.name, model.weights, model.inputs)
    if plan.sizes:
        single = [(n, n) for n in plan.sizes]
    else:
        single = [(64, 16), (128, 128)] if plan.quick else list(WEIGHTS)
    for m, n in single:
        yield _case(plan, f"{m}x{n}", [(m, n)])
    # Last: where time is short, the plain product comes first.
    for model in models:
        if all(model.factors[i].bias for i in model.inputs):
            yield _case(plan, f"{model.name} bias", model.weights, model.inputs, bias=True)
        if model.name in WITH_DOT:
            yield _case(plan, f"{model.name} dot", model.weights, model.inputs, dot=True)


BENCH = Bench(
    "precondition", "precondition: left inverse times gradient times right inverse", cases
)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
