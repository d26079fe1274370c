# SPDX-License-Identifier: Apache-2.0
"""One shape with everyone who computes it, and how their results are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import grng_kernels
from harness.timer import Effort

if TYPE_CHECKING:
    from harness.row import Row

# "ours" is what a user gets; "variant" is another way through this package; a "rival" may set the
# ratio; a "yardstick" is timed but is no rival, because nobody in a hurry would do it that way.
Role = Literal["ours", "variant", "rival", "yardstick"]
Outputs = Sequence[Tensor]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: As in the tables.
        backend: What computes: cpu, triton, cuda, reference, torch, inductor; of ours ``cpu+reference``
            where a call has items for both.
        role: See ``Role``.
        call: Does the work once; returns tensors that hold the result.
        reset: Puts state that ``call`` mutates back, in place.
        notes: Remarks for the row.
    """

    name: str
    backend: str
    role: Role
    call: Callable[[], Outputs]
    reset: Callable[[], None] = _nothing
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One shape of one operation.

    Attributes:
        op: Operation, also the name of the result file.
        shape: Name of the shape.
        dims: Its numbers.
        dtype: Of the inputs.
        bytes: Least memory traffic.
        flops: Least arithmetic.
        error: Largest error of a result against fp64.
        limit: A larger error is a red check: no timing is taken.
        contenders: Who takes part.
        modes: ``eager``, ``graph``; a graph only on a GPU.
        states: ``warm``, ``cold``.
        repetitions: Calls per sample, where one call alone has no meaning.
        max_s: Less time for the rounds than the plan gives, where calls are long.
        notes: Remarks for every row.
        remark: Makes a remark for the row of whoever gave these results.
    """

    op: str
    shape: str
    dims: dict[str, Any]
    dtype: str
    bytes: float
    flops: float
    error: Callable[[Outputs], float]
    limit: float
    contenders: list[Contender]
    modes: tuple[str, ...] = ("eager", "graph")
    states: tuple[str, ...] = ("warm", "cold")
    repetitions: int | None = None
    max_s: float = math.inf
    notes: tuple[str, ...] = ()
    remark: Callable[[Outputs], str] | None = None


@dataclass(frozen=True)
class Plan:
    """What a run was asked for.

    Attributes:
        device: Where.
        quick: A smoke run: small, short, not for publication.
        sizes: Sizes of the single shapes, or None for those of the benchmark.
        shapes: Names of the model shapes, or None for those of the benchmark.
        dtypes: Input types, or None for those of the benchmark.
        states: ``warm``, ``cold``.
        modes: ``eager``, ``graph``.
        compile: Whether the compiled rivals take part.
        effort: How long to measure.
        attempts: How often to repeat under foreign load.
        budget_s: No new case is begun after this, per operation.
    """

    device: torch.device
    quick: bool = False
    sizes: tuple[int, ...] | None = None
    shapes: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    states: tuple[str, ...] = ("warm",)
    modes: tuple[str, ...] = ("eager",)
    compile: bool = True
    effort: Effort = field(default_factory=Effort)
    attempts: int = 4
    budget_s: float = math.inf


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    Attributes:
        op: Operation, also the name of the result file.
        title: Of its table.
        cases: Its cases, built one at a time because they are large.
        finish: Adds to the rows what needs all of them; returns them and more to print.
    """

    op: str
    title: str
    cases: Callable[[Plan], Iterator[Case]]
    finish: Callable[[Sequence[Row]], tuple[list[Row], str]] | None = None


def relative_error(expected: Outputs) -> Callable[[Outputs], float]:
    """Return a judge: largest difference from ``expected`` (fp64) over its largest entry."""

    def judge(outputs: Outputs) -> float:
        worst = 0.0
        for got, wanted in zip(outputs, expected, strict=True):
            if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
                return math.inf
            if not wanted.numel():
                continue
            scale = float(wanted.abs().max()) or 1.0
            worst = max(worst, float((got.to(wanted.dtype) - wanted).abs().max()) / scale)
        return worst

    return judge


def our_backend(kernel_on: dict[str, str], device: torch.device) -> tuple[str, tuple[str, ...]]:
    """Return the backend that ``auto`` chooses, and a remark where a kernel is missing.

    Args:
        kernel_on: The kernel of the operation by device type; empty where it has none.
        device: Of the tensors.
    """
    kernel = kernel_on.get(device.type)
    if kernel is None:
        return "reference", ()
    status = grng_kernels.backends()[kernel]
    if status.available:
        return kernel, ()
    return "reference", (f"{kernel} kernel missing: {status.reason}",)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled for fixed shapes, with no trace of earlier shapes."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)
