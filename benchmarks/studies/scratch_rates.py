# SPDX-License-Identifier: Apache-2.0
"""MiniLM from fresh weights: how far its embeddings, which begin at 0.02, may move in a step.

They have no curvature, and no trust region: RING trains them by AdamW, by default at its own rate, but
shortened where they are small. Beside it, that rate as it is, that of the best AdamW, and AdamW at both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grng.compare.config import CompareConfig
from grng.studies.records import Panel
from studies import sweep
from studies.definition import Definition, Options, Planned
from studies.sweep import Variant, at
from studies.training import about, settings

RATES = {
    "RING": "ring",
    "adamw_lr\n1e-3": "ring:adamw_lr=1e-3",
    "adamw_lr\n5e-3": "ring:adamw_lr=5e-3",
    "AdamW\n1e-3": "adamw:lr=1e-3",
    "AdamW\n5e-3": "adamw:lr=5e-3",
}
_QUICK = ("adamw_lr\n1e-3",)


def _config(options: Options) -> CompareConfig:
    return settings(
        is_quick=options.is_quick,
        task="authors",
        model="minilm-scratch",
        batch_size=16,
        steps=120,
        checkpoints=1,
    )


def _rates(options: Options) -> dict[str, str]:
    return {name: RATES[name] for name in _QUICK} if options.is_quick else RATES


def _about(options: Options) -> dict[str, Any]:
    rates = {name.replace("\n", " "): own for name, own in _rates(options).items()}
    return {**about(_config(options)), "rates": rates}


def _plan(options: Options) -> Iterator[Planned]:
    variants = [
        Variant("rates", name.replace("\n", " "), optimizer, at(rate=name))
        for name, optimizer in _rates(options).items()
    ]
    return sweep.plan(variants, _config(options), options)


_RATE = dict(x="rate", x_label="", x_scale="category")
STUDY = Definition(
    name="scratch-rates",
    title="Fresh weights: how far embeddings move",
    subtitle="MiniLM-L6, Shakespeare or Milton, 120 steps of 16  ·  mean and range of the seeds",
    panels=(
        Panel(y="validation_accuracy", title="Held-out accuracy", y_label="in %", **_RATE),
        Panel(y="train_loss", title="Loss of the last 12 steps", y_label="cross entropy", **_RATE),
    ),
    config=_about,
    plan=_plan,
)
