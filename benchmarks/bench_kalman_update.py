# SPDX-License-Identifier: Apache-2.0
"""Diagonal Kalman update: two passes over the Jacobian against lean forms in plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Plan, Role, compiled, our_backend, relative_error
from shapes import KALMAN_SIZES
from torch import Tensor

from grng_kernels import kalman_update_, use_backend
from grng_kernels.kalman_update.reference import kalman_update as reference

NOISE = 0.1
LIMIT = 1e-4
Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]


def _ours(
    mean: Tensor, variance: Tensor, jacobian: Tensor, innovation: Tensor, noise: Tensor
) -> object:
    return kalman_update_(mean, variance, jacobian, innovation, noise)


def _naive(
    mean: Tensor, variance: Tensor, jacobian: Tensor, innovation: Tensor, noise: Tensor
) -> None:
    with use_backend("reference"):
        kalman_update_(mean, variance, jacobian, innovation, noise)


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
    update: Update,
    inputs: tuple[Tensor, ...],
    notes: tuple[str, ...] = (),
) -> Contender:
    d, device = inputs[0].shape[1], inputs[0].device
    # A zero mean: its error is then relative to the step, not to the weights.
    mean, variance = torch.zeros(d, device=device), torch.ones(d, device=device)

    def call() -> list[Tensor]:
        update(mean, variance, *inputs)
        return [mean, variance]

    def reset() -> None:
        mean.zero_()
        variance.fill_(1)

    return Contender(name, backend, role, call, reset, notes)


def _case(plan: Plan, outputs: int, d: int) -> Case:
    inputs = _inputs(outputs, d, plan.device)
    wide = [t.double() for t in inputs]
    mean, variance, _ = reference(
        torch.zeros_like(wide[0][0]),
        torch.ones_like(wide[0][0]),
        *wide,
        form="fdekf",
        likelihood="gaussian",
        forgetting=1.0,
        process_noise=0.0,
    )
    backend, remarks = our_backend({"cpu": "cpu", "cuda": "cuda"}, plan.device)
    contenders = [
        _contender("grng", backend, "ours", _ours, inputs, notes=remarks),
        _contender("lean", "torch", "rival", _lean, inputs),
        _contender("lean, inverted factor", "torch", "rival", _lean_whitener, inputs),
        _contender("naive with gain", "reference", "yardstick", _naive, inputs),
    ]
    if plan.compile:
        contenders.append(_contender("lean compiled", "inductor", "rival", compiled(_lean), inputs))
    return Case(
        op="kalman_update",
        shape=f"C={outputs} d={d:.0e}",
        dims={"outputs": outputs, "parameters": d},
        dtype="float32",
        bytes=8.0 * outputs * d + 20.0 * d,
        flops=(2.0 * outputs * (outputs + 1) + 4 * outputs) * d,
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


BENCH = Bench("kalman_update", "kalman_update_: Kalman update with a diagonal covariance", cases)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
