# SPDX-License-Identifier: Apache-2.0
"""MiniLM with LoRA in few steps, where AdamW is ahead of RING's defaults: which part of RING costs it that.

On held-out samples; with ``--seeds 3,4,5``, which ``evidence.py`` does not test with, what is found may be
taken up by the defaults.
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

# AdamW as a search of seven trials found it (``evidence.py authors``); of RING one thing each is changed.
PARTS = {
    "AdamW": "adamw:lr=5e-3:weight_decay=0.1",
    "RING": "ring",
    "lr\n1e-2": "ring:lr=1e-2",
    "no trust\nregion": "ring:max_kl=None",
    "exact\nFisher": "ring:fisher=exact",
    "empirical\nFisher": "ring:fisher=empirical",
    "refresh\n1": "ring:refresh_every=1",
    "refresh\n3": "ring:refresh_every=3",
    "rho\n1e-2": "ring:rho=1e-2",
    "rho\n0.1": "ring:rho=0.1",
    "diagonal\n> 64": "ring:max_factor_dim=64",
}
_QUICK = ("AdamW", "exact\nFisher")


def _config(options: Options) -> CompareConfig:
    return settings(
        is_quick=options.is_quick,
        task="authors",
        model="minilm",
        batch_size=16,
        steps=120,
        checkpoints=1,
    )


def _parts(options: Options) -> dict[str, str]:
    return {name: PARTS[name] for name in _QUICK} if options.is_quick else PARTS


def _about(options: Options) -> dict[str, Any]:
    return {
        **about(_config(options)),
        "parts": {name.replace("\n", " "): own for name, own in _parts(options).items()},
    }


def _plan(options: Options) -> Iterator[Planned]:
    variants = [
        Variant("variants", name.replace("\n", " "), optimizer, at(part=name))
        for name, optimizer in _parts(options).items()
    ]
    return sweep.plan(variants, _config(options), options)


_PART = dict(x="part", x_label="", x_scale="category")
STUDY = Definition(
    name="lora-parts",
    title="LoRA in few steps: what costs RING the lead",
    subtitle="MiniLM-L6, LoRA r 8, Shakespeare or Milton, 120 steps of 16  ·  mean and range of the seeds",
    panels=(
        Panel(y="validation_accuracy", title="Held-out accuracy", y_label="in %", **_PART),
        Panel(y="train_loss", title="Loss of the last 12 steps", y_label="cross entropy", **_PART),
    ),
    config=_about,
    plan=_plan,
)
