# SPDX-License-Identifier: Apache-2.0
"""Accuracies of the variants in one result of ``grng compare``, as dots with the spread over seeds.

For ablations, whose many curves nobody could tell apart: ``plot_variants.py result.json out.png``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.plot import COLORS

# Key in a row of the summary, and what the reader is told it is.
MEASURES = (
    ("online_accuracy", "online: predicted before learned from"),
    ("validation_accuracy", "held-out samples at the end"),
)


def variants(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the summary that have finished seeds, worst first by the first measure they have.

    Raises:
        ValueError: The result has none of the measures.
    """
    rows = [r for r in result["summary"]["rows"] if r["seeds_finished"]]
    key = next((k for k, _ in MEASURES if rows and rows[0][k] is not None), None)
    if key is None:
        raise ValueError("the result has neither online nor validation accuracies")
    return sorted(rows, key=lambda r: r[key])


def draw(result: dict[str, Any], out: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = variants(result)
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + 0.27 * len(rows)), layout="constrained")
    for (key, label), color, marker in zip(MEASURES, COLORS, "os", strict=False):
        found = [(i, r) for i, r in enumerate(rows) if r[key] is not None]
        if found:
            axes.errorbar(
                [100 * r[key] for _, r in found],
                [i for i, _ in found],
                xerr=[100 * (r[f"{key}_std"] or 0.0) for _, r in found],
                fmt=marker,
                color=color,
                markersize=5,
                capsize=2,
                label=label,
            )
    axes.set_yticks(range(len(rows)), [r["optimizer"] for r in rows])
    axes.set_xlabel("accuracy %, mean and standard deviation over the seeds")
    config = result["config"]
    axes.set_title(f"{config['task']}: {max(r['seeds_finished'] for r in rows)} seeds")
    axes.grid(axis="x", color="#E4E4E4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(MEASURES))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="result.json of grng compare")
    parser.add_argument("out", type=Path, help="picture to write")
    options = parser.parse_args(arguments)
    draw(json.loads(options.result.read_text(encoding="utf-8")), options.out)


if __name__ == "__main__":
    main()
