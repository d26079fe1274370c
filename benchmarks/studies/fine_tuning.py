# SPDX-License-Identifier: Apache-2.0
"""How much of a pretrained model is trained: LoRA of three ranks, all of it, or the same from fresh weights.

AdamW has a rate for each of these: the best of three on held-out samples, with a seed that the study does
not use and without the test set. RING has its defaults everywhere. A study that is gone on with chooses
again, and finds the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from grng.compare.config import CompareConfig
from grng.compare.errors import UsageError
from grng.compare.memory import state_bytes
from grng.compare.records import EpochRecord
from grng.studies.records import Panel, Value
from grng.tasks import ClassificationData
from studies.definition import Definition, Measured, Options, Planned
from studies.failures import is_divergence
from studies.sweep import at_end
from studies.training import about, data_of, settings, train

_LORA_RATES = ("1e-3", "3e-3", "1e-2")
_WHOLE_RATES = ("1e-4", "3e-4", "1e-3")
_TUNING_SEED = 10
# In a quick run, of the held-out and of the test samples.
_QUICK_SAMPLES = 8


class _Kind(NamedTuple):
    model: str
    lora_rank: int | None
    rates: tuple[str, ...]


KINDS = {
    "r 1": _Kind("minilm", 1, _LORA_RATES),
    "r 4": _Kind("minilm", 4, _LORA_RATES),
    "r 16": _Kind("minilm", 16, _LORA_RATES),
    "full": _Kind("minilm-full", None, _WHOLE_RATES),
    "scratch": _Kind("minilm-scratch", None, _WHOLE_RATES),
}


class Tuned(NamedTuple):
    """A rate, and the held-out accuracy of each, in %; None where it diverged."""

    rate: str
    accuracies: dict[str, Value]


def _kinds(options: Options) -> tuple[str, ...]:
    return ("r 1", "full") if options.is_quick else tuple(KINDS)


def _rates(name: str, options: Options) -> tuple[str, ...]:
    return KINDS[name].rates[-1:] if options.is_quick else KINDS[name].rates


def _config(name: str, options: Options) -> CompareConfig:
    kind = KINDS[name]
    config = settings(
        is_quick=options.is_quick,
        task="authors",
        model=kind.model,
        lora_rank=kind.lora_rank,
        batch_size=16,
        steps=120,
        checkpoints=1,
    )
    return replace(config, steps=1, batch_size=4) if options.is_quick else config


def _data(config: CompareConfig, options: Options) -> ClassificationData:
    data = data_of(config, options.data_dir)
    if not options.is_quick or data.validation is None:
        return data
    few = slice(_QUICK_SAMPLES)
    return replace(
        data,
        test_inputs=data.test_inputs[few],
        test_labels=data.test_labels[few],
        validation_inputs=data.validation[0][few],
        validation_labels=data.validation[1][few],
    )


def _score(end: EpochRecord) -> tuple[float, float]:
    """Higher is better; of equal accuracies the smaller loss."""
    loss = math.inf if end.validation_loss is None else end.validation_loss
    return end.validation_accuracy or 0.0, -loss


@functools.cache
def tuned(name: str, options: Options) -> Tuned:
    """AdamW's rate for a kind.

    Args:
        name: Of the kind.
        options: Of the study.

    Returns:
        The rate that is best on held-out samples after a run of full length.

    Raises:
        ArithmeticError: All rates diverge.
        RuntimeError: The data is missing, or memory ran out.
    """
    config = _config(name, options)
    data = _data(config, options)
    # Nothing can be chosen by what is not there.
    unseen = replace(data, test_inputs=data.test_inputs[:0], test_labels=data.test_labels[:0])
    scores: dict[str, tuple[float, float]] = {}
    rates = _rates(name, options)
    for rate in rates:
        try:
            found = train(f"adamw:lr={rate}", config, _TUNING_SEED, unseen)
        except (ArithmeticError, RuntimeError) as error:
            if not is_divergence(error):
                raise
            continue
        scores[rate] = _score(found.record.epochs[-1])
    if not scores:
        raise ArithmeticError(f"AdamW diverged at {', '.join(rates)}")
    accuracies: dict[str, Value] = {
        rate: 100 * scores[rate][0] if rate in scores else None for rate in rates
    }
    return Tuned(max(scores, key=lambda rate: scores[rate]), accuracies)


def _run(series: str, name: str, options: Options, seed: int) -> Measured:
    config = _config(name, options)
    data = _data(config, options)
    label, more = series, dict[str, Value]()
    if series == "adamw":
        chosen = tuned(name, options)
        label = f"adamw:lr={chosen.rate}"
        more = {f"tuning_{rate}": found for rate, found in chosen.accuracies.items()}
        more["lr"] = float(chosen.rate)
    found = train(label, config, seed, data)
    values = {"kind": name, **at_end(found), "state_bytes": state_bytes(found.optimizer), **more}
    return Measured([values], found.record.train_seconds)


def _plan(options: Options) -> Iterator[Planned]:
    if _TUNING_SEED in options.seeds:
        raise UsageError(f"--seeds must not have {_TUNING_SEED}: AdamW's rates are chosen with it")
    for seed in options.seeds:
        for name in _kinds(options):
            for series in ("ring", "adamw"):
                yield Planned(
                    series, name, seed, functools.partial(_run, series, name, options, seed)
                )


def _about(options: Options) -> dict[str, Any]:
    kinds = {}
    for name in _kinds(options):
        config = _config(name, options)
        kinds[name] = {**about(config), "adamw_rates": list(_rates(name, options))}
    return {"kinds": kinds, "tuning_seed": _TUNING_SEED}


_KIND = dict(x="kind", x_label="what is trained", x_scale="category")
STUDY = Definition(
    name="fine-tuning",
    title="Fine-tuning: LoRA, all weights, or fresh ones",
    subtitle="MiniLM-L6, Shakespeare or Milton, 120 steps of 16; AdamW at the best of 3 rates on held-out "
    "samples, another seed  ·  mean and range of the seeds",
    panels=(
        Panel(y="test_accuracy", title="Test accuracy", y_label="in %", **_KIND),
        Panel(
            y="train_loss",
            title="Loss of the last 12 steps",
            y_label="cross entropy",
            y_scale="log",
            **_KIND,
        ),
        Panel(
            y="state_bytes",
            title="State of the optimizer",
            y_label="bytes",
            y_scale="log",
            **_KIND,
        ),
    ),
    config=_about,
    plan=_plan,
)
