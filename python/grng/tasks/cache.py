# SPDX-License-Identifier: Apache-2.0
"""Where fetched files and prepared tensors are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(name: str) -> Path:
    """``$GRNG_DATA/NAME``, or ``~/.cache/grng/NAME``.

    Args:
        name: Name of the data set.

    Returns:
        The folder; it need not exist.
    """
    root = os.environ.get("GRNG_DATA")
    return (Path(root).expanduser() if root else Path.home() / ".cache/grng") / name
