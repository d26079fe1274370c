# SPDX-License-Identifier: Apache-2.0
"""``RankOneNPG.step()`` beside ``torch.optim.Adam.step()``, on the blocks of an MLP.

The score is there before: what is timed is the update, checks and the wait for the device included. Taking
the score is a backward pass more than Adam needs, which depends on the policy and is not in these times.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Outputs, Plan, Role, our_backend, relative_error
from torch import Tensor, nn

from grng import RankOneNPG
from grng_kernels import use_backend

SIZES = (100_000, 1_000_000, 10_000_000)
LR, DAMPING, BETAS, EPS, STEPS = 1e-3, 0.1, (0.9, 0.999), 1e-8, 5.0
ACTIONS = 10
LIMIT = 1e-5


def _shapes(size: int) -> list[tuple[int, ...]]:
    """Blocks of an MLP of two hidden layers as wide as its input, of about that size."""
    width = math.isqrt(size // 2)
    return [(width, width), (width,), (width, width), (width,), (ACTIONS, width), (ACTIONS,)]


def _npg(
    start: list[Tensor], grads: list[Tensor], scores: list[Tensor], backend: str
) -> tuple[list[Tensor], Callable[[], None]]:
    params = _with_grads(start, grads)
    optimizer = RankOneNPG(params, LR, damping=DAMPING, step_length="fixed")
    # An expression whose gradient is the score.
    optimizer.observe(sum((p * u).sum() for p, u in zip(params, scores, strict=True)))  # type: ignore[arg-type]
    seen = optimizer._pending

    def step() -> None:
        optimizer._pending = seen
        with use_backend(backend):
            optimizer.step()

    return list(params), step


def _adam(
    start: list[Tensor],
    grads: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    fused: bool,
) -> tuple[list[Tensor], Callable[[], None], Callable[[], None]]:
    params = _with_grads(start, grads)
    optimizer = torch.optim.Adam(params, LR, BETAS, EPS, foreach=not fused, fused=fused)
    count = torch.tensor(STEPS - 1, device=start[0].device if fused else "cpu")
    for p, mean, square in zip(params, *moments, strict=True):
        optimizer.state[p] = {
            "step": count.clone(),
            "exp_avg": mean.clone(),
            "exp_avg_sq": square.clone(),
        }
    saved = copy.deepcopy(optimizer.state_dict())

    def reset() -> None:
        for p, state in zip(params, saved["state"].values(), strict=True):
            for key, value in state.items():
                optimizer.state[p][key].copy_(value)

    return list(params), optimizer.step, reset


def _with_grads(start: list[Tensor], grads: list[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(t.clone()) for t in start]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


def _case(plan: Plan, size: int) -> Case:
    generator = torch.Generator(plan.device).manual_seed(0)

    def draw() -> list[Tensor]:
        return [
            torch.empty(s, device=plan.device).normal_(generator=generator) for s in _shapes(size)
        ]

    start, scores, means = draw(), draw(), draw()
    # Half along the score: the rank-one part then changes the result as much as the damping does.
    grads = [g + u for g, u in zip(draw(), scores, strict=True)]
    squares = [t.square_().add_(0.01) for t in draw()]
    expected: dict[int, list[Tensor]] = {}
    contenders: list[Contender] = []

    def add(
        name: str,
        backend: str,
        role: Role,
        params: list[Tensor],
        step: Callable[[], None],
        result: list[Tensor],
        reset_state: Callable[[], None] = lambda: None,
    ) -> None:
        def call() -> Outputs:
            step()
            return params

        def reset() -> None:
            with torch.no_grad():
                torch._foreach_copy_(params, start)
            reset_state()

        expected[id(params)] = result
        contenders.append(Contender(name, backend, role, call, reset))

    ours = _natural(start, grads, scores)
    backend, _ = our_backend({"cpu": "cpu", "cuda": "triton"}, plan.device)
    add("grng", backend, "ours", *_npg(start, grads, scores, "auto"), ours)
    add("grng reference", "reference", "yardstick", *_npg(start, grads, scores, "reference"), ours)
    theirs = _adapted(start, grads, means, squares)
    for name, fused in (("Adam foreach", False), ("Adam fused", True)):
        params, step, reset = _adam(start, grads, (means, squares), fused)
        add(name, "torch", "rival", params, step, theirs, reset)
    d = sum(t.numel() for t in start)
    return Case(
        op="rank_one_step",
        shape=f"MLP d={size:.0e}",
        dims={"parameters": d, "tensors": len(start)},
        dtype="float32",
        # Gradient and score read twice, the parameter read and written.
        bytes=24.0 * d,
        # Three products; the direction, the square of its norm, and the step.
        flops=14.0 * d,
        error=lambda outputs: relative_error(expected[id(outputs)])([p.detach() for p in outputs]),
        limit=LIMIT,
        contenders=contenders,
        modes=("eager",),
        notes=("the score is taken before, and its backward pass is not in the time",),
    )


def _natural(start: list[Tensor], grads: list[Tensor], scores: list[Tensor]) -> list[Tensor]:
    """The parameters after a step of ours, in fp64."""
    pairs = [(g.double(), u.double()) for g, u in zip(grads, scores, strict=True)]
    dot = sum(float((u * g).sum()) for g, u in pairs)
    square = sum(float(u.square().sum()) for _, u in pairs)
    return [
        p.double() - LR * (g - u * (dot / (DAMPING + square))) / DAMPING
        for p, (g, u) in zip(start, pairs, strict=True)
    ]


def _adapted(
    start: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor]
) -> list[Tensor]:
    """The parameters after a step of Adam, in fp64."""
    results = []
    for p, g, m, v in zip(start, grads, means, squares, strict=True):
        mean = (BETAS[0] * m.double() + (1 - BETAS[0]) * g) / (1 - BETAS[0] ** STEPS)
        square = (BETAS[1] * v.double() + (1 - BETAS[1]) * g.double() ** 2) / (
            1 - BETAS[1] ** STEPS
        )
        results.append(p.double() - LR * mean / (square.sqrt() + EPS))
    return results


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan."""
    for size in plan.sizes or ((1_000, 10_000) if plan.quick else SIZES):
        yield _case(plan, size)


BENCH = Bench("rank_one_step", "RankOneNPG.step(): the update beside Adam's", cases)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
