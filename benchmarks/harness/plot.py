# SPDX-License-Identifier: Apache-2.0
"""One picture per operation: measured time against the least time the machine allows, log-log."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

# Okabe and Ito, "Color Universal Design" (2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^", "float64": "D"}


def check_errors(rows: list[dict[str, Any]]) -> None:
    """Refuse rows whose speed cannot be judged.

    Args:
        rows: As in a result file.

    Raises:
        ValueError: A ratio stands without both errors, ours and the rival's.
    """
    for row in rows:
        if row.get("ratio") is None:
            continue
        missing = [name for name in ("error", "rival_error") if row.get(name) is None]
        if missing:
            where = f"{row.get('op')} {row.get('shape')}"
            raise ValueError(f"{where}: a ratio without {' and '.join(missing)} is not plotted")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw a result file.

    Args:
        results: As read from the file.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: A ratio stands without its errors, or nothing was timed.
    """
    rows = results["rows"]
    check_errors(rows)
    timed = [row for row in rows if row["p50_ms"] is not None]
    if not timed:
        raise ValueError(f"{results['op']}: no row has a time")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["state"], row["mode"]) for row in timed))
    figure, axes = plt.subplots(
        2,
        len(panels),
        figsize=(5.6 * len(panels), 8),
        squeeze=False,
        height_ratios=(3, 2),
        sharex=True,
    )
    providers = dict.fromkeys(row["provider"] for row in timed)
    colors = dict(zip(providers, itertools.cycle(COLORS), strict=False))
    for column, panel in enumerate(panels):
        chosen = [row for row in timed if (row["state"], row["mode"]) == panel]
        _times(axes[0][column], chosen, colors)
        _ratios(axes[1][column], chosen, colors)
        axes[0][column].set_title(f"{results['op']}: {panel[0]}, {panel[1]}")
    axes[0][0].set_ylabel("measured, ms (p20-p80)")
    axes[1][0].set_ylabel("rival's time / ours")
    axes[0][0].legend(frameon=False, fontsize=8)
    environment = results["environment"]
    machine = (environment["gpu"] or {}).get("name") or environment["cpu"]["model"]
    label = f"{machine}, torch {environment['versions']['torch']}"
    figure.suptitle(label + (", SMOKE RUN" if results["quick"] else ""), fontsize=9)
    figure.tight_layout()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    partial.replace(path)


def _times(axis: Any, rows: list[dict[str, Any]], colors: dict[str, str]) -> None:
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider]
        for i, row in enumerate(mine):
            axis.errorbar(
                row["floor_ms"],
                row["p50_ms"],
                yerr=[[row["p50_ms"] - row["p20_ms"]], [row["p80_ms"] - row["p50_ms"]]],
                fmt=MARKERS.get(row["dtype"], "x"),
                color=colors[provider],
                markersize=5,
                label=provider if i == 0 else None,
            )
    floors = sorted(row["floor_ms"] for row in rows)
    ends = [floors[0] / 1.5, floors[-1] * 1.5]
    axis.plot(ends, ends, "--", color="#444444", label="roofline of this machine")
    axis.set(xscale="log", yscale="log")
    axis.grid(color="#E4E4E4")


def _ratios(axis: Any, rows: list[dict[str, Any]], colors: dict[str, str]) -> None:
    for row in rows:
        if row["ratio"] is None or row["role"] != "ours":
            continue
        axis.plot(
            row["floor_ms"],
            row["ratio"],
            MARKERS.get(row["dtype"], "x"),
            color=colors[row["provider"]],
        )
        axis.annotate(
            f"{row['shape']}\n{float(row['error']):.0e} / {float(row['rival_error']):.0e}",
            (row["floor_ms"], row["ratio"]),
            fontsize=5,
            xytext=(3, 3),
            textcoords="offset points",
        )
    axis.axhline(1, color="#444444", linestyle="--")
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel(
        "least time at this machine's copy bandwidth and matrix rate, ms\n(labels: error / rival's)"
    )
    axis.grid(color="#E4E4E4")
