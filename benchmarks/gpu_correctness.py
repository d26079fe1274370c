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
from typing import Any, NamedTuple

import torch
from harness.case import relative_error
from harness.files import write_json
from torch import Tensor
from torch.nn import functional

import grng_kernels
from grng_kernels import (
    damped_inverse,
    kalman_update_,
    kron_factor_conv2d_update_,
    kron_factor_update_,
    precondition,
    rank1_precondition,
    use_backend,
)
from grng_kernels._dispatch import interpreting_triton
from grng_kernels.kalman_update.reference import kalman_update as kalman_reference
from grng_kernels.rank_one.reference import rank1_precondition as rank_one_reference

# Below this PyTorch itself may round to nothing, and twice nothing would be asked for.
FLOOR = 4 * torch.finfo(torch.float32).eps
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (order, rows): one lane, each side of a tile edge, rows that end inside a block, several tiles.
FACTORS = (
    (1, 1), (2, 300), (16, 64), (17, 65), (32, 1), (33, 129), (64, 64), (65, 1000), (127, 63),
    (128, 128), (129, 257), (200, 5), (769, 2048),
)  # fmt: skip
# The same in one call: every tile and both alignments, one factor without rows, one of a single element.
TOGETHER = (
    (1, 3), (17, 300), (32, 64), (65, 1000), (64, 0), (96, 513), (130, 257), (256, 2100), (769, 70),
)  # fmt: skip
# [B, C, H, W] of the images of one call: one and several tiles of columns, several splits.
IMAGES = ((2, 3, 19, 18), (3, 7, 8, 9), (1, 33, 6, 5), (16, 16, 28, 28), (0, 4, 5, 5))
# Kernel, stride, padding, dilation, groups.
CONVOLUTIONS: tuple[dict[str, Any], ...] = (
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
)
# [m, n] of the gradients of one call: both tiles of the small side, both orientations, several splits.
WEIGHTS = (
    (1, 1), (5, 67), (67, 5), (16, 768), (768, 16), (12, 0), (16, 1100), (64, 520), (1030, 33), (101, 130),
)  # fmt: skip
# The longest small side that a kernel serves.
NARROW = {"cpu": 16, "triton": 128}
OUTPUTS = (1, 2, 7, 8, 9, 10, 16, 17, 33, 64, 100)
PARAMETERS = (1, 1000, 4097)
DRAWS = 4
# Methods of the inverse that a backend has a kernel for.
METHODS = {
    "triton": ("cholesky", "newton_schulz"),
    "cuda": ("cholesky",),
    "cpu": ("cholesky",),
}


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


def _spd(device: torch.device, n: int) -> Tensor:
    root = _normal(device, n, n)
    return root @ root.mT / max(n, 1)


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
    start = _spd(device, n)
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


def _other_bits_in_a_graph(
    device: torch.device, states: Sequence[Tensor], call: Callable[[], object]
) -> bool:
    """Whether the replay of a captured call leaves other bits in ``states`` than the call; not on a CPU."""
    if device.type != "cuda":
        return False
    start = [s.clone() for s in states]
    call()
    want = [s.clone() for s in states]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for state, value in zip(states, start, strict=True):
        state.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return not all(torch.equal(s, w) for s, w in zip(states, want, strict=True))


def _problem_of_a_list(
    device: torch.device,
    starts: Sequence[Tensor],
    items: Sequence[Tensor],
    update: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
) -> str | None:
    """What is wrong with a grouped update beside its error: it must be the single calls, bitwise."""
    together, alone, faulty, captured = ([s.clone() for s in starts] for _ in range(4))
    if int(update(together, items).abs().sum()) != 0:
        return "info is not 0"
    for factor, item in zip(alone, items, strict=True):
        update([factor], [item])
    if not all(torch.equal(a, b) for a, b in zip(together, alone, strict=True)):
        return "a list gives other bits than its items"
    bad = max(range(len(items)), key=lambda i: items[i].numel())
    spoiled = [item.clone() if i == bad else item for i, item in enumerate(items)]
    spoiled[bad][(-1,) * spoiled[bad].dim()] = torch.nan
    info = update(faulty, spoiled).tolist()
    if [code != 0 for code in info] != [i == bad for i in range(len(items))]:
        return f"info {info} with NaN in item {bad}"
    together[bad] = starts[bad]
    if not all(torch.equal(a, b) for a, b in zip(together, faulty, strict=True)):
        return "NaN in one item reached a factor"
    if _other_bits_in_a_graph(device, captured, lambda: update(captured, items)):
        return "a graph gives other bits"
    return None


def check_factors_together(
    device: torch.device, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, bias: bool
) -> Verdict:
    """Update factors of mixed sizes in one call; compare with fp64, PyTorch and single calls."""
    name = f"kron_factor list of {len(sizes)} {dtype} bias={bias}".replace("torch.", "")
    decay = 0.9
    xs = [_normal(device, rows, n).to(dtype) for n, rows in sizes]
    starts = [_spd(device, n + bias) for n, _ in sizes]

    def update(factors: Sequence[Tensor], items: Sequence[Tensor]) -> Tensor:
        return kron_factor_update_(factors, items, decay=decay, bias=bias)

    def plain(kind: torch.dtype) -> list[Tensor]:
        results = []
        for start, x in zip(starts, xs, strict=True):
            columns = torch.cat([x, x.new_ones(len(x), bias)], dim=1).to(kind)
            scale = (1 - decay) / max(len(x), 1)
            new = torch.addmm(start.to(kind), columns.mT, columns, beta=decay, alpha=scale)
            results.append(new if len(x) else start.to(kind))
        return results

    ours = [s.clone() for s in starts]
    update(ours, xs)
    judge = relative_error(plain(torch.float64))
    problem = _problem_of_a_list(device, starts, xs, update)
    return Verdict(name, judge(ours), judge(plain(torch.float32)), problem)


def check_convolutions(
    device: torch.device,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    geometry: dict[str, Any],
    bias: bool,
    memory_format: torch.memory_format,
) -> Verdict:
    """Update the factors of convolutions of mixed sizes in one call; compare as above."""
    form = "channels_last" if memory_format == torch.channels_last else "contiguous"
    given = " ".join(f"{k}={v}" for k, v in geometry.items())
    name = f"kron_factor_conv2d {given} {dtype} bias={bias} {form}".replace("torch.", "")
    decay = 0.9
    xs = [_normal(device, *s).to(dtype).contiguous(memory_format=memory_format) for s in shapes]
    kernel = geometry["kernel_size"]
    taps = kernel * kernel if isinstance(kernel, int) else kernel[0] * kernel[1]
    starts = [_spd(device, x.shape[1] * taps + bias) for x in xs]

    def update(factors: Sequence[Tensor], items: Sequence[Tensor]) -> Tensor:
        return kron_factor_conv2d_update_(factors, items, **geometry, decay=decay, bias=bias)

    def plain(kind: torch.dtype) -> list[Tensor]:
        results = []
        for start, x in zip(starts, xs, strict=True):
            if not len(x):
                results.append(start.to(kind))
                continue
            rows = functional.unfold(x.to(kind), **geometry).mT.flatten(0, 1)
            rows = torch.cat([rows, rows.new_ones(len(rows), bias)], dim=1)
            scale = (1 - decay) / len(rows)
            results.append(torch.addmm(start.to(kind), rows.mT, rows, beta=decay, alpha=scale))
        return results

    ours = [s.clone() for s in starts]
    update(ours, xs)
    judge = relative_error(plain(torch.float64))
    problem = _problem_of_a_list(device, starts, xs, update)
    return Verdict(name, judge(ours), judge(plain(torch.float32)), problem)


def check_precondition(
    device: torch.device, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, bias: bool
) -> Verdict:
    """Precondition gradients of mixed sizes in one call; compare with fp64, PyTorch and single calls."""
    name = f"precondition list of {len(shapes)} {dtype} bias={bias}".replace("torch.", "")
    grads = [_normal(device, *shape).to(dtype) for shape in shapes]
    biases = [_normal(device, m).to(dtype) if bias else None for m, _ in shapes]
    lefts = [_spd(device, m) for m, _ in shapes]
    rights = [_spd(device, n + bias) for _, n in shapes]
    lists = (grads, lefts, rights)
    ours, dots = precondition(*lists, bias_grad=biases, return_dot=True)
    joint = [
        g.double() if b is None else torch.cat([g, b[:, None]], dim=1).double()
        for g, b in zip(grads, biases, strict=True)
    ]

    def plain(kind: torch.dtype) -> list[Tensor]:
        triples = zip(lefts, joint, rights, strict=True)
        return [left.to(kind) @ g.to(kind) @ right.to(kind) for left, g, right in triples]

    problem = None
    for i, (out, g, b, dot) in enumerate(zip(ours, joint, biases, dots, strict=True)):
        one, single = precondition(grads[i], lefts[i], rights[i], bias_grad=b, return_dot=True)
        products = out.double() * g
        if not (torch.equal(one, out) and torch.equal(single, dot)):
            problem = f"item {i} has other bits in a list"
        elif float((dot - products.sum()).abs()) > 2**-20 * float(products.abs().sum()):
            problem = f"inner product of item {i}"
    outs = [torch.zeros_like(out) for out in ours]
    if _other_bits_in_a_graph(
        device, outs, lambda: precondition(*lists, bias_grad=biases, out=outs)
    ):
        problem = "a graph gives other bits"
    judge = relative_error(plain(torch.float64))
    return Verdict(name, judge(ours), judge(plain(torch.float32)), problem)


def check_rank_one(device: torch.device, sizes: Sequence[int], dtype: torch.dtype) -> Verdict:
    """Precondition the blocks of one vector by a rank-one matrix; compare with fp64 and a graph."""
    name = f"rank1_precondition {len(sizes)} blocks {dtype}".replace("torch.", "")
    scores = [_normal(device, n).to(dtype) for n in sizes]
    grads = [_normal(device, n).to(dtype) + u for n, u in zip(sizes, scores, strict=True)]
    ours = rank1_precondition(grads, scores, damping=0.3)
    exact = rank_one_reference(
        [g.double() for g in grads], [u.double() for u in scores], damping=0.3
    )
    problem = None
    outs = [torch.zeros_like(out) for out in ours]
    if _other_bits_in_a_graph(
        device, outs, lambda: rank1_precondition(grads, scores, damping=0.3, out=outs)
    ):
        problem = "a graph gives other bits"
    judge = relative_error(exact)
    # Nothing is better than the exact result, rounded once.
    return Verdict(name, judge(ours), judge([t.to(dtype) for t in exact]), problem)


def check_kalman(
    device: torch.device,
    outputs: int,
    d: int,
    form: str,
    likelihood: str,
    dtype: torch.dtype = torch.float32,
) -> Verdict:
    """Compare with fp64 and PyTorch on several draws: one alone may flatter either."""
    draws = [_kalman_draw(device, outputs, d, form, likelihood, dtype) for _ in range(DRAWS)]
    return Verdict(
        f"kalman_update C={outputs} d={d} {form} {likelihood} {dtype}".replace("torch.", ""),
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


def _kalman_draw(
    device: torch.device, outputs: int, d: int, form: str, likelihood: str, dtype: torch.dtype
) -> Verdict:
    """Update a state in two blocks, twice from the same start; the two must agree bitwise."""
    sizes = [d, 3]
    jacobian = _normal(device, outputs, sum(sizes)).to(dtype)
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
    arguments = [torch.zeros_like(variance), variance, jacobian.float(), innovation, noise]

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


# Each side of the edges of warps, tiles and kernels; a group is one call.
INVERSES = (
    (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64),
    (16, 64, 65, 100, 128),
    (129, 200, 300, 512, 513, 768, 1100),
)


def check_inverse(
    device: torch.device, orders: Sequence[int], dtype: torch.dtype, rho: float, method: str
) -> Verdict:
    """Invert matrices of many orders in one call, twice, one of them with NaN; compare with fp64."""
    name = f"damped_inverse {orders[0]}..{orders[-1]} {dtype} rho={rho:.0e} {method}"
    factors = []
    for n in orders:
        x = _normal(device, n + n // 2 + 1, n)
        factors.append((x.mT @ x / len(x)).to(dtype))
    bad = _spd(device, orders[0])
    bad[0, -1] = torch.nan
    ours = damped_inverse(factors, rho=rho, method=method)
    again = damped_inverse([bad, *factors], rho=rho, method=method)
    error = torch_error = 0.0
    problem = None
    for n, f, x, d, norm in zip(
        orders, factors, ours.inverse, ours.damping, ours.spectral_norm, strict=True
    ):
        wide = f.double()
        damped = (wide + wide.mT) / 2 + d.double() * torch.eye(
            n, dtype=torch.float64, device=device
        )
        judge = relative_error([torch.cholesky_inverse(torch.linalg.cholesky(damped))])
        error = max(error, judge([x]))
        plain = torch.cholesky_inverse(torch.linalg.cholesky(damped.float()))
        torch_error = max(torch_error, judge([plain]))
        exact = float(torch.linalg.eigvalsh(wide)[-1])
        if not torch.equal(x, x.mT):
            problem = f"n={n} is not symmetric"
        elif not 0.85 * exact <= float(norm) <= 1.03 * exact:
            problem = f"n={n}: norm {float(norm) / exact:.3f} of the true one"
    if any(int(i) != 0 for i in ours.info):
        problem = f"info {[int(i) for i in ours.info]}"
    elif int(again.info[0]) != int(grng_kernels.Info.NONFINITE_INPUT):
        problem = "NaN got through"
    elif not all(torch.equal(a, b) for a, b in zip(ours.inverse, again.inverse[1:], strict=True)):
        problem = "other bits beside a matrix with NaN"
    if _inverse_differs_in_a_graph(device, factors, rho, method):
        problem = "a graph gives other bits"
    return Verdict(name.replace("torch.", ""), error, torch_error, problem)


def _inverse_differs_in_a_graph(
    device: torch.device, factors: list[Tensor], rho: float, method: str
) -> bool:
    outs = [torch.zeros(f.shape, device=device) for f in factors]

    def into_outs() -> None:
        result = damped_inverse(factors, rho=rho, method=method)
        for out, x in zip(outs, result.inverse, strict=True):
            out.copy_(x)

    return _other_bits_in_a_graph(device, outs, into_outs)


def check_inverse_faults(device: torch.device, n: int) -> Verdict:
    """Absolute damping: one that is not positive, and a matrix that is indefinite."""
    factors = torch.stack([_spd(device, n) for _ in range(3)])
    factors[1, -1, -1] = -3.0
    info = damped_inverse(factors, damping=torch.tensor([0.1, 0.1, -1.0], device=device)).info
    kinds = grng_kernels.Info
    wanted = [int(kinds.OK), int(kinds.NOT_CONVERGED), int(kinds.NONFINITE_INPUT)]
    problem = None if info.tolist() == wanted else f"info {info.tolist()}, not {wanted}"
    return Verdict(f"damped_inverse n={n} faults", 0.0, 0.0, problem)


def _inverse_checks(
    device: torch.device, groups: Sequence[Sequence[int]], methods: Sequence[str]
) -> Iterator[Check]:
    for orders in groups:
        for dtype, method in itertools.product(DTYPES, methods):
            yield partial(check_inverse, device, orders, dtype, 1e-2, method)
        for rho, method in itertools.product((1e-1, 1e-4), methods):
            yield partial(check_inverse, device, orders, torch.float32, rho, method)
        yield partial(check_inverse_faults, device, orders[-1])


Check = Callable[[], Verdict]


def _factor_checks(device: torch.device, factors: Sequence[tuple[int, int]]) -> Iterator[Check]:
    for (n, rows), dtype in itertools.product(factors, DTYPES):
        bias = n > 1 and n % 2 == 1
        yield partial(check_factor, device, n, rows, dtype, bias, "contiguous")
    for layout, dtype in itertools.product(("transposed", "every second row"), DTYPES):
        yield partial(check_factor, device, 65, 130, dtype, True, layout)
    for dtype in DTYPES:
        yield partial(check_bad_factor, device, dtype)


def _list_checks(device: torch.device, sizes: Sequence[tuple[int, int]]) -> Iterator[Check]:
    for dtype, bias in itertools.product(DTYPES, (False, True)):
        yield partial(check_factors_together, device, sizes, dtype, bias)


def _conv2d_checks(device: torch.device, images: Sequence[tuple[int, ...]]) -> Iterator[Check]:
    for dtype, geometry in itertools.product(DTYPES, CONVOLUTIONS):
        yield partial(
            check_convolutions, device, images, dtype, geometry, True, torch.contiguous_format
        )
    for dtype in DTYPES:
        yield partial(
            check_convolutions, device, images, dtype, CONVOLUTIONS[1], False, torch.channels_last
        )


def _precondition_checks(
    device: torch.device, shapes: Sequence[tuple[int, int]], narrow: int
) -> Iterator[Check]:
    for dtype, bias in itertools.product(DTYPES, (False, True)):
        served = [(m, n) for m, n in shapes if min(m, n + bias) <= narrow]
        yield partial(check_precondition, device, served, dtype, bias)


def _kalman_checks(
    device: torch.device, outputs: Sequence[int], dtypes: Sequence[torch.dtype]
) -> Iterator[Check]:
    forms = (("fdekf", "gaussian"), ("vdekf", "gaussian"), ("fdekf", "categorical"))
    for dtype, count, d, (form, likelihood) in itertools.product(
        dtypes, outputs, PARAMETERS, forms
    ):
        # With fewer parameters than outputs the step is a small difference of large sums: its error
        # says more about the problem than about a kernel.
        if d >= count:
            yield partial(check_kalman, device, count, d, form, likelihood, dtype)


def _rank_one_checks(device: torch.device, backend: str) -> Iterator[Check]:
    # The C++ kernel has no 16-bit types, and the interpreter cuts bf16 off where a GPU rounds it.
    narrow = backend == "triton" and not interpreting_triton()
    for dtype in DTYPES if narrow else DTYPES[-1:]:
        for sizes in ([1], [8193], [5, 20_000, 17]):
            yield partial(check_rank_one, device, sizes, dtype)


def sweep(
    device: torch.device,
    budget_s: float,
    *,
    factors: Sequence[tuple[int, int]] = FACTORS,
    together: Sequence[tuple[int, int]] = TOGETHER,
    images: Sequence[tuple[int, ...]] = IMAGES,
    weights: Sequence[tuple[int, int]] = WEIGHTS,
    inverses: Sequence[Sequence[int]] = INVERSES,
    outputs: Sequence[int] = OUTPUTS,
) -> tuple[list[Verdict], list[str]]:
    """Run every check on the kernels of a device.

    Args:
        device: Where.
        budget_s: No new check is begun after this.
        factors: Orders and rows of the factor update.
        together: The same, without the column of ones, for one call.
        images: Images of one call of the convolution.
        weights: Shapes of the gradients of one call of the two-sided product.
        inverses: Orders of the matrices of one call of the inverse, for each call.
        outputs: Outputs of the Kalman update.

    Returns:
        The verdicts, and what was left out and why.
    """
    torch.manual_seed(0)
    first, second = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "cpu")}[device.type]
    if interpreting_triton():
        first = "triton"
    # The kernels of a CPU are one backend: they have been checked by then.
    others = DTYPES if first != second else ()
    start = time.monotonic()
    verdicts: list[Verdict] = []
    left_out: list[str] = []
    # Compiling the Triton variants must not starve the others: they get a part of the time.
    for name, backend, share, checks in (
        ("kron_factor", first, 0.35, _factor_checks(device, factors)),
        ("kron_factor of lists", first, 0.45, _list_checks(device, together)),
        ("kron_factor_conv2d", first, 0.65, _conv2d_checks(device, images)),
        ("precondition", first, 0.85, _precondition_checks(device, weights, NARROW[first])),
        ("damped_inverse", first, 0.93, _inverse_checks(device, inverses, METHODS[first])),
        ("damped_inverse", second, 0.95, _inverse_checks(device, inverses[:1], METHODS[second])),
        ("rank1_precondition", first, 0.96, _rank_one_checks(device, first)),
        ("kalman_update", second, 0.98, _kalman_checks(device, outputs, DTYPES[-1:])),
        ("kalman_update", first, 1.0, _kalman_checks(device, outputs, others)),
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
