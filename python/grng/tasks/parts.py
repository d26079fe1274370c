# SPDX-License-Identifier: Apache-2.0
"""Training and test part of a data set in parquet files, checked before anything is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grng.tasks import hub
from grng.tasks.data import DataError, LoadRequest
from grng.tasks.files import sha256_of
from grng.tasks.parquet import count_rows

TRAIN = "train"


@dataclass(frozen=True)
class Part:
    """Files of one part, their rows in all, and their SHA-256 by name."""

    name: str
    files: list[Path]
    rows: int
    checksums: dict[str, str]
    # Where what is made of them is kept.
    folder: Path

    def kept_in(self, recipe: str, suffix: str) -> Path:
        """File for what is made of them, named after what it is made of.

        Args:
            recipe: What it depends on besides these files.
            suffix: Of the file.

        Returns:
            Its path.
        """
        made_of = " ".join([*self.checksums.values(), recipe])
        digest = hashlib.sha256(made_of.encode()).hexdigest()
        return self.folder / f"{self.name}-{digest[:16]}{suffix}"


def find_parts(
    name: str,
    repository: hub.Repository,
    below: str,
    parts: Sequence[str],
    columns: Sequence[str],
    request: LoadRequest,
) -> tuple[dict[str, Part], str]:
    """The files of a data set, found or fetched.

    Args:
        name: Of the task, and of its folder.
        repository: Where the data set is on the hub.
        below: Folder of the files there.
        parts: Their names.
        columns: What each file must have.
        request: Says in which folder to look.

    Returns:
        ``(parts by name, where they are from)``.

    Raises:
        DataError: Files or libraries are missing or damaged, or no rows are in them.
    """
    hub.require_libraries()

    def look(folder: Path) -> dict[str, list[Path]]:
        return {part: hub.parquet_files(folder, part) for part in parts}

    patterns = [f"{below}/{part}-*.parquet" for part in parts]
    by_hand = f'--include "{below}/*"'
    found = hub.obtain(name, repository, patterns, by_hand, look, request.data_dir, request.report)
    known = {}
    for part, files in found.files.items():
        rows = count_rows(files, columns)
        if not rows:
            raise DataError(f"{files[0]}: has no rows")
        checksums = {path.name: sha256_of(path) for path in files}
        known[part] = Part(part, files, rows, checksums, found.folder)
    return known, found.source
