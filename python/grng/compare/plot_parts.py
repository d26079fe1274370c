# SPDX-License-Identifier: Apache-2.0
"""Parts that the figures of epochs and of streams share."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from grng.compare.curves import Curve
from grng.compare.measures import LOSS, Measure
from grng.compare.plot_series import Series
from grng.compare.plot_style import spread_labels
from grng.compare.results import ComparisonResult
from grng.tasks import TASKS

# Least distance between two labels, as a part of the height of the axes.
_LABEL_GAP = 0.06
# Least height of the axis below the best accuracy, in points, and above the best loss, as a part of it.
_LEAST_ROOM = 2.0
_LEAST_ROOM_OF_LOSS = 0.02


def draw_curve(axes: Axes, curve: Curve, axis: str, series: Series, *, has_markers: bool) -> None:
    """Mean and band of one optimizer; a cross where it broke off.

    Args:
        axes: Where to.
        curve: What.
        axis: ``"epochs"`` or ``"seconds"``.
        series: The optimizer.
        has_markers: Whether the points are few enough to be marked.
    """
    style = series.style
    x = curve.x(axis)
    axes.fill_between(x, curve.low, curve.high, color=style.color, alpha=0.15, linewidth=0)
    axes.plot(
        x,
        curve.mean,
        color=style.color,
        linestyle=style.dash,
        linewidth=2.0 if has_markers else 1.6,
        marker=style.marker if has_markers else None,
        markersize=4.5,
        zorder=3,
    )
    if not series.is_complete:
        axes.plot(x[-1], curve.mean[-1], marker="x", color=style.color, markersize=9, mew=2.5)


def limit_held_out(axes: Axes, all_series: list[Series], measure: Measure) -> bool:
    """Limits of the axis of held-out values: one bad optimizer must not flatten the others.

    Args:
        axes: Where the curves are.
        all_series: The optimizers.
        measure: Which values.

    Returns:
        Whether there are any.
    """
    means = [series.held_out.mean for series in all_series if series.held_out is not None]
    if not means:
        return False
    scores = measure.sign * np.concatenate(means)
    best, middle, lowest = (float(found(scores)) for found in (np.max, np.median, np.min))
    least_room = _LEAST_ROOM_OF_LOSS * abs(best) if measure is LOSS else _LEAST_ROOM
    worst = measure.sign * max(lowest, best - max(least_room, 5.0 * (best - middle)))
    low, high = axes.get_ylim()
    if measure.sign > 0:
        axes.set_ylim(worst - 0.08 * (high - worst), high + 0.04 * (high - worst))
    else:
        axes.set_ylim(low - 0.04 * (worst - low), worst + 0.08 * (worst - low))
    return True


def label_ends(axes: Axes, all_series: list[Series], measure: Measure) -> None:
    """Names to the right of both panels, each at the height of its line's end, with its key.

    Args:
        axes: The right panel, with its final limits.
        all_series: The optimizers.
        measure: What the right panel shows.
    """
    low, high = axes.get_ylim()
    labels, heights = [], []
    for series in all_series:
        ended_well = series.held_out is not None and series.is_complete
        value = series.held_out.mean[-1] if series.held_out is not None else low
        shown = measure.text(value / measure.scale)
        labels.append(f"{shown}  {series.label}" if ended_well else series.label)
        heights.append(min(1.0, max(0.0, (value - low) / (high - low))))
    for series, label, height in zip(
        all_series, labels, spread_labels(heights, gap=_LABEL_GAP), strict=True
    ):
        style = series.style
        axes.plot(
            [1.015, 1.0375, 1.06],
            [height] * 3,
            color=style.color,
            linestyle=style.dash,
            linewidth=2,
            marker=style.marker,
            markevery=[1],
            markersize=4.5,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.annotate(
            label + series.note,
            (1.07, height),
            xycoords="axes fraction",
            color=style.color,
            fontweight="bold",
            fontsize=9.5,
            va="center",
        )


def _model(config: dict[str, Any]) -> str:
    # Results of before there were other models than MLPs have no description.
    model = config.get("model") or "ReLU MLP, hidden " + "-".join(map(str, config["hidden"]))
    parameters = config["model_parameters"]
    trained = config.get("trained_parameters", parameters)
    of_all = f"{trained:,} of " if trained != parameters else ""
    return f"{model} ({of_all}{parameters:,} parameters)"


# Characters of a subtitle that fit in one line at its usual size.
_SUBTITLE = 170


def _lower_first(text: str) -> str:
    """The text within a sentence; names such as Pearson's keep their capitals."""
    return text[:1].lower() + text[1:]


def _heading(result: ComparisonResult) -> tuple[str, str]:
    config = result.config
    task = TASKS.get(config["task"])
    title = task.title if task else config["task"]
    seeds = config["seeds"]
    repeats = f"{len(seeds)} seeds: mean and range" if len(seeds) > 1 else f"seed {seeds[0]}"
    if result.is_stream:
        what = "accuracy online and held out"
        how = f"stream of {config['stream']:,} samples, batch 1"
    else:
        what = f"training loss and {_lower_first(held_out_names(result)[0])}"
        how = f"{result.data['train_samples']:,} training samples, batch {config['batch_size']}"
        if result.counts_steps:
            how += f", {config['steps']:,} steps"
    shown = [_model(config), how, config["schedule"], repeats]
    if not all(row.is_selected for row in result.summary().rows):
        shown.append("best settings")
    return f"{title}: {what} by optimizer", "  ·  ".join(shown)


def make_figure(result: ComparisonResult) -> tuple[Figure, Axes, Axes]:
    """A figure with two panels and its heading.

    Args:
        result: The comparison.

    Returns:
        ``(figure, left axes, right axes)``.
    """
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, 0, 0.99, 1), w_pad=0.08)
    left, right = figure.subplots(1, 2)
    title, subtitle = _heading(result)
    # Two lines of figure title: the second keeps the room that the layout gives to the first.
    figure.suptitle(f"{title}\n", x=0.008, ha="left", fontsize=14, fontweight="bold")
    size = 9.5 * min(1.0, _SUBTITLE / len(subtitle))
    figure.text(0.008, 0.925, subtitle, ha="left", va="top", fontsize=size, color="#555555")
    return figure, left, right


def held_out_names(result: ComparisonResult) -> tuple[str, str]:
    """Title and axis label of the held-out figure.

    Args:
        result: The comparison.

    Returns:
        ``(title, label)``.
    """
    kind = "Validation" if result.data.get("validation_samples") else "Test"
    if result.measure is LOSS:
        return f"{kind} loss", f"{result.loss_name} per {result.unit}"
    if result.measure.is_correlation:
        return f"{kind} {result.measure.title}", f"{result.measure.title}, in hundredths"
    return f"{kind} accuracy", f"correct {kind.lower()} {result.unit}s in %"
