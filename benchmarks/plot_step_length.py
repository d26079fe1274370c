# SPDX-License-Identifier: Apache-2.0
"""Pictures and table of step_length.py: ``plot_step_length.py [folder]``, any time, also half-way.

Writes ``rules.png``, the rules side by side, ``rates.png``, accuracy against the learning rate, and
``table.md``, the numbers behind them, next to the results; prints the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from step_lengths import pictures, rows

OUT = Path(__file__).resolve().parent / "results" / "step-length"


def main(given: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=OUT, help="results to draw")
    folder: Path = parser.parse_args(given).folder
    try:
        models = rows.read(folder)
    except ValueError as error:
        parser.error(str(error))
    table = rows.table(models)
    print(table)
    (folder / "table.md").write_text(table, encoding="utf-8")
    for name, draw in (("rules.png", pictures.draw_rules), ("rates.png", pictures.draw_rates)):
        try:
            draw(models, folder / name)
        except ValueError as error:
            print(f"{name}: {error}")


if __name__ == "__main__":
    main()
