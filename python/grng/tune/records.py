# SPDX-License-Identifier: Apache-2.0
"""What is kept of a search; these dataclasses are the schema of ``tune.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grng.compare.errors import UsageError
from grng.compare.measures import MEASURES, Measure
from grng.compare.optimizers import OptionValue
from grng.compare.records import FINISHED, RUNNING, Divergence
from grng.compare.results import check_labels
from grng.compare.saved import check
from grng.compare.schema import Schema
from grng.tune.space import as_option

FILE_NAME = "tune.json"
SCHEMA = Schema("grng-tune", 1, FILE_NAME)


@dataclass
class Trial:
    """One setting, trained once.

    Attributes:
        number: From 0 on, in the order of the search.
        optimizer: The spec, as ``--optimizers`` takes it.
        options: What the search chose.
        status: ``"finished"`` or ``"diverged"``.
        values: On the validation samples, at each evaluation.
        steps: After which steps those were.
        seconds: Of all training steps.
        divergence: Where and why it stopped.
    """

    number: int
    optimizer: str
    options: dict[str, OptionValue]
    status: str
    values: list[float]
    steps: list[int]
    seconds: float
    divergence: Divergence | None = None

    @property
    def value(self) -> float | None:
        """On the validation samples at the end; None where it did not come there."""
        return self.values[-1] if self.status == FINISHED else None


@dataclass
class TuningResult:
    """Everything that is known about one search."""

    command: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    created_utc: str
    status: str = RUNNING
    trials: list[Trial] = field(default_factory=list)

    @property
    def measure(self) -> Measure:
        """What the settings are chosen by."""
        return MEASURES[self.config["measure"]]

    def score(self, trial: Trial) -> float:
        """A number that is higher for a better trial, and minus infinity for one that diverged."""
        return float("-inf") if trial.value is None else self.measure.score(trial.value)

    @property
    def best(self) -> Trial | None:
        """The best trial, the first of equals; None where none finished."""
        finished = [trial for trial in self.trials if trial.value is not None]
        return max(finished, key=self.score, default=None)

    def is_default(self, trial: Trial) -> bool:
        """Whether a trial is of the optimizer's own values; of a space without them, none is."""
        own = self.config["optimizers"][0]["hyperparameters"]
        return all(
            key in own and as_option(own[key]) == value for key, value in trial.options.items()
        )

    def save(self, folder: Path) -> Path:
        """Write ``tune.json``; a reader sees the old file or the new one, never a part."""
        best = self.best
        content = {
            **{name: getattr(self, name) for name in _HEAD},
            "best": None if best is None else {"optimizer": best.optimizer, "value": best.value},
            "trials": [asdict(trial) for trial in self.trials],
        }
        return SCHEMA.write(folder, content)


_HEAD = ("created_utc", "status", "command", "config", "environment", "data")


def is_tuning_result(path: Path) -> bool:
    """Whether a file, or the folder that should hold one, is the result of a search."""
    file = SCHEMA.file(path)
    return file.name == FILE_NAME and file.is_file()


def load(path: Path) -> TuningResult:
    """Read a saved search.

    Args:
        path: ``tune.json``, or the folder that holds it.

    Raises:
        UsageError: No result of this schema version.
    """
    file = SCHEMA.file(path)
    with SCHEMA.reading(file) as content:
        trials = [_trial(one) for one in content["trials"]]
        result = TuningResult(**{key: content[key] for key in _HEAD}, trials=trials)
    check(file, result, TuningResult)
    _check_config(file, result.config)
    for number, trial in enumerate(trials):
        if trial.status == FINISHED and not trial.values:
            raise UsageError(f"{file}: trials[{number}].values of a finished one must not be empty")
    return result


def _check_config(file: Path, config: dict[str, Any]) -> None:
    check_labels(file, config, "optimizers")
    for key, kind in (("optimizer", str), ("space", str), ("budget", int), ("measure", str)):
        check(file, config.get(key), kind, f"config.{key}")
    if config["measure"] not in MEASURES:
        raise UsageError(f"{file}: config.measure must be one of {', '.join(MEASURES)}")
    own = config["optimizers"][0] if config["optimizers"] else {}
    check(file, own.get("hyperparameters"), dict, "config.optimizers[0].hyperparameters")


def _trial(content: dict[str, Any]) -> Trial:
    known = {name: content[name] for name in (f.name for f in fields(Trial))}
    if known["divergence"] is not None:
        known["divergence"] = Divergence(**known["divergence"])
    known["options"] = {key: as_option(value) for key, value in known["options"].items()}
    return Trial(**known)
