# SPDX-License-Identifier: Apache-2.0
"""Every kernel of a device against fp64: at most twice the error of PyTorch in the same dtype."""

from __future__ import annotations

import argparse
import importlib
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
from grng_kernels.damped_inverse.entry import Entry
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


# ---- damped inverses of orders above 64 ----

# Every call holds both tile sizes, a padded order and one that needs no padding.
LARGE_ORDERS = (65, 128, 300, 512, 513, 768, 1100)
LARGE_RHOS = (1e-1, 1e-2, 1e-3)


def _large_entry(factor: Tensor, damping: Tensor | None = None) -> Entry:
    length, n = factor.shape[:2]
    scalars = [factor.new_zeros(length, dtype=torch.float32) for _ in range(3)]
    inverse = torch.full(factor.shape, torch.nan, device=factor.device)
    info = torch.full((length,), -1, dtype=torch.int32, device=factor.device)
    vector = torch.zeros(length, n, device=factor.device)
    return Entry(factor, damping, vector, inverse, *scalars, info)


def _large_launch(method: str, entries: Sequence[Entry], rho: float | None) -> None:
    # Here and not above: importing these imports Triton.
    name = {"direct": "triton_direct", "newton_schulz": "triton_newton_schulz"}[method]
    module = importlib.import_module(f"grng_kernels.damped_inverse.{name}")
    module.launch(entries, rho=rho)


def check_large_inverse(device: torch.device, method: str, rho: float) -> Verdict:
    """Invert matrices of many orders in one call, twice, one of them with NaN; compare with fp64."""
    factors = []
    for n in LARGE_ORDERS:
        x = _normal(device, 2, n + n // 2, n)
        factors.append(x.mT @ x / x.shape[1])
    entries = [_large_entry(f) for f in factors]
    again = [_large_entry(f.clone()) for f in factors]
    again[0].factor[1, 0, 3] = torch.nan
    for group in (entries, again):
        _large_launch(method, group, rho)
    error = torch_error = 0.0
    problem = None
    for n, e, second in zip(LARGE_ORDERS, entries, again, strict=True):
        eye = torch.eye(n, device=device, dtype=torch.float64)
        m = (e.factor.double() + e.factor.mT.double()) / 2 + e.used_damping.double()[
            :, None, None
        ] * eye
        judge = relative_error([torch.linalg.inv(m)])
        plain = torch.cholesky_inverse(torch.linalg.cholesky_ex(m.float())[0])
        error = max(error, judge([e.inverse]))
        torch_error = max(torch_error, judge([plain]))
        norm = torch.linalg.matrix_norm(e.factor.double(), 2)
        if bool((e.info != 0).any()):
            problem = f"n={n}: info {e.info.tolist()}, residual {e.residual.tolist()}"
        elif not torch.equal(e.inverse, e.inverse.mT):
            problem = f"n={n}: not symmetric"
        elif bool((e.spectral_norm / norm - 1).abs().max() > 0.03):
            problem = f"n={n}: norm {(e.spectral_norm / norm).tolist()} of the true one"
        elif not torch.equal(e.inverse[0], second.inverse[0]):
            problem = f"n={n}: two runs differ, or NaN in a neighbour was felt"
    if again[0].info.tolist() != [0, int(grng_kernels.Info.NONFINITE_INPUT)]:
        problem = f"NaN: info {again[0].info.tolist()}"
    return Verdict(f"damped_inverse {method} rho={rho:g}", error, torch_error, problem)


def check_large_inverse_graph(device: torch.device, method: str) -> Verdict:
    """Capture a call and replay it on other contents: the same bits as a call outside of the graph."""
    x = _normal(device, 3, 200, 130)
    held = _large_entry(x.mT @ x / 200)
    _large_launch(method, [held], 1e-2)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _large_launch(method, [held], 1e-2)
    x = _normal(device, 3, 200, 130)
    held.factor.copy_(x.mT @ x / 200)
    held.vector.zero_()
    graph.replay()
    fresh = _large_entry(held.factor.clone())
    _large_launch(method, [fresh], 1e-2)
    same = all(torch.equal(a, b) for a, b in zip(held[2:], fresh[2:], strict=True))
    name = f"damped_inverse {method} in a graph"
    return Verdict(name, 0.0, 0.0, None if same else "the replay differs")


def check_large_inverse_faults(device: torch.device) -> Verdict:
    """Absolute damping: one that is not positive, and a matrix that is indefinite."""
    x = _normal(device, 3, 200, 130)
    factor = x.mT @ x / 200
    factor[1, 129, 129] = -3.0
    entry = _large_entry(factor, torch.tensor([0.1, 0.1, -1.0], device=device))
    _large_launch("direct", [entry], None)
    wanted = [0, int(grng_kernels.Info.NOT_CONVERGED), int(grng_kernels.Info.NONFINITE_INPUT)]
    kept = entry.info.tolist() == wanted and not bool(entry.vector[1:].any())
    return Verdict(
        "damped_inverse direct, faults", 0.0, 0.0, None if kept else f"info {entry.info.tolist()}"
    )


def _large_inverse_checks(device: torch.device) -> Iterator[Check]:
    if device.type != "cuda":
        return
    for method in ("direct", "newton_schulz"):
        for rho in LARGE_RHOS:
            yield partial(check_large_inverse, device, method, rho)
        yield partial(check_large_inverse_graph, device, method)
    yield partial(check_large_inverse_faults, device)


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
    for name, backend, share, checks in (
        ("kron_factor", first, 0.6, _factor_checks(device, factors)),
        ("damped_inverse", first, 0.8, _large_inverse_checks(device)),
        ("kalman_update", second, 1.0, _kalman_checks(device, outputs)),
    ):
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
