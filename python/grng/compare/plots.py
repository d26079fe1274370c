# SPDX-License-Identifier: Apache-2.0
"""The figures of a comparison: loss and accuracy against epochs and against seconds; one of a stream."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from grng.compare.measures import MEASURES
from grng.compare.plot_parts import (
    draw_curve,
    held_out_names,
    label_ends,
    limit_held_out,
    make_figure,
)
from grng.compare.plot_series import Series, collect_series
from grng.compare.plot_style import RC
from grng.compare.results import ComparisonResult
from grng.compare.stream_plot import draw_stream
from grng.compare.summary import Target
from grng.tasks.atomic import replacing

FILE_NAMES = {"epochs": "loss_accuracy_steps.png", "seconds": "loss_accuracy_seconds.png"}
STREAM_FILE_NAME = "stream_accuracy.png"
_DOTS_PER_INCH = 150
# Multiples of each power of ten that get a label.
_NARROW_TICKS = (1.0, 2.0, 3.0, 4.0, 6.0)
_WIDE_TICKS = (1.0, 2.0, 5.0)
_X_LABELS = {
    "epochs": "epochs ({steps:,} steps each)",
    "steps": "training steps",
    "seconds": "training time in seconds on {processor}",
}


def _draw_loss(axes: Axes, all_series: list[Series], result: ComparisonResult, axis: str) -> None:
    for series in all_series:
        if series.left is not None:
            draw_curve(axes, series.left, axis, series, has_markers=False)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    is_narrow = high < 12 * low
    axes.yaxis.set_major_locator(LogLocator(subs=_NARROW_TICKS if is_narrow else _WIDE_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Training loss")
    axes.set_ylabel(f"{result.loss_name} per {result.unit}, smoothed")


def _draw_target(
    axes: Axes, all_series: list[Series], target: Target, axis: str, *, in_steps: bool
) -> None:
    measure = MEASURES[target.measure]
    value = measure.scale * target.value
    axes.axhline(value, color="#555555", linestyle=(0, (5, 3)), linewidth=1.2, zorder=2)
    axes.annotate(
        f"final {measure.title} of {target.optimizer}: {measure.text(target.value)}",
        (0.015, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        color="#444444",
        fontsize=9,
        va="bottom",
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        zorder=5,
    )
    # On the side that the curves come from.
    edge = axes.get_ylim()[0 if measure.sign > 0 else 1]
    height = 0
    for series in all_series:
        curve = series.held_out
        if curve is None or series.label == target.optimizer:
            continue
        reached = np.flatnonzero(measure.sign * (curve.mean - value) >= 0)
        if not reached.size or not series.is_complete:
            continue
        x, y = curve.x(axis)[reached[0]], curve.mean[reached[0]]
        color = series.style.color
        axes.plot([x, x], [edge, y], color=color, linestyle=":", linewidth=1.3)
        axes.plot(x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor=color, mew=2)
        where = f"{x:.1f} s"
        if axis == "epochs":
            part = x / curve.epochs[-1]
            where = f"{'step' if in_steps else 'epoch'} {x:,.0f} ({part:.2f}x)"
        is_right = x > 0.5 * axes.get_xlim()[1]
        axes.annotate(
            f" reached: {where} ",
            (x, 0.02 + 0.06 * height if measure.sign > 0 else 0.94 - 0.06 * height),
            xycoords=("data", "axes fraction"),
            color=color,
            fontsize=9,
            ha="right" if is_right else "left",
        )
        height += 1


def _draw_held_out(
    axes: Axes, all_series: list[Series], result: ComparisonResult, axis: str
) -> None:
    target = result.summary().target
    for series in all_series:
        if series.held_out is not None:
            draw_curve(axes, series.held_out, axis, series, has_markers=True)
    if limit_held_out(axes, all_series, result.measure):
        if target is not None:
            _draw_target(axes, all_series, target, axis, in_steps=result.counts_steps)
        label_ends(axes, all_series, result.measure)
    title, label = held_out_names(result)
    axes.set_title(title)
    axes.set_ylabel(label)


def _short(processor: str) -> str:
    return re.sub(r"\(R\)|\(TM\)|\(tm\)| CPU| Processor", "", processor)


def draw(result: ComparisonResult, axis: str) -> Figure:
    """One figure: training loss on the left, held-out accuracy or loss on the right.

    Args:
        result: The comparison.
        axis: ``"epochs"`` or ``"seconds"``.

    Returns:
        The figure, without any window.
    """
    all_series = collect_series(result)
    with rc_context(RC):
        figure, loss_axes, held_out_axes = make_figure(result)
        _draw_loss(loss_axes, all_series, result, axis)
        _draw_held_out(held_out_axes, all_series, result, axis)
        steps = max((run.steps_per_epoch for run in result.runs), default=0)
        processor = _short(result.environment["gpu"] or result.environment["cpu"])
        x_label = _X_LABELS["steps" if axis == "epochs" and result.counts_steps else axis]
        for axes in (loss_axes, held_out_axes):
            axes.set_xlabel(x_label.format(steps=steps, processor=processor))
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=axis == "epochs"))
    return figure


def save_figures(result: ComparisonResult, folder: Path) -> list[Path]:
    """Draws the figures into a folder; nothing before the first training step.

    Args:
        result: The comparison.
        folder: An existing folder.

    Returns:
        The written files.
    """
    if not any(run.step_loss for run in result.runs):
        return []
    if result.is_stream:
        figures = {STREAM_FILE_NAME: draw_stream(result)}
    else:
        figures = {name: draw(result, axis) for axis, name in FILE_NAMES.items()}
    for name, figure in figures.items():
        with replacing(folder / name) as partial:
            figure.savefig(partial, dpi=_DOTS_PER_INCH)
    return [folder / name for name in figures]
