# SPDX-License-Identifier: Apache-2.0
"""The figure of a study: a row of panels, a colour for each series, the range of the seeds as a band."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grng.compare.plot_style import RC, Style, assign_styles
from grng.compare.records import DIVERGED
from grng.studies.records import Mean, Panel, StudyResult, Value, finite, mean_of
from grng.tasks.atomic import replacing

PLOT_NAME = "study.png"
_DOTS_PER_INCH = 150
_PANEL_WIDTH = 4.6
_PER_ROW = 3
_SYMLOG_PART = 1e-4
# That the names below a panel have room for, side by side.
_CHARACTERS = 48


def _names(result: StudyResult, panel: Panel) -> list[str]:
    """The categories of a panel, in the order of their first points."""
    values = (point.get(panel.x) for run in result.runs for point in run.points)
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _pairs(result: StudyResult, panel: Panel, series: str) -> list[tuple[float, Mean]]:
    """Places and values of a series, over the runs that finished and have both."""
    names = _names(result, panel) if panel.x_scale == "category" else None
    found: list[tuple[float, Mean]] = []
    for setting in result.settings(series):
        # Runs are averaged point by point; by name, only those of the same name.
        groups: dict[tuple[int, float | None], list[tuple[float, float]]] = {}
        for points in result.finished_points(series, setting):
            for number, point in enumerate(points):
                x, y = _place(point.get(panel.x), names), finite(point.get(panel.y))
                if x is not None and y is not None:
                    groups.setdefault((number, x if names else None), []).append((x, y))
        for _, pairs in sorted(groups.items(), key=lambda group: group[0][0]):
            at, values = zip(*pairs, strict=True)
            found.append((mean_of(at).mean, mean_of(values)))
    return found


def _place(value: Value, names: list[str] | None) -> float | None:
    if names is None:
        return finite(value)
    return None if value is None else float(names.index(str(value)))


def _label(result: StudyResult, series: str) -> str:
    """The name of a series; with the runs that diverged, which are not drawn."""
    own = [run for run in result.runs if run.series == series]
    lost = sum(run.status == DIVERGED for run in own)
    return f"{series}\n({lost} of {len(own)} diverged)" if lost else series


def _set_scale(axes: Axes, panel: Panel, pairs: list[tuple[float, Mean]]) -> None:
    """The scales of a panel; linear where what is drawn has no place on that of its choice."""
    sizes = [abs(end) for _, value in pairs for end in (value.low, value.high) if end != 0]
    low = min((value.low for _, value in pairs), default=0.0)
    is_positive = low > 0 and low >= _SYMLOG_PART * max(sizes)
    if panel.y_scale == "log" and any(value.high > 0 for _, value in pairs):
        axes.set_yscale("log")
    elif panel.y_scale == "symlog" and is_positive:
        # The same picture, with more than one number at its axis.
        axes.set_yscale("log")
    elif panel.y_scale == "symlog" and sizes:
        # Linear around 0, up to the smallest value or where four powers of ten are drawn.
        axes.set_yscale("symlog", linthresh=max(min(sizes), _SYMLOG_PART * max(sizes)))
    if panel.x_scale == "log" and any(place > 0 for place, _ in pairs):
        axes.set_xscale("log")


def _draw(
    axes: Axes, panel: Panel, pairs: list[tuple[float, Mean]], style: Style, label: str
) -> None:
    x = [place for place, _ in pairs]
    y = [value.mean for _, value in pairs]
    low, high = [value.low for _, value in pairs], [value.high for _, value in pairs]
    marker = style.marker if len(x) <= 30 else None
    if panel.x_scale != "category":
        axes.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0)
        axes.plot(x, y, color=style.color, linestyle=style.dash, marker=marker, ms=4.5, label=label)
        return
    errors = [
        [a - b for a, b in zip(y, low, strict=True)],
        [a - b for a, b in zip(high, y, strict=True)],
    ]
    axes.errorbar(
        x, y, yerr=errors, color=style.color, marker=style.marker, ls="", capsize=3, label=label
    )


def _finish(axes: Axes, result: StudyResult, panel: Panel, pairs: list[tuple[float, Mean]]) -> None:
    if panel.x_scale == "category":
        names = _names(result, panel)
        longest = max((len(line) for name in names for line in name.split("\n")), default=0)
        slant = 30 if longest * len(names) > _CHARACTERS else 0
        if slant:
            # Lines of slanted names run into those of their neighbours.
            names = [name.replace("\n", " ") for name in names]
        axes.set_xticks(range(len(names)), names, rotation=slant, ha="right" if slant else "center")
        axes.margins(x=0.08)
    _set_scale(axes, panel, pairs)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)


def save_figure(result: StudyResult, folder: Path) -> Path:
    """Draw ``study.png``.

    Args:
        result: The study.
        folder: An existing folder.

    Returns:
        The path of the file.
    """
    styles = assign_styles(result.series)
    # Four are a square, not three and one.
    columns = 2 if len(result.panels) == 4 else min(len(result.panels), _PER_ROW)
    rows = -(-len(result.panels) // columns)
    with rc_context(RC):
        figure = Figure(figsize=(_PANEL_WIDTH * columns + 1.5, 3.9 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        cells = grid.ravel().tolist()
        for axes, panel in zip(cells, result.panels, strict=False):
            drawn: list[tuple[float, Mean]] = []
            for place, (series, style) in enumerate(styles.items()):
                pairs = _pairs(result, panel, series)
                if panel.x_scale == "category":
                    # Side by side, not on top of each other.
                    shift = 0.5 * (place - (len(styles) - 1) / 2) / len(styles)
                    pairs = [(x + shift, value) for x, value in pairs]
                _draw(axes, panel, pairs, style, _label(result, series))
                drawn += pairs
            _finish(axes, result, panel, drawn)
        for axes in cells[len(result.panels) :]:
            axes.set_axis_off()
        handles, labels = cells[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=9)
        heading = result.title + "\n" * (1 + result.subtitle.count("\n"))
        figure.suptitle(heading, x=0.008, ha="left", fontsize=13, fontweight="bold")
        top = 1 - 0.36 / (3.9 * rows)
        figure.text(0.008, top, result.subtitle, ha="left", va="top", fontsize=9, color="#555555")
        path = folder / PLOT_NAME
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=_DOTS_PER_INCH)
    return path
