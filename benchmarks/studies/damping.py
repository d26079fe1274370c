# SPDX-License-Identifier: Apache-2.0
"""How much damping: rho from 1e-5 to 1, RING and RENG against AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grng.compare.config import CompareConfig
from grng.studies.records import Panel
from studies import sweep
from studies.definition import Definition, Options, Planned
from studies.sweep import Variant, at
from studies.training import about, fashion_mnist

RHOS = ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "1")
_ADAMW = "adamw:lr=3e-3"


def _config(options: Options) -> CompareConfig:
    return fashion_mnist("mlp", 256, 645, is_quick=options.is_quick)


def _variants(options: Options) -> list[Variant]:
    rhos = RHOS[2:4] if options.is_quick else RHOS
    ends = tuple({"rho": float(rho)} for rho in (rhos[0], rhos[-1]))
    return [
        Variant("adamw", "", _ADAMW, ends),
        *(Variant("ring", f"rho={rho}", f"ring:rho={rho}", at(rho=float(rho))) for rho in rhos),
        *(Variant("reng", f"rho={rho}", f"reng:rho={rho}", at(rho=float(rho))) for rho in rhos),
    ]


def _about(options: Options) -> dict[str, Any]:
    return {**about(_config(options)), "adamw": _ADAMW}


def _plan(options: Options) -> Iterator[Planned]:
    return sweep.plan(_variants(options), _config(options), options)


_X = dict(x="rho", x_label="rho", x_scale="log")
STUDY = Definition(
    name="damping",
    title="Damping: rho from 1e-5 to 1",
    subtitle="MLP 784-256-256-10, Fashion-MNIST, 645 steps of 256 (3 passes)  ·  mean and range of the seeds",
    panels=(
        Panel(y="test_accuracy", title="Test accuracy", y_label="in %", **_X),
        Panel(y="train_loss", title="Training loss", y_label="cross entropy", y_scale="log", **_X),
    ),
    config=_about,
    plan=_plan,
)
