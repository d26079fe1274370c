# SPDX-License-Identifier: Apache-2.0
"""Inverse of spectrally damped factors, against Cholesky in PyTorch with the same damping rule.

One matrix of order 4096 takes seconds a call on a CPU, and its check in fp64 minutes: it is run by name,
``--shapes none --sizes 4096``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Outputs, Plan, compiled, our_backend
from shapes import FACTOR_SIZES, INVERSE_BATCHES, chosen_models
from torch import Tensor

from grng_kernels import damped_inverse

RHO = 1e-2
# Residual of an fp32 inverse at condition number 1 + 1/sqrt(RHO) = 11, with room for order 4096.
LIMIT = 1e-4
POWER_STEPS = 16
# The norm by singular values takes seconds from here on and is never the fastest: left out.
SLOW_SVD = 6e8
Norm = Callable[[Tensor], Tensor]


def _matrices(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for n in sizes:
        # A falling spectrum over two decades, as factors have.
        scale = torch.logspace(0, -1, n, device=device)
        y = torch.empty(n, 2 * n, device=device).normal_(generator=generator) * scale[:, None]
        made.append(y @ y.mT / (2 * n))
    return made


def _columns(outputs: Outputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return inverses and dampings, which come as two lists in one or as two batches."""
    if outputs[0].dim() == 3:
        return outputs[0].unbind(), outputs[1].unbind()
    return outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]


def _residual(matrices: Sequence[Tensor]) -> Callable[[Outputs], float]:
    """Return a judge of ``inverse, damping`` pairs: ``‖I − (A + damping·I) X‖_F/√N`` in fp64.

    Every contender is judged by its own damping: an estimate of the norm that is a few percent high
    damps a little more and is no error. A damping more than 10 % from the rule is one.
    """
    exact = [float(torch.linalg.eigvalsh(a.double())[-1]) for a in matrices]

    def judge(outputs: Outputs) -> float:
        worst = 0.0
        for a, x, damping, norm in zip(matrices, *_columns(outputs), exact, strict=True):
            if abs(float(damping) / (RHO**0.5 * norm) - 1) > 0.1:
                return math.inf
            eye = torch.eye(a.shape[0], dtype=torch.float64, device=a.device)
            product = (a.double() + damping.double() * eye) @ x.double()
            residual = float(torch.linalg.matrix_norm(eye - product)) / a.shape[0] ** 0.5
            worst = max(worst, residual if math.isfinite(residual) else math.inf)
        return worst

    return judge


def _forward_error(matrices: Sequence[Tensor]) -> Callable[[Outputs], str]:
    """Return a remark on ``inverse, damping`` pairs: ``‖X - M⁻¹‖_F/‖M⁻¹‖_F`` of the worst, in fp64."""

    def remark(outputs: Outputs) -> str:
        worst = 0.0
        for a, x, damping in zip(matrices, *_columns(outputs), strict=True):
            eye = torch.eye(a.shape[0], dtype=torch.float64, device=a.device)
            root = torch.linalg.cholesky(a.double() + damping.double() * eye)
            exact = torch.cholesky_inverse(root)
            error = torch.linalg.matrix_norm(x.double() - exact) / torch.linalg.matrix_norm(exact)
            worst = max(worst, float(error))
        return f"forward error {worst:.1e}"

    return remark


def _exact_norm(a: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(a, ord=2)
    return norm


def _power_norm(a: Tensor) -> Tensor:
    v = a.sum(dim=-1, keepdim=True)
    for _ in range(POWER_STEPS):
        v = a @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True))
    norm: Tensor = torch.linalg.vector_norm(v, dim=(-2, -1))
    return norm


def _cholesky(a: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    damping = RHO**0.5 * norm(a)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    lower, _ = torch.linalg.cholesky_ex(a + damping[..., None, None] * eye)
    return torch.cholesky_inverse(lower), damping


def _loop(matrices: Sequence[Tensor], norm: Norm) -> Callable[[], Outputs]:
    def call() -> Outputs:
        pairs = [_cholesky(a, norm) for a in matrices]
        return [x for x, _ in pairs] + [damping for _, damping in pairs]

    return call


def _by_size(matrices: Sequence[Tensor], norm: Norm) -> Callable[[], Outputs]:
    sizes = dict.fromkeys(a.shape[0] for a in matrices)
    groups = [[i for i, a in enumerate(matrices) if a.shape[0] == n] for n in sizes]

    def call() -> Outputs:
        inverses: list[Tensor] = list(matrices)
        dampings: list[Tensor] = list(matrices)
        for group in groups:
            x, damping = _cholesky(torch.stack([matrices[i] for i in group]), norm)
            for i, one, d in zip(group, x.unbind(), damping.unbind(), strict=True):
                inverses[i], dampings[i] = one, d
        return inverses + dampings

    return call


def _lu_loop(matrices: Sequence[Tensor]) -> Callable[[], Outputs]:
    # One at a time: batched LU of some CPU builds of PyTorch gives wrong results on two threads.
    def call() -> Outputs:
        dampings = [RHO**0.5 * _power_norm(a) for a in matrices]
        eyes = {n: torch.eye(n, device=matrices[0].device) for n in {a.shape[0] for a in matrices}}
        inverses = [
            torch.linalg.inv_ex(a + d * eyes[a.shape[0]])[0]
            for a, d in zip(matrices, dampings, strict=True)
        ]
        return inverses + dampings

    return call


def _eigh_loop(matrices: Sequence[Tensor]) -> Callable[[], Outputs]:
    def call() -> Outputs:
        inverses, dampings = [], []
        for a in matrices:
            values, vectors = torch.linalg.eigh(a)
            dampings.append(RHO**0.5 * values[-1])
            inverses.append((vectors / (values + dampings[-1])) @ vectors.mT)
        return inverses + dampings

    return call


def _ours(
    matrices: Sequence[Tensor], method: str, vectors: Sequence[Tensor] | None = None
) -> Callable[[], Outputs]:
    def call() -> Outputs:
        result = damped_inverse(
            list(matrices),
            rho=RHO,
            method=method,
            spectral_vector=None if vectors is None else list(vectors),
        )
        return [*result.inverse, *result.damping]

    return call


def _case(plan: Plan, shape: str, sizes: Sequence[int]) -> Case:
    matrices = _matrices(sizes, plan.device)
    backend, notes = our_backend({"cpu": "cpu", "cuda": "triton"}, plan.device)
    work = sum(float(n) ** 3 for n in sizes)
    starts = [torch.zeros(a.shape[0], device=plan.device) for a in matrices]
    contenders = [
        Contender("grng", backend, "ours", _ours(matrices, "auto"), notes=notes),
        Contender("grng warm", backend, "variant", _ours(matrices, "auto", starts), notes=notes),
    ]
    if work <= SLOW_SVD:
        call = _ours(matrices, "newton_schulz")
        contenders.append(Contender("grng newton_schulz", "reference", "variant", call))
        contenders.append(Contender("inv_ex loop", "torch", "rival", _lu_loop(matrices)))
        contenders.append(Contender("eigh loop", "torch", "rival", _eigh_loop(matrices)))
    for norm, called in ((_power_norm, "power iteration"), (_exact_norm, "matrix_norm")):
        if norm is _exact_norm and work > SLOW_SVD:
            continue
        for way, make in (("loop", _loop), ("by size", _by_size)):
            name = f"cholesky {way}, {called}"
            contenders.append(Contender(name, "torch", "rival", make(matrices, norm)))
    if plan.compile:
        call = compiled(_by_size(matrices, _power_norm))
        contenders.append(
            Contender("by size, power iteration, compiled", "inductor", "rival", call)
        )
    return Case(
        op="damped_inverse",
        shape=shape,
        dims={"matrices": len(sizes), "sizes": sorted(set(sizes)), "rho": RHO},
        dtype="float32",
        bytes=sum(8.0 * n**2 for n in sizes),
        flops=work,
        error=_residual(matrices),
        limit=LIMIT,
        contenders=contenders,
        remark=_forward_error(matrices),
    )


def _ours_batch(batch: Tensor, vector: Tensor | None = None) -> Callable[[], Outputs]:
    def call() -> Outputs:
        result = damped_inverse(batch, rho=RHO, spectral_vector=vector)
        return [result.inverse, result.damping]  # type: ignore[list-item]

    return call


def _eigh_batch(batch: Tensor) -> Callable[[], Outputs]:
    def call() -> Outputs:
        values, vectors = torch.linalg.eigh(batch)
        damping = RHO**0.5 * values[:, -1]
        return [(vectors / (values + damping[:, None])[:, None, :]) @ vectors.mT, damping]

    return call


def _batch_case(plan: Plan, count: int, n: int) -> Case:
    """Equal matrices in one tensor, which saves every contender the lists."""
    matrices = _matrices([n] * count, plan.device)
    batch = torch.stack(matrices)
    backend, notes = our_backend({"cpu": "cpu", "cuda": "triton"}, plan.device)
    start = torch.zeros(count, n, device=plan.device)
    contenders = [
        Contender("grng", backend, "ours", _ours_batch(batch), notes=notes),
        Contender("grng warm", backend, "variant", _ours_batch(batch, start), notes=notes),
        Contender("grng list", backend, "variant", _ours(matrices, "auto"), notes=notes),
        Contender(
            "cholesky batch, power iteration",
            "torch",
            "rival",
            lambda: _cholesky(batch, _power_norm),
        ),
        Contender("cholesky loop, power iteration", "torch", "rival", _loop(matrices, _power_norm)),
    ]
    if count * n**3 <= SLOW_SVD:
        contenders.append(Contender("eigh batch", "torch", "rival", _eigh_batch(batch)))
        contenders.append(
            Contender(
                "cholesky batch, matrix_norm",
                "torch",
                "rival",
                lambda: _cholesky(batch, _exact_norm),
            )
        )
    if plan.compile:
        call = compiled(lambda: _cholesky(batch, _power_norm))
        contenders.append(Contender("batch, power iteration, compiled", "inductor", "rival", call))
    return Case(
        op="damped_inverse",
        shape=f"{count} of {n}",
        dims={"matrices": count, "sizes": [n], "rho": RHO},
        dtype="float32",
        bytes=8.0 * count * n**2,
        flops=count * float(n) ** 3,
        error=_residual(matrices),
        limit=LIMIT,
        contenders=contenders,
        remark=_forward_error(matrices),
    )


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan."""
    models = ("mlp-fashion", "minilm-lora", "vit-b16-lora-r16", "roberta-lora-r8")
    for model in chosen_models(plan.shapes, () if plan.quick else models):
        yield _case(plan, model.name, [f.n for f in model.factors])
    if not plan.sizes:
        for count, n in ((4, 32),) if plan.quick else INVERSE_BATCHES:
            yield _batch_case(plan, count, n)
    for n in plan.sizes or ((64, 128) if plan.quick else FACTOR_SIZES[:-1]):
        yield _case(plan, str(n), [n])


BENCH = Bench(
    "damped_inverse", "damped_inverse: inverse of a factor plus sqrt(rho) of its norm", cases
)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
