# SPDX-License-Identifier: Apache-2.0
"""The optimizers whose step is measured, and which of their functions do which part of it.

kfac-pytorch and Distributed Shampoo are imported if they are installed; they are on no package index::

    pip install --no-deps git+https://github.com/gpauloski/kfac-pytorch
    pip install --no-deps git+https://github.com/facebookresearch/optimizers
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import grng
from grng.optim import kfac, ring
from step_costs.clock import Seam

# Of RING's default, and of everybody who has one.
REFRESH_EVERY = 10


class Contender:
    """An optimizer of a model.

    Attributes:
        optimizer: What has ``zero_grad`` and, if it takes its own statistics, ``observe``.
        step: Makes a step after the backward pass.
        seams: Functions that do statistics, refresh and preconditioning; the rest of a step is "update".
        state_bytes: Returns the bytes that it keeps between steps.
        warm_up: Steps after which it has done everything once.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        seams: list[Seam] | None = None,
        before: Callable[[], None] | None = None,
        further_bytes: Callable[[], int] | None = None,
        warm_up: int = 2,
    ) -> None:
        """Args: before: called in front of the step; further_bytes: of state outside of the optimizer's."""
        self.optimizer, self.seams = optimizer, seams or []
        self._before, self._further_bytes, self.warm_up = before, further_bytes, warm_up
        self.observe = getattr(optimizer, "observe", None)
        if self.observe is not None:
            self.seams.append(Seam("statistics", self, "observe"))

    def step(self) -> None:
        """Make a step."""
        if self._before is not None:
            self._before()
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Bytes of all tensors of the state, each storage once."""
        further = self._further_bytes() if self._further_bytes else 0
        return _bytes_of(list(self.optimizer.state.values())) + further


def _bytes_of(found: Any) -> int:
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(found)
    return sum(storages.values())


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _ring(refresh_every: int) -> Callable[[nn.Module], Contender]:
    def make(model: nn.Module) -> Contender:
        optimizer = grng.RING(model, refresh_every=refresh_every)
        return Contender(
            optimizer,
            [
                Seam("statistics", optimizer, "_average"),
                Seam("refresh", ring, "refresh_inverses"),
                Seam("precondition", ring, "preconditioned"),
            ],
        )

    return make


def _kfac(model: nn.Module) -> Contender:
    optimizer = grng.KFAC(
        model,
        convention="kfac-pytorch",
        fisher="empirical",
        factor_every=REFRESH_EVERY,
        refresh_every=REFRESH_EVERY,
    )
    return Contender(
        optimizer,
        [
            Seam("statistics", optimizer, "_update_factors"),
            Seam("refresh", optimizer, "_refresh_inverses"),
            Seam("precondition", kfac, "clipped_directions"),
        ],
    )


def _adamw(**options: Any) -> Callable[[nn.Module], Contender]:
    return lambda model: Contender(torch.optim.AdamW(_trained(model), lr=1e-3, **options))


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices, which is all that it takes, AdamW for the rest."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [p for p in _trained(model) if p.dim() == 2]
        rest = [p for p in _trained(model) if p.dim() != 2]
        super().__init__(_trained(model), {})
        self._both: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=1e-3)]
        if rest:
            self._both.append(torch.optim.AdamW(rest, lr=1e-3, foreach=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self._both:
            one.step()
        for one in self._both:
            self.state.update(one.state)


def _muon(model: nn.Module) -> Contender:
    return Contender(_MuonAndAdamW(model))


def _kfac_pytorch(model: nn.Module, refresh_every: int = REFRESH_EVERY) -> Contender:
    kfac_preconditioner = importlib.import_module("kfac.preconditioner")
    inverse = importlib.import_module("kfac.layers.inverse").KFACInverseLayer
    preconditioner = kfac_preconditioner.KFACPreconditioner(
        model,
        factor_update_steps=refresh_every,
        inv_update_steps=refresh_every,
        compute_method="inverse",
    )
    seams = [
        Seam(part, inverse, name)
        for part, names in {
            "statistics": (
                "save_layer_input",
                "save_layer_grad_output",
                "update_a_factor",
                "update_g_factor",
            ),
            "refresh": ("compute_a_inv", "compute_g_inv"),
            "precondition": ("preconditioned_grad", "update_grad"),
        }.items()
        for name in names
    ]
    seams.append(Seam("precondition", preconditioner, "_compute_grad_scale"))
    sgd = torch.optim.SGD(_trained(model), lr=0.03, momentum=0.9, foreach=True)
    return Contender(
        sgd, seams, preconditioner.step, lambda: sum(preconditioner.memory_usage().values())
    )


def _shampoo(model: nn.Module) -> Contender:
    package = importlib.import_module("distributed_shampoo")
    optimizer = package.DistributedShampoo(
        _trained(model),
        lr=1e-3,
        betas=(0.9, 0.999),
        epsilon=1e-12,
        precondition_frequency=REFRESH_EVERY,
        start_preconditioning_step=REFRESH_EVERY,
        grafting_config=package.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
    )
    return Contender(optimizer, warm_up=REFRESH_EVERY + 1)


CONTENDERS: dict[str, Callable[[nn.Module], Contender]] = {
    "RING": _ring(REFRESH_EVERY),
    "KFAC": _kfac,
    "AdamW foreach": _adamw(foreach=True),
    "AdamW fused": _adamw(fused=True),
    "Muon + AdamW": _muon,
    "kfac-pytorch": _kfac_pytorch,
    "Shampoo": _shampoo,
    "RING, refresh 1": _ring(1),
    "kfac-pytorch, refresh 1": functools.partial(_kfac_pytorch, refresh_every=1),
}
# By default, beside each other on equal terms; the large models without those that take minutes for a step.
EQUAL = ("RING", "KFAC", "AdamW foreach", "AdamW fused", "Muon + AdamW", "kfac-pytorch", "Shampoo")
LARGE = ("RING", "KFAC", "AdamW foreach", "AdamW fused", "Muon + AdamW", "kfac-pytorch")
