# SPDX-License-Identifier: Apache-2.0
"""Token ids with their labels, kept in one file that says whether it is whole."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grng.tasks.atomic import replacing


@dataclass(frozen=True)
class Prepared:
    """Token ids ``[n, tokens]`` and labels ``[n]``, classes or numbers."""

    token_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[Any]

    def sha256(self) -> str:
        """Checksum of both."""
        return hashlib.sha256(self.token_ids.tobytes() + self.labels.tobytes()).hexdigest()


def _read(path: Path) -> Prepared | None:
    """What was kept; None if there is nothing, or nothing whole."""
    try:
        with np.load(path, allow_pickle=False) as content:
            found = Prepared(content["token_ids"], content["labels"])
            checksum = str(content["sha256"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return found if checksum == found.sha256() else None


def read_or_prepare(
    path: Path, prepare: Callable[[], Prepared], report: Callable[[str], None]
) -> Prepared:
    """What is in a file; made and written into it where that is nothing whole.

    Args:
        path: The file, in an existing folder; its name says what it was made of.
        prepare: Makes the content.
        report: Receives a line if the file cannot be written.

    Returns:
        The content.
    """
    found = _read(path)
    if found is not None:
        return found
    made = prepare()
    try:
        with replacing(path) as partial, partial.open("wb") as stream:
            np.savez(stream, **vars(made), sha256=made.sha256())
    except OSError as error:
        report(f"{path.name}: token ids could not be kept: {error.strerror}")
    return made
