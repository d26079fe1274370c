# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced whole, and plain text tables; needs nothing but Python."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """Return ``value`` with what JSON lacks spelled out: an infinite error is a string."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file whole."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return columns of equal width, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def one(line: Sequence[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join(cells).rstrip()

    return "\n".join([one(header), "  ".join("-" * w for w in widths), *map(one, lines)])
