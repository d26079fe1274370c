# SPDX-License-Identifier: Apache-2.0
"""Rank-one preconditioning by Sherman-Morrison, on one vector and on the blocks of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from harness import cli
from harness.case import (
    Bench,
    Case,
    Contender,
    Outputs,
    Plan,
    Role,
    compiled,
    our_backend,
    relative_error,
)
from shapes import VECTOR_SIZES, chosen_models
from torch import Tensor

from grng_kernels import rank1_precondition

DAMPING = 0.1
LIMIT = 5e-5
Formula = Callable[[Sequence[Tensor], Sequence[Tensor]], Outputs]


def _fp32(grads: Sequence[Tensor], scores: Sequence[Tensor]) -> Outputs:
    dot = sum(torch.dot(u, g) for u, g in zip(scores, grads, strict=True))
    square = sum(torch.dot(u, u) for u in scores)
    coefficient = dot / (DAMPING + square)
    return [(g - coefficient * u) / DAMPING for g, u in zip(grads, scores, strict=True)]


def _foreach(grads: Sequence[Tensor], scores: Sequence[Tensor]) -> Outputs:
    dot = torch.stack([torch.dot(u, g) for u, g in zip(scores, grads, strict=True)]).sum()
    square = torch.stack(torch._foreach_norm(list(scores))).square().sum()
    coefficient = dot / (DAMPING + square)
    results = torch._foreach_mul(list(scores), -coefficient)
    torch._foreach_add_(results, list(grads))
    torch._foreach_div_(results, DAMPING)
    return results


def _fp64_dots(grads: Sequence[Tensor], scores: Sequence[Tensor]) -> Outputs:
    pairs = zip(scores, grads, strict=True)
    dot = torch.stack([(u.double() * g.double()).sum() for u, g in pairs]).sum()
    square = torch.stack([u.double().square().sum() for u in scores]).sum()
    coefficient = (dot / (DAMPING + square)).float()
    return [(g - coefficient * u) / DAMPING for g, u in zip(grads, scores, strict=True)]


def _ours(grads: Sequence[Tensor], scores: Sequence[Tensor]) -> Outputs:
    return rank1_precondition(list(grads), list(scores), damping=DAMPING)


def _case(plan: Plan, name: str, sizes: Sequence[int]) -> Case:
    generator = torch.Generator(plan.device).manual_seed(0)

    def blocks() -> list[Tensor]:
        return [torch.empty(n, device=plan.device).normal_(generator=generator) for n in sizes]

    scores = blocks()
    # Half along the score: the rank-one part then changes the result as much as the damping does.
    grads = [g + u for g, u in zip(blocks(), scores, strict=True)]
    wide = ([g.double() for g in grads], [u.double() for u in scores])

    def contender(name: str, backend: str, role: Role, formula: Formula) -> Contender:
        return Contender(name, backend, role, lambda: formula(grads, scores))

    backend, _ = our_backend({"cpu": "cpu", "cuda": "triton"}, plan.device)
    contenders = [
        contender("grng", backend, "ours", _ours),
        contender("fp32", "torch", "rival", _fp32),
        contender("fp64 dot products", "torch", "rival", _fp64_dots),
    ]
    if len(sizes) > 1:
        contenders.append(contender("foreach", "torch", "rival", _foreach))
    if plan.compile:
        contenders.append(contender("fp32 compiled", "inductor", "rival", compiled(_fp32)))
    d = sum(sizes)
    return Case(
        op="rank_one",
        shape=name,
        dims={"parameters": d, "blocks": len(sizes)},
        dtype="float32",
        bytes=20.0 * d,
        flops=7.0 * d,
        error=relative_error(_fp64_dots_exact(*wide)),
        limit=LIMIT,
        contenders=contenders,
    )


def _fp64_dots_exact(grads: Sequence[Tensor], scores: Sequence[Tensor]) -> Outputs:
    dot = sum((u * g).sum() for u, g in zip(scores, grads, strict=True))
    square = sum(u.square().sum() for u in scores)
    return [
        (g - dot / (DAMPING + square) * u) / DAMPING for g, u in zip(grads, scores, strict=True)
    ]


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan."""
    default = () if plan.quick else ("mlp-fashion", "vit-b16-lora-r16")
    for model in chosen_models(plan.shapes, default):
        yield _case(plan, f"{model.name} blocks", [m * n for m, n in model.weights])
    for d in plan.sizes or ((1_000, 10_000) if plan.quick else VECTOR_SIZES):
        yield _case(plan, f"d={d:.0e}", [d])


BENCH = Bench(
    "rank_one", "rank1_precondition: inverse of damping times I plus a rank-one matrix", cases
)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
