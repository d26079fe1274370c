# SPDX-License-Identifier: Apache-2.0
"""Factor update ``A <- decay·A + scale·XᵀX``: single sizes, and a whole model in one call."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Plan, Role, compiled, our_backend, relative_error
from shapes import FACTOR_ROWS, FACTOR_SIZES, Factor, ModelShapes, chosen_models
from torch import Tensor

from grng_kernels import kron_factor_update_, use_backend

DECAY = 0.95
SCALE = 1 - DECAY
# Products are accumulated in fp32 for every input type: sums rounded to 16 bits are red.
LIMIT = 5e-5
# Compiling the updates of a whole model takes a minute: only where there is time for it.
FEW, PATIENT_S = 16, 120.0
Update = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


def _data(
    factors: Sequence[Factor], rows: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [
        # 1/sqrt(rows) in the data: the EMA is then exactly one lerp, for the rivals that use it.
        (
            torch.empty(rows, f.n - f.bias, device=device).normal_(generator=generator) / rows**0.5
        ).to(dtype)
        for f in factors
    ]


def _ones_column(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


def _update64(factor: Tensor, x: Tensor, bias: bool) -> Tensor:
    x = _ones_column(x.double()) if bias else x.double()
    return DECAY * factor.double() + SCALE * (x.mT @ x)


def _ours(factors: Sequence[Factor]) -> Update:
    split = {flag: [i for i, f in enumerate(factors) if f.bias is flag] for flag in (False, True)}

    def update(states: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
        for bias, items in split.items():
            if items:
                kron_factor_update_(
                    [states[i] for i in items],
                    [xs[i] for i in items],
                    decay=DECAY,
                    scale=SCALE,
                    bias=bias,
                )

    return update


def _ours_one_by_one(factors: Sequence[Factor]) -> Update:
    def update(states: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
        for f, state, x in zip(factors, states, xs, strict=True):
            kron_factor_update_(state, x, decay=DECAY, scale=SCALE, bias=f.bias)

    return update


def _on_reference(update: Update) -> Update:
    def wrapped(states: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
        with use_backend("reference"):
            update(states, xs)

    return wrapped


def _loop(factors: Sequence[Factor], one: Callable[[Tensor, Tensor], object]) -> Update:
    def update(states: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
        for f, state, x in zip(factors, states, xs, strict=True):
            one(state, _ones_column(x) if f.bias else x)

    return update


def _addmm(state: Tensor, x: Tensor) -> Tensor:
    x = x.to(state.dtype)
    return torch.addmm(state, x.mT, x, beta=DECAY, alpha=SCALE, out=state)


def _addmm_out_dtype(state: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(state, x.mT, x, out_dtype=torch.float32, beta=DECAY, alpha=SCALE, out=state)


def _mm_out_dtype(state: Tensor, x: Tensor) -> Tensor:
    return state.lerp_(torch.mm(x.mT, x, out_dtype=torch.float32), SCALE)


def _mm_16bit(state: Tensor, x: Tensor) -> Tensor:
    return state.lerp_(torch.mm(x.mT, x).float(), SCALE)


def _functional(factors: Sequence[Factor]) -> Update:
    def update(states: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
        for f, state, x in zip(factors, states, xs, strict=True):
            x = x.to(state.dtype)
            x = _ones_column(x) if f.bias else x
            state.copy_(torch.addmm(state, x.mT, x, beta=DECAY, alpha=SCALE))

    return update


def _contender(
    name: str,
    backend: str,
    role: Role,
    update: Update,
    xs: Sequence[Tensor],
    start: Sequence[Tensor],
    notes: tuple[str, ...] = (),
) -> Contender:
    states = [s.clone() for s in start]

    def call() -> list[Tensor]:
        update(states, xs)
        return states

    def reset() -> None:
        for state, s in zip(states, start, strict=True):
            state.copy_(s)

    return Contender(name, backend, role, call, reset, notes)


def _stacked(
    factors: Sequence[Factor], xs: Sequence[Tensor], start: Sequence[Tensor]
) -> Contender | None:
    """A ``baddbmm`` for each size, on inputs that lie stacked already: the best case for it."""
    if len(factors) < 2 or any(f.bias for f in factors):
        return None
    groups = [
        [i for i, f in enumerate(factors) if f.n == n] for n in dict.fromkeys(f.n for f in factors)
    ]
    x_stacks = [torch.stack([xs[i] for i in group]) for group in groups]
    s_stacks = [torch.stack([start[i] for i in group]) for group in groups]
    views: list[Tensor] = [torch.empty(0)] * len(factors)
    for group, stack in zip(groups, s_stacks, strict=True):
        for place, i in enumerate(group):
            views[i] = stack[place]

    def call() -> list[Tensor]:
        for stack, x in zip(s_stacks, x_stacks, strict=True):
            if x.dtype == torch.float32 or not x.is_cuda:
                x = x.to(stack.dtype)
                torch.baddbmm(stack, x.mT, x, beta=DECAY, alpha=SCALE, out=stack)
            else:
                stack.lerp_(torch.bmm(x.mT, x, out_dtype=torch.float32), SCALE)
        return views

    def reset() -> None:
        for view, s in zip(views, start, strict=True):
            view.copy_(s)

    return Contender(
        "baddbmm by size",
        "torch",
        "rival",
        call,
        reset,
        ("baddbmm: inputs and factors stored stacked",),
    )


def _contenders(
    plan: Plan, factors: Sequence[Factor], xs: Sequence[Tensor], start: Sequence[Tensor]
) -> Iterator[Contender]:
    device, dtype = plan.device, xs[0].dtype
    backend, remarks = our_backend({"cpu": "cpu", "cuda": "triton"}, device)
    ours = _ours(factors)
    yield _contender("grng", backend, "ours", ours, xs, start, notes=remarks)
    if len(factors) > 1:
        yield _contender(
            "grng one by one", backend, "yardstick", _ours_one_by_one(factors), xs, start
        )
    yield _contender("grng reference", "reference", "yardstick", _on_reference(ours), xs, start)
    name = "addmm out=" if dtype == torch.float32 else "upcast, addmm out="
    yield _contender(name, "torch", "rival", _loop(factors, _addmm), xs, start)
    stacked = _stacked(factors, xs, start)
    if stacked:
        yield stacked
    if dtype != torch.float32:
        yield _contender("mm, upcast, lerp", "torch", "rival", _loop(factors, _mm_16bit), xs, start)
        if device.type == "cuda":
            yield _contender(
                "mm out_dtype, lerp", "torch", "rival", _loop(factors, _mm_out_dtype), xs, start
            )
            yield _contender(
                "addmm out_dtype out=",
                "torch",
                "rival",
                _loop(factors, _addmm_out_dtype),
                xs,
                start,
            )
    if plan.compile and (len(factors) <= FEW or plan.budget_s > PATIENT_S):
        yield _contender(
            "addmm compiled", "inductor", "rival", compiled(_functional(factors)), xs, start
        )


def _case(plan: Plan, name: str, factors: Sequence[Factor], rows: int, dtype_name: str) -> Case:
    dtype = getattr(torch, dtype_name)
    xs = _data(factors, rows, dtype, plan.device)
    # Old content as large as what is added: neither hides an error of the other.
    start = [SCALE * torch.eye(f.n, device=plan.device) for f in factors]
    expected = [_update64(s, x, f.bias) for f, s, x in zip(factors, start, xs, strict=True)]
    sizes = sorted({f.n for f in factors})
    return Case(
        op="kron_factor",
        shape=name,
        dims={"rows": rows, "factors": len(factors), "sizes": sizes},
        dtype=dtype_name,
        bytes=sum(rows * (f.n - f.bias) * dtype.itemsize + 8.0 * f.n**2 for f in factors),
        flops=sum(float(rows) * f.n * (f.n + 1) for f in factors),
        error=relative_error(expected),
        limit=LIMIT,
        contenders=list(_contenders(plan, factors, xs, start)),
    )


def _models(plan: Plan) -> list[ModelShapes]:
    default = (
        ("mlp-fashion",)
        if plan.quick
        else ("mlp-fashion", "minilm-lora", "vit-b16-lora-r16", "roberta-lora-r8")
    )
    models = chosen_models(plan.shapes, default)
    if plan.device.type == "cpu":
        # A CPU would spend minutes on the rows of a GPU's batch.
        models = [dataclasses.replace(m, rows=min(m.rows, 2048)) for m in models]
    return models


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan."""
    all_rows = (256,) if plan.quick else FACTOR_ROWS
    # On a GPU training runs in bf16: that comes first when time is short.
    usual = ("bfloat16", "float32") if plan.device.type == "cuda" else ("float32", "bfloat16")
    on_cpu = plan.device.type == "cpu"
    later: list[tuple[int, int, str]] = []
    for dtype in plan.dtypes or usual:
        for model in _models(plan):
            yield _case(plan, model.name, model.factors, model.rows, dtype)
        for n in plan.sizes or ((64, 256) if plan.quick else FACTOR_SIZES):
            for rows in all_rows:
                # A CPU has time for few of these: the longest come last, and in 16 bits not at all.
                if on_cpu and not plan.quick and rows > min(FACTOR_ROWS):
                    later += [(n, rows, dtype)] * (dtype == "float32")
                    continue
                yield _case(plan, f"{n} x {rows} rows", [Factor(n)], rows, dtype)
    for n, rows, dtype in later:
        yield _case(plan, f"{n} x {rows} rows", [Factor(n)], rows, dtype)


BENCH = Bench("kron_factor", "kron_factor_update_: moving average of Kronecker factors", cases)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
