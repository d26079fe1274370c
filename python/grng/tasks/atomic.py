# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced whole: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Files made by mkstemp are private; these are meant to be read by others too.
_MODE = 0o644


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``target`` when the block ends without an error.

    Args:
        target: File in an existing folder.

    Yields:
        Path of the temporary file, in the same folder and with the same suffix.
    """
    handle, name = tempfile.mkstemp(prefix=".", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(_MODE)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
