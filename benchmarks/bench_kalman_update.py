# SPDX-License-Identifier: Apache-2.0
"""Diagonal Kalman update: two passes over the Jacobian against lean forms in plain PyTorch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Plan, Role, compiled, our_backend, relative_error
from shapes import KALMAN_SIZES, MODELS
from torch import Tensor

from grng_kernels import KroneckerJacobian, backends, kalman_update_, use_backend
from grng_kernels.kalman_update.gpu import unsupported
from grng_kernels.kalman_update.reference import kalman_update as reference

NOISE = 0.1
RHO = 0.1
LIMIT = 1e-4
# Weights, with their biases, of a small net, which are fed one sample.
MLP = ((256, 785), (256, 257), (10, 257))
# One tensor, or the blocks of one state.
State = Tensor | Sequence[Tensor]
Update = Callable[[State, State, State, Tensor, Tensor], object]


def _ours(
    mean: State,
    variance: State,
    jacobian: State,
    innovation: Tensor,
    noise: Tensor,
    rho: float = 0.0,
) -> object:
    return kalman_update_(mean, variance, jacobian, innovation, noise, rho=rho)


def _through(backend: str, rho: float) -> Update:
    """The same through one of our kernels, chosen or not."""

    def update(*arguments: State) -> object:
        with use_backend(backend):
            return kalman_update_(*arguments, rho=rho)

    return update


def _naive(
    mean: State,
    variance: State,
    jacobian: State,
    innovation: Tensor,
    noise: Tensor,
    rho: float = 0.0,
) -> None:
    with use_backend("reference"):
        kalman_update_(mean, variance, jacobian, innovation, noise, rho=rho)


def _lean(
    mean: Tensor, variance: Tensor, jacobian: Tensor, innovation: Tensor, noise: Tensor
) -> None:
    """No gain and no explicit inverse; what a careful user writes."""
    gram = (jacobian * variance) @ jacobian.mT + noise
    lower, _ = torch.linalg.cholesky_ex(gram)
    direction = torch.cholesky_solve(innovation.unsqueeze(-1), lower)
    mean += variance * (jacobian.mT @ direction).squeeze(-1)
    whitened = torch.linalg.solve_triangular(lower, jacobian, upper=False)
    variance -= variance * variance * whitened.square().sum(0)


def _lean_whitener(
    mean: Tensor, variance: Tensor, jacobian: Tensor, innovation: Tensor, noise: Tensor
) -> None:
    """The same with the small factor inverted: a product instead of a wide triangular solve."""
    gram = (jacobian * variance) @ jacobian.mT + noise
    lower, _ = torch.linalg.cholesky_ex(gram)
    direction = torch.cholesky_solve(innovation.unsqueeze(-1), lower)
    mean += variance * (jacobian.mT @ direction).squeeze(-1)
    eye = torch.eye(len(innovation), dtype=gram.dtype, device=gram.device)
    whitener = torch.linalg.solve_triangular(lower, eye, upper=False)
    variance -= variance * variance * (whitener @ jacobian).square().sum(0)


def _lean_rho(
    mean: Tensor, variance: Tensor, jacobian: Tensor, innovation: Tensor, noise: Tensor
) -> None:
    """The lean form with gradient regularisation: R (R + rho·H Hᵀ)⁻¹ R in place of R."""
    lower, _ = torch.linalg.cholesky_ex(torch.addmm(noise, jacobian, jacobian.mT, alpha=RHO))
    half = torch.linalg.solve_triangular(lower, noise, upper=False)
    _lean(mean, variance, jacobian, innovation, half.mT @ half)


def _lean_half(
    mean: Tensor, variance: Tensor, jacobian: Tensor, innovation: Tensor, noise: Tensor
) -> None:
    """The lean form of a Jacobian in 16 bits, which is widened first: its state is fp32."""
    _lean(mean, variance, jacobian.float(), innovation, noise)


def _lean_blocks(
    mean: Sequence[Tensor],
    variance: Sequence[Tensor],
    jacobian: Sequence[Tensor],
    innovation: Tensor,
    noise: Tensor,
) -> None:
    """The lean form of a list of blocks, without concatenating them."""
    blocks = list(zip(mean, variance, jacobian, strict=True))
    gram = noise.clone()
    for _, p, h in blocks:
        gram.addmm_(h * p, h.mT)
    lower, _ = torch.linalg.cholesky_ex(gram)
    direction = torch.cholesky_solve(innovation.unsqueeze(-1), lower)
    for m, p, h in blocks:
        m += p * (h.mT @ direction).squeeze(-1)
        whitened = torch.linalg.solve_triangular(lower, h, upper=False)
        p -= p * p * whitened.square().sum(0)


def _lean_factored(
    mean: Sequence[Tensor],
    variance: Sequence[Tensor],
    jacobian: Sequence[KroneckerJacobian],
    innovation: Tensor,
    noise: Tensor,
) -> None:
    """The lean form of blocks whose rows are ``kron(g_c, x)``, for those who see that they are."""
    blocks = [
        (m.view(g.shape[1], -1), p.view(g.shape[1], -1), g, x)
        for m, p, (g, x) in zip(mean, variance, jacobian, strict=True)
    ]
    gram = noise.clone()
    for _, p, g, x in blocks:
        gram.addmm_(g * (p @ x.square()), g.mT)
    lower, _ = torch.linalg.cholesky_ex(gram)
    direction = torch.cholesky_solve(innovation.unsqueeze(-1), lower)
    for m, p, g, x in blocks:
        scaled = p * x
        m.addcmul_(scaled, g.mT @ direction)
        q = torch.linalg.solve_triangular(lower, g, upper=False).square().sum(0)
        p.addcmul_(scaled.square_(), q.unsqueeze(-1), value=-1)


def _inputs(outputs: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    # Columns of falling length: some parameters learn much from one observation, most little.
    scale = torch.arange(1, d + 1, device=device, dtype=torch.float32).rsqrt()
    jacobian = torch.empty(outputs, d, device=device).normal_(generator=generator).mul_(scale)
    innovation = torch.empty(outputs, device=device).normal_(generator=generator)
    return jacobian, innovation, NOISE * torch.eye(outputs, device=device)


def _contender(
    name: str,
    backend: str,
    role: Role,
    update: Callable[..., object],
    jacobian: State | Sequence[KroneckerJacobian],
    small: tuple[Tensor, Tensor],
    notes: tuple[str, ...] = (),
) -> Contender:
    blocks = [jacobian] if isinstance(jacobian, Tensor) else list(jacobian)
    sizes = [
        h.outputs.shape[1] * len(h.inputs) if isinstance(h, KroneckerJacobian) else h.shape[1]
        for h in blocks
    ]
    device = small[0].device
    # A zero mean: its error is then relative to the step, not to the weights.
    mean, variance = torch.zeros(sum(sizes), device=device), torch.ones(sum(sizes), device=device)
    state: list[State] = [mean, variance]
    if not isinstance(jacobian, Tensor):
        state = [mean.split(sizes), variance.split(sizes)]
        state = [list(s) for s in state]

    def call() -> list[Tensor]:
        update(*state, jacobian, *small)
        return [mean, variance]

    def reset() -> None:
        mean.zero_()
        variance.fill_(1)

    return Contender(name, backend, role, call, reset, notes)


def _case(
    plan: Plan,
    outputs: int,
    d: int,
    *,
    rho: float = 0.0,
    dtype: torch.dtype = torch.float32,
    blocks: Sequence[int] = (),
) -> Case:
    full, innovation, noise = _inputs(outputs, d, plan.device)
    full = full.to(dtype)
    wide = full.double()
    mean, variance, _ = reference(
        torch.zeros_like(wide[0]),
        torch.ones_like(wide[0]),
        wide,
        innovation.double(),
        noise.double(),
        form="fdekf",
        likelihood="gaussian",
        forgetting=1.0,
        process_noise=0.0,
        rho=rho,
    )
    del wide
    jacobian: State = [h.contiguous() for h in full.split(list(blocks), 1)] if blocks else full
    small = (innovation, noise)
    gpu = [name for name, reason in unsupported(None, [full], outputs).items() if reason is None]
    # The first that is there, as in the operator.
    usable = [name for name in gpu if backends()[name].available] or gpu
    backend, remarks = our_backend({"cpu": "cpu", "cuda": usable[0]}, plan.device)
    lean: Callable[..., object] = _lean
    if blocks:
        lean = _lean_blocks
    elif rho:
        lean = _lean_rho
    elif dtype != torch.float32:
        lean = _lean_half
    ours = functools.partial(_ours, rho=rho)
    naive = functools.partial(_naive, rho=rho)
    contenders = [
        _contender("grng", backend, "ours", ours, jacobian, small, notes=remarks),
        _contender("lean", "torch", "rival", lean, jacobian, small),
        _contender("naive with gain", "reference", "yardstick", naive, jacobian, small),
    ]
    if plan.device.type == "cuda":
        contenders[1:1] = [
            _contender(f"grng, {name}", name, "variant", _through(name, rho), jacobian, small)
            for name in usable
            if name != backend and backends()[name].available
        ]
    if lean is _lean:
        contenders.insert(
            2,
            _contender("lean, inverted factor", "torch", "rival", _lean_whitener, jacobian, small),
        )
    if plan.compile:
        contenders.append(
            _contender("lean compiled", "inductor", "rival", compiled(lean), jacobian, small)
        )
    kind = f" {len(blocks)} blocks" if blocks else ""
    kind += f" rho={rho}" if rho else ""
    kind += f" H {str(dtype).removeprefix('torch.')}" if dtype != torch.float32 else ""
    grams = 3 if rho else 2
    return Case(
        op="kalman_update",
        shape=f"C={outputs} d={d:.0e}{kind}",
        dims={"outputs": outputs, "parameters": d, "blocks": max(1, len(blocks))},
        dtype="float32",
        bytes=2.0 * full.element_size() * outputs * d + 20.0 * d,
        flops=(grams * outputs * (outputs + 1.0) + 4 * outputs) * d,
        error=relative_error([mean, variance]),
        limit=LIMIT,
        contenders=contenders,
    )


def _case_factored(plan: Plan, outputs: int, weights: Sequence[tuple[int, int]]) -> Case:
    """Weights of linear layers that were fed one vector: the structure used, against H written out."""
    d = sum(m * n for m, n in weights)
    _, innovation, noise = _inputs(outputs, 1, plan.device)
    generator = torch.Generator(plan.device).manual_seed(1)
    factors = []
    for m, n in weights:
        g = torch.empty(outputs, m, device=plan.device).normal_(generator=generator) / m
        x = torch.empty(n, device=plan.device).normal_(generator=generator)
        factors.append(KroneckerJacobian(g, x))
    mean, variance, _ = reference(
        torch.zeros(d, dtype=torch.float64, device=plan.device),
        torch.ones(d, dtype=torch.float64, device=plan.device),
        torch.cat([h.expanded(torch.float64) for h in factors], dim=1),
        innovation.double(),
        noise.double(),
        form="fdekf",
        likelihood="gaussian",
        forgetting=1.0,
        process_noise=0.0,
    )
    dense = [h.expanded() for h in factors]
    small = (innovation, noise)
    backend, remarks = our_backend({"cpu": "cpu", "cuda": "cuda"}, plan.device)
    if plan.device.type == "cuda":
        remarks += ("the factored blocks are expanded",)
    contenders = [
        _contender("grng", backend, "ours", _ours, factors, small, notes=remarks),
        _contender("grng, H written out", backend, "variant", _ours, dense, small),
        _contender("lean, factored", "torch", "rival", _lean_factored, factors, small),
        _contender("lean, H written out", "torch", "rival", _lean_blocks, dense, small),
    ]
    if plan.compile:
        call = compiled(_lean_factored)
        contenders.append(_contender("lean compiled", "inductor", "rival", call, factors, small))
    return Case(
        op="kalman_update",
        shape=f"C={outputs} mlp, factored",
        dims={"outputs": outputs, "parameters": d, "blocks": len(weights)},
        dtype="float32",
        bytes=20.0 * d,
        flops=12.0 * d,
        error=relative_error([mean, variance]),
        limit=LIMIT,
        contenders=contenders,
    )


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan; ``sizes`` are numbers of parameters, with 10 outputs."""
    if plan.sizes:
        pairs = [(10, d) for d in plan.sizes]
    else:
        pairs = [(2, 30_000), (10, 30_000)] if plan.quick else list(KALMAN_SIZES)
    for outputs, d in pairs:
        yield _case(plan, outputs, d)
    if plan.sizes:
        return
    d = 30_000 if plan.quick else 300_000
    yield _case(plan, 10, d, rho=RHO)
    yield _case(plan, 10, d, dtype=torch.bfloat16)
    weights = [rows * cols for rows, cols in MODELS["minilm-lora"].weights]
    yield _case(plan, 10, sum(weights), blocks=weights)
    for outputs in (10,) if plan.quick else (2, 10, 100):
        yield _case_factored(plan, outputs, MLP)


BENCH = Bench("kalman_update", "kalman_update_: Kalman update with a diagonal covariance", cases)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
