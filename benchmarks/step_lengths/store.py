# SPDX-License-Identifier: Apache-2.0
"""One file for each model, with a line for each run; replaced whole after each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grng.tasks.atomic import replacing

SCHEMA, VERSION = "grng-step-length", 1


class Store:
    """Runs of one model."""

    def __init__(self, folder: Path, model: str) -> None:
        self.path = folder / f"{model}.json"

    def load(self) -> dict[str, Any]:
        """What there is; without runs if there is nothing.

        Raises:
            ValueError: The file holds something else.
        """
        if not self.path.exists():
            return {"schema": SCHEMA, "version": VERSION, "runs": []}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            known = (content["schema"], content["version"]) == (SCHEMA, VERSION)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{self.path}: must be a {SCHEMA} result of version {VERSION}")
        return content

    def has(self, rule: str, seed: int, steps: int | None, settings: dict[str, Any]) -> bool:
        """Whether this run is there, with these settings; one with others would be replaced."""
        wanted = json.loads(json.dumps(settings))
        return any(
            _key(r) == (rule, seed, steps) and r["settings"] == wanted for r in self.load()["runs"]
        )

    def add(self, about: dict[str, Any], run: dict[str, Any]) -> None:
        """Add a run, and what is known of all of them.

        The file is read again: two programs may share it, as long as they do not end a run at once.
        """
        runs = [r for r in self.load()["runs"] if _key(r) != _key(run)]
        lines = ",\n".join(json.dumps(r, allow_nan=False) for r in [*runs, run])
        head = json.dumps({"schema": SCHEMA, "version": VERSION, **about})[:-1]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            partial.write_text(f'{head},\n"runs": [\n{lines}\n]}}\n', encoding="utf-8")


def _key(run: dict[str, Any]) -> tuple[str, int, int | None]:
    return run["rule"], run["seed"], run["steps"]
