# SPDX-License-Identifier: Apache-2.0
"""AdamW's moments and a step of AdamW's length along a direction, for all tensors of a model.

The direction is AdamW's own, so that AdamW itself takes part: its step needs no direction to be read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Outputs, Plan, Role, our_backend, relative_error
from shapes import VECTOR_SIZES, chosen_models
from torch import Tensor
from torch.optim.adamw import adamw

from grng_kernels import adam_moments_, grafted_step_, use_backend

LR, DECAY, BETAS, EPS, STEPS = 1e-2, 0.999, (0.9, 0.999), 1e-8, 5.0
LIMIT = 1e-5
Lists = tuple[list[Tensor], ...]  # parameters, moments, squares, gradients, directions


def _ours(given: Lists) -> None:
    params, means, squares, grads, directions = given
    lengths = adam_moments_(means, squares, grads, step=STEPS, betas=BETAS, eps=EPS)
    norms = torch.stack(torch._foreach_norm(directions)).double()
    grafted_step_(
        params, directions, means, squares, scale=lengths / norms, lr=LR, decay=DECAY, step=STEPS,
        betas=BETAS, eps=EPS,
    )  # fmt: skip


def _reference(given: Lists) -> None:
    with use_backend("reference"):
        _ours(given)


def _foreach(given: Lists) -> None:
    """What a careful user writes with torch's own functions for lists."""
    params, means, squares, grads, directions = given
    torch._foreach_lerp_(means, grads, 1 - BETAS[0])
    torch._foreach_mul_(squares, BETAS[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - BETAS[1])
    root = torch._foreach_sqrt(squares)
    torch._foreach_div_(root, (1 - BETAS[1] ** STEPS) ** 0.5)
    torch._foreach_add_(root, EPS)
    steps = torch._foreach_div(means, root)
    lengths = torch.stack(torch._foreach_norm(steps)) / (1 - BETAS[0] ** STEPS)
    scales = lengths / torch.stack(torch._foreach_norm(directions))
    moves = torch._foreach_mul(directions, list((LR * scales).unbind()))
    torch._foreach_mul_(params, DECAY)
    torch._foreach_sub_(params, moves)


def _adamw(fused: bool) -> Callable[[Lists], None]:
    def step(given: Lists) -> None:
        params, means, squares, grads, _ = given
        counts = [torch.tensor(STEPS - 1) for _ in params]
        adamw(
            params, grads, means, squares, [], counts, foreach=not fused, fused=fused, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=LR, weight_decay=(1 - DECAY) / LR, eps=EPS, maximize=False,
        )  # fmt: skip

    return step


def _case(plan: Plan, name: str, shapes: Sequence[tuple[int, ...]]) -> Case:
    generator = torch.Generator(plan.device).manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.empty(s, device=plan.device).normal_(generator=generator) for s in shapes]

    params, means, grads = draw(), draw(), draw()
    squares = [t.square_().add_(0.01) for t in draw()]
    new_means = [
        BETAS[0] * m.double() + (1 - BETAS[0]) * g for m, g in zip(means, grads, strict=True)
    ]
    new_squares = [
        BETAS[1] * v.double() + (1 - BETAS[1]) * g.double() ** 2
        for v, g in zip(squares, grads, strict=True)
    ]
    steps = [
        m / (1 - BETAS[0] ** STEPS) / ((v / (1 - BETAS[1] ** STEPS)).sqrt() + EPS)
        for m, v in zip(new_means, new_squares, strict=True)
    ]
    expected = [DECAY * p.double() - LR * u for p, u in zip(params, steps, strict=True)]
    directions = [(3 * u).float() for u in steps]
    start = [params, means, squares]

    def contender(name: str, backend: str, role: Role, step: Callable[[Lists], None]) -> Contender:
        state = [[t.clone() for t in ts] for ts in start]

        def call() -> Outputs:
            step((*state, grads, directions))
            return state[0]

        def reset() -> None:
            for ts, saved in zip(state, start, strict=True):
                torch._foreach_copy_(ts, saved)

        return Contender(name, backend, role, call, reset)

    backend, _ = our_backend({"cpu": "cpu"}, plan.device)
    d = sum(p.numel() for p in params)
    return Case(
        op="grafting",
        shape=name,
        dims={"parameters": d, "tensors": len(shapes)},
        dtype="float32",
        # Moments and gradient read, moments written; direction read twice; parameter read and written.
        bytes=36.0 * d,
        flops=25.0 * d,
        error=relative_error(expected),
        limit=LIMIT,
        contenders=[
            contender("grng", backend, "ours", _ours),
            contender("grng reference", "reference", "variant", _reference),
            contender("foreach", "torch", "rival", _foreach),
            contender("AdamW foreach", "torch", "yardstick", _adamw(False)),
            contender("AdamW fused", "torch", "yardstick", _adamw(True)),
        ],
        modes=("eager",),
    )


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan."""
    default = () if plan.quick else ("mlp-fashion", "vit-b16-lora-r16")
    for model in chosen_models(plan.shapes, default):
        yield _case(plan, f"{model.name}", list(model.weights))
    for d in plan.sizes or ((1_000, 10_000) if plan.quick else VECTOR_SIZES):
        yield _case(plan, f"d={d:.0e}", [(d,)])


BENCH = Bench("grafting", "adam_moments_ and grafted_step_: a step of AdamW's length", cases)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
