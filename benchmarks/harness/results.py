# SPDX-License-Identifier: Apache-2.0
"""Result files: one JSON per operation and machine, replaced whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.files import write_json
from harness.row import Ceilings, Row

SCHEMA = 1


def write(
    folder: Path,
    op: str,
    environment: dict[str, Any],
    ceilings: Ceilings,
    rows: Sequence[Row],
    *,
    quick: bool,
) -> Path:
    """Write ``folder/<op>.json``.

    Args:
        folder: Of the machine; made if missing.
        op: Operation.
        environment: See ``environment.describe``.
        ceilings: Of the same run.
        rows: All rows.
        quick: Marks a smoke run, whose numbers mean nothing.

    Returns:
        The file.
    """
    path = folder / f"{op}.json"
    content = {
        "schema": SCHEMA,
        "op": op,
        "quick": quick,
        "environment": environment,
        "ceilings": dataclasses.asdict(ceilings),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(path, content)
    return path


def read(path: Path) -> dict[str, Any]:
    """Return a result file as written.

    Raises:
        ValueError: Another schema than this code knows.
    """
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: schema must be {SCHEMA}, got {content.get('schema')}")
    return content
