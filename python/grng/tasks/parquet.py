# SPDX-License-Identifier: Apache-2.0
"""Rows of parquet files, read one after the other with the library ``datasets``."""

from __future__ import annotations

import glob
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grng.tasks.data import DataError


def count_rows(files: Sequence[Path], columns: Sequence[str]) -> int:
    """Rows of all files, from their last bytes alone.

    Args:
        files: The files.
        columns: What each must have.

    Returns:
        The number.

    Raises:
        DataError: A file is damaged, or lacks a column.
    """
    import pyarrow
    from pyarrow import parquet

    rows = 0
    for path in files:
        try:
            metadata = parquet.read_metadata(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(_damaged(path, error)) from None
        found = metadata.schema.to_arrow_schema().names
        for column in columns:
            if column not in found:
                raise DataError(f"{path}: lacks the column {column!r}; it has {', '.join(found)}")
        rows += metadata.num_rows
    return rows


def read_rows(
    files: Sequence[Path], columns: Sequence[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The rows, in their order; images as they are stored, ``{"bytes", "path"}``.

    Streamed: the library's other way writes a second copy of every image first.

    Args:
        files: The files.
        columns: What is wanted of them.

    Yields:
        ``(file, row)``.

    Raises:
        DataError: A file is damaged.
    """
    import datasets
    import pyarrow

    for path in files:
        try:
            with _silent(), tempfile.TemporaryDirectory(prefix="grng-datasets-") as scratch:
                rows = datasets.load_dataset(
                    "parquet",
                    data_files=[glob.escape(str(path))],
                    split="train",
                    streaming=True,
                    columns=list(columns),
                    cache_dir=scratch,  # for lock files alone
                )
                yield from ((path, row) for row in rows.decode(False))
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{path}: damaged: {reason}; delete the file to have it fetched again"


@contextmanager
def _silent() -> Iterator[None]:
    """Without the library's own lines about files that it cannot read: the error says it all."""
    logger = logging.getLogger("datasets")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
