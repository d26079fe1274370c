# SPDX-License-Identifier: Apache-2.0
"""``result.json``: the content, written whole or not at all, and read back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from grng.compare.errors import UsageError
from grng.compare.measures import ACCURACY, MEASURES, Measure
from grng.compare.records import FINISHED, RUNNING, RunRecord
from grng.compare.saved import check
from grng.compare.schema import Schema
from grng.compare.summary import DEFAULT_REFERENCE, Summary, summarise

FILE_NAME = "result.json"
SCHEMA = Schema("grng-compare", 1, FILE_NAME)


@dataclass
class ComparisonResult:
    """Everything that is known about one comparison."""

    command: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    created_utc: str
    status: str = RUNNING
    runs: list[RunRecord] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Labels of the optimizers in the order given."""
        return [optimizer["label"] for optimizer in self.config["optimizers"]]

    @property
    def is_stream(self) -> bool:
        """Whether samples came one by one, each predicted before it was learned from."""
        return self.config.get("stream") is not None

    @property
    def counts_steps(self) -> bool:
        """Whether the length of the runs was given in steps, not in epochs."""
        return self.config.get("steps") is not None

    # Results of before there was a choice have none of the keys below.

    @property
    def measure(self) -> Measure:
        """The figure on held-out data that the optimizers are compared by."""
        return MEASURES[self.config.get("measure", ACCURACY.name)]

    @property
    def reference(self) -> str:
        """The optimizer whose final values are to be reached."""
        return self.config.get("reference", DEFAULT_REFERENCE)

    @property
    def unit(self) -> str:
        """What losses and accuracies are means over: samples or characters."""
        return self.config.get("unit", "sample")

    @property
    def loss_name(self) -> str:
        """What the losses are."""
        is_number = self.config.get("likelihood") == "gaussian"
        return "half squared error" if is_number else "cross entropy"

    def summary(self) -> Summary:
        """The rows of the table."""
        return summarise(
            self.labels,
            self.runs,
            seeds=len(self.config["seeds"]),
            measure=self.measure,
            reference=self.reference,
        )

    def save(self, folder: Path) -> Path:
        """Writes ``result.json``; a reader sees the old file or the new one, never a part.

        Args:
            folder: An existing folder.

        Returns:
            The path of the file.
        """
        content = {
            "created_utc": self.created_utc,
            "status": self.status,
            "command": self.command,
            "config": self.config,
            "environment": self.environment,
            "data": self.data,
            "summary": asdict(self.summary()),
            "runs": [run.to_json() for run in self.runs],
        }
        return SCHEMA.write(folder, content)


def utc_now() -> str:
    """The time as ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def create_folder(root: Path, task: str) -> tuple[Path, str]:
    """A new folder ``<task>-<UTC time>`` below ``root``.

    Args:
        root: Made if missing.
        task: Name of the task.

    Returns:
        The folder, and the time as ISO 8601.

    Raises:
        UsageError: The folder cannot be made.
    """
    now = datetime.now(timezone.utc)
    stem = f"{task}-{now:%Y%m%dT%H%M%SZ}"
    names = [stem, *(f"{stem}-{copy}" for copy in range(2, 1000))]
    for name in names:
        try:
            (root / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"--out {root}: {error.strerror}") from error
        return root / name, now.isoformat(timespec="seconds")
    raise UsageError(f"--out {root}: too many results named {stem}")


def load(path: Path) -> ComparisonResult:
    """Reads a saved result.

    Args:
        path: ``result.json`` or the folder that holds it.

    Returns:
        The result.

    Raises:
        UsageError: Not a result of this schema version.
    """
    file = SCHEMA.file(path)
    keys = ("command", "config", "environment", "data", "created_utc", "status")
    with SCHEMA.reading(file) as content:
        runs = [RunRecord.from_json(run) for run in content["runs"]]
        result = ComparisonResult(**{key: content[key] for key in keys}, runs=runs)
    check(file, result, ComparisonResult)
    check_labels(file, result.config, "optimizers")
    for number, run in enumerate(runs):
        if run.status == FINISHED and not run.epochs:
            raise UsageError(f"{file}: runs[{number}].epochs of a finished run must not be empty")
    return result


def check_labels(file: Path, config: dict[str, Any], key: str) -> None:
    """Refuse settings without seeds, or without what was compared.

    Raises:
        UsageError: Names file and key.
    """
    check(file, config.get("seeds"), list[int], "config.seeds")
    check(file, config.get(key), list[dict[str, Any]], f"config.{key}")
    for number, one in enumerate(config[key]):
        check(file, one.get("label"), str, f"config.{key}[{number}].label")
