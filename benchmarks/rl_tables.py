# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of the studies in reinforcement learning, as Markdown, from their results.

``python benchmarks/rl_tables.py [FOLDER ...]``, by default every ``benchmarks/results/rl-*`` that is no
tuning.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grng.rl.compare.results import Figure, RLResult, Row, load

RESULTS = Path(__file__).parent / "results"
# What each method is, for a reader of the table.
NAMES = {
    "rank1": "`RankOneNPG`",
    "rmsprop": "RMSprop, same trainer",
    "adamw": "AdamW, same trainer",
    "a2c": "A2C, Stable-Baselines3",
    "ppo": "PPO, Stable-Baselines3",
    "trpo": "TRPO, sb3-contrib",
}


def folders() -> list[Path]:
    """Return the folders of the final runs that were kept."""
    found = (path for path in RESULTS.glob("rl-*") if not path.name.endswith("-tuning"))
    return sorted(found)


def table(result: RLResult) -> str:
    """Return the table of one comparison, without a line break at its end."""
    rows, solved = result.rows(), result.config["solved"]
    head = ["method", "settings", "last 100 episodes", "mean of the curve", "evaluated"]
    head += [] if solved is None else [f"solved ({solved:g})", "steps to it (median)"]
    lines = [_line(head), _line(["---"] * len(head))]
    best = [max(values, default=None) for values in zip(*map(_means, rows), strict=True)]
    if len(rows) == 1:
        # There is nothing that it would be better than.
        best = [None] * len(best)
    for row in rows:
        name, _, settings = row.method.partition(":")
        cells = [NAMES[name], f"`{settings}`" if settings else "defaults"]
        figures = (row.final_return, row.mean_return, row.evaluated_return)
        cells += [_text(figure, top) for figure, top in zip(figures, best, strict=True)]
        if solved is not None:
            steps = "-" if row.solved_at is None else f"{row.solved_at:,}"
            cells += [f"{row.solved} of {row.runs}", steps]
        lines.append(_line(cells))
    return "\n".join(lines)


def _means(row: Row) -> list[float]:
    figures = (row.final_return, row.mean_return, row.evaluated_return)
    return [float("-inf") if figure is None else figure.mean for figure in figures]


def _text(figure: Figure | None, best: float | None) -> str:
    if figure is None:
        return "-"
    spread = "" if figure.deviation is None else f" ± {figure.deviation:.1f}"
    text = f"{figure.mean:.1f}{spread}"
    return f"**{text}**" if figure.mean == best else text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the tables; return the exit code."""
    for folder in map(Path, sys.argv[1:]) if sys.argv[1:] else folders():
        result = load(folder)
        config = result.config
        print(f"{config['title']}, {config['steps']:,} steps, {len(config['seeds'])} seeds\n")
        print(table(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
