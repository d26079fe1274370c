# SPDX-License-Identifier: Apache-2.0
"""Studies that train once for each setting, and look at the end of each run."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grng.compare.config import CompareConfig
from grng.studies.records import Value
from studies.definition import Measured, Options, Planned
from studies.training import Trained, data_of, train

# Part of the steps, at the end, whose mean loss is the final training loss.
_FINAL_PART = 0.1


@dataclass(frozen=True)
class Variant:
    """A setting of an optimizer.

    Attributes:
        series: What is drawn as one line.
        setting: What tells it from the others of the line; "" for the only one.
        optimizer: Written as ``--optimizers`` takes it.
        places: What the panels have on their x-axes; several where what is varied has no part in it.
    """

    series: str
    setting: str
    optimizer: str
    places: tuple[dict[str, Value], ...]


def at(**place: Value) -> tuple[dict[str, Value], ...]:
    """One place."""
    return (place,)


def at_end(found: Trained) -> dict[str, Value]:
    """What is measured at the end of a run: accuracies in %, losses, milliseconds of a step."""
    record, end = found.record, found.record.epochs[-1]
    last = max(1, round(_FINAL_PART * len(record.step_loss)))
    values: dict[str, Value] = {
        "test_accuracy": None if end.test_accuracy is None else 100 * end.test_accuracy,
        "test_loss": end.test_loss,
        "train_loss": statistics.fmean(record.step_loss[-last:]),
        "ms_per_step": found.ms_per_step,
    }
    if end.validation_accuracy is not None:
        values["validation_accuracy"] = 100 * end.validation_accuracy
    return values


def _run(variant: Variant, config: CompareConfig, options: Options, seed: int) -> Measured:
    found = train(
        variant.optimizer,
        config,
        seed,
        data_of(config, options.data_dir, is_quick=options.is_quick),
    )
    values = at_end(found)
    return Measured([{**place, **values} for place in variant.places], found.record.train_seconds)


def plan(variants: Sequence[Variant], config: CompareConfig, options: Options) -> Iterator[Planned]:
    """All variants with the first seed, then with the second: what disturbs times disturbs all of them."""
    for seed in options.seeds:
        for variant in variants:
            run = functools.partial(_run, variant, config, options, seed)
            yield Planned(variant.series, variant.setting, seed, run)
