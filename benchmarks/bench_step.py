# SPDX-License-Identifier: Apache-2.0
"""One training step of a small net with each optimizer, in units of forward plus backward."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Outputs, Plan, Role, relative_error
from harness.files import text_table
from harness.row import Row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SIZES = (784, 256, 256, 10)
# Two refresh periods of RING's default: a sample mixes cheap and dear steps as training does.
STEPS = 20
BASE = "forward, backward"
LIMIT = 1e-5
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def _model(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(device)


def _batch(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    x = torch.empty(size, SIZES[0], device=device).normal_(generator=generator)
    teacher = torch.empty(SIZES[0], SIZES[-1], device=device).normal_(generator=generator)
    return x, (x @ teacher).argmax(dim=1)


class _Training:
    """A model, its optimizer and one step of both."""

    def __init__(self, make: MakeOptimizer | None, x: Tensor, y: Tensor) -> None:
        """Args: make: builds the optimizer; None measures forward and backward alone."""
        self._make, self._x, self._y = make, x, y
        self.restart()

    def restart(self) -> None:
        self._net = _model(self._x.device)
        self._optimizer = self._make(self._net) if self._make else None
        self._observe = getattr(self._optimizer, "observe", None)

    def step(self) -> Outputs:
        self._net.zero_grad(set_to_none=True)
        logits = self._net(self._x)
        if self._observe is not None:
            self._observe(logits)
        loss = cross_entropy(logits, self._y)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._optimizer is not None:
            self._optimizer.step()
        return [loss.detach()]

    def learns(self) -> bool:
        """Return whether the loss falls over one sample's worth of steps; starts anew."""
        losses = [float(self.step()[0]) for _ in range(STEPS + 1)]
        self.restart()
        return losses[-1] < losses[0]


def _contender(
    name: str, backend: str, role: Role, make: MakeOptimizer | None, x: Tensor, y: Tensor
) -> Contender:
    training: list[_Training] = []

    def call() -> Outputs:
        return training[0].step()

    def reset() -> None:
        if training:
            training[0].restart()
            return
        training.append(_Training(make, x, y))
        if make is not None and not training[0].learns():
            raise RuntimeError(f"the loss did not fall in {STEPS} steps")

    return Contender(name, backend, role, call, reset)


def _ring(model: nn.Module) -> torch.optim.Optimizer:
    import grng

    ring: MakeOptimizer | None = getattr(grng, "RING", None)
    if ring is None:
        raise RuntimeError("grng.RING is not part of this installation")
    return ring(model)


def _adamw(**options: bool) -> MakeOptimizer:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, **options)  # type: ignore[arg-type]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=True)


def _case(plan: Plan, size: int) -> Case:
    x, y = _batch(size, plan.device)
    expected = cross_entropy(_model(plan.device).double()(x.double()), y).detach()
    parameters = sum((a + 1) * b for a, b in itertools.pairwise(SIZES))
    return Case(
        op="step",
        shape=f"mlp-fashion batch {size}",
        dims={"layers": list(SIZES), "batch": size, "parameters": parameters},
        dtype="float32",
        bytes=12.0 * parameters,
        flops=6.0 * parameters * size,
        error=relative_error([expected]),
        limit=LIMIT,
        contenders=[
            _contender(BASE, "torch", "yardstick", None, x, y),
            _contender("grng.RING", "grng", "ours", _ring, x, y),
            _contender("AdamW foreach", "torch", "rival", _adamw(foreach=True), x, y),
            _contender("AdamW fused", "torch", "rival", _adamw(fused=True), x, y),
            _contender("SGD momentum", "torch", "yardstick", _sgd, x, y),
        ],
        modes=("eager",),
        repetitions=STEPS,
        notes=(
            f"mean of {STEPS} consecutive steps; error: of the first loss; "
            "roofline: forward and backward only",
        ),
    )


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan; ``sizes`` are batch sizes."""
    for size in plan.sizes or ((64,) if plan.quick else (256,)):
        yield _case(plan, size)


def in_units(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """Return rows with ``forward_backward_units`` among their dims, and a table of them."""
    base = {row.shape: row.p50_ms for row in rows if row.provider == BASE}
    done, lines = [], []
    for row in rows:
        unit, ms = base.get(row.shape), row.p50_ms
        if ms is not None and unit:
            row = dataclasses.replace(row, dims={**row.dims, "forward_backward_units": ms / unit})
            share = f"{ms / unit:.2f}"
            lines.append((row.provider, f"{ms:.3f}", share, f"{ms - unit:.3f}"))
        else:
            lines.append((row.provider, "-", "-", "; ".join(row.notes[-1:])))
        done.append(row)
    return done, text_table(
        ("optimizer", "ms per step", "forward+backward units", "optimizer's part, ms"), lines
    )


BENCH = Bench("step", "one training step, 784-256-256-10", cases, finish=in_units)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
