# SPDX-License-Identifier: Apache-2.0
"""``result.json`` of a comparison in reinforcement learning."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grng.compare.results import FILE_NAME, check_labels
from grng.compare.saved import check
from grng.compare.schema import Schema
from grng.rl.compare.records import FINISHED, RUNNING, RLRun

SCHEMA = Schema("grng-rl", 1, FILE_NAME)


@dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation over the seeds."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Row:
    """What a method came to; a figure is None where not every run has it."""

    method: str
    runs: int
    finished: int
    final_return: Figure | None
    mean_return: Figure | None
    evaluated_return: Figure | None
    solved: int
    # Upper median over all runs; one that was not solved counts as infinite.
    solved_at: int | None
    seconds: Figure | None


@dataclass
class RLResult:
    """Everything that is known about one comparison."""

    command: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]
    created_utc: str
    status: str = RUNNING
    runs: list[RLRun] = field(default_factory=list)

    def rows(self) -> list[Row]:
        """The rows of the table, in the order given."""
        return [self._row(method["label"]) for method in self.config["methods"]]

    def _row(self, label: str) -> Row:
        runs = [run for run in self.runs if run.method == label]
        finished = [run for run in runs if run.status == FINISHED]
        solved = sorted(run.solved_at for run in finished if run.solved_at is not None)
        middle = len(runs) // 2

        def figure(values: list[float | None]) -> Figure | None:
            known = [value for value in values if value is not None]
            if not known or len(known) < len(runs):
                return None
            deviation = statistics.stdev(known) if len(known) > 1 else None
            return Figure(statistics.fmean(known), deviation)

        return Row(
            method=label,
            runs=len(runs),
            finished=len(finished),
            final_return=figure([run.final_return for run in finished]),
            mean_return=figure([run.mean_return for run in finished]),
            evaluated_return=figure([run.evaluated_return for run in finished]),
            solved=len(solved),
            solved_at=solved[middle] if runs and middle < len(solved) else None,
            seconds=figure([run.seconds for run in finished]),
        )

    def save(self, folder: Path) -> Path:
        """Write ``result.json`` into an existing folder, whole or not at all; return its path."""
        content = {
            "created_utc": self.created_utc,
            "status": self.status,
            "command": self.command,
            "config": self.config,
            "environment": self.environment,
            "summary": [asdict(row) for row in self.rows()],
            "runs": [run.to_json() for run in self.runs],
        }
        return SCHEMA.write(folder, content)


def is_rl_result(path: Path) -> bool:
    """Return whether a file, or that in a folder, is a result of this kind."""
    try:
        content = json.loads(SCHEMA.file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    # Of another version it still is one, which load() refuses by name.
    return isinstance(content, dict) and content.get("schema") == SCHEMA.name


def load(path: Path) -> RLResult:
    """Return a saved result.

    Args:
        path: ``result.json`` or the folder that holds it.

    Raises:
        UsageError: Not a result of this schema version.
    """
    file = SCHEMA.file(path)
    with SCHEMA.reading(file) as content:
        keys = ("command", "config", "environment", "created_utc", "status")
        runs = [RLRun(**run) for run in content["runs"]]
        result = RLResult(**{key: content[key] for key in keys}, runs=runs)
    check(file, result, RLResult)
    check_labels(file, result.config, "methods")
    return result
