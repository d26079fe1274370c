# SPDX-License-Identifier: Apache-2.0
"""Every kernel of a device against fp64: at most twice the error of PyTorch in the same dtype."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from harness.case import relative_error
from harness.files import write_json
from torch import Tensor

import grng_kernels
from grng_kernels import kalman_update_, kron_factor_update_, use_backend
from grng_kernels.damped_inverse.cuda_small import launch as launch_small
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.spectral_norm import spectral_norm
from grng_kernels.kalman_update.reference import kalman_update as kalman_reference

# Below this PyTorch itself may round to nothing, and twice nothing would be asked for.
FLOOR = 4 * torch.finfo(torch.float32).eps
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (order, rows): one lane, each side of a tile edge, rows that end inside a block, several tiles.
FACTORS = (
    (1, 1), (2, 300), (16, 64), (17, 65), (32, 1), (33, 129), (64, 64), (65, 1000), (127, 63),
    (128, 128), (129, 257), (200, 5), (769, 2048),
)  # fmt: skip
OUTPUTS = (1, 2, 7, 8, 9, 10, 16, 17, 33, 64, 100)
PARAMETERS = (1, 1000, 4097)
DRAWS = 4


class Verdict(NamedTuple):
    """One check: what was run, our error, PyTorch's, and what else was wrong."""

    name: str
    error: float
    torch_error: float
    problem: str | None

    @property
    def passed(self) -> bool:
        """Whether the rule holds."""
        return self.problem is None and self.error <= 2 * max(self.torch_error, FLOOR)


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device)


def check_factor(
    device: torch.device, n: int, rows: int, dtype: torch.dtype, bias: bool, layout: str
) -> Verdict:
    """Update one factor twice from the same start; compare with fp64, PyTorch and itself."""
    name = f"kron_factor n={n} rows={rows} {dtype} bias={bias} {layout}".replace("torch.", "")
    width, decay = n - bias, 0.9
    x = _normal(device, rows, width).to(dtype)
    if layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "every second row":
        x = torch.cat([x, x], dim=1).view(2 * rows, width)[::2]
    start = _normal(device, n, n)
    start = start @ start.mT / n
    ours, again = start.clone(), start.clone()
    info = kron_factor_update_(ours, x, decay=decay, bias=bias)
    kron_factor_update_(again, x, decay=torch.tensor(decay, device=device), bias=bias)
    columns = torch.cat([x, x.new_ones(rows, 1)], dim=1) if bias else x
    wide, single = columns.double(), columns.float()
    scale = (1 - decay) / rows
    judge = relative_error([decay * start.double() + scale * (wide.mT @ wide)])
    plain = torch.addmm(start, single.mT, single, beta=decay, alpha=scale)
    problem = None
    if int(info) != 0:
        problem = f"info {int(info)}"
    elif not torch.equal(ours, ours.mT):
        problem = "not symmetric"
    elif judge([again]) > 2 * max(judge([plain]), FLOOR):
        problem = "wrong with decay as a tensor"
    return Verdict(name, judge([ours]), judge([plain]), problem)


def check_bad_factor(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Feed NaN: the factor must stay as it was, bitwise, and info must say so."""
    start, x = torch.eye(70, device=device), _normal(device, 50, 70).to(dtype)
    x[49, 69] = torch.nan
    factor = start.clone()
    info = kron_factor_update_(factor, x, decay=0.9)
    kept = torch.equal(factor, start) and int(info) == int(grng_kernels.Info.NONFINITE_INPUT)
    return Verdict(f"kron_factor NaN {dtype}", 0.0, 0.0, None if kept else "NaN got through")


def check_kalman(device: torch.device, outputs: int, d: int, form: str, likelihood: str) -> Verdict:
    """Compare with fp64 and PyTorch on several draws: one alone may flatter either."""
    draws = [_kalman_draw(device, outputs, d, form, likelihood) for _ in range(DRAWS)]
    return Verdict(
        f"kalman_update C={outputs} d={d} {form} {likelihood}",
        max(draw.error for draw in draws),
        max(draw.torch_error for draw in draws),
        next((draw.problem for draw in draws if draw.problem), None),
    )


def _noise_and_innovation(
    device: torch.device, outputs: int, likelihood: str
) -> tuple[Tensor, Tensor]:
    if likelihood == "categorical":
        noise = torch.softmax(_normal(device, outputs), dim=0)
        innovation = -noise.clone()
        innovation[0] += 1
        return noise, innovation
    root = _normal(device, outputs, outputs)
    noise = root @ root.mT / outputs + torch.eye(outputs, device=device)
    return noise, _normal(device, outputs)


def _kalman_draw(device: torch.device, outputs: int, d: int, form: str, likelihood: str) -> Verdict:
    """Update a state in two blocks, twice from the same start; the two must agree bitwise."""
    sizes = [d, 3]
    jacobian = _normal(device, outputs, sum(sizes))
    variance = torch.rand(sum(sizes), device=device) + 0.1
    noise, innovation = _noise_and_innovation(device, outputs, likelihood)
    blocks = [block.contiguous() for block in jacobian.tensor_split([d], dim=1)]
    results: list[list[Tensor]] = []
    info = torch.zeros(())
    for _ in range(2):
        means = [torch.zeros(n, device=device) for n in sizes]
        variances = [v.clone() for v in variance.tensor_split([d])]
        info = kalman_update_(
            means, variances, blocks, innovation, noise, form=form, likelihood=likelihood
        )
        results.append([torch.cat(means), torch.cat(variances)])
    arguments = [torch.zeros_like(variance), variance, jacobian, innovation, noise]

    def reference(tensors: list[Tensor]) -> list[Tensor]:
        mean, var, _ = kalman_reference(
            *tensors, form=form, likelihood=likelihood, forgetting=1.0, process_noise=0.0
        )
        return [mean, var]

    judge = relative_error(reference([t.double() for t in arguments]))
    problem = None
    if int(info) != 0:
        problem = f"info {int(info)}"
    elif not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        problem = "two runs differ"
    return Verdict("", judge(results[0]), judge(reference(arguments)), problem)


# Around the 16 below which the probes are the identity, and around what one warp and four warps take.
SMALL_ORDERS = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64)
SMALL_RHOS = (1e-1, 1e-2, 1e-4)


def _small_entry(factor: Tensor) -> Entry:
    length, n, _ = factor.shape
    return Entry(
        factor,
        None,
        factor.new_zeros(length, n, dtype=torch.float32),
        factor.new_empty(length, n, n, dtype=torch.float32),
        *(factor.new_empty(length, dtype=torch.float32) for _ in range(3)),
        factor.new_empty(length, dtype=torch.int32),
    )


def _small_factors(device: torch.device, n: int, dtype: torch.dtype) -> Tensor:
    x = _normal(device, DRAWS, n + n // 2 + 1, n)
    return (x.mT @ x / x.shape[1]).to(dtype)


def check_small_inverse(device: torch.device, n: int, dtype: torch.dtype, rho: float) -> Verdict:
    """Invert a few matrices, alone and beside others of all orders, one of them NaN: the same bits."""
    factor = _small_factors(device, n, dtype)
    alone, beside = _small_entry(factor), _small_entry(factor)
    others = [_small_entry(_small_factors(device, m, torch.float32)) for m in SMALL_ORDERS]
    others[-1].factor[1, -1, 0] = torch.nan
    launch_small([alone], rho=rho)
    launch_small([*others[:5], beside, *others[5:]], rho=rho)
    wide = factor.double()
    eye = torch.eye(n, dtype=torch.float64, device=device)
    damped = (wide + wide.mT) / 2 + alone.used_damping.double()[:, None, None] * eye
    judge = relative_error([torch.cholesky_inverse(torch.linalg.cholesky(damped))])
    plain = torch.cholesky_inverse(torch.linalg.cholesky(damped.float()))
    norm, _ = spectral_norm((wide + wide.mT) / 2)
    problem = None
    if bool((alone.info != 0).any()):
        problem = f"info {alone.info.tolist()}"
    elif not torch.equal(alone.inverse, alone.inverse.mT):
        problem = "not symmetric"
    elif not all(torch.equal(a, b) for a, b in zip(alone[2:], beside[2:], strict=True)):
        problem = "other bits beside other matrices"
    elif not torch.allclose(alone.spectral_norm.double(), norm, rtol=1e-5, atol=0.0):
        problem = "wrong norm"
    elif not bool((alone.residual < 1e-3).all()):
        problem = "wrong residual"
    elif others[-1].info.tolist() != [0, int(grng_kernels.Info.NONFINITE_INPUT), 0, 0]:
        problem = "NaN not reported"
    name = f"damped_inverse small n={n} {dtype} rho={rho:.0e}".replace("torch.", "")
    return Verdict(name, judge([alone.inverse]), judge([plain]), problem)


def _small_inverse_checks(device: torch.device) -> Iterator[Check]:
    for n, dtype, rho in itertools.product(SMALL_ORDERS, DTYPES, SMALL_RHOS):
        yield partial(check_small_inverse, device, n, dtype, rho)


Check = Callable[[], Verdict]


def _factor_checks(device: torch.device, factors: Sequence[tuple[int, int]]) -> Iterator[Check]:
    for (n, rows), dtype in itertools.product(factors, DTYPES):
        bias = n > 1 and n % 2 == 1
        yield partial(check_factor, device, n, rows, dtype, bias, "contiguous")
    for layout, dtype in itertools.product(("transposed", "every second row"), DTYPES):
        yield partial(check_factor, device, 65, 130, dtype, True, layout)
    for dtype in DTYPES:
        yield partial(check_bad_factor, device, dtype)


def _kalman_checks(device: torch.device, outputs: Sequence[int]) -> Iterator[Check]:
    forms = (("fdekf", "gaussian"), ("vdekf", "gaussian"), ("fdekf", "categorical"))
    for count, d, (form, likelihood) in itertools.product(outputs, PARAMETERS, forms):
        # With fewer parameters than outputs the step is a small difference of large sums: its error
        # says more about the problem than about a kernel.
        if d >= count:
            yield partial(check_kalman, device, count, d, form, likelihood)


def sweep(
    device: torch.device,
    budget_s: float,
    *,
    factors: Sequence[tuple[int, int]] = FACTORS,
    outputs: Sequence[int] = OUTPUTS,
) -> tuple[list[Verdict], list[str]]:
    """Run every check on the kernels of a device.

    Args:
        device: Where.
        budget_s: No new check is begun after this.
        factors: Orders and rows of the factor update.
        outputs: Outputs of the Kalman update.

    Returns:
        The verdicts, and what was left out and why.
    """
    torch.manual_seed(0)
    first, second = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "cpu")}[device.type]
    start = time.monotonic()
    verdicts: list[Verdict] = []
    left_out: list[str] = []
    # Compiling the Triton variants must not starve the others: they get a part of the time.
    groups = [
        ("kron_factor", first, 0.6, _factor_checks(device, factors)),
        ("kalman_update", second, 1.0, _kalman_checks(device, outputs)),
    ]
    if device.type == "cuda":
        groups.append(("damped_inverse small", second, 1.0, _small_inverse_checks(device)))
    for name, backend, share, checks in groups:
        status = grng_kernels.backends()[backend]
        if not status.available:
            left_out.append(f"{name} on {backend}: {status.reason}")
            continue
        with use_backend(backend):
            for check in checks:
                if time.monotonic() > start + budget_s * share:
                    left_out.append(f"{name}: the rest, out of time")
                    break
                try:
                    verdicts.append(check())
                except Exception as error:
                    verdicts.append(Verdict(f"{name} raised", 0.0, 0.0, f"{error}"[:200]))
    return verdicts, left_out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; return 1 where a check failed. The last line counts them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=600.0)
    parser.add_argument("--json", type=Path, help="also write every verdict here")
    arguments = parser.parse_args(argv)
    verdicts, left_out = sweep(torch.device(arguments.device), arguments.budget_s)
    failed = [v for v in verdicts if not v.passed]
    for v in failed:
        print(f"FAILED {v.name}: error {v.error:.1e}, torch {v.torch_error:.1e}, {v.problem or ''}")
    for reason in left_out:
        print(f"left out: {reason}")
    if arguments.json:
        content = {"verdicts": [v._asdict() for v in verdicts], "left_out": left_out}
        write_json(arguments.json, content)
    worst = max((v.error / max(v.torch_error, FLOOR) for v in verdicts), default=0.0)
    print(
        f"{len(verdicts) - len(failed)} of {len(verdicts)} checks passed, worst {worst:.2f}x of "
        f"torch's error" + (f"; {len(left_out)} groups left out" if left_out else "")
    )
    return int(bool(failed) or not verdicts)


if __name__ == "__main__":
    sys.exit(main())
