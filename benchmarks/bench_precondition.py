# SPDX-License-Identifier: Apache-2.0
"""Two-sided product ``left · grad · right``, for one weight and for all of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Outputs, Plan, compiled, relative_error
from shapes import WEIGHTS, chosen_models
from torch import Tensor

from grng_kernels import precondition

LIMIT = 5e-5
Triple = tuple[Tensor, Tensor, Tensor]


def _data(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Triple]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(m: int, n: int) -> Tensor:
        return torch.empty(m, n, device=device).normal_(generator=generator)

    def inverse(n: int) -> Tensor:
        y = normal(n, n) / n**0.5
        return (y + y.mT) / 2 + 2 * torch.eye(n, device=device)

    return [(normal(m, n), inverse(m), inverse(n)) for m, n in shapes]


def _product(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Both orders cost the same; the larger inverse first leaves the smaller product for last."""
    m, n = grad.shape[-2:]
    product: Tensor = (left @ grad) @ right if m >= n else left @ (grad @ right)
    return product


def _loop(data: Sequence[Triple]) -> Callable[[], Outputs]:
    return lambda: [_product(*triple) for triple in data]


def _by_shape(data: Sequence[Triple]) -> Callable[[], Outputs]:
    """One batched product for each shape; the inverses lie stacked already, gradients do not."""
    shapes = dict.fromkeys(g.shape for g, _, _ in data)
    groups = [[i for i, (g, _, _) in enumerate(data) if g.shape == s] for s in shapes]
    lefts = [torch.stack([data[i][1] for i in group]) for group in groups]
    rights = [torch.stack([data[i][2] for i in group]) for group in groups]

    def call() -> Outputs:
        results: list[Tensor] = [g for g, _, _ in data]
        for group, left, right in zip(groups, lefts, rights, strict=True):
            out = _product(torch.stack([data[i][0] for i in group]), left, right)
            for i, one in zip(group, out.unbind(), strict=True):
                results[i] = one
        return results

    return call


def _ours(data: Sequence[Triple]) -> Callable[[], Outputs]:
    grads, lefts, rights = (list(column) for column in zip(*data, strict=True))
    return lambda: precondition(grads, lefts, rights)


def _case(plan: Plan, name: str, shapes: Sequence[tuple[int, int]]) -> Case:
    data = _data(shapes, plan.device)
    expected = [left.double() @ g.double() @ right.double() for g, left, right in data]
    contenders = [
        Contender("grng", "reference", "ours", _ours(data)),
        Contender("matmul loop", "torch", "rival", _loop(data)),
    ]
    if len(data) > 1:
        contenders.append(
            Contender(
                "bmm by shape",
                "torch",
                "rival",
                _by_shape(data),
                notes=("bmm: inverses stored stacked",),
            )
        )
    if plan.compile:
        contenders.append(Contender("matmul compiled", "inductor", "rival", compiled(_loop(data))))
    return Case(
        op="precondition",
        shape=name,
        dims={"weights": len(shapes), "shapes": sorted({f"{m}x{n}" for m, n in shapes})},
        dtype="float32",
        bytes=sum(4.0 * (m * m + n * n + 2 * m * n) for m, n in shapes),
        flops=sum(2.0 * m * n * (m + n) for m, n in shapes),
        error=relative_error(expected),
        limit=LIMIT,
        contenders=contenders,
    )


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan; ``sizes`` are orders of square weights."""
    default = (
        () if plan.quick else ("mlp-fashion", "minilm-lora", "vit-b16-lora-r16", "roberta-lora-r8")
    )
    for model in chosen_models(plan.shapes, default):
        yield _case(plan, model.name, model.weights)
    if plan.sizes:
        single = [(n, n) for n in plan.sizes]
    else:
        single = [(64, 16), (128, 128)] if plan.quick else list(WEIGHTS)
    for m, n in single:
        yield _case(plan, f"{m}x{n}", [(m, n)])


BENCH = Bench(
    "precondition", "precondition: left inverse times gradient times right inverse", cases
)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
