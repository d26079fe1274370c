# SPDX-License-Identifier: Apache-2.0
"""The figure of a search: every trial's value against the option with a range, and the best so far."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grng.compare.plot_style import RC, assign_styles
from grng.tasks.atomic import replacing
from grng.tune.records import Trial, TuningResult
from grng.tune.space import Range, parse_space

PLOT_NAME = "tune.png"
_DOTS_PER_INCH = 150
_DIVERGED = "#B00020"


def _number(result: TuningResult) -> str | None:
    """The first option that has a range."""
    space = parse_space(result.config["optimizer"], result.config["space"])
    return next((key for key, values in space.items() if isinstance(values, Range)), None)


def _place(trial: Trial, number: str | None) -> float:
    value = trial.options[number] if number else trial.number
    assert isinstance(value, (int, float)), "a range is of numbers"
    return float(value)


def _group(trial: Trial, number: str | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in trial.options.items() if key != number)


def _draw_values(axes: Axes, result: TuningResult, number: str | None) -> None:
    """Values against the number, or against the trial where there is none; a colour for each choice."""
    groups = list(dict.fromkeys(_group(trial, number) for trial in result.trials))
    styles = assign_styles([f"{result.config['optimizer']}:{group}" for group in groups])
    measure, best = result.measure, result.best
    for group, style in zip(groups, styles.values(), strict=True):
        own = [t for t in result.trials if _group(t, number) == group and t.value is not None]
        x = [_place(t, number) for t in own]
        y = [measure.scale * t.value for t in own if t.value is not None]
        axes.plot(x, y, style.marker, color=style.color, alpha=0.8, label=group or None)
    lost = [t for t in result.trials if t.value is None]
    if lost:
        x = [_place(t, number) for t in lost]
        bottom = axes.get_xaxis_transform()
        axes.plot(x, [0.02] * len(lost), "x", color=_DIVERGED, transform=bottom, label="diverged")
    if best is not None and best.value is not None:
        axes.plot(
            [_place(best, number)],
            [measure.scale * best.value],
            "o",
            markersize=14,
            fillstyle="none",
            color="#333333",
            label="best",
        )
    if number is not None:
        axes.set_xscale("log")
    axes.set_xlabel(number or "trial")
    axes.set_title("Trials")
    if any(groups) or lost:
        axes.legend(fontsize=9)


def _draw_progress(axes: Axes, result: TuningResult) -> None:
    measure = result.measure
    scores = [result.score(trial) for trial in result.trials]
    best = list(itertools.accumulate(scores, max))
    known = [(n, measure.scale * measure.sign * s) for n, s in enumerate(best) if s > float("-inf")]
    if known:
        x, y = zip(*known, strict=True)
        axes.step(x, y, where="post", color="#333333")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_title("Best so far")


def save_figure(result: TuningResult, folder: Path) -> Path:
    """Draw ``tune.png``.

    Args:
        result: The search.
        folder: An existing folder.

    Returns:
        The path of the file.
    """
    unit = " in %" if result.measure.scale == 100 else ""
    with rc_context(RC):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_values(left, result, _number(result))
        _draw_progress(right, result)
        left.set_ylabel(f"{result.measure.title} on validation samples{unit}")
        c = result.config
        figure.suptitle(f"{c['optimizer']} on {c['task']}, {c['model']}", x=0.01, ha="left")
        path = folder / PLOT_NAME
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=_DOTS_PER_INCH)
    return path
