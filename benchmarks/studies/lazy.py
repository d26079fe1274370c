# SPDX-License-Identifier: Apache-2.0
"""Lazy Fisher: how rarely the curvature may be refreshed, and what that saves."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from grng.compare.config import CompareConfig
from grng.studies.records import Panel
from studies import sweep
from studies.definition import Definition, Options, Planned
from studies.sweep import Variant, at
from studies.training import about, fashion_mnist

PERIODS = (1, 2, 4, 8, 10, 50)
# Shorter for the ViT, whose steps take longer.
MODELS = {
    "mlp": dict(batch_size=256, steps=430, adamw="adamw:lr=3e-3"),
    "vit": dict(batch_size=64, steps=200, adamw="adamw:lr=3e-3"),
}


def _config(model: str, options: Options) -> CompareConfig:
    own = MODELS[model]
    return fashion_mnist(model, own["batch_size"], own["steps"], is_quick=options.is_quick)


def _variants(model: str, options: Options) -> list[Variant]:
    periods = PERIODS[-2:] if options.is_quick else PERIODS
    ends = tuple({"period": period} for period in (periods[0], periods[-1]))
    return [
        Variant("adamw", "", MODELS[model]["adamw"], ends),
        *(
            Variant("ring", f"refresh_every={n}", f"ring:refresh_every={n}", at(period=n))
            for n in periods
        ),
    ]


def _about(model: str, options: Options) -> dict[str, Any]:
    return {**about(_config(model, options)), "adamw": MODELS[model]["adamw"]}


def _plan(model: str, options: Options) -> Iterator[Planned]:
    return sweep.plan(_variants(model, options), _config(model, options), options)


_X = dict(x="period", x_label="S: steps between refreshes", x_scale="log")


def _study(model: str, subtitle: str) -> Definition:
    return Definition(
        name=f"lazy-{model}",
        title="Lazy Fisher: quality and time against the refresh period",
        subtitle=f"{subtitle}  ·  mean and range of the seeds",
        panels=(
            Panel(y="test_accuracy", title="Test accuracy", y_label="in %", **_X),
            Panel(y="train_loss", title="Training loss", y_label="cross entropy", **_X),
            Panel(y="ms_per_step", title="Time of a step", y_label="milliseconds", **_X),
        ),
        config=functools.partial(_about, model),
        plan=functools.partial(_plan, model),
    )


MLP = _study("mlp", "MLP 784-256-256-10, Fashion-MNIST, 430 steps of 256 (2 passes)")
VIT = _study("vit", "ViT, 4 blocks of width 64, Fashion-MNIST, 200 steps of 64")
