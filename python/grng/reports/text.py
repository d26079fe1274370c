# SPDX-License-Identifier: Apache-2.0
"""Reports: plain text that rich, where it is used, draws as tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# What a terminal beside a browser still has.
WIDTH = 110
# Names are not shortened below this.
_SHORTEST_NAME = 24
_GAP = "  "


@dataclass(frozen=True)
class Grid:
    """A table whose first column holds names.

    Attributes:
        columns: Their headings.
        rows: Texts, one for each column.
        numbers: Which columns are aligned to the right.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()

    def fitted(self, width: int | None) -> list[tuple[str, ...]]:
        """Return the rows, with names shortened as far as the table is wider than ``width``."""
        if width is None:
            return list(self.rows)
        longest = self._widths(self.rows)
        others = sum(longest[1:]) + len(_GAP) * (len(longest) - 1)
        most = max(_SHORTEST_NAME, width - others)
        return [(shortened(row[0], most), *row[1:]) for row in self.rows]

    def lines(self, width: int | None) -> list[str]:
        """Return the table as lines of text."""
        rows = self.fitted(width)
        widths = self._widths(rows)
        return [
            _GAP.join(
                text.rjust(widths[i]) if i in self.numbers else text.ljust(widths[i])
                for i, text in enumerate(row)
            ).rstrip()
            for row in (self.columns, *rows)
        ]

    def _widths(self, rows: Sequence[tuple[str, ...]]) -> list[int]:
        return [max(map(len, column)) for column in zip(self.columns, *rows, strict=True)]


class Report(str):
    """Text to print; a rich console draws its tables instead.

    Attributes:
        parts: Tables, and the lines between them.
        width: For which names were shortened, or None.
    """

    parts: tuple[Grid | str, ...]
    width: int | None

    def __new__(cls, parts: Sequence[Grid | str], width: int | None = WIDTH) -> "Report":
        """Lay out the parts, tables within ``width`` columns as far as names can be shortened."""
        lines: list[str] = []
        for part in parts:
            lines += part.lines(width) if isinstance(part, Grid) else [part]
        report = super().__new__(cls, "\n".join(lines))
        report.parts, report.width = tuple(parts), width
        return report

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Copy and pickle by the parts."""
        return self.parts, self.width

    def __rich__(self) -> "_Drawing":
        """Return what a rich console draws: it would print a string as one."""
        return _Drawing(self.parts, self.width is not None)


class _Drawing:
    def __init__(self, parts: Sequence[Grid | str], shorten: bool) -> None:
        self._parts, self._shorten = parts, shorten

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        for part in self._parts:
            if isinstance(part, str):
                yield Text(part)
                continue
            table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0))
            for i, heading in enumerate(part.columns):
                side: Any = "right" if i in part.numbers else "left"
                table.add_column(
                    Text(heading, style="bold"),
                    justify=side,
                    style="" if i else "bold",
                    # Others are wrapped before names are cut.
                    no_wrap=i == 0,
                    overflow="fold" if i else "ellipsis",
                )
            width = options.max_width - len(_GAP) if self._shorten else None
            for row in part.fitted(width):
                table.add_row(*map(Text, row))
            yield table


def shortened(name: str, width: int) -> str:
    """Return a dotted name without parts in its middle where it is too long: layers differ at their ends."""
    parts = name.split(".")
    for first in range(2, len(parts)):
        if len(name) <= width:
            return name
        name = ".".join([parts[0], "…", *parts[first:]])
    return name if len(name) <= width else name[: max(0, width - 1)] + "…"


def shape_text(shape: Sequence[int]) -> str:
    """``8x64``."""
    return "x".join(map(str, shape)) or "scalar"


def bytes_text(count: int) -> str:
    """``12.3 kB``, in powers of ten."""
    return f"{count} B" if count < 1000 else f"{_scaled(count)}B"


def count_text(count: int) -> str:
    """``12.3 M``, in powers of ten."""
    return str(count) if count < 1000 else _scaled(count)


def _scaled(count: float) -> str:
    # What rounds to 1000.0 takes the next unit.
    power = next((k for k in (1, 2, 3) if count < 999.95 * 1000**k), 4)
    return f"{count / 1000**power:.1f} {'kMGT'[power - 1]}"
