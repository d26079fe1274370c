# SPDX-License-Identifier: Apache-2.0
"""What each part of RING is worth: the Fisher that is estimated, momentum, and how far a step goes."""

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

# By the name on the axis.
FISHERS = {
    "sampled": "ring",
    "exact": "ring:fisher=exact",
    "empirical": "ring:fisher=empirical",
}
# What the paper's text leaves out: momentum, a limit of the step, decoupled decay; one rate for each length.
_PAPER = "ring:step_length=kl_clip:kl_clip=None:max_kl=None:betas=(0.0,0.999):weight_decay=0.0"
PARTS = {
    "defaults": "ring",
    "no momentum": "ring:betas=(0.0,0.999)",
    "no trust region": "ring:max_kl=None",
    "KL clip": "ring:step_length=kl_clip:lr=0.03",
    "KL clip,\nno momentum": "ring:step_length=kl_clip:lr=0.03:betas=(0.0,0.999)",
    "paper,\nlr 1e-3": f"{_PAPER}:lr=1e-3",
    "paper,\nlr 1e-2": f"{_PAPER}:lr=1e-2",
    "paper,\nlr 0.1": f"{_PAPER}:lr=0.1",
}
MODELS = {
    "mlp": dict(batch_size=256, steps=430),
    "vit": dict(batch_size=64, steps=200),
}


def _config(model: str, options: Options) -> CompareConfig:
    own = MODELS[model]
    return fashion_mnist(model, own["batch_size"], own["steps"], is_quick=options.is_quick)


def _plan(kinds: dict[str, str], options: Options) -> Iterator[Planned]:
    # A quick form has no time for a second model.
    models = ["mlp"] if options.is_quick else list(MODELS)
    for model in models:
        variants = [
            Variant(f"ring:{model}", name.replace("\n", " "), optimizer, at(kind=name))
            for name, optimizer in kinds.items()
        ]
        yield from sweep.plan(variants, _config(model, options), options)


def _about(kinds: dict[str, str], options: Options) -> dict[str, Any]:
    return {
        "models": {model: about(_config(model, options)) for model in MODELS},
        "kinds": {name.replace("\n", " "): optimizer for name, optimizer in kinds.items()},
    }


_X = dict(x="kind", x_label="", x_scale="category")
_QUALITY = (
    Panel(y="test_accuracy", title="Test accuracy", y_label="in %", **_X),
    Panel(y="train_loss", title="Training loss", y_label="cross entropy", y_scale="log", **_X),
)
_SUBTITLE = (
    "Fashion-MNIST: MLP, 430 steps of 256; ViT, 200 steps of 64  ·  mean and range of the seeds"
)

FISHER = Definition(
    name="fisher",
    title="Which Fisher: labels sampled from the model, all of them, or those of the data",
    subtitle=_SUBTITLE,
    panels=(*_QUALITY, Panel(y="ms_per_step", title="Time of a step", y_label="ms", **_X)),
    config=functools.partial(_about, FISHERS),
    plan=functools.partial(_plan, FISHERS),
)
PAPER_MODE = Definition(
    name="paper-mode",
    title="Without momentum, without a limit of the step",
    subtitle=_SUBTITLE,
    panels=_QUALITY,
    config=functools.partial(_about, PARTS),
    plan=functools.partial(_plan, PARTS),
)
