# SPDX-License-Identifier: Apache-2.0
"""How means and tables are written in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def text(found: Sequence[float], decimals: int, *, is_bold: bool = False) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {statistics.stdev(found):.{decimals}f}" if len(found) > 1 else ""
    written = f"{statistics.fmean(found):.{decimals}f}{spread}"
    return f"**{written}**" if is_bold else written


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, with a line break at its end."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def cells_of(table: str) -> list[list[str]]:
    """The rows below the head of a table that :func:`markdown` wrote."""
    lines = table.strip().split("\n")[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
