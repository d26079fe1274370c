# SPDX-License-Identifier: Apache-2.0
"""Stacked bars: the parts of a step of each optimizer, one panel for each workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.plot import COLORS

from step_costs.clock import PARTS


def draw(rows: list[dict[str, Any]], titles: dict[str, str], path: Path) -> None:
    """Draw the rows that have ``units``.

    Args:
        rows: Of all workloads.
        titles: Of the workloads.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No row has ``units``.
    """
    rows = [row for row in rows if "units" in row]
    if not rows:
        raise ValueError("no row has the units of a base to be drawn in")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(row["workload"] for row in rows))
    most = max(sum(row["workload"] == name for row in rows) for name in panels)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, (0.32 * most + 0.9) * len(panels) + 0.6), squeeze=False
    )
    for axis, name in zip(axes[:, 0], panels, strict=True):
        chosen = [row for row in rows if row["workload"] == name][::-1]
        left = [0.0] * len(chosen)
        for part, color in zip(PARTS, COLORS, strict=False):
            widths = [row["units"][part] for row in chosen]
            axis.barh(range(len(chosen)), widths, left=left, color=color, label=part, height=0.72)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for i, (row, end) in enumerate(zip(chosen, left, strict=True)):
            axis.text(end, i, f" {row['step_per_adamw_step']:.2f}", va="center", fontsize=8)
        axis.set_yticks(range(len(chosen)), [row["optimizer"] for row in chosen], fontsize=8)
        axis.set_title(titles[name], fontsize=9, loc="left")
        axis.set_xlim(0, 1.08 * max(left))
        axis.grid(axis="x", color="#E4E4E4")
        axis.set_axisbelow(True)
    axes[-1, 0].set_xlabel(
        "time in units of AdamW's forward + backward (at the bar: whole step / AdamW's)"
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(PARTS), loc="upper center", frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    partial.replace(path)
