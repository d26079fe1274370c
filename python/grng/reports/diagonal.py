# SPDX-License-Identifier: Apache-2.0
"""``explain()`` of the optimizers with a number for each weight: the Kalman filters and Sophia."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from grng.reports.measures import Reader
from grng.reports.memory import bytes_of
from grng.reports.text import WIDTH, Grid, Report, bytes_text, shape_text

Numbers = Mapping[str, Tensor]


def explain(
    names: Mapping[nn.Parameter, str],
    states: Mapping[nn.Parameter, Mapping[str, Any]],
    columns: Sequence[str],
    numbers: Mapping[nn.Parameter, Numbers],
    unknown: Mapping[str, str],
    lines: Sequence[str],
    *,
    last: tuple[str, Mapping[nn.Parameter, str], str] | None = None,
) -> Report:
    """Return a table of parameters with some numbers of each, read with one wait.

    Args:
        names: Of the parameters.
        states: Of each parameter, in order: what it holds, or will hold.
        columns: Names of the numbers.
        numbers: Those of each parameter that has any, 0-d.
        unknown: What stands where there is none.
        lines: What follows the table.
        last: A further column: its heading, its texts, and what stands where there is none.
    """
    values = read(numbers)
    rows = []
    for p, state in states.items():
        found = values.get(p, {})
        row = [
            names.get(p, "a parameter"),
            shape_text(p.shape),
            bytes_text(bytes_of(state)),
            *(f"{found[c]:.3g}" if c in found else unknown[c] for c in columns),
        ]
        rows.append((*row, last[1].get(p, last[2])) if last is not None else tuple(row))
    headings = ("parameter", "shape", "state", *columns, *([last[0]] if last is not None else []))
    grid = Grid(headings, tuple(rows), frozenset(range(2, 3 + len(columns))))
    return Report([grid, "", *lines], width=WIDTH)


def read(numbers: Mapping[nn.Parameter, Numbers]) -> dict[nn.Parameter, dict[str, float]]:
    """Return numbers of parameters as such, after one wait."""
    reader = Reader()
    places = {p: {k: reader.add(t) for k, t in found.items()} for p, found in numbers.items()}
    values = reader.read()
    return {p: {k: values[place][0] for k, place in ks.items()} for p, ks in places.items()}
