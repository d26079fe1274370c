# SPDX-License-Identifier: Apache-2.0
"""The figure of a comparison: return against steps, mean and range over the seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from grng.compare.plot_style import RC, assign_styles, spread_labels
from grng.rl.compare.results import RLResult
from grng.tasks.atomic import replacing

FILE_NAME = "return.png"
_DOTS_PER_INCH = 150
_WIDTH, _HEIGHT = 9.5, 5.2
# Inches that one label of a curve needs, of the figure's height and of its width.
_LABEL_HEIGHT, _LETTER_WIDTH = 0.24, 0.085
# Of the height, what titles and the axis below take; of the width, what a short label needs.
_OTHER_HEIGHT, _SHORT = 1.0, 24


def draw(result: RLResult) -> Figure:
    """Return the figure, without any window."""
    config = result.config
    labels = [method["label"] for method in config["methods"]]
    styles = assign_styles(labels)
    with rc_context(RC):
        # Many methods with long names: the curves keep their room.
        height = max(_HEIGHT, _LABEL_HEIGHT * len(labels) + _OTHER_HEIGHT)
        longest = max(map(len, labels), default=0)
        width = _WIDTH + _LETTER_WIDTH * max(0, longest - _SHORT)
        gap = _LABEL_HEIGHT / (height - _OTHER_HEIGHT)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        ends: list[tuple[str, float]] = []
        for label in labels:
            runs = [r for r in result.runs if r.method == label and r.curve_return]
            if not runs:
                continue
            length = min(len(r.curve_return) for r in runs)
            x = np.array(runs[0].curve_steps[:length])
            values = np.array([r.curve_return[:length] for r in runs], dtype=float)
            # Before the first episode ended there is no return.
            known = ~np.isnan(values).any(0)
            if not known.any():
                continue
            x, values = x[known], values[:, known]
            style = styles[label]
            mean = values.mean(0)
            axes.plot(x, mean, color=style.color, linestyle=style.dash, linewidth=2)
            axes.fill_between(
                x, values.min(0), values.max(0), color=style.color, alpha=0.13, linewidth=0
            )
            ends.append((label, float(mean[-1])))
        if config["solved"] is not None:
            axes.axhline(config["solved"], color="#555555", linestyle=(0, (5, 3)), linewidth=1.1)
        low, high = axes.get_ylim()
        wanted = [(value - low) / (high - low) for _, value in ends]
        heights = _apart(spread_labels(wanted, gap), gap)
        for (label, _), height in zip(ends, heights, strict=True):
            axes.annotate(
                label,
                (1.01, height),
                xycoords="axes fraction",
                color=styles[label].color,
                fontweight="bold",
                fontsize=9.5,
                va="center",
            )
        axes.set_xlabel("environment steps")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlim(left=0, right=config["steps"])
        axes.set_ylabel("mean return of the last 100 episodes of training")
        seeds = config["seeds"]
        repeats = f"{len(seeds)} seeds: mean and range" if len(seeds) > 1 else f"seed {seeds[0]}"
        hidden = "-".join(map(str, config["hidden"]))
        sides = {method["settings"].get("environments", 8) for method in config["methods"]}
        beside = f"{sides.pop()} environments side by side  ·  " if len(sides) == 1 else ""
        axes.set_title(f"{config['title']}: return by optimizer\n", loc="left")
        axes.annotate(
            f"tanh networks of {hidden} for all  ·  {beside}{repeats}",
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 7),
            textcoords="offset points",
            fontsize=9.5,
            color="#555555",
        )
    return figure


def _apart(heights: list[float], gap: float) -> list[float]:
    """Labels that are apart, moved no further than it takes to stand beside the axes, from 0 to 1."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for bound, along, choose in ((1.0, order[::-1], min), (0.0, order, max)):
        step = -gap if choose is min else gap
        for index in along:
            placed[index] = choose(placed[index], bound)
            bound = placed[index] + step
    return placed


def save_figure(result: RLResult, folder: Path) -> Path:
    """Draw the figure into an existing folder; return its path."""
    with replacing(folder / FILE_NAME) as partial:
        draw(result).savefig(partial, dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return folder / FILE_NAME
