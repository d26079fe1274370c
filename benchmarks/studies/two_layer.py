# SPDX-License-Identifier: Apache-2.0
"""Does the natural gradient converge as theory says for two-layer networks, and RING beside it?"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grng import RING
from grng.studies.records import Panel, Value
from grng.tasks import TASKS, LoadRequest
from studies.definition import Definition, Measured, Options, Planned
from studies.relu_network import Network, Start, allowed_stability

_SAMPLES, _VALIDATION = 100, 200
_ETA = 0.3
_RHOS = (0.0, 1e-3, 1e-2)
# Of the measured factor: later, some residuals are those of rounding.
_FACTOR_STEPS = 20
# Relative to the first: from here on, a run has diverged.
_LOST = 1e6


def _name(rho: float) -> str:
    return f"rho={rho:g}"


def _bare(rho: float) -> dict[str, Any]:
    """RING without what is added to the method, with the step length of the exact one."""
    return dict(
        rho=rho,
        lr=_ETA,
        step_length="kl_clip",
        kl_clip=None,
        betas=(0.0, 0.999),
        weight_decay=0.0,
        refresh_every=1,
        fisher="exact",
    )


# As shipped, its default damping written out; and bare. No labels are drawn.
_RINGS: dict[str, dict[str, Any]] = {
    f"ring:{_name(1e-3)}": dict(rho=1e-3, fisher="exact"),
    **{f"ring:bare:{_name(rho)}": _bare(rho) for rho in (1e-4, 1e-3, 1e-2)},
}


@dataclass(frozen=True)
class _Size:
    """Which widths, how long, and the width whose residuals are drawn."""

    widths: tuple[int, ...]
    steps: int
    shown: int


def _size(options: Options) -> _Size:
    if options.is_quick:
        return _Size((64, 256), 5, 256)
    return _Size((256, 1024, 4096, 16384), 60, 1024)


@functools.cache
def samples() -> tuple[Tensor, Tensor]:
    """100 digits of scikit-learn, scaled to length 1, and whether they are even (1) or odd (-1); fp64."""
    request = LoadRequest(torch.device("cpu"), validation=_VALIDATION)
    data = TASKS["digits"].load(request)
    inputs = data.train_inputs[:_SAMPLES].double()
    labels = 1.0 - 2.0 * (data.train_labels[:_SAMPLES] % 2).double()
    return inputs / inputs.norm(dim=1, keepdim=True), labels


@functools.lru_cache(maxsize=4)
def _start(width: int, seed: int) -> Start:
    return Start(*samples(), width, seed)


def _damping(rho: float, start: Start) -> float:
    return rho * start.largest


def _check(square: float, first: float, step: int) -> None:
    """Whether a run goes on.

    Raises:
        ArithmeticError: The squared residual of this step says that it has diverged.
    """
    if not square <= _LOST * first:
        raise ArithmeticError(
            f"at step {step} the squared residual is {square / first:.3g} times the first"
        )


def _points(squares: list[float], width: int, size: _Size) -> list[dict[str, Value]]:
    """Residuals at the width that is drawn, and what is drawn against the width."""
    last = min(_FACTOR_STEPS, len(squares) - 1)
    factor = (squares[last] / squares[0]) ** (1 / last)
    found: list[dict[str, Value]] = [{"width": width, "factor": factor}]
    if width == size.shown:
        found += [
            {"step": step, "residual": value / squares[0]} for step, value in enumerate(squares)
        ]
    return found


def _exact(
    width: int, size: _Size, seed: int, step: Callable[[Network, Start], None]
) -> tuple[Measured, Start]:
    start, begin = _start(width, seed), time.perf_counter()
    network, stability = start.network(), 0.0
    squares = [float(network.residual().square().sum())]
    for number in range(1, size.steps + 1):
        step(network, start)
        stability = max(stability, network.stability())
        squares.append(float(network.residual().square().sum()))
        _check(squares[-1], squares[0], number)
    points = _points(squares, width, size)
    points[0] |= {
        "stability": stability,
        "smallest_eigenvalue": start.smallest,
        "largest_eigenvalue": start.largest,
    }
    return Measured(points, time.perf_counter() - begin), start


def _natural(rho: float, width: int, size: _Size, seed: int) -> Measured:
    measured, start = _exact(
        width, size, seed, lambda net, at: net.natural_step(_ETA, _damping(rho, at))
    )
    damping, last = _damping(rho, start), min(_FACTOR_STEPS, size.steps)
    measured.points[0]["linear_factor"] = start.linear_ratio(_ETA, damping, last) ** (1 / last)
    return measured


def _descent(width: int, size: _Size, seed: int) -> Measured:
    return _exact(width, size, seed, lambda net, at: net.descent_step(1 / at.largest))[0]


def _bound_name(rho: float) -> str:
    # Only without damping the cited theorem has one.
    return f"bound:linearised:{_name(rho)}" if rho else "bound:theorem"


def _bound(rho: float, width: int, size: _Size, seed: int) -> Measured:
    start = _start(width, seed)
    factor = start.bound(_ETA, _damping(rho, start))
    found: list[dict[str, Value]] = [{"width": width, "factor": factor}]
    if rho == 0:
        found[0]["stability"] = allowed_stability(_ETA)
    if width == size.shown:
        found += [{"step": k, "residual": factor**k} for k in range(size.steps + 1)]
    return Measured(found)


class _Module(nn.Module):
    """The same network for an optimizer."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.hidden = nn.Linear(start.inputs.shape[1], start.width, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.hidden.weight.copy_(start.weight)
        self.signs: Tensor
        self.register_buffer("signs", start.signs / math.sqrt(start.width))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.hidden(inputs).relu() @ self.signs
        return outputs.unsqueeze(1)


def _ring(options: dict[str, Any], width: int, size: _Size, seed: int) -> Measured:
    start, begin = _start(width, seed), time.perf_counter()
    model = _Module(start)
    optimizer = RING(model, **options)
    squares: list[float] = []
    for number in range(size.steps + 1):
        outputs = model(start.inputs)
        errors = (outputs.squeeze(1) - start.labels).square()
        squares.append(float(errors.detach().sum()))
        _check(squares[-1], squares[0], number)
        if number == size.steps:
            break
        optimizer.observe(outputs, likelihood="gaussian")
        (0.5 * errors.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Measured(_points(squares, width, size), time.perf_counter() - begin)


def _plan(options: Options) -> Iterator[Planned]:
    size = _size(options)
    for seed in options.seeds:
        for width in size.widths:
            setting = f"m={width}"
            for rho in _RHOS:
                run = functools.partial(_natural, rho, width, size, seed)
                yield Planned(f"exact:{_name(rho)}", setting, seed, run)
            yield Planned("descent", setting, seed, functools.partial(_descent, width, size, seed))
            if width == size.shown:
                for name, given in _RINGS.items():
                    yield Planned(
                        name, setting, seed, functools.partial(_ring, given, width, size, seed)
                    )
            for rho in _RHOS:
                run = functools.partial(_bound, rho, width, size, seed)
                yield Planned(_bound_name(rho), setting, seed, run)


def _about(options: Options) -> dict[str, Any]:
    size = _size(options)
    return {
        "samples": _SAMPLES,
        "data": "digits, scaled to length 1; even or odd",
        "widths": list(size.widths),
        "steps": size.steps,
        "eta": _ETA,
        "rhos": list(_RHOS),
        "diverged_above": _LOST,
        "steps_of_the_factor": min(_FACTOR_STEPS, size.steps),
        "ring": {name: dict(given) for name, given in _RINGS.items()},
    }


_WIDTH = dict(x="width", x_label="hidden units m", x_scale="log")
STUDY = Definition(
    name="two-layer",
    title="Two-layer network, full batch: the natural gradient, a theorem's bound and RING",
    subtitle="100 digits on the unit sphere, even or odd, squared loss, fp64, eta 0.3  ·  exact: by J J', "
    "damping rho times its norm  ·  mean and range of the seeds\n"
    "bound:theorem is that of Zhang et al. (2019); bound:linearised is this project's own for a constant "
    "Jacobian with damping",
    panels=(
        Panel(
            x="step",
            y="residual",
            title="m = 1,024",
            x_label="steps",
            y_label="squared residual, relative to the first",
            y_scale="log",
        ),
        Panel(
            y="factor",
            title="Contraction from the start to step 20",
            y_label="of the squared residual, per step",
            **_WIDTH,
        ),
        Panel(
            y="stability",
            title="Change of the Jacobian: C",
            y_label="2 ||J - J(0)|| / sqrt(mu_min), largest",
            y_scale="log",
            **_WIDTH,
        ),
    ),
    config=_about,
    plan=_plan,
)
