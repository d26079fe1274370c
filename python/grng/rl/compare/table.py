# SPDX-License-Identifier: Apache-2.0
"""The table of a comparison."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from grng.rl.compare.records import DIVERGED
from grng.rl.compare.results import Figure, RLResult


def _text(figure: Figure | None, digits: int = 1) -> str:
    if figure is None:
        return "-"
    spread = "" if figure.deviation is None else f" ± {figure.deviation:.{digits}f}"
    return f"{figure.mean:.{digits}f}{spread}"


def print_table(console: Console, result: RLResult) -> None:
    """Print a row for each method, and below the table what went wrong."""
    config = result.config
    solved = config["solved"]
    table = Table(
        title=f"{config['title']}: {config['steps']:,} steps, {len(config['seeds'])} seeds",
        box=box.ASCII2 if not console.is_terminal else box.HEAVY_HEAD,
        title_justify="left",
    )
    table.add_column("optimizer")
    for name in ("final return", "mean of curve", "evaluated"):
        table.add_column(name, justify="right")
    if solved is not None:
        table.add_column(f"solved ({solved:g})", justify="right")
        table.add_column("steps to it", justify="right")
    table.add_column("seconds", justify="right")
    seeds = len(config["seeds"])
    for row in result.rows():
        # As after an interruption: such a row is no match for the others.
        part = "" if row.runs == seeds else f" ({row.runs} of {seeds} seeds)"
        cells = [
            f"{row.method}{part}",
            _text(row.final_return),
            _text(row.mean_return),
            _text(row.evaluated_return),
        ]
        if solved is not None:
            steps = "-" if row.solved_at is None else f"{row.solved_at:,}"
            cells += [f"{row.solved} of {row.runs}", steps]
        table.add_row(*cells, _text(row.seconds))
    console.print(table)
    for run in result.runs:
        if run.status == DIVERGED:
            line = f"{run.method} seed {run.seed} failed: {run.problem}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
