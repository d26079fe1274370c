# SPDX-License-Identifier: Apache-2.0
"""The two figures of a comparison: loss and accuracy against epochs, and against seconds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from grng.compare.curves import Curve
from grng.compare.plot_series import Series, collect_series
from grng.compare.plot_style import RC, spread_labels
from grng.compare.results import ComparisonResult
from grng.compare.summary import Target
from grng.tasks import TASKS
from grng.tasks.atomic import replacing

FILE_NAMES = {"epochs": "loss_accuracy_steps.png", "seconds": "loss_accuracy_seconds.png"}
_DOTS_PER_INCH = 150
# Least distance between two labels, as a part of the height of the axes.
_LABEL_GAP = 0.06
# Multiples of each power of ten that get a label.
_NARROW_TICKS = (1.0, 2.0, 3.0, 4.0, 6.0)
_WIDE_TICKS = (1.0, 2.0, 5.0)
_X_LABELS = {
    "epochs": "epochs ({steps:,} steps each)",
    "seconds": "training time in seconds on {processor}",
}


def _draw(axes: Axes, curve: Curve, axis: str, series: Series, *, has_markers: bool) -> None:
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


def _draw_loss(axes: Axes, all_series: list[Series], axis: str) -> None:
    for series in all_series:
        if series.loss is not None:
            _draw(axes, series.loss, axis, series, has_markers=False)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    is_narrow = high < 12 * low
    axes.yaxis.set_major_locator(LogLocator(subs=_NARROW_TICKS if is_narrow else _WIDE_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Training loss")
    axes.set_ylabel("cross entropy per sample, smoothed")


def _accuracy_floor(all_series: list[Series]) -> float | None:
    """Lower end of the accuracy axis: one bad optimizer must not flatten the others."""
    means = [series.accuracy.mean for series in all_series if series.accuracy is not None]
    if not means:
        return None
    best = max(float(mean.max()) for mean in means)
    middle = float(np.median(np.concatenate(means)))
    lowest = min(float(mean.min()) for mean in means)
    return max(lowest, best - max(2.0, 5.0 * (best - middle)))


def _draw_target(axes: Axes, all_series: list[Series], target: Target, axis: str) -> None:
    accuracy = 100 * target.accuracy
    axes.axhline(accuracy, color="#555555", linestyle=(0, (5, 3)), linewidth=1.2, zorder=2)
    axes.annotate(
        f"final accuracy of {target.optimizer}: {accuracy:.2f} %",
        (0.015, accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        color="#444444",
        fontsize=9,
        va="bottom",
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        zorder=5,
    )
    height = 0
    for series in all_series:
        curve = series.accuracy
        if curve is None or series.label == target.optimizer:
            continue
        reached = np.flatnonzero(curve.mean >= accuracy)
        if not reached.size or not series.is_complete:
            continue
        x, y = curve.x(axis)[reached[0]], curve.mean[reached[0]]
        color = series.style.color
        axes.plot([x, x], [axes.get_ylim()[0], y], color=color, linestyle=":", linewidth=1.3)
        axes.plot(x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor=color, mew=2)
        where = f"epoch {x:.0f}" if axis == "epochs" else f"{x:.1f} s"
        is_right = x > 0.5 * axes.get_xlim()[1]
        axes.annotate(
            f" reached: {where} ",
            (x, 0.02 + 0.06 * height),
            xycoords=("data", "axes fraction"),
            color=color,
            fontsize=9,
            ha="right" if is_right else "left",
        )
        height += 1


def _label_ends(axes: Axes, all_series: list[Series]) -> None:
    """Names to the right of both panels, each at the height of its line's end, with its key."""
    low, high = axes.get_ylim()
    labels, heights = [], []
    for series in all_series:
        ended_well = series.accuracy is not None and series.is_complete
        value = series.accuracy.mean[-1] if series.accuracy is not None else low
        labels.append(f"{value:.2f} %  {series.label}" if ended_well else series.label)
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


def _draw_accuracy(axes: Axes, all_series: list[Series], target: Target | None, axis: str) -> None:
    for series in all_series:
        if series.accuracy is not None:
            _draw(axes, series.accuracy, axis, series, has_markers=True)
    floor = _accuracy_floor(all_series)
    if floor is not None:
        top = axes.get_ylim()[1]
        axes.set_ylim(floor - 0.08 * (top - floor), top + 0.04 * (top - floor))
        if target is not None:
            _draw_target(axes, all_series, target, axis)
        _label_ends(axes, all_series)
    axes.set_title("Test accuracy")
    axes.set_ylabel("correct test samples in %")


def _heading(result: ComparisonResult) -> tuple[str, str]:
    config = result.config
    task = TASKS.get(config["task"])
    title = task.title if task else config["task"]
    hidden = "-".join(str(size) for size in config["hidden"])
    seeds = config["seeds"]
    repeats = f"{len(seeds)} seeds: mean and range" if len(seeds) > 1 else f"seed {seeds[0]}"
    return (
        f"{title}: training loss and test accuracy by optimizer",
        f"ReLU MLP, hidden {hidden} ({config['model_parameters']:,} parameters)  ·  "
        f"{result.data['train_samples']:,} training samples, batch {config['batch_size']}  ·  "
        f"{config['schedule']}  ·  {repeats}",
    )


def _short(processor: str) -> str:
    return re.sub(r"\(R\)|\(TM\)|\(tm\)| CPU| Processor", "", processor)


def draw(result: ComparisonResult, axis: str) -> Figure:
    """One figure: training loss on the left, test accuracy on the right.

    Args:
        result: The comparison.
        axis: ``"epochs"`` or ``"seconds"``.

    Returns:
        The figure, without any window.
    """
    all_series = collect_series(result)
    with rc_context(RC):
        figure = Figure(figsize=(13, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        engine = figure.get_layout_engine()
        if isinstance(engine, ConstrainedLayoutEngine):
            engine.set(rect=(0, 0, 0.99, 1), w_pad=0.08)
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        _draw_loss(loss_axes, all_series, axis)
        _draw_accuracy(accuracy_axes, all_series, result.summary().target, axis)
        steps = max((run.steps_per_epoch for run in result.runs), default=0)
        processor = _short(result.environment["gpu"] or result.environment["cpu"])
        for axes in (loss_axes, accuracy_axes):
            axes.set_xlabel(_X_LABELS[axis].format(steps=steps, processor=processor))
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=axis == "epochs"))
        title, subtitle = _heading(result)
        # Two lines of figure title: the second keeps the room that the layout gives to the first.
        figure.suptitle(f"{title}\n", x=0.008, ha="left", fontsize=14, fontweight="bold")
        figure.text(0.008, 0.925, subtitle, ha="left", va="top", fontsize=9.5, color="#555555")
    return figure


def save_figures(result: ComparisonResult, folder: Path) -> list[Path]:
    """Draws both figures into a folder; nothing before the first training step.

    Args:
        result: The comparison.
        folder: An existing folder.

    Returns:
        The written files.
    """
    if not any(run.step_loss for run in result.runs):
        return []
    written = []
    for axis, name in FILE_NAMES.items():
        with replacing(folder / name) as partial:
            draw(result, axis).savefig(partial, dpi=_DOTS_PER_INCH)
        written.append(folder / name)
    return written
