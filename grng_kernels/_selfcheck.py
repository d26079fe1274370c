# SPDX-License-Identifier: Apache-2.0
"""Every op on every backend that works here, against the fp64 reference: ``python -m grng_kernels check``."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import grng_kernels as k

# The error budget: at most this many times the error of plain PyTorch in the same dtype, plus rounding.
FACTOR = 2.0

Case = Callable[[Callable[[Tensor], Tensor]], list[Tensor]]


class CheckRow(NamedTuple):
    """One op on one backend: its error and the reference's, relative to the largest value, in fp32."""

    op: str
    backend: str
    error: float
    reference_error: float
    ok: bool
    note: str


def _spd(n: int) -> Tensor:
    a = torch.randn(n, n)
    return a @ a.mT / n


def _kron_factor(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    factors = [cast(_spd(n)) for n in (65, 200)]
    k.kron_factor_update_(
        factors, [cast(torch.randn(300, 64)), cast(torch.randn(77, 199))], decay=0.9, bias=True
    )
    return factors


def _kron_factor_conv2d(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    # Twenty channels take the way of the distances on a CPU, three that of the patches.
    factors = [cast(_spd(9 * channels + 1)) for channels in (20, 3)]
    images = [cast(torch.randn(2, channels, 14, 15)) for channels in (20, 3)]
    k.kron_factor_conv2d_update_(
        factors, images, kernel_size=3, padding=1, stride=(1, 2), decay=0.9, bias=True
    )
    return factors


def _damped_inverse(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    inverse = k.damped_inverse([cast(_spd(n)) for n in (7, 100)], damping=0.05).inverse
    return list(inverse)


def _kalman(form: str) -> Case:
    def run(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        sizes, outputs = (1000, 3333), 10
        means = [cast(torch.randn(d)) for d in sizes]
        variances = [cast(torch.rand(d)) for d in sizes]
        jacobians = [cast(torch.randn(outputs, d) / 60) for d in sizes]
        k.kalman_update_(means, variances, jacobians, cast(torch.randn(outputs)), 0.5, form=form)
        return means + variances

    return run


def _kalman_factored(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    jacobian = k.KroneckerJacobian(cast(torch.randn(10, 33) / 60), cast(torch.randn(65)))
    mean, variance = cast(torch.randn(33 * 65)), cast(torch.rand(33 * 65))
    k.kalman_update_(mean, variance, jacobian, cast(torch.randn(10)), 0.5)
    return [mean, variance]


def _precondition(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [k.precondition(cast(torch.randn(33, 65)), cast(_spd(33)), cast(_spd(65)))]


def _precondition_narrow(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    results, dots = k.precondition(
        [cast(torch.randn(8, 64)), cast(torch.randn(65, 8))],
        [cast(_spd(8)), cast(_spd(65))],
        [cast(_spd(65)), cast(_spd(8))],
        bias_grad=[cast(torch.randn(8)), None],
        return_dot=True,
    )
    return [*results, dots]


def _rank_one(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [k.rank1_precondition(cast(torch.randn(5000)), cast(torch.randn(5000)), damping=0.1)]


def _rank_one_step(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    params, grads, scores = ([cast(torch.randn(s)) for s in (5000, 33)] for _ in range(3))
    norm = k.rank1_step_(params, grads, scores, damping=0.1, lr=0.1, decay=0.9)
    return [*params, norm]


def _grafting(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
    shapes = ((65, 33), (65,))
    params, means, grads, directions = ([cast(torch.randn(s)) for s in shapes] for _ in range(4))
    squares = [cast(torch.rand(s)) for s in shapes]
    norms = k.adam_moments_(means, squares, grads, step=3)
    k.grafted_step_(params, directions, means, squares, scale=norms / 50, lr=0.1, step=3)
    return [*params, *means, *squares, norms]


CASES: dict[str, Case] = {
    "kron_factor_update_": _kron_factor,
    "kron_factor_conv2d_update_": _kron_factor_conv2d,
    "damped_inverse": _damped_inverse,
    "kalman_update_ fdekf": _kalman("fdekf"),
    "kalman_update_ vdekf": _kalman("vdekf"),
    "kalman_update_ factored": _kalman_factored,
    "precondition": _precondition,
    "precondition narrow": _precondition_narrow,
    "rank1_precondition": _rank_one,
    "rank1_step_": _rank_one_step,
    "adam_moments_, grafted_step_": _grafting,
}


def _run(case: Case, backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]), k.use_backend(backend):
        torch.manual_seed(0)
        return [t.double().cpu() for t in case(lambda t: t.to(device=device, dtype=dtype))]


def _error(got: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((g - e).abs().max() / e.abs().max()) for g, e in zip(got, exact, strict=True))


def check_all() -> list[CheckRow]:
    """Run every op on every available backend and device; an op without that kernel gives no row."""
    rows = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op, case in CASES.items():
        exact = _run(case, "reference", "cpu", torch.float64)
        for device in devices:
            base = _error(_run(case, "reference", device, torch.float32), exact)
            for backend, status in k.backends().items():
                if not status.available:
                    continue
                try:
                    error = _error(_run(case, backend, device, torch.float32), exact)
                except RuntimeError as refusal:
                    if "was asked for, but" not in str(refusal):
                        rows.append(
                            CheckRow(
                                op, f"{backend} ({device})", float("nan"), base, False, str(refusal)
                            )
                        )
                    continue
                ok = error <= FACTOR * base + 1e-7
                rows.append(CheckRow(op, f"{backend} ({device})", error, base, ok, ""))
    return rows
