# SPDX-License-Identifier: Apache-2.0
"""MiniLM in few steps, with one thing of RING changed at a time: where its defaults were behind, and why.

On held-out samples. ``lora-parts`` asks which part of RING costs it AdamW's lead with LoRA; with ``--seeds
3,4,5``, which ``evidence.py`` does not test with, what is found may be taken up by the defaults.
``scratch-rates`` asks how far the embeddings of fresh weights, which begin at 0.02, may move in a step. They
have no curvature, and no trust region: RING trains them by AdamW, by default at its own rate, but shortened
where they are small. Beside it, that rate as it is, that of the best AdamW, and AdamW at both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from grng.compare.config import CompareConfig
from grng.studies.records import Panel
from studies import sweep
from studies.definition import Definition, Options, Planned
from studies.sweep import Variant, at
from studies.training import about, settings


class _Question(NamedTuple):
    """A model, the optimizers that are compared on it by name, and those of a quick form."""

    model: str
    optimizers: dict[str, str]
    quick: tuple[str, ...]
    series: str


# AdamW as a search of seven trials found it (``evidence.py authors``); of RING one thing each is changed.
_LORA = _Question(
    "minilm",
    {
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
    },
    ("AdamW", "exact\nFisher"),
    "variants",
)
_SCRATCH = _Question(
    "minilm-scratch",
    {
        "RING": "ring",
        "adamw_lr\n1e-3": "ring:adamw_lr=1e-3",
        "adamw_lr\n5e-3": "ring:adamw_lr=5e-3",
        "AdamW\n1e-3": "adamw:lr=1e-3",
        "AdamW\n5e-3": "adamw:lr=5e-3",
    },
    ("adamw_lr\n1e-3",),
    "rates",
)


def _config(asked: _Question, options: Options) -> CompareConfig:
    return settings(
        is_quick=options.is_quick,
        task="authors",
        model=asked.model,
        batch_size=16,
        steps=120,
        checkpoints=1,
    )


def _optimizers(asked: _Question, options: Options) -> dict[str, str]:
    names = asked.quick if options.is_quick else tuple(asked.optimizers)
    return {name: asked.optimizers[name] for name in names}


def _about(asked: _Question, options: Options) -> dict[str, Any]:
    named = {name.replace("\n", " "): own for name, own in _optimizers(asked, options).items()}
    return {**about(_config(asked, options)), "optimizers": named}


def _plan(asked: _Question, options: Options) -> Iterator[Planned]:
    variants = [
        Variant(asked.series, name.replace("\n", " "), optimizer, at(variant=name))
        for name, optimizer in _optimizers(asked, options).items()
    ]
    return sweep.plan(variants, _config(asked, options), options)


def _study(asked: _Question, name: str, title: str, subtitle: str) -> Definition:
    named = dict(x="variant", x_label="", x_scale="category")
    return Definition(
        name=name,
        title=title,
        subtitle=f"{subtitle}, Shakespeare or Milton, 120 steps of 16  ·  mean and range of the seeds",
        panels=(
            Panel(y="validation_accuracy", title="Held-out accuracy", y_label="in %", **named),
            Panel(
                y="train_loss", title="Loss of the last 12 steps", y_label="cross entropy", **named
            ),
        ),
        config=functools.partial(_about, asked),
        plan=functools.partial(_plan, asked),
    )


LORA_PARTS = _study(
    _LORA, "lora-parts", "LoRA in few steps: what costs RING the lead", "MiniLM-L6, LoRA r 8"
)
SCRATCH_RATES = _study(
    _SCRATCH, "scratch-rates", "Fresh weights: how far embeddings move", "MiniLM-L6"
)
