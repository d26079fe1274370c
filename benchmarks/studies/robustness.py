# SPDX-License-Identifier: Apache-2.0
"""Test images that are corrupted, moved or attacked, at equal accuracy on clean ones.

Each optimizer is trained for several numbers of steps, each with its whole schedule: so there are runs of
equal clean accuracy, and what a method gains or loses besides can be read off.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from grng.compare.config import CompareConfig
from grng.compare.evaluation import evaluate
from grng.studies.records import Panel, Value
from studies.definition import Definition, Measured, Options, Planned
from studies.perturbations import CORRUPTIONS, SHIFTS, STRENGTHS, attacked, perturbed
from studies.training import about, data_of, fashion_mnist, train

# AdamW with three rates, of which the best on held-out samples is chosen for each length; Muon as a search
# of ten trials found it for the MLP (``evidence.py mlp``); ours with their defaults.
OPTIMIZERS = {
    "ring": "ring",
    "reng": "reng",
    "adamw:lr=1e-3": "adamw:lr=1e-3",
    "adamw:lr=3e-3": "adamw:lr=3e-3",
    "adamw:lr=1e-2": "adamw:lr=1e-2",
    "muon": "muon:lr=0.00197:weight_decay=0.01",
}
MODELS = {
    "mlp": dict(batch_size=256, steps=(160, 320, 645, 1290)),
    "resnet": dict(batch_size=64, steps=(75, 150, 300)),
}
# Of a pixel's range.
ATTACK = 4 / 255
_PGD_STEPS = 10
_ROWS = 500
# Clean accuracy is of all test samples; the others of the first ones, and attacks of fewer still.
_SAMPLES, _ATTACKED = 2000, 1000


def _config(model: str, steps: int, options: Options) -> CompareConfig:
    return fashion_mnist(model, MODELS[model]["batch_size"], steps, is_quick=options.is_quick)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In %."""
    found = evaluate(model, images, labels, _ROWS).accuracy
    assert found is not None, "labels are classes"
    return 100 * found


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, samples: int, few: int
) -> dict[str, Value]:
    """Accuracy on clean, corrupted, moved and attacked images, in %.

    Args:
        model: The trained model.
        images: Test images ``[n, 784]``.
        labels: ``[n]``.
        samples: How many are corrupted.
        few: How many are attacked.

    Returns:
        By kind; ``corrupted`` and ``shifted`` are means over their kinds and strengths.
    """
    found: dict[str, Value] = {"clean": accuracy(model, images, labels)}
    some, their = images[:samples], labels[:samples]
    for group, kinds in (("corrupted", CORRUPTIONS), ("shifted", SHIFTS)):
        values = []
        for name in kinds:
            own = [accuracy(model, perturbed(some, name, s), their) for s in STRENGTHS]
            found[name] = statistics.fmean(own)
            values += own
        found[group] = statistics.fmean(values)
    model.eval()
    for name, steps in (("fgsm", 1), ("pgd", _PGD_STEPS)):
        hard = attacked(model, images[:few], labels[:few], ATTACK, steps)
        found[name] = accuracy(model, hard, labels[:few])
        model.eval()
    return found


def _run(optimizer: str, config: CompareConfig, options: Options, seed: int) -> Measured:
    data = data_of(config, options.data_dir, is_quick=options.is_quick)
    found = train(optimizer, config, seed, data)
    samples, few = (100, 50) if options.is_quick else (_SAMPLES, _ATTACKED)
    values = measure(found.model, data.test_inputs, data.test_labels, samples, few)
    point = {
        "steps": config.steps,
        "validation": 100 * found.record.epochs[-1].held_out_accuracy,
        **values,
    }
    return Measured([point], found.record.train_seconds)


def _plan(model: str, options: Options) -> Iterator[Planned]:
    counts = MODELS[model]["steps"]
    counts = counts[-1:] if options.is_quick else counts
    for seed in options.seeds:
        for series, optimizer in OPTIMIZERS.items():
            for steps in counts:
                config = _config(model, steps, options)
                run = functools.partial(_run, optimizer, config, options, seed)
                yield Planned(series, f"steps={steps}", seed, run)


def _about(model: str, options: Options) -> dict[str, Any]:
    config = about(_config(model, MODELS[model]["steps"][-1], options))
    return {
        **config,
        "steps": list(MODELS[model]["steps"]),
        "optimizers": OPTIMIZERS,
        "attack": ATTACK,
        "corrupted_samples": _SAMPLES,
        "attacked_samples": _ATTACKED,
    }


def _panel(key: str, title: str) -> Panel:
    return Panel("clean", key, title, "clean test accuracy in %", "accuracy in %")


def _study(model: str, subtitle: str) -> Definition:
    return Definition(
        name=f"robustness-{model}",
        title="Robustness at equal clean accuracy",
        subtitle=f"{subtitle}  ·  a point for each length of training, up and to the right is better",
        panels=(
            _panel("corrupted", "Noise, impulses, blur, contrast, patch"),
            _panel("shifted", "Moved and rotated"),
            _panel("fgsm", "FGSM, 4/255"),
            _panel("pgd", "PGD, 4/255, 10 steps"),
        ),
        config=functools.partial(_about, model),
        plan=functools.partial(_plan, model),
    )


MLP = _study("mlp", "MLP, Fashion-MNIST, 160 to 1,290 steps of 256")
RESNET = _study("resnet", "ResNet, Fashion-MNIST, 75 to 300 steps of 64")
