# SPDX-License-Identifier: Apache-2.0
"""Training labels of which a part is wrong: what is learned of the right ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grng.compare.config import CompareConfig
from grng.studies.records import Panel
from grng.tasks import ClassificationData
from studies.definition import Definition, Measured, Options, Planned
from studies.training import about, data_of, settings, train

OPTIMIZERS = {
    "adamw": "adamw:lr=1e-3",
    "adamw:lr=3e-3": "adamw:lr=3e-3",
    "ring": "ring",
    "ring:weight_decay=0.1": "ring:weight_decay=0.1",
    "reng": "reng",
    "muon": "muon",
}
PARTS = (0.0, 0.2, 0.4, 0.6)
_CLASSES = 10
# Of the labels that are wrong, which must not change with the seed of the weights.
_SEED = 2000


def _config(options: Options) -> CompareConfig:
    return settings(
        is_quick=options.is_quick,
        task="fashion-mnist",
        model="mlp",
        batch_size=128,
        steps=800,
        train_limit=10_000,
        validation=5000,
        checkpoints=20,
    )


def corrupted(labels: Tensor, part: float, seed: int) -> Tensor:
    """Labels of which a part is another class, each of the others as likely."""
    generator = torch.Generator().manual_seed(_SEED + seed)
    is_wrong = torch.rand(len(labels), generator=generator) < part
    other = torch.randint(1, _CLASSES, labels.shape, generator=generator)
    return torch.where(is_wrong, (labels + other) % _CLASSES, labels)


def _noisy(data: ClassificationData, part: float, seed: int) -> ClassificationData:
    assert data.validation_labels is not None, "the settings ask for validation samples"
    return replace(
        data,
        train_labels=corrupted(data.train_labels, part, seed),
        # Who has wrong labels to learn from has no others to choose by.
        validation_labels=corrupted(data.validation_labels, part, seed + 1000),
    )


def _run(optimizer: str, part: float, options: Options, seed: int) -> Measured:
    config = _config(options)
    data = data_of(config, options.data_dir, is_quick=options.is_quick)
    found = train(optimizer, config, seed, _noisy(data, part, seed))
    epochs = found.record.epochs
    end = epochs[-1]
    assert end.test_accuracy is not None, "it is measured at the end"
    points = {
        "part": 100 * part,
        "test_accuracy": 100 * end.test_accuracy,
        "train_loss": end.train_loss,
        "validation_accuracy": 100 * end.held_out_accuracy,
        "best_validation_accuracy": 100 * max(epoch.held_out_accuracy for epoch in epochs),
    }
    return Measured([points], found.record.train_seconds)


def _plan(options: Options) -> Iterator[Planned]:
    parts = PARTS[1:2] if options.is_quick else PARTS
    for seed in options.seeds:
        for series, optimizer in OPTIMIZERS.items():
            for part in parts:
                run = functools.partial(_run, optimizer, part, options, seed)
                yield Planned(series, f"wrong={part}", seed, run)


def _about(options: Options) -> dict[str, Any]:
    return {**about(_config(options)), "optimizers": OPTIMIZERS, "parts": list(PARTS)}


_X = dict(x="part", x_label="training labels that are wrong, in %")
STUDY = Definition(
    name="label-noise",
    title="Wrong training labels",
    subtitle="MLP 784-256-256-10, 10,000 samples of Fashion-MNIST, 800 steps of 128 (10 passes)",
    panels=(
        Panel(y="test_accuracy", title="Test accuracy (right labels)", y_label="in %", **_X),
        Panel(y="train_loss", title="Training loss (wrong labels too)", y_label="nats", **_X),
    ),
    config=_about,
    plan=_plan,
)
