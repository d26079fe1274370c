# SPDX-License-Identifier: Apache-2.0
"""Training labels of which a part is wrong: what is learned of the right ones, and for how long.

Who learns faster also learns wrong labels by heart sooner. So each optimizer is trained for several numbers
of steps, each with its whole schedule: they are compared where they know the right labels equally well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grng.compare.config import CompareConfig
from grng.studies.records import Panel, Value
from grng.tasks import ClassificationData
from studies.definition import Definition, Measured, Options, Planned
from studies.training import about, data_of, fashion_mnist, train

# AdamW's rate is the better of 1e-3 and 3e-3 without wrong labels.
OPTIMIZERS = {"adamw": "adamw:lr=3e-3", "ring": "ring", "reng": "reng"}
# In %.
PARTS = (0, 20, 40, 60)
STEPS = (50, 100, 200, 400, 800)
_CLASSES = 10
# Of the labels that are wrong, which must not change with the seed of the weights.
_SEED = 2000


def _config(steps: int, options: Options) -> CompareConfig:
    return fashion_mnist("mlp", 128, steps, is_quick=options.is_quick, train_limit=10_000)


def corrupted(labels: Tensor, percent: int, seed: int) -> Tensor:
    """Labels of which a part is another class, each of the others as likely.

    Args:
        labels: ``[n]`` int64, of ten classes.
        percent: How many are wrong, on average.
        seed: Which ones.

    Returns:
        ``[n]``.
    """
    generator = torch.Generator().manual_seed(_SEED + seed)
    is_wrong = torch.rand(len(labels), generator=generator) < percent / 100
    other = torch.randint(1, _CLASSES, labels.shape, generator=generator)
    return torch.where(is_wrong, (labels + other) % _CLASSES, labels)


def _noisy(data: ClassificationData, percent: int, seed: int) -> ClassificationData:
    assert data.validation_labels is not None, "the settings ask for validation samples"
    return replace(
        data,
        train_labels=corrupted(data.train_labels, percent, seed),
        # Who has wrong labels to learn from has no others to choose by.
        validation_labels=corrupted(data.validation_labels, percent, seed + 1000),
    )


def _run(
    optimizer: str, percent: int, config: CompareConfig, options: Options, seed: int
) -> Measured:
    data = data_of(config, options.data_dir, is_quick=options.is_quick)
    found = train(optimizer, config, seed, _noisy(data, percent, seed))
    end = found.record.epochs[-1]
    assert end.test_accuracy is not None, "it is measured at the end"
    point: dict[str, Value] = {
        "steps": config.steps,
        f"accuracy_{percent}": 100 * end.test_accuracy,
        "validation_accuracy": 100 * end.held_out_accuracy,
        "train_loss": end.train_loss,
    }
    return Measured([point], found.record.train_seconds)


def _plan(options: Options) -> Iterator[Planned]:
    counts = STEPS[-1:] if options.is_quick else STEPS
    for seed in options.seeds:
        for series, optimizer in OPTIMIZERS.items():
            for percent in PARTS:
                for steps in counts:
                    config = _config(steps, options)
                    run = functools.partial(_run, optimizer, percent, config, options, seed)
                    yield Planned(series, f"wrong={percent} steps={steps}", seed, run)


def _about(options: Options) -> dict[str, Any]:
    return {
        **about(_config(STEPS[-1], options)),
        "steps": list(STEPS),
        "optimizers": OPTIMIZERS,
        "wrong_percent": list(PARTS),
    }


STUDY = Definition(
    name="label-noise",
    title="Wrong training labels: test accuracy by the length of training",
    subtitle="MLP 784-256-256-10, 10,000 samples of Fashion-MNIST, batch 128  ·  each point a whole schedule",
    panels=tuple(
        Panel(
            "steps",
            f"accuracy_{percent}",
            f"{percent} % of the training labels wrong",
            "steps",
            "test accuracy in %",
            x_scale="log",
        )
        for percent in PARTS
    ),
    config=_about,
    plan=_plan,
)
